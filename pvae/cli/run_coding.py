"""Uses of a run that encode and decode: each takes rows and gives arrays, a figure, and sentences on how good it is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pvae import applications
from pvae.cli.baselines import pca_reconstruction, preserved_labels
from pvae.cli.use_context import UseContext, check_room, error_words, make_result, rows_to_decode, squared_error
from pvae.data.readers import read_table
from pvae.errors import UserError, param
from pvae.experiments.use_results import UseResult
from pvae.inference.batching import as_rows
from pvae.inference.latents import base_measure
from pvae.runtime.torch_state import to_numpy
from pvae.stats import mean_se, number

PROJECTIONS = {
    "plane": "their two latent dimensions",
    "pca": "the codes' principal components",
    "tsne": "t-SNE of the codes",
}


def reconstruct(context: UseContext, *, K: int = 8) -> UseResult:
    """Encode rows and decode K draws of each code."""
    x_hat = context.apply(applications.reconstruct, K=K)
    error = squared_error(x_hat, context.x)
    _, compared = pca_reconstruction(context.run, context.x)
    over = f"per value over {context.count} ({K} draws of each code)"
    sentences = [f"Squared error {error_words(error)} {over}; {compared}."]
    figure = context.strips({"original": context.x, "reconstruction": x_hat})
    return make_result("reconstruct", {"x": x_hat, "row": context.rows.place}, sentences, figure)


def sample(
    context: UseContext, count: int, *, temperature: float = 1.0, draw: bool = False, label: str | None = None
) -> UseResult:
    """Generate rows from the prior; a program that takes labels gets one ``label`` for all, else those of the rows."""
    check_room(context, count, param("count", count))
    wanted = None if label is None else torch.tensor([context.run.label_of(label)] * count)
    like, labels = rows_to_decode(context, count, wanted)
    how: Any = {"temperature": temperature, "draw": draw, "seed": context.seed, "progress": context.progress}
    x = applications.sample(context.run.model, like, **how)
    title = "draws of p(x|z)" if draw else "means of p(x|z)"
    sentences = [f"{count} {title} at z from the prior, temperature {temperature:g}, seed {context.seed}."]
    if label is None and labels:
        sentences.append(f"They have the labels of the {context.rows.where}, in order; --label gives all the same.")
    if context.run.guide.family.point_mass:
        doubt = "codes need not follow the prior, nor its draws the data"
        sentences.append(f"The posterior family is a point mass: {doubt}.")
    return make_result("sample", {"x": x} | labels, sentences, context.sheets({title: x}))


def interpolate(context: UseContext, *, steps: int = 9, how: str = "linear") -> UseResult:
    """Decode a path from row to row through the latent space."""
    check_room(context, steps * (len(context.rows.x) - 1), param("steps", steps))
    x, index = context.rows.x, context.rows.index
    path = applications.interpolate(*context.programs, x, index, steps=steps, how=how, seed=context.seed)
    ends = enumerate(pairwise(context.rows.place.tolist()))
    legs = {f"rows {a} to {b}": path.x[leg * steps : (leg + 1) * steps + 1] for leg, (a, b) in ends}
    moves = (path.x[1:] - path.x[:-1]).square().mean(1).sqrt()
    step = f"from one to the next a value moves by {moves.mean():.3g} (root mean square), at most {moves.max():.3g}"
    sentences = [f"A {how} path of {len(path.x)} codes through {context.count}; {step}."]
    figure = context.sheets(legs, per_line=steps + 1)
    return make_result("interpolate", {"x": path.x, "z": path.z, "at": path.at}, sentences, figure)


def latent_map(context: UseContext, *, projection: str = "auto", size: int = 20) -> UseResult:
    """Map codes on a plane and decode a grid of it; more than two dimensions get sliders too."""
    from pvae.applications.latent_map import make_sliders
    from pvae.reporting.latent_map_widget import draw_latent_map, render_page, render_widget

    shape = context.run.data.shape
    labels = None if context.rows.labels is None else to_numpy(context.rows.labels)
    plane = context.apply(applications.map_latents, projection=projection, size=size)
    arrays = {name: values for name, values in vars(plane).items() if isinstance(values, Tensor)}
    sentences = [f"{context.count.capitalize()} by {PROJECTIONS[plane.how]}."]
    if plane.share is not None and plane.how == "pca":
        share = f"{plane.share.sum():.0%} of the variance"
        sentences.append(f"The plane holds {share} of the codes' {context.dim} dimensions.")
    title = "The latent plane" if plane.how == "plane" else "Codes on a plane"
    blocks = [(title, render_widget(plane, labels, shape))]
    if context.dim > 2 and plane.how != "tsne":
        sliders = make_sliders(*context.programs, context.rows.x, context.rows.index, seed=context.seed)
        blocks.append(("Along the codes' principal directions", render_widget(sliders, None, shape)))
        arrays |= {f"slider_{name}": values for name, values in vars(sliders).items()}
    figure = draw_latent_map(plane, labels, shape)
    page = render_page(f"Latent map of {context.run.data.name}", blocks)
    result = make_result("map", arrays | context.labels, sentences, figure, page=page)
    result.arrays["how"] = np.array(plane.how)
    result.not_columns = result.arrays.keys() - {"codes", "label"}
    return result


def encode(context: UseContext, *, K: int = 64) -> UseResult:
    """Encode rows: mean and standard deviation of each code, rate and distortion, beside principal components."""
    codes = context.apply(applications.encode, K=K)
    pca, compared = pca_reconstruction(context.run, context.x)
    rate = mean_se(codes.rate)
    if math.isnan(rate.mean):
        cost = "Rate: a point mass has none; its codes cost what their numbers cost."
    else:
        bits = (codes.rate + codes.distortion / math.log(2)) / (~context.x.isnan()).sum(1).clamp(min=1)
        measure = base_measure(context.run.model, as_rows(context.rows.x[:2], context.run.model))
        unit = "bits" if measure == "mass" else "bits (of density)"
        total = f"{number(mean_se(bits))} {unit} per value"
        cost = f"Rate {number(rate)} bits per row by bits-back coding, with the distortion {total}."
    fewer = f"{context.run.columns / context.dim:.3g} times fewer"
    sentences = [
        f"{context.count.capitalize()} as {context.dim} numbers each: {fewer}.",
        cost,
        f"Squared error at the code's mean {error_words(mean_se(codes.error))} per value; {compared}.",
        f"Distortion {number(mean_se(codes.distortion))} nats per row.",
    ]
    decoded = applications.decode(*context.programs, codes.mean, context.rows.x)
    figure = context.strips({"original": context.x, "decoded": decoded, f"PCA, {context.dim} dimensions": pca})
    arrays = vars(codes) | {"row": context.rows.place} | context.labels
    return make_result("encode", arrays, sentences, figure)


def decode(context: UseContext, path: Path, *, draw: bool = False) -> UseResult:
    """Decode the codes of a file; a program that takes labels gets the file's, else those of the rows."""
    z = _codes(path, context.dim)
    labels = _stored(path, ("label",)) if context.run.data.num_label_columns else None
    like, given = rows_to_decode(context, len(z), None if labels is None else torch.from_numpy(np.array(labels)))
    x = context.apply(applications.decode, z, like, draw=draw)
    sentences = [f"{len(z)} codes of {path.name} decoded to {'draws' if draw else 'means'} of p(x|z)."]
    if given:
        source = path.name if labels is not None else f"{context.rows.where}, in order"
        sentences.append(f"Labels are those of {source}.")
    return make_result("decode", {"x": x} | given, sentences, context.sheets({sentences[0]: x}))


