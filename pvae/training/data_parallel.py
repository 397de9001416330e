r"""Steps of several processes: each takes its own rows, and PyTorch's DistributedDataParallel adds the gradients.

A loss is a sum over rows, so that the gradient of a step is a sum over processes,
:math:`\nabla_\theta L = \sum_r \nabla_\theta L_r`. Rows of a table belong to one process; nothing of them is sent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pvae.runtime import distributed
from pvae.runtime.pyro_params import Program, module_of
from pvae.runtime.torchrun import PeerFailed
from pvae.runtime.tracing import Outputs
from pvae.training.engines import EngineChoice, Step, TracedStep
from pvae.training.objectives import NonFiniteLoss, Objective
from pvae.training.optimizer import FusedAdam

# Steps between looks, on a GPU, at what the processes tell each other: each look waits for the device.
LOOK = 20

# What is found of a step: what is left to differentiate, the loss as a number, and gradients that are known already.
Gradients = Sequence[Tensor | None]
Found = tuple[Tensor, Tensor, Gradients]


class _Globals(nn.Module):
    """What DistributedDataParallel sees: the global parameters, and a word [2] that travels with their gradients."""

    def __init__(self, parameters: list[nn.Parameter], device: torch.device) -> None:
        super().__init__()
        kind = parameters[0].dtype if parameters else None
        self.own, self.word = nn.ParameterList(parameters), nn.Parameter(torch.zeros(2, dtype=kind, device=device))

    def forward(self, find: Callable[[], Found], stop: bool) -> Tensor:
        surrogate, loss, gradients = find()
        said = (self.word * torch.stack([loss, loss.new_tensor(stop)])).sum()
        return _Handed.apply(surrogate + said, gradients, *self.own)


class _Handed(torch.autograd.Function):
    """A loss, in whose backward pass every parameter hears of a gradient: one that is given, or none."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: Gradients, *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return (gradient, None, *ctx.gradients)


def _add(state, bucket):  # PyTorch compares the types of a hook, and knows none that are put off as ours are
    """Add the processes' gradients, where DistributedDataParallel would take their mean."""
    return dist.all_reduce(bucket.buffer(), async_op=True).get_future().then(lambda done: done.value()[0])


class DataParallelStep:
    """A step on the rows of all processes, each of which brings its own; rows of tables take theirs at home.

    Arguments:
        recorded: step of one process, to be replayed. Without one Pyro's own loss is differentiated, and gradients are
            sent while others are still being computed.
        model, guide, optimizer, objective: as for ``SVI``.
        caught: signals that this process was sent.

    Attributes:
        signal: one that some process was sent, once all know of it, at the end of the same step; else 0.

    Raises:
        NonFiniteLoss: when it is called; in processes whose own loss is finite `PeerFailed`.
    """

    def __init__(
        self,
        recorded: TracedStep | None,
        model: Program,
        guide: Program,
        optimizer: FusedAdam,
        objective: Objective,
        caught: list[int],
    ) -> None:
        self.model, self.guide, self.optimizer, self.objective = model, guide, optimizer, objective
        self.caught, self.signal, self.steps, self.own = caught, 0, 0, 0.0
        self.broken = NonFiniteLoss("the loss is not finite")
        self.step: Step = recorded or self._differentiated
        if recorded:
            self.replay, recorded.gradients = recorded.gradients, self._replayed  # type: ignore[assignment]
        device = next(module_of(model).parameters(), torch.zeros(())).device
        self.globals = DistributedDataParallel(_Globals(optimizer.parameters, device), gradient_as_bucket_view=True)
        self.globals.register_comm_hook(None, _add)
        self.asked = torch.zeros((), device=device)

    def __call__(self, x: Tensor, index: Tensor) -> Tensor | float:
        try:
            return self.step(x, index)
        except NonFiniteLoss as error:  # in all processes at the same step
            with distributed.fail_together():
                if math.isfinite(self.own):
                    raise PeerFailed("another process's loss is not finite") from error
                raise

    def _differentiated(self, x: Tensor, index: Tensor) -> Tensor | float:
        def find() -> Found:
            try:
                loss = self.objective.differentiable_loss(self.model, self.guide, x, index)
            except NonFiniteLoss as error:  # the others wait for gradients
                self.broken, loss = error, x.new_full((), math.nan)
            return loss, loss.detach(), [None] * len(self.optimizer.parameters)

        loss = self._summed(find)
        if not loss.is_cuda and not math.isfinite(loss.item()):
            raise self.broken
        self.optimizer(None)
        return loss.double() if loss.is_cuda else loss.item()

    def _replayed(self, *inputs: Tensor) -> Outputs:
        loss, *found = self.replay(*inputs)
        assert loss is not None
        own, count = loss, len(self.optimizer.parameters)
        summed = self._summed(lambda: (own.new_zeros(()), own, found[:count]))
        return (summed, *(p.grad for p in self.optimizer.parameters), *found[count:])

    def _summed(self, find: Callable[[], Found]) -> Tensor:
        """The loss over all processes, and its gradients at the global parameters."""

        def noted() -> Found:
            found = find()
            self.own = 0.0 if found[1].is_cuda else found[1].item()
            return found

        with torch.enable_grad():
            self.globals(noted, bool(self.caught)).backward()
        word = self.globals.module.word
        heard, word.grad = word.grad.clone(), None
        self._listen(heard[1])
        return heard[0]

    def _listen(self, asked: Tensor) -> None:
        self.asked, self.steps = self.asked + asked, self.steps + 1
        if (not asked.is_cuda or self.steps % LOOK == 0) and self.asked.item():
            self.signal = distributed.all_reduce_max(max(self.caught, default=0))


def supported_engine(engine: str, device: torch.device) -> str:
    """The engine to ask for: no graph of a GPU's own can hold what several processes tell each other."""
    on_gpu = engine == "auto" and device.type == "cuda"
    return "traced" if distributed.world_size() > 1 and (engine == "graph" or on_gpu) else engine


def data_parallel_step(
    choice: EngineChoice, parts: tuple[Program, Program, FusedAdam, Objective], caught: list[int]
) -> EngineChoice:
    """The engine's step, shared by all processes, which start alike and take the same kind of step.

    Arguments:
        choice: of this process.
        parts: model, guide, optimizer and objective.
        caught: signals that it was sent.
    """
    step, name, why = choice
    recorded = step if isinstance(step, TracedStep) else None
    if distributed.all_reduce_max(recorded is None) and recorded:
        recorded, name, why = None, "pyro", "another process can't record the step"
    broadcast_buffers(parts)
    return EngineChoice(DataParallelStep(recorded, *parts, caught), name, why)


def broadcast_buffers(parts: tuple[Program, Program, FusedAdam, Objective]) -> None:
    """Give all processes the first one's buffers but for rows, as DistributedDataParallel does with parameters."""
    model, guide, optimizer, _ = parts
    rows = {id(values) for table in optimizer.tables for values in table.buffers(recurse=False)}
    for values in (*module_of(model).buffers(), *module_of(guide).buffers()):
        if id(values) not in rows:
            dist.broadcast(values, 0)
