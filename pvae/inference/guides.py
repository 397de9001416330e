"""Guides: a posterior family plus a source of its parameters q_params. Three sources serve any family."""

from __future__ import annotations

import torch
from pyro.poutine.runtime import effectful
from torch import Tensor, nn
from torch.distributions import constraints

from pvae.errors import UserError, check_range
from pvae.inference.families import Family
from pvae.inference.latents import LatentSites, real_vector_latent
from pvae.inference.refinement import (
    LocalELBO,
    RowAdam,
    RowState,
    default_update_rule,
    fixed_guide,
    maximize_local_elbo,
    refine,
)
from pvae.runtime.pyro_params import LocalModule, Program, mark_as_parameter

__all__ = ["Amortized", "PerDatapoint", "SemiAmortized"]


class Guide(LocalModule):
    """What every guide states: ``guide(x, index)`` is a Pyro program that draws the model's latents in plate "data".

    Arguments:
        family: the posterior family.
        sites: the latents it is over, see `find_sites`; one vector "z" unless given.

    Attributes:
        encodes: whether q_params of new rows follow from the rows as the guide sees them, by an encoder.
        kl_weight: of the bound that rows climb while training, so that it is the objective's.

    Raises:
        UserError: the family has another number of dimensions than the sites.
    """

    encodes: bool = True

    def __init__(self, family: Family, sites: LatentSites | None = None) -> None:
        super().__init__()
        self.family, self.sites = family, sites or real_vector_latent(family.dim)
        self.kl_weight: float | Tensor = 1.0
        if self.sites.dim != family.dim:
            raise UserError(f"the family has {family.dim} dimensions, but the program's latents have {self.sites.dim}")

    def params(self, x: Tensor, index: Tensor | None = None) -> Tensor:
        """q_params [B, P] of the rows x [B, D]; ``index`` [B] tells which datapoints they are, None that they are new."""
        raise NotImplementedError

    def with_params(self, q_params: Tensor) -> Program:
        """Return the guide of the same family and sites with the variational parameters q_params [B, P]."""
        return fixed_guide(self.family, q_params, self.sites)

    def forward(self, x: Tensor, index: Tensor | None = None) -> None:
        self.with_params(self.params(x, index))(x, index)

    @property
    def _weight(self) -> float | Tensor:
        return self.kl_weight if self.training else 1.0


class Amortized(Guide):
    r"""One network for all datapoints, :math:`\lambda_i = f_\phi(x_i)`.

    Arguments:
        encoder: x [B, D] to q_params [B, P].
        family: the posterior family.
        sites: the latents that q is over.

    Source: Kingma and Welling (2014), *Auto-Encoding Variational Bayes*, arXiv:1312.6114.

    >>> from pvae.inference.families import DiagonalNormal; from pvae.generative.networks import MLP
    >>> family = DiagonalNormal(2)
    >>> Amortized(MLP(64, family.size), family).params(torch.zeros(5, 64)).shape
    torch.Size([5, 4])
    """

    def __init__(self, encoder: nn.Module, family: Family, *, sites: LatentSites | None = None) -> None:
        super().__init__(family, sites)
        self.encoder = encoder

    def params(self, x: Tensor, index: Tensor | None = None) -> Tensor:
        return self.encoder(x)


