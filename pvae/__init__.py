"""pvae: which approximate posterior to trust, and what it costs, for latent-variable models on Pyro."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

# Sub-modules are imported at their first use, so that `pvae --help` answers at once.
MODULES = (
    "ais",
    "anomalies",
    "beside",
    "building",
    "calibration",
    "captured",
    "checkpoints",
    "checks",
    "classes",
    "cli",
    "coding",
    "commands",
    "compare",
    "components",
    "console",
    "curvature",
    "data",
    "deciding",
    "densities",
    "diagnose",
    "distributed",
    "drawing",
    "engines",
    "errors",
    "evaluation",
    "export",
    "families",
    "figures",
    "files",
    "flags",
    "flows",
    "gaps",
    "generative",
    "grid",
    "guides",
    "health",
    "hmc",
    "latent_panels",
    "launch",
    "ledger",
    "likelihoods",
    "map_panels",
    "mapped",
    "missing",
    "mixtures",
    "networks",
    "noise",
    "objectives",
    "opened",
    "optimizer",
    "panels",
    "passes",
    "planes",
    "precision",
    "predictive",
    "priors",
    "proximity",
    "ranks",
    "recipe",
    "recorded",
    "reference",
    "refine",
    "report",
    "restoring",
    "results",
    "rules",
    "runs",
    "runtime",
    "sites",
    "sklearn",
    "sources",
    "stages",
    "stats",
    "stopping",
    "support",
    "tables",
    "tally",
    "targets",
    "training",
    "use_pictures",
    "used",
    "uses",
    "using",
    "values",
    "verdicts",
    "weights",
)
__all__ = ["__version__", *MODULES]


def __getattr__(name: str) -> Any:
    if name in MODULES:
        return importlib.import_module(f"pvae.{name}")
    raise AttributeError(f"module 'pvae' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)
