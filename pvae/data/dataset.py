"""Data sets: fixed splits, resident or read from disk, and binarization as part of the data's identity."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import starmap
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pvae.data.memmap import MemmapRows, rows_per_chunk
from pvae.data.preprocessing import draw_bernoulli, draw_fixed_binarization
from pvae.data.sources import SPLITS, unique_labels
from pvae.runtime import distributed

# Values of the first training rows that stand for all of those on disk: 64 MiB as float32.
SAMPLE = 2**24

# Takes test and validation rows of so many columns out of the training rows of a name.
Split = Callable[[str, dict[str, Any], int], None]


class Batch(NamedTuple):
    """Rows x [B, D] and which training datapoints they are, index [B]."""

    x: Tensor
    index: Tensor  # type: ignore[assignment]


@dataclass(frozen=True)
class Dataset:
    """Data split once and for all, resident in memory or on the device but for training rows that stay on disk.

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
        means: of each column's training values, [D], where NaN marks entries that are missing; None where none may be.
        only_labels: the labels of which these are all rows; None for all labels.
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

    @property
    def missing(self) -> bool:
        """Whether NaN marks entries that are missing."""
        return self.means is not None

    @property
    def labels(self) -> Tensor | None:
        """The different labels of all parts, sorted, which is the order of a label's columns; None without labels."""
        return unique_labels((self.train_labels, self.validation_labels, self.test_labels))

    @property
    def identity(self) -> str:
        """Name, binarization and what else rows differ by: nats on different identities can't be compared."""
        kind = ("-labelled" if self.num_label_columns else "") + ("-missing" if self.missing else "")
        return f"{self.name}-{self.binarize}{kind}" + (
            f"-only-{','.join(map(str, self.only_labels))}" if self.only_labels else ""
        )

    @property
    def digest(self) -> str:
        """SHA-256 of the hashes of all rows in their order, first 16 hex digits."""
        return hashlib.sha256(b"".join(map(self._digest, SPLITS))).hexdigest()[:16]

    def _digest(self, part: str) -> bytes:
        rows = getattr(self, part)
        known = rows.known if isinstance(rows, MemmapRows) else {}
        if "digest" not in known:
            marks = np.empty(len(rows), "V16")
            for x, index in self.pieces(part):
                values = np.ascontiguousarray(x.cpu().numpy())
                marks[index.cpu().numpy()] = [hashlib.sha256(row).digest()[:16] for row in values]
            known["digest"] = hashlib.sha256(str(tuple(rows.shape)).encode() + marks.tobytes()).digest()
        return known["digest"]

    @property
    def sample(self) -> Tensor:
        """The training rows, or of those on disk the first, which are in random order, that 64 MiB hold."""
        return self.train[: max(2, SAMPLE // self.train.shape[1])] if isinstance(self.train, MemmapRows) else self.train

    def pieces(self, part: str) -> Iterator[Batch]:
        """All rows of a part, few at a time, with their positions; those on disk come in the order of the file."""
        rows = getattr(self, part)
        if isinstance(rows, MemmapRows):
            return starmap(Batch, rows.pieces())
        size = rows_per_chunk(rows.shape[1])
        return map(Batch, rows.split(size), torch.arange(len(rows), device=rows.device).split(size))

    def to(self, device: torch.device) -> Dataset:
        """The same data with its rows on a device."""
        return replace(
            self, train=self.train.to(device), validation=self.validation.to(device), test=self.test.to(device)
        )

    def shard(self) -> Dataset:
        """The same data with those training rows that this process owns, counted from 0."""
        own = distributed.shard(len(self.train))
        part = slice(own.start, own.stop)
        train = self.train.part(part) if isinstance(self.train, MemmapRows) else self.train[part]
        labels = None if self.train_labels is None else self.train_labels[part]
        return self if len(own) == len(self.train) else replace(self, train=train, train_labels=labels)

    def batches(
        self, batch_size: int, seed: int, epoch: int, start: int = 0, steps: int | None = None
    ) -> Iterator[Batch]:
        """The batches of one epoch, from batch ``start`` on, in the order that seed and epoch fix.

        Of so many ``steps`` as are told the last takes all rows that are left.
        """
        order = self.order(batch_size, seed, epoch, start, steps)
        if not isinstance(self.train, MemmapRows):
            yield from (Batch(self.rows(index), index) for index in order)
            return
        for x, index in self.train.batches(order):
            yield Batch(self._drawn(x), index)

    def order(
        self, batch_size: int, seed: int, epoch: int, start: int = 0, steps: int | None = None
    ) -> Iterator[Tensor]:
        """Which rows the batches of `batches` have."""
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        order = torch.randperm(len(self.train), generator=generator)
        order = order if isinstance(self.train, MemmapRows) else order.to(self.train.device)
        last = (steps or -(-len(order) // batch_size)) - 1
        for step in range(start, last + 1):
            yield order[step * batch_size : len(order) if step == last else (step + 1) * batch_size]

    def rows(self, index: Tensor) -> Tensor:
        """Training rows as a step sees them."""
        return self._drawn(self.train[index])

    def _drawn(self, x: Tensor) -> Tensor:
        if self.binarize != "dynamic":
            return x
        return draw_bernoulli(x) if self.missing else torch.bernoulli(x)

    def fixed_train(self, rows: int | Tensor) -> Batch:
        """The first training rows, or those at some positions, as evaluation sees them.

        Under dynamic binarization these rows, and no others, are drawn once, with a fixed seed.
        """
        x = self.train[slice(rows) if isinstance(rows, int) else rows]
        x = draw_fixed_binarization(x.cpu()).to(x.device) if self.binarize == "dynamic" else x
        return Batch(x, torch.arange(len(x), device=x.device) if isinstance(rows, int) else rows)

    def summary(self) -> str:
        """One line: N, shape, range, support and binarization."""
        columns = self.train.shape[1] - self.num_label_columns
        first, low, high, there = self.train[:1000][:, :columns], np.inf, -np.inf, 0
        for x, _ in self.pieces("train"):
            values = x[:, :columns][~x[:, :columns].isnan()] if self.missing else x[:, :columns]
            if values.numel():
                low, high = min(low, values.min().item()), max(high, values.max().item())
            there += values.numel()
        kind = "0 or 1" if set(first[~first.isnan()].tolist()) <= {0.0, 1.0} else f"from {low:g} to {high:g}"
        how = {
            "none": "taken as they are",
            "threshold": "binarized at 0.5",
            "dynamic": "binarized afresh for each batch",
            "levels": "as whole numbers",
        }[self.binarize]
        how += f", each with its label of {self.num_label_columns}" if self.num_label_columns else ""
        how += f", {1 - there / (columns * len(self.train)):.1%} of the entries missing" if self.missing else ""
        how += ", read from disk as it goes" if isinstance(self.train, MemmapRows) else ""
        held_out = f"{len(self.validation)} validation + " if len(self.validation) else ""
        sizes = f"{len(self.train)} training + {held_out}{len(self.test)} test rows"
        shape = " x ".join(map(str, self.shape))
        return f"{self.identity}: {sizes} of {shape} values, {kind}, {how}"
