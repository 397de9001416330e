"""Cost of the inference methods: steps of per-datapoint and semi-amortized guides relative to the amortized one."""

from __future__ import annotations

from tests.benchmarks.clock import epochs_in_turns
from tests.benchmarks.contenders import ENGINES, find, ours
from tests.benchmarks.page import Line, Table
from tests.benchmarks.rows import binarized, pictures
from tests.benchmarks.training import field

ROWS, BATCH, TURNS = 1280, 128, 2
AMORTIZED = "amortized"
# The most that a step may cost, in amortized steps of the same engine; None is measured without a goal.
GOALS = {
    "per-datapoint, 1 local step": 1.3,
    "per-datapoint, 5 local steps": None,
    "semi-amortized, 8 steps of 1 draw": 12.0,
    "semi-amortized, 5 steps of 8 draws": None,
}


def tables(turns: int = TURNS) -> list[Table]:
    rows, lines, absent = binarized(pictures(ROWS)).numpy(), [], {}
    for engine in ENGINES:
        trainers, missing = field(
            (AMORTIZED, *GOALS), lambda name, engine=engine: find("ours:Engine")(engine, rows, BATCH, name)
        )
        if AMORTIZED in missing:
            absent[ours(engine)] = missing[AMORTIZED]
            continue
        found = epochs_in_turns(trainers, turns)
        lines += [
            Line(f"{ours(engine)}: {name}", f"{s / ROWS * BATCH * 1e3:.2f} ms", s / found[AMORTIZED], GOALS.get(name))
            for name, s in found.items()
        ]
        absent |= {f"{ours(engine)}: {name}": reason for name, reason in missing.items()}
    note = "784-400-20, batch 128, refinement unrolled; ratios to the amortized step of the same engine."
    return [Table("A step of each inference method", note, lines, absent)]
