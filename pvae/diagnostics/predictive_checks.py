"""Posterior predictive checks of the model, and imputation of held-out entries."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from torch import Tensor

from pvae.distributions.masked_likelihood import entry_log_prob
from pvae.errors import Incompatible, UserError, check_range, param
from pvae.generative.effect_handlers import mask_missing
from pvae.inference.batching import ROWS, RowBatch, draw_chunks, inference_mode
from pvae.inference.guides import Guide
from pvae.inference.importance import log_weights
from pvae.inference.latents import observed_site
from pvae.inference.posterior import posterior_predictive, refit_params, with_fixed_params
from pvae.runtime.pyro_params import Program
from pvae.runtime.torch_state import seeded
from pvae.stats import Estimate, impute_column_means, mean_se


def _sd(x: Tensor, dim: int) -> Tensor:
    return (x - x.nanmean(dim, keepdim=True)).square().nanmean(dim).sqrt()


# Test statistics of N rows [N, M] over their observed entries. One that can't vary, such as the largest of binary
# values, has p-value 0.5.
STATISTICS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda x: x.nanmean(),
    "spread within rows": lambda x: _sd(x, 1).nanmean(),
    "spread over rows": lambda x: _sd(x, 0).nanmean(),
    "spread of row means": lambda x: _sd(x.nanmean(1), 0),
    "largest value": lambda x: x.masked_fill(x.isnan(), -torch.inf).max(),
    "share of zeros": lambda x: (x == 0).sum() / (~x.isnan()).sum(),
    "difference of neighbours": lambda x: x.diff(dim=1).abs().nanmean(),
}


@dataclass(frozen=True)
class PredictiveChecks:
    r"""Posterior predictive p-values, and log-likelihoods of held-out entries given the others.

    A p-value is the share of replicates whose statistic is above the data's, ties and the data themselves by half: near
    0 the data's is too large, near 1 too small for the model. The latents are inferred from the very rows that are
    checked, which draws p-values towards 0.5: few of them are small by chance, and a misfit may hide (Meng 1994).

    Attributes:
        pixel_p: of each column's mean over the rows, [M].
        statistics_p: of the statistics of ``STATISTICS``, in its order, [S].
        observed, replicated: these statistics of the data, [S], and of each replicate, [R, S].
        imputation: log p(x_mis | x_obs) per held-out entry, [B] nats; NaN for a point-mass family, for a likelihood
            without a density of single entries, and for a row without observed entries.
        imputation_marginal: the same without the other entries, :math:`\sum_d \log p(x_d)`: the baseline.
    """

    pixel_p: Tensor
    statistics_p: Tensor
    observed: Tensor
    replicated: Tensor
    imputation: Tensor
    imputation_marginal: Tensor

    def summary(self) -> dict[str, Estimate]:
        """Return the quantities of section "Predictive checks", and the p-value of each statistic, ``p of ...``.

        A statistic is off with a p-value beyond 0.005 or 0.995, a column beyond 0.025 or 0.975.
        """
        from scipy.stats import binom

        summary = {}
        for name, p in zip(STATISTICS, self.statistics_p.tolist(), strict=True):
            summary[f"p of {name}"] = Estimate(p, (p * (1 - p) / len(self.replicated)) ** 0.5)
        off = (self.statistics_p - 0.5).abs() > 0.495
        summary["statistics_off"] = Estimate(float(off.sum()), math.nan)
        columns = (self.pixel_p - 0.5).abs() > 0.475
        summary["columns_off"] = mean_se(columns.double())
        summary["columns_p"] = Estimate(float(binom.sf(int(columns.sum()) - 1, len(columns), 0.05)), math.nan)
        scored = ~self.imputation.isnan()
        if scored.any():
            scores, baseline = self.imputation[scored], self.imputation_marginal[scored]
            summary["imputation"] = mean_se(scores)
            summary["imputation_marginal"] = mean_se(baseline)
            summary["imputation_gain"] = mean_se(scores - baseline)
        return summary


def run_predictive_checks(
    model: Program,
    guide: Program,
    x: Tensor,
    index: Tensor | None = None,
    *,
    replicates: int = 200,
    hidden: float = 0.5,
    K: int = 1000,
    steps: int = 200,
    seed: int = 0,
) -> PredictiveChecks:
    r"""Run posterior predictive checks, and score the imputation of held-out entries.

    A replicate is z ~ q(z|x), :math:`x^{rep} \sim p(x|z)` for the same rows, and misses what they miss. For the
    imputation a random part of each row's observed entries is held out, and q is refitted to the others, starting from
    the better of the guide's q_params for the row with column means filled in, and the family's initial ones. Then,
    with :math:`z_k \sim q` and weights :math:`v_k \propto p(x_{obs}, z_k) / q(z_k)`,

    .. math:: \log p(x_{mis}|x_{obs}) \approx \log \textstyle\sum_k v_k\, p(x_{mis}|z_k).

    The v_k do not depend on held-out entries: an error of the search can only lower this score. The marginal score is
    that of each column alone, under K draws of the prior.

    Arguments:
        model, guide: Pyro programs of one signature; the imputation needs a `Guide`.
        x, index: rows [B, ...] and which training datapoints they are; None for new rows.
        replicates: R, number of data sets drawn.
        hidden: share of the entries of each row to hold out; 0 for no imputation.
        K, steps: draws, and the most refinement steps, for each row of the imputation.
        seed: of all noise; the random stream outside is left alone.

    Raises:
        UserError: a number out of range, or a program that observes no rows of values.

    Source: Gelman, Meng, Stern (1996), *Posterior Predictive Assessment of Model Fitness via Realized Discrepancies*,
    Statistica Sinica 6; Meng (1994), *Posterior Predictive p-Values*, Annals of Statistics 22.
    """
    check_range(least=1, replicates=replicates, K=K, steps=steps)
    if not 0 <= hidden < 1:
        raise UserError(f"{param('hidden')} is {hidden}, but it must be a share of at least 0 and below 1")
    with inference_mode(model, guide, seed=seed):
        checks = _replicate(model, guide, x, index, replicates)
    with inference_mode(seed=seed + 1):
        return PredictiveChecks(*checks, *_impute(model, guide, x, index, hidden, K, steps, seed + 1))


def _replicate(
    model: Program, guide: Program, x: Tensor, index: Tensor | None, replicates: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return p-values of columns [M] and statistics [S]; statistics of the data [S] and of the replicates [R, S]."""
    q = with_fixed_params(guide, x, index)
    means, statistics = [], []
    for _ in range(replicates):
        draw = posterior_predictive(model, q, x, index)
        replicate = torch.where(draw.observed.isnan(), torch.nan, draw.likelihood.sample()).flatten(1)
        means.append(_means(replicate))
        statistics.append(_statistics(replicate))
    data = draw.observed.flatten(1)
    observed, replicated = _statistics(data), torch.stack(statistics)
    return _p(_means(data), torch.stack(means)), _p(observed, replicated), observed, replicated


