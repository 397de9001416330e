"""The page of posterior draws' errors against their seconds, and its picture."""

from __future__ import annotations

import math
from pathlib import Path
from textwrap import fill
from typing import Any

from matplotlib.figure import Figure

from pvae.reporting.style import COLOURS
from tests.benchmarks.page import machine

DOCS = Path(__file__).parents[2] / "docs"
MEAN, SD = 0.02, 0.01  # the goal: within these for 95% of rows
WAYS = {"guide": 0, "refine": 2, "posterior": 1, "HMC": 3}  # colours by the first word of a contender

INTRODUCTION = """# Accuracy of posterior draws against seconds

Written by `python -m tests.benchmarks.posterior` (set `PVAE_DATA` for MNIST). Which way to draw from the posteriors of
rows is the most accurate for its time: the guide alone; its draws with Pareto-smoothed weights (PSIS, 2,000 draws); the
same once each row's q is refined by 100 steps; `pvae.posterior`, row by row the cheapest way whose checks pass; or
Hamiltonian Monte Carlo alone, 8 chains from annealed particles, with 300 draws of warm-up?

The truth of digits and MNIST is 8 HMC chains of 10,000 draws, whose own error is said; that of the zoo is exact. An
error is a root of the mean square over latent dimensions: of the posterior mean, in posterior standard deviations, and
of the log of the standard deviation. Quantiles go over rows and three seeds. Seconds are the CPU time of one thread for
one row when all rows are drawn together, the median of three turns. MNIST's model is trained for 3 epochs.

![Error of means against seconds](images/posterior-draws.png)
"""


def write(lines: list[Any], absent: list[str], errors: dict[str, tuple[float, float]]) -> None:
    """Write the page and its picture from measured lines, names of absent cases, and errors of each case's truth."""
    cases = {name: [line for line in lines if line.case == name] for name in dict.fromkeys(ln.case for ln in lines)}
    tables = [table(name, some, errors[name]) for name, some in cases.items()]
    goal = conclusion(cases["digits"]) if "digits" in cases else ""
    goal += f" Not measured yet: {', '.join(absent)}." * bool(absent)
    parts = [INTRODUCTION, f"## The goal on digits\n\n{fill(goal, 120)}\n", *tables, f"## Machine\n\n{machine()}\n"]
    (DOCS / "posterior-draws.md").write_text("\n".join(parts), encoding="utf-8")
    draw(cases, DOCS / "images" / "posterior-draws.png")


def table(name: str, lines: list[Any], errors: tuple[float, float]) -> str:
    """Return the section of a case."""
    truth = (
        f"Error of the truth itself: {errors[0]:.4f} sds, {errors[1]:.4f} of log sd (medians).\n\n" if errors[0] else ""
    )
    head = "| | mean, median | 95% | log sd, median | 95% | rows within 0.02 and 1% | ms per row | rows by method |\n"
    body = [
        f"| {ln.contender} | {ln.mean[0]:.4f} | {ln.mean[1]:.4f} | {ln.sd[0]:.4f} | {ln.sd[1]:.4f} | {ln.within:.0%} "
        f"| {1e3 * ln.seconds:.3g} | {', '.join(f'{way} {count}' for way, count in ln.ways.items())} |"
        for ln in lines
    ]
    return f"## {name}\n\n{truth}{head}|---|---|---|---|---|---|---|---|\n" + "\n".join(body) + "\n"


def chains_seconds(lines: list[Any], mean: float, sd: float) -> float:
    """Return the seconds of HMC whose 95% quantiles are as small as these; errors fall with the root of its draws.

    By the longest chains measured: their seconds beyond those of the shortest grow with the draws.
    """
    chains = [(int(line.contender.split()[-1].replace(",", "")), line) for line in lines if line.contender[:3] == "HMC"]
    (few, short), (many, long) = chains[0], chains[-1]
    factor = max(long.mean[1] / mean, long.sd[1] / sd) ** 2
    return short.seconds + (many * factor - few) * (long.seconds - short.seconds) / (many - few)


def conclusion(lines: list[Any]) -> str:
    """Say whether some accuracy reaches the goal, and at what share of the time of HMC that is as accurate."""
    within = [ln for ln in lines if ln.contender.startswith("posterior") and ln.mean[1] <= MEAN and ln.sd[1] <= SD]
    if not within:
        return f"No accuracy that was tried is within {MEAN} sds and {SD:.0%} of sd for 95% of rows: missed."
    best = min(within, key=lambda ln: ln.seconds)
    same, least = chains_seconds(lines, best.mean[1], best.sd[1]), chains_seconds(lines, MEAN, SD)
    verdict = "met" if best.seconds <= 0.1 * same else "missed"
    return (
        f"Within {MEAN} sds of the mean and {SD:.0%} of the sd for 95% of rows, in at most a tenth of the time of HMC "
        f"that is as accurate: **{verdict}**. The cheapest accuracy that is within is `{best.contender}`, at "
        f"{1e3 * best.seconds:.0f} ms per row. HMC would take {1e3 * same:.0f} ms for the same 95% quantiles, and "
        f"{1e3 * least:.0f} ms to be just within (both from its longest chains here, whose errors fall with the root "
        f"of their draws): shares of {best.seconds / same:.2f} and {best.seconds / least:.2f}. The presets quick, "
        "standard and high aim lower, at 100, 400 and 2,500 effective draws."
    )


def draw(cases: dict[str, list[Any]], path: Path) -> None:
    """Draw the 95% quantile of the error of means against seconds, a panel for each case."""
    columns = min(3, len(cases))
    figure = Figure(figsize=(3.2 * columns, 2.7 * math.ceil(len(cases) / columns)), layout="constrained")
    panels = figure.subplots(math.ceil(len(cases) / columns), columns, squeeze=False).flat
    for (name, lines), panel in zip(cases.items(), panels, strict=False):
        for way, colour in WAYS.items():
            some = [line for line in lines if line.contender.startswith(way)]
            x, y = [1e3 * line.seconds for line in some], [line.mean[1] for line in some]
            panel.loglog(x, y, "o-" if way in ("posterior", "HMC") else "o", color=COLOURS[colour], label=way, ms=4)
        panel.axhline(MEAN, color="black", lw=0.7, ls=":")
        panel.set_title(name, fontsize=9)
        panel.tick_params(labelsize=7)
    for panel in panels:
        panel.set_axis_off()
    figure.supxlabel("CPU ms per row", fontsize=9)
    figure.supylabel("error of means / sd\n(95% of rows below)", fontsize=9)
    figure.legend(
        *figure.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4, fontsize=8, frameon=False
    )
    figure.savefig(path, dpi=160)
