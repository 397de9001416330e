r"""Data-parallel steps: each rank takes its own rows, and one all-reduce sums gradients, loss and stop flag.

A loss is a sum over rows, so that the gradient of a step is a sum over ranks,
:math:`\nabla_\theta L = \sum_r \nabla_\theta L_r`. Rows of a per-datapoint table belong to one rank and are never sent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from pvae.runtime import distributed
from pvae.runtime.pyro_params import module_of
from pvae.runtime.torchrun import PeerFailed
from pvae.training.objectives import NonFiniteLoss
from pvae.training.svi_engines import EngineChoice, Parts, TracedStep

# Steps between checks of the stop flag on a GPU: each check waits for the device.
CHECK_EVERY = 20


def all_reduce_flat(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Sum tensors over all ranks, flattened into one all-reduce for each dtype."""
    summed = list(tensors)
    for dtype in {tensor.dtype: None for tensor in tensors}:
        places = [place for place, tensor in enumerate(tensors) if tensor.dtype == dtype]
        flat = torch.cat([tensors[place].reshape(-1) for place in places])
        dist.all_reduce(flat)
        for place, part in zip(places, flat.split([tensors[place].numel() for place in places]), strict=True):
            summed[place] = part.view_as(tensors[place])
    return summed


class DataParallelStep:
    """Step on the rows of all ranks; rows of per-datapoint tables are updated by their own rank.

    Arguments:
        traced: step of one rank, to be replayed; Pyro's own loss is differentiated if None.
        caught: signals that this rank has received.
        agreed: list that takes the signal that some rank has received, once all ranks know, at the end of one step.

    A loss that is not finite raises `NonFiniteLoss`, on ranks whose own loss is finite `PeerFailed`.
    """

    def __init__(self, traced: TracedStep | None, parts: Parts, caught: list[int], agreed: list[int]) -> None:
        self.model, self.guide, self.optimizer, self.objective = parts
        self.caught, self.agreed, self.steps, self.local_loss = caught, agreed, 0, 0.0
        self.cause, self.step = NonFiniteLoss("the loss is not finite"), traced or self._pyro_step
        if traced:
            traced.reduce = self._all_reduce
        self.stop: Tensor | float = 0.0

    def __call__(self, x: Tensor, index: Tensor) -> Tensor | float:
        try:
            return self.step(x, index)
        except NonFiniteLoss as error:  # on all ranks at the same step
            with distributed.fail_together():
                if math.isfinite(self.local_loss):
                    raise PeerFailed("another process's loss is not finite") from error
                raise

    def _pyro_step(self, x: Tensor, index: Tensor) -> Tensor | float:
        try:
            loss = self.objective.differentiable_loss(self.model, self.guide, x, index)
            if loss.requires_grad:
                loss.backward()
        except NonFiniteLoss as error:  # the other ranks wait for gradients
            self.cause, loss = error, x.new_full((), math.nan)
        parameters = self.optimizer.parameters
        loss, gradients = self._all_reduce(loss.detach(), [parameter.grad for parameter in parameters])
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        if not loss.is_cuda and not math.isfinite(loss.item()):
            raise self.cause
        self.optimizer(None)
        return loss.double() if loss.is_cuda else loss.item()

    def _all_reduce(self, loss: Tensor, gradients: Sequence[Tensor | None]) -> tuple[Tensor, list[Tensor]]:
        """Return the sums over all ranks of the loss and of the parameters' gradients."""
        self.local_loss, parameters = 0.0 if loss.is_cuda else loss.item(), self.optimizer.parameters
        pairs = zip(parameters, gradients, strict=True)
        terms = [torch.zeros_like(parameter) if gradient is None else gradient for parameter, gradient in pairs]
        flags = torch.stack([loss, loss.new_tensor(bool(self.caught))])
        *sums, flags = all_reduce_flat([*terms, flags.to(parameters[0].dtype) if parameters else flags])
        self.stop, self.steps = self.stop + flags[1], self.steps + 1
        if (not loss.is_cuda or self.steps % CHECK_EVERY == 0) and self.stop.item():
            self.agreed.append(distributed.all_reduce_max(max(self.caught, default=0)))
        return flags[0], sums


def supported_engine(engine: str, device: torch.device) -> str:
    """Return the engine to ask for: no CUDA graph can hold what several ranks send each other."""
    wants_graph = engine == "graph" or (engine == "auto" and device.type == "cuda")
    return "traced" if distributed.world_size() > 1 and wants_graph else engine


def data_parallel_step(choice: EngineChoice, parts: Parts, caught: list[int], agreed: list[int]) -> EngineChoice:
    """Return the engine's step shared by all ranks, which start alike and take the same kind of step."""
    if distributed.all_reduce_max(choice.traced is None) and choice.traced:
        choice = EngineChoice(choice.step, "pyro", "another process can't trace the step")
    # Parameters and buffers are rank 0's, except for the rows of per-datapoint tables.
    model, guide, optimizer, _ = parts
    rows = optimizer.row_tables()
    for module in (module_of(model), module_of(guide)):
        for values in (*module.parameters(), *module.buffers()):
            if id(values) not in rows:
                dist.broadcast(values.detach(), 0)
    return replace(choice, step=DataParallelStep(choice.traced, parts, caught, agreed), traced=None)
