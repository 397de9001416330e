"""Checkpoints: named tensors and a JSON header in one safetensors file, replaced whole; nothing is ever unpickled.

Where several processes train, each writes its rows to a part of its own, and the file names the parts: one of these is
replaced by no other, so that whoever reads the file finds the parts of the same step.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from pvae.errors import UserError
from pvae.runtime.files import atomic_replace, write_json

FILE, STATE, BEST, RANDOM = "checkpoint.safetensors", "state.json", "best.", "random."
PARTS = "checkpoint.*.safetensors"

# How often a checkpoint is tried whose parts are replaced while it is read.
READS = 3


class CheckpointShard(NamedTuple):
    """A file of a checkpoint, and which rows of tables it holds: those from ``start`` up to ``stop``."""

    file: str
    start: int
    stop: int


def write(folder: Path, tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    """Write ``checkpoint.safetensors``, and the header once more as ``state.json`` for people to read.

    Parts that the header does not name among its ``parts`` are removed.
    """
    _save(folder / FILE, tensors, header)
    write_json(folder / STATE, header)
    remove(folder, {file for file, *_ in header.get("parts", [])})


def write_part(folder: Path, part: CheckpointShard, tensors: dict[str, Tensor]) -> None:
    """Write one process's part of a checkpoint whose header is yet to be written: its rows, its random stream."""
    _save(folder / part.file, tensors, {"rows": [part.start, part.stop]})


def remove(folder: Path, but: Collection[str] = ()) -> None:
    """Remove the parts of checkpoints, but for these."""
    for file in folder.glob(PARTS):
        if file.name not in but:
            file.unlink(missing_ok=True)


def _save(path: Path, tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    with atomic_replace(path) as temporary:
        own = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(own, temporary, metadata={"pvae": json.dumps(header)})


def read(
    folder: Path, tables: Collection[str] = (), rows: range | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and header of a folder's checkpoint, whatever number of processes wrote it.

    Arguments:
        tables: names of tensors with a row for each datapoint.
        rows: which of these to read, those of a process with its random stream; all unless given.

    Raises:
        UserError: there is none, or it is truncated or not ours.
    """
    path = folder / FILE
    if not path.is_file():
        raise UserError(f"{folder} holds no checkpoint ({FILE})")
    try:
        for _ in range(READS):
            with suppress(FileNotFoundError):  # the parts were replaced before they were opened
                return _read(folder, tables, rows)
        raise ValueError("parts that it names are missing")
    except (SafetensorError, KeyError, ValueError, TypeError, OSError) as error:
        raise UserError(
            f"{path} is truncated or not a checkpoint of pvae ({error}); start anew with --overwrite"
        ) from error


def _read(folder: Path, tables: Collection[str], rows: range | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    with safe_open(folder / FILE, framework="pt") as file:
        header = json.loads((file.metadata() or {})["pvae"])
        tensors = {name: _rows(file, name, rows if name in tables else None) for name in file.keys()}  # noqa: SIM118
    parts = [CheckpointShard(*part) for part in header.get("parts", [])]
    pieces: dict[str, list[Tensor]] = {}
    for part in parts:
        for name, values in _read_part(folder, part, rows or range(parts[-1].stop)).items():
            pieces.setdefault(name, []).append(values)
    return tensors | {name: torch.cat(found) for name, found in pieces.items()}, header


def _read_part(folder: Path, part: CheckpointShard, rows: range) -> dict[str, Tensor]:
    """What a part holds of these rows, and its random stream if it holds them alone."""
    start, stop = max(part.start, rows.start) - part.start, min(part.stop, rows.stop) - part.start
    own = rows == range(part.start, part.stop)
    with safe_open(folder / part.file, framework="pt") as file:
        random = [name for name in file.keys() if name.startswith(RANDOM)]  # noqa: SIM118
        found = {name: file.get_tensor(name) for name in random if own}
        for name in set(file.keys()) - set(random) if start < stop else ():
            found[name] = _rows(file, name, range(start, stop))
    return found


def _rows(file: Any, name: str, rows: range | None) -> Tensor:
    return file.get_tensor(name) if rows is None else file.get_slice(name)[rows.start : rows.stop]


def best_params(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the best epoch, under their own names; empty without early stopping."""
    return {name.removeprefix(BEST): tensor for name, tensor in tensors.items() if name.startswith(BEST)}


def load_module(module: nn.Module, prefix: str, tensors: dict[str, Tensor], where: Path) -> None:
    """Load the tensors ``prefix.*`` into a module.

    Raises:
        UserError: names or shapes differ: the checkpoint is of another model.
    """
    own = module.state_dict()
    found = {name.removeprefix(f"{prefix}."): t for name, t in tensors.items() if name.startswith(f"{prefix}.")}
    for name in sorted(own.keys() | found.keys()):
        one, other = own.get(name), found.get(name)
        if one is None or other is None or one.shape != other.shape:
            here, there = (tuple(t.shape) if isinstance(t, torch.Tensor) else "absent" for t in (one, other))
            raise UserError(
                f"{where / FILE} is of another model: {prefix}.{name} is {there} in it, but {here} in this recipe"
            )
    module.load_state_dict(found)
