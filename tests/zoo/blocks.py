"""Blocks of latents with exact posteriors: linear-Gaussian in closed form, others by quadrature over one coordinate."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import biject_to

from .search import maximize

Likelihood = Callable[[Tensor, Any], Any]
LOG_2PI = math.log(2 * math.pi)


class Normals(NamedTuple):
    """Gaussians of B rows: mean [B, D], and root [B, D, D], the lower triangular factor of the covariance."""

    mean: Tensor
    root: Tensor

    @property
    def covariance(self) -> Tensor:
        return self.root @ self.root.mT

    @property
    def sd(self) -> Tensor:
        return self.root.square().sum(-1).sqrt()

    @property
    def entropy(self) -> Tensor:
        r""":math:`\frac D2 \log 2 \pi e + \log |L|`, [B] nats."""
        return self.mean.shape[-1] / 2 * (LOG_2PI + 1) + self.root.diagonal(dim1=-2, dim2=-1).log().sum(-1)


def gaussian(likelihood_mean: Tensor, scale: Any) -> Any:
    """Return N(mean, scale^2) for each column."""
    return dist.Normal(likelihood_mean, scale, validate_args=False)


@dataclass
class Linear:
    r"""Linear-Gaussian block, :math:`z \sim N(0, I_D)`, :math:`x \sim N(W z, s^2 I_M)`; its posterior is Gaussian.

    Arguments:
        weight: W, [M, D] float64.
        scale: s.
    """

    weight: Tensor
    scale: float
    split = None

    def __post_init__(self) -> None:
        self.columns, self.dim = self.weight.shape
        self.precision = torch.eye(self.dim).double() + self.weight.T @ self.weight / self.scale**2
        # From the inverse's own Cholesky factor, which is accurate for condition numbers of 1e4 and more.
        self.root = torch.linalg.cholesky(torch.linalg.inv(self.precision))

    def program(self, name: str) -> Tensor:
        """Draw the block's latents inside plate "data" and return the means of its columns."""
        z = pyro.sample(name, dist.Normal(0.0, 1.0).expand([self.dim]).to_event(1))
        return z @ self.weight.T.to(z.dtype)

    def log_joint(self, u: Tensor, x: Tensor) -> Tensor:
        """log p(x, u), [..., B], at u [..., B, D]."""
        residual = (x - u @ self.weight.T) / self.scale
        constant = (self.dim + self.columns) * LOG_2PI / 2 + self.columns * math.log(self.scale)
        return -(u.square().sum(-1) + residual.square().sum(-1)) / 2 - constant

    def posterior(self, x: Tensor) -> Normals:
        r""":math:`N(L^{-1} W^T x / s^2, L^{-1})` with :math:`L = I + W^T W / s^2`."""
        mean = x @ self.weight @ self.root @ self.root.T / self.scale**2
        return Normals(mean, self.root.expand(len(x), -1, -1))

    def evidence(self, x: Tensor) -> Tensor:
        """log p(x) = log p(x, m) - log p(m|x) at the posterior mean m, [B]."""
        q = self.posterior(x)
        return self.log_joint(q.mean, x) + self.dim / 2 * LOG_2PI + q.root.diagonal(dim1=-2, dim2=-1).log().sum(-1)

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Posterior mean [B, D] and covariance [B, D, D]."""
        q = self.posterior(x)
        return q.mean, q.covariance

    def side(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Moments of the only mode."""
        return self.moments(x)

    def sample(self, x: Tensor, S: int) -> Tensor:
        """Exact posterior draws, [S, B, D], by the random stream outside."""
        q = self.posterior(x)
        return q.mean + (q.root @ torch.randn(S, *q.mean.shape, 1, dtype=torch.double)).squeeze(-1)

    def expected(self, mean: Tensor, covariance: Tensor, x: Tensor, nodes: int = 2001) -> Tensor:
        """E[log p(x, u)] under Gaussians, [B]: at the mean, less half the trace of L times the covariance."""
        return self.log_joint(mean, x) - (self.precision * covariance).sum((-2, -1)) / 2

    def best(self, diagonal: bool, x: Tensor) -> Normals:
        r"""Gaussians of the largest ELBO: the posterior, or its mean and :math:`\sigma_i^2 = 1 / L_{ii}`."""
        q = self.posterior(x)
        return Normals(q.mean, self.precision.diag().rsqrt().diag().expand_as(q.root)) if diagonal else q


