"""Sources of data: data sets by name and files, as arrays of rows and labels, and their split."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pvae.data.preprocessing import FIXED_SEED
from pvae.data.readers import read_table
from pvae.errors import UserError, nearest, param

TORCHVISION = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST", "kmnist": "KMNIST"}
NAMES = ("digits", *TORCHVISION)

SPLITS = ("train", "validation", "test")
# The most values of test rows that are held out by default: 1 GiB as float32. It depends on the data alone, lest the
# same file be split in another way where memory is short.
HELD_OUT = 2**28


class SplitSizes(NamedTuple):
    """Rows to hold out, as counts or, below 1, fractions; ``test`` None for the default; and the seed of the split."""

    test: float | None
    validation: float
    seed: int


def read_source(name: str, folder: str | Path | None) -> dict[str, Any]:
    """Read the arrays x_train and, where there are some, x_test, y_train, y_test."""
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
    raw = root / TORCHVISION[name] / "raw"
    arrays: dict[str, Any] = {}
    for part in ("train", "test"):
        try:
            download = not raw.is_dir() or not any(raw.iterdir())
            images = getattr(datasets, TORCHVISION[name])(root, train=part == "train", download=download)
        except Exception as error:  # torchvision raises six kinds, one with an empty message
            reason = " ".join(str(error).split()) or "not in its format"
            hint = f"remove the folder to have them downloaded again, or set another {param('data_folder')}"
            raise UserError(f"{name}: the files in {raw} can't be read ({reason})", hint) from error
        if len(images.data) != len(images.targets):
            raise UserError(f"{name}: {raw} has {len(images.data)} {part} images but {len(images.targets)} labels")
        arrays[f"x_{part}"] = images.data.numpy().astype(np.float32) / 255
        arrays[f"y_{part}"] = images.targets.numpy()
    return arrays


def split_rows(name: str, arrays: dict[str, Any], columns: int, sizes: SplitSizes) -> None:
    """Move random training rows, with their labels, to the validation rows and, if there are none, the test rows."""
    generator = torch.Generator().manual_seed(sizes.seed + FIXED_SEED)
    if "x_test" not in arrays:
        default = min(0.2, HELD_OUT / columns / len(arrays["x_train"]))
        _split(arrays, "test", default if sizes.test is None else sizes.test, generator)
    elif sizes.test is not None:
        owner = f"{name} comes with its own test set of {len(arrays['x_test'])} rows"
        raise UserError(owner, hint=f"leave {param('test_size')} out")
    _split(arrays, "validation", sizes.validation, generator)


def _split(arrays: dict[str, np.ndarray], part: str, size: float, generator: torch.Generator) -> None:
    total, sized = len(arrays["x_train"]), param(f"{part}_size", f"{size:g}")
    valid = 0 <= size < total and (size < 1 or size == int(size))
    count = 0 if not valid else int(size) if size >= 1 else round(size * total)
    if not valid or count >= total:
        raise UserError(f"{sized} can't be taken out of {total} rows; give a count up to {total - 1} or a fraction")
    if part == "test" and count == 0:
        raise UserError(f"{sized} leaves no test rows; give a count of at least 1 or a fraction")
    order = torch.randperm(total, generator=generator).numpy() if count else np.arange(total)
    for kind in "xy":
        if f"{kind}_train" in arrays:
            rows = arrays[f"{kind}_train"]
            arrays[f"{kind}_{part}"] = rows[order[:count]]
            arrays[f"{kind}_train"] = rows[order[count:]] if count else rows


def encode_labels(name: str, arrays: dict[str, Any]) -> dict[str, Any]:
    """Return each split's labels as numbers, and the words that these number, in alphabetical order, by field."""
    parts = [part for part in SPLITS if f"y_{part}" in arrays]
    labels = np.concatenate([np.asarray(arrays[f"y_{part}"]) for part in parts]) if parts else np.zeros(0)
    for row, value in enumerate(labels.tolist()):
        if value is None or value != value:
            raise UserError(f"{name}: row {row} has no label; fill it in, or leave the labels out")
    names = None
    if labels.dtype.kind not in "biuf":
        words, labels = np.unique(labels.astype(str), return_inverse=True)
        names = tuple(words.tolist())
    splits = np.split(labels, np.cumsum([len(arrays[f"y_{part}"]) for part in parts[:-1]], dtype=int))
    numbers = {f"{part}_labels": torch.as_tensor(values) for part, values in zip(parts, splits, strict=False)}
    return numbers | {"label_names": names}


def unique_labels(labels: Iterable[Tensor | None]) -> Tensor | None:
    """Return the distinct labels of all splits, sorted; None if no split has any."""
    known = [values for values in labels if values is not None]
    return torch.cat(known).unique() if known else None
