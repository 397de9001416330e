"""Priors p(z): modules that, called without arguments, return a distribution over z."""

from __future__ import annotations

import pyro.distributions as dist
import torch
from torch import Tensor, nn

__all__ = ["StandardNormal"]


class Prior(nn.Module):
    """What every prior states. Calling one returns p(z) over z [D].

    Arguments:
        dim: D, the number of latent dimensions.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self) -> dist.TorchDistribution:
        """p(z) with event shape [D]."""
        raise NotImplementedError


class StandardNormal(Prior):
    r""":math:`p(z) = N(z; 0, I)`.

    Arguments:
        dim: D, the number of latent dimensions.

    >>> StandardNormal(8)().sample((5,)).shape
    torch.Size([5, 8])
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.register_buffer("mean", torch.zeros(dim), persistent=False)
        self.register_buffer("scale", torch.ones(dim), persistent=False)

    def forward(self) -> dist.TorchDistribution:
        return dist.Normal(self.mean, self.scale).to_event(1)
