"""Count distributions with log-rates as parameters, scored in float64."""

from __future__ import annotations

from typing import ClassVar

import pyro.distributions as dist
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import constraints

from pvae.distributions.univariate import _Univariate

# Rates are exp(eta) for |eta| up to KNEE: e^20 = 5e8 is far above 2^24, up to which float32 holds all counts. From
# LARGE on a Poisson draw is a rounded normal one: their distribution functions differ by less than 1e-5, and PyTorch's
# own draws overflow on CUDA.
KNEE, LARGE = 20.0, 1e8


class _Counts(_Univariate):
    """Count distribution, scored in float64: differences of lgamma near 1e7 keep no digit of float32."""

    support = constraints.nonnegative_integer

    def _score(self, value: Tensor) -> Tensor:
        parameters = [getattr(self, name) for name in self.arg_constraints]
        return self._log_mass(value.double(), *(p.double() for p in parameters)).to(parameters[0].dtype)

    def _log_mass(self, x: Tensor, *parameters: Tensor) -> Tensor:
        raise NotImplementedError

    @property
    def mean(self) -> Tensor:
        log_mean = getattr(self, next(iter(self.arg_constraints)))
        return _limit_log_rate(log_mean).exp().to(log_mean.dtype)


class Poisson(_Counts):
    r"""Poisson distribution, :math:`p(x) = r^x e^{-r} / x!`, log r = eta up to \|eta\| = 20 and logarithmic beyond.

    >>> Poisson(torch.zeros(2)).log_prob(torch.tensor([0.0, 1.0]))
    tensor([-1., -1.])
    """

    arg_constraints: ClassVar = {"log_rate": constraints.real}
    log_rate: Tensor

    def _log_mass(self, x: Tensor, *parameters: Tensor) -> Tensor:
        log_rate = _limit_log_rate(*parameters)
        return x * log_rate - log_rate.exp() - (x + 1).lgamma()

    @property
    def variance(self) -> Tensor:
        return self.mean

    def _draw(self, shape: torch.Size) -> Tensor:
        return _draw_poisson(_limit_log_rate(self.log_rate).exp().expand(shape)).to(self.log_rate.dtype)


class NegativeBinomial(_Counts):
    r"""Negative binomial distribution of mean m and variance m + m^2 / r; log m and log r as `Poisson`'s log-rate.

    :math:`p(x) = \frac{\Gamma(x + r)}{\Gamma(r)\, x!} (1 - q)^r q^x` with :math:`q = m / (m + r)`.

    >>> NegativeBinomial(torch.zeros(1), torch.zeros(1)).log_prob(torch.tensor([2.0])).exp()
    tensor([0.1250])
    """

    arg_constraints: ClassVar = {"log_mean": constraints.real, "log_concentration": constraints.real}
    log_mean: Tensor
    log_concentration: Tensor

    def _log_mass(self, x: Tensor, *parameters: Tensor) -> Tensor:
        log_mean, log_concentration = map(_limit_log_rate, parameters)
        r, log_odds = log_concentration.exp(), log_mean - log_concentration
        ways = (x + r).lgamma() - r.lgamma() - (x + 1).lgamma()
        return ways + r * F.logsigmoid(-log_odds) + x * F.logsigmoid(log_odds)

    @property
    def variance(self) -> Tensor:
        mean = _limit_log_rate(self.log_mean).exp()
        return (mean + mean**2 / _limit_log_rate(self.log_concentration).exp()).to(self.log_mean.dtype)

    def _draw(self, shape: torch.Size) -> Tensor:
        log_mean, log_concentration = _limit_log_rate(self.log_mean), _limit_log_rate(self.log_concentration)
        rate = dist.Gamma(log_concentration.exp(), (log_concentration - log_mean).exp()).expand(shape).sample()
        return _draw_poisson(rate).to(self.log_mean.dtype)


class ZeroInflatedNegativeBinomial(NegativeBinomial):
    """Zero-inflated negative binomial distribution (ZINB): a draw becomes 0 with log-odds ``dropout``.

    Pyro's loses its log-odds, and can't be expanded any more, once its mean was computed.
    """

    arg_constraints: ClassVar = {**NegativeBinomial.arg_constraints, "dropout": constraints.real}
    dropout: Tensor

    def _log_mass(self, x: Tensor, *parameters: Tensor) -> Tensor:
        *logs, dropout = parameters
        counted = F.logsigmoid(-dropout) + super()._log_mass(x, *logs)
        return torch.where(x == 0, torch.logaddexp(F.logsigmoid(dropout), counted), counted)

    @property
    def mean(self) -> Tensor:
        return (-self.dropout).sigmoid() * super().mean

    @property
    def variance(self) -> Tensor:
        weight = (-self.dropout).sigmoid()
        return weight * (super().variance + (1 - weight) * super().mean ** 2)

    def _draw(self, shape: torch.Size) -> Tensor:
        return super()._draw(shape) * torch.bernoulli((-self.dropout).sigmoid().expand(shape))


def _limit_log_rate(log_rate: Tensor) -> Tensor:
    """Return the log-rate up to KNEE and asinh of the excess beyond, so that rates and their gradients are finite."""
    log_rate = log_rate.double()
    inner = log_rate.clamp(-KNEE, KNEE)
    return inner + (log_rate - inner).asinh()


def _draw_poisson(rate: Tensor) -> Tensor:
    small = torch.poisson(rate.clamp(max=LARGE))
    return torch.where(rate < LARGE, small, (rate + rate.sqrt() * torch.randn_like(rate)).round())