def _means(rows: Tensor) -> Tensor:
    return rows.nanmean(0).nan_to_num()  # a column that all rows miss is a tie


def _statistics(rows: Tensor) -> Tensor:
    return torch.stack([statistic(rows) for statistic in STATISTICS.values()]).nan_to_num()


def _p(observed: Tensor, replicated: Tensor) -> Tensor:
    """Return the share of the replicates [R, ...] above the observed [...], one of R + 1; ties count half."""
    near = 1e-6 * observed.abs()  # sums of the same numbers in another order are still ties
    above, tied = replicated > observed + near, (replicated - observed).abs() <= near
    return (above.sum(0) + (tied.sum(0) + 1) / 2) / (len(replicated) + 1)


def _impute(
    model: Program, guide: Program, x: Tensor, index: Tensor | None, hidden: float, K: int, steps: int, seed: int
) -> tuple[Tensor, ...]:
    """Score the held-out entries given the others, and each alone, [B] nats per held-out entry."""
    unknown = x.new_full((2, len(x)), torch.nan).unbind()
    if not hidden or not isinstance(guide, Guide) or guide.family.point_mass:
        return unknown
    value = observed_site(model, x, index)["value"]
    with seeded(seed):  # not the stream of the draws that finding the value took
        observed = _mask(value, hidden)
    filled = impute_column_means(value, observed) if value.shape == x.shape else None
    scores = []
    try:
        for start in range(0, len(x), ROWS):
            rows = slice(start, start + ROWS)
            batch = RowBatch(x[rows], None if index is None else index[rows], rows, seed + start)
            candidates = () if filled is None else (filled[rows],)
            forecast = _forecast(model, guide, batch, observed[rows], candidates, K, steps)
            scores.append((forecast, _marginal(model, batch, observed[rows], K)))
    except Incompatible:  # the likelihood scores whole rows, not entries
        return unknown
    count = (~observed).flatten(1).sum(1)
    return tuple(torch.cat(batches) / count for batches in zip(*scores, strict=True))


def _mask(value: Tensor, hidden: float) -> Tensor:
    """Draw the entries that stay observed, [B, ...]: rows lose the same share, at least one, and keep one."""
    missing = value.isnan().flatten(1)
    noise = torch.rand(value.shape, device=value.device).flatten(1).masked_fill(missing, 2.0)
    observed = (~missing).sum(1, keepdim=True)
    count = (hidden * observed.double()).round().minimum(observed - 1.0).clamp(min=1).minimum(observed)
    return (noise.argsort(1).argsort(1) >= count).view_as(value)


def _forecast(
    model: Program, guide: Guide, batch: RowBatch, observed: Tensor, candidates: Sequence[Tensor], K: int, steps: int
) -> Tensor:
    """Compute log p(x_mis | x_obs), [B], under q refitted from the candidates, rows to encode."""
    seen, unseen = mask_missing(model, observed), mask_missing(model, ~observed)
    options: Any = {"candidates": candidates, "steps": steps, "seed": batch.seed}
    q = guide.with_params(refit_params(seen, guide, batch.x, batch.index, **options))
    with seeded(batch.seed + 1):
        log_w = log_weights(seen, q, batch.x, batch.index, K).log_w
    with seeded(batch.seed + 1):  # the same draws
        log_lik = log_weights(unseen, q, batch.x, batch.index, K).log_lik
    return (log_w.log_softmax(0) + log_lik).logsumexp(0)


def _marginal(model: Program, batch: RowBatch, observed: Tensor, K: int) -> Tensor:
    """Compute the sum of log p(x_d) over the held-out entries, [B], by K draws of the prior."""
    total = torch.full_like(observed, -torch.inf, dtype=batch.x.dtype)
    for chunk in draw_chunks(K, len(batch.x)):
        draws = chunk.stop - chunk.start
        with pyro.plate("samples", draws, dim=-2):
            site = observed_site(model, batch.x, batch.index)
        log_p = entry_log_prob(site["fn"], site["value"]).expand(draws, *site["value"].shape).logsumexp(0)
        total = torch.logaddexp(total, log_p)
    return torch.where(observed, 0, total - math.log(K)).flatten(1).sum(1)
