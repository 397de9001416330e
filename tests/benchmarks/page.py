"""Tables of lines, the page that holds them, and the picture of its training times."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from textwrap import fill
from typing import NamedTuple

import torch
from matplotlib.figure import Figure

from pvae.reporting.style import COLOURS, GREY

DOCS = Path(__file__).parents[2] / "docs"
LIBRARIES = ("torch", "pyro-ppl", "jax", "numpyro", "pythae")

INTRODUCTION = """# Benchmarks

Written by `make bench`. Figures are medians of jobs that took turns in one run on one machine; ratios are ratios of
medians; a goal is the largest acceptable ratio. Install the peers with `pip install 'pvae-pyro[bench]'`; peers that are
not installed are left out.

![Training time per image of each contender](images/benchmarks.png)
"""


class Line(NamedTuple):
    """A measured quantity: its figure with a unit, its ratio to the peer and the most that it may be.

    ``per_image`` are microseconds of training for each image visited, of lines that are drawn.
    """

    name: str
    figure: str
    ratio: float | None = None
    goal: float | None = None
    per_image: float | None = None

    def markdown(self) -> str:
        ratio = "" if self.ratio is None else f"{self.ratio:.2f}"
        goal = "" if self.goal is None else f"at most {self.goal:.2f}: **{self.verdict}**"
        return f"| {self.name} | {self.figure} | {ratio} | {goal} |"

    @property
    def verdict(self) -> str:
        return "met" if self.ratio is not None and self.goal is not None and self.ratio <= self.goal else "missed"


class Table(NamedTuple):
    """A group's lines, what they mean, and who is absent and why."""

    title: str
    note: str
    lines: list[Line]
    absent: dict[str, str]

    def markdown(self) -> str:
        absent = [f"\n{name}: {reason}." for name, reason in self.absent.items()]
        head = "| | median | ratio | goal |\n|---|---|---|---|"
        return "\n".join(
            [f"## {self.title}\n\n{fill(self.note, 120)}\n", head, *(line.markdown() for line in self.lines), *absent]
        )


def compared(found: dict[str, float], name: str, peer: str, goal: float | None = None) -> list[Line]:
    """A line that holds one contender against another, if both were measured."""
    if name not in found or peer not in found:
        return []
    return [Line(f"{name}, against {peer}", "", found[name] / found[peer], goal)]


def machine() -> str:
    """What was measured on, and with which versions."""
    cores, threads = len(os.sched_getaffinity(0)), torch.get_num_threads()
    libraries = ", ".join(f"{name} {_version(name)}" for name in LIBRARIES)
    return fill(
        f"{platform.machine()}, {cores} cores; threads of PyTorch: {threads}, of XLA's own pool: {cores}; "
        f"Python {platform.python_version()}, {libraries}.",
        120,
    )


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"


def write(tables: list[Table]) -> None:
    """The page of benchmarks and its picture."""
    parts = [INTRODUCTION, machine() + "\n", *(table.markdown() + "\n" for table in tables)]
    (DOCS / "benchmarks.md").write_text("\n".join(parts), encoding="utf-8")
    draw(tables, DOCS / "images" / "benchmarks.png")


def draw(tables: list[Table], path: Path) -> None:
    """Bars of all lines that have a time per image, on one axis, a block for each table."""
    blocks = [(table.title, [line for line in table.lines if line.per_image]) for table in tables]
    blocks = [(title, lines) for title, lines in blocks if lines]
    figure = Figure(figsize=(8.6, 0.27 * sum(len(lines) + 1.6 for _, lines in blocks) + 0.6), layout="constrained")
    axis, place, ticks = figure.subplots(), 0.0, {}
    for title, lines in blocks:
        axis.text(0, place, title, weight="bold", va="center", fontsize=9)
        for line in lines:
            place += 1
            ticks[place] = line.name
            axis.barh(place, line.per_image, color=COLOURS[0] if line.name.startswith("pvae") else GREY)
            axis.text(line.per_image, place, f" {line.figure}", va="center", fontsize=8)
        place += 1.6
    axis.set_yticks(list(ticks), list(ticks.values()), fontsize=8)
    axis.set(ylim=(place - 0.8, -0.8), xlabel="training time per image visited / µs")
    axis.margins(x=0.14)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=160)
