"""Results of the applications: arrays, a picture and sentences, written to files and stored in the run's folder."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from pvae.errors import UserError, nearest, param
from pvae.runtime.files import atomic_replace, read_json, write_json

FOLDER = "uses"  # in a run's folder
# In the order of the page.
VERBS: tuple[str, ...] = ("reconstruct", "sample", "interpolate", "map", "encode", "decode")
VERBS += ("posterior", "denoise", "impute", "anomalies", "augment", "classify")
KINDS = (".npz", ".npy", ".csv", ".png", ".html")


@dataclass
class UseResult:
    """Result of a command on a run, named by its verb.

    Attributes:
        arrays: by name; the first is what a .npy file holds. Those with as many rows as it become columns of a .csv.
        sentences, tables: for the screen and the page; a table has a title, a header and lines of words.
        page: a self-contained page that one can move in.
        not_columns: names of arrays that are not about the rows, and so never columns.
        columns: names of the data's columns, if they have any.
    """

    verb: str
    arrays: dict[str, np.ndarray]
    sentences: list[str] = field(default_factory=list)
    tables: list[tuple[str, list[str], list[list[str]]]] = field(default_factory=list)
    figure: Figure | None = None
    page: str = ""
    not_columns: Collection[str] = ()
    columns: Sequence[str] | None = None


def check_outputs(outs: Sequence[Path], overwrite: bool, *, page: bool = True) -> None:
    """Refuse, before any work, files that can't be written or would replace others; ``page``: there will be a page."""
    for path in outs:
        label = param("out", path)
        if path.suffix not in KINDS:
            raise UserError(f"{label}: unknown format '{path.suffix}'{nearest(path.suffix, KINDS)}")
        if path.suffix == ".html" and not page:
            raise UserError(f"{label}: only map makes a page; write .npz, .npy, .csv or .png")
        if path.is_dir():
            raise UserError(f"{label} is a folder; name a file in it")
        if path.exists() and not overwrite:
            raise UserError(f"{label} exists; give {param('overwrite', True)} to replace it, or another name")


def write_outputs(use: UseResult, *paths: Path) -> None:
    """Write a result to files, each whole or not at all: all arrays (.npz), the first (.npy), table, picture, page."""
    for path in paths:
        if (path.suffix == ".png" and use.figure is None) or (path.suffix == ".html" and not use.page):
            what = {".png": "picture", ".html": "page"}[path.suffix]
            raise UserError(f"{param('out', path)}: there is no {what} of {use.verb}; write .npz, .npy or .csv")
    for path in paths:
        with atomic_replace(path) as temporary, temporary.open("wb") as file:
            if path.suffix == ".npz":
                np.savez_compressed(file, **use.arrays)  # type: ignore[arg-type]
            elif path.suffix == ".npy":
                np.save(file, next(iter(use.arrays.values())))
            elif path.suffix == ".csv":
                arrays = {name: values for name, values in use.arrays.items() if name not in use.not_columns}
                _write_csv(file, arrays, use.columns)
            elif path.suffix == ".html":
                file.write(use.page.encode())
            elif use.figure is not None:
                use.figure.savefig(file, format="png", dpi=160, bbox_inches="tight")


def _write_csv(file: Any, arrays: Mapping[str, np.ndarray], names: Sequence[str] | None) -> None:
    """Write columns of all arrays with as many rows as the first; x under the data's names, so that it may be data."""
    import pyarrow as pa
    from pyarrow import csv

    rows, columns = len(next(iter(arrays.values()))), {}
    for name, values in arrays.items():
        if values.ndim == 1 and len(values) == rows:
            columns[name] = values
        elif values.ndim == 2 and len(values) == rows:
            labels = [f"{name}{place}" for place in range(values.shape[1])]
            if names is not None and len(names) == len(labels):
                labels = [column if name == "x" else f"{name}_{column}" for column in names]
            columns |= dict(zip(labels, values.T, strict=True))
    csv.write_csv(pa.table({name: np.ascontiguousarray(values) for name, values in columns.items()}), file)


def save_in_run(use: UseResult, folder: Path, about: Mapping[str, Any]) -> list[Path]:
    """Store a result in a run's folder in place of its verb's last one, with what it is about; return the files."""
    kinds, base = {".npz": True, ".png": use.figure is not None, ".html": bool(use.page)}, folder / FOLDER / use.verb
    paths = [base.with_suffix(kind) for kind, exists in kinds.items() if exists]
    write_outputs(use, *paths)
    for path in {base.with_suffix(kind) for kind in kinds} - set(paths):
        path.unlink(missing_ok=True)  # of an earlier result
    contents = {"verb": use.verb, **about, "sentences": use.sentences, "tables": use.tables}
    write_json(base.with_suffix(".json"), contents)
    return paths


def load_from_run(folder: Path, fitted: Collection[str]) -> list[dict[str, Any]]:
    """Load what `save_in_run` stored of fits, by their fingerprints, with the paths ``picture`` or None, ``arrays``."""
    results = []
    for verb in VERBS:
        path = folder / FOLDER / f"{verb}.json"
        contents = read_json(path, f"pvae {verb} {folder} writes it anew") if path.is_file() else {}
        if contents.get("fitted") in fitted:
            picture = path.with_suffix(".png")
            files = {"picture": picture if picture.is_file() else None, "arrays": path.with_suffix(".npz")}
            results.append(contents | files)
    return results
