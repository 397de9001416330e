"""A ledger of finished parts: what a run has computed is read again, so that a long job goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pvae.runtime.files import atomic_replace

Part = TypeVar("Part")


def digest(key: Mapping[str, Any]) -> str:
    """A short name of everything that parts depend on.

    >>> digest({"K": 5}) == digest({"K": 6})
    False
    """
    return hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()[:16]


def load_all(folder: Path, key: str) -> dict[str, dict[str, Tensor]]:
    """The tensors of all parts in a folder that were written under a key's digest, in the order of their names."""
    found = {path.stem: _read(path, key) for path in sorted(folder.glob("*.safetensors"))}
    return {name: tensors for name, tensors in found.items() if tensors is not None}


def _read(path: Path, key: str) -> dict[str, Tensor] | None:
    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("key") != key:
                return None
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError):
        return None


class ResultCache:
    """Parts of a job by name, each a dataclass of tensors, kept in files of a folder.

    Arguments:
        folder: where the parts are; None keeps nothing.
        key: everything that the parts depend on. A part that was written under another key is computed anew.
    """

    def __init__(self, folder: Path | None, key: Mapping[str, Any]) -> None:
        self.folder, self.key = folder, digest(key)

    def part(self, name: str, kind: type[Part], compute: Callable[[], Part]) -> Part:
        """The part of this name: read if it is there and whole, else computed and written."""
        if self.folder is None:
            return compute()
        names = {field.name for field in fields(kind)}  # type: ignore[arg-type]
        return kind(**self.tensors(name, lambda: vars(compute()), names))

    def tensors(
        self, name: str, compute: Callable[[], Mapping[str, Any]], names: Collection[str] | None = None
    ) -> dict[str, Tensor]:
        """Likewise a part that is tensors by name, of these names where they are known, on the CPU once it is kept."""
        if self.folder is None:
            return dict(compute())
        path = self.folder / f"{name}.safetensors"
        found = _read(path, self.key)
        if found is not None and (names is None or found.keys() == set(names)):
            return found
        tensors = {key: torch.as_tensor(value).detach().cpu().contiguous().clone() for key, value in compute().items()}
        with atomic_replace(path) as temporary:
            save_file(tensors, temporary, metadata={"key": self.key})
        return tensors
