"""Rows to use a run on: those of its data or of a file, checked as the run's data were, whole or by position."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pvae.data.memmap import MemmapRows
from pvae.data.preprocessing import apply_binarization, check_values
from pvae.data.readers import read_table
from pvae.distributions.supports import base_constraint
from pvae.errors import UserError, nearest, param, refuse_first
from pvae.inference.batching import Values, as_rows
from pvae.inference.posterior import prior_predictive
from pvae.runtime.torch_state import available_memory, seeded

if TYPE_CHECKING:
    from pvae.experiments.run import Run

# Splits of a run's data, in words.
SPLIT_LABELS = {"test": "test rows", "train": "training rows", "validation": "validation rows"}


class SelectedRows(NamedTuple):
    """Rows x [B, C] of a run's data or a file, and their classes, if known; all by row, [B].

    ``index`` tells which training datapoints they are, if they are; ``where`` says in words where they come from, and
    ``place`` each row's position there, -1 if it has none.
    """

    x: Tensor
    labels: Tensor | None
    index: Tensor | None  # type: ignore[assignment]
    where: str
    place: Tensor

    @property
    def from_run(self) -> bool:
        """Whether the rows are of the run's own data, whose values are as they should be."""
        return self.where in SPLIT_LABELS.values()

    def at(self, which: Tensor) -> SelectedRows:
        """Return some of these rows."""
        labels, index = (None if values is None else values[which] for values in (self.labels, self.index))
        return SelectedRows(self.x[which], labels, index, self.where, self.place[which])


def select_rows(
    run: Run, source: str = "test", select: str | None = None, *, raw: bool = False, missing: bool = False
) -> SelectedRows:
    """Select rows to use a run on.

    Arguments:
        source: ``test``, ``train`` or ``validation`` rows of the run's data, or a .npy, .npz, .csv or .parquet file.
        select: positions such as ``0:20`` or ``3,17,5``, counted from 0; all rows unless given.
        raw: take a file's values as they are: noisy ones need not lie in the support.
        missing: NaN may mark missing entries.

    Raises:
        UserError: no such rows, another number of columns, values outside the support, NaN where none is expected, or
            more rows of those on disk than memory holds.
    """
    if source in SPLIT_LABELS:
        return _from_split(run, source, select)
    if not Path(source).suffix:
        raise UserError(f"there are no rows '{source}'{nearest(source, SPLIT_LABELS)}, or the path of a file")
    rows = _from_file(run, Path(source), raw, missing or run.data.missing)
    return rows if select is None else rows.at(torch.tensor(parse_positions(select, len(rows.x), rows.where)))


def parse_positions(select: str, count: int, rows: str) -> list[int]:
    """Parse positions such as ``0:20`` or ``3,17,5`` among ``count`` rows, which messages call ``rows``.

    >>> parse_positions("3,0:2", 10, "test rows")
    [3, 0, 1]
    """
    positions, label = list[int](), param("select", select)
    for word in select.split(","):
        start, colon, stop = word.partition(":")
        try:
            first = int(start or 0) if colon else int(start)
            part = range(first, int(stop or count)) if colon else range(first, first + 1)
        except ValueError:
            raise UserError(f"{param('select')} '{select}': write positions, as 3,17,5 or 0:20") from None
        if part and not 0 <= part[0] <= part[-1] < count:
            wrong = max(part[0], count) if part[0] >= 0 else part[0]
            raise UserError(f"{label}: there is no row {wrong}; there are {count} {rows}, counted from 0")
        positions += part
    if not positions:
        raise UserError(f"{label} is empty; there are {count} {rows}, counted from 0")
    return positions


def _from_split(run: Run, split: str, select: str | None) -> SelectedRows:
    data, where = run.data, SPLIT_LABELS[split]
    rows, labels = getattr(data, split), getattr(data, f"{split}_labels")
    if not len(rows):
        raise UserError(f"the run has no {where}; name others, or a file")
    place = torch.arange(len(rows)) if select is None else torch.tensor(parse_positions(select, len(rows), where))
    size = 4 * len(place) * rows.shape[1]
    if isinstance(rows, MemmapRows) and size > available_memory() / 2:
        cost = f"{len(place)} {where} take {size / 2**30:.3g} GiB, more than half of the memory that is left"
        raise UserError(cost, f"name fewer, as {param('select', '0:1000')}")
    labels, index = None if labels is None else labels[place], place if split == "train" else None
    if split == "train":
        rows = data.fixed_train(len(rows) if select is None else place).x
    elif select is not None:
        rows = rows[place]
    return SelectedRows(rows, labels, index, where, place)


