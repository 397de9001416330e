"""Clocks that every group shares, without PyTorch, so that a peer's memory can be measured without ours."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

import numpy as np


class Trainer(Protocol):
    """Trains one model on resident rows, from where the last call left it."""

    def seconds(self, count: int) -> list[float]:
        """Seconds of each of so many epochs."""


class Peer:
    """A :class:`Trainer` of whom nothing is asked but an epoch, and its weights for a judge."""

    def epoch(self) -> None:
        """Visit each row once, in random order, and wait until it is done."""
        raise NotImplementedError

    def weights(self) -> list[np.ndarray]:
        """W1, b1, W2, b2 of the encoder to (mean, log scale), then of the decoder; W is [outputs, inputs]."""
        raise NotImplementedError

    def seconds(self, count: int) -> list[float]:
        return [timed(self.epoch) for _ in range(count)]


def timed(job: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds that a job takes."""
    start = clock()
    job()
    return clock() - start


def medians(
    jobs: Mapping[str, Callable[[], object]], repeats: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """Median seconds of each job; the jobs take turns, so that a slow spell of the machine hits all.

    Jobs that wait for nothing go by ``time.process_time``, which leaves out what other processes take.
    """
    return in_turns({name: lambda job=job: timed(job, clock) for name, job in jobs.items()}, repeats, 3)


def epochs_in_turns(trainers: Mapping[str, Trainer], repeats: int) -> dict[str, float]:
    """Median seconds of an epoch of each: a turn is two epochs, of which the second counts."""
    return in_turns({name: lambda it=it: it.seconds(2)[-1] for name, it in trainers.items()}, repeats, 1)


def in_turns(measures: Mapping[str, Callable[[], float]], repeats: int, warm_up: int) -> dict[str, float]:
    """Median of what each measure says, after some turns that don't count."""
    said = [{name: measure() for name, measure in measures.items()} for _ in range(warm_up + repeats)][warm_up:]
    return {name: statistics.median(turn[name] for turn in said) for name in measures}


def peak_memory() -> int:
    """Bytes of the most memory that this process has held (Linux).

    Not ``ru_maxrss``: a child starts with its parent's.
    """
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
