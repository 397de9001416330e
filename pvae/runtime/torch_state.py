"""Process-wide state of PyTorch and Pyro made local: random streams, devices, memory, validation."""

from __future__ import annotations

import functools
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyro
import torch
from torch import Tensor

from pvae.errors import UserError, nearest, param

DEVICES = ("auto", "cpu", "cuda")

Batch = TypeVar("Batch")


class RandomState:
    """Snapshot of the random streams of all devices in use; ``restore`` takes them back to it.

    >>> state = RandomState(); a = torch.rand(1)
    >>> state.restore(); bool(a == torch.rand(1))
    True
    """

    def __init__(self) -> None:
        self.cpu = torch.get_rng_state()
        self.cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []

    def restore(self) -> None:
        """Restore the streams: the next draws are those that followed the snapshot."""
        torch.set_rng_state(self.cpu)
        if self.cuda:
            torch.cuda.set_rng_state_all(self.cuda)


def halve_on_oom(compute: Callable[[slice], Batch], total: int, size: int, what: str) -> Iterator[Batch]:
    """Yield a function of consecutive slices of a range, and halve the slices when the device is out of memory.

    Arguments:
        compute: function of a slice; it may be called again on the first half, with the random stream restored.
        size: maximum length of a slice.
        what: the range counts, in the plural, for the line on standard error that reports a smaller size.
    """
    start, reported = 0, size
    while start < total:
        part, before, result = slice(start, min(start + size, total)), RandomState(), None
        try:
            result = (compute(part),)
        except torch.OutOfMemoryError:
            if part.stop - part.start == 1:
                raise
        if result is None:  # here the error is gone, and with it the tensors that its frames held
            before.restore()
            torch.cuda.empty_cache()
            size = (part.stop - part.start) // 2
            continue
        if size < reported:
            warn_once(f"the device is out of memory: going on with {size} instead of {reported} {what} at a time")
            reported = size
        yield result[0]
        start = part.stop


@functools.cache
def warn_once(line: str) -> None:
    """Write a line to standard error, the first time that it is called with it."""
    print(line, file=sys.stderr, flush=True)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Run a block with a seed of its own and restore the random stream at its end.

    >>> _ = torch.manual_seed(0); a = torch.rand(1)
    >>> _ = torch.manual_seed(0)
    >>> with seeded(7): _ = torch.rand(100)
    >>> bool(a == torch.rand(1))
    True
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def no_validation() -> AbstractContextManager[None]:
    """Run a block without Pyro's and PyTorch's argument checks: data are checked once, when they are loaded."""
    return pyro.validation_enabled(False)


def pick_device(name: str) -> torch.device:
    """Return the device that ``auto``, ``cpu`` or ``cuda`` names; ``auto`` is CUDA if there is any.

    Raises:
        UserError: the name is unknown, or there is no CUDA device.

    >>> pick_device("cpu")
    device(type='cpu')
    """
    if name.split(":")[0] not in DEVICES:
        raise UserError(f"unknown device '{name}'{nearest(name, DEVICES)}")
    if name.startswith("cuda") and not torch.cuda.is_available():
        wrong, right = param("device", "cuda"), param("device", "auto")
        raise UserError(f"{wrong}: PyTorch sees no CUDA device on this machine", hint=f"use {right} or cpu")
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)


def available_memory() -> float:
    """Return the bytes that the system calls available, within the limit of the process's control group."""
    limits = [math.inf]
    if "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for file, unit in (("/proc/meminfo", 1024), ("/sys/fs/cgroup/memory.max", 1)):
        words = Path(file).read_text(encoding="ascii").split() if Path(file).is_file() else []
        place = words.index("MemAvailable:") + 1 if "MemAvailable:" in words else 0
        limits += [unit * int(word) for word in words[place : place + 1] if word.isdigit()]
    return min(limits)


def to_numpy(values: Tensor, dtype: Any = None) -> np.ndarray:
    """Return a tensor's values as an array in the CPU's memory, of another type if one is given."""
    return np.asarray(values.detach().cpu(), dtype=dtype)
