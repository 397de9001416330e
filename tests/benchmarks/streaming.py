"""An epoch on rows that stay on disk against one on the same rows in memory.

``python -m tests.benchmarks.streaming`` prints it for a 784-400-20 VAE; jobs take turns, in one process on one machine.
The file is in the system's cache after the first epoch: what is measured is the price of reading, not the disk.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from pyro.infer import SVI

from pvae.data.dataset import Dataset
from pvae.data.loading import load_data
from pvae.inference.guides import Amortized
from pvae.runtime.torch_state import no_validation
from pvae.training.objectives import ELBO
from pvae.training.optimizer import FusedAdam
from tests.benchmarks.clock import medians
from tests.benchmarks.ours import program

ROWS, TEST, BATCH = 12_900, 100, 128
BATCHES = (ROWS - TEST) // BATCH


def saved(folder: Path) -> str:
    """The path of a file of random bits, as bytes."""
    path = folder / "bits.npy"
    np.save(path, np.random.default_rng(0).integers(0, 2, (ROWS, 784), dtype=np.uint8))
    return str(path)


def epoch(data: Dataset) -> Callable[[], None]:
    """A function that trains for an epoch."""
    vae, family, encoder = program(20)
    guide = Amortized(encoder, family)
    svi = SVI(vae.model, guide, FusedAdam(vae, guide), ELBO())

    def run() -> None:
        with no_validation():
            for x, index in data.batches(BATCH, 0, 0):
                svi.step(x, index)

    return run


def reading(data: Dataset) -> Callable[[], None]:
    """A function that goes through an epoch's batches and does nothing with them."""

    def run() -> None:
        for _ in data.batches(BATCH, 0, 0):
            pass

    return run


def rows() -> list[tuple[str, str, float, float | None]]:
    """Lines of the page of benchmarks."""
    with tempfile.TemporaryDirectory() as folder:
        path, kinds = saved(Path(folder)), {"memory": False, "disk": True}
        data = {kind: load_data(path, test_size=TEST, stream=stream) for kind, stream in kinds.items()}
        epochs = medians({kind: epoch(own) for kind, own in data.items()}, 7)
        alone = medians({kind: reading(own) for kind, own in data.items()}, 7)
    return [
        ("epoch of 12,800 rows in memory", f"{epochs['memory']:.2f} s", 1.0, None),
        ("epoch of the same rows on disk", f"{epochs['disk']:.2f} s", epochs["disk"] / epochs["memory"], 1.15),
        ("a batch of 128 rows from memory", f"{alone['memory'] / BATCHES * 1e6:.0f} us", 1.0, None),
        ("the same from disk", f"{alone['disk'] / BATCHES * 1e6:.0f} us", alone["disk"] / alone["memory"], None),
    ]


def main() -> None:
    torch.manual_seed(0)
    for name, figure, share, goal in rows():
        print(f"{name}: {figure}, ratio {share:.2f}" + (f" (goal {goal})" if goal else ""), flush=True)


if __name__ == "__main__":
    main()
