"""Guides: a posterior family plus a source of its parameters lam. Three sources serve any family."""

from __future__ import annotations

from collections.abc import Callable

import pyro
import torch
from pyro import poutine
from torch import Tensor, nn

from pvae.errors import UserError
from pvae.families import Family
from pvae.refine import RowAdam, RowState, refine
from pvae.runtime import LocalModule
from pvae.weights import Program, elbo

__all__ = ["Amortized", "PerDatapoint", "SemiAmortized"]

Bound = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def given(family: Family, lam: Tensor) -> Program:
    """The guide whose parameters are these: q(z) = family(lam), lam [B, P]."""

    def guide(x: Tensor, index: Tensor | None = None) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", family(lam))

    return guide


def local_bound(model: Program, family: Family, K: int = 1) -> Bound:
    """Each datapoint's own ELBO as a function of its own lam: ``bound(lam, x, index)`` -> [B] nats."""

    def bound(lam: Tensor, x: Tensor, index: Tensor | None = None) -> Tensor:
        # The program runs inside a guide's own trace: nothing of it may be seen there.
        with poutine.block():
            return elbo(model, given(family, lam), x, index, K)

    return bound


class Guide(LocalModule):
    """What every guide states: ``guide(x, index)`` is a Pyro program with plate "data" and site "z".

    Arguments:
        family: the posterior family.
    """

    def __init__(self, family: Family) -> None:
        super().__init__()
        self.family = family

    def params(self, x: Tensor, index: Tensor | None = None) -> Tensor:
        """lam [B, P] of the rows x [B, D]; ``index`` [B] tells which datapoints they are, None that they are new."""
        raise NotImplementedError

    def forward(self, x: Tensor, index: Tensor | None = None) -> None:
        given(self.family, self.params(x, index))(x, index)


class Amortized(Guide):
    r"""One network for all datapoints, :math:`\lambda_i = f_\phi(x_i)`.

    Arguments:
        encoder: x [B, D] to lam [B, P].
        family: the posterior family.

    Source: Kingma and Welling (2014), *Auto-Encoding Variational Bayes*, arXiv:1312.6114.

    >>> from pvae.families import DiagonalNormal; from pvae.networks import MLP
    >>> family = DiagonalNormal(2)
    >>> Amortized(MLP(64, family.size), family).params(torch.zeros(5, 64)).shape
    torch.Size([5, 4])
    """

    def __init__(self, encoder: nn.Module, family: Family) -> None:
        super().__init__(family)
        self.encoder = encoder

    def params(self, x: Tensor, index: Tensor | None = None) -> Tensor:
        return self.encoder(x)


class SemiAmortized(Guide):
    r"""The network's lam, refined on the datapoint's own ELBO, :math:`\lambda_i = \mathrm{refine}(f_\phi(x_i))`.

    Arguments:
        encoder: x [B, D] to lam [B, P].
        family: the posterior family.
        steps: number of refinement steps.
        bound: ``bound(lam, x, index)`` -> [B], see :func:`local_bound`.
        learning_rate: of a refinement step, in units of lam.
        unroll: train the encoder through the steps; otherwise as if the steps added a constant.

    Raises:
        UserError: steps below 1, or a learning rate that is not positive.

    Source: Kim, Wiseman, Miller, Sontag, Rush (2018), *Semi-Amortized Variational Autoencoders*, arXiv:1802.02550.
    """

    def __init__(
        self,
        encoder: nn.Module,
        family: Family,
        steps: int = 10,
        *,
        bound: Bound,
        learning_rate: float = 0.1,
        unroll: bool = True,
    ) -> None:
        super().__init__(family)
        _positive("SemiAmortized", steps=steps, learning_rate=learning_rate)
        self.encoder = encoder
        self.steps, self.bound, self.unroll = steps, bound, unroll
        self.rule = RowAdam(learning_rate)

    def params(self, x: Tensor, index: Tensor | None = None) -> Tensor:
        lam = self.encoder(x)
        through = self.unroll and torch.is_grad_enabled()
        found = refine(lambda lam: self.bound(lam, x, index), lam, self.steps, rule=self.rule, unroll=through)
        return found.lam if through else lam + (found.lam - lam).detach()


