"""Guides: a variational family and an inference method, which supplies its variational parameters q_params."""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

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
from pvae.runtime.pyro_params import LocalModule, Program, declare_param

__all__ = ["Amortized", "PerDatapoint", "SemiAmortized"]


def check_guide(who: str, guide: Any) -> None:
    """Refuse a guide without a posterior family, which a search for the best q needs."""
    if not isinstance(guide, Guide):
        needs = f"{who} needs a guide with a posterior family, such as Amortized, not {type(guide).__name__}"
        raise UserError(needs, "pvae.diagnostics.bounds takes any Pyro guide")


class Guide(LocalModule):
    """Base class of guides: ``guide(x, index)`` is a Pyro program that draws the model's latents in plate "data".

    Arguments:
        family: the variational family.
        sites: the latents it is over, see `find_latent_sites`; one vector "z" unless given.

    Attributes:
        encodes: whether new rows' q_params come from an encoder, and not from a search alone.
        kl_weight: of the local ELBO while training, so that it is the objective's.

    Raises:
        UserError: the family has another number of dimensions than the sites.
    """

    encodes: bool = True
    kl_weight: float | Tensor = 1.0

    def __init__(self, family: Family, sites: LatentSites | None = None) -> None:
        super().__init__()
        self.family, self.sites = family, sites or real_vector_latent(family.dim)
        if self.sites.dim != family.dim:
            raise UserError(f"the family has {family.dim} dimensions, but the program's latents have {self.sites.dim}")

    def params(self, x: Tensor, index: Tensor | None = None) -> Tensor:
        """Return q_params [B, P] of rows x [B, D]; ``index`` [B]: which training datapoints they are, None if new."""
        raise NotImplementedError

    def with_params(self, q_params: Tensor) -> Program:
        """Return the guide of the same family and sites with given q_params [B, P]."""
        return fixed_guide(self.family, q_params, self.sites)

    def forward(self, x: Tensor, index: Tensor | None = None) -> None:
        self.with_params(self.params(x, index))(x, index)


class Amortized(Guide):
    r"""Amortized inference: one encoder for all datapoints, :math:`\lambda_i = f_\phi(x_i)`.

    Arguments:
        encoder: maps x [B, D] to q_params [B, P].
        family: the variational family.
        sites: the latents that q is over.

    See also `SemiAmortized` and `PerDatapoint`, which optimize each datapoint's own parameters.

    Source: Kingma and Welling (2014), *Auto-Encoding Variational Bayes*, arXiv:1312.6114.

    >>> import pvae
    >>> family = pvae.families.DiagonalNormal(2)
    >>> pvae.Amortized(pvae.networks.MLP(64, family.num_params), family).params(torch.zeros(5, 64)).shape
    torch.Size([5, 4])
    """

    def __init__(self, encoder: nn.Module, family: Family, *, sites: LatentSites | None = None) -> None:
        super().__init__(family, sites)
        self.encoder = encoder

    def params(self, x: Tensor, index: Tensor | None = None) -> Tensor:
        return self.encoder(x)


