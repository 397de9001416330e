"""Export: what was drawn and measured, as an xarray DataTree in ArviZ's layout."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from pyro import poutine
from torch import Tensor

from pvae.errors import UserError
from pvae.inference.guides import Guide
from pvae.inference.importance import LogWeights, log_weights, random_sites
from pvae.inference.latents import observed_site
from pvae.runtime.files import atomic_replace
from pvae.runtime.pyro_params import Program
from pvae.runtime.torch_state import no_validation, seeded

FILE = "idata.nc"
# Draws of each row's latents: at most, at least, and how many numbers they may be. Draws of x, of the prior; pictures.
MOST, LEAST, NUMBERS = 100, 20, 2**21
X_DRAWS, PRIOR_DRAWS, PICTURES = 20, 200, 32
# Bytes of draws of x in one file before they are compressed. Whole numbers shrink to a tenth, others hardly.
BYTES = {"i": 2**24, "f": 2**23}
WHOLE = (np.int8, np.int16, np.int32)
STATISTICS = ("elbo", "ess", "k_hat")
UNITS = {"ess": "draws", "k_hat": "1"}
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
    """What one fitted variant gives to the export, for B test rows of C values.

    Attributes:
        weights: log-densities and latents of K draws from the guide, [K, B].
        x: draws of p(x|z) at draws from the guide, for the first R rows, [M, R, C].
        x_mean: mean of p(x|z) at one draw, [B, C].
        prior: latents by site, drawn by the program, [S, ...].
        prior_x: draws of p(x|z) at them, [S, C].
        prior_mean: means of p(x|z) at draws from the prior, [P, C].
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
    """Draw what the export and the page show of a fit, for the rows x [B, C]; ``values`` are left to the caller.

    Arguments:
        model: a Pyro program.
        guide: a family with a source of its parameters, to which the rows are new.
        x: rows, [B, C].
        seed: of all draws.
    """
    with no_validation(), torch.no_grad(), seeded(seed):
        q_params = guide.params(x)
        q, K = guide.with_params(q_params), min(MOST, max(LEAST, NUMBERS // (len(x) * guide.sites.dim)))
        weights = log_weights(model, q, x, K=K, keep_latents=True)
        mean = _at_a_draw(model, q, x).mean
        rows = _room(BYTES["i"] // (X_DRAWS * x[0].numel()))
        some = guide.with_params(q_params[:rows])
        replicates = torch.stack([_at_a_draw(model, some, x[:rows]).sample() for _ in range(X_DRAWS)])
    prior, given = _from_prior(model, _like(x, PRIOR_DRAWS), seed)
    return Draws(weights, replicates, mean, prior, *given)


def _like(x: Tensor, count: int) -> Tensor:
    return x.repeat(-(-count // len(x)), 1)[:count]


def _room(rows: int) -> int:
    """Rows of which draws of x are kept: what fits, but those that are pictured."""
    return max(rows, X_DRAWS)


def _at_a_draw(model: Program, q: Program, x: Tensor) -> Any:
    """p(x|z) at one draw of each row's latents from q, its batch shape [R]."""
    return observed_site(poutine.replay(model, trace=poutine.trace(q).get_trace(x, None)), x)["fn"]


def _from_prior(model: Program, like: Tensor, seed: int) -> tuple[dict[str, Tensor], tuple[Tensor, Tensor]]:
    """Latents by site [S, ...], as many as the rows ``like``; x given them [S, C], and its mean at the first [P, C]."""
    with no_validation(), torch.no_grad(), seeded(seed):
        trace = poutine.trace(model).get_trace(like, torch.zeros(len(like), dtype=torch.long, device=like.device))
        latents = {name: site["value"] for name, site in random_sites(trace) if not site["is_observed"]}
        fn = observed_site(poutine.replay(model, trace=trace), like)["fn"]
        return latents, (fn.sample(), fn.mean[:PICTURES])


def to_datatree(
    variants: dict[str, Draws], x: Tensor, labels: Tensor | None, attributes: dict[str, Any]
) -> xr.DataTree:
    """A DataTree with the groups that ArviZ knows, most of them with a dimension ``variant``.

    Groups: ``posterior`` and ``prior`` (latents), ``posterior_predictive`` and ``prior_predictive`` (draws of x),
    ``log_likelihood``, ``sample_stats`` (log weights; ELBO, ESS and k-hat of each row), ``observed_data``,
    ``constant_data`` (labels, and columns of the rows that the program is given), and ours: ``means`` (of x, for
    pictures), ``train`` and ``test`` (the quantities of each row). Latents that a variant lacks are NaN. Draws of x
    are kept of as many first rows as fit into ``BYTES``; the group's attribute ``rows`` says how many.

    Arguments:
        variants: draws by the variant's name, all for the same rows.
        x: the rows, [B, C] or, where the program is given further columns, [B, C + G].
        labels: their classes, [B], if there are any.
        attributes: of the root; what is no number or text is written as JSON.
    """
    sampled, names, each = ("chain", "draw", "variant"), list(variants), list(variants.values())
    width = each[0].x.shape[-1]
    latents = _sites({name: draws.weights.latents for name, draws in variants.items()}, (*sampled, "row"))
    prior = _sites({name: draws.prior for name, draws in variants.items()}, sampled)
    replicates, means = _fitting(_stacked([d.x for d in each])), [d.x_mean for d in each]
    statistics = _quantities(variants, "test", STATISTICS)
    groups: dict[str, dict[str, Any]] = {
        "posterior": latents,
        "posterior_predictive": {"x": ((*sampled, "row", "value"), replicates)},
        "log_likelihood": {"x": ((*sampled, "row"), _stacked([d.weights.log_lik for d in each]))},
        "sample_stats": {"log_weight": ((*sampled, "row"), _stacked([d.weights.log_w for d in each]))} | statistics,
        "prior": prior,
        "prior_predictive": {"x": ((*sampled, "value"), _compact(_stacked([d.prior_x for d in each])))},
        "observed_data": {"x": (("row", "value"), _compact(_array(x[:, :width])))},
        "constant_data": {} if labels is None else {"label": (("row",), _array(labels))},
        "means": {
            "x": (("variant", "row", "value"), np.stack([_array(mean) for mean in means])),
            "prior_x": (("variant", "draw", "value"), np.stack([_array(d.prior_mean) for d in each])),
        },
    }
    if x.shape[1] > width:
        groups["constant_data"]["given"] = ("row", "column"), _compact(_array(x[:, width:]))
    groups |= {split: _quantities(variants, split) for split in each[0].values}
    found = xr.DataTree()
    for group, arrays in groups.items():
        if arrays:
            found[group] = xr.DataTree(_dataset(arrays, names, NOTES.get(group)))
    found["posterior_predictive"].attrs["rows"] = f"the first {replicates.shape[3]} of {len(x)}"
    found.attrs = {k: v if isinstance(v, (str, int, float)) else json.dumps(v) for k, v in attributes.items()}
    return found


def attributes(results: Mapping[str, Any], recipes: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What made a file's numbers: data, recipe (what its variants share, and each variant's own), versions, seed.

    Arguments:
        results: of one group, as in ``results.json``.
        recipes: by the variant's name.
    """
    (group,), shared = results["groups"], results["recipe"]
    about = group["data"]
    return {
        "data": about["summary"],
        **{name: about[name] for name in ("binarize", "base_measure", "digest", "shape")},
        "seed": next(iter(recipes.values()))["seed"],
        "recipe": shared,
        "variants": {n: {key: v for key, v in own.items() if key not in shared} for n, own in recipes.items()},
        "versions": results["versions"],
        "estimators": {name: found["estimator"] for row in group["rows"] for name, found in row["test"].items()},
        "inference_library": "pvae-pyro",
        "inference_library_version": results["versions"]["pvae-pyro"],
    }


def _array(values: Tensor) -> np.ndarray:
    return values.detach().cpu().numpy()


def _stacked(values: list[Tensor]) -> np.ndarray:
    """[chain = 1, draw, variant, ...] from [draw, ...] of each variant."""
    return np.stack([_array(v) for v in values], 1)[None]


def _compact(values: np.ndarray) -> np.ndarray:
    """Whole numbers as the smallest signed integers that hold them, so that differences stay right."""
    whole = np.isfinite(values).all() and (values == np.rint(values)).all()
    fits = [kind for kind in WHOLE if whole and np.abs(values).max(initial=0) <= np.iinfo(kind).max]
    return values.astype(fits[0] if fits else np.float32)


def _fitting(values: np.ndarray) -> np.ndarray:
    """Draws of x [1, M, V, R, C] in compact form, of as many first rows as fit."""
    found = _compact(values)
    return found[:, :, :, : _room(BYTES[found.dtype.kind] // (found[..., :1, :].nbytes))]


def _sites(latents: dict[str, dict[str, Tensor]], dims: tuple[str, ...]) -> dict[str, Any]:
    """Each site's dimensions and draws, from draws by variant and site."""
    found = {}
    for site, values in _padded(latents).items():
        array = _stacked(list(values.values()))
        own = (f"{site}_dim{i or ''}" for i in range(array.ndim - len(dims)))
        found[site] = ((*dims, *own), array)
    return found


def _dataset(arrays: dict[str, Any], variants: list[str], note: str | None) -> xr.Dataset:
    """Arrays with a coordinate along each dimension."""
    found = xr.Dataset(arrays, attrs={"note": note} if note else {})
    coords = {dim: variants if dim == "variant" else np.arange(size) for dim, size in found.sizes.items()}
    return found.assign_coords({str(dim): values for dim, values in coords.items()})


def _padded(latents: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """Draws by site and variant, filled up with NaN where a variant lacks a site or has fewer dimensions."""
    found: dict[str, dict[str, Tensor]] = {}
    for site in dict.fromkeys(site for own in latents.values() for site in own):
        known = [own[site] for own in latents.values() if site in own]
        shape = [max(sizes) for sizes in zip(*(values.shape for values in known), strict=True)]
        found[site] = {}
        for name, own in latents.items():
            whole = known[0].new_full(shape, torch.nan)
            if site in own:
                whole[tuple(slice(size) for size in own[site].shape)] = own[site]
            found[site][name] = whole
    return found


def _quantities(variants: dict[str, Draws], split: str, names: tuple[str, ...] = ()) -> dict[str, Any]:
    """Quantities of each row of a split by name, all or those named; NaN where a variant has none."""
    every = [draws.values.get(split, {}) for draws in variants.values()]
    rows = max((len(v) for own in every for v in own.values()), default=0)
    found = [name for name in dict.fromkeys(n for own in every for n in own) if name in names or not names]
    blank = torch.full((rows,), torch.nan)
    return {
        name: (("variant", "row"), np.stack([_array(own.get(name, blank)) for own in every]), {"units": _unit(name)})
        for name in found
    }


def _unit(name: str) -> str:
    return UNITS.get(name, "nats")


def idata_name(group: int = 1) -> str:
    """The file's name: ``idata.nc``, and ``idata-2.nc`` and so on for further groups of variants on other data."""
    return FILE if group == 1 else f"idata-{group}.nc"


def save_idata(found: xr.DataTree, folder: Path, group: int = 1) -> None:
    """Write ``idata.nc``, whole or not at all."""
    packed = {"zlib": True, "complevel": 4, "shuffle": True}
    encoding = {node.path: dict.fromkeys(map(str, node.data_vars), packed) for node in found.leaves}
    with atomic_replace(folder / idata_name(group)) as temporary:
        found.to_netcdf(temporary, engine="h5netcdf", encoding=encoding)


def load_idata(folder: Path, group: int = 1) -> xr.DataTree:
    """Read ``idata.nc`` into memory.

    Raises:
        UserError: it is missing or broken.
    """
    try:
        with xr.open_datatree(folder / idata_name(group), engine="h5netcdf") as found:
            for node in found.subtree:  # DataTree.load leaves a variable out that is named as a group is
                for variable in node.variables.values():
                    variable.load()
            return found
    except FileNotFoundError:
        raise UserError(f"{folder} has no {idata_name(group)}; pvae evaluate {folder} writes it") from None
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder / idata_name(group)} can't be read ({error}); pvae evaluate {folder} writes it anew"
        ) from error
