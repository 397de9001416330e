"""What PyTorch and Pyro keep for the whole process, made local: random streams, devices, parameters, validation."""

from __future__ import annotations

import functools
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyro
import torch
from torch import Tensor

from pvae.errors import UserError, nearest

DEVICES = ("auto", "cpu", "cuda")

Piece = TypeVar("Piece")


class RandomState:
    """Where the random streams of all devices in use stand; ``restore`` takes them back there.

    >>> here = RandomState(); a = torch.rand(1)
    >>> here.restore(); bool(a == torch.rand(1))
    True
    """

    def __init__(self) -> None:
        self.cpu = torch.get_rng_state()
        self.cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []

    def restore(self) -> None:
        """Let the next draws be those that followed when this was made."""
        torch.set_rng_state(self.cpu)
        if self.cuda:
            torch.cuda.set_rng_state_all(self.cuda)


def halve_on_oom(compute: Callable[[slice], Piece], total: int, size: int, what: str) -> Iterator[Piece]:
    """Apply a function to slices of a range, smaller ones where the device has no memory for so much at once.

    Arguments:
        compute: a slice to what is made of it; it may be called again, on the first half, with the random stream
            where it was.
        total: end of the range.
        size: of a slice, at most.
        what: the range counts, in the plural, for the line on standard error that tells of a smaller size.

    Raises:
        torch.OutOfMemoryError: a single one is too much.

    >>> list(halve_on_oom(lambda part: (part.start, part.stop), 5, 2, "rows"))
    [(0, 2), (2, 4), (4, 5)]
    """
    start, wanted = 0, size
    while start < total:
        part, before, made = slice(start, min(start + size, total)), RandomState(), None
        try:
            made = (compute(part),)
        except torch.OutOfMemoryError:
            if part.stop - part.start == 1:
                raise
        if made is None:  # here the error is gone, and with it the tensors that its frames held
            before.restore()
            torch.cuda.empty_cache()
            size = (part.stop - part.start) // 2
            continue
        if size < wanted:
            warn_once(f"the device is out of memory: going on with {size} instead of {wanted} {what} at a time")
            wanted = size
        yield made[0]
        start = part.stop


@functools.cache
def warn_once(line: str) -> None:
    """Write a line to standard error, the first time that it is said."""
    print(line, file=sys.stderr, flush=True)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Run a block on its own random stream; the stream outside goes on as if the block had not been.

    >>> _ = torch.manual_seed(0); a = torch.rand(1)
    >>> _ = torch.manual_seed(0)
    >>> with seeded(7): _ = torch.rand(100)
    >>> bool(a == torch.rand(1))
    True
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


@contextmanager
def no_validation() -> Iterator[None]:
    """Run a block without Pyro's and PyTorch's argument checks: data are checked once, at the door."""
    with pyro.validation_enabled(False):
        yield


def pick_device(name: str) -> torch.device:
    """The device that ``auto``, ``cpu`` or ``cuda`` names here; ``auto`` is CUDA where there is CUDA.

    Raises:
        UserError: the name is unknown, or CUDA is asked for where there is none.

    >>> pick_device("cpu")
    device(type='cpu')
    """
    if name.split(":")[0] not in DEVICES:
        raise UserError(f"unknown device '{name}'{nearest(name, DEVICES)}")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch sees no CUDA device on this machine; use --device auto or cpu")
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)


def available_memory() -> float:
    """Bytes that may still be taken: those the system calls available, within its control group's limit."""
    found = [math.inf]
    if "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):
        found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for file, unit in (("/proc/meminfo", 1024), ("/sys/fs/cgroup/memory.max", 1)):
        words = Path(file).read_text(encoding="ascii").split() if Path(file).is_file() else []
        place = words.index("MemAvailable:") + 1 if "MemAvailable:" in words else 0
        found += [unit * int(word) for word in words[place : place + 1] if word.isdigit()]
    return min(found)


def to_numpy(values: Tensor, dtype: Any = None) -> np.ndarray:
    """Return a tensor's values as an array in the CPU's memory, of another type if one is given."""
    return np.asarray(values.detach().cpu(), dtype=dtype)
