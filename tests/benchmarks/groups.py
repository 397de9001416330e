"""The groups of benchmarks by name, each run in a process of its own."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch

from tests.benchmarks import hmc, iwae, large, sources, starts, streaming, target, training
from tests.benchmarks.page import Line, Table

LARGE = "784-400-20, batch 128; the second line's peer is the first, and the table's own size."
BARE = "784-400-20; ratios to the decoder's bare forward passes on as many draws, of memory to fewer draws. CPU time."
LEAPFROG = (
    "784-400-20; ratios to the decoder's bare forward and backward pass on as many chains. CPU time. A leapfrog costs "
    "Pyro and Python some milliseconds whatever its size; annealing moves 2,048 at once."
)
STREAMING = "784-400-20: rows on disk against the same rows in memory."


def told(title: str, note: str, *rows: Callable[[], list]) -> list[Table]:
    return [Table(title, note, [Line(*row) for some in rows for row in some()], {})]


def groups(quick: bool) -> dict[str, Callable[[], list[Table]]]:
    """The groups by name; quick ones measure next to nothing."""
    turns = {"turns": 1} if quick else {}
    return {
        "steps": lambda: training.tables(**turns),
        "example": lambda: [training.example(**turns)],
        "sources": lambda: sources.tables(**turns),
        "starts": starts.tables,
        "target": lambda: target.tables(**({"limit": 1} if quick else {})),
        "nll": lambda: [iwae.against_pythae(**({"repeats": 1} if quick else {}))],
        "tables": lambda: told("Tables of per-datapoint rows", LARGE, large.times, large.memory),
        "iwae": lambda: told("IWAE and k-hat", BARE, iwae.rows),
        "hmc": lambda: told("A leapfrog", LEAPFROG, hmc.rows),
        "streaming": lambda: told("Rows on disk", STREAMING, streaming.rows),
    }


def apart(name: str, quick: bool) -> list[Table]:
    """A group's tables from a new process, so that no library's threads or caches disturb another group."""
    with ProcessPoolExecutor(1, get_context("spawn")) as own:
        return own.submit(run, name, quick).result()


def run(name: str, quick: bool) -> list[Table]:
    """A group's tables, with nothing compiled before."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        return groups(quick)[name]()
