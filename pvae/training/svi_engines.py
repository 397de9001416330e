"""Engines: each makes the step of Pyro's stochastic variational inference (``SVI``), in less and less time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from pyro.infer import SVI
from torch import Tensor

from pvae.errors import UserError, nearest
from pvae.inference.guides import Guide
from pvae.runtime.pyro_params import Program, module_of
from pvae.runtime.threads import OpSizes
from pvae.runtime.torch_state import RandomState
from pvae.runtime.tracing import Outputs, TracedFunction, TraceError, restore_state
from pvae.training.objectives import NonFiniteLoss, Objective
from pvae.training.optimizer import FusedAdam

EngineName = Literal["pyro", "traced", "compiled", "graph"]
ENGINES = ("auto", *get_args(EngineName))

# Steps from which on tracing pays for itself, as measured on two cores.
MIN_STEPS_TO_TRACE = 200

# Model, guide, optimizer and objective, as ``SVI`` takes them; rows and index of a batch.
Parts = tuple[Program, Program, FusedAdam, Objective]
Rows = tuple[Tensor, Tensor]
# Rows x [B, D] and index [B], for a CUDA graph the index alone, to the loss before the step, their sum in nats.
Step = Callable[..., Tensor | float]


def pyro_step(model: Program, guide: Program, optimizer: FusedAdam, objective: Objective) -> Step:
    """Return the step of Pyro's own ``SVI``."""
    return SVI(model, guide, optimizer, objective).step


class TracedStep:
    r"""Step that replays the traced loss, its gradients :math:`\nabla_{\theta, \phi, \Lambda}` and the rows' update.

    Attributes:
        reduce: sums loss and gradients over several ranks, see `DataParallelStep`; None for one.
    """

    def __init__(
        self, model: Program, guide: Program, optimizer: FusedAdam, objective: Objective, *, compile: bool = False
    ) -> None:
        self.model, self.guide, self.optimizer, self.objective = model, guide, optimizer, objective
        self.modules = [module_of(model), module_of(guide)]
        self.gradients = TracedFunction(self._gradients, *self.modules, compile=compile)
        self.fallback = pyro_step(model, guide, optimizer, objective)
        self.refused: set[int] = set()
        self.reduce: Callable[[Tensor, Sequence[Tensor | None]], tuple[Tensor, list[Tensor]]] | None = None

    def __call__(self, x: Tensor, index: Tensor) -> Tensor | float:
        if len(x) in self.refused:
            return self.fallback(x, index)
        stream = None if x.is_cuda else RandomState()
        try:
            loss, *updates = self.gradients(*self._inputs(x, index))
        except TraceError:  # of a batch of this size, which the last of an epoch may be the first to have
            self.refused.add(len(x))
            return self.fallback(x, index)
        assert loss is not None
        if self.reduce:
            count = len(self.optimizer.parameters)
            loss, updates[:count] = self.reduce(loss, updates[:count])
        if stream is None:  # no look at the loss, which would wait for the device
            self.apply(index, updates)
            return loss.double()
        if not math.isfinite(loss.item()):
            stream.restore()
            self.objective.differentiable_loss(self.model, self.guide, x, index)  # says which density is not finite
            raise NonFiniteLoss("the loss is not finite")
        self.apply(index, updates)
        return loss.item()

    def apply(self, index: Tensor, updates: Sequence[Tensor | None]) -> None:
        """Step all parameters on these gradients, and write the updated rows of per-datapoint tables back."""
        parameters = self.optimizer.parameters
        for parameter, gradient in zip(parameters, updates, strict=False):
            parameter.grad = gradient
        self.optimizer.step_parameters()
        rows = [values for values in updates[len(parameters) :] if values is not None]
        for place, table in enumerate(self.optimizer.tables):
            table.write_rows(index, *rows[4 * place : 4 * place + 4])

    def _inputs(self, x: Tensor, index: Tensor) -> tuple[Tensor, ...]:
        if not self.objective.warm_up and type(self.objective).weight_at is Objective.weight_at:
            return x, index
        return x, index, torch.as_tensor(self.objective.weight, dtype=x.dtype, device=x.device)

    def _gradients(self, x: Tensor, index: Tensor, weight: Tensor | None = None) -> Outputs:
        if weight is not None:  # it changes in training, and tracing sees it as an input
            self.objective.weight = weight
            for module in self.modules:
                if isinstance(module, Guide):
                    module.kl_weight = weight
        loss = self.objective.tensor_loss(self.model, self.guide, x, index)
        visits = [table.take_visit() for table in self.optimizer.tables]
        leaves, count = [*self.optimizer.parameters, *(v.q_params for v in visits)], len(self.optimizer.parameters)
        gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
        visited = zip(self.optimizer.tables, visits, gradients[count:], strict=True)
        updated = [rows for table, visit, gradient in visited for rows in table.updated_rows(visit, gradient)]
        return (loss.detach(), *gradients[:count], *updated)

    def check(self, x: Tensor, index: Tensor) -> None:
        """Raise a `TraceError` if the replayed loss on these rows differs from Pyro's own, from the same draws."""
        buffers = [b for module in self.modules for b in module.buffers()]
        with restore_state(buffers):
            loss = self.gradients(*self._inputs(x, index))[0]
        with restore_state(buffers):
            try:
                expected = self.objective.differentiable_loss(self.model, self.guide, x, index).item()
            except NonFiniteLoss:  # which the step reports
                return
            finally:
                for table in self.optimizer.tables:
                    table.drop_visit()
        # Sums of float32 in another order.
        if loss is not None and not abs(loss.item() - expected) <= 1e-5 * abs(expected) + 1e-4 * len(x):
            raise TraceError(f"replayed, the loss is {loss.item():g}, but Pyro's is {expected:g}")

    def op_size(self, x: Tensor, index: Tensor) -> float:
        """Return the mean size of the graph's operations, see `cpu_threads`, by a replay without effect."""
        with restore_state([b for module in self.modules for b in module.buffers()]), OpSizes() as sizes:
            self.gradients(*self._inputs(x, index))
        return sizes.mean


