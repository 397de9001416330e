"""The approximate posterior q(z|x): variational families, guides, refinement, and the one place that scores traces.

``Amortized`` with ``DiagonalNormal`` is the default guide; ``PerDatapoint`` and ``SemiAmortized`` are other inference
methods for the same families, ``RefinedGuide`` optimizes another guide's q_params for each row, and ``freeze`` computes
them once. ``log_weights`` scores model and guide; every bound is a function of the log-weights.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
