"""pvae: which approximate posterior to trust, and what it costs, for latent-variable models on Pyro."""

import lazy_loader

__version__ = "0.1.0"
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
