"""Latent usage: active units, mutual information, and the aggregate posterior against the prior."""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from pvae.distributions.masked_likelihood import entry_log_prob
from pvae.errors import Incompatible, UserError, check_range
from pvae.inference.batching import ROWS, inference_mode
from pvae.inference.guides import Guide
from pvae.runtime.pyro_params import Program
from pvae.samplers.log_joint import LogJoint
from pvae.stats import Estimate, holm

AGGREGATE, CODES = 2000, 1000  # the most rows of the aggregate posterior, and of its draws for tests and figures
PAIRS = 65536  # draws times rows whose densities are computed together
MOMENTS = 100  # draws for moments that a family does not state
ACTIVE, FAR = 0.01, 0.99

_distances = partial(torch.cdist, compute_mode="donot_use_mm_for_euclid_dist")


@dataclass(frozen=True)
class LatentUsage:
    r"""Latent usage; u are the D unconstrained coordinates of the latents, q(u) is the aggregate posterior.

    A point mass has no KL and no information: these are NaN. A name with ``_se`` is a standard error.

    Attributes:
        kl: :math:`E_x KL(q(u_d|x) \| p(u_d))` of each dimension, [D] nats, with the normal of its mean and variance in
            place of q(u_d|x), exact for normal families; p(u_d) is exact where the prior is independent, else it is
            the normal of its draws' moments. Where dimensions depend on each other the sum misses the total.
        activity: :math:`\mathrm{Var}_x(E_q u_d)`, [D]: a unit is active where it exceeds 0.01.
        total_kl, marginal_kl: :math:`E_x KL(q(u|x) \| p(u))`, by draws, and its part :math:`KL(q(u) \| p(u))`.
        mutual_information: I(row; u) of the rows that make up q(u), at most 2000 of them, and so never above the
            logarithm of their number. See `saturated`.
        mmd, mmd_p: squared maximum mean discrepancy (MMD) of q(u) and p(u), unbiased, with entries in standard
            deviations and a Gaussian kernel as wide as the median distance, and its p-value by permutations.
        mmd_se: standard deviation of the MMD if the two were the same.
        ks, ks_p: Kolmogorov-Smirnov (KS) distance of q(u_d) and p(u_d), [D], and its Holm-adjusted p-value.
        holes: share of prior draws farther from every encoding than 99% of other rows' encodings are: about 0.01
            where there are none.
        codes, prior: draws of q(u), one per row and in the rows' order, and of p(u), [M, D] each, M at most 1000.
        means: :math:`E_q u`, [N, D].
    """

    kl: Tensor
    kl_se: Tensor
    activity: Tensor
    total_kl: Tensor
    total_kl_se: Tensor
    mutual_information: Tensor
    mutual_information_se: Tensor
    marginal_kl: Tensor
    marginal_kl_se: Tensor
    mmd: Tensor
    mmd_se: Tensor
    mmd_p: Tensor
    ks: Tensor
    ks_p: Tensor
    holes: Tensor
    holes_se: Tensor
    codes: Tensor
    prior: Tensor
    means: Tensor

    def active(self) -> int:
        """Return the number of active units (Burda et al. 2016)."""
        return int((self.activity > ACTIVE).sum())

    def saturated(self) -> bool:
        """Return whether the mutual information is within a nat of its bound, and would grow with more rows."""
        return bool(self.mutual_information > math.log(min(len(self.means), AGGREGATE)) - 1)

    def summary(self) -> dict[str, Estimate]:
        """Return the quantities of section "Latent usage"; p-values and distances have no standard error."""
        measured = ("total_kl", "mutual_information", "marginal_kl", "mmd", "holes")
        summary = {name: Estimate(getattr(self, name).item(), getattr(self, f"{name}_se").item()) for name in measured}
        # A variance of N values has a relative error of sqrt(2 / (N - 1)), which leaves units near the threshold open.
        error = self.activity * (2 / (len(self.means) - 1)) ** 0.5
        sure = Normal(0.0, 1.0).cdf((self.activity - ACTIVE) / error.clamp(min=1e-12))
        return summary | {
            "information_bound": Estimate(math.log(min(len(self.means), AGGREGATE)), math.nan),
            "active_units": Estimate(float(self.active()), (sure * (1 - sure)).sum().sqrt().item()),
            "mmd_p": Estimate(self.mmd_p.item(), math.nan),
            "ks_p": Estimate(self.ks_p.min().item(), math.nan),
            "ks_distance": Estimate(self.ks.max().item(), math.nan),
        }


