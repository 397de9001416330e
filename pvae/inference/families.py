"""Variational families q(z; q_params); a guide supplies the variational parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pvae.distributions.flows import Flow, spline
from pvae.distributions.mixtures import ReparametrizedMixture, well_spread
from pvae.errors import check_range

__all__ = ["DiagonalNormal", "Delta", "LowRankNormal", "FullRankNormal", "MixtureOfNormals", "FlowFamily"]


def soft_clip(values: Tensor, limit: float = 10.0) -> Tensor:
    """Clip values softly to a limit either way, keeping 0.01 of the excess, so that exponentials stay finite.

    >>> soft_clip(torch.tensor([-110.0, 3.0, 80.0]))
    tensor([-11.0000,   3.0000,  10.7000])
    """
    return torch.lerp(values.clamp(-limit, limit), values, 0.01)


def positive_scale(log_scale: Tensor) -> Tensor:
    """Exponentiate log scales after `soft_clip`, which changes only those beyond -10 and 10."""
    return soft_clip(log_scale).exp()


class Family(nn.Module):
    """Base class of variational families. Calling one with q_params [..., P] returns q(z) over z [..., D].

    Attributes:
        num_params: P, the number of variational parameters of a datapoint.
        point_mass: q has no density, so that an ELBO under it bounds nothing.
        has_...: whether a subclass defines `natural_gradient`, `params_from_diagonal` and `params_from_gaussian`.
    """

    num_params: int
    point_mass: ClassVar[bool] = False
    has_natural_gradient: ClassVar[bool] = False
    has_diagonal_start: ClassVar[bool] = False
    has_gaussian_start: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.has_natural_gradient = cls.natural_gradient is not Family.natural_gradient
        cls.has_diagonal_start = cls.params_from_diagonal is not Family.params_from_diagonal
        cls.has_gaussian_start = cls.params_from_gaussian is not Family.params_from_gaussian

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def initial_params(self) -> Tensor:
        """Return the q_params [P] from which a datapoint's own fit starts."""
        return torch.zeros(self.num_params)

    def params_from_diagonal(self, mean: Tensor, log_scale: Tensor) -> Tensor:
        """Return q_params [..., P] near diagonal Gaussians of this mean and log scale [..., D]; else the initial."""
        return self.initial_params().to(mean).expand(*mean.shape[:-1], -1)

    def params_from_gaussian(self, mean: Tensor, covariance: Tensor) -> Tensor:
        """Return q_params [..., P] near Gaussians of this mean [..., D] and covariance [..., D, D]."""
        raise NotImplementedError

    def natural_gradient(self, q_params: Tensor, gradient: Tensor) -> Tensor:
        r"""Return the natural gradient :math:`F(\lambda)^{-1} g`, F the Fisher information of q; g if F is unknown."""
        return gradient


class _LocationScaleFamily(Family):
    """Families whose q_params begin with means and log scales, so that diagonal Gaussians replace these."""

    def params_from_diagonal(self, mean: Tensor, log_scale: Tensor) -> Tensor:
        others = self.initial_params()[2 * self.dim :].to(mean)
        return torch.cat([mean, log_scale, others.expand(*mean.shape[:-1], -1)], -1)


class DiagonalNormal(_LocationScaleFamily):
    r"""Diagonal Gaussian family (mean field), :math:`q(z|x) = \prod_d N(z_d; \mu_d, \sigma_d^2)`.

    Here D is ``dim``, P = 2 D and q_params = (mu, log sigma). Draws are reparametrized,
    :math:`z = \mu + \sigma \epsilon` with :math:`\epsilon \sim N(0, I)`.

    >>> q = DiagonalNormal(8)
    >>> q(q.initial_params()).sample((5,)).shape
    torch.Size([5, 8])
    """

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.num_params = 2 * dim

    def forward(self, q_params: Tensor) -> dist.TorchDistribution:
        mean, log_scale = q_params.chunk(2, -1)
        return dist.Normal(mean, positive_scale(log_scale)).to_event(1)

    def natural_gradient(self, q_params: Tensor, gradient: Tensor) -> Tensor:
        # F = diag(1 / sigma^2, 2)
        (by_mean, by_log_scale), (_, log_scale) = gradient.chunk(2, -1), q_params.chunk(2, -1)
        return torch.cat([by_mean * positive_scale(log_scale) ** 2, by_log_scale / 2], -1)


