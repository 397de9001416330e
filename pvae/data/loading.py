"""Loading: a data set's name or file becomes a `Dataset` that is checked, split and binarized."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pvae.data.dataset import Dataset
from pvae.data.memmap import MemmapRows, rows_per_chunk
from pvae.data.preprocessing import BINARIZATIONS, apply_binarization, check_shape, check_values
from pvae.data.sources import SPLITS, TORCHVISION, SplitSizes, encode_labels, read_source, split_rows
from pvae.errors import UserError, nearest, param
from pvae.runtime import distributed
from pvae.runtime.torch_state import available_memory

# The brightest level of pictures, which are read as intensities from 0 to 1.
TOP_LEVEL = {"digits": 16} | dict.fromkeys(TORCHVISION, 255)


def load_data(
    name: str,
    *,
    binarize: str = "none",
    data_folder: str | Path | None = None,
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
        data_folder: of torchvision's data sets, downloaded if missing; else ``PVAE_DATA``, else the user's cache.
        test_size: rows held out for the test, as a count or, below 1, as a fraction; unless given a fifth, but no
            more than 1 GiB. Data sets that come with a test set take none.
        validation_size: rows taken out of the training rows, likewise.
        seed: of the splits.
        with_labels: append each row's label, one-hot, for programs that take it.
        missing: accept NaN as the mark of missing entries; they stay NaN, binarized or not.
        only: labels whose rows to keep; the split of all rows is made first.
        stream: memory-map the training rows of a .npy file in place of reading them; unless given, do so if they
            would take more than half of the available memory. Batches, split and digest are the same.

    Raises:
        UserError: an unknown name; a file that is missing, broken or not numeric; NaN, unless it may be missing, or
            infinity (names the row); a column without any training value; values that can't be binarized; a split
            larger than the data; labels wanted where there are none.

    >>> load_data("digits", binarize="threshold").train.shape
    torch.Size([1438, 64])
    """
    if binarize not in BINARIZATIONS:
        raise UserError(f"unknown binarization '{binarize}'{nearest(binarize, BINARIZATIONS)}")
    arrays, sizes = read_source(name, data_folder), SplitSizes(test_size, validation_size, seed)
    if _stays_on_disk(name, arrays["x_train"], stream):
        if with_labels or only is not None:
            taker = f"{param('only')} takes" if only is not None else "the program takes"
            raise UserError(f"{name}: {taker} labels, and a .npy file has none; use an .npz with x and y")
        data = _load_on_disk(Path(name), arrays["x_train"], binarize, sizes, missing)
    else:
        data = _load_in_memory(name, arrays, binarize, sizes, missing)
        data = data if only is None else _select(name, data, only)
        data = _append_labels(name, data) if with_labels else data
    return replace(data, means=_column_means(name, data)) if missing else data


def _load_in_memory(name: str, arrays: dict[str, Any], binarize: str, sizes: SplitSizes, missing: bool) -> Dataset:
    for part in ("train", "test"):
        if f"x_{part}" in arrays:
            where, x = f"{name} (test rows)" if part == "test" else name, np.asarray(arrays[f"x_{part}"])
            check_shape(where, x)
            arrays[f"x_{part}"] = check_values(where, x, binarize, TOP_LEVEL.get(name, 1), missing=missing)
    split_rows(name, arrays, arrays["x_train"][0].size, sizes)
    shape, test_shape = arrays["x_train"].shape[1:], arrays["x_test"].shape[1:]
    if test_shape != shape:
        raise UserError(f"{name}: test rows have shape {test_shape}, but training rows {shape}")
    rows = {part: torch.from_numpy(arrays[f"x_{part}"]).flatten(1).contiguous() for part in SPLITS}
    fields: dict[str, Any] = apply_binarization(rows, binarize) | encode_labels(name, arrays)
    columns = tuple(map(str, arrays["columns"])) if "columns" in arrays else None
    return Dataset(Path(name).stem, **fields, shape=shape, binarize=binarize, columns=columns)


def _stays_on_disk(name: str, x: np.ndarray, stream: bool | None) -> bool:
    if not isinstance(x, np.memmap):
        if stream:
            raise UserError(f"{name}: only a .npy file can be read as it goes; save the rows as one")
        return False
    return 4 * x.size > available_memory() / 2 if stream is None else stream


