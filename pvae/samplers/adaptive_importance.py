r"""Adaptive importance sampling: a mixture of Student t distributions is fitted to each row's posterior by its draws.

Components start where particles end that are annealed from the prior, so that modes are met that no guide knows of.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pvae.inference.batching import draw_chunks
from pvae.runtime.torch_state import seeded
from pvae.runtime.tracing import AutoTraced
from pvae.samplers.gaussian_vi import fit_gaussian
from pvae.samplers.log_joint import LogJoint
from pvae.stats import effective_sample_size

# Share of the draws that come from the prior: no weight exceeds the largest likelihood over this share.
DEFENSIVE = 0.1
# Degrees of freedom beyond the dimensions: a t with few of them in many dimensions wastes most of its draws.
EXTRA_DF = 5
# Components that start as Gaussian fits, all components, rounds of those fits and of the adaptation.
FITTED, COMPONENTS, FIT_ROUNDS, ADAPT_ROUNDS = 4, 24, 6, 12
EDGE = 1e-12  # that uniform numbers keep from 0 and 1
ENOUGH = 0.5  # effective share of the draws of every row at which adaptation ends
HEAVY = 10  # times the mean: a largest weight beyond which its draw begins a component
START_SCALE = 0.1  # of a Gaussian fit, in standard deviations of the particles: small, so that modes stay apart


class StudentMixture(NamedTuple):
    """Mixture of M multivariate t distributions for each of B rows, in float64, of D + 5 degrees of freedom.

    Attributes:
        log_weights: of the components, [M, B].
        loc, scale_tril: locations [M, B, D] and Cholesky factors of their scales [M, B, D, D].
    """

    log_weights: Tensor
    loc: Tensor
    scale_tril: Tensor

    @property
    def df(self) -> int:
        return EXTRA_DF + self.loc.shape[-1]

    def sample(self, count: int) -> Tensor:
        """Draw u [count, B, D] by quasi-Monte Carlo: a Sobol sequence, scrambled, and shifted for each row.

        Source: Owen (1997), *Scrambled Net Variance for Integrals of Smooth Functions*, Annals of Statistics 25.
        """
        from scipy.special import gammaincinv

        _, B, D = self.loc.shape
        sequence = torch.quasirandom.SobolEngine(D + 2, scramble=True, seed=int(torch.randint(2**31, ())))
        shifted = sequence.draw(count, dtype=torch.double).unsqueeze(1) + torch.rand(B, D + 2, dtype=torch.double)
        uniform = (shifted % 1).clamp(EDGE, 1 - EDGE)
        gamma = torch.from_numpy(gammaincinv(self.df / 2, uniform[..., -1:].numpy())).to(self.loc)
        uniform, rows = uniform.to(self.loc), torch.arange(B, device=self.loc.device)
        which = (uniform[..., 0] > self.log_weights.exp().cumsum(0)[:-1].unsqueeze(1)).sum(0)
        step = (self.scale_tril[which, rows] @ torch.special.ndtri(uniform[..., 1:-1]).unsqueeze(-1)).squeeze(-1)
        return self.loc[which, rows] + step * (self.df / 2 / gamma).sqrt()

    def squared_distance(self, u: Tensor) -> Tensor:
        """Compute squared Mahalanobis distances of u [S, B, D] from the components, [M, S, B]."""
        inverse = torch.linalg.inv(self.scale_tril).transpose(0, 1)  # [B, M, D, D]
        centre = inverse @ self.loc.transpose(0, 1).unsqueeze(-1)
        scaled = (inverse.flatten(1, 2) @ u.permute(1, 2, 0)).unflatten(1, inverse.shape[1:3]).sub_(centre)
        return scaled.square_().sum(2).permute(1, 2, 0)

    def component_log_prob(self, squared_distance: Tensor) -> Tensor:
        """Compute log pi_m t_m(u) from squared distances, [M, S, B]."""
        D, df = self.loc.shape[-1], self.df
        constant = math.lgamma((df + D) / 2) - math.lgamma(df / 2) - D / 2 * math.log(df * math.pi)
        scaled = constant + self.log_weights - self.scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return scaled.unsqueeze(1) - (df + D) / 2 * torch.log1p(squared_distance / df)

    def rows(self, part: Tensor) -> StudentMixture:
        """Return the mixtures of some of the rows."""
        return StudentMixture(*(values[:, part] for values in self))

    def log_prob(self, u: Tensor) -> Tensor:
        """Compute log q(u) of u [S, B, D], [S, B]."""
        return self.component_log_prob(self.squared_distance(u)).logsumexp(0)


class Proposals(NamedTuple):
    """Draws u [K, B, D] of each row, and their log p(x, u) and log q(u), [K, B] each in nats and float64.

    Draws of a mixture have their `StudentMixture.squared_distance` with them.
    """

    u: Tensor
    log_joint: Tensor
    log_q: Tensor
    squared_distance: Tensor = torch.empty(0)

    @property
    def log_w(self) -> Tensor:
        """Log importance weights, [K, B]; -inf for draws that can't be scored."""
        log_w = self.log_joint - self.log_q
        return torch.where(log_w.isfinite(), log_w, -torch.inf)