class Delta(Family):
    r"""Point mass, :math:`q(z|x) = \delta(z - \lambda)`, for maximum a posteriori (MAP) estimates and autoencoders.

    Here P = D = ``dim``. Its "ELBO" is log p(x, z) at the point, which does not bound the evidence; evaluation reports
    no gaps.

    >>> Delta(8)(torch.ones(3, 8)).sample().shape
    torch.Size([3, 8])
    """

    point_mass = True

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.num_params = dim

    def params_from_diagonal(self, mean: Tensor, log_scale: Tensor) -> Tensor:
        return mean

    def forward(self, q_params: Tensor) -> dist.TorchDistribution:
        return dist.Delta(q_params, event_dim=1)


class LowRankNormal(_LocationScaleFamily):
    r"""Low-rank Gaussian family, :math:`q(z|x) = N(z; \mu, \mathrm{diag}(s)^2 + W W^T)` with W = diag(s) V, V [D, R].

    Arguments:
        dim: D, the number of latent dimensions; P = D (2 + R), q_params = (mu, log s, V).
        rank: R, the number of directions in which z is correlated, at most D.

    Entries of V beyond 100 are clipped by `soft_clip`.

    Raises:
        UserError: a rank below 1.

    >>> q = LowRankNormal(8)
    >>> q(q.initial_params()).sample((5,)).shape
    torch.Size([5, 8])
    """

    def __init__(self, dim: int, *, rank: int = 2) -> None:
        super().__init__(dim)
        check_range("LowRankNormal", least=1, rank=rank)
        self.rank = min(rank, dim)
        self.num_params = dim * (2 + self.rank)

    def params_from_gaussian(self, mean: Tensor, covariance: Tensor) -> Tensor:
        # The best independent scales, and the directions in which the normal is wider than these.
        scale = torch.linalg.inv(covariance).diagonal(dim1=-2, dim2=-1).rsqrt()
        wider, directions = torch.linalg.eigh(covariance / scale.unsqueeze(-1) / scale.unsqueeze(-2))
        lengths = (wider[..., -self.rank :] - 1).clamp(min=0.01).sqrt()
        return torch.cat([mean, scale.log(), (directions[..., -self.rank :] * lengths.unsqueeze(-2)).flatten(-2)], -1)

    def forward(self, q_params: Tensor) -> dist.TorchDistribution:
        mean, log_scale, factor = q_params.split([self.dim, self.dim, self.dim * self.rank], -1)
        # V in units of s, so that I + V^T V, which is factorized, does not depend on the scales.
        scale, factor = positive_scale(log_scale), soft_clip(factor, 100.0).unflatten(-1, (self.dim, self.rank))
        return dist.LowRankMultivariateNormal(mean, scale.unsqueeze(-1) * factor, scale**2)

    def initial_params(self) -> Tensor:
        # V = 0 would be stationary: q is the same for V and -V.
        return torch.cat([torch.zeros(2 * self.dim), 0.1 * well_spread(self.dim, self.rank).flatten()])


class FullRankNormal(_LocationScaleFamily):
    r"""Full-rank Gaussian family, :math:`q(z|x) = N(z; \mu, L L^T)` with L lower triangular.

    Here D is ``dim``, P = D + D (D + 1) / 2 and q_params = (mu, log of L's diagonal, L below it).

    >>> q = FullRankNormal(8)
    >>> q(q.initial_params()).sample((5,)).shape
    torch.Size([5, 8])
    """

    below: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.num_params = dim + dim * (dim + 1) // 2
        self.register_buffer("below", torch.tril_indices(dim, dim, -1), persistent=False)

    def params_from_gaussian(self, mean: Tensor, covariance: Tensor) -> Tensor:
        factor, (rows, columns) = torch.linalg.cholesky(covariance), self.below
        return torch.cat([mean, factor.diagonal(dim1=-2, dim2=-1).log(), factor[..., rows, columns]], -1)

    def forward(self, q_params: Tensor) -> dist.TorchDistribution:
        return dist.MultivariateNormal(q_params[..., : self.dim], scale_tril=self._factor(q_params))

    def _factor(self, q_params: Tensor) -> Tensor:
        _, log_diagonal, lower = q_params.split([self.dim, self.dim, self.num_params - 2 * self.dim], -1)
        return self._triangle(positive_scale(log_diagonal), lower)

    def _triangle(self, diagonal: Tensor, lower: Tensor) -> Tensor:
        triangle = diagonal.diag_embed()
        rows, columns = self.below
        triangle[..., rows, columns] = lower
        return triangle

    def natural_gradient(self, q_params: Tensor, gradient: Tensor) -> Tensor:
        # In the mean F^-1 g = L L^T g; in L it is L Phi(L^T g), Phi the lower triangle with half the diagonal.
        factor = self._factor(q_params)
        diagonal = factor.diagonal(dim1=-2, dim2=-1)
        by_mean, by_log, by_lower = gradient.split([self.dim, self.dim, self.num_params - 2 * self.dim], -1)
        inner = (factor.mT @ self._triangle(by_log / diagonal, by_lower)).tril()
        inner = inner - inner.diagonal(dim1=-2, dim2=-1).diag_embed() / 2
        by_factor = factor @ inner
        by_mean = (factor @ (factor.mT @ by_mean.unsqueeze(-1))).squeeze(-1)
        rows, columns = self.below
        return torch.cat([by_mean, by_factor.diagonal(dim1=-2, dim2=-1) / diagonal, by_factor[..., rows, columns]], -1)


