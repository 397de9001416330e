"""The command line ``pvae``: options to a recipe and run options, results to the screen, a mistake to one line.

:mod:`app` has the commands that train and judge runs, :mod:`run_commands` those that use one. No signature imports
PyTorch, so that ``--help`` answers at once.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
