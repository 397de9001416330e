"""Latent geometry: smoothness of the decoder, and how much of latent space decodes to something like the data."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from pvae.errors import UserError, check_range
from pvae.inference.batching import Progress, Values, as_rows, map_batches, silent
from pvae.inference.guides import Guide
from pvae.inference.posterior import decode_latents, posterior_means, prior_predictive
from pvae.runtime.pyro_params import Program
from pvae.stats import Estimate, impute_column_means, mean_se

STEP, DIRECTIONS = 0.1, 8  # length of a step in standard deviations of the codes, and the most directions from each
SHARE = 0.05  # of the reconstructions, counts as far from the training rows
NEIGHBOURS, RESAMPLES = 5000, 300  # the most training rows among which the nearest is sought; of the bootstrap


@dataclass(frozen=True)
class LatentGeometry:
    r"""Steps and distances of decoded means in the data's units, as root mean squares over a row's entries.

    Attributes:
        step: move of the mean of p(x|z) for a step of 0.1 standard deviations of the codes from each row's code, a root
            mean square over directions too, [B].
        rows: distance of each row's reconstruction, the mean of p(x|z) at its code, from the nearest training row, [B].
        prior, between: the same for draws z from the prior, and for points halfway between two random codes, [S].
        rows_apart, prior_apart: squared distance of each reconstruction, and of each prior draw's decoded mean, from
            the mean of its kind, [B] and [S].
    """

    step: Tensor
    rows: Tensor
    prior: Tensor
    between: Tensor
    rows_apart: Tensor
    prior_apart: Tensor

    def summary(self, *, seed: int = 0) -> dict[str, Estimate]:
        """Return the quantities of section "Latent geometry" with their standard errors.

        ``roughness`` is the step at the 95th percentile of the codes over that of the median code: 1 where the decoder
        is equally steep at all codes. The vacuums are the shares of prior draws, and of midpoints, that decode to
        something farther from every training row than 95% of the reconstructions are; data have 0.05. A blur is near
        to everything, and so no vacuum: ``variety`` is the spread (root mean square distance from the mean) of decoded
        prior draws over that of the reconstructions. Errors but the step's are by bootstrap, from this seed.
        """
        bootstrap = partial(_bootstrap, torch.Generator().manual_seed(seed))
        return {
            "step": mean_se(self.step),
            "roughness": bootstrap(lambda step: step.quantile(1 - SHARE) / step.median(), self.step),
            "vacuum_prior": bootstrap(_vacuum, self.rows, self.prior),
            "vacuum_between": bootstrap(_vacuum, self.rows, self.between),
            "variety": bootstrap(lambda a, b: (b.mean() / a.mean()).sqrt(), self.rows_apart, self.prior_apart),
        }


def _vacuum(rows: Tensor, others: Tensor) -> Tensor:
    return (others > rows.quantile(1 - SHARE)).double().mean()


def _bootstrap(random: torch.Generator, statistic: Callable[..., Tensor], *samples: Tensor) -> Estimate:
    """Return a statistic of independent samples, and its standard deviation over resamples of each."""
    resampled = [
        statistic(*(values[torch.randint(len(values), (len(values),), generator=random)] for values in samples))
        for _ in range(RESAMPLES)
    ]
    return Estimate(statistic(*samples).item(), torch.stack(resampled).double().std().item())


def measure_latent_geometry(
    model: Program,
    guide: Guide,
    x: Values,
    train: Values,
    index: Tensor | None = None,
    *,
    draws: int = 500,
    seed: int = 0,
    progress: Progress = silent,
) -> LatentGeometry:
    r"""Measure the smoothness of the decoder, and how much of latent space decodes to nothing like the data.

    With codes m_b, the means of q(z|x_b), their standard deviations s_d over rows, and orthonormal random directions u,

    .. math:: \mathrm{step}_b^2 = \mathrm{mean}_{u, d}\, \big(E[x_d | m_b + 0.1\, s \odot u] - E[x_d | m_b]\big)^2 .

    All distances are in data space, from the nearest of at most 5,000 random training rows, so that latent spaces of
    other scales and of point masses compare.

    Arguments:
        model, guide: a fitted program and its guide.
        x, index: rows [B, C], at least 2, which also hold what the program is given beside its latents, and which
            training datapoints they are; None for new rows.
        train: training rows [N, C]; missing entries count as their column's mean.
        draws: S, draws of the prior, and pairs of rows.
        seed: of all noise.
        progress: called with the number of rows done.

    Raises:
        UserError: fewer than 2 rows, no training rows, or no draws.

    See also: `measure_latent_usage`, in latent space.
    """
    check_range(least=1, draws=draws)
    rows, known = as_rows(x, model), as_rows(train, model)
    if len(rows) < 2:
        raise UserError("latent geometry compares rows with each other: 1 is given, but at least 2 are needed")
    codes = posterior_means(model, guide, rows, index, seed=seed, progress=progress).to(rows)
    random = torch.Generator().manual_seed(seed)
    known = impute_column_means(known[torch.randperm(len(known), generator=random)[:NEIGHBOURS]])
    pairs = torch.stack([torch.randperm(len(rows), generator=random)[:2] for _ in range(draws)])
    images = decode_latents(model, guide, codes, rows).flatten(1)
    middle = decode_latents(model, guide, codes[pairs].mean(1), rows[pairs[:, 0]]).flatten(1)
    like = rows[torch.arange(draws) % len(rows)]
    decoded = map_batches(model, None, lambda b: {"x": prior_predictive(model, b.x).likelihood.mean}, like, seed=seed)
    prior = decoded["x"].flatten(1)
    return LatentGeometry(
        _steps(model, guide, codes, rows, images, random),
        *(_nearest(decoded, known) for decoded in (images, prior, middle)),
        *((decoded - decoded.mean(0)).square().mean(1) for decoded in (images, prior)),
    )


def _steps(
    model: Program, guide: Guide, codes: Tensor, rows: Tensor, images: Tensor, random: torch.Generator
) -> Tensor:
    """Return the root mean square move of the decoded mean over directions and entries, [B]."""
    count = min(DIRECTIONS, codes.shape[1])
    directions = torch.linalg.qr(torch.randn(*codes.shape, count, generator=random))[0].to(codes)
    total, size = torch.zeros(len(codes), dtype=images.dtype), STEP * codes.std(0)
    for direction in directions.unbind(-1):
        moved = decode_latents(model, guide, codes + size * direction, rows).flatten(1)
        total += (moved - images).square().mean(1) / count
    return total.sqrt()


def _nearest(images: Tensor, known: Tensor) -> Tensor:
    """Return the root mean square distance of each image from the nearest of the known rows' first columns, [S]."""
    columns = images.shape[1]
    near = [torch.cdist(part.to(known), known.flatten(1)[:, :columns]).amin(1).cpu() for part in images.split(500)]
    return torch.cat(near) / math.sqrt(columns)
