"""A run opened for use: one fitted variant, its data, and the rows that it is to be used on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pvae.data.dataset import Dataset
from pvae.data.memmap import MemmapRows
from pvae.data.preprocessing import apply_binarization, check_values
from pvae.data.readers import read_table
from pvae.distributions.supports import base_constraint
from pvae.errors import UserError, nearest
from pvae.experiments import run_folder, sweep
from pvae.inference.guides import Guide
from pvae.inference.latents import observed_site
from pvae.recipes import recipe
from pvae.recipes.build import FittedModel
from pvae.runtime.pyro_params import Program
from pvae.runtime.torch_state import available_memory, seeded
from pvae.training import checkpoints

# Parts of a run's data that may be used, with the words that stand for them.
SPLIT_LABELS = {"test": "test rows", "train": "training rows", "validation": "validation rows"}


@dataclass(frozen=True)
class Run:
    """A fitted variant of a run folder.

    Attributes:
        folder: of the run.
        name: of the variant.
        variant: program, guide and recipe.
        data: that it was fitted to, on the CPU.
        others: names of the run's other variants.
        device: ``auto``, ``cpu`` or ``cuda``, as it was asked for.
    """

    folder: Path
    name: str
    variant: FittedModel
    data: Dataset
    others: Sequence[str] = ()
    device: str = "auto"

    @property
    def model(self) -> Program:
        """The generative program."""
        return self.variant.model

    @property
    def guide(self) -> Guide:
        """Its guide."""
        return self.variant.guide

    def label_name(self, label: float) -> str:
        """A label as the run's data write it: a word, or a number."""
        names = self.data.label_names
        return f"{label:g}" if names is None else names[int(label)]

    def label_of(self, word: str) -> float:
        """The number of a label.

        Raises:
            UserError: the run's data have none of this name.
        """
        kinds = [] if self.data.labels is None else self.data.labels.tolist()
        known = {self.label_name(kind): kind for kind in kinds}
        if word not in known:
            raise UserError(f"the run's data have no label '{word}'{nearest(word, known)}")
        return known[word]

    def labelled(self, rows: Tensor, labels: Tensor) -> Tensor:
        """Rows with their labels' columns, [B, columns + classes], as a program that is given labels takes them."""
        assert self.data.labels is not None  # the columns are theirs
        hot = torch.nn.functional.one_hot(torch.searchsorted(self.data.labels, labels), self.data.num_label_columns)
        return torch.cat([rows, hot.to(rows)], 1)

    @property
    def columns(self) -> int:
        """Number of a row's own values, without those of its label."""
        return self.data.train.shape[1] - self.data.num_label_columns


class SelectedRows(NamedTuple):
    """Rows x [B, C] of a run's data or of a file.

    ``labels`` [B] are their classes, if known; ``index`` [B] says which training datapoints they are, if they are any;
    ``where`` says in words what they are, and ``place`` [B] where each stands there, -1 where it does not.
    """

    x: Tensor
    labels: Tensor | None
    index: Tensor | None  # type: ignore[assignment]
    where: str
    place: Tensor

    @property
    def from_run(self) -> bool:
        """The rows are of the run's own data, and so as they should be."""
        return self.where in SPLIT_LABELS.values()

    def at(self, which: Tensor) -> SelectedRows:
        """Some of these rows."""
        labels, index = (None if values is None else values[which] for values in (self.labels, self.index))
        return SelectedRows(self.x[which], labels, index, self.where, self.place[which])


