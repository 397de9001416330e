"""Estimates and their standard errors, diagnostics of importance weights and of chains, p-values."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

UNRELIABLE = 0.7  # k-hat beyond which no affordable number of draws makes importance weights reliable


class Estimate(NamedTuple):
    """A mean over datapoints and its standard error, in the units of what was averaged."""

    mean: float
    se: float


def mean_se(values: Tensor) -> Estimate:
    r"""Return the mean of independent values and its standard error, :math:`s / \sqrt{n}`.

    Arguments:
        values: one value per datapoint, [B]; the spread over datapoints includes the Monte Carlo noise of each.

    >>> mean_se(torch.tensor([1.0, 2.0, 3.0, 4.0])).mean
    2.5
    """
    values, n = values.double(), values.numel()
    se = values.std().item() / math.sqrt(n) if n > 1 else math.nan
    return Estimate(values.mean().item(), se)


class CrossedEstimate(NamedTuple):
    """Grand mean of values crossed by seed and row, its standard error, and the error's degrees of freedom."""

    mean: float
    se: float
    df: float


def crossed_mean_se(values: Tensor) -> CrossedEstimate:
    r"""Return the grand mean of S seeds' values of the same R rows, with the error over seeds and over rows.

    .. math:: \mathrm{Var} = \frac{M_R + M_S - M_E}{S R}, \qquad
        \nu = \frac{(M_R + M_S - M_E)^2}{M_R^2 / (R - 1) + M_S^2 / (S - 1) + M_E^2 / ((S - 1)(R - 1))}

    with the mean squares of rows, seeds and the remainder; the sum is at least the larger of the first two. The degrees
    of freedom (Satterthwaite 1946) are kept from S - 1 to 2^S (S - 1): few seeds that happen to agree prove little.

    Arguments:
        values: [S, R]; differences of two variants, paired by seed and row, for the error of their difference.

    Source: Searle, Casella, McCulloch (1992), *Variance Components*, chapter 4.

    >>> mean, se, df = crossed_mean_se(torch.tensor([[1.0, 2.0, 3.0], [1.5, 2.5, 3.5]]))
    >>> mean, round(se, 3), round(df, 2)
    (2.25, 0.629, 2.64)
    """
    values = values.double()
    S, R = values.shape
    if S == 1:
        return CrossedEstimate(*mean_se(values[0]), float(R - 1))
    by_row, by_seed, mean = values.mean(0), values.mean(1), values.mean()
    rows, seeds = S * by_row.var().item() if R > 1 else 0.0, R * by_seed.var().item()
    rest = (values - by_row - by_seed.unsqueeze(1) + mean).square().sum().item() / max((S - 1) * (R - 1), 1)
    total = max(rows + seeds - rest, rows, seeds)
    spread = rows**2 / max(R - 1, 1) + seeds**2 / (S - 1) + rest**2 / max((S - 1) * (R - 1), 1)
    df = total**2 / spread if spread else math.inf
    return CrossedEstimate(mean.item(), math.sqrt(total / (S * R)), min(max(df, S - 1), 2.0**S * (S - 1)))


class RowInfluence(NamedTuple):
    """Rows that lie farthest from the median of values [B], and how much of the values' spread they make.

    Attributes:
        rows: numbers of the farthest rows, the farthest first.
        share: their share of the sum of absolute deviations from the median.
        median, trimmed_mean: of all values, the mean without a tenth at either end.
        dominates: they make more than half of the spread, among 30 values or more.
    """

    rows: tuple[int, ...]
    share: float
    median: float
    trimmed_mean: float
    dominates: bool


def measure_row_influence(values: Tensor, count: int = 3) -> RowInfluence:
    """Measure how much the ``count`` farthest rows rule the mean of values [B].

    >>> measure_row_influence(torch.cat([torch.arange(40.0), torch.tensor([1e4])])).dominates
    True
    >>> measure_row_influence(torch.arange(40.0)).dominates
    False
    """
    values = values.double().flatten().nan_to_num(nan=-1e300, posinf=1e300, neginf=-1e300)
    ordered, off = values.sort().values, (values - values.median()).abs()
    top, cut = off.topk(min(count, len(off))), len(values) // 10
    share = (top.values.sum() / off.sum().clamp(min=1e-300)).item()
    trimmed = ordered[cut : len(ordered) - cut].mean().item()
    rows = tuple(top.indices.tolist())
    return RowInfluence(rows, share, values.median().item(), trimmed, share > 0.5 and len(values) >= 30)


