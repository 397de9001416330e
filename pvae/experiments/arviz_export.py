"""Export to ArviZ: draws and the quantities of each row as an xarray DataTree in ArviZ's layout."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import arviz_base
import numpy as np
import torch
import xarray as xr
from pandas import DataFrame
from torch import Tensor

from pvae.diagnostics.quantities import describe
from pvae.errors import UserError
from pvae.experiments.results import common_settings, library_versions
from pvae.inference.batching import Values, as_rows, inference_mode
from pvae.inference.guides import Guide
from pvae.inference.importance import LogWeights, log_weights
from pvae.inference.posterior import posterior_predictive, prior_predictive
from pvae.recipes.recipe import Recipe
from pvae.runtime.files import atomic_replace
from pvae.runtime.pyro_params import Program
from pvae.runtime.torch_state import to_numpy

FILE = "idata.nc"
# Draws of each row's latents: most, least, and the numbers they may be. Draws of x, of the prior; pictures.
MOST, LEAST, NUMBERS = 100, 20, 2**21
X_DRAWS, PRIOR_DRAWS, PICTURES = 20, 200, 32
# Bytes of draws of x in one file before they are compressed. Whole numbers shrink to a tenth, others hardly.
BYTES = {"i": 2**24, "f": 2**23}
WHOLE = (np.int8, np.int16, np.int32)
STATISTICS = ("elbo", "ess", "k_hat")
NOTES = {
    "posterior": "draws from the guide q(z|x), which stands for the posterior",
    "posterior_predictive": "x: draws of p(x|z) at draws from the guide, for the row that z was inferred from",
    "log_likelihood": "log p(x|z) at draws of the row's own z from q; log p(x) of a row is evidence in the group test",
    "sample_stats": "log_weight: log p(x, z) - log q(z|x) in nats; the rest as in the group test",
    "prior": "draws of the latents by the program alone",
    "prior_predictive": "x: draws of p(x|z) at the latents of the group prior, draw by draw",
    "means": "means of p(x|z): x at one draw from the guide, prior_x at draws from the prior",
}


@dataclass
class Draws:
    """Draws and quantities that one fitted variant gives to the export, for B test rows of C values.

    Attributes:
        weights: log-densities and latents of K draws from the guide, [K, B].
        x, x_mean: draws of p(x|z) for the first R rows, [M, R, C]; its mean at one draw from the guide, [B, C].
        prior: latents by site, drawn by the program, [S, ...].
        prior_x, prior_mean: draws of p(x|z) at them, [S, C]; its means at the first P, [P, C].
        values: quantities of each row by name, [B], by split.
    """

    weights: LogWeights
    x: Tensor
    x_mean: Tensor
    prior: dict[str, Tensor]
    prior_x: Tensor
    prior_mean: Tensor
    values: dict[str, dict[str, Tensor]] = field(default_factory=dict)


def draw_for_export(model: Program, guide: Guide, x: Tensor, *, seed: int = 0) -> Draws:
    """Draw what the export and the page show of a fit, for new rows x [B, C]; ``values`` are left to the caller."""
    with inference_mode(seed=seed):
        q_params = guide.params(x)
        q, K = guide.with_params(q_params), min(MOST, max(LEAST, NUMBERS // (len(x) * guide.sites.dim)))
        weights = log_weights(model, q, x, K=K, keep_latents=True)
        mean = posterior_predictive(model, q, x).likelihood.mean
        rows = max(X_DRAWS, BYTES["i"] // (X_DRAWS * x[0].numel()))
        few = guide.with_params(q_params[:rows])
        draws = [posterior_predictive(model, few, x[:rows]).likelihood.sample() for _ in range(X_DRAWS)]
    with inference_mode(seed=seed):
        prior = prior_predictive(model, x.repeat(-(-PRIOR_DRAWS // len(x)), 1)[:PRIOR_DRAWS])
        prior_x, prior_mean = prior.likelihood.sample(), prior.likelihood.mean[:PICTURES]
    return Draws(weights, torch.stack(draws), mean, prior.latents, prior_x, prior_mean)


def summarize_latents(
    model: Program, guide: Guide, x: Values, index: Tensor | None = None, *, K: int = 100, seed: int = 0, **options: Any
) -> DataFrame:
    """Summarize K draws of each row's latents from the guide by ``arviz_stats.summary``, which takes the options."""
    import arviz_stats

    rows = as_rows(x, model)
    with inference_mode(model, guide, seed=seed):
        q = guide.with_params(guide.params(rows, None if index is None else index.to(rows.device)))
        latents = log_weights(model, q, rows, K=K, keep_latents=True).latents
    posterior = _group("posterior", _sites([latents], ("chain", "draw", "variant", "row")), ["q"])
    return arviz_stats.summary(posterior.squeeze("variant", drop=True), **{"kind": "stats"} | options)


