"""Uses of an opened run, one function each: from rows to arrays, a picture, and sentences that say how good."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pvae import applications
from pvae.cli.baselines import components_words, preserved, through_components
from pvae.cli.use_context import (
    UseContext,
    _arrays,
    _beside,
    _count,
    _dim,
    _error,
    _labelled,
    _of,
    _shape,
    _use,
    check_room,
)
from pvae.data.readers import read_table
from pvae.errors import UserError
from pvae.experiments.use_results import UseResult
from pvae.inference.batching import as_rows
from pvae.inference.latents import base_measure
from pvae.reporting.application_figures import draw_sheets, draw_strips
from pvae.stats import mean_se, number


def reconstruct(asked: UseContext, *, K: int = 8) -> UseResult:
    """Rows through their codes and back."""
    found = applications.reconstruct(*asked.programs, *asked.given, K=K, **asked.options)
    own, pca = _error(found, asked.x), _error(through_components(asked.run, asked.x), asked.x)
    told = [
        f"Squared error {_of(own)} per value over {_count(asked)} ({K} draws of each code); as many principal "
        f"components{components_words(asked.run)} leave {_of(pca)}."
    ]
    lines = {"original": asked.x, "reconstruction": found}
    return _use("reconstruct", {"x": found, "row": asked.rows.place}, told, draw_strips(_arrays(lines), _shape(asked)))


def sample(
    asked: UseContext, count: int, *, temperature: float = 1.0, draw: bool = False, label: str | None = None
) -> UseResult:
    """New rows from the prior, for a program that is given labels all of one ``label``, else those of the rows."""
    check_room(asked, count, f"--count {count}")
    like, labels = _beside(asked, count, None if label is None else torch.tensor([asked.run.label_of(label)] * count))
    found = applications.sample(asked.run.model, like, temperature=temperature, draw=draw, **asked.options)
    what = "draws of p(x|z)" if draw else "means of p(x|z)"
    told = [f"{count} {what} at z from the prior, temperature {temperature:g}, seed {asked.seed}."]
    if label is None and labels:
        told.append(f"They have the labels of the {asked.rows.where}, in their order; --label gives all the same.")
    if asked.run.guide.family.point_mass:
        told.append("The run's codes are points, which need not follow the prior: its draws need not look like data.")
    return _use("sample", {"x": found} | labels, told, draw_sheets(_arrays({what: found}), _shape(asked)))


def interpolate(asked: UseContext, *, steps: int = 9, how: str = "linear") -> UseResult:
    """The way from row to row through the codes."""
    check_room(asked, steps * (len(asked.rows.x) - 1), f"--steps {steps}")
    found = applications.interpolate(*asked.programs, *asked.given, steps=steps, how=how, seed=asked.seed)
    legs = {
        f"rows {a} to {b}": found.x[leg * steps : (leg + 1) * steps + 1]
        for leg, (a, b) in enumerate(pairwise(asked.rows.place.tolist()))
    }
    moved = (found.x[1:] - found.x[:-1]).square().mean(1).sqrt()
    told = [
        f"A {how} path of {len(found.x)} codes through {_count(asked)}; from one to the next a value moves by "
        f"{moved.mean():.3g} (root mean square), at most {moved.max():.3g}."
    ]
    figure = draw_sheets(_arrays(legs), _shape(asked), per_line=steps + 1)
    return _use("interpolate", {"x": found.x, "z": found.z, "at": found.at}, told, figure)


def latent_map(asked: UseContext, *, projection: str = "auto", size: int = 20) -> UseResult:
    """The codes on a plane and what every place of it decodes to; with more than two dimensions sliders too."""
    from pvae.applications.latent_map import make_sliders
    from pvae.reporting.latent_map_widget import draw_latent_map, render_page, render_widget

    labels, shape = None if asked.rows.labels is None else asked.rows.labels.numpy(), asked.run.data.shape
    found = applications.map_latents(*asked.programs, *asked.given, projection=projection, size=size, **asked.options)
    arrays = {name: values for name, values in vars(found).items() if isinstance(values, Tensor)}
    told = [f"{_count(asked).capitalize()} by {_WAYS[found.how]}."]
    if found.share is not None and found.how == "pca":
        told.append(
            f"The plane holds {found.share.sum():.0%} of the variance of the codes' {_dim(asked.run)} dimensions."
        )
    blocks = [
        (
            "The latent plane" if found.how == "plane" else "Codes on a plane",
            render_widget(found, labels, _shape(asked)),
        )
    ]
    if _dim(asked.run) > 2 and found.how != "tsne":
        moved = make_sliders(*asked.programs, *asked.given, seed=asked.seed)
        blocks.append(("Along the codes' principal directions", render_widget(moved, None, shape)))
        arrays |= {f"slider_{name}": values for name, values in vars(moved).items()}
    made = _use("map", arrays | _labelled(asked), told, draw_latent_map(found, labels, shape))
    made.arrays["how"] = np.array(found.how)
    made.aside = made.arrays.keys() - {"codes", "label"}
    made.page = render_page(f"Latent map of {asked.run.data.name}", blocks)
    return made


_WAYS = {"plane": "their two latent dimensions", "pca": "the codes' principal components", "tsne": "t-SNE of the codes"}


def encode(asked: UseContext, *, K: int = 64) -> UseResult:
    """Rows to codes: mean and standard deviation, rate and distortion, beside principal components."""
    found = applications.encode(*asked.programs, *asked.given, K=K, **asked.options)
    pca, dim = through_components(asked.run, asked.x), _dim(asked.run)
    rate, distortion = mean_se(found.rate), mean_se(found.distortion)
    told = [
        f"{_count(asked).capitalize()} as {dim} numbers each: {asked.run.columns / dim:.3g} times fewer.",
        f"Squared error at the code's mean {_of(mean_se(found.error))} per value; as many principal components"
        f"{components_words(asked.run)} leave {_of(_error(pca, asked.x))}.",
        f"Distortion {number(distortion)} nats per row.",
    ]
    if not math.isnan(rate.mean):
        both = (found.rate + found.distortion / math.log(2)) / (~asked.x.isnan()).sum(1).clamp(min=1)
        told.insert(1, f"Rate {number(rate)} bits per row by bits-back coding, {_bits(asked, both)}.")
    else:
        told.insert(1, "Rate: a point mass has none; its codes cost what their numbers cost.")
    decoded = applications.decode(*asked.programs, found.mean, asked.rows.x)
    lines = {"original": asked.x, "decoded": decoded, f"PCA, {dim} dimensions": pca}
    arrays = {"mean": found.mean, "sd": found.sd, "rate": found.rate, "distortion": found.distortion}
    arrays |= {"error": found.error, "row": asked.rows.place} | _labelled(asked)
    return _use("encode", arrays, told, draw_strips(_arrays(lines), _shape(asked)))


def _bits(asked: UseContext, both: Tensor) -> str:
    """What rows cost in all, in bits for each value, if x is counted and not measured."""
    kind = base_measure(asked.run.model, as_rows(asked.rows.x[:2], asked.run.model))
    measure = "bits" if kind == "mass" else "bits (of density)"
    return f"with the rest of x {number(mean_se(both))} {measure} per value"


def decode(asked: UseContext, path: Path, *, draw: bool = False) -> UseResult:
    """Codes of a file to rows; where the program is given labels, under those that the file has."""
    z = _codes(path, _dim(asked.run))
    own = _named(path, ("label",)) if asked.run.data.num_label_columns else None
    beside, labels = _beside(asked, len(z), None if own is None else torch.from_numpy(np.array(own)))
    found = applications.decode(*asked.programs, z, beside, draw=draw, **asked.options)
    told = [f"{len(z)} codes of {path.name} decoded to {'draws' if draw else 'means'} of p(x|z)."]
    if labels:
        told.append(f"Labels are those of {path.name if own is not None else asked.rows.where + ', in their order'}.")
    return _use("decode", {"x": found} | labels, told, draw_sheets(_arrays({told[0]: found}), _shape(asked)))


def _codes(path: Path, dim: int) -> np.ndarray:
    """Codes [B, D] of a file: of ``encode``, or any table of D columns."""
    known = _named(path, ("mean", "z"))
    found = np.array(read_table(path)["x_train"] if known is None else known)  # not a memory map, which none may write
    if path.suffix == ".csv":
        first = path.read_text(encoding="utf-8").split("\n", 1)[0].replace('"', "")
        means = sum(name.startswith("mean") for name in first.split(","))
        found = found[:, : means or None]  # of encode, which puts the means first
    if found.ndim != 2 or found.shape[1] != dim:
        raise UserError(f"{path}: the codes have shape {found.shape}, but {dim} columns are needed")
    if not np.isfinite(found).all():
        raise UserError(f"{path}: row {np.argwhere(~np.isfinite(found))[0][0]} of the codes is not finite")
    return found


def _named(path: Path, names: Sequence[str]) -> np.ndarray | None:
    """The first of these arrays that an archive of a use has; None where it has none, or is no archive."""
    if path.suffix != ".npz":
        return None
    with suppress(Exception), np.load(path, allow_pickle=False) as archive:  # read_table says what is wrong with it
        return next((archive[name] for name in names if name in archive.files), None)
    return None


def augment(asked: UseContext, *, per_row: int = 4, spread: float = 1.0, draw: bool = False) -> UseResult:
    """New rows around given ones, and how many keep their class."""
    if not 0 <= spread < math.inf:
        raise UserError(f"--spread is {spread:g}, but it must be at least 0")
    check_room(asked, per_row * len(asked.x), f"--per-row {per_row}")
    found = applications.augment(
        *asked.programs, *asked.given, per_row=per_row, spread=spread, draw=draw, **asked.options
    )
    # New rows around one row are not independent: errors are over the given rows.
    moved = (found.x - asked.x[found.row]).square().nanmean(1).view(-1, per_row).mean(1)
    wide = f"{spread:g} standard deviation{'' if spread == 1 else 's'}"
    told = [
        f"{len(found.x)} new rows around {_count(asked)}, {wide} of q wide; they differ from their row by "
        f"{_of(mean_se(moved))} (squared, per value)."
    ]
    arrays = {"x": found.x, "row": asked.rows.place[found.row]}
    if asked.rows.labels is not None:
        arrays["label"] = asked.rows.labels[found.row]
        told += filter(None, [preserved(asked.run, asked.rows, found.x, found.row)])
    around = found.x.view(len(asked.x), per_row, -1)
    lines = {"row": asked.x} | {f"new {k + 1}": around[:, k] for k in range(min(per_row, 5))}
    return _use("augment", arrays, told, draw_strips(_arrays(lines), _shape(asked)))
