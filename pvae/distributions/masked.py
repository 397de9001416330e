"""Missing values: programs of which only the entries that are there are scored."""

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
    r"""Log-density of each entry of a row, :math:`\log p(x_d|z)`, [..., *event] nats.

    Arguments:
        fn: p(x|z) whose entries are independent given z, as every likelihood's are.
        value: x, [..., *event].

    Raises:
        Incompatible: the entries do not factorize.

    >>> entry_log_prob(dist.Bernoulli(logits=torch.zeros(3)).to_event(1), torch.ones(2, 3)).shape
    torch.Size([2, 3])
    """
    if isinstance(fn, MaskedDistribution):
        return torch.where(fn.there, entry_log_prob(fn.fn, fn.filled(value)), 0)
    if isinstance(fn, Categorical):
        batch = torch.broadcast_shapes(fn.batch_shape, value.shape[:-1])
        level = value.long().expand(*batch, -1).unsqueeze(-2)
        return fn.expand(batch).logits.gather(-2, level).squeeze(-2)
    if is_factorized(fn):
        return fn.base_dist.log_prob(value)
    raise Incompatible(not_factorized_reason(fn))


def is_factorized(fn: Any) -> bool:
    """Whether each entry has a density of its own."""
    independent = isinstance(fn, torch.distributions.Independent) and not fn.base_dist.event_shape
    return independent or isinstance(fn, Categorical | MaskedDistribution)


def not_factorized_reason(fn: Any) -> str:
    """Why a row has no entries with densities of their own."""
    return f"its {type(fn).__name__} scores whole rows; single entries have a density of their own under .to_event(1)"


class MaskedDistribution(dist.TorchDistribution):
    r"""p(x|z) of the entries that are there, :math:`\sum_{d : m_d} \log p(x_d|z)`; draws and means are of all.

    Arguments:
        fn: p(x|z) with event shape [*event].
        there: m, which entries are there, [..., *event].
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}

    def __init__(self, fn: Any, there: Tensor) -> None:
        if isinstance(fn, MaskedDistribution):  # of a program that is masked twice
            fn, there = fn.fn, fn.there & there
        self.fn: Any = fn
        self.there, self.has_rsample = there, fn.has_rsample
        super().__init__(fn.batch_shape, fn.event_shape, validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> MaskedDistribution:
        return MaskedDistribution(self.fn.expand(batch_shape), self.there)

    def log_prob(self, value: Tensor) -> Tensor:
        found = entry_log_prob(self, value)
        return found.sum(tuple(range(-len(self.event_shape), 0)))

    def filled(self, value: Tensor) -> Tensor:
        """The values, with one that is possible in place of those that are missing: 0 times NaN would be NaN."""
        return torch.where(self.there, value, _value_in_support(getattr(self.fn, "base_dist", self.fn).support, value))

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
    """A value inside a support, away from its ends where it is continuous."""
    zero = like.new_zeros(())
    if not support.is_discrete:
        with suppress(NotImplementedError):
            return biject_to(support)(zero).detach()
    return zero + getattr(support, "lower_bound", 0)
