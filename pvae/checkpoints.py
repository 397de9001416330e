"""Checkpoints: named tensors and a JSON header in one safetensors file, replaced whole; nothing is ever unpickled."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from pvae.errors import UserError
from pvae.files import replacing, write_json

__all__ = ["best", "fill", "read", "write"]

FILE, STATE, BEST = "checkpoint.safetensors", "state.json", "best."


def write(folder: Path, tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    """Write ``checkpoint.safetensors``, and the header once more as ``state.json`` for people to read."""
    with replacing(folder / FILE) as temporary:
        own = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(own, temporary, metadata={"pvae": json.dumps(header)})
    write_json(folder / STATE, header)


def read(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and header of a folder's checkpoint.

    Raises:
        UserError: there is none, or it is truncated or not ours.
    """
    path = folder / FILE
    if not path.is_file():
        raise UserError(f"{folder} holds no checkpoint ({FILE})")
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})["pvae"])
            return {name: file.get_tensor(name) for name in file.keys()}, header  # noqa: SIM118
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise UserError(
            f"{path} is truncated or not a checkpoint of pvae ({error}); start anew with --overwrite"
        ) from error


def best(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the best epoch, under their own names; empty without early stopping."""
    return {name.removeprefix(BEST): tensor for name, tensor in tensors.items() if name.startswith(BEST)}


def fill(module: nn.Module, prefix: str, tensors: dict[str, Tensor], where: Path) -> None:
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
