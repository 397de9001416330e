"""The generative program p(x, z) and the parts one chooses for it: networks, likelihood, prior.

``VAE`` is the default program, with an ``MLP`` decoder, a ``Bernoulli`` likelihood and a ``StandardNormal`` prior;
any Pyro program with latents under plate "data" takes its place. ``mask_missing`` and ``with_noise`` are effect
handlers that change what is observed.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
