"""Export: what was drawn and measured, as an xarray DataTree in ArviZ's layout."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from pvae.errors import UserError
from pvae.files import replacing
from pvae.weights import LogWeights

__all__ = ["Draws", "file", "load", "save", "tree"]

FILE = "idata.nc"


@dataclass
class Draws:
    """What one fitted variant gives to the export, for B test rows of C values.

    Attributes:
        weights: log-densities and latents of K draws from the guide, [K, B].
        reconstruction: mean of p(x|z) at one draw, [B, C].
        prior_samples: mean of p(x|z) at draws from the prior, [S, C].
        values: quantities of each row by name, [B], by split.
    """

    weights: LogWeights
    reconstruction: Tensor
    prior_samples: Tensor
    values: dict[str, dict[str, Tensor]] = field(default_factory=dict)


def tree(variants: dict[str, Draws], x: Tensor, labels: Tensor | None, attributes: dict[str, Any]) -> xr.DataTree:
    """A DataTree with the groups that ArviZ knows, each with a dimension ``variant``.

    Groups: ``posterior`` (latents), ``posterior_predictive`` and ``prior_predictive`` (means of x), ``log_likelihood``,
    ``sample_stats`` (log weights), ``observed_data``, ``constant_data`` (labels), and ours: ``train`` and ``test``
    with the quantities of each row in nats.

    Arguments:
        variants: draws by the variant's name, all for the same rows.
        x: the rows, [B, C].
        labels: their classes, [B], if there are any.
        attributes: of the root; what is no number or text is written as JSON.
    """
    import arviz_base

    weights = {name: draws.weights for name, draws in variants.items()}

    def stacked(values: dict[str, Tensor]) -> np.ndarray:
        """[chain = 1, draw, variant, ...] from [draw, ...] of each variant."""
        return np.stack([np.asarray(v.cpu()) for v in values.values()], 1)[None]

    latents = _padded({name: w.latents for name, w in weights.items()})
    groups: dict[str, dict[str, np.ndarray]] = {
        "posterior": {site: stacked(values) for site, values in latents.items()},
        "posterior_predictive": {"x": stacked({n: d.reconstruction[None] for n, d in variants.items()})},
        "log_likelihood": {"x": stacked({n: w.log_lik for n, w in weights.items()})},
        "sample_stats": {"log_weight": stacked({n: w.log_w for n, w in weights.items()})},
        "prior_predictive": {"x": stacked({n: d.prior_samples for n, d in variants.items()})},
        "observed_data": {"x": x.cpu().numpy()},
    }
    if labels is not None:
        groups["constant_data"] = {"label": labels.cpu().numpy()}
    sites = {
        site: ["variant", "row", *(f"{site}_dim{i or ''}" for i in range(next(iter(values.values())).dim() - 2))]
        for site, values in latents.items()
    }
    dims = {
        "log_likelihood": ["variant", "row"],
        "prior_predictive": ["variant", "value"],
        "observed_data": ["row", "value"],
    }
    found = xr.DataTree()
    for group, values in groups.items():
        own = sites | {
            "x": dims.get(group, ["variant", "row", "value"]),
            "log_weight": ["variant", "row"],
            "label": ["row"],
        }
        coords: dict[str, Any] = {"variant": list(variants), "row": np.arange(len(x))}
        found[group] = arviz_base.from_dict({group: values}, dims=own, coords=coords)[group]
    for split in next(iter(variants.values())).values:
        found[split] = xr.DataTree(_quantities(variants, split))
    for node in found.subtree:  # a time stamp would make equal runs differ
        node.attrs.pop("created_at", None)
    found.attrs = {k: v if isinstance(v, (str, int, float)) else json.dumps(v) for k, v in attributes.items()}
    return found


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


def _quantities(variants: dict[str, Draws], split: str) -> xr.Dataset:
    names = dict.fromkeys(name for draws in variants.values() for name in draws.values[split])
    rows = max(len(v) for draws in variants.values() for v in draws.values[split].values())
    blank = np.full(rows, np.nan)
    arrays = {
        name: (("variant", "row"), np.stack([np.asarray(d.values[split].get(name, blank)) for d in variants.values()]))
        for name in names
    }
    return xr.Dataset(arrays, coords={"variant": list(variants), "row": np.arange(rows)}, attrs={"units": "nats"})


def file(group: int = 1) -> str:
    """The file's name: ``idata.nc``, and ``idata-2.nc`` and so on for further groups of variants on other data."""
    return FILE if group == 1 else f"idata-{group}.nc"


def save(found: xr.DataTree, folder: Path, group: int = 1) -> None:
    """Write ``idata.nc``, whole or not at all."""
    with replacing(folder / file(group)) as temporary:
        found.to_netcdf(temporary, engine="h5netcdf")


def load(folder: Path, group: int = 1) -> xr.DataTree:
    """Read ``idata.nc`` into memory.

    Raises:
        UserError: it is missing or broken.
    """
    try:
        with xr.open_datatree(folder / file(group), engine="h5netcdf") as found:
            return found.load()
    except FileNotFoundError:
        raise UserError(f"{folder} has no {file(group)}; pvae evaluate {folder} writes it") from None
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder / file(group)} can't be read ({error}); pvae evaluate {folder} writes it anew"
        ) from error