def _from_file(run: Run, path: Path, raw: bool, missing: bool) -> SelectedRows:
    table, kind = read_table(path), "none" if raw else run.data.binarize
    x, labels = _table_of_columns(run, path, table), _labels(run, path, table.get("y_train"))
    if not missing:
        gaps = torch.from_numpy(np.isnan(x))
        refuse_first(gaps, x, "; pvae impute fills in missing entries", where=f"{path}:", counted="in all")
    values = torch.from_numpy(np.array(check_values(str(path), x, kind, 1, missing=True)))
    rows = apply_binarization({"test": values}, kind)["test"]
    if not raw:
        _check_support(run, rows, path)
    if run.data.num_label_columns:
        rows = _with_labels(run, rows, labels, path)
    return SelectedRows(rows, labels, None, f"rows of {path.name}", torch.arange(len(rows)))


def _table_of_columns(run: Run, path: Path, table: dict[str, Any]) -> np.ndarray:
    """Return a file's rows [B, columns] in the order of the run's columns."""
    x = np.asarray(table["x_train"])
    if x.dtype.kind not in "biuf":
        raise UserError(f"{path}: the values are of type {x.dtype}, but numbers are needed")
    if not x.size:
        raise UserError(f"{path}: there are no rows in it, or no values in them")
    flat = x.reshape(len(x), -1) if x.ndim > 1 else x.reshape(1, -1)
    if (names := run.data.columns) and "columns" in table:
        columns = table["columns"].tolist()  # which may have others, as those that `impute` adds
        if lacking := [name for name in names if name not in columns]:
            hint = nearest(lacking[0], columns)
            raise UserError(f"{path}: it has no column '{lacking[0]}', which the run's data have{hint}")
        flat = flat[:, [columns.index(name) for name in names]]
    if flat.shape[1] != run.columns:
        shape = " x ".join(map(str, run.data.shape))
        raise UserError(f"{path}: rows have {flat.shape[1]} columns, but the run's have {run.columns} ({shape})")
    return flat


def check_rows(run: Run, values: Values, *, raw: bool = False, missing: bool = False) -> None:
    """Refuse a table that does not fit the run: its width, NaN unless ``missing``, the support unless ``raw``."""
    x, width = as_rows(values, run.model), run.data.train.shape[1]
    if x.shape[1:] != (width,):
        raise UserError(f"rows have shape {tuple(x.shape[1:])}, but the run's have {width} columns")
    x = x[:, : run.columns]
    if not (missing or run.data.missing):
        refuse_first(x.isnan(), x, "; Run.impute fills in missing entries", where="x:", counted="in all")
    if not raw:
        _check_support(run, x, "x")


def _check_support(run: Run, x: Tensor, name: str | Path) -> None:
    with torch.no_grad(), seeded(0):
        like = run.data.train[:1].to(next(run.variant.program.parameters()).device)
        support = base_constraint(prior_predictive(run.model, like).likelihood.support)
    message = f", outside the support of the run's likelihood {run.recipe.name('likelihood')} ({support})"
    refuse_first(~support.check(x) & ~x.isnan(), x, message, where=f"{name}:", counted="of them")


def _labels(run: Run, path: Path, values: Any) -> Tensor | None:
    """Return a file's labels as numbers; words have the numbers that they have in the run."""
    if values is None:
        return None
    labels = np.asarray(values)
    if labels.dtype.kind in "biuf":
        return torch.from_numpy(np.array(labels))
    if run.data.label_names is None:
        raise UserError(f"{path}: its labels are words, but the run's are not; give numbers, or none")
    numbers = {name: number for number, name in enumerate(run.data.label_names)}
    words = labels.astype(str).tolist()
    if strange := [word for word in words if word not in numbers]:
        raise UserError(f"{path}: the run's data have no label '{strange[0]}'{nearest(strange[0], numbers)}")
    return torch.tensor([numbers[word] for word in words])


def _with_labels(run: Run, rows: Tensor, labels: Tensor | None, path: Path) -> Tensor:
    """Return rows with their labels' columns, which the run's program takes."""
    if labels is None:
        raise UserError(f"{path}: the run's program takes labels, and the file has none; add a column 'label'")
    known = run.data.labels
    assert known is not None  # the columns are theirs
    if not torch.isin(labels, known).all():
        raise UserError(f"{path}: it has a label that the run's data do not have; known are {known.tolist()}")
    return run.labelled(rows, labels)