class SemiAmortized(Guide):
    r"""The network's q_params, refined on the datapoint's own ELBO, :math:`\lambda_i = \mathrm{refine}(f_\phi(x_i))`.

    Arguments:
        encoder: x [B, D] to q_params [B, P].
        family: the posterior family.
        steps: number of refinement steps.
        bound: the datapoints' own bound, see `local_elbo`.
        draws: of each step's gradient; near the optimum a single draw's noise costs more than a step wins.
        learning_rate: of a refinement step, see `NaturalAscent`.
        unroll: train the encoder through the steps; otherwise as if the steps added a constant.
        sites: the latents that q is over.

    Raises:
        UserError: steps or draws below 1, or a learning rate that is not positive.

    Source: Kim, Wiseman, Miller, Sontag, Rush (2018), *Semi-Amortized Variational Autoencoders*, arXiv:1802.02550.
    """

    def __init__(
        self,
        encoder: nn.Module,
        family: Family,
        steps: int = 5,
        *,
        model: Program,
        draws: int = 8,
        learning_rate: float = 0.1,
        unroll: bool = True,
        sites: LatentSites | None = None,
    ) -> None:
        super().__init__(family, sites)
        check_range("SemiAmortized", steps=steps, draws=draws, learning_rate=learning_rate)
        self.encoder = encoder
        self.steps, self.draws, self.unroll = steps, draws, unroll
        self.local_elbo = LocalELBO(model, family, self.sites)
        self.rule = default_update_rule(family, learning_rate)

    def params(self, x: Tensor, index: Tensor | None = None) -> Tensor:
        q_params = self.encoder(x)
        through = self.unroll and torch.is_grad_enabled()
        found = refine(
            lambda q_params: self.local_elbo(q_params, x, index, self.draws, self._weight),
            q_params,
            self.steps,
            rule=self.rule,
            unroll=through,
        )
        return found.q_params if through else q_params + (found.q_params - q_params).detach()


class RefinedGuide(Guide):
    r"""Another guide's q_params, each row's refined until it comes to rest: the best q of the family as far as it is found.

    Not a source one trains with: evaluation asks with it what is left once the source of q_params is out of the way.

    Arguments:
        guide: where the rows start.
        model: the program whose ELBO they climb.
        steps: the most steps.
    """

    def __init__(self, guide: Guide, model: Program, *, steps: int = 300) -> None:
        super().__init__(guide.family, guide.sites)
        check_range("Optimized", steps=steps)
        self.start, self.steps = guide, steps
        self.local_elbo = LocalELBO(model, guide.family, guide.sites)

    def params(self, x: Tensor, index: Tensor | None = None) -> Tensor:
        q_params = self.start.params(x, index).detach()
        return maximize_local_elbo(
            self.local_elbo, q_params, x, index, steps=self.steps, rule=default_update_rule(self.family)
        ).q_params


class FrozenGuide(Guide):
    """Another guide whose variational parameters for some rows were computed once, see `freeze`, and are looked up.

    Rows are known by their values and by their index, in any order and subset; other rows go to the guide itself.
    It serves diagnostics of a fitted guide, not training.

    Arguments:
        guide: the guide.
        q_params: its variational parameters of the rows, [N, P].
        x, index: the rows [N, C], and which training datapoints they are; None for new ones.
    """

    def __init__(self, guide: Guide, q_params: Tensor, x: Tensor, index: Tensor | None = None) -> None:
        super().__init__(guide.family, guide.sites)
        self.guide, self.encodes = guide, guide.encodes
        self.register_buffer("q_params", q_params, persistent=False)
        self._keys = _row_keys(x, index)
        self._position = {key: place for place, key in reversed(list(enumerate(self._keys)))}

    q_params: Tensor

    def params(self, x: Tensor, index: Tensor | None = None) -> Tensor:
        keys = _row_keys(x, index)
        if not all(key in self._position for key in keys):
            return self.guide.params(x, index)
        # Of rows that are alike, a stretch of the rows in their order finds its own.
        for start, key in enumerate(self._keys):
            if keys and key == keys[0] and self._keys[start : start + len(keys)] == keys:
                return self.q_params[start : start + len(keys)]
        return self.q_params[[self._position[key] for key in keys]]


def _row_keys(x: Tensor, index: Tensor | None) -> list[bytes]:
    """What tells rows from each other: their values' bytes and their index."""
    rows = x.detach().cpu().contiguous().flatten(1).numpy()
    numbers = [-1] * len(rows) if index is None else index.tolist()
    return [row.tobytes() + int(number).to_bytes(8, signed=True) for row, number in zip(rows, numbers, strict=True)]


