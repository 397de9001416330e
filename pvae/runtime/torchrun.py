"""Launch: what ``torchrun`` tells a process about itself and the others, before any of them has said a word."""

from __future__ import annotations

import os
from typing import NamedTuple


class RankInfo(NamedTuple):
    """Which process this is, from 0, and of how many; and its number on its own machine."""

    rank: int = 0
    world: int = 1
    local: int = 0


class PeerFailed(Exception):
    """Another process has failed, and says why; this one ends without a word."""


def rank_info() -> RankInfo:
    """This process's place; the only one of its kind, unless it was started with others."""
    place = RankInfo(*(int(os.environ.get(name, "0")) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")))
    return place if place.world > 1 else RankInfo()


def is_peer_failure(error: Exception) -> bool:
    """Whether an error says that another process is gone; that one has told why, or ``torchrun`` will.

    >>> is_peer_failure(RuntimeError("Connection closed by peer"))
    False
    """
    words = ("gloo", "Connection", "NCCL")
    gone = isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    return rank_info().world > 1 and (gone or isinstance(error, PeerFailed))
