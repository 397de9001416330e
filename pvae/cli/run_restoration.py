"""Uses of a run that restore rows: noise removed, missing entries imputed."""

from __future__ import annotations

import torch
from torch import Tensor

from pvae import applications
from pvae.applications.restoration import LEAST_DRAWS, Denoising, Imputation
from pvae.cli.baselines import FITTED
from pvae.cli.use_context import UseContext, error_words, make_result, squared_error
from pvae.errors import UserError, param
from pvae.experiments.use_results import UseResult
from pvae.generative.noise import make_noise
from pvae.recipes.registry import parse_component
from pvae.runtime.torch_state import seeded
from pvae.stats import mean_se, number

NAMED = 5  # unreliable rows that a sentence names, at most


def denoise(
    context: UseContext, noise: str, *, add: bool | None = None, K: int = LEAST_DRAWS, steps: int = 100
) -> UseResult:
    """Remove noise from rows, which is added to them first if ``add`` (the default for the run's own rows)."""
    model = make_noise(parse_component(noise))
    add = context.rows.from_run if add is None else add
    with seeded(context.seed + 17):
        noisy = model.add_to(context.x) if add else context.x
    y = torch.cat([noisy, context.rows.x[:, context.run.columns :]], 1)
    clean = context.apply(applications.denoise, y, model, context.rows.index, K=K, steps=steps)
    lines = {"seen": noisy, "denoised": clean.x}
    sentences = [f"{context.count.capitalize()}, {noise}: the posterior mean of x under {_draws(context, clean, K)}."]
    sentences += _unreliable(context, clean)
    if add:
        before, after = squared_error(noisy, context.x), squared_error(clean.x, context.x)
        share = number(mean_se((clean.x - context.x).square().nanmean(1) / before.mean))
        compared = f"{error_words(before)} per value with noise, {error_words(after)} without: {share} of it"
        sentences.append(f"Squared error {compared}.")
        lines = {"clean": context.x} | lines
    arrays = {"x": clean.x, "sd": clean.sd, "seen": noisy}
    return make_result("denoise", arrays | _of_rows(context, clean), sentences, context.strips(lines))


def impute(
    context: UseContext, *, hide: float | None, draws: int = 5, K: int = LEAST_DRAWS, steps: int = 100
) -> UseResult:
    """Impute missing entries from the observed ones, and measure the error on a share to ``hide`` at random, if any."""
    observed = _observed(context, hide)
    seen = torch.where(observed, context.x, torch.nan)
    x = torch.cat([seen, context.rows.x[:, context.run.columns :]], 1)
    means = context.run.data.fixed_train(FITTED).x.nanmean(0)
    imputed = context.apply(applications.impute, x, context.rows.index, means=means, K=K, draws=draws, steps=steps)
    x_hat = imputed.x[:, : context.run.columns]
    missing = f"{(~observed).double().mean().item():.1%} of the entries missing"
    under = f"{draws} draws of each under {_draws(context, imputed, K)}"
    sentences = [f"{context.count.capitalize()}, {missing}, {under}.", *_unreliable(context, imputed)]
    lines = {"seen": seen, "mean": x_hat, "a draw": imputed.draws[0]}
    if hide is not None:
        hidden = ~observed & ~context.x.isnan()
        if not hidden.any():
            raise UserError(f"{param('hide', hide)} hides none of the {context.x.numel()} entries; give a larger share")
        error = squared_error(x_hat, context.x, hidden)
        baseline = squared_error(means[: context.run.columns].expand_as(context.x), context.x, hidden)
        compared = f"{error_words(error)}; their columns' means leave {error_words(baseline)}"
        sentences.append(f"Squared error of the hidden entries {compared}.")
        lines = {"original": context.x} | lines
    arrays = {"x": x_hat, "sd": imputed.sd, "draws": imputed.draws}
    return make_result("impute", arrays | _of_rows(context, imputed), sentences, context.strips(lines))


def _of_rows(context: UseContext, restored: Denoising | Imputation) -> dict[str, Tensor]:
    """Return what is said of each row: how far its draws may be trusted, and its position."""
    return {"ess": restored.ess, "reliable": restored.reliable, "row": context.rows.place}


def _draws(context: UseContext, restored: Denoising | Imputation, K: int) -> str:
    """Say how many draws of a row's posterior were taken, and by which methods of how many rows."""
    if context.run.guide.family.point_mass:
        return "the best code found, as the posterior family is a point mass"
    methods = ", ".join(f"{name} {count}" for name, count in restored.counts().items())
    return f"{max(K, LEAST_DRAWS)} draws from each row's posterior (rows by method: {methods})"


def _unreliable(context: UseContext, restored: Denoising | Imputation) -> list[str]:
    """Name the rows on which the checks of every method failed, if there are any."""
    rows = context.rows.place[~restored.reliable.cpu()]
    if not len(rows) or context.run.guide.family.point_mass:
        return []
    failed = "the checks of every method failed, so that means, deviations and draws may be far off"
    return [f"What is said of {name_rows(rows)} is unreliable: {failed}."]


def name_rows(place: Tensor) -> str:
    """Return how many rows there are and the first few, by their positions.

    >>> name_rows(torch.arange(7))
    '7 rows (0, 1, 2, 3, 4, ...)'
    """
    few = ", ".join(map(str, place[:NAMED].tolist())) + (", ..." if len(place) > NAMED else "")
    return f"{len(place)} row{'s' if len(place) > 1 else ''} ({few})"


def _observed(context: UseContext, hide: float | None) -> Tensor:
    """Return which entries are observed and not hidden, [B, C]."""
    observed = ~context.x.isnan()
    if hide is not None:
        if not 0 < hide < 1:
            raise UserError(f"{param('hide')} is {hide}, but it must be a share between 0 and 1")
        noise = torch.rand(context.x.shape, generator=torch.Generator().manual_seed(context.seed))
        return observed & (noise >= hide)
    if observed.all():
        message = f"no entry of the {context.rows.where} is missing (NaN)"
        raise UserError(message, f"{param('hide', 0.5)} hides half of them, to try")
    return observed