def measure_latent_usage(
    model: Program,
    guide: Guide,
    x: Tensor,
    index: Tensor | None = None,
    *,
    draws: int = 20,
    permutations: int = 500,
    codes: Tensor | None = None,
    seed: int = 0,
) -> LatentUsage:
    r"""Measure active units, KL by dimension, mutual information, and the aggregate posterior against the prior.

    .. math:: E_x KL(q(u|x) \| p(u)) = I_q(x; u) + KL(q(u) \| p(u))

    Arguments:
        model, guide: a Pyro program and its approximate posterior.
        x, index: rows [N, ...], at least 2, and which training datapoints they are; None for new rows.
        draws, permutations: draws of each row's q for the total KL; permutations for the p-value of the MMD.
        codes: a draw of each row's posterior [N, D] by better means than q, see `pvae.posterior`, to compare their
            aggregate with the prior (MMD, KS, holes); q's own unless given.
        seed: of all noise; the random stream outside is left alone.

    Raises:
        UserError: fewer than 2 rows, or a number below 1.

    See also: `measure_latent_geometry`, in data space.

    Source: Burda, Grosse, Salakhutdinov (2016), arXiv:1509.00519 (active units); Hoffman and Johnson (2016), *ELBO
    Surgery*, NIPS workshop on approximate inference (the split of the KL); Gretton, Borgwardt, Rasch, Schoelkopf, Smola
    (2012), *A Kernel Two-Sample Test*, JMLR 13.
    """
    check_range(least=1, draws=draws, permutations=permutations)
    if len(x) < 2:
        raise UserError(f"latent usage compares rows with each other: {len(x)} is too few, give at least 2")
    with inference_mode(model, guide, seed=seed):
        target = LogJoint(model, x, index, guide.sites)
        rows = torch.randperm(len(x))[:AGGREGATE].to(x.device)
        aggregate = LogJoint(model, x[rows], None if index is None else index[rows], guide.sites)
        prior = aggregate.prior(1)[0]
        fitted = Normal(prior.mean(0), prior.std(0))
        parts = (target.rows(slice(start, start + ROWS)) for start in range(0, len(x), ROWS))
        batches = zip(*(_encode(guide, part, fitted, draws) for part in parts), strict=True)
        encoded = _Encoded(*map(torch.cat, batches))
        q_params = encoded.q_params[rows]
        own_codes = guide.family(q_params).sample()
        values = _average(encoded) | _information(guide, aggregate, q_params, own_codes)
        codes = own_codes if codes is None else codes.to(own_codes)[rows]
        scale = torch.cat([codes, prior]).std(0).clamp(min=1e-12)
        one, two = codes / scale, prior / scale
        values |= _discrepancy(one[:CODES], two[:CODES], permutations) | _by_dimension(one, two) | _holes(one, two)
    codes = codes[:CODES][rows[:CODES].argsort()]  # in the rows' order again, so that labels go with codes
    return LatentUsage(**values, codes=codes, prior=prior[:CODES], means=encoded.means)


class _Encoded(NamedTuple):
    """Encoded rows: q_params [N, P], means of q [N, D], variance of their noise, KL by dimension, and total KL [N]."""

    q_params: Tensor
    means: Tensor
    noise: Tensor
    kl: Tensor
    total: Tensor


def _encode(guide: Guide, target: LogJoint, fitted: Normal, draws: int) -> _Encoded:
    q_params = guide.params(target.x, target.index)
    q = guide.family(q_params)
    u = q.sample((draws,))
    if guide.family.point_mass:
        unknown = torch.full_like(u[0], torch.nan)
        return _Encoded(q_params, u[0], torch.zeros_like(u[0]), unknown, unknown[:, 0])
    mean, variance, noise = _moments(q)
    kl = _kl_by_dimension(Normal(mean, variance.sqrt()), u, _prior_of(target), fitted)
    return _Encoded(q_params, mean, noise, kl, (q.log_prob(u) - target.log_lik_and_prior(u)[1]).mean(0))


