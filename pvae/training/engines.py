"""Engines: how a step of training is made. Each makes the step that Pyro's ``SVI`` makes, in less and less time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from pyro.infer import SVI
from torch import Tensor

from pvae.errors import UserError, nearest
from pvae.inference.guides import Guide
from pvae.runtime.pyro_params import Program, module_of
from pvae.runtime.torch_state import RandomState
from pvae.runtime.tracing import Outputs, TracedFunction, TraceError, restore_state
from pvae.training.objectives import NonFiniteLoss, Objective
from pvae.training.optimizer import FusedAdam

ENGINES = ("auto", "pyro", "traced", "compiled", "graph")

# Steps after which a recording has paid for itself, as measured on two cores.
MIN_STEPS_TO_TRACE = 200


# Model, guide, optimizer and objective, as ``SVI`` takes them; rows and index of a batch.
Parts = tuple[Program, Program, FusedAdam, Objective]
Rows = tuple[Tensor, Tensor]

# One step of training on a batch, rows x [B, D] and index [B], of everything that is trained; what gathers the rows by
# itself takes the index alone. It gives the loss before the step in nats, summed over the rows.
Step = Callable[..., Tensor | float]


class PyroStep:
    """Pyro's own: ``SVI.step``."""

    def __init__(self, model: Program, guide: Program, optimizer: FusedAdam, objective: Objective) -> None:
        self.svi = SVI(model, guide, optimizer, objective)

    def __call__(self, x: Tensor, index: Tensor) -> Tensor | float:
        return self.svi.step(x, index)


class TracedStep:
    r"""The same loss, its gradients :math:`\nabla_{\theta, \phi, \Lambda}` and the rows' step, recorded and replayed.

    Arguments:
        model, guide, optimizer, objective: as for ``SVI``.
        compile: compile what is recorded.

    Raises:
        TraceError: when it is called, see `TracedFunction`.
    """

    def __init__(
        self,
        model: Program,
        guide: Program,
        optimizer: FusedAdam,
        objective: Objective,
        *,
        compile: bool = False,
    ) -> None:
        self.model, self.guide, self.optimizer, self.objective = model, guide, optimizer, objective
        self.modules = [module_of(model), module_of(guide)]
        self.gradients = TracedFunction(self._gradients, *self.modules, compile=compile)
        self.plain = PyroStep(model, guide, optimizer, objective)
        self.refused: set[int] = set()

    def __call__(self, x: Tensor, index: Tensor) -> Tensor | float:
        if len(x) in self.refused:
            return self.plain(x, index)
        stream = None if x.is_cuda else RandomState()
        try:
            loss, *found = self.gradients(*self._inputs(x, index))
        except TraceError:  # of a batch of this size, which the last of an epoch may be the first to have
            self.refused.add(len(x))
            return self.plain(x, index)
        assert loss is not None
        if stream is None:  # no look at the loss, which would wait for the device
            self.apply(index, found)
            return loss.double()
        if not math.isfinite(loss.item()):
            stream.restore()
            raise self._broken(x, index)
        self.apply(index, found)
        return loss.item()

    def apply(self, index: Tensor, found: Sequence[Tensor | None]) -> None:
        """Let all parameters take their step on these gradients, and put the rows of tables that moved back."""
        parameters = self.optimizer.parameters
        for parameter, gradient in zip(parameters, found, strict=False):
            parameter.grad = gradient
        self.optimizer.step_parameters()
        rows = [values for values in found[len(parameters) :] if values is not None]
        for place, table in enumerate(self.optimizer.tables):
            table.write_rows(index, *rows[4 * place : 4 * place + 4])

    def _inputs(self, x: Tensor, index: Tensor) -> tuple[Tensor, ...]:
        if not self.objective.warm_up and type(self.objective).weight_at is Objective.weight_at:
            return x, index
        return x, index, torch.as_tensor(self.objective.weight, dtype=x.dtype, device=x.device)

    def _gradients(self, x: Tensor, index: Tensor, *weight: Tensor) -> Outputs:
        if weight:
            self._weigh(*weight)
        loss = self.objective.tensor_loss(self.model, self.guide, x, index)
        visits = [(table, *table.visited()) for table in self.optimizer.tables]
        leaves = [*self.optimizer.parameters, *(q_params for _, _, q_params, _ in visits)]
        gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
        of_rows = gradients[len(self.optimizer.parameters) :]
        moved = [
            rows
            for (table, _, q_params, state), gradient in zip(visits, of_rows, strict=True)
            for rows in table.moved(q_params, torch.zeros_like(q_params) if gradient is None else gradient, state)
        ]
        return (loss.detach(), *gradients[: len(self.optimizer.parameters)], *moved)

    def _weigh(self, weight: Tensor) -> None:
        """Put the KL weight that changes in training where recording sees it as an input."""
        self.objective.weight = weight
        for module in self.modules:
            if isinstance(module, Guide):
                module.kl_weight = weight

    def check(self, x: Tensor, index: Tensor) -> None:
        """Compare with the loss that Pyro takes on these rows, from the same draws.

        Raises:
            TraceError: they differ: the program does what its trace on other rows did not show.
        """
        buffers = [b for module in self.modules for b in module.buffers()]
        with restore_state(buffers):
            loss = self.gradients(*self._inputs(x, index))[0]
        with restore_state(buffers):
            try:
                expected = self.objective.differentiable_loss(self.model, self.guide, x, index).item()
            except NonFiniteLoss:  # which is for the step to tell
                return
            finally:
                for table in self.optimizer.tables:
                    table.forget()
        # Sums of float32 in another order.
        if loss is not None and not abs(loss.item() - expected) <= 1e-5 * abs(expected) + 1e-4 * len(x):
            raise TraceError(f"replayed, the loss is {loss.item():g}, but Pyro's is {expected:g}")

    def _broken(self, x: Tensor, index: Tensor) -> NonFiniteLoss:
        try:
            self.objective.differentiable_loss(self.model, self.guide, x, index)
        except NonFiniteLoss as error:
            return error
        return NonFiniteLoss("the loss is not finite")


