"""Noisy observations: the density of entries seen through noise, and the moments of the clean ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from pvae.distributions.supports import base_constraint
from pvae.distributions.univariate import Categorical

# From x [..., *event] to p(y|x) of the same batch shape: noise is independent by entry.
Channel = Callable[[Tensor], Any]


class Moments(NamedTuple):
    """Mean and variance of each entry."""

    mean: Tensor
    variance: Tensor


class NoiseConvolution(dist.TorchDistribution):
    r"""Convolution of a likelihood with noise, :math:`p(y_d|z) = \int p(y_d|x_d)\, p(x_d|z)\, dx_d`, entry by entry.

    It is exact if x has finitely many values, which are summed over, and for Gaussian x and noise. Otherwise p(y|z) is
    approximated by a Gaussian of the same mean and variance, x being jointly Gaussian with y (moment matching), so that
    E[x|y, z] is the best linear estimate.

    Arguments:
        clean: p(x|z) with event shape [*event], whose entries are independent.
        noise: p(y|x).

    >>> import pvae
    >>> p = NoiseConvolution(dist.Normal(torch.zeros(2), 1.0).to_event(1), pvae.noise.GaussianNoise(scale=1.0))
    >>> p.clean_moments(torch.tensor([0.0, 3.0])).mean
    tensor([0.0000, 1.5000])
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}

    def __init__(self, clean: Any, noise: Channel) -> None:
        self.clean, self.noise = clean, noise
        super().__init__(clean.batch_shape + clean.event_shape, validate_args=False)

    @property
    def support(self) -> Any:
        return self.noise(torch.zeros(())).support

    def expand(self, batch_shape: Any, _instance: Any = None) -> NoiseConvolution:
        return NoiseConvolution(self.clean.expand(torch.Size(batch_shape)[: -self.clean.event_dim]), self.noise)

    def log_prob(self, value: Tensor) -> Tensor:
        if num_levels(self.clean):
            return self._joint(value)[1].logsumexp(0)
        mean, variance = entry_moments(self.clean)
        return dist.Normal(mean, (variance + self.noise(mean).variance).sqrt()).log_prob(value)

    def clean_moments(self, value: Tensor) -> Moments:
        """Return mean and variance of p(x|y, z) at y, [..., *event]."""
        if num_levels(self.clean):
            x, joint = self._joint(value)
            return _weighted_moments(x, joint.softmax(0))
        mean, variance = entry_moments(self.clean)
        noise_variance = self.noise(mean).variance
        gain = variance / (variance + noise_variance)
        return Moments(clamp_to_support(self.clean, mean + gain * (value - mean)), gain * noise_variance)

    def _joint(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """Return the values of x, [L, 1, ...], and log p(x, y|z) at each, [L, ..., *event]."""
        x, log_p = _enumerate_levels(self.clean, value.dim())
        return x, log_p + self.noise(x).log_prob(value)


def num_levels(fn: Any) -> int:
    """Return the number of values of an entry of x, 0, 1, ...; 0 if it is infinite."""
    support = base_constraint(fn.support)
    if support is constraints.boolean:
        return 2
    return support.upper_bound + 1 if isinstance(support, constraints.integer_interval) else 0


def clamp_to_support(fn: Any, values: Tensor) -> Tensor:
    """Clamp values [..., *event] to the support of p(x|z)."""
    support = base_constraint(fn.support)
    if support is constraints.boolean:
        return values.clamp(0, 1)
    for name, clamp in (("lower_bound", torch.maximum), ("upper_bound", torch.minimum)):
        if (bound := getattr(support, name, None)) is not None:
            values = clamp(values, torch.as_tensor(bound).to(values))
    return values


def _enumerate_levels(fn: Any, dims: int = 0) -> tuple[Tensor, Tensor]:
    """Return the values of x, [L, 1, ...], and log p(x|z) of each entry, [L, ..., *event] with ``dims`` after L."""
    like = fn.logits.select(-2, 0) if isinstance(fn, Categorical) else fn.mean
    x = torch.arange(num_levels(fn), dtype=like.dtype, device=like.device).view(-1, *(1,) * like.dim())
    log_p = fn.logits.movedim(-2, 0) if isinstance(fn, Categorical) else fn.base_dist.log_prob(x)
    ones = (1,) * (dims + 1 - log_p.dim())
    return x.view(len(x), *ones, *x.shape[1:]), log_p.view(len(x), *ones, *log_p.shape[1:])


def entry_moments(fn: Any) -> Moments:
    """Return mean and variance of each entry of p(x|z), [..., *event]."""
    if num_levels(fn):
        x, log_p = _enumerate_levels(fn)
        return _weighted_moments(x, log_p.exp())
    return Moments(fn.mean, fn.variance)


def _weighted_moments(x: Tensor, weights: Tensor) -> Moments:
    mean = (weights * x).sum(0)
    return Moments(mean, (weights * (x - mean) ** 2).sum(0))
