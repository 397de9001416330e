"""The approximate posterior q(z|x): families, guides, refinement, and the one place that scores traces.

``Amortized`` with ``DiagonalNormal`` is the default guide; ``PerDatapoint`` and ``SemiAmortized`` find the same
family's parameters otherwise, and ``RefinedGuide`` optimizes another guide's for each row. ``log_weights`` scores
model and guide; every bound is a function of what it returns.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
