"""Figures by ArviZ of draws: one row's latents by variant, ranks of HMC chains, posterior predictive intervals."""

from __future__ import annotations

import warnings
from contextlib import suppress
from typing import Any

import xarray as xr
from matplotlib.figure import Figure

from pvae.reporting.style import COLOURS
from pvae.runtime.torch_state import to_numpy
from pvae.samplers.hmc import Chains

BACKEND: Any = {"backend": "matplotlib", "color": list(COLOURS)}


def plot_latents(idata: xr.DataTree, row: int = 0) -> Figure:
    """Draw intervals of one test row's latents for each variant of a `Comparison.idata` (forest plot).

    Variants have different decoders, and so different latent axes.
    """
    by_variant: Any = {"aes": {"color": ["variant"]}} | BACKEND
    return _arviz_plots().plot_forest(idata.sel(row=row), combined=True, **by_variant).viz["figure"].item()


def plot_ranks(chains: Chains, row: int = 0) -> Figure:
    """Draw the rank ECDFs of HMC chains (`run_long_chains`) for one row; lines outside the band: they do not agree.

    Source: Säilynoja, Bürkner and Vehtari (2022), *Graphical test for discrete uniformity*, Statistics and Computing.
    """
    from arviz_base import from_dict

    draws = from_dict({"posterior": {"u": to_numpy(chains.draws[:, :, row])}})
    return _arviz_plots().plot_rank(draws, **BACKEND).viz["figure"].item()


def plot_predictive(idata: xr.DataTree, variant: str | None = None, rows: int = 20) -> Figure:
    """Draw posterior predictive intervals of the mean value of the first ``rows`` test rows, with the observed ones.

    They are of the variant of this name in a `Comparison.idata`, its first unless given.
    """
    name = idata["posterior"].variant.to_numpy()[0] if variant is None else variant
    groups = {"posterior_predictive": idata["posterior_predictive"].sel(variant=name)}
    groups["observed_data"] = idata["observed_data"]
    means = {group: values.to_dataset().isel(row=slice(rows)).mean("value") for group, values in groups.items()}
    intervals = _arviz_plots().plot_ppc_interval(xr.DataTree.from_dict(means), backend="matplotlib")
    return intervals.viz["figure"].item()


def _arviz_plots() -> Any:
    with suppress(ImportError), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, but arviz-plots 0.8, the last one for Python 3.11, expects it
        import matplotlib.style.core  # noqa: F401
    import arviz_plots

    return arviz_plots