def open_run(
    folder: Path,
    variant: str | None = None,
    *,
    device: str = "auto",
    data_folder: str | Path | None = None,
    trust: bool = False,
) -> Run:
    """Open a run folder of ``fit`` or ``compare``.

    Arguments:
        variant: name of one of a comparison's variants; the first that is trained unless given.
        device: ``auto``, ``cpu`` or ``cuda``.
        data_folder: where torchvision's data sets are.
        trust: run the code of files that the run's recipe names.

    Raises:
        UserError: no run, a broken one, data that have changed, or no variant of this name.
    """
    if not (folder / "recipe.toml").is_file():
        raise UserError(f"{folder} is not a run: it has no recipe.toml; pvae fit --out {folder} makes one")
    own, axes, _ = recipe.read_recipe_file(folder / "recipe.toml", trust=trust)
    places = {own.name("guide"): folder}
    if axes:
        places = {cell.name: folder / cell.place for cell in reversed(sweep.sweep_points(own, axes))}
        places = {name: place for name, place in reversed(places.items()) if (place / checkpoints.FILE).is_file()}
    if not places:
        raise UserError(f"{folder} holds no trained variant; the command that began it with --resume goes on")
    name = next(iter(places)) if variant is None else variant
    if name not in places:
        raise UserError(f"{folder} has no variant '{name}'{nearest(name, places)}")
    shelf = sweep.DatasetCache(data_folder)
    data = shelf[recipe.read_recipe(places[name], trust=trust)]
    found = run_folder.load_fit(places[name], data, device=device, trust=trust)
    return Run(folder, name, found, data, [other for other in places if other != name], device)


def select_rows(
    opened: Run, source: str = "test", select: str | None = None, *, raw: bool = False, missing: bool = False
) -> SelectedRows:
    """Rows to use a run on.

    Arguments:
        source: ``test``, ``train`` or ``validation`` rows of the run's data, or a .npy, .npz, .csv or .parquet file.
        select: which of them, as ``0:20`` or ``3,17,5``, counted from 0; all unless given.
        raw: take a file's values as they are: noisy ones need not lie in the support.
        missing: NaN may stand for what is missing.

    Raises:
        UserError: no such rows, another number of columns, values outside the support, NaN where none is expected, or
            more rows of those on disk than memory holds.
    """
    if source in SPLIT_LABELS:
        return _own(opened, source, select)
    if not Path(source).suffix:
        raise UserError(f"there are no rows '{source}'{nearest(source, SPLIT_LABELS)}, or the path of a file")
    found = _from_file(opened, Path(source), raw, missing or opened.data.missing)
    return found if select is None else found.at(torch.tensor(parse_positions(select, len(found.x), found.where)))


def parse_positions(select: str, count: int, what: str) -> list[int]:
    """Positions that a selection names, as ``0:20`` or ``3,17,5``.

    Raises:
        UserError: it can't be read, names none, or one beyond the last.

    >>> parse_positions("3,0:2", 10, "test rows")
    [3, 0, 1]
    """
    found: list[int] = []
    for word in select.split(","):
        start, colon, stop = word.partition(":")
        try:
            first = int(start or 0) if colon else int(start)
            part = range(first, int(stop or count)) if colon else range(first, first + 1)
        except ValueError:
            raise UserError(f"--select '{select}': write positions, as 3,17,5 or 0:20") from None
        if part and not 0 <= part[0] <= part[-1] < count:
            wrong = max(part[0], count) if part[0] >= 0 else part[0]
            raise UserError(f"--select {select}: there is no row {wrong}; there are {count} {what}, counted from 0")
        found += part
    if not found:
        raise UserError(f"--select {select} is empty; there are {count} {what}, counted from 0")
    return found


def _own(opened: Run, part: str, select: str | None) -> SelectedRows:
    data, where = opened.data, SPLIT_LABELS[part]
    rows, labels = getattr(data, part), getattr(data, f"{part}_labels")
    if not len(rows):
        raise UserError(f"the run has no {where}; name others, or a file")
    place = torch.arange(len(rows)) if select is None else torch.tensor(parse_positions(select, len(rows), where))
    size = 4 * len(place) * rows.shape[1]
    if isinstance(rows, MemmapRows) and size > available_memory() / 2:
        raise UserError(
            f"{len(place)} {where} take {size / 2**30:.3g} GiB, more than half of the memory that is left; name fewer, "
            "as --select 0:1000"
        )
    labels = labels if labels is None else labels[place]
    if part == "train":
        x = data.fixed_train(len(rows) if select is None else place).x
        return SelectedRows(x, labels, place, where, place)
    return SelectedRows(rows if select is None else rows[place], labels, None, where, place)