class JointDensity:
    """log p(x|u) and log p(u) of draws u [S, B, D] in passes of the usual size, [S, B] each in nats and float64."""

    def __init__(self, target: LogJoint) -> None:
        self.target, self.traced = target, AutoTraced(target.log_lik_and_prior)

    def __call__(self, u: Tensor) -> tuple[Tensor, Tensor]:
        u = u.to(self.target.x)
        parts = [self.traced(u[part]) for part in draw_chunks(len(u), u.shape[1])]
        log_lik, log_prior = (torch.cat(values).double() for values in zip(*parts, strict=True))
        return log_lik, log_prior


def draw_defensively(density: JointDensity, mixture: StudentMixture, count: int) -> Proposals:
    """Draw from a mixture and, for a tenth of the draws, from the prior (Hesterberg 1995); q is both together."""
    from_prior = max(1, round(DEFENSIVE * count))
    u = torch.cat([density.target.prior(from_prior).double(), mixture.sample(count - from_prior)])
    log_lik, log_prior = density(u)
    distance = mixture.squared_distance(u)
    of_mixture = mixture.component_log_prob(distance).logsumexp(0)
    parts = [log_prior + math.log(from_prior / count), of_mixture + math.log1p(-from_prior / count)]
    return Proposals(u, log_lik + log_prior, torch.stack(parts).logsumexp(0), distance)


@torch.no_grad()
def fit_mixture(
    density: JointDensity, mixture: StudentMixture, *, draws: int = 2000, rounds: int = ADAPT_ROUNDS, seed: int = 0
) -> StudentMixture:
    r"""Fit a mixture of t distributions to each row's posterior by rounds of importance sampling.

    .. math:: \pi_m \leftarrow \sum_k \bar w_k \rho_{mk}, \quad
              \mu_m \leftarrow \frac{\sum_k \bar w_k \rho_{mk} \gamma_{mk} u_k}{\sum_k \bar w_k \rho_{mk} \gamma_{mk}},
              \quad \Sigma_m \leftarrow \frac1{\pi_m} \sum_k \bar w_k \rho_{mk} \gamma_{mk} (u_k - \mu_m)(u_k - \mu_m)^T

    with responsibilities rho and the t's factors gamma: steps of expectation maximization towards KL(p || q).

    Arguments:
        density: log p(x|u) and log p(u) of the rows.
        mixture: the first proposal, see `initial_mixture`.
        draws: of each round and row; those of many dimensions need more.
        rounds: the most of adaptation, which ends when half of every row's draws are effective.
        seed: of all noise; the random stream outside is left alone.

    The largest weights of a round are cut to the least of its sqrt(draws) largest, lest one draw takes all. A component
    moves by as much as it has draws for the D (D + 1) / 2 numbers of its scale. Where one weight is heavy, the lightest
    component moves to its draw.

    Source: Cappe, Douc, Guillin, Marin, Robert (2008), *Adaptive importance sampling in general mixture classes*,
    Statistics and Computing 18; Koblents, Miguez (2015), *A population Monte Carlo scheme with transformed weights*,
    Statistics and Computing 25.
    """
    with seeded(seed):
        for _ in range(rounds):
            proposals = draw_defensively(density, mixture, draws)
            if (effective_sample_size(proposals.log_w) > ENOUGH * draws).all():
                break
            mixture = _adapt(mixture, proposals)
    return mixture


@torch.no_grad()
def initial_mixture(
    target: LogJoint, particles: Tensor, log_w: Tensor, starts: Tensor, *, seed: int = 0
) -> StudentMixture:
    """Return a mixture of Gaussian fits, from starts and some particles, and of the same scales around more particles.

    Arguments:
        target: log joint density of the rows.
        particles, log_w: positions [C, B, D] and their log-weights [C, B], see `anneal`.
        starts: further positions [S, B, D], such as a guide's means.
        seed: of all noise; the random stream outside is left alone.
    """
    with seeded(seed):
        return _initial_mixture(target, particles.double(), log_w.double(), starts.double(), seed)