def to_datatree(
    variants: dict[str, Draws], x: Tensor, labels: Tensor | None, attributes: dict[str, Any]
) -> xr.DataTree:
    """Return a DataTree with ArviZ's groups, most of them with a dimension ``variant``.

    Groups beside ArviZ's: ``means`` (of x, for pictures), ``train`` and ``test`` (the quantities of each row). Latents
    that a variant lacks are NaN. Draws of x are kept of as many first rows as fit into ``BYTES``, at least those that
    are pictured; the group's attribute ``rows`` says how many.

    Arguments:
        x, labels: the rows, [B, C] or, where the program is given further columns, [B, C + G]; their classes, [B].
        attributes: of the root; what is no number or text is written as JSON.
    """
    sampled, draws = ("chain", "draw", "variant"), list(variants.values())
    width = draws[0].x.shape[-1]
    replicates = _compact(_stack([d.x for d in draws]))
    replicates = replicates[..., : max(X_DRAWS, BYTES[replicates.dtype.kind] // replicates[..., :1, :].nbytes), :]
    log_w = {"log_weight": ((*sampled, "row"), _stack([d.weights.log_w for d in draws]))}
    groups: dict[str, dict[str, Any]] = {
        "posterior": _sites([d.weights.latents for d in draws], (*sampled, "row")),
        "posterior_predictive": {"x": ((*sampled, "row", "value"), replicates)},
        "log_likelihood": {"x": ((*sampled, "row"), _stack([d.weights.log_lik for d in draws]))},
        "sample_stats": log_w | _quantities(draws, "test", STATISTICS),
        "prior": _sites([d.prior for d in draws], sampled),
        "prior_predictive": {"x": ((*sampled, "value"), _compact(_stack([d.prior_x for d in draws])))},
        "observed_data": {"x": (("row", "value"), _compact(to_numpy(x[:, :width])))},
        "constant_data": {} if labels is None else {"label": (("row",), to_numpy(labels))},
        "means": {
            "x": (("variant", "row", "value"), np.stack([to_numpy(d.x_mean) for d in draws])),
            "prior_x": (("variant", "draw", "value"), np.stack([to_numpy(d.prior_mean) for d in draws])),
        },
    }
    if x.shape[1] > width:
        groups["constant_data"]["given"] = ("row", "column"), _compact(to_numpy(x[:, width:]))
    groups |= {split: _quantities(draws, split) for split in draws[0].values}
    tree = xr.DataTree.from_dict({name: _group(name, group, [*variants]) for name, group in groups.items() if group})
    tree["posterior_predictive"].attrs["rows"] = f"the first {replicates.shape[3]} of {len(x)}"
    tree.attrs = {k: v if isinstance(v, (str, int, float)) else json.dumps(v) for k, v in attributes.items()}
    return tree


def attributes(group: Mapping[str, Any], recipes: Mapping[str, Recipe]) -> dict[str, Any]:
    """Return what made the numbers of a group of ``results.json``: data, recipes by variant, versions, seed."""
    about, versions, shared = group["data"], library_versions(), common_settings(list(recipes.values()))
    settings = {name: asdict(recipe) for name, recipe in recipes.items()}
    return {
        "data": about["summary"],
        **{name: about[name] for name in ("binarize", "base_measure", "digest", "shape")},
        "seed": next(iter(recipes.values())).seed,
        "recipe": shared,
        "variants": {name: {k: v for k, v in values.items() if k not in shared} for name, values in settings.items()},
        "versions": versions,
        "estimators": {name: value["estimator"] for row in group["rows"] for name, value in row["test"].items()},
        "inference_library": "pvae-pyro",
        "inference_library_version": versions["pvae-pyro"],
    }


def _stack(values: list[Tensor]) -> np.ndarray:
    """[chain = 1, draw, variant, ...] from [draw, ...] of each variant."""
    return np.stack([to_numpy(v) for v in values], 1)[None]


def _compact(values: np.ndarray) -> np.ndarray:
    """Whole numbers as the smallest signed integers that hold them, so that differences stay right."""
    whole = np.isfinite(values).all() and (values == np.rint(values)).all()
    fits = [kind for kind in WHOLE if whole and np.abs(values).max(initial=0) <= np.iinfo(kind).max]
    return values.astype(fits[0] if fits else np.float32)


def _sites(latents: list[dict[str, Tensor]], dims: tuple[str, ...]) -> dict[str, Any]:
    """Dimensions and draws of each site, NaN where a variant lacks the site or has fewer dimensions."""
    sites = {}
    for site in dict.fromkeys(site for draws in latents for site in draws):
        present = [draws[site] for draws in latents if site in draws]
        shape = np.max([values.shape for values in present], 0).tolist()
        padded = [present[0].new_full(shape, torch.nan) for _ in latents]
        for whole, draws in zip(padded, latents, strict=True):
            if site in draws:
                whole[tuple(map(slice, draws[site].shape))] = draws[site]
        array = _stack(padded)
        sites[site] = ((*dims, *(f"{site}_dim{i or ''}" for i in range(array.ndim - len(dims)))), array)
    return sites


def _group(name: str, arrays: dict[str, Any], variants: list[str]) -> xr.Dataset:
    """Build a group by ArviZ's constructor, from dimensions, values and attributes of each variable."""
    dims, values = ({key: array[i] for key, array in arrays.items()} for i in (0, 1))
    layout: dict[str, Any] = {"coords": {"variant": variants}, "dims": dims, "sample_dims": [], "index_origin": 0}
    dataset = arviz_base.from_dict({name: values}, **layout)[name].to_dataset()
    del dataset.attrs["created_at"]  # equal runs have equal files
    dataset.attrs |= {"note": NOTES[name]} if name in NOTES else {}
    for key, (_, _, *attributes) in arrays.items():
        dataset[key].attrs.update(*attributes)
    return dataset


def _quantities(draws: list[Draws], split: str, names: tuple[str, ...] = ()) -> dict[str, Any]:
    """Quantities of each row of a split, all or those named; NaN where a variant has none."""
    quantities, every = {}, [d.values.get(split, {}) for d in draws]
    blank = torch.full((max((len(v) for values in every for v in values.values()), default=0),), torch.nan)
    for name in dict.fromkeys(name for values in every for name in values):
        if name in names or not names:
            array = np.stack([to_numpy(values.get(name, blank)) for values in every])
            quantities[name] = ("variant", "row"), array, {"units": describe(name).unit}
    return quantities


def idata_name(group: int = 1) -> str:
    """Return the file's name: ``idata.nc``, ``idata-2.nc`` and so on for further groups of variants on other data."""
    return FILE if group == 1 else f"idata-{group}.nc"


def save_idata(tree: xr.DataTree, folder: Path, group: int = 1) -> None:
    """Write ``idata.nc``, whole or not at all."""
    packed = {"zlib": True, "complevel": 4, "shuffle": True}
    encoding = {node.path: dict.fromkeys(map(str, node.data_vars), packed) for node in tree.leaves}
    with atomic_replace(folder / idata_name(group)) as temporary:
        tree.to_netcdf(temporary, engine="h5netcdf", encoding=encoding)


def load_idata(folder: Path, group: int = 1) -> xr.DataTree:
    """Read ``idata.nc`` into memory.

    Raises:
        UserError: it is missing or broken.
    """
    path = folder / idata_name(group)
    try:
        with xr.open_datatree(path, engine="h5netcdf") as tree:
            for node in tree.subtree:  # DataTree.load leaves a variable out that is named as a group is
                for variable in node.variables.values():
                    variable.load()
            return tree
    except FileNotFoundError:
        raise UserError(f"{folder} has no {path.name}; pvae evaluate {folder} writes it") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} can't be read ({error}); pvae evaluate {folder} writes it anew") from error
