from .arviz_export import load_idata
from .opened_run import Run, TrainedVariant, open_run, open_variants
from .row_selection import select_rows
from .sweep import RunOptions, SweepPoint, sweep_points, train_sweep

__all__ = [
    "Run",
    "RunOptions",
    "SweepPoint",
    "TrainedVariant",
    "load_idata",
    "open_run",
    "open_variants",
    "select_rows",
    "sweep_points",
    "train_sweep",
]