def _initial_mixture(target: LogJoint, particles: Tensor, log_w: Tensor, starts: Tensor, seed: int) -> StudentMixture:
    C, B, D = particles.shape
    gumbel = -torch.empty_like(log_w).exponential_().log()  # by the square roots of the weights, so that modes count
    order = (log_w.nan_to_num(nan=-torch.inf) / 2 + gumbel).topk(min(COMPONENTS - FITTED, C), 0).indices
    particles, spread = particles.gather(0, order.unsqueeze(-1).expand(-1, -1, D)), particles.std(0).clamp(min=1e-6)
    at = torch.cat([starts, particles[:FITTED]])
    rows, log_scale = torch.arange(B, device=at.device).repeat(len(at)), (START_SCALE * spread).log()
    first = (at.flatten(0, 1).to(target.x), log_scale.repeat(len(at), 1).to(target.x))
    mean, covariance = fit_gaussian(target.rows(rows), *first, rounds=FIT_ROUNDS, seed=seed + 1)
    root = torch.linalg.cholesky(covariance).view(len(at), B, D, D)
    nearest = torch.cdist((particles / spread).transpose(0, 1), (at / spread).transpose(0, 1)).argmin(-1).T
    loc = torch.cat([mean.view(at.shape), particles])
    root = torch.cat([root, root[nearest, rows[:B]]])
    return StudentMixture(loc.new_full(loc.shape[:2], -math.log(len(loc))), loc, root)


def _adapt(mixture: StudentMixture, proposals: Proposals) -> StudentMixture:
    u, log_w, D = proposals.u, proposals.log_w, proposals.u.shape[-1]
    cut = log_w.topk(max(2, math.isqrt(len(u))), 0).values[-1]
    weights = torch.minimum(log_w, cut).softmax(0).nan_to_num(1 / len(u))  # a row without any weight
    distance = proposals.squared_distance
    log_prob = mixture.component_log_prob(distance)
    share = log_prob.softmax(0) * weights
    mass, scaled = share.sum(1), share * (mixture.df + D) / (mixture.df + distance)
    # Sums of products over draws around the row's mean, as matrix products.
    centre, scaled = (weights.unsqueeze(-1) * u).sum(0), scaled.permute(2, 0, 1)
    off = (u - centre).transpose(0, 1)
    zeroth = scaled.sum(-1, keepdim=True)
    first, second = scaled @ off, scaled @ (off.unsqueeze(-1) * off.unsqueeze(-2)).flatten(-2)
    loc = (mixture.loc - centre).transpose(0, 1)
    count = mass.T / (weights**2).sum(0).unsqueeze(-1)
    moved = (count / (count + D * (D + 1) / 2)).unsqueeze(-1)
    loc = torch.lerp(loc, first / zeroth.clamp(min=1e-300), moved)
    cross = first.unsqueeze(-1) * loc.unsqueeze(-2)
    square = (
        second.unflatten(-1, (D, D)) - cross - cross.mT + zeroth.unsqueeze(-1) * loc.unsqueeze(-1) * loc.unsqueeze(-2)
    )
    covariance = (square / mass.T.clamp(min=1e-300)[..., None, None]).transpose(0, 1)
    before, moved = mixture.scale_tril @ mixture.scale_tril.mT, moved.transpose(0, 1).unsqueeze(-1)
    root, failed = torch.linalg.cholesky_ex(torch.lerp(before, covariance, moved))
    weight = mass + 1e-3 / len(mass)  # none vanishes for good
    root = root.where((failed == 0)[..., None, None], mixture.scale_tril)
    after = StudentMixture((weight / weight.sum(0)).log(), loc.transpose(0, 1) + centre, root)
    return _move_lightest(after, proposals, log_prob)


def _move_lightest(mixture: StudentMixture, proposals: Proposals, log_prob: Tensor) -> StudentMixture:
    """Move each row's lightest component to the draw of largest weight if that is heavy, with its nearest one's scale.

    Source: Raftery, Bao (2010), *Estimating and Projecting Trends in HIV/AIDS* (incremental mixture importance
    sampling), Biometrics 66.
    """
    M, B, _ = mixture.loc.shape
    rows, (share, draw) = torch.arange(B, device=proposals.u.device), proposals.log_w.softmax(0).max(0)
    nearest, heavy = log_prob[:, draw, rows].argmax(0), share > HEAVY / len(proposals.u)
    lightest, rows = mixture.log_weights.argmin(0)[heavy], rows[heavy]
    log_weights, loc, root = (values.clone() for values in mixture)
    loc[lightest, rows], root[lightest, rows] = proposals.u[draw[heavy], rows], mixture.scale_tril[nearest[heavy], rows]
    log_weights[lightest, rows] = math.log(0.5 / M)
    return StudentMixture(log_weights.log_softmax(0), loc, root)
