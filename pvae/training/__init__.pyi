from . import objectives
from .loop import Fit, fit
from .optimizer import FusedAdam

__all__ = ["Fit", "FusedAdam", "fit", "objectives"]
