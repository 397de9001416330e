"""data.loading."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pvae.data.dataset import Dataset, Split
from pvae.data.memmap import MemmapRows, rows_per_chunk
from pvae.data.preprocessing import BINARIZATIONS, apply_binarization, check_shape, check_values
from pvae.data.sources import NAMES, SPLITS, TORCHVISION, read_source, select_labels, split_rows, unique_labels
from pvae.errors import UserError, nearest
from pvae.runtime import distributed
from pvae.runtime.torch_state import available_memory

# The brightest level of pictures, which are read as intensities from 0 to 1.
TOP_LEVEL = {"digits": 16} | dict.fromkeys(TORCHVISION, 255)


def load_data(
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

    >>> load_data("digits", binarize="threshold").train.shape
    torch.Size([1438, 64])
    """
    if binarize not in BINARIZATIONS:
        raise UserError(f"unknown binarization '{binarize}'{nearest(binarize, BINARIZATIONS)}")
    rows = read_source(name, folder)
    split = partial(split_rows, test_size=test_size, validation_size=validation_size, seed=seed)
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
            rows[f"x_{part}"] = check_values(where, x, binarize, TOP_LEVEL.get(name, 1), missing=missing)
    split(name, rows, rows["x_train"][0].size)
    tensors = {part: torch.from_numpy(rows[f"x_{part}"]) for part in SPLITS}
    labels, names = select_labels(name, rows)
    shape, other = tensors["train"].shape[1:], tensors["test"].shape[1:]
    if other != shape:
        raise UserError(f"{name}: test rows have shape {tuple(other)}, but training rows {tuple(shape)}")
    flat = apply_binarization({part: values.flatten(1).contiguous() for part, values in tensors.items()}, binarize)
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
        num_label_columns=classes,
        only_labels=None if only is None else tuple(sorted(set(only))),
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
    found = unique_labels(known.values())
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
    size = rows_per_chunk(columns)
    for first in (size * number for number in distributed.shard(-(-len(x) // size))):
        check_values(str(path), x[first : first + size], binarize, 1, first, missing=missing)
    parts = {part: MemmapRows(path, rows[f"x_{part}"], threshold=binarize == "threshold") for part in SPLITS}
    held_out = apply_binarization({part: parts[part].resident() for part in ("validation", "test")}, binarize)
    return Dataset(path.stem, parts["train"], held_out["validation"], held_out["test"], x.shape[1:], binarize)


def _labelled(name: str, x: dict[str, Tensor], labels: dict[str, Tensor | None]) -> tuple[dict[str, Tensor], int]:
    """Rows with their label, one-hot, as their last columns, and the number of classes."""
    known = {part: values for part, values in labels.items() if values is not None}
    if any(len(rows) and part not in known for part, rows in x.items()):
        raise UserError(f"{name}: the program takes labels, and not all rows have one; add a column or array of labels")
    kinds = unique_labels(known.values())
    assert kinds is not None  # training rows have labels
    found = dict(x)
    for part, values in known.items():
        hot = torch.nn.functional.one_hot(torch.searchsorted(kinds, values), len(kinds))
        found[part] = torch.cat([x[part], hot.to(x[part])], 1)
    if "validation" not in known:
        found["validation"] = found["train"][:0]
    return found, len(kinds)
