"""Posterior families q(z|x): modules that turn parameters lam into a distribution over z.

A family does not know where lam comes from; that is the guide's business.
"""

from __future__ import annotations

from typing import ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor, nn

__all__ = ["Delta", "DiagonalNormal"]


class Family(nn.Module):
    """What every family states. Calling one with lam [..., P] returns q(z) over z [..., D].

    Arguments:
        dim: D, the number of latent dimensions.

    Attributes:
        size: P, the number of entries of lam.
        point_mass: q has no density, so that an ELBO under it bounds nothing.
    """

    point_mass: ClassVar[bool] = False
    size: int

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, lam: Tensor) -> dist.TorchDistribution:
        """q(z|x) with event shape [D]."""
        raise NotImplementedError

    def initial(self) -> Tensor:
        """The lam [P] from which a datapoint's own fit starts."""
        return torch.zeros(self.size)

    def natural(self, lam: Tensor, gradient: Tensor) -> Tensor:
        r"""Natural gradient :math:`F(\lambda)^{-1} g`, F the Fisher information of q; g itself where F is unknown."""
        return gradient


class DiagonalNormal(Family):
    r""":math:`q(z|x) = \prod_d N(z_d; \mu_d, \sigma_d^2)` with lam = (mu, log sigma).

    Arguments:
        dim: D, the number of latent dimensions; P = 2 D.

    A draw is :math:`z = \mu + \sigma \epsilon` with :math:`\epsilon \sim N(0, I)`, so that gradients pass.

    >>> q = DiagonalNormal(8)
    >>> q(q.initial()).sample((5,)).shape
    torch.Size([5, 8])
    """

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.size = 2 * dim

    def forward(self, lam: Tensor) -> dist.TorchDistribution:
        mean, log_scale = lam.chunk(2, -1)
        return dist.Normal(mean, log_scale.exp()).to_event(1)

    def natural(self, lam: Tensor, gradient: Tensor) -> Tensor:
        # F = diag(1 / sigma^2, 2)
        (by_mean, by_log_scale), (_, log_scale) = gradient.chunk(2, -1), lam.chunk(2, -1)
        return torch.cat([by_mean * (2 * log_scale).exp(), by_log_scale / 2], -1)


class Delta(Family):
    r"""All mass in one point, :math:`q(z|x) = \delta(z - \lambda)`: the posterior's mode, or an autoencoder's code.

    Arguments:
        dim: D, the number of latent dimensions; P = D.

    Its "ELBO" is log p(x, z) at the point, which bounds no evidence; evaluation says so and gives no gaps.

    >>> Delta(8)(torch.ones(3, 8)).sample().shape
    torch.Size([3, 8])
    """

    point_mass = True

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.size = dim

    def forward(self, lam: Tensor) -> dist.TorchDistribution:
        return dist.Delta(lam, event_dim=1)
