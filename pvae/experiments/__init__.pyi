from .arviz_export import load_idata
from .row_selection import select_rows
from .run import Run, TrainedVariant, open_run, open_variants
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