class Grid(NamedTuple):
    """Quadrature over the coordinate t of B rows: G nodes that span all within 45 nats of the peak.

    Attributes:
        t, log_p: nodes, and log p(x, t) times their weights, [G, B].
        evidence: log p(x) by the trapezoid rule, [B].
        cdf: distribution function at the ends of the cells, [B, G - 1].
    """

    t: Tensor
    log_p: Tensor
    evidence: Tensor
    cdf: Tensor

    def take(self, rows: Tensor) -> Grid:
        return Grid(self.t[:, rows], self.log_p[:, rows], self.evidence[rows], self.cdf[rows].contiguous())


@dataclass
class Hard:
    r"""Block ruled by one coordinate t that is integrated out on a grid; a second one, w, is Gaussian given t.

    .. math:: t \sim p(t),\; x_t \sim p(x | \mathrm{locate}(t)),\;
        w \sim N(0, r(t)^2),\; x_w \sim N(w + g(t), s_w^2),\; u = R (T^{-1}(t), w)

    Arguments:
        prior: p(t), a scalar distribution, maybe constrained; T is the transform from the reals to its support.
        likelihood: p(x | location, scale) of a column, the same for all blocks of a program.
        locate: maps t [...] to locations of its columns [..., C]; none if t has no columns of its own.
        scale: of these columns.
        spread, bend, w_scale: r, g and s_w of a second coordinate w, observed in a last column; none unless spread.
        turned: u is (t, w) turned by 45 degrees: two exchangeable latents, of which t is the difference.
        split: of t, between the modes.
        reach, sinh: the grid runs from -reach to reach in u, or in arsinh u, for heavy tails.
        search_nodes: of expectations while the best Gaussians are searched; their ELBO has 2001.
    """

    prior: Any
    likelihood: Likelihood = gaussian
    locate: Callable[[Tensor], Tensor] | None = None
    scale: float = 1.0
    spread: Callable[[Tensor], Tensor] | None = None
    bend: Callable[[Tensor], Tensor] = torch.zeros_like
    w_scale: float = 1.0
    turned: bool = False
    split: float | None = None
    reach: float = 9.0
    sinh: bool = False
    search_nodes: int = 73

    def __post_init__(self) -> None:
        self.dim = 1 if self.spread is None else 2
        self.t_columns = 0 if self.locate is None else self.locate(torch.ones(())).shape[-1]
        self.columns = self.t_columns + self.dim - 1
        self.transform = biject_to(self.prior.support)
        cos = math.sqrt(0.5)
        turn = [[cos, -cos], [cos, cos]] if self.turned else [[1.0, 0.0], [0.0, 1.0]]
        self.grids: dict[bytes, Grid] = {}
        self.turn = torch.tensor(turn).double()[: self.dim, : self.dim]  # v = u @ turn, v = (t, w)

    def program(self, name: str) -> Tensor:
        """Draw the block's latents inside plate "data" and return the locations of its columns."""
        if self.turned:
            u = pyro.sample(name, dist.Normal(0.0, 1.0).expand([2]).to_event(1))
            t, w = (u @ self.turn.to(u.dtype)).unbind(-1)
        else:
            t = pyro.sample(name, self.prior.expand([1]).to_event(1)).squeeze(-1)
            if self.spread:
                w = pyro.sample(f"{name}_w", gaussian(t.new_zeros(()), self.spread(t).unsqueeze(-1)).to_event(1))
                w = w.squeeze(-1)
        places = [self.locate(t)] if self.locate else []
        return torch.cat([*places, (w + self.bend(t)).unsqueeze(-1)] if self.spread else places, -1)

    @property
    def scales(self) -> list[float]:
        """Of each column."""
        return [self.scale] * self.t_columns + [self.w_scale] * (self.dim - 1)

    def log_t(self, u: Tensor, x: Tensor) -> Tensor:
        """log p(x, t) with w integrated out, over the unconstrained t = T(u), [..., B]."""
        t = self.transform(u)
        log_p = self.prior.log_prob(t) + self.transform.log_abs_det_jacobian(u, t)
        if self.locate:
            columns = self.likelihood(self.locate(t), self.scale).log_prob(x[:, : self.t_columns])
            log_p = log_p + columns.sum(-1)
        if self.spread:
            sd = (self.spread(t) ** 2 + self.w_scale**2).sqrt()
            log_p = log_p + gaussian(self.bend(t), sd).log_prob(x[:, -1])
        return log_p

    def w_given(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of w given t and the row, [..., B]."""
        assert self.spread is not None
        variance = 1 / (self.spread(t) ** -2 + self.w_scale**-2)
        return variance * (x[:, -1] - self.bend(t)) / self.w_scale**2, variance

    def log_joint(self, u: Tensor, x: Tensor) -> Tensor:
        """log p(x, u), [..., B], at u [..., B, D]."""
        v = u @ self.turn
        log_p = self.log_t(v[..., 0], x)
        if self.spread:
            mean, variance = self.w_given(v[..., 0], x)
            log_p = log_p + gaussian(mean, variance.sqrt()).log_prob(v[..., 1])
        return log_p

    def grid(self, x: Tensor) -> Grid:
        """Return the quadrature of rows x [B, C]; that of the last few batches is remembered."""
        key = x.numpy().tobytes()
        if key not in self.grids:
            while len(self.grids) > 3:
                del self.grids[next(iter(self.grids))]
            few, copies = x.unique(dim=0, return_inverse=True)  # of discrete data
            self.grids[key] = self._grid(few).take(copies) if 2 * len(few) < len(x) else self._grid(x)
        return self.grids[key]

    @torch.no_grad()
    def _grid(self, x: Tensor) -> Grid:
        y = torch.linspace(-self.reach, self.reach, 1001, dtype=torch.double).unsqueeze(-1).expand(-1, len(x))
        step, log_p = y[1, 0] - y[0, 0], self._log_node(y, x)
        inside = log_p > log_p.amax(0) - 45
        low = y.where(inside, torch.inf).amin(0) - step
        high = y.where(inside, -torch.inf).amax(0) + step
        y = low + (high - low) * torch.linspace(0, 1, 1501, dtype=torch.double).unsqueeze(-1)
        log_p = self._log_node(y, x) + (y[1] - y[0]).log()
        mass = log_p.softmax(0).T
        cdf = ((mass[:, 1:] + mass[:, :-1]) / 2).cumsum(-1)
        return Grid(self._node(y), log_p, log_p.logsumexp(0), cdf / cdf[:, -1:])

    def _node(self, y: Tensor) -> Tensor:
        return y.sinh() if self.sinh else y

    def _log_node(self, y: Tensor, x: Tensor) -> Tensor:
        return self.log_t(self._node(y), x) + (y.cosh().log() if self.sinh else 0.0)

    def evidence(self, x: Tensor) -> Tensor:
        """log p(x) by the trapezoid rule, [B]."""
        return self.grid(x).evidence

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Posterior mean [B, D] and covariance [B, D, D]."""
        t, log_p, *_ = self.grid(x)
        return self._weighted(t, log_p, x)

    def side(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Moments of the larger mode alone."""
        t, log_p, *_ = self.grid(x)
        if self.split is None:
            return self._weighted(t, log_p, x)
        halves = [log_p.where(part, -torch.inf) for part in (t < self.split, t > self.split)]
        lower = halves[0].logsumexp(0) >= halves[1].logsumexp(0)
        return self._weighted(t, torch.where(lower, halves[0], halves[1]), x)

    def _weighted(self, t: Tensor, log_p: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Moments in u of the block with nodes of t so weighted."""
        weights = log_p.softmax(0)
        mean = (weights * t).sum(0)
        off = t - mean
        if not self.spread:
            return mean.unsqueeze(-1), (weights * off**2).sum(0)[:, None, None]
        w, variance = self.w_given(t, x)
        w_mean = (weights * w).sum(0)
        off_w = w - w_mean
        tt, tw, ww = ((weights * v).sum(0) for v in (off**2, off * off_w, off_w**2 + variance))
        covariance = torch.stack([tt, tw, tw, ww], -1).unflatten(-1, (2, 2))
        return torch.stack([mean, w_mean], -1) @ self.turn.T, self.turn @ covariance @ self.turn.T

    def sample(self, x: Tensor, S: int) -> Tensor:
        """Exact posterior draws, [S, B, D]: the grid's inverse CDF for t, then w given t."""
        nodes, _, _, cdf = self.grid(x)
        level = torch.rand(len(x), S, dtype=torch.double)
        cell = torch.searchsorted(cdf, level).clamp(max=cdf.shape[1] - 1)
        before = torch.where(cell > 0, cdf.gather(-1, (cell - 1).clamp(min=0)), 0.0)
        share = (level - before) / (cdf.gather(-1, cell) - before).clamp(min=1e-300)
        left, right = (nodes.gather(0, (cell + after).T) for after in (0, 1))
        t = left + share.clamp(0, 1).T * (right - left)
        if not self.spread:
            return t.unsqueeze(-1)
        mean, variance = self.w_given(t, x)
        return torch.stack([t, mean + variance.sqrt() * torch.randn_like(t)], -1) @ self.turn.T

    def expected(self, mean: Tensor, covariance: Tensor, x: Tensor, nodes: int = 2001) -> Tensor:
        """E[log p(x, u)] under Gaussians, [B]: w in closed form, t by the trapezoid rule."""
        mean, covariance = mean @ self.turn, self.turn.T @ covariance @ self.turn
        e = torch.linspace(-9, 9, nodes, dtype=torch.double)
        weights = (-e.square() / 2).softmax(0).unsqueeze(-1)
        e, variance = e.unsqueeze(-1), covariance[..., 0, 0]
        t = mean[..., 0] + variance.sqrt() * e
        log_p = self.log_t(t, x)
        if self.spread:
            slope = covariance[..., 0, 1] / variance
            rest = covariance[..., 1, 1] - slope**2 * variance
            w, w_variance = self.w_given(t, x)
            off = mean[..., 1] + slope * variance.sqrt() * e - w
            log_p = log_p - ((off**2 + rest) / w_variance + w_variance.log() + LOG_2PI) / 2
        return (weights * log_p).sum(0)

    def best(self, diagonal: bool, x: Tensor) -> Normals:
        """Gaussians of the largest ELBO, by BFGS from the moments of all, of either side, and of the peak."""
        x, copies = x.unique(dim=0, return_inverse=True)
        t, log_p, *_ = self.grid(x)
        middle = t.gather(0, (log_p.softmax(0).cumsum(0) < 0.5).sum(0, keepdim=True).clamp(max=len(t) - 1))
        cut = middle if self.split is None else torch.full_like(middle, self.split)
        parts = [log_p, log_p.where(t < cut, -torch.inf), log_p.where(t >= cut, -torch.inf), 5 * log_p]
        moments = [self._weighted(t, part, x) for part in parts]
        start = Normals(torch.cat([mean for mean, _ in moments]), torch.cat([_root(c) for _, c in moments]))
        rows = x.repeat(len(parts), 1)
        fit = _search(self, start, rows, diagonal)
        values = (self.expected(fit.mean, fit.covariance, rows, nodes=601) + fit.entropy).view(len(parts), -1)
        chosen = values.nan_to_num(nan=-torch.inf).argmax(0) * len(x) + torch.arange(len(x))
        return Normals(fit.mean[chosen][copies], fit.root[chosen][copies])


def _root(covariance: Tensor) -> Tensor:
    tiny = 1e-12 * torch.eye(covariance.shape[-1], dtype=torch.double)
    return torch.linalg.cholesky(
        covariance + tiny * (1 + covariance.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None])
    )


def _search(block: Hard, start: Normals, x: Tensor, diagonal: bool) -> Normals:
    """Maximize the ELBO from the starts, in units of their standard deviations."""
    scale, D = start.sd, block.dim

    def normals(p: Tensor) -> Normals:
        root = p[:, D : 2 * D].clamp(-12, 12).exp().diag_embed()
        if not diagonal and D == 2:
            root = root + torch.nn.functional.pad(p[:, 4, None, None], (0, 1, 1, 0))
        return Normals(start.mean + scale * p[:, :D], scale.unsqueeze(-1) * root)

    def elbo(p: Tensor) -> Tensor:
        q = normals(p)
        return block.expected(q.mean, q.covariance, x, nodes=block.search_nodes) + q.entropy

    relative = start.root / scale.unsqueeze(-1)
    log_diagonal = relative.diagonal(dim1=-2, dim2=-1).log() if not diagonal else torch.zeros_like(scale)
    below = relative[:, 1:, 0] if not diagonal and D == 2 else scale[:, :0]
    return normals(maximize(elbo, torch.cat([torch.zeros_like(scale), log_diagonal, below], -1)))