def _from_file(opened: Run, path: Path, raw: bool, missing: bool) -> SelectedRows:
    table = read_table(path)
    x = np.asarray(table["x_train"])
    if x.dtype.kind not in "biuf":
        raise UserError(f"{path}: the values are of type {x.dtype}, but numbers are needed")
    if not x.size:
        raise UserError(f"{path}: there are no rows in it, or no values in them")
    flat = x.reshape(len(x), -1) if x.ndim > 1 else x.reshape(1, -1)
    if (names := opened.data.columns) and "columns" in table:
        flat = flat[:, _order(path, names, table["columns"].tolist())]
    if flat.shape[1] != opened.columns:
        shape = " x ".join(map(str, opened.data.shape))
        raise UserError(f"{path}: rows have {flat.shape[1]} columns, but the run's have {opened.columns} ({shape})")
    labels = _labels(opened, path, table.get("y_train"))
    kind = "none" if raw else opened.data.binarize
    if not missing and np.isnan(flat).any():
        row, column = np.argwhere(np.isnan(flat))[0].tolist()
        count = f"({int(np.isnan(flat).sum())} in all)"
        raise UserError(f"{path}: row {row}, column {column} is nan {count}; pvae impute fills in what is missing")
    values = torch.from_numpy(np.array(check_values(str(path), flat, kind, 1, missing=True)))
    rows = apply_binarization({"test": values}, kind)["test"]
    if not raw:
        _check_support(opened, rows, path)
    if opened.data.num_label_columns:
        rows = _with_labels(opened, rows, labels, path)
    return SelectedRows(rows, labels, None, f"rows of {path.name}", torch.arange(len(rows)))


def _order(path: Path, names: Sequence[str], there: list[str]) -> list[int]:
    """Where a file has the run's columns; others of it, as those beside what was imputed, are left alone."""
    if lacking := [name for name in names if name not in there]:
        raise UserError(
            f"{path}: it has no column '{lacking[0]}', which the run's data have{nearest(lacking[0], there)}"
        )
    return [there.index(name) for name in names]


def _check_support(opened: Run, x: Tensor, path: Path) -> None:
    with torch.no_grad(), seeded(0):
        like = opened.data.train[:1].to(next(opened.variant.program.parameters()).device)
        fn = observed_site(opened.model, like)["fn"]
    outside = (~base_constraint(fn.support).check(x) & ~x.isnan()).nonzero()
    if len(outside):
        row, column = outside[0].tolist()
        raise UserError(
            f"{path}: row {row}, column {column} is {x[row, column].item():g}, outside the support of the run's "
            f"likelihood {opened.variant.recipe.name('likelihood')} ({base_constraint(fn.support)}; "
            f"{len(outside)} of them)"
        )


def _labels(opened: Run, path: Path, values: Any) -> Tensor | None:
    """A file's labels as numbers; words have the numbers that they have in the run."""
    if values is None:
        return None
    found = np.asarray(values)
    if found.dtype.kind in "biuf":
        return torch.from_numpy(np.array(found))
    if opened.data.label_names is None:
        raise UserError(f"{path}: its labels are words, but the run's are not; give numbers, or none")
    numbers = {name: number for number, name in enumerate(opened.data.label_names)}
    words = found.astype(str).tolist()
    if strange := [word for word in words if word not in numbers]:
        raise UserError(f"{path}: the run's data have no label '{strange[0]}'{nearest(strange[0], numbers)}")
    return torch.tensor([numbers[word] for word in words])


def _with_labels(opened: Run, rows: Tensor, labels: Tensor | None, path: Path) -> Tensor:
    """Rows with their label's columns, which the run's program takes."""
    if labels is None:
        raise UserError(f"{path}: the run's program takes labels, and the file has none; add a column 'label'")
    kinds = opened.data.labels
    assert kinds is not None  # the columns are theirs
    if not torch.isin(labels, kinds).all():
        raise UserError(f"{path}: it has a label that the run's data do not have; known are {kinds.tolist()}")
    return opened.labelled(rows, labels)
