"""Likelihoods p(x|z): modules that turn the decoder's outputs eta into a distribution over x."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints

from pvae.errors import UserError

__all__ = ["Bernoulli", "Gaussian"]


class Likelihood(nn.Module):
    """What every likelihood states. Calling one with eta [..., P * D] returns p(x|z) over x [..., D].

    Attributes:
        support: the values that one entry of x may take.
        base_measure: whether densities are masses (counting measure) or densities (Lebesgue measure): nats
            under different base measures can't be compared.
        params_per_value: P, the number of decoder outputs for each entry of x.
    """

    support: ClassVar[constraints.Constraint]
    base_measure: ClassVar[Literal["mass", "density"]]
    params_per_value: int = 1

    def forward(self, eta: Tensor) -> dist.TorchDistribution:
        """p(x|z) with event shape [D]."""
        raise NotImplementedError


class Bernoulli(Likelihood):
    r"""Binary values, :math:`p(x|z) = \prod_d \sigma(\eta_d)^{x_d} (1 - \sigma(\eta_d))^{1 - x_d}`.

    Shapes: eta [..., D] are log-odds; x [..., D] is 0 or 1. In nats of mass.

    >>> Bernoulli()(torch.zeros(3, 64)).log_prob(torch.ones(3, 64)).shape
    torch.Size([3])
    """

    support = constraints.boolean
    base_measure = "mass"

    def forward(self, eta: Tensor) -> dist.TorchDistribution:
        return dist.Bernoulli(logits=eta).to_event(1)


class Gaussian(Likelihood):
    r"""Real values, :math:`p(x|z) = \prod_d N(x_d; \eta_d, s^2)` with one scale s learned for all entries.

    Arguments:
        scale: s at the start of training, in the data's units.

    Shapes: eta [..., D] are means; x [..., D] is real. In nats of density.

    Raises:
        UserError: the scale is not positive.

    >>> Gaussian(scale=0.5)(torch.zeros(3, 64)).log_prob(torch.zeros(3, 64)).shape
    torch.Size([3])
    """

    support = constraints.real
    base_measure = "density"

    def __init__(self, *, scale: float = 1.0) -> None:
        super().__init__()
        if not (scale > 0 and math.isfinite(scale)):
            raise UserError(f"Gaussian: scale is {scale}, but it must be positive")
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale)))

    def forward(self, eta: Tensor) -> dist.TorchDistribution:
        return dist.Normal(eta, self.log_scale.exp()).to_event(1)
