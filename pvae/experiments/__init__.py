"""Runs on disk: train a sweep, compare, diagnose, export, open again.

``open_run`` reads a run folder for use. The others are what ``pvae compare``, ``pvae evaluate`` and ``pvae diagnose``
do.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