class MixtureOfNormals(Family):
    r"""Gaussian mixture family, :math:`q(z|x) = \sum_c \pi_c \prod_d N(z_d; \mu_{cd}, \sigma_{cd}^2)`.

    Arguments:
        dim: D, the number of latent dimensions; P = C (1 + 2 D), q_params = (log pi but for a constant, mu, log sigma).
        components: C, the number of normals.

    Draws are reparametrized in all of q_params, the weights included, see `ReparametrizedMixture`.

    Raises:
        UserError: components below 1.

    Source: Figurnov, Mohamed, Mnih (2018), *Implicit Reparameterization Gradients*, arXiv:1805.08498.

    >>> q = MixtureOfNormals(8)
    >>> q(q.initial_params()).sample((5,)).shape
    torch.Size([5, 8])
    """

    def __init__(self, dim: int, *, components: int = 3) -> None:
        super().__init__(dim)
        check_range("MixtureOfNormals", least=1, components=components)
        self.components = components
        self.num_params = components * (1 + 2 * dim)

    def params_from_diagonal(self, mean: Tensor, log_scale: Tensor) -> Tensor:
        # The components a little apart: at one place they would stay together, for their gradients are the same.
        apart = well_spread(self.components, self.dim).to(mean) / 2
        means = mean.unsqueeze(-2) + log_scale.exp().unsqueeze(-2) * apart
        weights, log_scales = mean.new_zeros(means.shape[:-1]), log_scale.unsqueeze(-2).expand_as(means)
        return torch.cat([weights, means.flatten(-2), log_scales.flatten(-2)], -1)

    def forward(self, q_params: Tensor) -> dist.TorchDistribution:
        logits, normals = q_params.split([self.components, self.num_params - self.components], -1)
        means, log_scales = normals.unflatten(-1, (2, self.components, self.dim)).unbind(-3)
        return ReparametrizedMixture(soft_clip(logits), means, positive_scale(log_scales))

    def initial_params(self) -> Tensor:
        return self.params_from_diagonal(*torch.zeros(2, self.dim))


class FlowFamily(_LocationScaleFamily):
    r"""Normalizing flow family (neural spline flow), :math:`z = \mu + \sigma T_c^{-1}(\epsilon)`.

    Arguments:
        dim: D, the number of latent dimensions; P = 2 D + C, q_params = (mu, log sigma, c).
        transforms: number of coupling layers of T, which is shared by all datapoints.
        hidden: widths of the networks that give the splines' knots.
        bins: of each spline.
        context: C, the number of values c on which T is conditioned for a datapoint.

    With :math:`\epsilon \sim N(0, I)`. T starts near the identity, and is the identity beyond 5 sigma from mu. The
    density's slope jumps at the splines' knots; gradients through unrolled steps miss these jumps.

    Raises:
        UserError: context, transforms or a width below 1, or bins below 2.

    Source: Durkan, Bekasov, Murray, Papamakarios (2019), *Neural Spline Flows*, arXiv:1906.04032.

    >>> q = FlowFamily(8)
    >>> q(q.initial_params()).sample((5,)).shape
    torch.Size([5, 8])
    """

    def __init__(
        self, dim: int, *, transforms: int = 2, hidden: Sequence[int] = (64, 64), bins: int = 8, context: int = 8
    ) -> None:
        super().__init__(dim)
        check_range("FlowFamily", least=1, context=context)
        self.num_params = 2 * dim + context
        self.transform = spline(dim, context, transforms=transforms, hidden=hidden, bins=bins)

    def forward(self, q_params: Tensor) -> dist.TorchDistribution:
        mean, log_scale, context = q_params.split([self.dim, self.dim, self.num_params - 2 * self.dim], -1)
        return Flow(mean, positive_scale(log_scale), self.transform(context))
