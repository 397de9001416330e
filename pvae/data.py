"""Data sets: resident tensors with fixed splits, and binarization as part of the data's identity."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pvae.errors import UserError, nearest
from pvae.files import read_table

__all__ = ["BINARIZATIONS", "NAMES", "Batch", "Dataset", "load"]

TORCHVISION = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST", "kmnist": "KMNIST"}
NAMES = ("digits", *TORCHVISION)
BINARIZATIONS = ("none", "threshold", "dynamic", "levels")

# The brightest level of pictures, which are read as intensities from 0 to 1.
TOP_LEVEL = {"digits": 16} | dict.fromkeys(TORCHVISION, 255)

# Seed of everything that belongs to the data's identity and must not change with a run's seed.
FIXED_SEED = 20140410

PARTS = ("train", "validation", "test")


class Batch(NamedTuple):
    """Rows x [B, D] and which training datapoints they are, index [B]."""

    x: Tensor
    index: Tensor  # type: ignore[assignment]


@dataclass(frozen=True)
class Dataset:
    """Data resident in memory or on the device, split once and for all.

    Attributes:
        name: where the data come from.
        train, validation, test: rows [N, D], [V, D], [M, D]; under dynamic binarization ``train`` holds the
            intensities, while validation and test are drawn once with a fixed seed.
        shape: of one datapoint, for pictures.
        binarize: ``none``, ``threshold`` (x > 0.5), ``dynamic`` (drawn afresh for each batch) or ``levels`` (whole
            numbers from 0, as a picture is stored).
        train_labels, test_labels: class of each row, or None.
        classes: number of columns at the end of each row that hold its label, one-hot.
    """

    name: str
    train: Tensor
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
        """SHA-256 of all rows, first 16 hex digits."""
        found = hashlib.sha256()
        for rows in (self.train, self.validation, self.test):
            found.update(str(tuple(rows.shape)).encode())
            found.update(np.ascontiguousarray(rows.cpu().numpy()).tobytes())
        return found.hexdigest()[:16]

    def to(self, device: torch.device) -> Dataset:
        """The same data with its rows on a device."""
        return replace(
            self, train=self.train.to(device), validation=self.validation.to(device), test=self.test.to(device)
        )

    def batches(self, batch_size: int, seed: int, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of one epoch, from batch ``start`` on, in the order that seed and epoch fix."""
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        order = torch.randperm(len(self.train), generator=generator).to(self.train.device)
        for first in range(start * batch_size, len(order), batch_size):
            index = order[first : first + batch_size]
            x = self.train[index]
            yield Batch(torch.bernoulli(x) if self.binarize == "dynamic" else x, index)

    def fixed_train(self, rows: int) -> Batch:
        """The first training rows as evaluation sees them: under dynamic binarization drawn once, with a fixed seed."""
        x = self.train[:rows]
        x = _draw_once(x.cpu()).to(x.device) if self.binarize == "dynamic" else x
        return Batch(x, torch.arange(len(x), device=x.device))

    def summary(self) -> str:
        """One line: N, shape, range, support and binarization."""
        values = self.train[:, : self.train.shape[1] - self.classes]
        low, high = values.min().item(), values.max().item()
        kind = "0 or 1" if set(values[:1000].unique().tolist()) <= {0.0, 1.0} else f"from {low:g} to {high:g}"
        how = {
            "none": "taken as they are",
            "threshold": "binarized at 0.5",
            "dynamic": "binarized afresh for each batch",
            "levels": "as whole numbers",
        }[self.binarize] + (f", each with its label of {self.classes}" if self.classes else "")
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
) -> Dataset:
    """Read a data set, check it, split it and binarize it.

    Arguments:
        name: one of ``NAMES``, or the path of a .npy, .npz, .csv or .parquet file.
        binarize: ``none``, ``threshold``, ``dynamic`` or ``levels``; ``threshold`` and ``dynamic`` take values in
            [0, 1], and ``levels`` gives whole numbers.
        folder: where torchvision's data sets are; else ``PVAE_DATA``, else the user's cache. What isn't there is
            downloaded.
        test_size: rows held out for the test, as a count or, below 1, as a fraction. Data sets that come with
            a test set take none.
        validation_size: rows taken out of the training rows, likewise.
        seed: of the splits.
        with_labels: append each row's label, one-hot, for programs that take it.

    Raises:
        UserError: an unknown name; a file that is missing, broken or not numeric; NaN or infinity (names the row);
            values that can't be binarized; a split larger than the data; labels wanted where there are none.

    >>> load("digits", binarize="threshold").train.shape
    torch.Size([1438, 64])
    """
    if binarize not in BINARIZATIONS:
        raise UserError(f"unknown binarization '{binarize}'{nearest(binarize, BINARIZATIONS)}")
    rows = _read(name, folder)
    for part in ("train", "test"):
        if f"x_{part}" in rows:
            where = f"{name} (test rows)" if part == "test" else name
            rows[f"x_{part}"] = _checked(where, np.asarray(rows[f"x_{part}"]), binarize, TOP_LEVEL.get(name, 1))
    generator = torch.Generator().manual_seed(seed + FIXED_SEED)
    if "x_test" not in rows:
        _split(rows, "test", 0.2 if test_size is None else test_size, generator)
    elif test_size is not None:
        raise UserError(f"{name} comes with its own test set of {len(rows['x_test'])} rows; leave --test-size out")
    _split(rows, "validation", validation_size, generator)
    x = {part: torch.from_numpy(rows[f"x_{part}"]) for part in PARTS}
    labels = _labels(name, rows)
    shape = x["train"].shape[1:]
    if x["test"].shape[1:] != shape:
        raise UserError(f"{name}: test rows have shape {tuple(x['test'].shape[1:])}, but training rows {tuple(shape)}")
    flat = _binarized({part: values.flatten(1).contiguous() for part, values in x.items()}, binarize)
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


