"""Predictive checks: does data that the fitted program makes look like the data, and does half a row tell the rest."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import pyro
import torch
from pyro import poutine
from torch import Tensor

from pvae.distributions.masked import entry_log_prob
from pvae.errors import Incompatible, UserError, check_range
from pvae.generative.handlers import mask_missing
from pvae.inference.guides import Guide
from pvae.inference.importance import ROWS_PER_PASS, log_weights
from pvae.inference.latents import observed_site
from pvae.inference.posterior import refit_params, with_fixed_params
from pvae.runtime.pyro_params import Program, local_param_store, module_of
from pvae.runtime.torch_state import no_validation, seeded
from pvae.stats import Estimate, mean_se

# Datapoints whose hidden entries are forecast together.
ROWS = 250


def _sd(x: Tensor, dim: int) -> Tensor:
    return (x - x.nanmean(dim, keepdim=True)).square().nanmean(dim).sqrt()


# What is compared of N rows [N, M], over the entries that are no NaN. Where a statistic is constant, as the largest of
# binary values, its p-value is 0.5.
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
    r"""Where data drawn from the fit differ from the data, and how well one half of a row tells the other.

    A p-value is the share of replicates whose statistic is above the data's, ties and the data themselves by half: near
    0 the data's is too large, near 1 too small for the program. The latents were fitted to the very rows that are
    checked, which draws p-values towards 0.5: few of them are small by chance, and a misfit may hide (Meng 1994).

    Attributes:
        pixel_p: of each column's mean over the rows, [M].
        statistics_p: of the statistics of ``STATISTICS``, in its order, [S].
        observed: these statistics of the data, [S].
        replicated: and of each replicate, [R, S].
        imputation: log p(x_mis | x_obs) / number of missing values, [B] nats for each of them; NaN where a family has
            no density or the program no density of single entries, and for a row without any entry.
        imputation_marginal: the same for each column alone, :math:`\sum_d \log p(x_d)`: known before one looks.
    """

    pixel_p: Tensor
    statistics_p: Tensor
    observed: Tensor
    replicated: Tensor
    imputation: Tensor
    imputation_marginal: Tensor

    def summary(self) -> dict[str, Estimate]:
        """p-values of the statistics, how many of them and what share of columns are off, and nats per missing value.

        A statistic is off with a p-value beyond 0.005 or 0.995, a column beyond 0.025 or 0.975.
        """
        found = {f"p of {name}": self._p(p) for name, p in zip(STATISTICS, self.statistics_p.tolist(), strict=True)}
        off = (self.statistics_p - 0.5).abs() > 0.495
        found["statistics_off"] = Estimate(float(off.sum()), math.nan)
        found["columns_off"] = mean_se(((self.pixel_p - 0.5).abs() > 0.475).double())
        if not self.imputation.isnan().all():
            own, alone = (v[~self.imputation.isnan()] for v in (self.imputation, self.imputation_marginal))
            found["imputation"] = mean_se(own)
            found["imputation_marginal"] = mean_se(alone)
            found["imputation_gain"] = mean_se(own - alone)
        return found

    def _p(self, p: float) -> Estimate:
        return Estimate(p, (p * (1 - p) / len(self.replicated)) ** 0.5)


class _Rows(NamedTuple):
    """Rows, which datapoints they are, which of their entries are there, and the seed of their noise."""

    x: Tensor
    index: Tensor | None  # type: ignore[assignment]
    there: Tensor
    seed: int


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
    r"""Posterior predictive checks and held-out imputation.

    A replicate is z ~ q(z|x), :math:`x^{rep} \sim p(x|z)` for the same rows, and misses what they miss. For the
    imputation a random part of what each row has is hidden and q refitted to what is left, starting from the guide's
    q_params for the row filled with the columns' means or from the family's initial one, whichever is better. Then, with
    :math:`z_k \sim q` and weights :math:`v_k \propto p(x_{obs}, z_k) / q(z_k)`,

    .. math:: \log p(x_{mis}|x_{obs}) \approx \log \textstyle\sum_k v_k\, p(x_{mis}|z_k).

    The v_k never see what is hidden, so that this is the score of a real forecast: an error of the search can only
    cost. The marginal score is the same for each column alone, under K draws of the prior.

    Arguments:
        model, guide: Pyro programs of one signature; the imputation is made for our guides alone.
        x, index: rows [B, ...] and which training datapoints they are; None for new ones.
        replicates: R, number of data sets drawn.
        hidden: share of the entries of each row to hide; 0 leaves the imputation out.
        K: draws for each row of the imputation.
        steps: the most refinement steps of a row.
        seed: of all noise.

    Raises:
        UserError: a number out of range, or a program that observes no rows of values.

    Source: Gelman, Meng, Stern (1996), *Posterior Predictive Assessment of Model Fitness via Realized Discrepancies*,
    Statistica Sinica 6; Meng (1994), *Posterior Predictive p-Values*, Annals of Statistics 22.
    """
    check_range("predictive_checks", replicates=replicates, K=K, steps=steps)
    if not 0 <= hidden < 1:
        raise UserError(f"predictive_checks: hidden is {hidden}, but it must be a share from 0 up to 1")
    for program in (model, guide):
        module_of(program).eval()
    with torch.no_grad(), no_validation(), local_param_store():
        with seeded(seed):
            own, drawn = _replicates(model, guide, x, index, replicates)
        with seeded(seed + 1):
            scores = _imputation(model, guide, x, index, hidden, K, steps, seed + 1)
    return PredictiveChecks(*own, *drawn, *scores)


def _replicates(
    model: Program, guide: Program, x: Tensor, index: Tensor | None, replicates: int
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """p-values of columns [M] and statistics [S]; the statistics of the data [S] and of the replicates [R, S]."""
    q = with_fixed_params(guide, x, index)
    means, statistics = [], []
    for _ in range(replicates):
        site = observed_site(poutine.replay(model, trace=poutine.trace(q).get_trace(x, index)), x, index)
        drawn = torch.where(site["value"].isnan(), torch.nan, site["fn"].sample()).flatten(1)
        means.append(_means(drawn))
        statistics.append(_statistics(drawn))
    own = site["value"].flatten(1)
    found, replicated = _statistics(own), torch.stack(statistics)
    return (_p(_means(own), torch.stack(means)), _p(found, replicated)), (found, replicated)


def _means(rows: Tensor) -> Tensor:
    return rows.nanmean(0).nan_to_num()  # a column that all rows miss is a tie


def _statistics(rows: Tensor) -> Tensor:
    return torch.stack([statistic(rows) for statistic in STATISTICS.values()]).nan_to_num()


def _p(observed: Tensor, replicated: Tensor) -> Tensor:
    """Share of the replicates [R, ...] above the observed [...], which count as one of R + 1, and ties by half."""
    # Sums of the same numbers in another order are still ties.
    near = 1e-6 * observed.abs()
    above, tied = replicated > observed + near, (replicated - observed).abs() <= near
    return (above.sum(0) + (tied.sum(0) + 1) / 2) / (len(replicated) + 1)


def _imputation(
    model: Program, guide: Program, x: Tensor, index: Tensor | None, hidden: float, K: int, steps: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Scores of the hidden entries given the others, and of each alone, [B] nats for each hidden entry."""
    unknown = x.new_full((2, len(x)), torch.nan)
    if not hidden or not isinstance(guide, Guide) or guide.family.point_mass:
        return unknown[0], unknown[1]
    value = observed_site(model, x, index)["value"]
    with seeded(seed):  # not the stream of the draws that finding the value took
        there = _kept(value, hidden)
    filled = _filled(value, there) if value.shape == x.shape else None
    found = []
    try:
        for start in range(0, len(x), ROWS):
            part = slice(start, start + ROWS)
            rows = _Rows(x[part], None if index is None else index[part], there[part], seed + start)
            offers = () if filled is None else (filled[part],)
            seen = mask_missing(model, rows.there)
            q_params = refit_params(seen, guide, rows.x, rows.index, candidates=offers, steps=steps, seed=rows.seed)
            found.append((_forecast(model, guide, rows, q_params, K), _marginal(model, rows, K)))
    except Incompatible:  # whole rows are scored, not entries
        return unknown[0], unknown[1]
    count = (~there).flatten(1).sum(1)
    own, alone = (torch.cat(scores) / count for scores in zip(*found, strict=True))
    return own, alone