class PerDatapoint(Guide):
    r"""A row of parameters for every datapoint, :math:`\lambda_i = \Lambda_{i\cdot}`, as before there were encoders.

    Arguments:
        num_data: N, the number of datapoints.
        family: the posterior family.
        model: the Pyro program whose ELBO rows climb; needed for more than one local step and for new data.
        local_steps: steps of a row at each visit. The last is taken together with the decoder's.
        local_learning_rate: of these steps, see `RowAdam`.
        new_steps: the most steps with which rows of new data are fitted, from the initial value, decoder frozen.
        sites: the latents that q is over.

    Each row has its own Adam moments and step count, so that rows outside a batch keep their bits. Memory is
    the table and its moments, 3 N P + N numbers.

    Raises:
        UserError: a count below 1 or a learning rate that is not positive.

    Source: Hoffman, Blei, Wang, Paisley (2013), *Stochastic Variational Inference*, arXiv:1206.7051.
    """

    encodes = False
    table: Tensor
    first: Tensor
    second: Tensor
    row_steps: Tensor

    def __init__(
        self,
        num_data: int,
        family: Family,
        *,
        model: Program | None = None,
        local_steps: int = 5,
        local_learning_rate: float = 0.1,
        new_steps: int = 200,
        sites: LatentSites | None = None,
    ) -> None:
        super().__init__(family, sites)
        check_range(
            "PerDatapoint",
            num_data=num_data,
            local_steps=local_steps,
            local_learning_rate=local_learning_rate,
            new_steps=new_steps,
        )
        self.local_elbo = None if model is None else LocalELBO(model, family, self.sites)
        self.local_steps, self.new_steps = local_steps, new_steps
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
            return maximize_local_elbo(self._own_bound(), start, x, steps=self.new_steps, rule=self.rule).q_params
        if not (self.training and torch.is_grad_enabled()):
            return self.table[index]
        q_params, state = self.table[index], RowState(self.first[index], self.second[index], self.row_steps[index])
        if self.local_steps > 1:
            bound = self._own_bound()
            found = refine(
                lambda q_params: bound(q_params, x, index, 1, self._weight),
                q_params,
                self.local_steps - 1,
                rule=self.rule,
                state=state,
            )
            q_params, state = found.q_params, found.state
        q_params = mark_as_parameter(q_params.detach().requires_grad_())
        # Told as a parameter, so that SVI takes gradients even where no other parameter is left to train.
        effectful(type="param")(lambda *_, **__: q_params)("rows", q_params, constraint=constraints.real, name="rows")
        self._visited = (index, q_params, state)
        return q_params

    def visited(self) -> tuple[Tensor, Tensor, RowState]:
        """Of the last visit in training, once: which rows these were, their q_params as a leaf, and their state."""
        if self._visited is None:
            raise UserError("PerDatapoint: the rows were not visited in training")
        found, self._visited = self._visited, None
        return found

    def forget(self) -> None:
        """Let a visit go without a step."""
        self._visited = None

    def moved(self, q_params: Tensor, gradient: Tensor, state: RowState) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Rows after their joint step on the loss's gradient, as `write_rows` takes them."""
        # The loss is the negative bound, summed over the batch.
        q_params, state = self.rule.step(q_params.detach(), -gradient, state)
        return q_params, state.first, state.second, state.steps

    def write_rows(self, index: Tensor, q_params: Tensor, first: Tensor, second: Tensor, steps: Tensor) -> None:
        """Put rows and their state back into the table."""
        self.table[index], self.first[index], self.second[index], self.row_steps[index] = q_params, first, second, steps

    def step_rows(self) -> None:
        """After the loss's backward pass: let the visited rows take their joint step, and write them back."""
        if self._visited is None:
            return
        index, q_params, state = self.visited()
        if q_params.grad is not None:
            self.write_rows(index, *self.moved(q_params, q_params.grad, state))

    def _own_bound(self) -> LocalELBO:
        if self.local_elbo is None:
            raise UserError("PerDatapoint needs model= for local steps and for new data")
        return self.local_elbo
