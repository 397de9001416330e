"""The graph engine: a whole step of training as one CUDA graph, which the device runs without waiting for Python."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from pvae.data.dataset import Dataset
from pvae.runtime.torch_state import warn_once
from pvae.training.engines import EngineChoice, TracedStep

# Steps that are made before one is captured, so that what is allocated or compiled at the first is there.
WARM_UP = 3


class CudaGraphStep:
    """Rows gathered and binarized on the device, loss, gradients, optimizer and the rows' own step, captured as one.

    Arguments:
        step: the recorded step.
        data: resident on the device.
        size: of the batches that are captured; others, as the last of an epoch, go by ``step``.

    Its random numbers come from the device's generator, as those of the step do. The loss is left on the device.
    """

    def __init__(self, step: TracedStep, data: Dataset, size: int) -> None:
        self.step, self.data, self.made = step, data, 0
        self.index = torch.zeros(size, dtype=torch.long, device=data.train.device)
        self.weight = torch.zeros((), device=data.train.device)
        self.replay: Callable[[], Tensor | float] | None = None
        step.optimizer.allow_capture()

    def __call__(self, index: Tensor) -> Tensor | float:
        """Step on the training rows index [B], see `Step`."""
        if len(index) != len(self.index):
            return self.step(self.data.rows(index), index)
        self.index.copy_(index)
        self.weight.fill_(float(self.step.objective.weight))
        self.made += 1
        if self.made <= WARM_UP:
            return on_side_stream(self._whole)
        if self.replay is None:
            self.replay = self._captured()
        return self.replay()

    def batches(self, *which: Any) -> Iterator[tuple[Tensor]]:
        """The index of each of the data's batches, see `order`."""
        return ((index,) for index in self.data.order(*which))

    def _captured(self) -> Callable[[], Tensor | float]:
        try:
            return capture_graph(self._whole)
        except RuntimeError as error:  # it waits for the device, or there is no memory for a second set of tensors
            reason = " ".join(str(error).split())[:160]
            warn_once(f"the step can't be captured as a CUDA graph ({reason}): going on without")
            return self._whole

    def _whole(self) -> Tensor | float:
        self.step.objective.weight = self.weight
        return self.step(self.data.rows(self.index), self.index)


def with_cuda_graph(choice: EngineChoice, engine: str, data: Dataset, size: int) -> EngineChoice:
    """The choice's step in a CUDA graph, where that was asked for or is best, and the rows are on the device."""
    resident = isinstance(data.train, Tensor) and data.train.is_cuda
    if not (resident and isinstance(choice.step, TracedStep) and engine in ("auto", "graph")):
        return choice
    return EngineChoice(CudaGraphStep(choice.step, data, min(size, len(data.train))), "graph", choice.why)


def on_side_stream(function: Callable[[], Any]) -> Any:
    """Run a function on a stream of its own, as has to be done before it is captured."""
    stream, here = torch.cuda.Stream(), torch.cuda.current_stream()
    stream.wait_stream(here)
    with torch.cuda.stream(stream):
        found = function()
    here.wait_stream(stream)
    return found


def capture_graph(function: Callable[[], Any]) -> Callable[[], Tensor]:
    """A function's work on the device, done again at each call; what it gave is copied before it is overwritten."""
    graph = torch.cuda.CUDAGraph()
    # Threads that read rows ahead may allocate meanwhile.
    capturing: AbstractContextManager[None] = torch.cuda.graph(graph, capture_error_mode="thread_local")
    with capturing:
        found = function()

    def replay() -> Tensor:
        graph.replay()
        return found.clone()

    return replay
