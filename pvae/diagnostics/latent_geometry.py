"""Proximity: does near in the latent space mean near in the data, and is there data everywhere between the codes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pvae.errors import UserError, check_range
from pvae.inference.batching import RowBatch, Values, as_rows, map_batches
from pvae.inference.guides import Guide
from pvae.inference.latents import observed_site
from pvae.inference.posterior import likelihood_at, posterior_moments
from pvae.runtime.pyro_params import Program
from pvae.stats import Estimate, mean_se

# Length of a step in standard deviations of the codes, and the most directions in which one is made from each code.
STEP, DIRECTIONS = 0.1, 8
# The share of the test rows' reconstructions that lies farther from the training rows than what counts as far.
SHARE = 0.05
# Training rows among which the nearest is sought, and resamples of the bootstrap.
NEIGHBOURS, RESAMPLES = 5000, 300


@dataclass(frozen=True)
class LatentGeometry:
    r"""Steps and distances in the data's units, as root mean squares over a row's entries.

    Attributes:
        step: how far the mean of p(x|z) moves from each row's code for a step of 0.1 standard deviations of the codes,
            as a root mean square over directions too, [B].
        rows: distance of each row's reconstruction, the mean of p(x|z) at its code, from the nearest training row, [B].
        prior: the same for draws z from the prior, [S].
        between: the same for points halfway between two random rows' codes, [S].
        rows_apart, prior_apart: squared distance of each reconstruction, and of each prior draw's image, from the mean
            of its kind, [B] and [S].
    """

    step: Tensor
    rows: Tensor
    prior: Tensor
    between: Tensor
    rows_apart: Tensor
    prior_apart: Tensor

    def summary(self, *, seed: int = 0) -> dict[str, Estimate]:
        """``step``, ``roughness``, ``vacuum_prior``, ``vacuum_between`` and ``variety``, with their standard errors.

        ``roughness`` is the step at the 95th percentile of the codes over that of the median code: 1 where the decoder
        is equally steep at all codes. The vacuums are the shares of prior draws, and of midpoints, that decode to
        something farther from every training row than 95% of the test rows' reconstructions are; data have 0.05.
        A blur is near to everything, and so no vacuum: ``variety`` is the spread of prior draws' images (root mean
        square distance from their mean) over that of the reconstructions, near 1 where the prior gives what data do.
        Errors but the step's are of a bootstrap over rows and draws, the threshold's own error included.

        Arguments:
            seed: of the bootstrap.
        """
        random = torch.Generator().manual_seed(seed)
        shares = {"vacuum_prior": (self.rows, self.prior), "vacuum_between": (self.rows, self.between)}
        found = {"step": mean_se(self.step), "roughness": _bootstrapped(_roughness, (self.step,), random)}
        found |= {name: _bootstrapped(_vacuum, samples, random) for name, samples in shares.items()}
        return found | {"variety": _bootstrapped(_variety, (self.rows_apart, self.prior_apart), random)}


def _roughness(step: Tensor) -> Tensor:
    return step.quantile(1 - SHARE) / step.median()


def _vacuum(rows: Tensor, others: Tensor) -> Tensor:
    return (others > rows.quantile(1 - SHARE)).double().mean()


def _variety(rows: Tensor, prior: Tensor) -> Tensor:
    return (prior.mean() / rows.mean()).sqrt()


def _bootstrapped(statistic: Callable[..., Tensor], samples: tuple[Tensor, ...], random: torch.Generator) -> Estimate:
    """A statistic of independent samples, and its standard deviation over resamples of each."""
    again = [
        statistic(*(values[torch.randint(len(values), (len(values),), generator=random)] for values in samples))
        for _ in range(RESAMPLES)
    ]
    return Estimate(statistic(*samples).item(), torch.stack(again).double().std().item())


def measure_latent_geometry(
    model: Program,
    guide: Guide,
    x: Values,
    train: Values,
    index: Tensor | None = None,
    *,
    draws: int = 500,
    seed: int = 0,
    progress: Callable[[int], None] = lambda rows: None,
) -> LatentGeometry:
    r"""How smooth the decoder is around the codes, and how much of the latent space decodes to nothing like the data.

    With codes m_b, the means of q(z|x_b), their standard deviations s_d over rows, and orthonormal random directions u,

    .. math:: \mathrm{step}_b^2 = \mathrm{mean}_{u, d}\,
              \big(E[x_d | m_b + 0.1\, s \odot u] - E[x_d | m_b]\big)^2 .

    All is measured in the data, so that latent spaces of other scales and of point masses compare. Distances are those
    of means of p(x|z) from the nearest of at most 5,000 random training rows.

    Arguments:
        model, guide: a fitted program and its guide.
        x, index: rows [B, C], at least 2, and which training datapoints they are; None for new ones. What a program is
            given beside its latents, such as a label's columns, is taken from them.
        train: training rows [N, C]; entries that are missing count as their column's mean.
        draws: S, of the prior and of pairs of rows.
        seed: of all noise.
        progress: called with the number of rows done.

    Returns:
        Steps and distances, on the CPU.

    Raises:
        UserError: fewer than 2 rows, no training rows, or no draws.
    """
    check_range("proximity", draws=draws)
    rows, known = as_rows(x, model), as_rows(train, model)
    if len(rows) < 2:
        raise UserError("proximity compares rows with each other: 1 is given, but at least 2 are needed")

    def encoded(rows: RowBatch) -> dict[str, Tensor]:
        return {"codes": posterior_moments(guide.family, guide.params(rows.x, rows.index).detach())[0]}

    codes = map_batches(model, guide, encoded, rows, index, seed=seed, progress=progress)["codes"].to(rows)
    random = torch.Generator().manual_seed(seed)
    known = _without_holes(known[torch.randperm(len(known), generator=random)[:NEIGHBOURS]])
    pairs = torch.stack([torch.randperm(len(rows), generator=random)[:2] for _ in range(draws)])
    images = _decoded(model, guide, codes, rows)
    middle = _decoded(model, guide, codes[pairs].mean(1), rows[pairs[:, 0]])
    prior = _from_prior(model, rows[torch.arange(draws) % len(rows)], seed)
    return LatentGeometry(
        step=_steps(model, guide, codes, rows, images, random),
        rows=_nearest(images, known),
        prior=_nearest(prior, known),
        between=_nearest(middle, known),
        rows_apart=(images - images.mean(0)).square().mean(1),
        prior_apart=(prior - prior.mean(0)).square().mean(1),
    )


def _without_holes(rows: Tensor) -> Tensor:
    """The rows with their columns' means in place of NaN."""
    return torch.where(rows.isnan(), rows.nanmean(0).nan_to_num(), rows)


