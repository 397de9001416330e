"""From words to objects: the registry of components, the recipe, the build, and checks before anything is spent.

A ``Recipe`` fixes every number of a run; ``resolve`` fills in its defaults, ``build_model`` makes the objects,
``check_recipe`` refuses what training would.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
