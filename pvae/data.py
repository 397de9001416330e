"""Data sets: fixed splits, resident or read from disk, and binarization as part of the data's identity."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import starmap
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pvae import ranks
from pvae.errors import UserError, nearest
from pvae.mapped import Mapped, available_memory, piece
from pvae.sources import NAMES, PARTS, TORCHVISION, hold_out, kinds_of, labels_of, read
from pvae.values import BINARIZATIONS, bernoulli, binarized, check_shape, checked, draw_once

__all__ = ["BINARIZATIONS", "NAMES", "Batch", "Dataset", "load"]

# The brightest level of pictures, which are read as intensities from 0 to 1.
TOP_LEVEL = {"digits": 16} | dict.fromkeys(TORCHVISION, 255)

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
            :class:`~pvae.mapped.Mapped`, which is indexed as a tensor is.
        shape: of one datapoint, for pictures.
        binarize: ``none``, ``threshold`` (x > 0.5), ``dynamic`` (drawn afresh for each batch) or ``levels`` (whole
            numbers from 0, as a picture is stored).
        train_labels, validation_labels, test_labels: class of each row, or None.
        classes: number of columns at the end of each row that hold its label, one-hot.
        means: of each column's training values, [D], where NaN marks entries that are missing; None where none may be.
        only: the labels of which these are all rows; None for all labels.
        label_names: the words that the labels number, if they are words in the file.
        columns: names of the columns, if the file has any.
    """

    name: str
    train: Tensor | Mapped
    validation: Tensor
    test: Tensor
    shape: tuple[int, ...]
    binarize: str = "none"
    train_labels: Tensor | None = None
    validation_labels: Tensor | None = None
    test_labels: Tensor | None = None
    classes: int = 0
    means: Tensor | None = None
    only: tuple[int, ...] | None = None
    label_names: tuple[str, ...] | None = None
    columns: tuple[str, ...] | None = None

    @property
    def missing(self) -> bool:
        """Whether NaN marks entries that are missing."""
        return self.means is not None

    @property
    def kinds(self) -> Tensor | None:
        """The different labels of all parts, sorted, which is the order of a label's columns; None without labels."""
        return kinds_of((self.train_labels, self.validation_labels, self.test_labels))

    @property
    def identity(self) -> str:
        """Name, binarization and what else rows differ by: nats on different identities can't be compared."""
        kind = ("-labelled" if self.classes else "") + ("-missing" if self.missing else "")
        return f"{self.name}-{self.binarize}{kind}" + (f"-only-{','.join(map(str, self.only))}" if self.only else "")

    @property
    def digest(self) -> str:
        """SHA-256 of the hashes of all rows in their order, first 16 hex digits."""
        return hashlib.sha256(b"".join(map(self._digest, PARTS))).hexdigest()[:16]

    def _digest(self, part: str) -> bytes:
        rows = getattr(self, part)
        known = rows.known if isinstance(rows, Mapped) else {}
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
        return self.train[: max(2, SAMPLE // self.train.shape[1])] if isinstance(self.train, Mapped) else self.train

    def pieces(self, part: str) -> Iterator[Batch]:
        """All rows of a part, few at a time, with their positions; those on disk come in the order of the file."""
        rows = getattr(self, part)
        if isinstance(rows, Mapped):
            return starmap(Batch, rows.pieces())
        size = piece(rows.shape[1])
        return map(Batch, rows.split(size), torch.arange(len(rows), device=rows.device).split(size))

    def to(self, device: torch.device) -> Dataset:
        """The same data with its rows on a device."""
        return replace(
            self, train=self.train.to(device), validation=self.validation.to(device), test=self.test.to(device)
        )

    def shard(self) -> Dataset:
        """The same data with those training rows that this process owns, counted from 0."""
        own = ranks.share(len(self.train))
        part = slice(own.start, own.stop)
        train = self.train.part(part) if isinstance(self.train, Mapped) else self.train[part]
        labels = None if self.train_labels is None else self.train_labels[part]
        return self if len(own) == len(self.train) else replace(self, train=train, train_labels=labels)

    def batches(
        self, batch_size: int, seed: int, epoch: int, start: int = 0, steps: int | None = None
    ) -> Iterator[Batch]:
        """The batches of one epoch, from batch ``start`` on, in the order that seed and epoch fix.

        Of so many ``steps`` as are told the last takes all rows that are left.
        """
        order = self.order(batch_size, seed, epoch, start, steps)
        if not isinstance(self.train, Mapped):
            yield from (Batch(self.rows(index), index) for index in order)
            return
        for x, index in self.train.batches(order):
            yield Batch(self._drawn(x), index)

    def order(
        self, batch_size: int, seed: int, epoch: int, start: int = 0, steps: int | None = None
    ) -> Iterator[Tensor]:
        """Which rows the batches of :meth:`batches` have."""
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        order = torch.randperm(len(self.train), generator=generator)
        order = order if isinstance(self.train, Mapped) else order.to(self.train.device)
        last = (steps or -(-len(order) // batch_size)) - 1
        for step in range(start, last + 1):
            yield order[step * batch_size : len(order) if step == last else (step + 1) * batch_size]

    def rows(self, index: Tensor) -> Tensor:
        """Training rows as a step sees them."""
        return self._drawn(self.train[index])

    def _drawn(self, x: Tensor) -> Tensor:
        if self.binarize != "dynamic":
            return x
        return bernoulli(x) if self.missing else torch.bernoulli(x)

    def fixed_train(self, rows: int | Tensor) -> Batch:
        """The first training rows, or those at some positions, as evaluation sees them.

        Under dynamic binarization these rows, and no others, are drawn once, with a fixed seed.
        """
        x = self.train[slice(rows) if isinstance(rows, int) else rows]
        x = draw_once(x.cpu()).to(x.device) if self.binarize == "dynamic" else x
        return Batch(x, torch.arange(len(x), device=x.device) if isinstance(rows, int) else rows)

    def summary(self) -> str:
        """One line: N, shape, range, support and binarization."""
        columns = self.train.shape[1] - self.classes
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
        how += f", each with its label of {self.classes}" if self.classes else ""
        how += f", {1 - there / (columns * len(self.train)):.1%} of the entries missing" if self.missing else ""
        how += ", read from disk as it goes" if isinstance(self.train, Mapped) else ""
        held_out = f"{len(self.validation)} validation + " if len(self.validation) else ""
        sizes = f"{len(self.train)} training + {held_out}{len(self.test)} test rows"
        shape = " x ".join(map(str, self.shape))
        return f"{self.identity}: {sizes} of {shape} values, {kind}, {how}"


def load(
    name: str,
    *,
    binarize: str = "none",
    folder: str | Path | None = None,
    test_size: float | None = None,
    validation_size: float = 0,
    seed: int = 0,
    with_labels: bool = False,
    missing: bool = False,
    only: Sequence[int] | None = None,
    stream: bool | None = None,
) -> Dataset:
    """Read a data set, check it, split it and binarize it.

    Arguments:
        name: one of ``NAMES``, or the path of a .npy, .npz, .csv or .parquet file.
        binarize: ``none``, ``threshold``, ``dynamic`` or ``levels``; ``threshold`` and ``dynamic`` take values in
            [0, 1], and ``levels`` gives whole numbers.
        folder: where torchvision's data sets are; else ``PVAE_DATA``, else the user's cache. What isn't there is
            downloaded.
        test_size: rows held out for the test, as a count or, below 1, as a fraction; unless given a fifth, but no
            more than 1 GiB. Data sets that come with a test set take none.
        validation_size: rows taken out of the training rows, likewise.
        seed: of the splits.
        with_labels: append each row's label, one-hot, for programs that take it.
        missing: let NaN mark entries that are missing; they stay NaN, binarized or not.
        only: keep rows of these labels alone, which leaves each in the part that it is in without.
        stream: leave the training rows of a .npy file on disk and read them as they are needed; unless given, where
            they would take more than half of the memory that is left. Batches, split and digest are the same.

    Raises:
        UserError: an unknown name; a file that is missing, broken or not numeric; NaN, unless it may be missing, or
            infinity (names the row); a column without any training value; values that can't be binarized; a split
            larger than the data; labels wanted where there are none.

    >>> load("digits", binarize="threshold").train.shape
    torch.Size([1438, 64])
    """
    if binarize not in BINARIZATIONS:
        raise UserError(f"unknown binarization '{binarize}'{nearest(binarize, BINARIZATIONS)}")
    rows = read(name, folder)
    split = partial(hold_out, test_size=test_size, validation_size=validation_size, seed=seed)
    if not _streams(name, rows["x_train"], stream):
        found = _resident(name, rows, binarize, split, with_labels, missing, only)
    elif with_labels or only is not None:
        who = "--only takes" if only is not None else "the program takes"
        raise UserError(f"{name}: {who} labels, and a .npy file has none; use an .npz with x and y")
    else:
        found = _streamed(Path(name), rows["x_train"], binarize, split, missing)
    return replace(found, means=_means(name, found)) if missing else found


def _resident(
    name: str,
    rows: dict[str, Any],
    binarize: str,
    split: Split,
    with_labels: bool,
    missing: bool,
    only: Sequence[int] | None,
) -> Dataset:
    for part in ("train", "test"):
        if f"x_{part}" in rows:
            where, x = f"{name} (test rows)" if part == "test" else name, np.asarray(rows[f"x_{part}"])
            check_shape(where, x)
            rows[f"x_{part}"] = checked(where, x, binarize, TOP_LEVEL.get(name, 1), missing=missing)
    split(name, rows, rows["x_train"][0].size)
    tensors = {part: torch.from_numpy(rows[f"x_{part}"]) for part in PARTS}
    labels, names = labels_of(name, rows)
    shape, other = tensors["train"].shape[1:], tensors["test"].shape[1:]
    if other != shape:
        raise UserError(f"{name}: test rows have shape {tuple(other)}, but training rows {tuple(shape)}")
    flat = binarized({part: values.flatten(1).contiguous() for part, values in tensors.items()}, binarize)
    classes = 0
    if only is not None:
        flat, labels = _only(name, flat, labels, only)
    if with_labels:
        flat, classes = _labelled(name, flat, labels)
    return Dataset(
        name if name in NAMES else Path(name).stem,
        **flat,
        shape=tuple(shape),
        binarize=binarize,
        train_labels=labels["train"],
        validation_labels=labels["validation"],
        test_labels=labels["test"],
        classes=classes,
        only=None if only is None else tuple(sorted(set(only))),
        label_names=names,
        columns=tuple(map(str, rows["columns"])) if "columns" in rows else None,
    )


def _only(
    name: str, x: dict[str, Tensor], labels: dict[str, Tensor | None], only: Sequence[int]
) -> tuple[dict[str, Tensor], dict[str, Tensor | None]]:
    """The rows of some labels, with these."""
    known = {part: values for part, values in labels.items() if values is not None}
    if any(len(rows) and part not in known for part, rows in x.items()):
        raise UserError(f"{name}: --only takes labels, and not all rows have one; add a column or array of labels")
    found = kinds_of(known.values())
    kinds = [] if found is None else found.tolist()
    wanted = ",".join(map(str, only))
    if not only or not set(only) <= set(kinds):
        which = next((kind for kind in only if kind not in kinds), "[]")
        raise UserError(f"{name}: --only {which}: no row has such a label; give some of {_listed(kinds)}")
    kept = {part: torch.isin(values, torch.as_tensor(only)) for part, values in known.items()}
    for part, rows in x.items():
        if len(rows) and part != "validation" and not kept[part].any():
            raise UserError(f"{name}: --only {wanted} leaves no {part} rows; give more labels, or hold out others")
    x = {part: rows[kept[part]] if part in kept else rows for part, rows in x.items()}
    return x, {part: None if values is None else values[kept[part]] for part, values in labels.items()}


def _listed(kinds: Sequence[float]) -> str:
    shown = ", ".join(f"{kind:g}" for kind in kinds[:20])
    return shown + (", ..." if len(kinds) > 20 else "")


def _means(name: str, data: Dataset) -> Tensor:
    """Means of the columns' training values that are there, [D]."""
    columns = data.train.shape[1]
    total, there = torch.zeros(columns, dtype=torch.double), torch.zeros(columns, dtype=torch.long)
    for x, _ in data.pieces("train"):
        total += x.double().nansum(0)
        there += (~x.isnan()).sum(0)
    if not there.all():
        place = np.unravel_index(int((there == 0).nonzero()[0]), data.shape)
        column = ", ".join(map(str, place))
        raise UserError(f"{name}: column {column} has no value in any of the {len(data.train)} training rows; drop it")
    return (total / there).float()


def _streams(name: str, x: np.ndarray, stream: bool | None) -> bool:
    if not isinstance(x, np.memmap):
        if stream:
            raise UserError(f"{name}: only a .npy file can be read as it goes; save the rows as one")
        return False
    return 4 * x.size > available_memory() / 2 if stream is None else stream


def _streamed(path: Path, x: np.ndarray, binarize: str, split: Split, missing: bool) -> Dataset:
    """The data of a .npy file whose training rows stay there; it is read once, to check every value."""
    check_shape(str(path), x)
    if not x.flags.c_contiguous:
        raise UserError(
            f"{path}: is stored column by column, so that rows can't be read; save np.ascontiguousarray of it"
        )
    columns = x[0].size
    rows: dict[str, Any] = {"x_train": np.arange(len(x))}
    split(str(path), rows, columns)
    held = len(rows["x_test"]) + len(rows["x_validation"])
    if 4 * held * columns > available_memory() / 2:
        raise UserError(
            f"{path}: {held} test and validation rows take {4 * held * columns / 2**30:.3g} GiB, more than half of the "
            "memory that is left; give counts as --test-size and --validation-size"
        )
    size = piece(columns)
    for first in (size * number for number in ranks.share(-(-len(x) // size))):
        checked(str(path), x[first : first + size], binarize, 1, first, missing=missing)
    parts = {part: Mapped(path, rows[f"x_{part}"], threshold=binarize == "threshold") for part in PARTS}
    held_out = binarized({part: parts[part].resident() for part in ("validation", "test")}, binarize)
    return Dataset(path.stem, parts["train"], held_out["validation"], held_out["test"], x.shape[1:], binarize)


def _labelled(name: str, x: dict[str, Tensor], labels: dict[str, Tensor | None]) -> tuple[dict[str, Tensor], int]:
    """Rows with their label, one-hot, as their last columns, and the number of classes."""
    known = {part: values for part, values in labels.items() if values is not None}
    if any(len(rows) and part not in known for part, rows in x.items()):
        raise UserError(f"{name}: the program takes labels, and not all rows have one; add a column or array of labels")
    kinds = kinds_of(known.values())
    assert kinds is not None  # training rows have labels
    found = dict(x)
    for part, values in known.items():
        hot = torch.nn.functional.one_hot(torch.searchsorted(kinds, values), len(kinds))
        found[part] = torch.cat([x[part], hot.to(x[part])], 1)
    if "validation" not in known:
        found["validation"] = found["train"][:0]
    return found, len(kinds)
