"""Dataset: fixed splits, in memory or memory-mapped, with the binarization as part of the data's identity."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import starmap
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pvae.data.memmap import MemmapRows, rows_per_chunk
from pvae.data.preprocessing import BINARIZATIONS, draw_bernoulli, draw_fixed_binarization
from pvae.data.sources import SPLITS, unique_labels
from pvae.runtime import distributed


class Batch(NamedTuple):
    """Rows x [B, D] and their positions among the training rows, index [B]."""

    x: Tensor
    index: Tensor  # type: ignore[assignment]


@dataclass(frozen=True, repr=False)
class Dataset:
    """Data with a fixed split, in memory or on the device; training rows may be memory-mapped.

    Attributes:
        name: where the data come from.
        train, validation, test: rows [N, D], [V, D], [M, D]; under dynamic binarization ``train`` holds the
            intensities, while validation and test are drawn once with a fixed seed. Training rows on disk are a
            `MemmapRows`, which is indexed as a tensor is.
        shape: of one datapoint, for pictures.
        binarize: ``none``, ``threshold`` (x > 0.5), ``dynamic`` (drawn afresh for each batch) or ``levels`` (whole
            numbers from 0, as a picture is stored).
        train_labels, validation_labels, test_labels: class of each row, or None.
        num_label_columns: number of columns at the end of each row that hold its label, one-hot.
        means: of each column's observed training values, [D], if NaN marks missing entries; else None.
        only_labels: the labels whose rows were selected; None for all.
        label_names: the words that the labels number, if they are words in the file.
        columns: names of the columns, if the file has any.
    """

    name: str
    train: Tensor | MemmapRows
    validation: Tensor
    test: Tensor
    shape: tuple[int, ...]
    binarize: str = "none"
    train_labels: Tensor | None = None
    validation_labels: Tensor | None = None
    test_labels: Tensor | None = None
    num_label_columns: int = 0
    means: Tensor | None = None
    only_labels: tuple[int, ...] | None = None
    label_names: tuple[str, ...] | None = None
    columns: tuple[str, ...] | None = None

    def __repr__(self) -> str:
        return f"Dataset {self.summary()}"

    @property
    def missing(self) -> bool:
        """Whether NaN marks missing entries."""
        return self.means is not None

    @property
    def labels(self) -> Tensor | None:
        """The distinct labels of all splits, sorted, which is the order of the label columns; None without labels."""
        return unique_labels((self.train_labels, self.validation_labels, self.test_labels))

    @property
    def identity(self) -> str:
        """Name, binarization and selection of rows: nats on different identities can't be compared."""
        suffix = ("-labelled" if self.num_label_columns else "") + ("-missing" if self.missing else "")
        suffix += f"-only-{','.join(map(str, self.only_labels))}" if self.only_labels else ""
        return f"{self.name}-{self.binarize}{suffix}"

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the hashes of all rows in their order, first 16 hex digits; computed once."""
        return hashlib.sha256(b"".join(map(self._split_digest, SPLITS))).hexdigest()[:16]

    def _split_digest(self, part: str) -> bytes:
        rows = getattr(self, part)
        cache = rows._cache if isinstance(rows, MemmapRows) else {}
        if "digest" not in cache:
            hashes = np.empty(len(rows), "V16")
            for x, index in self.iter_chunks(part):
                values = np.ascontiguousarray(x.cpu().numpy())
                hashes[index.cpu().numpy()] = [hashlib.sha256(row).digest()[:16] for row in values]
            cache["digest"] = hashlib.sha256(str(tuple(rows.shape)).encode() + hashes.tobytes()).digest()
        return cache["digest"]

    @property
    def sample(self) -> Tensor:
        """The training rows; of those on disk the first 64 MiB (2^24 values), which are in random order."""
        return self.train[: max(2, 2**24 // self.train.shape[1])] if isinstance(self.train, MemmapRows) else self.train

    def iter_chunks(self, part: str) -> Iterator[Batch]:
        """Yield all rows of a split, a chunk at a time, with their positions; those on disk in the file's order."""
        rows = getattr(self, part)
        if isinstance(rows, MemmapRows):
            return starmap(Batch, rows.iter_chunks())
        size = rows_per_chunk(rows.shape[1])
        return map(Batch, rows.split(size), torch.arange(len(rows), device=rows.device).split(size))

    def to(self, device: torch.device) -> Dataset:
        """Return the same data with its rows on a device."""
        rows: dict[str, Any] = {part: getattr(self, part).to(device) for part in SPLITS}
        return replace(self, **rows)

    def shard(self) -> Dataset:
        """Return the data with this process's shard of the training rows, numbered from 0."""
        shard = distributed.shard(len(self.train))
        if len(shard) == len(self.train):
            return self
        rows = slice(shard.start, shard.stop)
        train = self.train.subset(rows) if isinstance(self.train, MemmapRows) else self.train[rows]
        return replace(self, train=train, train_labels=None if self.train_labels is None else self.train_labels[rows])

    def batches(
        self, batch_size: int, seed: int, epoch: int, start: int = 0, steps: int | None = None
    ) -> Iterator[Batch]:
        """Yield the batches of one epoch, from batch ``start`` on, in the order that seed and epoch fix.

        With ``steps`` the epoch has so many batches, the last of which takes all rows that are left.
        """
        order, train = self.order(batch_size, seed, epoch, start, steps), self.train
        rows = train.batches(order) if isinstance(train, MemmapRows) else ((train[index], index) for index in order)
        for x, index in rows:
            yield Batch(self._draw(x), index)

    def order(
        self, batch_size: int, seed: int, epoch: int, start: int = 0, steps: int | None = None
    ) -> Iterator[Tensor]:
        """Yield the positions of the rows in each batch of `batches`."""
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        order = torch.randperm(len(self.train), generator=generator)
        order = order if isinstance(self.train, MemmapRows) else order.to(self.train.device)
        last = (steps or -(-len(order) // batch_size)) - 1
        for step in range(start, last + 1):
            yield order[step * batch_size : len(order) if step == last else (step + 1) * batch_size]

    def rows(self, index: Tensor) -> Tensor:
        """Return training rows as a training step sees them: drawn afresh under dynamic binarization."""
        return self._draw(self.train[index])

    def _draw(self, x: Tensor) -> Tensor:
        if self.binarize != "dynamic":
            return x
        return draw_bernoulli(x) if self.missing else torch.bernoulli(x)

    def fixed_train(self, rows: int | Tensor) -> Batch:
        """Return the first training rows, or those at given positions, as evaluation sees them.

        Under dynamic binarization these rows, and no others, are drawn once, with a fixed seed.
        """
        x = self.train[slice(rows) if isinstance(rows, int) else rows]
        x = draw_fixed_binarization(x.cpu()).to(x.device) if self.binarize == "dynamic" else x
        return Batch(x, torch.arange(len(x), device=x.device) if isinstance(rows, int) else rows)

    @cached_property
    def _value_range(self) -> tuple[float, float, int]:
        """Smallest, largest and number of observed training values; computed once."""
        columns = self.train.shape[1] - self.num_label_columns
        low, high, observed = np.inf, -np.inf, 0
        for x, _ in self.iter_chunks("train"):
            values = x[:, :columns]
            values = values[~values.isnan()] if self.missing else values
            if values.numel():
                low, high = min(low, values.min().item()), max(high, values.max().item())
            observed += values.numel()
        return low, high, observed

    def summary(self) -> str:
        """Return one line: sizes, shape, range of values and binarization."""
        columns = self.train.shape[1] - self.num_label_columns
        low, high, observed = self._value_range
        first = self.train[:1000][:, :columns]
        values_in = "0 or 1" if set(first[~first.isnan()].tolist()) <= {0.0, 1.0} else f"from {low:g} to {high:g}"
        how = BINARIZATIONS[self.binarize]
        how += f", each with its label of {self.num_label_columns}" if self.num_label_columns else ""
        how += f", {1 - observed / (columns * len(self.train)):.1%} of the entries missing" if self.missing else ""
        how += ", read from disk as it goes" if isinstance(self.train, MemmapRows) else ""
        validation = f"{len(self.validation)} validation + " if len(self.validation) else ""
        sizes = f"{len(self.train)} training + {validation}{len(self.test)} test rows"
        shape = " x ".join(map(str, self.shape))
        return f"{self.identity}: {sizes} of {shape} values, {values_in}, {how}"
