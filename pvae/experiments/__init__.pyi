from .opened_run import Run, open_run
from .sweep import SweepPoint, sweep_points, train_sweep

__all__ = ["Run", "SweepPoint", "open_run", "sweep_points", "train_sweep"]