@dataclass(frozen=True)
class EngineChoice:
    """An engine's step, its name, and the reason for the choice, in a line.

    Attributes:
        traced: the traced step behind ``step``, which `recheck_engine` compares with Pyro's.
        batches: what yields the step's arguments, as `Dataset.batches` does; that method itself if None.
        op_size: mean size of the step's operations, see `cpu_threads`.
    """

    step: Step
    name: EngineName
    reason: str
    traced: TracedStep | None = None
    batches: Callable[..., Iterator[Any]] | None = None
    op_size: float = math.nan


def choose_engine(name: str, parts: Parts, batches: Sequence[Rows], steps: int) -> EngineChoice:
    """Choose the engine that is asked for, or Pyro's where the program can't be traced.

    Arguments:
        name: of :data:`ENGINES`; ``auto`` takes the one that suits the device and the number of steps.
        batches: two: the step is traced on the first and must hold on the other.
        steps: number of steps to come.
    """
    check_engine(name)
    if name == "pyro":
        return _choose_pyro(parts, "as asked")
    if name == "auto" and steps < MIN_STEPS_TO_TRACE:
        return _choose_pyro(parts, f"{steps} steps are too few to pay for tracing one")
    try:
        return _trace_step(name, parts, batches, steps)
    except TraceError as error:
        return _choose_pyro(parts, f"the step can't be traced ({error})")


def recheck_engine(choice: EngineChoice, parts: Parts, batch: Sequence[Tensor]) -> EngineChoice:
    """Return the same choice if its trace still agrees with Pyro's loss after training, else Pyro's step."""
    try:
        if choice.traced:
            choice.traced.check(*batch)
    except TraceError as error:
        return _choose_pyro(parts, f"the traced step no longer holds ({error})")
    return choice


def check_engine(name: str) -> None:
    """Refuse an unknown engine."""
    if name not in ENGINES:
        raise UserError(f"unknown engine '{name}'{nearest(name, ENGINES)}")


def _choose_pyro(parts: Parts, reason: str) -> EngineChoice:
    return EngineChoice(pyro_step(*parts), "pyro", reason)


def _trace_step(name: str, parts: Parts, batches: Sequence[Rows], steps: int) -> EngineChoice:
    compile, reason = name == "compiled", "as asked"
    step = None if compile else _checked_step(parts, batches)
    if step and name in ("auto", "graph"):
        cost, saved = step.gradients.compile_cost
        compile = steps * saved > cost
        reason = f"compiling takes about {cost:.0f} s and saves about {steps * saved:.2g} s in {steps:,} steps"
    if compile:
        try:
            compiled = _checked_step(parts, batches, compile=True)
            return EngineChoice(compiled, "compiled", reason, compiled)
        except TraceError as error:
            reason = f"the step can't be compiled ({error})"
    if name == "graph" and not batches[0][0].is_cuda:
        reason = "a CUDA graph needs a CUDA device"
    step = step or _checked_step(parts, batches)
    return EngineChoice(step, "traced", reason, step, op_size=step.op_size(*batches[0]))


def _checked_step(parts: Parts, batches: Sequence[Rows], *, compile: bool = False) -> TracedStep:
    step = TracedStep(*parts, compile=compile)
    for batch in batches:
        step.check(*batch)
    return step
