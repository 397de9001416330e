"""Training: one SVI step by several engines, and the loop around it.

``fit`` trains a model and a guide; ``ELBO`` is the default objective, :mod:`objectives` has the others. ``FusedAdam``
lets plain ``SVI`` train a ``PerDatapoint`` guide. Engines, CUDA graphs and data parallelism change the time of a step,
not its loss.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
