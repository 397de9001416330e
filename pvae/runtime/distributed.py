"""Ranks: the processes that share one training, as ``torchrun`` starts them. A process alone is rank 0 of 1."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist

from pvae.errors import UserError
from pvae.runtime.torchrun import PeerFailed, RankInfo, rank_info

# The other ranks wait while the first reads all rows to check them; a rank that dies is noticed at once all the same.
TIMEOUT = timedelta(days=1)

_state = {"here": RankInfo()}


def init_process_group() -> None:
    """Join the processes that ``torchrun`` has started, if it has: from then on a training is shared by them all."""
    if rank_info().world == 1:
        return
    if not dist.is_initialized():
        # Few numbers besides the gradients are told; they stay on the CPU.
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=TIMEOUT)
    _state["here"] = rank_info()


def destroy_process_group() -> None:
    """Be alone again."""
    if world_size() > 1:
        dist.destroy_process_group()
        _state["here"] = RankInfo()


def local_device(device: torch.device) -> torch.device:
    """The device of its kind that is this process's own: on CUDA the one of its number on its machine."""
    number = _state["here"].local
    if world_size() == 1 or device.type != "cuda":
        return device
    if number >= torch.cuda.device_count():
        raise UserError(
            f"process {number} of this machine has no CUDA device of its own, there are {torch.cuda.device_count()}; "
            "give torchrun as many --nproc-per-node, or pvae --device cpu"
        )
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


def world_size() -> int:
    """W, the number of processes that share a training."""
    return _state["here"].world


def is_main_process() -> bool:
    """Whether this process is the one that speaks and writes for all."""
    return rank() == 0


def rank() -> int:
    """Which of these processes this is, from 0."""
    return _state["here"].rank


def shards(total: int) -> list[range]:
    """Which of so many rows each process owns: stretches whose lengths differ by one at most.

    >>> shards(10)
    [range(0, 10)]
    """
    among = world_size()
    return [range(each * total // among, (each + 1) * total // among) for each in range(among)]


def shard(total: int) -> range:
    """Which of so many rows this process owns."""
    return shards(total)[rank()]


def rank_seed(seed: int) -> int:
    """The seed of this process's own batches and draws; one alone has the seed itself."""
    return seed if world_size() == 1 else int(np.random.SeedSequence([seed, rank()]).generate_state(1)[0])


def broadcast_int(value: int) -> int:
    """What the first process has."""
    found = torch.tensor(int(value))
    if world_size() > 1:
        dist.broadcast(found, 0)
    return int(found)


def all_reduce_max(value: int) -> int:
    """The largest that any process has."""
    found = torch.tensor(int(value))
    if world_size() > 1:
        dist.all_reduce(found, dist.ReduceOp.MAX)
    return int(found)


def all_reduce_sum(value: float) -> float:
    """The sum of what the processes have."""
    found = torch.tensor(value, dtype=torch.double)
    if world_size() > 1:
        dist.all_reduce(found)
    return float(found)


@contextmanager
def fail_together() -> Iterator[None]:
    """Run a block that all processes run, and let it fail for all if it fails for one.

    Raises:
        PeerFailed: it has failed in another process; of several the one of the lowest rank tells its error.
    """
    failed: Exception | None = None
    try:
        yield
    except Exception as error:
        if world_size() == 1:
            raise
        failed = error
    speaks = failed is not None and not isinstance(failed, PeerFailed)
    speaker = world_size() - all_reduce_max(world_size() - rank() if speaks else 0)
    if failed is not None and speaker in (rank(), world_size()):
        raise failed
    if speaker < world_size():
        raise PeerFailed(f"process {speaker} has failed")
