"""Checkpoints: named tensors and a JSON header in one safetensors file, replaced atomically; nothing is unpickled.

With several ranks each writes its rows and random state to a new shard; the file names the shards of the same step.
"""

from __future__ import annotations

import json
import time
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from pvae.errors import UserError, param
from pvae.runtime import distributed
from pvae.runtime.files import atomic_replace, write_json

FILE, STATE, BEST, RANDOM = "checkpoint.safetensors", "state.json", "best.", "random."
PARTS = "checkpoint.*.safetensors"


class CheckpointShard(NamedTuple):
    """One rank's file of a checkpoint, with rows ``start`` to ``stop`` of the per-datapoint tables."""

    file: str
    start: int
    stop: int


def write(folder: Path, tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    """Write ``checkpoint.safetensors``, and its header also as ``state.json``; remove shards that it does not name."""
    _save(folder / FILE, tensors, header)
    write_json(folder / STATE, header)
    remove(folder, {file for file, *_ in header.get("parts", [])})


def write_part(folder: Path, part: CheckpointShard, tensors: dict[str, Tensor]) -> None:
    """Write one rank's shard."""
    _save(folder / part.file, tensors, {"rows": [part.start, part.stop]})


def write_ranks(
    folder: Path, tensors: dict[str, Tensor], shard: dict[str, Tensor], header: dict[str, Any], num_rows: int
) -> None:
    """Write a checkpoint from all ranks: first each its shard, then rank 0 the shared tensors and the header.

    Until the last file is written the old checkpoint is valid. A single rank writes one file. All ranks share
    ``tensors``; ``shard`` holds this rank's rows of tables, ``num_rows`` on all ranks, and its random state.
    """
    if distributed.world_size() == 1:
        write(folder, tensors | shard, header)
        return
    mark, shards = distributed.broadcast_int(time.time_ns()), enumerate(distributed.shards(num_rows))
    parts = [CheckpointShard(f"checkpoint.{mark:x}-{r}.safetensors", rows.start, rows.stop) for r, rows in shards]
    with distributed.fail_together():
        write_part(folder, parts[distributed.rank()], shard)
    with distributed.fail_together():
        if distributed.is_main_process():
            write(folder, tensors, header | {"parts": parts})


def remove(folder: Path, but: Collection[str] = ()) -> None:
    """Remove the shards of checkpoints, except for those named."""
    for file in folder.glob(PARTS):
        if file.name not in but:
            file.unlink(missing_ok=True)


def _save(path: Path, tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    with atomic_replace(path) as temporary:
        arrays = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(arrays, temporary, metadata={"pvae": json.dumps(header)})


def read(
    folder: Path, tables: Collection[str] = (), rows: range | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return tensors and header of a folder's checkpoint, whatever number of ranks wrote it.

    Arguments:
        tables: names of tensors with a row for each datapoint.
        rows: rows of these to read, by a rank that owns them together with its random state; all by default.
    """
    path = folder / FILE
    if not path.is_file():
        raise UserError(f"{folder} holds no checkpoint ({FILE})")
    try:
        for _ in range(3):
            with suppress(FileNotFoundError):  # its shards were replaced before they were opened
                return _read(folder, tables, rows)
        raise ValueError("parts that it names are missing")
    except (SafetensorError, KeyError, ValueError, TypeError, OSError) as error:
        reason = f"{path} is truncated or not a checkpoint of pvae ({error})"
        raise UserError(reason, f"start anew with {param('overwrite', True)}") from error


def _read(folder: Path, tables: Collection[str], rows: range | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    with safe_open(folder / FILE, framework="pt") as file:
        header = json.loads((file.metadata() or {})["pvae"])
        tensors = {name: _rows(file, name, rows if name in tables else None) for name in file.keys()}  # noqa: SIM118
    parts = [CheckpointShard(*part) for part in header.get("parts", [])]
    shards = [_read_part(folder, part, rows or range(parts[-1].stop)) for part in parts]
    names = {name for shard in shards for name in shard}
    return tensors | {name: torch.cat([s[name] for s in shards if name in s]) for name in names}, header


def _read_part(folder: Path, part: CheckpointShard, rows: range) -> dict[str, Tensor]:
    """Return a shard's tensors of these rows, with its random state if the rows are exactly its own."""
    within = range(max(part.start, rows.start) - part.start, min(part.stop, rows.stop) - part.start)
    with safe_open(folder / part.file, framework="pt") as file:
        random = {name for name in file.keys() if name.startswith(RANDOM)}  # noqa: SIM118
        tensors = {name: _rows(file, name, within) for name in set(file.keys()) - random if within}
        if rows == range(part.start, part.stop):
            tensors |= {name: file.get_tensor(name) for name in random}
    return tensors


def _rows(file: Any, name: str, rows: range | None) -> Tensor:
    return file.get_tensor(name) if rows is None else file.get_slice(name)[rows.start : rows.stop]


def best_params(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of the best epoch under their own names; empty without early stopping."""
    return {name.removeprefix(BEST): tensor for name, tensor in tensors.items() if name.startswith(BEST)}


def load_module(module: nn.Module, prefix: str, tensors: dict[str, Tensor], where: Path) -> None:
    """Load the tensors ``prefix.*`` into a module; refuse other names or shapes, which are of another model."""
    current = module.state_dict()
    state = {name.removeprefix(f"{prefix}."): t for name, t in tensors.items() if name.startswith(f"{prefix}.")}
    for name in sorted(current.keys() | state.keys()):
        one, other = current.get(name), state.get(name)
        if one is None or other is None or one.shape != other.shape:
            here, there = ("absent" if t is None else tuple(t.shape) for t in (one, other))
            change = f"{prefix}.{name} is {there} in it, but {here} in this recipe"
            raise UserError(f"{where / FILE} is of another model: {change}")
    module.load_state_dict(state)
