"""What one does with a fitted VAE: rows in, tensors out.

Each function takes a Pyro program and its guide as ``fit`` has trained them, and tensors or NumPy arrays; the command
line's commands of the same names take a run folder.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
