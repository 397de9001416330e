"""Rows that all contenders train on: MNIST where its files are, else noise. Nothing is downloaded."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from pvae.data.loading import load_data


@cache
def mnist() -> tuple[Tensor, Tensor] | None:
    """Training and test images [N, 784], whole numbers from 0 to 255; None where the files are not here."""
    folder = Path(os.environ.get("PVAE_DATA") or Path.home() / ".cache" / "pvae")
    if not (folder / "MNIST" / "raw").is_dir():
        return None
    found = load_data("mnist", binarize="levels", data_folder=folder)
    return found.train, found.test


def pictures(count: int) -> Tensor:
    """So many training images [count, 784], whole numbers from 0 to 255."""
    found = mnist()
    if found is not None:
        return found[0][:count]
    return torch.randint(256, (count, 784), generator=torch.Generator().manual_seed(0)).float()


def binarized(images: Tensor) -> Tensor:
    """Pixels above one half."""
    return (images > 127.5).float()