def _draw_once(x: Tensor) -> Tensor:
    return torch.bernoulli(x, generator=torch.Generator().manual_seed(FIXED_SEED))


def _binarized(x: dict[str, Tensor], binarize: str) -> dict[str, Tensor]:
    if binarize in ("none", "levels"):
        return x
    if binarize == "threshold":
        return {part: (values > 0.5).float() for part, values in x.items()}
    return {part: values if part == "train" else _draw_once(values) for part, values in x.items()}


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


def _checked(where: str, x: np.ndarray, binarize: str, top_level: int) -> np.ndarray:
    """The values as float32, refused if they are no numbers, not finite, or can't be binarized."""
    if x.dtype.kind not in "biuf":
        raise UserError(f"{where}: the values are of type {x.dtype}, but numbers are needed")
    if x.ndim < 2 or x.size == 0 or len(x) < 2:
        raise UserError(f"{where}: the array has shape {x.shape}, but at least 2 rows of at least 1 value are needed")
    with np.errstate(over="ignore"):
        values = x.astype(np.float32)
    _refuse(where, x, ~np.isfinite(values), "remove or fill such values")
    if binarize == "levels":
        values = np.rint(values * top_level) if top_level > 1 else values
        _refuse(where, x, (values < 0) | (values != np.rint(values)), "--binarize levels takes whole numbers from 0")
    elif binarize != "none":
        advice = f"but --binarize {binarize} takes values from 0 to 1; scale the data, or use --binarize none"
        _refuse(where, x, (values < 0) | (values > 1), advice)
    return values


def _refuse(where: str, x: np.ndarray, bad: np.ndarray, advice: str) -> None:
    places = np.argwhere(bad)
    if len(places):
        row, *rest = places[0].tolist()
        column = ", ".join(map(str, rest))
        value = f"{x[tuple(places[0])]:g}"
        raise UserError(f"{where}: row {row}, column {column} is {value}; {advice} ({len(places)} in all)")


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
