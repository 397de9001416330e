"""Mixtures of diagonal Gaussians: one that is fast to score, and one with reparametrized draws."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints
from torch.nn.functional import pad
from torch.special import ndtri


def well_spread(count: int, dim: int) -> Tensor:
    """Return quasi-random points [count, dim] of a standard normal (scrambled Sobol), the same at every call."""
    points = torch.quasirandom.SobolEngine(dim, scramble=True, seed=0).draw(count, dtype=torch.float64)
    return ndtri(points.clamp(1e-6, 1 - 1e-6)).to(torch.get_default_dtype())


def _normal_cdf(t: Tensor) -> Tensor:
    """Compute the standard normal CDF, precise in the lower tail, where torch's ``ndtr`` rounds to 0."""
    return torch.erfc(-t * math.sqrt(0.5)) / 2


class DiagonalMixture(dist.TorchDistribution):
    r"""Mixture of diagonal Gaussians, :math:`p(z) = \sum_c \pi_c \prod_d N(z_d; \mu_{cd}, \sigma_{cd}^2)`.

    Arguments:
        logits: log of the weights pi up to a constant, [..., C].
        means: mu, [..., C, D].
        scales: sigma, [..., C, D].
        batch_shape: of the distribution; that of the arguments, [...], unless given.

    >>> DiagonalMixture(torch.zeros(4), torch.zeros(4, 2), torch.ones(4, 2)).expand([3]).sample((5,)).shape
    torch.Size([5, 3, 2])
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    support = constraints.real_vector
    has_rsample = False

    def __init__(self, logits: Tensor, means: Tensor, scales: Tensor, batch_shape: torch.Size | None = None) -> None:
        self.log_weights, self.means, self.scales = logits.log_softmax(-1), means, scales
        if batch_shape is None:
            batch_shape = torch.broadcast_shapes(logits.shape[:-1], means.shape[:-2], scales.shape[:-2])
        super().__init__(batch_shape, means.shape[-1:])

    def expand(self, batch_shape: Sequence[int], _instance: object = None) -> DiagonalMixture:
        return type(self)(self.log_weights, self.means, self.scales, torch.Size(batch_shape))

    @property
    def mean(self) -> Tensor:
        return (self.log_weights.exp().unsqueeze(-1) * self.means).sum(-2).expand(self.batch_shape + self.event_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        if self.means.dim() == 2:
            squares = self._shared_squares(value)
        else:
            squares = ((value.unsqueeze(-2) - self.means) / self.scales).square().sum(-1)
        log_norm = self.scales.log().sum(-1) + self.event_shape[0] * math.log(2 * math.pi) / 2
        log_p = (self.log_weights - log_norm - squares / 2).logsumexp(-1)
        return log_p.expand(torch.broadcast_shapes(log_p.shape, self.batch_shape))

    def _shared_squares(self, z: Tensor) -> Tensor:
        # The square expanded into one matrix product, so that no [..., C, D] tensor is made. Its terms cancel
        # when the scales are small, hence double precision.
        precision, wide = self.scales.double() ** -2, z.double()
        weighted = self.means * precision
        terms = torch.cat([wide.square(), wide], -1) @ torch.cat([precision, -2 * weighted], -1).mT
        return (terms + (self.means * weighted).sum(-1)).to(z.dtype)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        with torch.no_grad():
            which = dist.Categorical(logits=self.log_weights).expand(self.batch_shape).sample(torch.Size(sample_shape))
            index = which[..., None, None].expand(*which.shape, 1, *self.event_shape)
            mean, scale = (
                x.expand(*which.shape, *x.shape[-2:]).gather(-2, index).squeeze(-2) for x in (self.means, self.scales)
            )
            return torch.normal(mean, scale)


class ReparametrizedMixture(DiagonalMixture):
    r"""Mixture of diagonal Gaussians with reparametrized draws z: their first and second derivatives are right.

    The conditional distribution functions :math:`F_d(z_d | z_{<d}; \lambda)` of a draw are uniform noise u that does
    not depend on lambda, so that z(lambda) solves F(z, lambda) = u. A draw starts on the solution, where a chord
    step :math:`z - J^{-1} (F(z, \lambda) - u)` with J = dF/dz does not move it, but makes its derivatives right by
    one more order.

    Source: Figurnov, Mohamed, Mnih (2018), *Implicit Reparameterization Gradients*, arXiv:1805.08498.

    >>> means = torch.zeros(2, 3, requires_grad=True)
    >>> ReparametrizedMixture(torch.zeros(2), means, torch.ones(2, 3)).rsample().requires_grad
    True
    """

    has_rsample = True

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        z = self.sample(sample_shape)
        with torch.no_grad():
            t, weights, tails = self._conditionals(z)
            jacobian = self._jacobian(t, weights, tails)
        for _ in range(2):
            _, weights, tails = self._conditionals(z)
            levels = (weights * tails).sum(-2)
            step = torch.linalg.solve_triangular(jacobian, (levels - levels.detach()).unsqueeze(-1), upper=False)
            z = z - step.squeeze(-1)
        return z

    def _conditionals(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return standardized z, the components' weights given z_<d, and their CDFs at z_d, [..., C, D]."""
        t = (z.unsqueeze(-2) - self.means) / self.scales
        log_p = -t.square() / 2 - self.scales.log()
        before = pad(log_p.cumsum(-1)[..., :-1], (1, 0))
        weights = (self.log_weights.unsqueeze(-1) + before).softmax(-2)
        # Beyond the median F - 1 takes the place of F: near 1 the weights' derivatives would be lost in rounding.
        with torch.no_grad():
            beyond = (weights * _normal_cdf(t)).sum(-2, keepdim=True) > 0.5
        side = 1 - 2 * beyond.to(t.dtype)
        return t, weights, side * _normal_cdf(side * t)

    def _jacobian(self, t: Tensor, weights: Tensor, tails: Tensor) -> Tensor:
        """Return dF_d / dz_j [..., D, D], lower triangular."""
        density = (weights * (-t.square() / 2).exp() / self.scales).sum(-2) / math.sqrt(2 * math.pi)
        centred = weights * (tails - (weights * tails).sum(-2, keepdim=True))
        below = (centred.mT @ (-t / self.scales)).tril(-1)
        return below + density.clamp(min=torch.finfo(t.dtype).tiny).diag_embed()
