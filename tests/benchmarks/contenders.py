"""Who takes part: names to trainers of a VAE 784-400-20 with ReLU, each imported when it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import numpy as np

from tests.benchmarks.clock import Trainer

PIXELS, HIDDEN, LATENT = 784, 400, 20
LEARNING_RATE = 1e-3

# What ``fit`` may take as ``engine``; what it does not take here is skipped.
ENGINES = ("pyro", "traced", "compiled", "graph")

PYRO, EAGER, COMPILED, NUMPYRO, PYTHAE, PRODUCTS = (
    "Pyro, SVI.step",
    "PyTorch, eager",
    "PyTorch, torch.compile",
    "NumPyro, jitted epoch",
    "pythae, BaseTrainer",
    "matrix products alone",
)
PEERS = {
    PYRO: "peers_pyro:Resident",
    EAGER: "peers_torch:Eager",
    COMPILED: "peers_torch:Compiled",
    NUMPYRO: "peers_numpyro:NumPyro",
    PYTHAE: "peers_pythae:Pythae",
    PRODUCTS: "peers_torch:Products",
}


class Absent(Exception):
    """A contender that is not here, with the reason in one line."""


def ours(engine: str) -> str:
    """The name of pvae under one of its engines."""
    return f"pvae, {engine}"


OURS = tuple(map(ours, ENGINES))
EVERYONE = (*PEERS, *OURS)


def find(target: str) -> Any:
    """What ``file:name`` of this folder stands for.

    Raises:
        Absent: a library that it needs is not installed.
    """
    file, name = target.split(":")
    try:
        return getattr(import_module(f"tests.benchmarks.{file}"), name)
    except ModuleNotFoundError as error:
        raise Absent(f"{error.name} is not installed: skipped; pip install 'pvae-pyro[bench]'") from error


def make(name: str, rows: np.ndarray, batch: int) -> Trainer:
    """The contender of a name, about to train on rows [N, 784], N a multiple of the batch.

    Raises:
        Absent: it can't take part here.
    """
    if name in OURS:
        return find("ours:Engine")(name.removeprefix("pvae, "), rows, batch)
    return find(PEERS[name])(rows, batch)


def present(names: tuple[str, ...], maker: Callable[[str], Trainer]) -> Iterator[tuple[str, Trainer | str]]:
    """Each name with its trainer, which has run for an epoch, or with the reason why there is none."""
    for name in names:
        try:
            trainer = maker(name)
            trainer.seconds(1)
        except Absent as reason:
            yield name, str(reason)
        else:
            yield name, trainer
