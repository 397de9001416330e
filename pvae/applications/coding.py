"""Codes: rows to their latents and back, between rows, and from the prior."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from pyro import poutine
from torch import Tensor

from pvae.errors import Incompatible, UserError, check_range, nearest
from pvae.generative.handlers import TemperPrior
from pvae.inference.batching import RowBatch, Values, draw_chunks, map_batches
from pvae.inference.guides import Guide
from pvae.inference.importance import log_weights
from pvae.inference.latents import observed_site
from pvae.inference.posterior import likelihood_at, posterior_moments, with_fixed_params
from pvae.runtime.pyro_params import Program

PATHS = ("linear", "spherical")
Progress = Callable[[int], None]


def _silent(rows: int) -> None:
    """No progress is shown."""


@dataclass(frozen=True)
class Encoding:
    r"""Codes of B rows and what they cost.

    Attributes:
        mean, sd: of q(z|x), the real vector behind the latents, [B, D].
        rate: :math:`KL(q(z|x) \| p(z)) / \log 2`, [B] bits: what a code takes on average, by bits-back coding. NaN for
            a point mass, which would take infinitely many.
        distortion: :math:`-E_q[\log p(x|z)]`, [B] nats.
        error: squared difference between x and the mean of p(x|z) at the code's mean, by entry, [B].
    """

    mean: Tensor
    sd: Tensor
    rate: Tensor
    distortion: Tensor
    error: Tensor


def encode(
    model: Program,
    guide: Guide,
    x: Values,
    index: Tensor | None = None,
    *,
    K: int = 64,
    seed: int = 0,
    progress: Progress = _silent,
) -> Encoding:
    """Each row's code: mean and standard deviation of q(z|x), with its rate and distortion.

    Arguments:
        model, guide: a fitted program and its guide.
        x, index: rows [B, C], and which training datapoints they are; None for new ones.
        K: draws for rate and distortion.
        seed: of the draws.
        progress: called with the number of rows done.

    Source of bits-back coding: Hinton and van Camp (1993), *Keeping Neural Networks Simple*; Townsend, Bird, Barber
    (2019), arXiv:1901.04866.
    """
    check_range("encode", K=K)

    def compute(rows: RowBatch) -> dict[str, Tensor]:
        q_params = guide.params(rows.x, rows.index).detach()
        mean, sd = posterior_moments(guide.family, q_params)
        draws = log_weights(model, guide.with_params(q_params), rows.x, rows.index, 1 if guide.family.point_mass else K)
        rate = (draws.log_q - draws.log_prior).mean(0) / math.log(2)
        fn = likelihood_at(model, guide.sites, mean, rows.x, rows.index)
        error = (fn.mean - rows.x[:, : fn.mean.shape[1]]).square().nanmean(1)
        rate = torch.full_like(rate, torch.nan) if guide.family.point_mass else rate
        return {"mean": mean, "sd": sd, "rate": rate, "distortion": -draws.log_lik.mean(0), "error": error}

    return Encoding(**map_batches(model, guide, compute, x, index, seed=seed, progress=progress))


def decode(
    model: Program,
    guide: Guide,
    z: Values,
    given: Values | None = None,
    *,
    draw: bool = False,
    seed: int = 0,
    progress: Progress = _silent,
) -> Tensor:
    """Codes z [B, D] to data, [B, C]: the mean of p(x|z), or with ``draw`` one draw.

    Arguments:
        given: rows [B, C] from which the program takes what it is given beside its latents, such as a label's columns.

    Raises:
        UserError: the codes have another number of dimensions, or there is not a given row for each.
    """
    if given is not None and len(given) != len(z):
        raise UserError(f"{len(z)} codes need as many given rows, but there are {len(given)}")
    if z.shape[-1] != guide.sites.dim:
        raise UserError(f"the codes have {z.shape[-1]} columns, but the program's latents have {guide.sites.dim}")

    def compute(rows: RowBatch) -> dict[str, Tensor]:
        beside = rows.x[:, :1] if given is None else torch.as_tensor(given)[rows.place].to(rows.x)
        return {"x": _values(likelihood_at(model, guide.sites, rows.x, beside), draw)}

    return map_batches(model, guide, compute, z, seed=seed, progress=progress)["x"]


def _values(fn: Any, draw: bool) -> Tensor:
    return fn.sample() if draw else fn.mean


def reconstruct(
    model: Program,
    guide: Program,
    x: Values,
    index: Tensor | None = None,
    *,
    K: int = 1,
    seed: int = 0,
    progress: Progress = _silent,
) -> Tensor:
    r"""What a row's codes decode to, :math:`\frac1K \sum_k E[x|z_k]` with :math:`z_k \sim q(z|x)`, [B, C].

    Arguments:
        model, guide: Pyro programs of one signature.
        x, index: rows [B, C], and which training datapoints they are; None for new ones.
        K: draws over which the mean is taken.
        seed: of the draws.
        progress: called with the number of rows done.
    """
    check_range("reconstruct", K=K)

    def compute(rows: RowBatch) -> dict[str, Tensor]:
        q, total = with_fixed_params(guide, rows.x, rows.index), torch.zeros(())
        for _ in range(K):
            latents = poutine.trace(q).get_trace(rows.x, rows.index)
            total = total + observed_site(poutine.replay(model, trace=latents), rows.x, rows.index)["fn"].mean / K
        return {"x": total}

    return map_batches(model, guide, compute, x, index, seed=seed, progress=progress)["x"]


def sample(
    model: Program,
    like: Values,
    *,
    temperature: float = 1.0,
    draw: bool = False,
    seed: int = 0,
    progress: Progress = _silent,
) -> Tensor:
    """New rows: z drawn from the prior, then the mean of p(x|z), or with ``draw`` one draw, [B, C].

    Arguments:
        model: a fitted Pyro program.
        like: rows [B, C] that say how many to draw, and of what shape; a program that is given something beside its
            latents, such as a label's columns, takes it from them.
        temperature: by which the noise behind each latent is multiplied: below 1 draws keep to where the prior is
            dense, at 0 they are its centre, of a mixture the centres of its components.
        draw: draw x too.
        seed: of the draws.
        progress: called with the number of rows done.

    Raises:
        UserError: a negative temperature.
        Incompatible: a latent whose distribution has no scale to be multiplied.

    Source: Kingma and Dhariwal (2018), *Glow*, arXiv:1807.03039, section 6.
    """
    if not 0 <= temperature < math.inf:
        raise UserError(f"the temperature is {temperature}, but it must be at least 0")

    def compute(rows: RowBatch) -> dict[str, Tensor]:
        with TemperPrior(temperature):
            which = torch.zeros(len(rows.x), dtype=torch.long, device=rows.x.device)
            return {"x": _values(observed_site(model, rows.x, which)["fn"], draw)}

    return map_batches(model, None, compute, like, seed=seed, progress=progress)["x"]


class Path(NamedTuple):
    """Codes z [S, D] along a path through rows, what they decode to, x [S, C], and where they are, at [S], in rows."""

    z: Tensor
    x: Tensor
    at: Tensor


def interpolate(
    model: Program,
    guide: Guide,
    x: Values,
    index: Tensor | None = None,
    *,
    steps: int = 9,
    how: str = "linear",
    seed: int = 0,
) -> Path:
    r"""From row to row through the codes' means, [S, C]: between two rows, or along a path of several.

    Linear: :math:`z_t = (1 - t) z_0 + t z_1`. Spherical, which keeps the norms that the prior expects in many
    dimensions: :math:`z_t = (\sin((1 - t) \omega) z_0 + \sin(t \omega) z_1) / \sin \omega`, omega the angle between
    the codes; linear where that is 0 or pi.

    Arguments:
        model, guide: a fitted program and its guide.
        x, index: the rows of the path in their order, [R, C] with R at least 2. What a program is given beside its
            latents, such as a label's columns, is the nearest row's.
        steps: from one row to the next.
        how: ``linear`` or ``spherical``.
        seed: of what a guide without an encoder draws in search of the codes.

    Raises:
        UserError: fewer than two rows, no step, or an unknown way.

    Source of the spherical path: Shoemake (1985), *Animating Rotation with Quaternion Curves*; White (2016),
    arXiv:1609.04468.
    """
    check_range("interpolate", steps=steps)
    if how not in PATHS:
        raise UserError(f"unknown path '{how}'{nearest(how, PATHS)}")
    if len(x) < 2:
        raise UserError(f"a path needs at least 2 rows, but {len(x)} is given")
    codes = encode(model, guide, x, index, K=1, seed=seed).mean
    at = torch.arange(steps * (len(x) - 1) + 1).to(codes) / steps
    first = at.long().clamp(max=len(x) - 2)
    z = _between(codes[first], codes[first + 1], (at - first).unsqueeze(-1), how)
    beside = torch.as_tensor(x)[at.round().long()]
    return Path(z, decode(model, guide, z, beside, seed=seed), at)


def _between(start: Tensor, end: Tensor, t: Tensor, how: str) -> Tensor:
    """Codes [S, D] at shares t [S, 1] of the ways from start to end."""
    straight = torch.lerp(start, end, t)
    cosine = torch.nn.functional.cosine_similarity(start, end, dim=-1).unsqueeze(-1).clamp(-1, 1)
    angle = cosine.acos()
    if how == "linear":
        return straight
    round_ = (((1 - t) * angle).sin() * start + (t * angle).sin() * end) / angle.sin()
    return torch.where(angle.sin() > 1e-4, round_, straight)


class Augmentation(NamedTuple):
    """New rows x [M, C], and the row that each was made around, row [M]."""

    x: Tensor
    row: Tensor


def augment(
    model: Program,
    guide: Guide,
    x: Values,
    index: Tensor | None = None,
    *,
    per_row: int = 1,
    spread: float = 1.0,
    draw: bool = False,
    seed: int = 0,
    progress: Progress = _silent,
) -> Augmentation:
    r"""New rows around given ones: :math:`z = \mu + s\,(\tilde z - \mu)` with :math:`\tilde z \sim q(z|x)`, decoded.

    Arguments:
        model, guide: a fitted program and its guide.
        x, index: rows [B, C], and which training datapoints they are; None for new ones.
        per_row: new rows around each.
        spread: s, in standard deviations of q: 0 gives reconstructions, 1 what the posterior finds plausible.
        draw: draw x from p(x|z) instead of taking its mean.
        seed: of the draws.
        progress: called with the number of given rows done.

    Raises:
        UserError: no new rows, or a negative spread.
        Incompatible: a spread under a point mass, which has none.
    """
    check_range("augment", per_row=per_row)
    if not 0 <= spread < math.inf:
        raise UserError(f"the spread is {spread}, but it must be at least 0")
    if spread and guide.family.point_mass:
        raise Incompatible(
            "augment: a guide of point masses has no spread, so that all new rows of a row would be one; fit with "
            "another --family, or give spread 0 and draw rows from p(x|z)"
        )

    def compute(rows: RowBatch) -> dict[str, Tensor]:
        q_params = guide.params(rows.x, rows.index).detach()
        mean = posterior_moments(guide.family, q_params)[0]
        z = (
            (mean + spread * (guide.family(q_params).sample(torch.Size([per_row])) - mean))
            .transpose(0, 1)
            .flatten(0, 1)
        )
        row = torch.arange(len(q_params), device=z.device).repeat_interleave(per_row)
        x = torch.empty(len(z), 0)
        for part in draw_chunks(len(z), 1):
            made = _values(likelihood_at(model, guide.sites, z[part], rows.x[row[part]]), draw).cpu()
            x = made.new_empty(len(z), *made.shape[1:]) if part.start == 0 else x
            x[part] = made
        return {"x": x, "row": row + rows.place.start}

    return Augmentation(**map_batches(model, guide, compute, x, index, seed=seed, progress=progress))
