"""Samplers and searches over the log joint density log p(x, u), u being the unconstrained latents of each row.

``anneal`` (AIS) estimates the evidence and ``sandwich`` (BDMC) bounds it from both sides; :mod:`hmc` runs chains for
each row; ``fit_gaussian`` finds the best full-covariance normal. All take a ``LogJoint``, made from any program.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