def _codes(path: Path, dim: int) -> np.ndarray:
    """Read codes [B, D] from a file of ``encode``, or from any table of D columns."""
    stored = _stored(path, ("mean", "z"))
    codes = np.array(read_table(path)["x_train"] if stored is None else stored)  # a copy: memory maps are read-only
    if path.suffix == ".csv":
        header = path.read_text(encoding="utf-8").split("\n", 1)[0].replace('"', "")
        means = sum(name.startswith("mean") for name in header.split(","))
        codes = codes[:, : means or None]  # encode writes the means first
    if codes.ndim != 2 or codes.shape[1] != dim:
        raise UserError(f"{path}: the codes have shape {codes.shape}, but {dim} columns are needed")
    if not np.isfinite(codes).all():
        raise UserError(f"{path}: row {np.argwhere(~np.isfinite(codes))[0][0]} of the codes is not finite")
    return codes


def _stored(path: Path, names: Sequence[str]) -> np.ndarray | None:
    """Return the first of these arrays that an archive has; None if it has none, or if the file is no archive."""
    if path.suffix != ".npz":
        return None
    with suppress(Exception), np.load(path, allow_pickle=False) as archive:  # read_table says what is wrong with it
        return next((archive[name] for name in names if name in archive.files), None)
    return None


def augment(context: UseContext, *, per_row: int = 4, spread: float = 1.0, draw: bool = False) -> UseResult:
    """Generate rows around given ones, and say how many keep their label."""
    if not 0 <= spread < math.inf:
        raise UserError(f"{param('spread')} is {spread:g}, but it must be at least 0")
    check_room(context, per_row * len(context.x), param("per_row", per_row))
    new = context.apply(applications.augment, per_row=per_row, spread=spread, draw=draw)
    # New rows around one row are not independent: errors are over the given rows.
    moves = (new.x - context.x[new.row]).square().nanmean(1).view(-1, per_row).mean(1)
    width = f"{spread:g} standard deviation{'' if spread == 1 else 's'}"
    differ = f"they differ from their row by {error_words(mean_se(moves))} (squared, per value)"
    sentences = [f"{len(new.x)} new rows around {context.count}, {width} of q wide; {differ}."]
    arrays = {"x": new.x, "row": context.rows.place[new.row]}
    if context.rows.labels is not None:
        arrays["label"] = context.rows.labels[new.row]
        sentences += filter(None, [preserved_labels(context.run, context.rows, new.x, new.row)])
    around = new.x.view(len(context.x), per_row, -1)
    lines = {"row": context.x} | {f"new {k + 1}": around[:, k] for k in range(min(per_row, 5))}
    return make_result("augment", arrays, sentences, context.strips(lines))
