"""Masked distributions: log-densities of the observed entries of a row."""

from __future__ import annotations

from contextlib import suppress
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import biject_to, constraints

from pvae.distributions.univariate import Categorical
from pvae.errors import Incompatible


def entry_log_prob(fn: Any, value: Tensor) -> Tensor:
    r"""Return the log-density of each entry of a row, :math:`\log p(x_d|z)`, [..., *event] nats; 0 where masked."""
    if isinstance(fn, MaskedDistribution):
        return torch.where(fn.observed, entry_log_prob(fn.fn, fn.fill_missing(value)), 0)
    if isinstance(fn, Categorical):
        return fn.entry_log_prob(value)
    if is_factorized(fn):
        return fn.base_dist.log_prob(value)
    raise Incompatible(not_factorized_reason(fn))


def is_factorized(fn: Any) -> bool:
    """Whether the entries of a row are independent, so that each has a density."""
    independent = isinstance(fn, torch.distributions.Independent) and not fn.base_dist.event_shape
    return independent or isinstance(fn, Categorical | MaskedDistribution)


def not_factorized_reason(fn: Any) -> str:
    """Return why the entries of a row have no densities, for an error."""
    return f"its {type(fn).__name__} scores whole rows; declare independent entries by .to_event(1)"


class MaskedDistribution(dist.TorchDistribution):
    r"""Masked likelihood of the observed entries, :math:`\sum_{d : m_d} \log p(x_d|z)`; draws and means are of all.

    Arguments:
        fn: p(x|z) with event shape [*event].
        observed: m, True for observed entries, [..., *event].
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}

    def __init__(self, fn: Any, observed: Tensor) -> None:
        if isinstance(fn, MaskedDistribution):  # of a program that is masked twice
            fn, observed = fn.fn, fn.observed & observed
        self.fn: Any = fn
        self.observed, self.has_rsample = observed, fn.has_rsample
        super().__init__(fn.batch_shape, fn.event_shape, validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> MaskedDistribution:
        return MaskedDistribution(self.fn.expand(batch_shape), self.observed)

    def log_prob(self, value: Tensor) -> Tensor:
        return entry_log_prob(self, value).sum(tuple(range(-len(self.event_shape), 0)))

    def fill_missing(self, value: Tensor) -> Tensor:
        """Replace missing values by one in the support: the gradient of 0 times NaN would be NaN."""
        inside = _value_in_support(getattr(self.fn, "base_dist", self.fn).support, value)
        return torch.where(self.observed, value, inside)

    @property
    def support(self) -> Any:
        return self.fn.support

    @property
    def mean(self) -> Tensor:
        return self.fn.mean

    def sample(self, sample_shape: Any = ()) -> Tensor:
        return self.fn.sample(torch.Size(sample_shape))

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        return self.fn.rsample(torch.Size(sample_shape))


def _value_in_support(support: Any, like: Tensor) -> Tensor:
    """Return a value inside a support, away from its ends if it is continuous."""
    zero = like.new_zeros(())
    if not support.is_discrete:
        with suppress(NotImplementedError):
            return biject_to(support)(zero).detach()
    return zero + getattr(support, "lower_bound", 0)
