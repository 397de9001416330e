"""Runs on disk: train a sweep, compare, diagnose, export, open again.

``open_run`` opens one variant of a run folder, with the applications as methods; ``open_variants`` all of them.
``load_idata`` reads a comparison's draws as an ArviZ DataTree. What else is here serves the command line.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
