"""The groups of benchmarks by name, each run in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from tests.benchmarks import hmc, iwae, large, parts, sources, starts, streaming, target, training
from tests.benchmarks.page import Line, Table

LARGE = "784-400-20, batch 128; ratios to the first line, and of memory to the size of the table."
BARE = (
    "784-400-20; ratios to the decoder's forward passes alone on as many draws; memory relative to fewer draws. CPU "
    "time of one thread."
)
LEAPFROG = (
    "784-400-20; ratios to the decoder's forward and backward pass alone on as many chains. CPU time of one "
    "thread. Annealing moves 2,048 chains at once."
)
STREAMING = "784-400-20: rows on disk against the same rows in memory."


def told(title: str, note: str, *rows: Callable[[], list]) -> list[Table]:
    return [Table(title, note, [Line(*row) for some in rows for row in some()], {})]


def groups(quick: bool) -> dict[str, Callable[[], list[Table]]]:
    """The groups by name; quick ones measure next to nothing."""
    turns = {"turns": 1} if quick else {}
    return {
        "steps": lambda: training.tables(**turns),
        "parts": lambda: [parts.table(**({"repeats": 3} if quick else {}))],
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
    """A group's tables from a new interpreter, so that no library's threads or caches disturb another group.

    Not from a process of ``multiprocessing``: in one a DataLoader's worker was three times as slow.
    """
    with tempfile.TemporaryDirectory() as folder:
        where = Path(folder, "tables.json")
        command = [sys.executable, "-m", "tests.benchmarks.groups", name, str(where), *(["--quick"] if quick else [])]
        # Nothing compiled before.
        subprocess.run(command, check=True, env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": folder})
        return [
            Table(title, note, [Line(*line) for line in lines], absent)
            for title, note, lines, absent in json.loads(where.read_text(encoding="utf-8"))
        ]


def main() -> None:
    name, where, *quick = sys.argv[1:]
    torch.manual_seed(0)
    Path(where).write_text(json.dumps(groups(bool(quick))[name]()), encoding="utf-8")


if __name__ == "__main__":
    main()
