"""What it costs to begin: seconds before training runs at full speed, and memory, each in a process of its own.

``python -m tests.benchmarks.starts NAME`` measures one contender and prints it as JSON.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np

from tests.benchmarks.clock import peak_memory
from tests.benchmarks.contenders import EVERYONE, PRODUCTS, Absent, make

ROWS, BATCH = 12_288, 128


def measured(name: str) -> dict[str, float | str]:
    """Start in seconds, peak and growth in bytes: the first epoch beyond later ones, imports beforehand."""
    rows = (np.random.default_rng(0).random((ROWS, 784)) < 0.3).astype(np.float32)
    try:
        make(name, rows[:BATCH], BATCH)
        imported, begin = peak_memory(), time.perf_counter()
        trainer = make(name, rows, BATCH)
        trainer.seconds(1)
        first = time.perf_counter() - begin
        epoch = statistics.median(trainer.seconds(4)[1:])
    except Absent as reason:
        return {"absent": str(reason)}
    return {"start": max(first - epoch, 0.0), "peak": peak_memory(), "grown": peak_memory() - imported}


def tables() -> list:
    from tests.benchmarks.page import Line, Table

    lines, absent = [], {}
    for name in (name for name in EVERYONE if name != PRODUCTS):
        found = child(name)
        if "absent" in found:
            absent[name] = found["absent"]
            continue
        lines.append(
            Line(name, f"{found['start']:.1f} s, {found['peak'] / 2**20:.0f} MiB, {found['grown'] / 2**20:.0f} MiB")
        )
    note = (
        "784-400-20, batch 128, each in a new process with an empty compilation cache: additional time of the first "
        "epoch over a later one (construction, tracing, compilation); peak memory of the process with "
        f"{ROWS:,} rows; and its growth after libraries were imported and the networks built."
    )
    return [Table("Start and memory", note, lines, absent)]


def child(name: str) -> dict:
    """What a new process says of a contender."""
    with tempfile.TemporaryDirectory() as cache:
        done = subprocess.run(
            [sys.executable, "-m", "tests.benchmarks.starts", name],
            env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    print(json.dumps(measured(sys.argv[1])))