class SemiAmortized(Guide):
    r"""Semi-amortized inference: an encoder and a few steps, :math:`\lambda_i = \mathrm{refine}(f_\phi(x_i))`.

    Arguments:
        encoder: maps x [B, D] to q_params [B, P].
        family: the variational family.
        steps: number of refinement steps.
        model: the Pyro program whose ELBO the steps maximize.
        draws: of each step's gradient; near the optimum a single draw's noise costs more than a step gains.
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
        self.encoder, self.steps, self.draws, self.unroll = encoder, steps, draws, unroll
        self.local_elbo = LocalELBO(model, family, self.sites)
        self.rule = default_update_rule(family, learning_rate)

    def params(self, x: Tensor, index: Tensor | None = None) -> Tensor:
        q_params, unroll = self.encoder(x), self.unroll and torch.is_grad_enabled()
        kl_weight = self.kl_weight if self.training else 1.0
        bound = partial(self.local_elbo, x=x, index=index, K=self.draws, kl_weight=kl_weight)
        refined = refine(bound, q_params, self.steps, rule=self.rule, unroll=unroll).q_params
        return refined if unroll else q_params + (refined - q_params).detach()


class RefinedGuide(Guide):
    r"""Refinement of another guide's q_params for each row until convergence, for evaluation, not for training.

    Arguments:
        guide: gives the q_params from which the rows start.
        model: the Pyro program whose ELBO is maximized in at most ``steps`` steps.
    """

    start: Guide

    def __init__(self, guide: Guide, model: Program, *, steps: int = 300) -> None:
        super().__init__(guide.family, guide.sites)
        check_range("RefinedGuide", steps=steps)
        # Not by plain assignment, which would make the guide part of this one for Pyro.
        object.__setattr__(self, "start", guide)
        self.steps = steps
        self.local_elbo = LocalELBO(model, guide.family, guide.sites)

    def train(self, mode: bool = True) -> RefinedGuide:
        self.start.train(mode)
        return super().train(mode)

    def params(self, x: Tensor, index: Tensor | None = None) -> Tensor:
        start, rule = self.start.params(x, index).detach(), default_update_rule(self.family)
        return maximize_local_elbo(self.local_elbo, start, x, index, steps=self.steps, rule=rule).q_params


class FrozenGuide(Guide):
    """Guide whose q_params for given rows were computed once, see `freeze`; for diagnostics, not for training.

    Rows are recognized by value and index, in any order and subset; other rows go to the wrapped guide.

    Arguments:
        guide: the wrapped guide.
        q_params: its variational parameters [N, P] of rows x [N, C], which are training datapoints ``index`` or new.
    """

    guide: Guide
    q_params: Tensor

    def __init__(self, guide: Guide, q_params: Tensor, x: Tensor, index: Tensor | None = None) -> None:
        super().__init__(guide.family, guide.sites)
        # Not by plain assignment, which would make the guide part of this one for Pyro.
        object.__setattr__(self, "guide", guide)
        self.encodes = guide.encodes
        self.register_buffer("q_params", q_params, persistent=False)
        self._keys = _row_keys(x, index)
        self._positions = {key: position for position, key in reversed(list(enumerate(self._keys)))}

    def params(self, x: Tensor, index: Tensor | None = None) -> Tensor:
        keys = _row_keys(x, index)
        if not all(key in self._positions for key in keys):
            return self.guide.params(x, index)
        # A slice of the rows gets its own q_params, even where rows are alike.
        slices = (slice(start, start + len(keys)) for start, key in enumerate(self._keys) if key == keys[0])
        places = next((place for place in slices if self._keys[place] == keys), [self._positions[key] for key in keys])
        return self.q_params[places]


def _row_keys(x: Tensor, index: Tensor | None) -> list[bytes]:
    rows = x.detach().cpu().contiguous().flatten(1).numpy()
    numbers = [-1] * len(rows) if index is None else index.tolist()
    return [row.tobytes() + int(number).to_bytes(8, signed=True) for row, number in zip(rows, numbers, strict=True)]


class Visit(NamedTuple):
    """Rows of a batch in training: index [B], q_params [B, P] as a leaf that takes gradients, and optimizer state."""

    index: Tensor  # type: ignore[assignment]
    q_params: Tensor
    state: RowState


class PerDatapoint(Guide):
    r"""Stochastic variational inference (SVI): q_params for every datapoint, :math:`\lambda_i = \Lambda_{i\cdot}`.

    Arguments:
        num_data: N, the number of datapoints.
        family: the variational family.
        model: the Pyro program whose ELBO is maximized; needed for more than one local step and for new data.
        local_steps: steps of a row at each visit. The last is taken together with the decoder's.
        local_learning_rate: of these steps, see `RowAdam`.
        num_steps_new_data: the most steps that fit new rows, from the initial q_params, with the decoder frozen.
        sites: the latents that q is over.

    Each row has Adam moments and a step count of its own, so that rows outside a batch stay as they are. Memory is the
    table and its moments, 3 N P + N numbers.

    Raises:
        UserError: a count below 1 or a learning rate that is not positive.

    Source: Hoffman, Blei, Wang, Paisley (2013), *Stochastic Variational Inference*, arXiv:1206.7051.
    """

    encodes: ClassVar[bool] = False  # type: ignore[misc]
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
        num_steps_new_data: int = 200,
        sites: LatentSites | None = None,
    ) -> None:
        super().__init__(family, sites)
        counts = {"num_data": num_data, "local_steps": local_steps, "num_steps_new_data": num_steps_new_data}
        check_range("PerDatapoint", **counts, local_learning_rate=local_learning_rate)
        self.local_elbo = None if model is None else LocalELBO(model, family, self.sites)
        self.local_steps, self.num_steps_new_data = local_steps, num_steps_new_data
        self.rule = RowAdam(local_learning_rate)
        self.register_buffer("table", family.initial_params().repeat(num_data, 1))
        for moment in ("first", "second"):
            self.register_buffer(moment, torch.zeros_like(self.table))
        self.register_buffer("row_steps", torch.zeros(num_data, dtype=torch.int32))
        self._visit: Visit | None = None

    def params(self, x: Tensor, index: Tensor | None = None) -> Tensor:
        if index is None:
            start = self.family.initial_params().to(self.table).expand(len(x), -1)
            steps = self.num_steps_new_data
            return maximize_local_elbo(self._required_elbo(), start, x, steps=steps, rule=self.rule).q_params
        if not (self.training and torch.is_grad_enabled()):
            return self.table[index]
        self._visit = self._visit_rows(x, index)
        # Even where no other parameter is trained, SVI takes gradients of what it sees as a parameter.
        return declare_param("rows", self._visit.q_params)

    def _visit_rows(self, x: Tensor, index: Tensor) -> Visit:
        """Take the local steps of a batch but the last, which is the joint one."""
        q_params, state = self.table[index], RowState(self.first[index], self.second[index], self.row_steps[index])
        if self.local_steps > 1:
            bound = partial(self._required_elbo(), x=x, index=index, kl_weight=self.kl_weight)
            refined = refine(bound, q_params, self.local_steps - 1, rule=self.rule, state=state)
            q_params, state = refined.q_params, refined.state
        return Visit(index, q_params.detach().requires_grad_(), state)

    def take_visit(self) -> Visit:
        """Return the last visit in training, once."""
        visit, self._visit = self._visit, None
        if visit is None:
            raise UserError("PerDatapoint: the rows were not visited in training")
        return visit

    def drop_visit(self) -> None:
        """Discard the last visit, so that no step follows."""
        self._visit = None

    def updated_rows(self, visit: Visit, gradient: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return visited rows after a step on the loss's gradient (None is 0), in the form that `write_rows` takes."""
        start = visit.q_params.detach()
        # The loss is the negative bound, summed over the batch.
        q_params, state = self.rule.step(start, torch.zeros_like(start) if gradient is None else -gradient, visit.state)
        return q_params, *state

    def write_rows(self, index: Tensor, q_params: Tensor, first: Tensor, second: Tensor, steps: Tensor) -> None:
        self.table[index], self.first[index], self.second[index], self.row_steps[index] = q_params, first, second, steps

    def step_local_params(self) -> None:
        """Take the visited rows' joint step after the loss's backward pass, and write them back."""
        visit, self._visit = self._visit, None
        if visit is not None and visit.q_params.grad is not None:
            self.write_rows(visit.index, *self.updated_rows(visit, visit.q_params.grad))

    def _required_elbo(self) -> LocalELBO:
        if self.local_elbo is None:
            raise UserError("PerDatapoint needs model= for local steps and for new data")
        return self.local_elbo

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_visit": None}
