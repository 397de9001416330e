"""Speed and memory as ratios in one run on one machine: ``make bench`` prints them and writes docs/benchmarks.md.

``python -m tests.benchmarks GROUP...`` prints some groups alone and leaves the page as it is; ``--quick`` measures
next to nothing, to see that all groups run.
"""

from __future__ import annotations

import argparse
import time

from tests.benchmarks import page
from tests.benchmarks.groups import apart, groups


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument(
        "group",
        nargs="*",
        metavar="GROUP",
        choices=[*groups(False), []],
        help=f"{', '.join(groups(False))}; all of them unless given",
    )
    parser.add_argument("--quick", action="store_true", help="see that everything runs")
    given = parser.parse_args()
    tables = []
    for name in given.group or groups(False):
        begin = time.perf_counter()
        found = apart(name, given.quick)
        print(*(table.markdown() for table in found), f"({name}: {time.perf_counter() - begin:.0f} s)\n", sep="\n\n")
        tables += found
    if not (given.group or given.quick):
        page.write(tables)


if __name__ == "__main__":
    main()
