"""Densities that PyTorch and Pyro lack, or compute unsafely in float32.

Likelihoods, priors and families choose from these; you need them directly only when you write one of your own.
:mod:`counts` and :mod:`univariate` score single entries, :mod:`mixtures` and :mod:`flows` whole vectors,
:mod:`masked` and :mod:`noisy` rows with missing or noisy entries.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
