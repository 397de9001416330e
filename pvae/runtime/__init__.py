"""State of PyTorch, Pyro and the machine made local: random streams, parameters, tracing, processes, files.

Start at :mod:`torch_state` (``seeded``, ``halve_on_oom``) and :mod:`pyro_params` (``LocalModule``, which keeps a
program's parameters out of Pyro's global store). :mod:`tracing` turns a function of tensors into a graph and replays
it; :mod:`distributed` alone knows of several processes. Nothing here knows of models or data.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