def column_means(x: Tensor, observed: Tensor | None = None) -> Tensor:
    """Return the mean of each column's observed entries, [D]; 0 for a column without any.

    Arguments:
        x: rows [N, D]; NaN marks missing entries.
        observed: entries to use, [N, D]; all that are not NaN unless given.
    """
    observed = ~x.isnan() if observed is None else observed & ~x.isnan()
    return torch.where(observed, x, 0).sum(0) / observed.sum(0).clamp(min=1)


def impute_column_means(x: Tensor, observed: Tensor | None = None, means: Tensor | None = None) -> Tensor:
    """Replace missing entries by ``means`` [D], else their columns' own (mean imputation), [N, D]; see `column_means`.

    >>> impute_column_means(torch.tensor([[1.0, torch.nan], [3.0, 4.0]])).tolist()
    [[1.0, 4.0], [3.0, 4.0]]
    """
    observed = ~x.isnan() if observed is None else observed & ~x.isnan()
    return torch.where(observed, x, column_means(x, observed) if means is None else means.to(x))


def number(estimate: Estimate) -> str:
    """Format a mean with its standard error to the digits that the error supports; alone if it has none.

    >>> number(Estimate(-16.8912, 0.0312)), number(Estimate(-165877.3, 164637.2)), number(Estimate(-1.8e10, 1.7e10))
    ('-16.89 ± 0.03', '-165877 ± 164637', '-1.8e+10 ± 1.7e+10')
    """
    if not math.isfinite(estimate.se) or estimate.se == 0:
        return f"{estimate.mean:.2g}" if abs(estimate.mean) < 100 else f"{estimate.mean:.0f}"
    if max(abs(estimate.mean), estimate.se) >= 1e7:
        return f"{estimate.mean:.3g} ± {estimate.se:.2g}"
    digits = int(estimate.se < 100) if estimate.se >= 0.3 else max(2, math.ceil(-math.log10(estimate.se)))
    return f"{estimate.mean:z.{digits}f} ± {estimate.se:.{digits}f}"


def percent(estimate: Estimate) -> str:
    """Format a share with its standard error in percent.

    >>> percent(Estimate(0.9765, 0.0078))
    '97.7 ± 0.8%'
    """
    mean, se = 100 * estimate.mean, 100 * estimate.se
    return f"{mean:.1f} ± {se:.1f}%" if math.isfinite(se) else f"{mean:.1f}%"


def log_mean_exp(log_w: Tensor, dim: int = 0) -> Tensor:
    r"""Compute :math:`\log \frac1K \sum_k e^{\log w_k}` without overflow.

    >>> log_mean_exp(torch.zeros(5, 2))
    tensor([0., 0.])
    """
    return torch.logsumexp(log_w, dim) - math.log(log_w.shape[dim])


def log_mean_exp_se(log_w: Tensor, dim: int = 0) -> Tensor:
    r"""Return the standard error of `log_mean_exp` by the delta method, :math:`s_w / (\bar w \sqrt K)`.

    >>> log_mean_exp_se(torch.zeros(5, 2))
    tensor([0., 0.])
    """
    w = (log_w - log_w.amax(dim, keepdim=True)).exp()
    if log_w.shape[dim] == 1:
        return torch.full_like(w.mean(dim), torch.nan)  # a single draw has no error estimate
    return w.std(dim) / w.mean(dim) / math.sqrt(log_w.shape[dim])


def effective_sample_size(log_w: Tensor, dim: int = 0) -> Tensor:
    r"""Compute Kish's effective sample size, :math:`(\sum_k w_k)^2 / \sum_k w_k^2`, between 1 and K.

    Source: Kish (1965), *Survey Sampling*.

    >>> effective_sample_size(torch.zeros(5))
    tensor(5.)
    """
    w = (log_w - log_w.amax(dim, keepdim=True)).exp()
    return w.sum(dim) ** 2 / (w**2).sum(dim)


