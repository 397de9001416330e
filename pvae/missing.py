"""Missing values: programs of which only the entries that are there are scored."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import biject_to, constraints

from pvae.densities import Categorical
from pvae.errors import Refused, UserError
from pvae.weights import Program

__all__ = ["Missing", "Present", "Under", "entries", "masked", "separable", "whole"]


def entries(fn: Any, value: Tensor) -> Tensor:
    r"""Log-density of each entry of a row, :math:`\log p(x_d|z)`, [..., *event] nats.

    Arguments:
        fn: p(x|z) whose entries are independent given z, as every likelihood's are.
        value: x, [..., *event].

    Raises:
        Refused: the entries do not factorize.

    >>> entries(dist.Bernoulli(logits=torch.zeros(3)).to_event(1), torch.ones(2, 3)).shape
    torch.Size([2, 3])
    """
    if isinstance(fn, Present):
        return torch.where(fn.there, entries(fn.fn, fn.filled(value)), 0)
    if isinstance(fn, Categorical):
        batch = torch.broadcast_shapes(fn.batch_shape, value.shape[:-1])
        level = value.long().expand(*batch, -1).unsqueeze(-2)
        return fn.expand(batch).logits.gather(-2, level).squeeze(-2)
    if separable(fn):
        return fn.base_dist.log_prob(value)
    raise Refused(whole(fn))


def separable(fn: Any) -> bool:
    """Whether each entry has a density of its own."""
    independent = isinstance(fn, torch.distributions.Independent) and not fn.base_dist.event_shape
    return independent or isinstance(fn, Categorical | Present)


def whole(fn: Any) -> str:
    """Why a row has no entries with densities of their own."""
    return f"its {type(fn).__name__} scores whole rows; single entries have a density of their own under .to_event(1)"


class Present(dist.TorchDistribution):
    r"""p(x|z) of the entries that are there, :math:`\sum_{d : m_d} \log p(x_d|z)`; draws and means are of all.

    Arguments:
        fn: p(x|z) with event shape [*event].
        there: m, which entries are there, [..., *event].
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}

    def __init__(self, fn: Any, there: Tensor) -> None:
        if isinstance(fn, Present):  # of a program that is masked twice
            fn, there = fn.fn, fn.there & there
        self.fn: Any = fn
        self.there, self.has_rsample = there, fn.has_rsample
        super().__init__(fn.batch_shape, fn.event_shape, validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Present:
        return Present(self.fn.expand(batch_shape), self.there)

    def log_prob(self, value: Tensor) -> Tensor:
        found = entries(self, value)
        return found.sum(tuple(range(-len(self.event_shape), 0)))

    def filled(self, value: Tensor) -> Tensor:
        """The values, with one that is possible in place of those that are missing: 0 times NaN would be NaN."""
        return torch.where(self.there, value, _possible(getattr(self.fn, "base_dist", self.fn).support, value))

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


def _possible(support: Any, like: Tensor) -> Tensor:
    """A value inside a support, away from its ends where it is continuous."""
    zero = like.new_zeros(())
    if not support.is_discrete:
        with suppress(NotImplementedError):
            return biject_to(support)(zero).detach()
    return zero + getattr(support, "lower_bound", 0)


class Missing(Messenger):
    r"""A block in which observed sites score the entries that are there: :math:`\log p(x_{obs}|z)` for log p(x|z).

    Arguments:
        mask: which entries are there, [B, *event] of the observed value; None for those that are not NaN.

    What stands in x where the mask is False matters neither to values nor to gradients. Rows repeated n times
    (B, then B again) take the mask repeated.

    Raises:
        Refused: entries are missing at an observed site that scores whole rows.
        UserError: the mask is not of truth values, or does not fit the observed site.

    >>> import pyro
    >>> x = torch.tensor([[1.0, torch.nan]])
    >>> with Missing(), pyro.poutine.trace() as seen:
    ...     _ = pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1), obs=x)
    >>> seen.trace.nodes["x"]["fn"].log_prob(x)
    tensor([-1.4189])
    """

    def __init__(self, mask: Tensor | None = None) -> None:
        super().__init__()
        if mask is not None and mask.dtype != torch.bool:
            raise UserError(f"the mask holds {mask.dtype}; it must be bool, True where a value is there")
        self.mask = mask

    def _pyro_sample(self, msg: Any) -> None:
        if not msg["is_observed"] or site_is_subsample(msg) or msg["infer"].get("_deterministic"):
            return
        mask = self._of(msg["name"], msg["value"])
        if separable(msg["fn"]):  # whatever the mask holds: a recording can't look
            msg["fn"] = Present(msg["fn"], mask)
        elif not mask.all():
            raise Refused(f"entries of observed site '{msg['name']}' are missing, but {whole(msg['fn'])}")

    def _of(self, name: str, value: Tensor) -> Tensor:
        """The mask of a site's value."""
        if self.mask is None:
            return ~value.isnan()
        times, left = divmod(len(value), max(1, len(self.mask))) if value.dim() else (0, 1)
        if left or value.shape[1:] != self.mask.shape[1:]:
            raise UserError(
                f"the mask is of shape {tuple(self.mask.shape)}, but observed site '{name}' has {tuple(value.shape)}"
            )
        return self.mask if times == 1 else self.mask.repeat(times, *(1,) * (value.dim() - 1))


def masked(model: Program, mask: Tensor | None = None) -> Program:
    """The program under :class:`Missing`: the same latents and parameters, scored on the entries that are there.

    >>> program = masked(lambda x: None, torch.ones(2, 3, dtype=torch.bool))
    >>> program(torch.zeros(2, 3))
    """
    Missing(mask)  # refuses what is no mask, here and not at the first call
    return Under(model, partial(Missing, mask))


class Under:
    """A program under a messenger, which still tells whose method it is, and so where its parameters are.

    Arguments:
        model: the program.
        block: makes the messenger of each run.
    """

    def __init__(self, model: Program, block: Callable[[], Messenger]) -> None:
        self.model, self.block = model, block
        self.__self__ = model if isinstance(model, torch.nn.Module) else getattr(model, "__self__", None)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.block():
            return self.model(*args, **kwargs)