def _load_on_disk(path: Path, x: np.ndarray, binarize: str, sizes: SplitSizes, missing: bool) -> Dataset:
    """Memory-map the training rows of a .npy file, which is read once to check every value."""
    check_shape(str(path), x)
    if not x.flags.c_contiguous:
        wrong = f"{path}: is stored column by column, so that rows can't be read"
        raise UserError(wrong, hint="save np.ascontiguousarray of it")
    columns = x[0].size
    positions: dict[str, Any] = {"x_train": np.arange(len(x))}
    split_rows(str(path), positions, columns, sizes)
    held_out = len(positions["x_test"]) + len(positions["x_validation"])
    if 4 * columns * held_out > available_memory() / 2:
        taken = f"{held_out} test and validation rows take {4 * columns * held_out / 2**30:.3g} GiB"
        hint = f"give counts as {param('test_size')} and {param('validation_size')}"
        raise UserError(f"{path}: {taken}, more than half of the available memory", hint)
    size = rows_per_chunk(columns)
    for first in (size * number for number in distributed.shard(-(-len(x) // size))):
        check_values(str(path), x[first : first + size], binarize, 1, first, missing=missing)
    rows = {part: MemmapRows(path, positions[f"x_{part}"], threshold=binarize == "threshold") for part in SPLITS}
    in_memory: dict[str, Any] = apply_binarization({part: rows[part].to_tensor() for part in SPLITS[1:]}, binarize)
    return Dataset(path.stem, rows["train"], **in_memory, shape=x.shape[1:], binarize=binarize)


def _check_labels(name: str, data: Dataset, taker: str) -> None:
    if any(len(getattr(data, part)) and getattr(data, f"{part}_labels") is None for part in SPLITS):
        raise UserError(f"{name}: {taker} labels, and not all rows have one; add a column or array of labels")


def _select(name: str, data: Dataset, only: Sequence[int]) -> Dataset:
    _check_labels(name, data, f"{param('only')} takes")
    labels = [] if data.labels is None else data.labels.tolist()
    if not only or not set(only) <= set(labels):
        unknown = next((label for label in only if label not in labels), "[]")
        known = ", ".join(f"{label:g}" for label in labels[:20]) + (", ..." if len(labels) > 20 else "")
        raise UserError(f"{name}: {param('only', unknown)}: no row has such a label; give some of {known}")
    changes: dict[str, Any] = {"only_labels": tuple(sorted(set(only)))}
    for part in SPLITS:
        rows, selected = getattr(data, part), torch.isin(getattr(data, f"{part}_labels"), torch.as_tensor(only))
        if part != "validation" and not selected.any():
            selection = param("only", ",".join(map(str, only)))
            raise UserError(f"{name}: {selection} leaves no {part} rows; give more labels, or hold out others")
        changes |= {part: rows[selected], f"{part}_labels": getattr(data, f"{part}_labels")[selected]}
    return replace(data, **changes)


def _append_labels(name: str, data: Dataset) -> Dataset:
    _check_labels(name, data, "the program takes")
    labels = data.labels
    assert labels is not None  # training rows have labels
    changes: dict[str, Any] = {"num_label_columns": len(labels)}
    for part in SPLITS:
        x, places = getattr(data, part), torch.searchsorted(labels, getattr(data, f"{part}_labels"))
        changes[part] = torch.cat([x, torch.nn.functional.one_hot(places, len(labels)).to(x)], 1)
    return replace(data, **changes)


def _column_means(name: str, data: Dataset) -> Tensor:
    """Return the mean of each column's observed training values, [D]."""
    columns = data.train.shape[1]
    total, count = torch.zeros(columns, dtype=torch.double), torch.zeros(columns, dtype=torch.long)
    for x, _ in data.iter_chunks("train"):
        total += x.double().nansum(0)
        count += (~x.isnan()).sum(0)
    if not count.all():
        column = ", ".join(map(str, np.unravel_index(int((count == 0).nonzero()[0]), data.shape)))
        raise UserError(f"{name}: column {column} has no value in any of the {len(data.train)} training rows; drop it")
    return (total / count).float()
