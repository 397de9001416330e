"""Rows in: read, checked, split and transformed; in memory or memory-mapped.

``load_data`` is the way in: a name (``digits``, ``mnist``, ...) or a file becomes a ``Dataset`` with train,
validation and test rows. Build a ``Dataset`` yourself where the rows are already tensors; ``MemmapRows`` keeps
training rows on disk.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