class EngineChoice(NamedTuple):
    """An engine's step, its name, and why it was chosen, in a line."""

    step: Step
    name: str
    why: str


def choose_engine(
    name: str,
    parts: Parts,
    batches: Sequence[Rows],
    steps: int,
) -> EngineChoice:
    """The step of the engine that is asked for; of Pyro's where the program can't be recorded.

    Arguments:
        name: of :data:`ENGINES`; ``auto`` takes the one that suits the device and the number of steps.
        parts: model, guide, optimizer and objective.
        batches: two: what is recorded on the first must hold on the other.
        steps: that will be made in all.

    Raises:
        UserError: no engine of that name.
    """
    check_engine(name)
    if name == "pyro":
        return EngineChoice(PyroStep(*parts), name, "as asked")
    if name == "auto" and steps < MIN_STEPS_TO_TRACE:
        return EngineChoice(PyroStep(*parts), "pyro", f"{steps} steps are too few to pay for recording one")
    try:
        return _trace_step(name, parts, batches, steps)
    except TraceError as error:
        return EngineChoice(PyroStep(*parts), "pyro", f"the step can't be recorded ({error})")


def recheck_engine(choice: EngineChoice, parts: Parts, batch: Sequence[Tensor]) -> EngineChoice:
    """The same choice, if its recording still agrees with Pyro now that parameters have moved; else Pyro's step."""
    try:
        if isinstance(choice.step, TracedStep):
            choice.step.check(*batch)
    except TraceError as error:
        return EngineChoice(PyroStep(*parts), "pyro", f"what was recorded no longer holds ({error})")
    return choice


def check_engine(name: str) -> None:
    """Refuse the name of no engine."""
    if name not in ENGINES:
        raise UserError(f"unknown engine '{name}'{nearest(name, ENGINES)}")


def _trace_step(name: str, parts: Parts, batches: Sequence[Rows], steps: int) -> EngineChoice:
    compile, why, step = name == "compiled", "as asked", None
    if not compile:
        step = _check_step(parts, batches)
    if step and name in ("auto", "graph"):
        cost, saved = step.gradients.compile_cost
        compile = steps * saved > cost
        why = f"compiling takes about {cost:.0f} s and saves about {steps * saved:.2g} s in {steps:,} steps"
    if compile:
        try:
            return EngineChoice(_check_step(parts, batches, compile=True), "compiled", why)
        except TraceError as error:
            why = f"the step can't be compiled ({error})"
    if name == "graph" and not batches[0][0].is_cuda:
        why = "a CUDA graph needs a CUDA device"
    return EngineChoice(step or _check_step(parts, batches), "traced", why)


def _check_step(parts: Parts, batches: Sequence[Rows], *, compile: bool = False) -> TracedStep:
    step = TracedStep(*parts, compile=compile)
    for batch in batches:
        step.check(*batch)
    return step
