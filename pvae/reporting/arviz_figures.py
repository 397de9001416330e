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
    """Draw intervals of the posterior draws of one test row's latents, for each variant (forest plot).

    Variants have different decoders, and so different latent axes.

    Arguments:
        idata: draws of a comparison, as `Comparison.idata`.
        row: number of the test row.
    """
    by_variant: Any = {"aes": {"color": ["variant"]}} | BACKEND
    return _figure(_arviz_plots().plot_forest(idata.sel(row=row), combined=True, **by_variant))


def plot_ranks(chains: Chains, row: int = 0) -> Figure:
    """Draw the rank ECDFs of HMC chains for one row; lines outside the band show chains that do not agree.

    Arguments:
        chains: draws [C, T, B, D] of `run_long_chains`.
        row: number of the datapoint.

    Source: Säilynoja, Bürkner and Vehtari (2022), *Graphical test for discrete uniformity*, Statistics and Computing.
    """
    from arviz_base import from_dict

    draws = from_dict({"posterior": {"u": to_numpy(chains.draws[:, :, row])}})
    return _figure(_arviz_plots().plot_rank(draws, **BACKEND))


def plot_predictive(idata: xr.DataTree, variant: str | None = None, rows: int = 20) -> Figure:
    """Draw posterior predictive intervals of each row's mean value, with the observed ones.

    Arguments:
        idata: draws of a comparison, as `Comparison.idata`.
        variant: its name, the first unless given.
        rows: number of test rows, from the first.
    """
    name = idata["posterior"].variant.to_numpy()[0] if variant is None else variant
    groups = {
        "posterior_predictive": idata["posterior_predictive"].sel(variant=name),
        "observed_data": idata["observed_data"],
    }
    means = {group: values.to_dataset().isel(row=slice(rows)).mean("value") for group, values in groups.items()}
    return _figure(_arviz_plots().plot_ppc_interval(xr.DataTree.from_dict(means), backend="matplotlib"))


def _arviz_plots() -> Any:
    with suppress(ImportError), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, but arviz-plots 0.8, the last one for Python 3.11, expects it
        import matplotlib.style.core  # noqa: F401
    import arviz_plots

    return arviz_plots


def _figure(collection: Any) -> Figure:
    return collection.viz["figure"].item()
