from .pyro_params import LocalModule, local_method, module_of
from .result_cache import ResultCache
from .torch_state import RandomState, pick_device, seeded

__all__ = ["LocalModule", "RandomState", "ResultCache", "local_method", "module_of", "pick_device", "seeded"]
