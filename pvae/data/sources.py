"""Where data come from: data sets by name and files, as arrays of rows and labels, and how they are split."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pvae.data.preprocessing import FIXED_SEED
from pvae.data.readers import read_table
from pvae.errors import UserError, nearest

TORCHVISION = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST", "kmnist": "KMNIST"}
NAMES = ("digits", *TORCHVISION)

SPLITS = ("train", "validation", "test")

# Values of the test rows that are held out unless told, at most: 1 GiB as float32. It depends on the data alone, lest
# the same file be split in another way where memory is short.
HELD_OUT = 2**28


def read_source(name: str, folder: str | Path | None) -> dict[str, Any]:
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


def split_rows(
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


def select_labels(name: str, rows: dict[str, Any]) -> tuple[dict[str, Tensor | None], tuple[str, ...] | None]:
    """Classes as numbers; words are numbered in alphabetical order, and are the second thing returned."""
    names = None
    known = [part for part in SPLITS if f"y_{part}" in rows]
    whole = np.concatenate([np.asarray(rows[f"y_{part}"]) for part in known]) if known else np.zeros(0)
    if any(value is None or value != value for value in whole.tolist()):
        raise UserError(f"{name}: row {_first_missing(whole)} has no label; fill it in, or leave the labels out")
    if whole.dtype.kind not in "biuf":
        words, numbers = np.unique(whole.astype(str), return_inverse=True)
        names = tuple(words.tolist())
        parts = np.split(numbers, np.cumsum([len(rows[f"y_{part}"]) for part in known])[:-1])
        rows = rows | {f"y_{part}": values for part, values in zip(known, parts, strict=False)}
    return {part: torch.as_tensor(rows[f"y_{part}"]) if part in known else None for part in SPLITS}, names


def unique_labels(labels: Iterable[Tensor | None]) -> Tensor | None:
    """The different labels of all parts, sorted; None where no part has any."""
    known = [values for values in labels if values is not None]
    return torch.cat(known).unique() if known else None


def _first_missing(labels: np.ndarray) -> int:
    return next(i for i, value in enumerate(labels.tolist()) if value is None or value != value)
