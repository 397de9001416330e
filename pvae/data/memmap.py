"""Memory-mapped rows of a ``.npy`` file, read ahead of the training that takes them."""

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

# Values in a chunk, when all rows are read in turn: 4 MiB as float32.
CHUNK_VALUES = 2**20


def rows_per_chunk(columns: int) -> int:
    """Return how many rows of so many columns a chunk holds."""
    return max(1, CHUNK_VALUES // columns)


class MemmapRows:
    """Memory-mapped rows of a ``.npy`` file, in an order of their own, read when they are indexed.

    It is indexed by a slice or a tensor of positions, as a tensor of rows [N, D] is, and gives a float32 tensor [B, D].
    Threads read ahead, not processes as those of PyTorch's ``DataLoader``: NumPy releases the interpreter lock while it
    copies rows, and nothing is forked, pickled or started anew each epoch.

    Arguments:
        path: of the file.
        rows: positions in the file, [N]; all unless given.
        threshold: give 1 where a value is above 0.5, else 0; NaN stays NaN.

    Raises:
        UserError: the file can't be mapped; when rows are read: it has changed since.
    """

    def __init__(self, path: Path, rows: np.ndarray | None = None, *, threshold: bool = False) -> None:
        self.path, self.threshold, self.device = path, threshold, torch.device("cpu")
        self.stamp = _stamp(path)
        self.values: Any = read_table(path)["x_train"]
        self.rows = np.arange(len(self.values)) if rows is None else rows
        self._cache: dict[str, bytes] = {}  # results of a pass over the rows; copies on other devices share it

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def shape(self) -> tuple[int, int]:
        """Number of rows and of columns, (N, D)."""
        return len(self.rows), math.prod(self.values.shape[1:])

    def __getitem__(self, which: slice | Tensor) -> Tensor:
        positions = self.rows[which if isinstance(which, slice) else which.cpu().numpy()]
        return self._read(positions).to(self.device)

    @property
    def is_cuda(self) -> bool:
        """Whether rows are handed out on a GPU."""
        return self.device.type == "cuda"

    def to(self, device: torch.device) -> MemmapRows:
        """Return the same rows, handed out on a device."""
        moved = copy.copy(self)
        moved.device = torch.device(device)
        return moved

    def subset(self, which: slice) -> MemmapRows:
        """Return the rows in a slice, numbered from 0."""
        subset = copy.copy(self)
        subset.rows, subset._cache = self.rows[which].copy(), {}
        return subset

    def batches(self, indices: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the rows at each tensor of positions, with these, both on the device; read the next ones meanwhile."""
        self._advise("MADV_RANDOM")  # else each row brings 128 KiB of its neighbours with it: a quarter of the speed
        return self._read_ahead(indices)

    def iter_chunks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield all rows once, in the order of the file, a chunk at a time, each with its positions."""
        self._advise("MADV_NORMAL")
        return self._read_ahead(torch.from_numpy(self.rows.argsort()).split(rows_per_chunk(self.shape[1])))

    def to_tensor(self) -> Tensor:
        """Return all rows as one tensor in memory."""
        tensor = torch.empty(self.shape)
        for x, index in self.to(torch.device("cpu")).iter_chunks():
            tensor[index] = x
        return tensor

    def _read_ahead(self, indices: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        remaining = iter(indices)
        with ThreadPoolExecutor(READERS, "pvae-rows") as pool:
            waiting = deque((pool.submit(self._fetch, index), index) for index in islice(remaining, AHEAD))
            try:
                while waiting:
                    fetched, index = waiting.popleft()
                    x = fetched.result()
                    waiting.extend((pool.submit(self._fetch, index), index) for index in islice(remaining, 1))
                    yield x.to(self.device, non_blocking=True), index.to(self.device, non_blocking=True)
            finally:
                for fetched, _ in waiting:
                    fetched.cancel()

    def _fetch(self, index: Tensor) -> Tensor:
        x = self._read(self.rows[index.numpy()])
        return x.pin_memory() if self.is_cuda else x

    def _read(self, positions: np.ndarray) -> Tensor:
        if _stamp(self.path) != self.stamp:
            raise UserError(f"{self.path}: the file has changed since it was opened; put it back, or start anew")
        # NumPy's arithmetic: in threads beside the training's, PyTorch's would start a team of threads for each.
        x = self.values[positions].reshape(len(positions), self.shape[1]).astype(np.float32, copy=False)
        return torch.from_numpy(np.where(np.isnan(x), np.float32(np.nan), x > 0.5) if self.threshold else x)

    def _advise(self, kind: str) -> None:
        if isinstance(self.values.base, mmap.mmap) and hasattr(mmap, kind):
            self.values.base.madvise(getattr(mmap, kind))


def _stamp(path: Path) -> tuple[int, ...]:
    """Return what changes with a file and is known without reading it."""
    try:
        status = path.stat()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; its rows are read as they are needed") from error
    return status.st_ino, status.st_size, status.st_mtime_ns
