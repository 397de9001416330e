"""CUDA graphs: a whole training step as one graph, which the device runs without waiting for Python."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pvae.data.dataset import Dataset
from pvae.runtime.torch_state import warn_once
from pvae.training.svi_engines import EngineChoice, TracedStep

# Steps before the capture, so that the first step's allocations and compilations are done.
WARM_UP = 3


class CudaGraphStep:
    """Step captured as one CUDA graph: gather and binarize rows, loss, gradients, optimizer, local updates.

    Batches of another size, such as an epoch's last, go by the traced ``step``. Random numbers come from the device's
    generator, as in ``step``. The data are resident on the device, and the loss stays there.
    """

    def __init__(self, step: TracedStep, data: Dataset, size: int) -> None:
        self.step, self.data, self.calls = step, data, 0
        self.index = torch.zeros(size, dtype=torch.long, device=data.train.device)
        self.weight = torch.zeros((), device=data.train.device)
        self.replay: Callable[[], Tensor | float] | None = None
        step.optimizer.allow_capture()

    def __call__(self, index: Tensor) -> Tensor | float:
        if len(index) != len(self.index):
            return self.step(self.data.rows(index), index)
        self.index.copy_(index)
        self.weight.fill_(float(self.step.objective.weight))
        self.calls += 1
        if self.calls <= WARM_UP:
            return on_side_stream(self._full_step)
        if self.replay is None:
            self.replay = self._capture()
        return self.replay()

    def batches(self, *args: Any) -> Iterator[tuple[Tensor]]:
        return ((index,) for index in self.data.order(*args))

    def _capture(self) -> Callable[[], Tensor | float]:
        try:
            return capture_graph(self._full_step)
        except RuntimeError as error:  # it waits for the device, or there is no memory for a second set of tensors
            reason = " ".join(str(error).split())[:160]
            warn_once(f"the step can't be captured as a CUDA graph ({reason}): going on without")
            return self._full_step

    def _full_step(self) -> Tensor | float:
        self.step.objective.weight = self.weight
        return self.step(self.data.rows(self.index), self.index)


def with_cuda_graph(choice: EngineChoice, engine: str, data: Dataset, size: int) -> EngineChoice:
    """Return the choice with its step in a CUDA graph, if that is asked for or ``auto``, and the rows are on a GPU."""
    resident = isinstance(data.train, Tensor) and data.train.is_cuda
    if not (resident and choice.traced and engine in ("auto", "graph")):
        return choice
    step = CudaGraphStep(choice.traced, data, min(size, len(data.train)))
    return replace(choice, step=step, name="graph", traced=None, batches=step.batches)


def on_side_stream(function: Callable[[], Any]) -> Any:
    """Run a function on a CUDA stream of its own, as a warm-up before a capture requires."""
    side, current = torch.cuda.Stream(), torch.cuda.current_stream()
    side.wait_stream(current)
    with torch.cuda.stream(side):
        result = function()
    current.wait_stream(side)
    return result


def capture_graph(function: Callable[[], Any]) -> Callable[[], Tensor]:
    """Capture a function's work on the device, and return its replay, which copies the result."""
    graph = torch.cuda.CUDAGraph()
    # Threads that read rows ahead may allocate meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        result = function()

    def replay() -> Tensor:
        graph.replay()
        return result.clone()

    return replay
