"""Encode and decode: rows to latent codes and back, paths between rows, draws from the prior and around rows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from pvae.errors import Incompatible, UserError, check_range, nearest, param
from pvae.generative.effect_handlers import HandledProgram, TemperPrior
from pvae.inference import posterior
from pvae.inference.batching import Progress, RowBatch, Values, draw_chunks, map_batches, silent
from pvae.inference.guides import Guide
from pvae.inference.importance import log_weights
from pvae.runtime.pyro_params import Program
from pvae.stats import Estimate, mean_se


@dataclass(frozen=True)
class Encoding:
    r"""Codes of B rows, with their rate and distortion.

    Attributes:
        mean, sd: of q(z|x) over the unconstrained latents, [B, D].
        rate: :math:`KL(q(z|x) \| p(z)) / \log 2`, [B] bits: the average code length by bits-back coding. NaN for a
            point mass, whose code length is infinite.
        distortion: :math:`-E_q[\log p(x|z)]`, [B] nats.
        error: squared error of the mean of p(x|z) at the code's mean, averaged over entries, [B].
    """

    mean: Tensor
    sd: Tensor
    rate: Tensor
    distortion: Tensor
    error: Tensor

    def summary(self) -> dict[str, Estimate]:
        """Return mean and standard error over rows of ``rate``, ``distortion`` and ``error``."""
        return {name: mean_se(getattr(self, name)) for name in ("rate", "distortion", "error")}


def encode(
    model: Program,
    guide: Guide,
    x: Values,
    index: Tensor | None = None,
    *,
    K: int = 64,
    seed: int = 0,
    progress: Progress = silent,
) -> Encoding:
    """Encode rows: mean and standard deviation of q(z|x), with rate and distortion.

    Arguments:
        model, guide: a fitted program and its guide.
        x, index: rows [B, C], and which training datapoints they are; None for new rows.
        K: draws for each row, here for rate and distortion.
        seed: of the draws.
        progress: called with the number of rows done.

    See also: `decode`, `reconstruct`.
    Source of bits-back coding: Hinton and van Camp (1993), *Keeping Neural Networks Simple*; Townsend, Bird, Barber
    (2019), arXiv:1901.04866.
    """
    check_range("encode", K=K)

    def compute(rows: RowBatch) -> dict[str, Tensor]:
        q_params = guide.params(rows.x, rows.index).detach()
        mean, sd = posterior.posterior_moments(guide.family, q_params)
        point_mass = guide.family.point_mass
        draws = log_weights(model, guide.with_params(q_params), rows.x, rows.index, 1 if point_mass else K)
        rate = (draws.log_q - draws.log_prior).mean(0) / math.log(2)
        x_hat = posterior.likelihood_at(model, guide.sites, mean, rows.x, rows.index).mean
        return {
            "mean": mean,
            "sd": sd,
            "rate": torch.full_like(rate, torch.nan) if point_mass else rate,
            "distortion": -draws.log_lik.mean(0),
            "error": (x_hat - rows.x[:, : x_hat.shape[1]]).square().nanmean(1),
        }

    return Encoding(**map_batches(model, guide, compute, x, index, seed=seed, progress=progress))


def decode(
    model: Program,
    guide: Guide,
    z: Values,
    given: Values | None = None,
    *,
    draw: bool = False,
    seed: int = 0,
    progress: Progress = silent,
) -> Tensor:
    """Decode codes z [B, D] to rows [B, C]: the mean of p(x|z), or with ``draw`` one draw.

    Arguments:
        model, guide, seed, progress: as for `encode`.
        z: unconstrained latents, [B, D].
        given: rows [B, C] from which the program takes what it is given beside its latents, such as a label's columns.
        draw: draw x from p(x|z) instead of taking its mean.

    Raises:
        UserError: the codes have another number of dimensions, or there is not a given row for each.

    See also: `encode`, `sample`.
    """
    if given is not None and len(given) != len(z):
        raise UserError(f"{len(z)} codes need as many given rows, but there are {len(given)}")
    if z.shape[-1] != guide.sites.dim:
        raise UserError(f"the codes have {z.shape[-1]} columns, but the program's latents have {guide.sites.dim}")
    return posterior.decode_latents(model, guide, z, given, draw=draw, seed=seed, progress=progress)


def reconstruct(
    model: Program,
    guide: Program,
    x: Values,
    index: Tensor | None = None,
    *,
    K: int = 1,
    seed: int = 0,
    progress: Progress = silent,
) -> Tensor:
    r"""Reconstruct rows, :math:`\frac1K \sum_k E[x|z_k]` with :math:`z_k \sim q(z|x)`, [B, C].

    Arguments:
        model, guide, x, index, seed, progress: as for `encode`; the guide may be any Pyro program.
        K: draws of each code.

    See also: `encode`, whose ``error`` is that at the code's mean; `denoise`.
    """
    check_range("reconstruct", K=K)

    def compute(rows: RowBatch) -> dict[str, Tensor]:
        q = posterior.with_fixed_params(guide, rows.x, rows.index)
        means = (posterior.posterior_predictive(model, q, rows.x, rows.index).likelihood.mean for _ in range(K))
        return {"x": sum((mean / K for mean in means), torch.zeros(()))}

    return map_batches(model, guide, compute, x, index, seed=seed, progress=progress)["x"]


def sample(
    model: Program,
    like: Values,
    *,
    temperature: float = 1.0,
    draw: bool = False,
    seed: int = 0,
    progress: Progress = silent,
) -> Tensor:
    """Generate rows [B, C]: draw z from the prior, then take the mean of p(x|z), or with ``draw`` one draw.

    Arguments:
        model: a fitted Pyro program.
        like: rows [B, C] that give the number of rows, their shape, and what the program is given beside its latents,
            such as a label's columns.
        temperature: factor of the noise behind each latent: below 1 draws keep to the dense regions of the prior, at 0
            they are its centre (of a mixture the centres of its components).
        draw, seed, progress: as for `decode`.

    Raises:
        UserError: a negative temperature.
        Incompatible: a latent whose distribution has no scale to multiply.

    See also: `augment`, which draws around given rows.
    Source: Kingma and Dhariwal (2018), *Glow*, arXiv:1807.03039, section 6.
    """
    check_range(least=0, temperature=temperature)
    tempered = HandledProgram(model, partial(TemperPrior, temperature))

    def compute(rows: RowBatch) -> dict[str, Tensor]:
        fn = posterior.prior_predictive(tempered, rows.x).likelihood
        return {"x": fn.sample() if draw else fn.mean}

    return map_batches(model, None, compute, like, seed=seed, progress=progress)["x"]


class Path(NamedTuple):
    """Path through latent space: codes z [S, D], decoded rows x [S, C], and positions at [S] in units of given rows."""

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
    r"""Interpolate between rows in latent space, through the means of their codes, and decode the path.

    Linear: :math:`z_t = (1 - t) z_0 + t z_1`. Spherical, which keeps the norms that the prior expects in many
    dimensions: :math:`z_t = (\sin((1 - t) \omega) z_0 + \sin(t \omega) z_1) / \sin \omega`, omega the angle between
    the codes; linear where that is 0 or pi.

    Arguments:
        model, guide, x, index, seed: as for `encode`, for at least two rows [R, C] in the order of the path. What a
            program is given beside its latents, such as a label's columns, is the nearest row's.
        steps: from one row to the next, so that the path has S = steps (R - 1) + 1 codes.
        how: ``linear`` or ``spherical``.

    Raises:
        UserError: fewer than two rows, no step, or an unknown way.

    Source of the spherical path: Shoemake (1985), *Animating Rotation with Quaternion Curves*; White (2016),
    arXiv:1609.04468.
    """
    check_range("interpolate", steps=steps)
    if how not in (paths := ("linear", "spherical")):
        raise UserError(f"unknown path '{how}'{nearest(how, paths)}")
    if len(x) < 2:
        raise UserError(f"a path needs at least 2 rows, but {len(x)} is given")
    codes = posterior.posterior_means(model, guide, x, index, seed=seed)
    at = torch.arange(steps * (len(x) - 1) + 1).to(codes) / steps
    first = at.long().clamp(max=len(x) - 2)
    start, end, t = codes[first], codes[first + 1], (at - first).unsqueeze(-1)
    z = torch.lerp(start, end, t)
    if how == "spherical":
        angle = cosine_similarity(start, end, dim=-1).unsqueeze(-1).clamp(-1, 1).acos()
        arc = (((1 - t) * angle).sin() * start + (t * angle).sin() * end) / angle.sin()
        z = torch.where(angle.sin() > 1e-4, arc, z)
    return Path(z, decode(model, guide, z, torch.as_tensor(x)[at.round().long()], seed=seed), at)


class Augmentation(NamedTuple):
    """Generated rows x [M, C], and the given row around which each was generated, row [M]."""

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
    progress: Progress = silent,
) -> Augmentation:
    r"""Generate rows around given ones (data augmentation): decode draws of q(z|x), their spread scaled.

    Codes are :math:`z = \mu + s\,(\tilde z - \mu)` with :math:`\tilde z \sim q(z|x)`, mu the mean of q.

    Arguments:
        model, guide, x, index, seed, progress: as for `encode`.
        per_row: generated rows for each given row.
        spread: s, in standard deviations of q: 0 gives reconstructions, 1 what the posterior finds plausible.
        draw: as for `decode`.

    Raises:
        UserError: ``per_row`` below 1, or a negative spread.
        Incompatible: a spread under a point mass, which has none.

    See also: `sample`, which draws from the prior.
    """
    check_range("augment", per_row=per_row)
    check_range(least=0, spread=spread)
    if spread and guide.family.point_mass:
        remedy = f"fit with another {param('family')}, or set {param('spread', 0)} and draw rows from p(x|z)"
        raise Incompatible(f"augment: a point mass has no spread: all rows around a row would be one; {remedy}")

    def compute(rows: RowBatch) -> dict[str, Tensor]:
        q_params = guide.params(rows.x, rows.index).detach()
        mean = posterior.posterior_moments(guide.family, q_params)[0]
        draws = guide.family(q_params).sample(torch.Size([per_row]))
        z = (mean + spread * (draws - mean)).transpose(0, 1).flatten(0, 1)
        row = torch.arange(len(q_params), device=z.device).repeat_interleave(per_row)
        parts = draw_chunks(len(z), 1)
        likelihoods = (posterior.likelihood_at(model, guide.sites, z[part], rows.x[row[part]]) for part in parts)
        decoded = torch.cat([(fn.sample() if draw else fn.mean).cpu() for fn in likelihoods])
        return {"x": decoded, "row": row + rows.place.start}

    return Augmentation(**map_batches(model, guide, compute, x, index, seed=seed, progress=progress))