def _kept(value: Tensor, hidden: float) -> Tensor:
    """Which entries stay, or miss already, [B, ...]: rows lose the same share, at least one, and keep one."""
    missing = value.isnan().flatten(1)
    noise = torch.rand(value.shape, device=value.device).flatten(1).masked_fill(missing, 2.0)
    own = (~missing).sum(1, keepdim=True)
    count = (hidden * own.double()).round().minimum(own - 1.0).clamp(min=1).minimum(own)
    return (noise.argsort(1).argsort(1) >= count).view_as(value)


def _filled(value: Tensor, there: Tensor) -> Tensor:
    """The rows with their columns' means, over the rows that have them, in place of what is hidden or missing."""
    there = there & ~value.isnan()
    means = torch.where(there, value, 0).sum(0) / there.sum(0).clamp(min=1)
    return torch.where(there, value, means)


def _forecast(model: Program, guide: Guide, rows: _Rows, q_params: Tensor, K: int) -> Tensor:
    """log p(x_mis | x_obs), [B]."""
    seen, unseen = mask_missing(model, rows.there), mask_missing(model, ~rows.there)
    with seeded(rows.seed + 1):
        log_w = log_weights(seen, guide.with_params(q_params), rows.x, rows.index, K).log_w
    with seeded(rows.seed + 1):  # the same draws
        log_lik = log_weights(unseen, guide.with_params(q_params), rows.x, rows.index, K).log_lik
    return (log_w.log_softmax(0) + log_lik).logsumexp(0)


def _marginal(model: Program, rows: _Rows, K: int) -> Tensor:
    """The sum of log p(x_d) over the hidden entries, [B], by K draws of the prior."""
    total, size = torch.full_like(rows.there, -torch.inf, dtype=rows.x.dtype), max(1, ROWS_PER_PASS // len(rows.x))
    for start in range(0, K, size):
        draws = min(size, K - start)
        with pyro.plate("samples", draws, dim=-2):
            site = observed_site(model, rows.x, rows.index)
        log_p = entry_log_prob(site["fn"], site["value"]).expand(draws, *site["value"].shape).logsumexp(0)
        total = torch.logaddexp(total, log_p)
    return torch.where(rows.there, 0, total - math.log(K)).flatten(1).sum(1)
