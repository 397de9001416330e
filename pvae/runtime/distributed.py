"""Ranks: the processes that share one training, as ``torchrun`` starts them. A process alone is rank 0 of 1."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist

from pvae.errors import UserError
from pvae.runtime.torchrun import Elsewhere, Place, launched

# The other ranks wait while the first reads all rows to check them; a rank that dies is noticed at once all the same.
PATIENCE = timedelta(days=1)

_state = {"here": Place()}


def join() -> None:
    """Join the processes that ``torchrun`` has started, if it has: from then on a training is shared by them all."""
    if launched().world == 1:
        return
    if not dist.is_initialized():
        # Few numbers besides the gradients are told; they stay on the CPU.
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=PATIENCE)
    _state["here"] = launched()


def leave() -> None:
    """Be alone again."""
    if world() > 1:
        dist.destroy_process_group()
        _state["here"] = Place()


def own_device(device: torch.device) -> torch.device:
    """The device of its kind that is this process's own: on CUDA the one of its number on its machine."""
    number = _state["here"].local
    if world() == 1 or device.type != "cuda":
        return device
    if number >= torch.cuda.device_count():
        raise UserError(
            f"process {number} of this machine has no CUDA device of its own, there are {torch.cuda.device_count()}; "
            "give torchrun as many --nproc-per-node, or pvae --device cpu"
        )
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


def world() -> int:
    """W, the number of processes that share a training."""
    return _state["here"].world


def first() -> bool:
    """Whether this process is the one that speaks and writes for all."""
    return rank() == 0


def rank() -> int:
    """Which of these processes this is, from 0."""
    return _state["here"].rank


def shares(total: int) -> list[range]:
    """Which of so many rows each process owns: stretches whose lengths differ by one at most.

    >>> shares(10)
    [range(0, 10)]
    """
    among = world()
    return [range(each * total // among, (each + 1) * total // among) for each in range(among)]


def share(total: int) -> range:
    """Which of so many rows this process owns."""
    return shares(total)[rank()]


def stream(seed: int) -> int:
    """The seed of this process's own batches and draws; one alone has the seed itself."""
    return seed if world() == 1 else int(np.random.SeedSequence([seed, rank()]).generate_state(1)[0])


def told(value: int) -> int:
    """What the first process has."""
    found = torch.tensor(int(value))
    if world() > 1:
        dist.broadcast(found, 0)
    return int(found)


def most(value: int) -> int:
    """The largest that any process has."""
    found = torch.tensor(int(value))
    if world() > 1:
        dist.all_reduce(found, dist.ReduceOp.MAX)
    return int(found)


def total(value: float) -> float:
    """The sum of what the processes have."""
    found = torch.tensor(value, dtype=torch.double)
    if world() > 1:
        dist.all_reduce(found)
    return float(found)


@contextmanager
def together() -> Iterator[None]:
    """Run a block that all processes run, and let it fail for all if it fails for one.

    Raises:
        Elsewhere: it has failed in another process; of several the one of the lowest rank tells its error.
    """
    failed: Exception | None = None
    try:
        yield
    except Exception as error:
        if world() == 1:
            raise
        failed = error
    speaks = failed is not None and not isinstance(failed, Elsewhere)
    speaker = world() - most(world() - rank() if speaks else 0)
    if failed is not None and speaker in (rank(), world()):
        raise failed
    if speaker < world():
        raise Elsewhere(f"process {speaker} has failed")
