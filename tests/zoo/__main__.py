"""Command line of the zoo: run diagnoses into a file of JSON lines, or make tables of such files."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from .guides import GUIDES
from .kinds import KINDS
from .page import page
from .runner import list_cases, read, run


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.zoo", description=__doc__)
    parser.add_argument("--budget", nargs="+", default=["quick"], help="quick, standard or thorough")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS), metavar="KIND")
    parser.add_argument("--guides", nargs="+", default=list(GUIDES), choices=GUIDES, metavar="GUIDE")
    parser.add_argument("--seeds", type=int, default=1, help="instances of each kind")
    parser.add_argument("--part", default="1/1", help="i/n: every n-th instance, from the i-th")
    parser.add_argument("--out", type=Path, nargs="+", default=[Path("zoo.jsonl")], help="file of JSON lines")
    parser.add_argument("--page", action="store_true", help="print tables of the files instead")
    chosen = parser.parse_args()
    if chosen.page:
        print(page([line for path in chosen.out for line in read(path)]), end="")
        return
    torch.set_num_threads(1)
    cases = list(list_cases(chosen.kinds, chosen.guides, chosen.seeds, chosen.budget))
    number, of = map(int, chosen.part.split("/"))
    instances = list(dict.fromkeys(case[:2] for case in cases))
    share = set(instances[number - 1 :: of])
    run([case for case in cases if case[:2] in share], chosen.out[0])


if __name__ == "__main__":
    main()
