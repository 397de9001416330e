"""cli.run_restoration."""

from __future__ import annotations

import torch
from torch import Tensor

from pvae import applications
from pvae.cli.baselines import column_means
from pvae.cli.use_context import UseContext, _arrays, _count, _error, _masked_error, _of, _shape, _use
from pvae.errors import UserError
from pvae.experiments.use_results import UseResult
from pvae.recipes.registry import parse
from pvae.reporting.application_figures import draw_strips
from pvae.stats import mean_se, number


def denoise(asked: UseContext, word: str, *, add: bool, K: int = 100, steps: int = 100) -> UseResult:
    """Rows without their noise: what x was, on average, given what is seen of it.

    Arguments:
        word: of the noise, as ``GaussianNoise(scale=0.5)``.
        add: the rows are clean: add the noise to them, and say how much of it is taken away again.
    """
    from pvae.generative.noise import make_noise
    from pvae.runtime.torch_state import seeded

    noise = make_noise(parse(word))
    with seeded(asked.seed + 17):
        seen = noise.added(asked.x) if add else asked.x
    y = torch.cat([seen, asked.rows.x[:, asked.run.columns :]], 1)
    found = applications.denoise(
        *asked.programs, y, noise, asked.rows.index, K=K, steps=steps, seed=asked.seed, progress=asked.progress
    )
    lines = {"seen": seen, "denoised": found.x}
    told = [f"{_count(asked).capitalize()}, {word}: the posterior mean of x under {_relied_on(asked, found.ess, K)}."]
    if add:
        noisy, left = _error(seen, asked.x), _error(found.x, asked.x)
        share = (found.x - asked.x).square().nanmean(1) / noisy.mean
        told.append(
            f"Squared error {_of(noisy)} per value with noise, {_of(left)} without: {number(mean_se(share))} of it."
        )
        lines = {"clean": asked.x} | lines
    arrays = {"x": found.x, "sd": found.sd, "seen": seen, "ess": found.ess, "row": asked.rows.place}
    return _use("denoise", arrays, told, draw_strips(_arrays(lines), _shape(asked)))


def impute(asked: UseContext, *, hide: float | None, draws: int = 5, K: int = 100, steps: int = 100) -> UseResult:
    """Missing entries filled in from those that are there.

    Arguments:
        hide: a share of the entries to hide at random, to see how well they are told; None fills in what is missing.
        draws: of each missing entry.
    """
    there = _there(asked, hide)
    x = torch.cat([torch.where(there, asked.x, torch.nan), asked.rows.x[:, asked.run.columns :]], 1)
    means = column_means(asked.run)
    found = applications.impute(
        *asked.programs, x, asked.rows.index, means=means, K=K, draws=draws, steps=steps, **asked.options
    )
    filled = found.x[:, : asked.run.columns]
    missing = (~there).double().mean().item()
    told = [
        f"{_count(asked).capitalize()}, {missing:.1%} of the entries missing, {draws} draws of each under "
        f"{_relied_on(asked, found.ess, K)}."
    ]
    lines = {"seen": torch.where(there, asked.x, torch.nan), "mean": filled, "a draw": found.draws[0]}
    if hide is not None:
        hidden = ~there & ~asked.x.isnan()
        if not hidden.any():
            raise UserError(f"--hide {hide:g} hides none of the {asked.x.numel()} entries; give a larger share")
        own = _masked_error(filled, asked.x, hidden)
        plain = _masked_error(means[: asked.run.columns].expand_as(asked.x), asked.x, hidden)
        told.append(f"Squared error of the hidden entries {_of(own)}; their columns' means leave {_of(plain)}.")
        lines = {"original": asked.x} | lines
    arrays = {"x": filled, "sd": found.sd, "draws": found.draws, "ess": found.ess, "row": asked.rows.place}
    return _use("impute", arrays, told, draw_strips(_arrays(lines), _shape(asked)))


def _relied_on(asked: UseContext, ess: Tensor, K: int) -> str:
    """How many of a row's weighed draws count, at the median."""
    if asked.run.guide.family.point_mass:
        return "one code, the best that was found: no posterior is averaged over"
    return f"{K} weighed draws, of which {ess.nanmedian():.0f} count in the median row"


def _there(asked: UseContext, hide: float | None) -> Tensor:
    """Which entries are there, [B, C]."""
    there = ~asked.x.isnan()
    if hide is not None:
        if not 0 < hide < 1:
            raise UserError(f"--hide is {hide}, but it must be a share between 0 and 1")
        noise = torch.rand(asked.x.shape, generator=torch.Generator().manual_seed(asked.seed))
        return there & (noise >= hide)
    if there.all():
        raise UserError(f"no entry of the {asked.rows.where} is missing (NaN); --hide 0.5 hides half of them, to try")
    return there