class PerDatapoint(Guide):
    r"""A row of parameters for every datapoint, :math:`\lambda_i = \Lambda_{i\cdot}`, as before there were encoders.

    Arguments:
        num_data: N, the number of datapoints.
        family: the posterior family.
        bound: ``bound(lam, x, index)`` -> [B], see :func:`local_bound`; needed for more than one local step and for
            new data.
        local_steps: steps of a row at each visit. The last is taken together with the decoder's.
        local_learning_rate: of these steps, in units of lam.
        new_steps: the most steps with which rows of new data are fitted, from the initial value, decoder frozen.

    Each row has its own Adam moments and step count, so that rows outside a batch keep their bits. Memory is
    the table and its moments, 3 N P + N numbers.

    Raises:
        UserError: a count below 1 or a learning rate that is not positive.

    Source: Hoffman, Blei, Wang, Paisley (2013), *Stochastic Variational Inference*, arXiv:1206.7051.
    """

    table: Tensor
    first: Tensor
    second: Tensor
    row_steps: Tensor

    def __init__(
        self,
        num_data: int,
        family: Family,
        *,
        bound: Bound | None = None,
        local_steps: int = 5,
        local_learning_rate: float = 0.05,
        new_steps: int = 200,
    ) -> None:
        super().__init__(family)
        _positive(
            "PerDatapoint",
            num_data=num_data,
            local_steps=local_steps,
            local_learning_rate=local_learning_rate,
            new_steps=new_steps,
        )
        self.bound, self.local_steps, self.new_steps = bound, local_steps, new_steps
        self.rule = RowAdam(local_learning_rate)
        start = family.initial()
        self.register_buffer("table", start.repeat(num_data, 1))
        self.register_buffer("first", torch.zeros(num_data, family.size, dtype=start.dtype))
        self.register_buffer("second", torch.zeros(num_data, family.size, dtype=start.dtype))
        self.register_buffer("row_steps", torch.zeros(num_data, dtype=torch.int32))
        self._visited: tuple[Tensor, Tensor, RowState] | None = None

    def params(self, x: Tensor, index: Tensor | None = None) -> Tensor:
        if index is None:
            start = self.family.initial().to(self.table).expand(len(x), -1)
            return self._climb(x, None, start, None, self.new_steps)[0]
        if not (self.training and torch.is_grad_enabled()):
            return self.table[index]
        lam, state = self.table[index], RowState(self.first[index], self.second[index], self.row_steps[index])
        if self.local_steps > 1:
            lam, state = self._climb(x, index, lam, state, self.local_steps - 1)
        lam = lam.detach().requires_grad_()
        self._visited = (index, lam, state)
        return lam

    def step_rows(self) -> None:
        """After the loss's backward pass: let the visited rows take their joint step, and write them back."""
        if self._visited is None:
            return
        index, lam, state = self._visited
        self._visited = None
        if lam.grad is None:
            return
        # The loss is the negative bound, summed over the batch.
        moved, state = self.rule.step(lam.detach(), -lam.grad, state)
        self.table[index], self.row_steps[index] = moved, state.steps
        self.first[index], self.second[index] = state.first, state.second

    def _climb(
        self, x: Tensor, index: Tensor | None, lam: Tensor, state: RowState | None, steps: int
    ) -> tuple[Tensor, RowState]:
        if self.bound is None:
            raise UserError("PerDatapoint needs bound=local_bound(model, family) for local steps and for new data")
        bound = self.bound
        found = refine(lambda lam: bound(lam, x, index), lam, steps, rule=self.rule, state=state)
        return found.lam, found.state


def _positive(who: str, **values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            raise UserError(f"{who}: {name} is {value}, but it must be positive")
