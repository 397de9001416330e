"""Result cache: finished parts of a job, kept in files, so that a job that was stopped resumes."""

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
    """Return a hash of everything that cached parts depend on, 16 hex digits."""
    return hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()[:16]


def load_all(folder: Path, key: str) -> dict[str, dict[str, Tensor]]:
    """Load all cached parts in a folder that have a key's digest, in the order of their names."""
    paths = sorted(folder.glob("*.safetensors"))
    return {path.stem: tensors for path in paths if (tensors := _load(path, key)) is not None}


def _load(path: Path, key: str) -> dict[str, Tensor] | None:
    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("key") != key:
                return None
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError):
        return None


class ResultCache:
    """Cache of a job's parts by name, each a dataclass of tensors in a file of a folder.

    Arguments:
        folder: of the files; None caches nothing.
        key: everything that the parts depend on. A part that was written under another key is computed anew.
    """

    def __init__(self, folder: Path | None, key: Mapping[str, Any]) -> None:
        self.folder, self.key = folder, digest(key)

    def get_or_compute(self, name: str, kind: type[Part], compute: Callable[[], Part]) -> Part:
        """Return the part of this name: load it if its file is whole, else compute and save it."""
        if self.folder is None:
            return compute()
        names = {field.name for field in fields(kind)}  # type: ignore[arg-type]
        return kind(**self.get_or_compute_tensors(name, lambda: vars(compute()), names))

    def get_or_compute_tensors(
        self, name: str, compute: Callable[[], Mapping[str, Any]], names: Collection[str] | None = None
    ) -> dict[str, Tensor]:
        """Return a part that is a dict of tensors, as `get_or_compute`; on the CPU if it is cached.

        A file whose tensors have other names than ``names``, if these are given, is computed anew.
        """
        if self.folder is None:
            return dict(compute())
        path = self.folder / f"{name}.safetensors"
        cached = _load(path, self.key)
        if cached is not None and (names is None or cached.keys() == set(names)):
            return cached
        tensors = {key: torch.as_tensor(value).detach().cpu().contiguous().clone() for key, value in compute().items()}
        with atomic_replace(path) as temporary:
            save_file(tensors, temporary, metadata={"key": self.key})
        return tensors
