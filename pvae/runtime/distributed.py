"""Distributed training by ``torchrun``: ranks, shards and collectives; a process alone is rank 0 of 1."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from pvae.errors import UserError, param
from pvae.runtime.torchrun import PeerFailed, RankInfo, rank_info

# The other ranks wait while the first reads all rows to check them; a rank that dies is noticed at once all the same.
TIMEOUT = timedelta(days=1)

_state = {"here": RankInfo()}


def init_process_group() -> None:
    """Join the processes that ``torchrun`` has started, if any."""
    if rank_info().world_size == 1:
        return
    if not dist.is_initialized():
        # Few numbers besides the gradients are sent; they stay on the CPU.
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=TIMEOUT)
    _state["here"] = rank_info()


def destroy_process_group() -> None:
    """Leave the other processes."""
    if world_size() > 1:
        dist.destroy_process_group()
        _state["here"] = RankInfo()


def local_device(device: torch.device) -> torch.device:
    """Return this process's own device of a kind: on CUDA that of its local rank."""
    local_rank = _state["here"].local_rank
    if world_size() == 1 or device.type != "cuda":
        return device
    if local_rank >= torch.cuda.device_count():
        lacking = f"process {local_rank} of this machine has no CUDA device, there are {torch.cuda.device_count()}"
        raise UserError(lacking, hint=f"give torchrun as many --nproc-per-node, or set {param('device', 'cpu')}")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def world_size() -> int:
    """Return W, the number of processes that share a training."""
    return _state["here"].world_size


def rank() -> int:
    """Return this process's number among them, from 0."""
    return _state["here"].rank


def is_main_process() -> bool:
    """Whether this process prints and writes for all: rank 0."""
    return rank() == 0


def shards(total: int) -> list[range]:
    """Return the rows of each rank: contiguous, with lengths that differ by at most one."""
    size = world_size()
    return [range(number * total // size, (number + 1) * total // size) for number in range(size)]


def shard(total: int) -> range:
    """Return the rows of this rank."""
    return shards(total)[rank()]


def rank_seed(seed: int) -> int:
    """Return the seed of this rank's own batches and draws; the seed itself for a single process."""
    return seed if world_size() == 1 else int(np.random.SeedSequence([seed, rank()]).generate_state(1)[0])


def _collect(tensor: Tensor, collective: Callable[..., Any], *args: Any) -> Any:
    if world_size() > 1:
        collective(tensor, *args)
    return tensor.item()


def broadcast_int(value: int) -> int:
    """Broadcast an integer from rank 0."""
    return _collect(torch.tensor(int(value)), dist.broadcast, 0)


def all_reduce_max(value: int) -> int:
    """Return the maximum over all ranks."""
    return _collect(torch.tensor(int(value)), dist.all_reduce, dist.ReduceOp.MAX)


def all_reduce_sum(value: float) -> float:
    """Return the sum over all ranks, in double precision."""
    return _collect(torch.tensor(value, dtype=torch.double), dist.all_reduce)


@contextmanager
def fail_together() -> Iterator[None]:
    """Raise on every rank if the block raises on any: the lowest its own error, those without one `PeerFailed`."""
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        if world_size() == 1:
            raise
        failure = error
    reports = failure is not None and not isinstance(failure, PeerFailed)
    reporter = world_size() - all_reduce_max(world_size() - rank() if reports else 0)
    if failure is not None and reporter in (rank(), world_size()):
        raise failure
    if reporter < world_size():
        raise PeerFailed(f"process {reporter} has failed")
