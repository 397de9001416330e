from .dataset import Batch, Dataset
from .loading import load_data
from .memmap import MemmapRows

__all__ = ["Batch", "Dataset", "MemmapRows", "load_data"]
