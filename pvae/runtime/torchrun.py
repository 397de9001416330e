"""Rank, world size and local rank from torchrun's environment variables. Imports no PyTorch."""

from __future__ import annotations

import os
from typing import NamedTuple


class RankInfo(NamedTuple):
    """Rank of this process, number of processes, and rank on this machine."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0


class PeerFailed(Exception):
    """Another rank failed and reports the error; this rank exits silently."""


def rank_info() -> RankInfo:
    """Return this process's ranks; rank 0 of 1 if torchrun did not start it together with others."""
    info = RankInfo(*(int(os.environ.get(name, "0")) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")))
    return info if info.world_size > 1 else RankInfo()


def is_peer_failure(error: Exception) -> bool:
    """Whether an error means that another rank is gone, which itself or ``torchrun`` reports."""
    gone = isinstance(error, RuntimeError) and any(word in str(error) for word in ("gloo", "Connection", "NCCL"))
    return rank_info().world_size > 1 and (gone or isinstance(error, PeerFailed))
