"""Pictures of what a run is used for: rows of images with their names, histograms of scores, tables of confusions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pvae.drawing import COLOURS, GREY, SMALL, digits_of, framed, sheet

__all__ = ["confusions", "scores", "sheets", "strips"]

# Images beside each other, and the width of a picture in inches.
ACROSS, WIDTH = 16, 8.6


def strips(lines: Mapping[str, np.ndarray], shape: tuple[int, ...], notes: Sequence[str] = ()) -> Figure:
    """Images in columns: each line of them under its name, such as a row, the row with noise, and what it was.

    Arguments:
        lines: rows [B, C] by the line's name; the first ``ACROSS`` are drawn.
        shape: of a row.
        notes: a word above each column.
    """
    height, width = digits_of(shape)
    count = min(ACROSS, *(len(rows) for rows in lines.values()))
    if height == 1:
        return _curves({name: rows[:count] for name, rows in lines.items()})
    tall = WIDTH * 0.86 / count * height / width
    figure = Figure(figsize=(WIDTH, 0.25 + len(lines) * min(tall, 1.6) + 0.15 * bool(notes)), layout="constrained")
    for place, (axis, (name, rows)) in enumerate(zip(_column(figure, len(lines)), lines.items(), strict=True)):
        _sheet(axis, rows[:count], shape, count)
        axis.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
        if notes and place == 0:
            middles = [(width + 1) * k + width / 2 - 0.5 for k in range(count)]
            axis.set_xticks(middles, notes[:count], fontsize=7)
            axis.tick_params(top=True, labeltop=True, bottom=False, labelbottom=False, length=0)
    return figure


def sheets(panels: Mapping[str, np.ndarray], shape: tuple[int, ...], per_line: int = ACROSS) -> Figure:
    """Sheets of images, one under another, each under its title."""
    height, width = digits_of(shape)
    if height == 1:
        return _curves(panels)
    lines = [-(-len(rows) // per_line) for rows in panels.values()]
    tall = [0.3 + count * WIDTH / per_line * height / width for count in lines]
    figure = Figure(figsize=(WIDTH, min(sum(tall), 11)), layout="constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=tall)[:, 0]
    for axis, (name, rows) in zip(axes, panels.items(), strict=True):
        _sheet(axis, rows, shape, per_line)
        axis.set_title(name, fontsize=9, loc="left")
    return figure


def _column(figure: Figure, count: int) -> Any:
    return figure.subplots(count, 1, squeeze=False)[:, 0]


def _sheet(axis: Any, rows: np.ndarray, shape: tuple[int, ...], per_line: int) -> None:
    """A sheet; missing values show as a pale ground."""
    sheet(axis, rows, shape, per_line)
    if np.isnan(rows).any():
        axis.set_facecolor("#cfe3f1")


def _curves(lines: Mapping[str, np.ndarray]) -> Figure:
    """Rows that are no images: a small panel for each of the first eight, their values by column."""
    count = min(8, *(len(rows) for rows in lines.values()))
    figure = Figure(figsize=(WIDTH, 0.6 + 1.5 * -(-count // 4)), layout="constrained")
    axes = figure.subplots(-(-count // 4), min(count, 4), squeeze=False, sharex=True, sharey=True).flat
    for place, axis in zip(range(count), axes, strict=False):
        for colour, (name, rows) in zip(COLOURS, lines.items(), strict=False):
            axis.plot(rows[place], color=colour, lw=1, marker="o", ms=2, label=name)
        axis.tick_params(labelsize=7)
        axis.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    figure.supxlabel("column, counted from 0", fontsize=8)
    figure.supylabel("value", fontsize=8)
    if len(lines) > 1:
        figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4, **SMALL)
    return figure


def scores(found: Mapping[str, tuple[np.ndarray, np.ndarray, float]], anomalous: np.ndarray | None) -> Figure:
    """Histograms of each score.

    Arguments:
        found: by the score's name, with its units: of the rows, of held-out normal rows, and the threshold.
        anomalous: which rows are known to be, if that is known.
    """
    columns = min(3, len(found))
    lines = -(-len(found) // columns)
    figure = Figure(figsize=(WIDTH, 0.5 + 2.1 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).flat
    for axis in axes:
        axis.set_axis_off()
    for axis, (name, (own, reference, threshold)) in zip(figure.axes, found.items(), strict=False):
        axis.set_axis_on()
        known = {"rows": own} if anomalous is None else {"normal": own[~anomalous], "anomalous": own[anomalous]}
        _histogram(axis, {"held-out normal rows": reference, **known}, threshold)
        axis.set_title(name, fontsize=8)
    figure.supxlabel("score; the outermost bars hold what lies beyond", fontsize=8)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4, **SMALL)
    return figure


def _histogram(axis: Any, kinds: Mapping[str, np.ndarray], threshold: float) -> None:
    whole = np.concatenate([values[np.isfinite(values)] for values in kinds.values()])
    low, high = np.quantile(whole, [0.002, 0.99])
    edges: Any = np.linspace(low, max(high, low + 1e-6), 31)
    for colour, (kind, values) in zip((GREY, COLOURS[0], COLOURS[1]), kinds.items(), strict=False):
        if not len(values):
            continue
        style: Any = {"histtype": "stepfilled" if colour == GREY else "step", "lw": 1.4, "density": True}
        axis.hist(np.clip(values, low, high), bins=edges, color=colour, label=kind, **style)
    axis.axvline(threshold, color="black", lw=1, ls="--", label="threshold")
    axis.set_yticks([])
    axis.spines["left"].set_visible(False)
    axis.xaxis.set_major_locator(MaxNLocator(4))
    axis.tick_params(labelsize=7)


def confusions(counts: np.ndarray, names: Sequence[str]) -> Figure:
    """A confusion matrix: how many rows of each class were taken for each."""
    size = min(1.6 + 0.42 * len(names), 8.0)
    figure, (axis,) = framed(1, width=size, height=size)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for row, column in np.ndindex(*counts.shape):
        if counts[row, column]:
            colour = "white" if shares[row, column] > 0.5 else "black"
            axis.text(column, row, str(counts[row, column]), ha="center", va="center", fontsize=7, color=colour)
    ticks = np.arange(len(names))
    axis.set_xticks(ticks, names, fontsize=8)
    axis.set_yticks(ticks, names, fontsize=8)
    axis.set(xlabel="taken for", ylabel="class")
    axis.spines[:].set_visible(False)
    return figure
