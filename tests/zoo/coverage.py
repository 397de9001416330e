"""Coverage of gaps' intervals, and of the optimization gap: `python -m tests.zoo.coverage [--seeds N] [--rows B]`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from pvae.diagnostics import evaluate

from .guides import applies, make_guide
from .kinds import KINDS, make_kind
from .runner import read
from .truths import refined_truth, truth

GUIDES = ("best diagonal", "narrowed", "trained")


def measure(kind_name: str, seed: int, guide_name: str, rows: int) -> dict[str, object]:
    """Evaluate a guide at the default budget; return its gaps' intervals with the exact gaps of the population."""
    kind = make_kind(kind_name, seed)
    guide = make_guide(kind, guide_name, seed)
    exact, best = truth(kind, guide).figures["inference_gap"], refined_truth(kind, guide).figures["inference_gap"]
    evaluation = evaluate(kind.model, guide, kind.rows(rows, seed=20_000 + seed), seed=seed)
    gaps = {"inference_gap": exact, "approximation_gap": best, "amortization_gap": exact - best}
    intervals = evaluation.intervals()
    return {
        "kind": kind_name,
        "seed": seed,
        "guide": guide_name,
        "exact": gaps,
        "interval": {name: intervals[name] for name in gaps},
        "optimization_gap": evaluation.summary()["optimization_gap"].mean,
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.zoo.coverage", description=__doc__)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--rows", type=int, default=100)
    parser.add_argument("--out", type=Path, default=Path("coverage.jsonl"))
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    finished = {(line["kind"], line["seed"], line["guide"]) for line in read(chosen.out)}
    for seed in range(chosen.seeds):
        for name in KINDS:
            for guide in GUIDES:
                if (name, seed, guide) not in finished and applies(make_kind(name, seed), guide):
                    with chosen.out.open("a") as file:
                        file.write(json.dumps(measure(name, seed, guide, chosen.rows)) + "\n")
    lines = read(chosen.out)
    for gap in ("inference_gap", "approximation_gap", "amortization_gap"):
        inside = [
            line["interval"][gap][0] - 2e-3 <= line["exact"][gap] <= line["interval"][gap][1] + 2e-3 for line in lines
        ]
        print(f"{gap}: the interval holds the exact gap in {sum(inside)} of {len(inside)} cases")


if __name__ == "__main__":
    main()
