"""Data sets: fixed splits, resident or read from disk, and binarization as part of the data's identity."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import starmap
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pvae import ranks
from pvae.errors import UserError, nearest
from pvae.files import read_table
from pvae.mapped import Mapped, available_memory, piece
from pvae.values import BINARIZATIONS, FIXED_SEED, binarized, check_shape, checked, draw_once

__all__ = ["BINARIZATIONS", "NAMES", "Batch", "Dataset", "load"]

TORCHVISION = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST", "kmnist": "KMNIST"}
NAMES = ("digits", *TORCHVISION)

# The brightest level of pictures, which are read as intensities from 0 to 1.
TOP_LEVEL = {"digits": 16} | dict.fromkeys(TORCHVISION, 255)

PARTS = ("train", "validation", "test")

# Values of the test rows that are held out unless told, at most: 1 GiB as float32. It depends on the data alone, lest
# the same file be split in another way where memory is short.
HELD_OUT = 2**28

# Values of the first training rows that stand for all of those on disk: 64 MiB as float32.
SAMPLE = 2**24


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
        train_labels, test_labels: class of each row, or None.
        classes: number of columns at the end of each row that hold its label, one-hot.
    """

    name: str
    train: Tensor | Mapped
    validation: Tensor
    test: Tensor
    shape: tuple[int, ...]
    binarize: str = "none"
    train_labels: Tensor | None = None
    test_labels: Tensor | None = None
    classes: int = 0

    @property
    def identity(self) -> str:
        """Name and binarization: nats on different identities can't be compared."""
        return f"{self.name}-{self.binarize}" + ("-labelled" if self.classes else "")

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
        return torch.bernoulli(x) if self.binarize == "dynamic" else x

    def fixed_train(self, rows: int) -> Batch:
        """The first training rows as evaluation sees them: under dynamic binarization drawn once, with a fixed seed."""
        x = self.train[:rows]
        x = draw_once(x.cpu()).to(x.device) if self.binarize == "dynamic" else x
        return Batch(x, torch.arange(len(x), device=x.device))

    def summary(self) -> str:
        """One line: N, shape, range, support and binarization."""
        columns = self.train.shape[1] - self.classes
        lows, highs = zip(*(x[:, :columns].aminmax() for x, _ in self.pieces("train")), strict=True)
        first = set(self.train[:1000][:, :columns].unique().tolist())
        kind = "0 or 1" if first <= {0.0, 1.0} else f"from {min(lows).item():g} to {max(highs).item():g}"
        how = {
            "none": "taken as they are",
            "threshold": "binarized at 0.5",
            "dynamic": "binarized afresh for each batch",
            "levels": "as whole numbers",
        }[self.binarize]
        how += f", each with its label of {self.classes}" if self.classes else ""
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
        stream: leave the training rows of a .npy file on disk and read them as they are needed; unless given, where
            they would take more than half of the memory that is left. Batches, split and digest are the same.

    Raises:
        UserError: an unknown name; a file that is missing, broken or not numeric; NaN or infinity (names the row);
            values that can't be binarized; a split larger than the data; labels wanted where there are none.

    >>> load("digits", binarize="threshold").train.shape
    torch.Size([1438, 64])
    """
    if binarize not in BINARIZATIONS:
        raise UserError(f"unknown binarization '{binarize}'{nearest(binarize, BINARIZATIONS)}")
    rows = _read(name, folder)
    if _streams(name, rows["x_train"], stream):
        if with_labels:
            raise UserError(f"{name}: the program takes labels, and a .npy file has none; use an .npz with x and y")
        return _streamed(Path(name), rows["x_train"], binarize, test_size, validation_size, seed)
    for part in ("train", "test"):
        if f"x_{part}" in rows:
            where, x = f"{name} (test rows)" if part == "test" else name, np.asarray(rows[f"x_{part}"])
            check_shape(where, x)
            rows[f"x_{part}"] = checked(where, x, binarize, TOP_LEVEL.get(name, 1))
    _hold_out(name, rows, rows["x_train"][0].size, test_size, validation_size, seed)
    tensors = {part: torch.from_numpy(rows[f"x_{part}"]) for part in PARTS}
    labels = _labels(name, rows)
    shape, other = tensors["train"].shape[1:], tensors["test"].shape[1:]
    if other != shape:
        raise UserError(f"{name}: test rows have shape {tuple(other)}, but training rows {tuple(shape)}")
    flat = binarized({part: values.flatten(1).contiguous() for part, values in tensors.items()}, binarize)
    classes = 0
    if with_labels:
        flat, classes = _labelled(name, flat, labels)
    return Dataset(
        name if name in NAMES else Path(name).stem,
        **flat,
        shape=tuple(shape),
        binarize=binarize,
        train_labels=labels["train"],
        test_labels=labels["test"],
        classes=classes,
    )


def _streams(name: str, x: np.ndarray, stream: bool | None) -> bool:
    if not isinstance(x, np.memmap):
        if stream:
            raise UserError(f"{name}: only a .npy file can be read as it goes; save the rows as one")
        return False
    return 4 * x.size > available_memory() / 2 if stream is None else stream


def _streamed(
    path: Path, x: np.ndarray, binarize: str, test_size: float | None, validation_size: float, seed: int
) -> Dataset:
    """The data of a .npy file whose training rows stay there; it is read once, to check every value."""
    check_shape(str(path), x)
    if not x.flags.c_contiguous:
        raise UserError(
            f"{path}: is stored column by column, so that rows can't be read; save np.ascontiguousarray of it"
        )
    columns = x[0].size
    rows: dict[str, Any] = {"x_train": np.arange(len(x))}
    _hold_out(str(path), rows, columns, test_size, validation_size, seed)
    held = len(rows["x_test"]) + len(rows["x_validation"])
    if 4 * held * columns > available_memory() / 2:
        raise UserError(
            f"{path}: {held} test and validation rows take {4 * held * columns / 2**30:.3g} GiB, more than half of the "
            "memory that is left; give counts as --test-size and --validation-size"
        )
    size = piece(columns)
    for first in (size * number for number in ranks.share(-(-len(x) // size))):
        checked(str(path), x[first : first + size], binarize, 1, first)
    parts = {part: Mapped(path, rows[f"x_{part}"], threshold=binarize == "threshold") for part in PARTS}
    held_out = binarized({part: parts[part].resident() for part in ("validation", "test")}, binarize)
    return Dataset(path.stem, parts["train"], held_out["validation"], held_out["test"], x.shape[1:], binarize)


def _labelled(name: str, x: dict[str, Tensor], labels: dict[str, Tensor | None]) -> tuple[dict[str, Tensor], int]:
    """Rows with their label, one-hot, as their last columns, and the number of classes."""
    known = {part: values for part, values in labels.items() if values is not None}
    if any(len(rows) and part not in known for part, rows in x.items()):
        raise UserError(f"{name}: the program takes labels, and not all rows have one; add a column or array of labels")
    kinds = torch.cat(list(known.values())).unique()
    found = dict(x)
    for part, values in known.items():
        hot = torch.nn.functional.one_hot(torch.searchsorted(kinds, values), len(kinds))
        found[part] = torch.cat([x[part], hot.to(x[part])], 1)
    if "validation" not in known:
        found["validation"] = found["train"][:0]
    return found, len(kinds)


def _labels(name: str, rows: dict[str, Any]) -> dict[str, Tensor | None]:
    """Classes as numbers; words are numbered in alphabetical order."""
    known = [part for part in PARTS if f"y_{part}" in rows]
    whole = np.concatenate([np.asarray(rows[f"y_{part}"]) for part in known]) if known else np.zeros(0)
    if any(value is None or value != value for value in whole.tolist()):
        raise UserError(f"{name}: row {_first_missing(whole)} has no label; fill it in, or leave the labels out")
    if whole.dtype.kind not in "biuf":
        numbers = np.unique(whole.astype(str), return_inverse=True)[1]
        parts = np.split(numbers, np.cumsum([len(rows[f"y_{part}"]) for part in known])[:-1])
        rows = rows | {f"y_{part}": values for part, values in zip(known, parts, strict=False)}
    return {part: torch.as_tensor(rows[f"y_{part}"]) if part in known else None for part in PARTS}


def _first_missing(labels: np.ndarray) -> int:
    return next(i for i, value in enumerate(labels.tolist()) if value is None or value != value)


def _hold_out(
    name: str, rows: dict[str, Any], columns: int, test_size: float | None, validation_size: float, seed: int
) -> None:
    """Take test rows, where there are none, and validation rows out of the training rows."""
    generator = torch.Generator().manual_seed(seed + FIXED_SEED)
    if "x_test" not in rows:
        usual = min(0.2, HELD_OUT / columns / len(rows["x_train"]))
        _split(rows, "test", usual if test_size is None else test_size, generator)
    elif test_size is not None:
        raise UserError(f"{name} comes with its own test set of {len(rows['x_test'])} rows; leave --test-size out")
    _split(rows, "validation", validation_size, generator)


def _split(rows: dict[str, np.ndarray], part: str, size: float, generator: torch.Generator) -> None:
    """Move ``size`` random training rows, with their labels, to a part of their own."""
    total = len(rows["x_train"])
    sound = 0 <= size < total and (size < 1 or size == int(size))
    count = 0 if not sound else int(size) if size >= 1 else round(size * total)
    if not sound or count >= total:
        raise UserError(
            f"--{part}-size {size:g} can't be taken out of {total} rows; give a count up to {total - 1} or a fraction"
        )
    if part == "test" and count == 0:
        raise UserError(f"--test-size {size:g} leaves no test rows; give a count of at least 1 or a fraction")
    if count == 0:
        rows[f"x_{part}"] = rows["x_train"][:0]
        return
    order = torch.randperm(total, generator=generator).numpy()
    for kind in "xy":
        if f"{kind}_train" in rows:
            whole = rows[f"{kind}_train"]
            rows[f"{kind}_{part}"], rows[f"{kind}_train"] = whole[order[:count]], whole[order[count:]]


def _read(name: str, folder: str | Path | None) -> dict[str, Any]:
    """Arrays x_train and, where there are some, x_test, y_train, y_test."""
    if name == "digits":
        from sklearn.datasets import load_digits

        digits = load_digits()
        return {"x_train": (digits.images / 16).astype(np.float32), "y_train": digits.target}
    if name in TORCHVISION:
        return _read_torchvision(name, folder)
    if not (Path(name).suffix or os.sep in name):
        raise UserError(f"unknown data '{name}'{nearest(name, NAMES)}, or the path of a .npy, .npz, .csv or .parquet")
    return read_table(Path(name))


def _read_torchvision(name: str, folder: str | Path | None) -> dict[str, Any]:
    from torchvision import datasets

    root = Path(folder or os.environ.get("PVAE_DATA") or Path.home() / ".cache" / "pvae")
    kind = getattr(datasets, TORCHVISION[name])
    raw = root / TORCHVISION[name] / "raw"
    rows: dict[str, Any] = {}
    for part in ("train", "test"):
        try:
            found = kind(root, train=part == "train", download=not raw.is_dir() or not any(raw.iterdir()))
        except Exception as error:  # torchvision raises six kinds, one with an empty message
            reason = " ".join(str(error).split()) or "not in its format"
            raise UserError(
                f"{name}: the files in {raw} can't be read ({reason}); remove the folder to have them downloaded "
                "again, or name another with --data-dir"
            ) from error
        if len(found.data) != len(found.targets):
            raise UserError(f"{name}: {raw} has {len(found.data)} {part} images but {len(found.targets)} labels")
        rows[f"x_{part}"], rows[f"y_{part}"] = found.data.numpy().astype(np.float32) / 255, found.targets.numpy()
    return rows