def _decoded(model: Program, guide: Guide, z: Tensor, beside: Tensor) -> Tensor:
    """The means of p(x|z) at z [S, D], with what the rows [S, C] give beside the latents."""

    def compute(rows: RowBatch) -> dict[str, Tensor]:
        return {"x": likelihood_at(model, guide.sites, rows.x, beside[rows.place]).mean.flatten(1)}

    return map_batches(model, guide, compute, z)["x"]


def _from_prior(model: Program, like: Tensor, seed: int) -> Tensor:
    """The means of p(x|z) at draws z of the program's own, for the rows ``like``."""

    def compute(rows: RowBatch) -> dict[str, Tensor]:
        which = torch.zeros(len(rows.x), dtype=torch.long, device=rows.x.device)
        return {"x": observed_site(model, rows.x, which)["fn"].mean.flatten(1)}

    return map_batches(model, None, compute, like, seed=seed)["x"]


def _steps(
    model: Program, guide: Guide, codes: Tensor, rows: Tensor, images: Tensor, random: torch.Generator
) -> Tensor:
    """Root mean square move of the decoded mean over directions and entries, [B]."""
    count = min(DIRECTIONS, codes.shape[1])
    ways = torch.linalg.qr(torch.randn(*codes.shape, count, generator=random))[0].to(codes)
    total, size = torch.zeros(len(codes), dtype=images.dtype), STEP * codes.std(0)
    for way in ways.unbind(-1):
        moved = _decoded(model, guide, codes + size * way, rows)
        total += (moved - images).square().mean(1) / count
    return total.sqrt()


def _nearest(images: Tensor, known: Tensor) -> Tensor:
    """Root mean square distance of each image from the nearest of the known rows' first columns, [S]."""
    columns = images.shape[1]
    near = [torch.cdist(part.to(known), known.flatten(1)[:, :columns]).amin(1).cpu() for part in images.split(500)]
    return torch.cat(near) / math.sqrt(columns)