def bootstrap(values: Tensor, *, level: float = 0.95, repeats: int = 2000, seed: int = 0) -> tuple[float, float]:
    r"""Compute the percentile bootstrap interval of the mean over datapoints; the mean itself for a single one.

    Arguments:
        values: one value per datapoint, [B].
        level: share of the resamples between the ends.
        repeats: number of resamples of all B values.

    Source: Efron and Tibshirani (1993), *An Introduction to the Bootstrap*.

    >>> low, high = bootstrap(torch.arange(100.0))
    >>> low < 49.5 < high
    True
    """
    from scipy import stats

    if len(values) < 2 or not values.isfinite().all():
        return (values.double().mean().item(),) * 2
    options = {"n_resamples": repeats, "batch": max(1, 1_000_000 // len(values)), "rng": np.random.default_rng(seed)}
    data = (values.double().cpu().numpy(),)
    interval = stats.bootstrap(data, np.mean, method="percentile", confidence_level=level, **options)
    return float(interval.confidence_interval.low), float(interval.confidence_interval.high)


def k_hat(log_w: Tensor) -> Tensor:
    r"""Compute the Pareto shape (k-hat) of each datapoint's importance weights :math:`p(x, z) / q(z|x)`, [B].

    Arguments:
        log_w: log weights [K, B], at least 30 draws.

    Returns:
        k-hat; below 0.5 the weights have a variance, above 0.7 no affordable number of draws is enough, and importance
        sampling from q is unreliable. -inf where the largest weights are equal.

    Source: Vehtari, Simpson, Gelman, Yao, Gabry (2024), *Pareto Smoothed Importance Sampling*, arXiv:1507.02646;
    computed by arviz-stats.

    See also: `draws_needed`, `k_hat_threshold`.

    >>> k_hat(torch.zeros(100, 2))
    tensor([-inf, -inf])
    """
    return k_hat_of_tail(log_w.topk(tail_length(len(log_w)) + 1, 0).values, len(log_w))


def tail_length(K: int) -> int:
    r"""Return the number of the largest of K weights that are the tail, :math:`\lfloor \min(K / 5, 3 \sqrt K) \rfloor`.

    >>> tail_length(100), tail_length(10_000)
    (20, 300)
    """
    return min(K // 5, math.isqrt(9 * K))


def k_hat_of_tail(top: Tensor, K: int) -> Tensor:
    """Compute `k_hat` from the ``tail_length(K) + 1`` largest of K log weights, [M + 1, B], in descending order."""
    from arviz_stats.base import array_stats

    def fit(tail: np.ndarray) -> float:
        # One datapoint's log weights in ascending order, the first of which is the cutoff.
        if not np.isfinite(tail.max()):
            return math.nan
        if np.ptp(tail) < 1e-6:  # a constant has no tail
            return -math.inf
        weights = np.exp(tail - tail.max())
        if weights[int(len(tail) / 4 + 0.25)] == weights[0]:
            # The fit measures by the tail's lower quartile. Ties there are rounding, or weights that leave a double.
            return -math.inf if np.ptp(tail) < 700 else math.inf
        return float(array_stats._gpdfit(weights[1:] - weights[0])[0])

    return torch.tensor([fit(tail) for tail in top.flip(0).detach().double().cpu().numpy().T], dtype=top.dtype)


def k_hat_threshold(K: int) -> float:
    r"""Return the k-hat up to which K draws give a reliable estimate, :math:`\min(1 - 1 / \log_{10} K, 0.7)`.

    Source: as `k_hat`.

    >>> k_hat_threshold(100), k_hat_threshold(100_000)
    (0.5, 0.7)
    """
    return min(1 - 1 / math.log10(K), 0.7) if K > 1 else -math.inf


def draws_needed(k: Tensor) -> Tensor:
    r"""Return the number of draws that make an estimate with this k-hat reliable, :math:`10^{1 / (1 - \max(k, 0))}`.

    It is 2,154 draws at 0.7, 10^10 at 0.9 and infinite from 1 on.

    Source: as `k_hat`.

    >>> draws_needed(torch.tensor([-0.2, 0.5, 1.1]))
    tensor([ 10., 100.,  inf])
    """
    k = k.double().clamp(min=0)
    return torch.where(k < 1, 10 ** (1 / (1 - k)), torch.inf).float()


def r_hat(draws: Tensor) -> Tensor:
    r"""Compute the rank-normalized split R-hat of chains [C, T, ...] over the last dimensions; 1 when they agree.

    Source: Vehtari, Gelman, Simpson, Carpenter, Buerkner (2021), *Rank-Normalization, Folding, and Localization*,
    arXiv:1903.08008; computed by arviz-stats.

    >>> bool(r_hat(torch.randn(4, 100, 3, generator=torch.Generator().manual_seed(0))).max() < 1.1)
    True
    """
    from arviz_stats.base import array_stats

    return torch.from_numpy(np.asarray(array_stats.rhat(draws.double().cpu().numpy(), chain_axis=0, draw_axis=1)))


def chain_ess(draws: Tensor) -> Tensor:
    r"""Compute the bulk effective sample size (ESS) of all chains [C, T, ...] together, over the last dimensions.

    Source: as `r_hat`.

    >>> bool(chain_ess(torch.randn(4, 100, 3, generator=torch.Generator().manual_seed(0))).min() > 100)
    True
    """
    from arviz_stats.base import array_stats

    return torch.from_numpy(np.asarray(array_stats.ess(draws.double().cpu().numpy(), chain_axis=0, draw_axis=1)))


def uniform_p(u: Tensor) -> Tensor:
    r"""Return the p-value of each column of u [N, D] for uniformity on (0, 1), by the Kolmogorov-Smirnov test, [D].

    >>> bool(uniform_p(torch.linspace(0.001, 0.999, 500)[:, None]) > 0.99)
    True
    """
    from scipy.stats import kstest

    return torch.tensor([kstest(column, "uniform").pvalue for column in u.double().cpu().numpy().T])


def holm(p: Tensor) -> Tensor:
    r"""Return the Holm-adjusted p-values, [D]; the smallest tests the joint null hypothesis.

    Source: Holm (1979), *A Simple Sequentially Rejective Multiple Test Procedure*, Scand. J. Statistics 6.

    >>> holm(torch.tensor([0.01, 0.5, 0.04]))
    tensor([0.0300, 0.5000, 0.0800])
    """
    order = p.argsort()
    factors = torch.arange(len(p), 0, -1, dtype=p.dtype)
    adjusted = (p[order] * factors).cummax(0).values.clamp(max=1)
    return torch.empty_like(p).scatter(0, order, adjusted)


def pareto_smooth(log_w: Tensor) -> tuple[Tensor, Tensor]:
    r"""Smooth the largest importance weights by a Pareto tail (PSIS); return log-weights [K, B] and k-hat [B].

    Arguments:
        log_w: log weights [K, B], at least 30 draws. The log-weights returned are normalized over each row's draws.

    The tail's weights become the expected order statistics of the generalized Pareto distribution fitted to them, none
    above the largest weight. A row whose k-hat is not finite keeps its weights; one without any weight gets equal ones.

    Source: as `k_hat`.

    >>> log_weights, k = pareto_smooth(torch.randn(1000, 2, generator=torch.Generator().manual_seed(0)))
    >>> log_weights.exp().sum(0)
    tensor([1.0000, 1.0000])
    >>> bool((k < 0.7).all())
    True
    """
    from arviz_stats.base import array_stats

    K, M = len(log_w), tail_length(len(log_w))
    top, where = log_w.topk(M + 1, 0)
    k, smooth = k_hat_of_tail(top, K).to(log_w), log_w.clone()
    places = (torch.arange(M, 0, -1, dtype=torch.double) - 0.5) / M
    for row in k.isfinite().nonzero().flatten().tolist():
        tail = (top[:, row].double() - top[0, row]).exp().cpu()
        shape, scale = array_stats._gpdfit((tail[:-1] - tail[-1]).flip(0).numpy())
        values = tail[-1] + float(scale) * torch.special.expm1(-float(shape) * torch.log1p(-places)) / float(shape)
        smooth[where[:-1, row], row] = (values.clamp(max=1).log() + top[0, row].cpu()).to(smooth)
    return smooth.log_softmax(0).nan_to_num(nan=-math.log(K)), k.nan_to_num(nan=torch.inf)
