"""Pictures of what a run is used for: rows of images with their names, histograms of scores, tables of confusions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from pvae.reporting.style import COLOURS, GREY, SMALL, grey_limits, image_grid, image_shape, subplots

# Images beside each other, places of a line that few images don't fill, and the width of a picture in inches.
ACROSS, FEWEST, WIDTH = 16, 9, 8.6
# Panels of rows that are no images; stretches, and images of each, that a picture holds.
PANELS, STRETCHES, IMAGES = 8, 8, 96
PATH = LinearSegmentedColormap.from_list("path", [COLOURS[0], "#c8c8c8", COLOURS[1]])


def draw_strips(lines: Mapping[str, np.ndarray], shape: tuple[int, ...], notes: Sequence[str] = ()) -> Figure:
    """Images in columns: each line of them under its name, such as a row, the row with noise, and what it was.

    Arguments:
        lines: rows [B, C] by the line's name, the given ones first, on whose scale of greys all are drawn. The first
            ``ACROSS`` are shown, or ``PANELS`` of rows that are no images; a line without any value is left out.
        shape: of a row.
        notes: a word above each column.
    """
    height, width = image_shape(shape)
    whole = min(len(rows) for rows in lines.values())
    count = min(ACROSS if height > 1 else PANELS, whole)
    shown = {name: rows[:count] for name, rows in lines.items() if not np.isnan(rows[:count]).all()}
    title = f"the first {count} of {whole} rows" if whole > count else ""
    if height == 1:
        return _curves(shown, count, title)
    places = max(count, FEWEST)
    tall = min(WIDTH * 0.86 / places * height / width, 1.6)
    figure = _figure(0.25 + len(shown) * tall + 0.15 * bool(notes), title)
    ends = grey_limits(next(iter(shown.values()), np.zeros(0)))
    for place, (axis, (name, rows)) in enumerate(zip(_column(figure, len(shown)), shown.items(), strict=True)):
        image_grid(axis, rows, shape, places, ends)
        axis.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
        if notes and place == 0:
            middles = [(width + 1) * k + width / 2 - 0.5 for k in range(count)]
            axis.set_xticks(middles, notes[:count], fontsize=7)
            axis.tick_params(top=True, labeltop=True, bottom=False, labelbottom=False, length=0)
    return figure


def draw_sheets(panels: Mapping[str, np.ndarray], shape: tuple[int, ...], per_line: int = ACROSS) -> Figure:
    """Stretches of rows, one under another, each under its title: sheets of images, or curves in one panel each.

    Arguments:
        panels: rows [B, C] by the stretch's title. The first ``STRETCHES`` are shown, and of each ``IMAGES`` rows from
            its first to its last.
        shape: of a row.
        per_line: images of a line; more than ``ACROSS`` are broken into lines of about one length. Rows that are no
            images, and no more than one line, are a path: coloured from the first to the last.
    """
    height, width = image_shape(shape)
    shown = dict(_thinned(name, rows) for name, rows in list(panels.items())[:STRETCHES])
    title = f"the first {len(shown)} of {len(panels)} stretches" if len(panels) > len(shown) else ""
    if height == 1:
        return _stretches(shown, title, per_line)
    longest = min(per_line, max(map(len, shown.values())))
    places = max(-(-longest // -(-longest // ACROSS)), FEWEST)
    tall = [0.3 + -(-len(rows) // places) * WIDTH / places * height / width for rows in shown.values()]
    figure, ends = _figure(min(sum(tall), 11), title), grey_limits(*shown.values())
    for axis, (name, rows) in zip(_column(figure, len(shown), tall), shown.items(), strict=True):
        image_grid(axis, rows, shape, places, ends)
        axis.set_title(name, fontsize=9, loc="left")
    return figure


def _thinned(name: str, rows: np.ndarray) -> tuple[str, np.ndarray]:
    """As many rows as a sheet holds, from the first to the last, under a title that says so."""
    if len(rows) <= IMAGES:
        return name, rows
    return f"{name}: {IMAGES} of {len(rows)}, evenly spaced", rows[
        np.linspace(0, len(rows) - 1, IMAGES).round().astype(int)
    ]


def _figure(tall: float, title: str) -> Figure:
    """A figure of the width of all, with a title if there is one."""
    figure = Figure(figsize=(WIDTH, tall + 0.2 * bool(title)), layout="constrained")
    if title:
        figure.suptitle(title, fontsize=9, x=0.01, ha="left")
    return figure


def _column(figure: Figure, count: int, tall: Sequence[float] | None = None) -> Any:
    return figure.subplots(count, 1, squeeze=False, height_ratios=tall)[:, 0]


def _tiles(count: int, across: int, tall: float, title: str) -> tuple[Figure, list[Any]]:
    """Small panels with common axes for rows that are no images."""
    down = -(-count // across)
    figure = _figure(0.7 + tall * down, title)
    axes = list(figure.subplots(down, across, squeeze=False, sharex=True, sharey=True).flat)
    for axis in axes:
        axis.tick_params(labelsize=7)
        axis.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    for axis in axes[count:]:
        axis.set_axis_off()
    for axis in axes[max(count - across, 0) : count]:  # the lowest of their columns
        axis.tick_params(labelbottom=True)
    figure.supylabel("value", fontsize=8)
    return figure, axes[:count]


def _curves(lines: Mapping[str, np.ndarray], count: int, title: str) -> Figure:
    """A small panel for each row, its values by column: what is seen of it as points if entries are missing."""
    figure, axes = _tiles(count, min(count, 4), 1.5, title)
    partial = [name for name, rows in lines.items() if np.isnan(rows).any()]
    order = list(lines)
    seen = order.index(partial[-1]) if partial else len(order)
    for place, axis in enumerate(axes):
        missing: Any = np.flatnonzero(np.isnan(lines[order[seen]][place])) if partial else []
        for position, (colour, (name, rows)) in enumerate(zip(COLOURS, lines.items(), strict=False)):
            axis.plot(rows[place], color=colour, label=name, **_style(position - seen, missing))
    figure.supxlabel("column, counted from 0" + "; diamonds: missing entries" * bool(partial), fontsize=8)
    if len(lines) > 1:
        figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4, **SMALL)
    return figure


def _style(beyond: int, missing: Any) -> dict[str, Any]:
    """How a line is drawn: as it is, as the points that are seen (0), or thin, marked where it fills in (1 and on)."""
    if beyond > 0:
        return {"lw": 0.6, "marker": "D", "ms": 3.5, "markevery": list(missing)}
    return {"ls": "none", "marker": "o", "ms": 4, "zorder": 3} if beyond == 0 else {"lw": 1, "marker": "o", "ms": 2}


def _stretches(panels: Mapping[str, np.ndarray], title: str, longest: int) -> Figure:
    """Each stretch of rows that are no images in one panel, their values by column; a path's have its colours."""
    figure, axes = _tiles(len(panels), min(len(panels), 2), 1.9, title)
    path = all(1 < len(rows) <= longest for rows in panels.values())
    for axis, (name, rows) in zip(axes, panels.items(), strict=True):
        colours: Any = PATH(np.linspace(0, 1, len(rows))) if path else [(COLOURS[0], 0.4)] * len(rows)
        for row, colour in zip(rows, colours, strict=True):
            axis.plot(row, color=colour, lw=0.9)
        axis.set_title(name, fontsize=8, loc="left")
    figure.supxlabel("column, counted from 0", fontsize=8)
    if path:
        ends = [Line2D([], [], color=PATH(end), label=word) for end, word in ((0.0, "first row"), (1.0, "last row"))]
        figure.legend(handles=ends, loc="outside upper right", ncols=2, **SMALL)
    return figure


def draw_scores(found: Mapping[str, tuple[np.ndarray, np.ndarray, float]], anomalous: np.ndarray | None) -> Figure:
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
    for place, (axis, (name, (own, reference, threshold))) in enumerate(zip(figure.axes, found.items(), strict=False)):
        axis.set_axis_on()
        axis.set_ylabel("" if place % columns else "share of rows", fontsize=8)
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
        style: Any = {"histtype": "stepfilled" if colour == GREY else "step", "lw": 1.4}
        axis.hist(
            np.clip(values, low, high),
            weights=np.full(len(values), 1 / len(values)),
            bins=edges,
            color=colour,
            label=kind,
            **style,
        )
    axis.axvline(threshold, color="black", lw=1, ls="--", label="threshold")
    axis.set_yticks([])
    axis.spines["left"].set_visible(False)
    axis.xaxis.set_major_locator(MaxNLocator(4))
    axis.tick_params(labelsize=7)


def draw_confusion_matrix(counts: np.ndarray, names: Sequence[str]) -> Figure:
    """A confusion matrix: how many rows of each class were taken for each."""
    figure, (axis,) = subplots(1, width=WIDTH, height=min(1.2 + 0.34 * len(names), 7.0))
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
