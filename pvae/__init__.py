"""pvae: which approximate posterior to trust, and what it costs, for latent-variable models on Pyro.

Verbs: ``load_data``, ``fit``, ``evaluate``, ``diagnose``, ``posterior``, ``compare``, ``open_run``, ``log_weights``,
``mask_missing``. Nouns: ``VAE`` and the guides ``Amortized``, ``PerDatapoint``, ``SemiAmortized``. Namespaces hold
the parts: ``pvae.likelihoods``, ``pvae.priors``, ... Every name is imported at its first use, so that ``import pvae``
is quick.
"""

import sys
from typing import Any

import lazy_loader

from pvae._moved import MovedModules
from pvae.errors import nearest

__version__ = "0.2.0"
_load, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
sys.meta_path.append(MovedModules())


def __getattr__(name: str) -> Any:
    if name in __all__:
        return _load(name)
    raise AttributeError(f"module 'pvae' has no attribute '{name}'{nearest(name, __all__)}")
