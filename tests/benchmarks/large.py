"""Tables of per-datapoint rows: what a hundred times as many cost a step, and in memory."""

from __future__ import annotations

import subprocess
import sys

from pvae.inference.guides import PerDatapoint
from tests.benchmarks.clock import medians
from tests.benchmarks.ours import binary, program, stepper

BATCH, FEW, MANY = 128, 20_000, 2_000_000

MEMORY = """
import sys
from tests.benchmarks.clock import peak_memory
from tests.benchmarks.large import *
rows = int(sys.argv[1])
vae, family, _ = program()
guide = PerDatapoint(rows, family, local_steps=1)
step = stepper(vae, guide, binary(BATCH), rows)
for table in (guide.table, guide.first, guide.second):
    table += 0  # pages of zeros take no memory until they are touched
for _ in range(5): step()
print(peak_memory())
"""


def times(repeats: int = 80) -> list[tuple[str, str, float, float | None]]:
    """Lines of the page of benchmarks: a step with few and with many rows."""
    x, (vae, family, _) = binary(BATCH), program()
    jobs = {n: stepper(vae, PerDatapoint(n, family, local_steps=1), x, n) for n in (FEW, MANY)}
    found = medians({f"{n:,}": job for n, job in jobs.items()}, repeats)
    fewest = found[f"{FEW:,}"]
    return [
        (f"per-datapoint step, {name} rows", f"{seconds * 1e3:.2f} ms", seconds / fewest, goal)
        for (name, seconds), goal in zip(found.items(), (None, 1.15), strict=True)
    ]


def memory() -> list[tuple[str, str, float, float | None]]:
    """Peak memory of training a large table, less that of training a small one, against the table's own size."""
    peaks = {}
    for rows in (FEW, MANY):
        done = subprocess.run([sys.executable, "-c", MEMORY, str(rows)], capture_output=True, text=True, check=True)
        peaks[rows] = int(done.stdout)
    grown = peaks[MANY] - peaks[FEW]
    table = (MANY - FEW) * (3 * 40 + 1) * 4
    return [
        (f"memory of {MANY:,} rows, over that of table and moments", f"{grown / 2**20:.0f} MiB", grown / table, 1.05)
    ]