def _moments(q: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean and variance of q, and the variance of the mean's noise where it is that of draws, [B, D] each."""
    with suppress(NotImplementedError):
        return q.mean, q.variance, torch.zeros_like(q.mean)
    u = q.sample((MOMENTS,))
    return u.mean(0), u.var(0), u.var(0) / MOMENTS


def _prior_of(target: LogJoint) -> Any:
    """Return the model's p(u) if u is a single unconstrained site, else None."""
    sites = target.latents.sites
    if len(sites) > 1 or not sites[0].is_real_vector:
        return None
    return poutine.trace(target.model).get_trace(target.x, target.index).nodes[sites[0].name]["fn"]


def _kl_by_dimension(q: Normal, u: Tensor, prior: Any, fitted: Normal) -> Tensor:
    """Return KL(q(u_d|x) || p(u_d)), [B, D]: in closed form for normals, by draws u for other independent priors."""
    base = getattr(prior, "base_dist", None)
    if isinstance(base, Normal):
        return kl_divergence(q, Normal(base.loc, base.scale)).expand_as(q.loc)
    if prior is not None:
        with suppress(Incompatible):
            return (q.log_prob(u) - entry_log_prob(prior, u)).mean(0)
    return kl_divergence(q, fitted)


def _average(encoded: _Encoded) -> dict[str, Tensor]:
    roots = len(encoded.means) ** 0.5
    return {
        "kl": encoded.kl.mean(0),
        "kl_se": encoded.kl.std(0) / roots,
        "activity": (encoded.means.var(0) - encoded.noise.mean(0)).clamp(min=0),
        "total_kl": encoded.total.mean(),
        "total_kl_se": encoded.total.std() / roots,
    }


def _information(guide: Guide, target: LogJoint, q_params: Tensor, codes: Tensor) -> dict[str, Tensor]:
    r"""Return I(x; u), the mean of :math:`\log q(u|x) - \log q(u)`, and KL(q(u) || p(u)), by codes u of q(u)."""
    names = ("mutual_information", "marginal_kl")
    if guide.family.point_mass:
        return dict.fromkeys([*names, *(f"{name}_se" for name in names)], codes.new_tensor(torch.nan))
    u = codes[:CODES]
    log_aggregate = torch.full_like(u[:, 0], -torch.inf)
    for part in q_params.split(max(1, PAIRS // len(u))):
        pairs = u.unsqueeze(1).expand(-1, len(part), -1)
        log_aggregate = torch.logaddexp(log_aggregate, guide.family(part).log_prob(pairs).logsumexp(1))
    log_aggregate = log_aggregate - math.log(len(q_params))
    log_q = guide.family(q_params[:CODES]).log_prob(u)
    log_prior = target.rows(slice(CODES)).log_lik_and_prior(u.unsqueeze(0))[1][0]
    terms = dict(zip(names, (log_q - log_aggregate, log_aggregate - log_prior), strict=True))
    errors = {f"{name}_se": term.std() / len(term) ** 0.5 for name, term in terms.items()}
    return errors | {name: term.mean() for name, term in terms.items()}


def _discrepancy(one: Tensor, two: Tensor, permutations: int) -> dict[str, Tensor]:
    """Compute the unbiased squared MMD of two samples, and its p-value by permutations of their union."""
    both, n = torch.cat([one, two]).double(), len(one)
    squares = _distances(both, both).square_()
    kernel = (-squares / (2 * squares[~torch.eye(len(both), dtype=torch.bool, device=both.device)].median())).exp_()
    kernel.fill_diagonal_(0)
    first = torch.zeros(len(both), permutations + 1, dtype=both.dtype, device=both.device)
    first[:n, 0] = 1
    for column in range(1, permutations + 1):
        first[torch.randperm(len(both))[:n].to(both.device), column] = 1
    inside = kernel @ first
    within, across = (first * inside).sum(0), ((1 - first) * inside).sum(0)
    others, m = kernel.sum() - within - 2 * across, len(two)
    mmd = within / (n * (n - 1)) + others / (m * (m - 1)) - 2 * across / (n * m)
    value, permuted = mmd[0], mmd[1:]
    return {"mmd": value, "mmd_se": permuted.std(), "mmd_p": ((permuted >= value).sum() + 1) / (permutations + 1)}


def _by_dimension(one: Tensor, two: Tensor) -> dict[str, Tensor]:
    from scipy.stats import ks_2samp

    tests = ks_2samp(one.cpu().numpy(), two.cpu().numpy(), axis=0)
    return {"ks": torch.as_tensor(tests.statistic).to(one), "ks_p": holm(torch.as_tensor(tests.pvalue)).to(one)}


def _holes(codes: Tensor, prior: Tensor) -> dict[str, Tensor]:
    """Return the share of prior draws farther from one half of the codes than 99% of the other half are."""
    here, fresh = codes.tensor_split(2)
    among, away = (_distances(draws, here).amin(1) for draws in (fresh, prior))
    n, unsure = len(fresh), (FAR * (1 - FAR) / len(fresh)) ** 0.5
    # The value of rank r among n has r / (n + 1) below it on average.
    levels = ((among.new_tensor([FAR, FAR - unsure, FAR + unsure]) * (n + 1) - 1) / max(1, n - 1)).clamp(0, 1)
    share, high, low = (away > among.quantile(levels).unsqueeze(-1)).to(codes.dtype).mean(1)
    binomial = share * (1 - share) / len(prior)
    return {"holes": share, "holes_se": (binomial + ((high - low) / 2) ** 2).sqrt()}
