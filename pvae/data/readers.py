"""Readers of tables: .npy, .npz, .csv and .parquet files to arrays; nothing is ever unpickled."""

from __future__ import annotations

from csv import reader as csv_reader
from pathlib import Path
from typing import Any

import numpy as np

from pvae.errors import UserError, nearest


def read_table(path: Path) -> dict[str, np.ndarray]:
    """Read rows of numbers from a .npy, .npz, .csv or .parquet file.

    Returns:
        Arrays ``x_train`` and, if the file has them, ``y_train``, ``x_test``, ``y_test``: an .npz file may have arrays
        of these names, or ``x`` and ``y``; a .csv or .parquet may have a column ``label``, and the names of its other
        columns are ``columns``. An .npy file gives a memory map.
    """
    readers = {".npy": _read_npy, ".npz": _read_npz, ".csv": _read_csv, ".parquet": _read_parquet}
    if path.suffix not in readers:
        raise UserError(f"{path}: unknown format '{path.suffix}'{nearest(path.suffix, readers)}")
    if not path.is_file():
        raise UserError(f"{path}: {'a folder, and no file' if path.is_dir() else 'no such file'}")
    if path.stat().st_size == 0:
        raise UserError(f"{path}: the file is empty")
    try:
        return readers[path.suffix](path)
    except UserError:
        raise
    except Exception as error:  # numpy, zipfile and pyarrow raise many kinds; all mean that the file is unreadable
        reason = " ".join(str(error).split())
        with path.open("rb") as file:
            foreign = file.read(2) not in (b"\x93N", b"PK")
        if "allow_pickle" in reason and foreign:
            reason = "it has another format's bytes"
        elif "allow_pickle" in reason or "Python objects" in reason:
            reason = "it holds pickled Python objects, which are never loaded; save a plain numeric array"
        raise UserError(f"{path}: not a readable {path.suffix} file ({reason})") from error


def _read_npy(path: Path) -> dict[str, np.ndarray]:
    rows = np.load(path, mmap_mode="r", allow_pickle=False)
    if not isinstance(rows, np.ndarray):
        raise UserError(f"{path}: holds an .npz archive; name it so")
    return {"x_train": rows}


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    names = {"x": "x_train", "y": "y_train"} | {n: n for n in ("x_train", "y_train", "x_test", "y_test")}
    archive = np.load(path, allow_pickle=False)
    if isinstance(archive, np.ndarray):
        raise UserError(f"{path}: holds a single .npy array; name it so")
    with archive:
        if len(archive.files) == 1:
            return {"x_train": archive[archive.files[0]]}
        arrays = {names[name]: archive[name] for name in archive.files if name in names}
        if "x_train" not in arrays:
            raise UserError(f"{path}: has arrays {', '.join(archive.files)}, but none named x or x_train")
        for part in ("train", "test"):
            x, y = arrays.get(f"x_{part}"), arrays.get(f"y_{part}")
            if x is not None and y is not None and len(x) != len(y):
                raise UserError(f"{path}: {len(x)} rows but {len(y)} labels in the {part} part")
        return arrays


def _read_csv(path: Path) -> dict[str, np.ndarray]:
    from pyarrow import csv

    with path.open(encoding="utf-8-sig", newline="") as file:
        first = next(csv_reader(file), [])
    # A line of words, or with the word "label", names columns; a line of numbers is data.
    header = "label" in first or not any(map(_is_number, first))
    if not header and not all(map(_is_number, first)):
        wrong = next(cell for cell in first if not _is_number(cell))
        raise UserError(f"{path}: the first line mixes numbers with '{wrong}', so it neither names columns nor is data")
    arrays = _columns(path, csv.read_csv(path, read_options=csv.ReadOptions(autogenerate_column_names=not header)))
    return arrays if header else {name: values for name, values in arrays.items() if name != "columns"}


def _read_parquet(path: Path) -> dict[str, np.ndarray]:
    from pyarrow import parquet

    return _columns(path, parquet.read_table(path))


def _columns(path: Path, table: Any) -> dict[str, np.ndarray]:
    from pyarrow import types

    names = [name for name in table.column_names if name != "label" and not name.startswith("__index_level_")]
    if len(set(table.column_names)) < len(table.column_names):
        raise UserError(f"{path}: two columns have the same name; give each its own")
    for name in names:
        kind = table.schema.field(name).type
        if not (types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind) or types.is_null(kind)):
            raise UserError(f"{path}: column '{name}' is not numeric ({kind})")
    if not names or not table.num_rows:
        raise UserError(f"{path}: no rows of numbers in it")
    x = np.column_stack([table.column(name).to_numpy().astype(np.float64) for name in names])
    labels = {"y_train": table.column("label").to_numpy()} if "label" in table.column_names else {}
    return {"x_train": x, "columns": np.array(names), **labels}


def _is_number(text: str) -> bool:
    try:
        float(text.strip() or "nan")
    except ValueError:
        return False
    return True
