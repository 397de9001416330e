"""Steps and epochs of everyone: the same rows, turns of two epochs each."""

from __future__ import annotations

from collections.abc import Callable

from tests.benchmarks.clock import Trainer, epochs_in_turns
from tests.benchmarks.contenders import (
    EAGER,
    ENGINES,
    EVERYONE,
    NUMPYRO,
    PYRO,
    find,
    make,
    ours,
    present,
)
from tests.benchmarks.page import Line, Table, compared
from tests.benchmarks.rows import binarized, pictures

# A multiple of both batches.
ROWS, BATCHES, TURNS = 12_288, (128, 1024), 5
# Of a step at the smaller batch; at the larger one the products alone take nearly all.
GOALS = {EAGER: 0.90, NUMPYRO: 1.05, PYRO: 0.36}
EXAMPLE, EXAMPLE_ROWS, EXAMPLE_BATCH, EXAMPLE_GOAL = "Pyro's VAE example", 12_800, 256, 0.15
FASTEST = ours("compiled")


def field(names: tuple[str, ...], maker: Callable[[str], Trainer]) -> tuple[dict[str, Trainer], dict[str, str]]:
    """Those who are here, and the reasons of those who are not."""
    found = dict(present(names, maker))
    absent = {name: trainer for name, trainer in found.items() if isinstance(trainer, str)}
    return {name: trainer for name, trainer in found.items() if name not in absent}, absent


def steps(batch: int, turns: int) -> Table:
    """A step of 784-400-20, as a share of an epoch."""
    rows = binarized(pictures(ROWS)).numpy()
    trainers, absent = field(EVERYONE, lambda name: make(name, rows, batch))
    found = epochs_in_turns(trainers, turns)
    lines = [
        Line(name, f"{s / ROWS * batch * 1e3:.2f} ms, {s:.3f} s", s / found[EAGER], None, s / ROWS * 1e6)
        for name, s in found.items()
    ]
    for peer, goal in GOALS.items():
        lines += compared(found, FASTEST, peer, goal if batch == min(BATCHES) else None)
    note = (
        f"784-400-20, ReLU, float32, Adam at 1e-3: a step, and an epoch of {ROWS:,} rows in memory in random order. "
        "Ratios are to PyTorch written by hand (fused Adam). The KL is in closed form in PyTorch and pythae, estimated "
        "from the draw in Pyro, NumPyro and pvae. Compilation time is excluded."
    )
    return Table(f"A training step, batch {batch}", note, lines, absent)


def example(turns: int = TURNS) -> Table:
    """An epoch of Pyro's VAE example against ours of the same architecture."""
    images = pictures(EXAMPLE_ROWS)
    rows = binarized(images).numpy()

    def maker(name: str) -> Trainer:
        if name == EXAMPLE:
            return find("peers_pyro:Example")(images.view(-1, 28, 28).byte(), EXAMPLE_BATCH)
        made = find("ours:program")(50, "Softplus")
        return find("ours:Engine")(name.removeprefix("pvae, "), rows, EXAMPLE_BATCH, made=made)

    trainers, absent = field((EXAMPLE, *map(ours, ENGINES)), maker)
    found = epochs_in_turns(trainers, turns)
    lines = [Line(name, f"{s:.2f} s", s / found[EXAMPLE], None, s / EXAMPLE_ROWS * 1e6) for name, s in found.items()]
    lines += compared(found, FASTEST, EXAMPLE, EXAMPLE_GOAL)
    note = (
        f"784-400-50, softplus, batch {EXAMPLE_BATCH}: an epoch of {EXAMPLE_ROWS:,} images, in the published "
        "example with its DataLoader, which serves single images, in pvae from rows in memory."
    )
    return Table("An epoch of Pyro's VAE example", note, lines, absent)


def tables(turns: int = TURNS) -> list[Table]:
    return [steps(batch, turns) for batch in BATCHES]
