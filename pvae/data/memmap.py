"""Rows that stay on disk: a ``.npy`` file read as it goes, the next batches ahead of the one in use."""

from __future__ import annotations

import copy
import math
import mmap
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pvae.data.readers import read_table
from pvae.errors import UserError

# Threads that read, and batches that they are ahead. Reads at random places of a file larger than memory wait for the
# disk, and the two waits overlap: 153 instead of 78 batches of 128 pictures a second; four threads gave 163.
READERS, AHEAD = 2, 4

# Values in a piece, where all rows are looked at: 4 MiB as float32.
CHUNK_BYTES = 2**20


def rows_per_chunk(columns: int) -> int:
    """Rows that are looked at together where all are."""
    return max(1, CHUNK_BYTES // columns)


class MemmapRows:
    """Some rows of a ``.npy`` file, in an order of their own, that are read when they are indexed.

    It is indexed by a slice or a tensor of positions, as a tensor of rows [N, D] is, and gives a float32 tensor [B, D].
    Threads read ahead, not processes as those of PyTorch's ``DataLoader``: NumPy lets go of the interpreter while it
    copies rows, and nothing is forked, pickled or started anew each epoch.

    Arguments:
        path: of the file.
        rows: which of its rows these are, [N]; all of them unless given.
        threshold: 1 where a value is above 0.5, else 0; NaN stays NaN.

    Raises:
        UserError: a file that can't be mapped; when rows are read, one that has changed since.
    """

    def __init__(self, path: Path, rows: np.ndarray | None = None, *, threshold: bool = False) -> None:
        self.path, self.threshold, self.device = path, threshold, torch.device("cpu")
        self.stamp = _stamp(path)
        self.values: Any = read_table(path)["x_train"]
        self.rows = np.arange(len(self.values)) if rows is None else rows
        self.shape = (len(self.rows), math.prod(self.values.shape[1:]))
        self.known: dict[str, bytes] = {}  # what took a pass over the file; copies on other devices share it

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, which: slice | Tensor) -> Tensor:
        places = self.rows[which if isinstance(which, slice) else which.cpu().numpy()]
        return self._read(places).to(self.device)

    @property
    def is_cuda(self) -> bool:
        """Whether rows are handed out on a GPU."""
        return self.device.type == "cuda"

    def to(self, device: torch.device) -> MemmapRows:
        """The same rows, handed out on a device."""
        moved = copy.copy(self)
        moved.device = torch.device(device)
        return moved

    def part(self, which: slice) -> MemmapRows:
        """Some of these rows, which forgets the others."""
        found = copy.copy(self)
        found.rows, found.known = self.rows[which].copy(), {}
        found.shape = (len(found.rows), self.shape[1])
        return found

    def batches(self, indices: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """The rows at each tensor of positions, with these, both on the device; the next ones are read meanwhile."""
        self._advise("MADV_RANDOM")  # else each row brings 128 KiB of its neighbours with it: a quarter of the speed
        return self._ahead(indices)

    def pieces(self) -> Iterator[tuple[Tensor, Tensor]]:
        """All rows once, in the order of the file, a piece at a time, each with its positions."""
        self._advise("MADV_NORMAL")
        return self._ahead(torch.from_numpy(self.rows.argsort()).split(rows_per_chunk(self.shape[1])))

    def resident(self) -> Tensor:
        """All rows as one tensor in memory."""
        found = torch.empty(self.shape)
        for x, index in self.to(torch.device("cpu")).pieces():
            found[index] = x
        return found

    def _ahead(self, indices: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        wanted = iter(indices)
        with ThreadPoolExecutor(READERS, "pvae-rows") as pool:
            waiting = deque((pool.submit(self._fetch, index), index) for index in islice(wanted, AHEAD))
            try:
                while waiting:
                    fetched, index = waiting.popleft()
                    x = fetched.result()
                    waiting.extend((pool.submit(self._fetch, index), index) for index in islice(wanted, 1))
                    yield x.to(self.device, non_blocking=True), index.to(self.device, non_blocking=True)
            finally:
                for fetched, _ in waiting:
                    fetched.cancel()

    def _fetch(self, index: Tensor) -> Tensor:
        x = self._read(self.rows[index.numpy()])
        return x.pin_memory() if self.is_cuda else x

    def _read(self, places: np.ndarray) -> Tensor:
        if _stamp(self.path) != self.stamp:
            raise UserError(f"{self.path}: the file has changed since it was opened; put it back, or start anew")
        # NumPy's arithmetic: in threads beside the training's, PyTorch's would start a team of threads for each.
        x = self.values[places].reshape(len(places), self.shape[1]).astype(np.float32, copy=False)
        return torch.from_numpy(np.where(np.isnan(x), np.float32(np.nan), x > 0.5) if self.threshold else x)

    def _advise(self, kind: str) -> None:
        if isinstance(self.values.base, mmap.mmap) and hasattr(mmap, kind):
            self.values.base.madvise(getattr(mmap, kind))


def _stamp(path: Path) -> tuple[int, ...]:
    """What is told of a file without reading it, and changes with it."""
    try:
        found = path.stat()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; its rows are read as they are needed") from error
    return found.st_ino, found.st_size, found.st_mtime_ns
