"""Figures of the uses of a run: lines and sheets of rows, histograms of scores, confusion matrices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from sklearn.metrics import ConfusionMatrixDisplay

from pvae.reporting import style
from pvae.reporting.style import COLOURS, GREY, SMALL

# Largest and smallest number of places in a line of images, and the width of a figure in inches.
ACROSS, FEWEST, WIDTH = 16, 9, 8.6
# Largest numbers of panels of rows that are no images, of stretches, and of images in each.
PANELS, STRETCHES, IMAGES = 8, 8, 96
PATH = LinearSegmentedColormap.from_list("path", [COLOURS[0], "#c8c8c8", COLOURS[1]])


def draw_strips(lines: Mapping[str, np.ndarray], shape: tuple[int, ...], notes: Sequence[str] = ()) -> Figure:
    """Draw named lines of rows [B, C] below each other, such as noisy ones and reconstructions, ``notes`` above them.

    The first line sets the grey scale of all. The first ``ACROSS`` rows are shown, or ``PANELS`` of rows that are no
    images; a line without any value is left out.
    """
    height, width = style.image_shape(shape)
    whole = min(len(rows) for rows in lines.values())
    count = min(ACROSS if height > 1 else PANELS, whole)
    shown = {name: rows[:count] for name, rows in lines.items() if not np.isnan(rows[:count]).all()}
    title = f"the first {count} of {whole} rows" if whole > count else ""
    if height == 1:
        return _curves(shown, count, title)
    places = max(count, FEWEST)
    tall = min(WIDTH * 0.86 / places * height / width, 1.6)
    figure = _figure(0.25 + len(shown) * tall + 0.15 * bool(notes), title)
    limits = style.grey_limits(next(iter(shown.values()), np.zeros(0)))
    axes = style.panel_grid(figure, len(shown), 1)
    for axis, (name, rows) in zip(axes, shown.items(), strict=True):
        style.image_grid(axis, rows, shape, places, limits)
        axis.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
    if notes:
        axes[0].set_xticks([(width + 1) * k + width / 2 - 0.5 for k in range(count)], notes[:count], fontsize=7)
        axes[0].tick_params(top=True, labeltop=True, bottom=False, labelbottom=False, length=0)
    return figure


def draw_sheets(panels: Mapping[str, np.ndarray], shape: tuple[int, ...], per_line: int = ACROSS) -> Figure:
    """Draw stretches of rows [B, C], each under its title: sheets of images, or one panel of curves.

    The first ``STRETCHES`` are shown, and ``IMAGES`` rows of each, evenly spaced. Lines of more than ``ACROSS`` images
    are broken; rows that are no images and fill no more than one line are a path, coloured from first to last.
    """
    height, width = style.image_shape(shape)
    shown = dict(_thinned(*panel) for panel in list(panels.items())[:STRETCHES])
    title = f"the first {len(shown)} of {len(panels)} stretches" if len(panels) > len(shown) else ""
    if height == 1:
        return _stretches(shown, title, per_line)
    longest = min(per_line, max(map(len, shown.values())))
    places = max(-(-longest // -(-longest // ACROSS)), FEWEST)
    tall = [0.3 + -(-len(rows) // places) * WIDTH / places * height / width for rows in shown.values()]
    figure, limits = _figure(min(sum(tall), 11), title), style.grey_limits(*shown.values())
    axes = style.panel_grid(figure, len(shown), 1, height_ratios=tall)
    for axis, (name, rows) in zip(axes, shown.items(), strict=True):
        style.image_grid(axis, rows, shape, places, limits)
        axis.set_title(name, loc="left")
    return figure


def _thinned(name: str, rows: np.ndarray) -> tuple[str, np.ndarray]:
    """Return as many rows as a sheet holds, evenly spaced, under a title that says so."""
    if len(rows) <= IMAGES:
        return name, rows
    which = np.linspace(0, len(rows) - 1, IMAGES).round().astype(int)
    return f"{name}: {IMAGES} of {len(rows)}, evenly spaced", rows[which]


def _figure(tall: float, title: str) -> Figure:
    """Return a figure of the common width, with a title if there is one."""
    figure = Figure(figsize=(WIDTH, tall + 0.2 * bool(title)), layout="constrained")
    if title:
        figure.suptitle(title, fontsize=9, x=0.01, ha="left")
    return figure


def _tiles(count: int, across: int, tall: float, title: str) -> tuple[Figure, list[Any]]:
    """Return a figure with small panels that share their axes."""
    figure = _figure(0.7 + tall * -(-count // across), title)
    axes = style.panel_grid(figure, count, across, sharex=True, sharey=True)
    for place, axis in enumerate(axes):
        axis.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        axis.tick_params(labelsize=7)
        if place >= count - across:  # the lowest of its column
            axis.tick_params(labelbottom=True)
    figure.supxlabel("column, counted from 0", fontsize=8)
    figure.supylabel("value", fontsize=8)
    return figure, axes


def _curves(lines: Mapping[str, np.ndarray], count: int, title: str) -> Figure:
    """Draw each row's values by column in a small panel; the observed ones as points if entries are missing."""
    figure, axes = _tiles(count, min(count, 4), 1.5, title)
    partial = [position for position, rows in enumerate(lines.values()) if np.isnan(rows).any()]
    seen = partial[-1] if partial else len(lines)
    for place, axis in enumerate(axes):
        missing: Any = np.flatnonzero(np.isnan([*lines.values()][seen][place])) if partial else []
        for position, (colour, (name, rows)) in enumerate(zip(COLOURS, lines.items(), strict=False)):
            axis.plot(rows[place], color=colour, label=name, **_style(position - seen, missing))
    if partial:
        figure.supxlabel("column, counted from 0; diamonds: missing entries", fontsize=8)
    if len(lines) > 1:
        figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4, **SMALL)
    return figure


def _style(beyond: int, missing: Any) -> dict[str, Any]:
    """Return the style of a line: plain, as observed points (0), or thin and marked at missing entries (1 and on)."""
    if beyond > 0:
        return {"lw": 0.6, "marker": "D", "ms": 3.5, "markevery": list(missing)}
    return {"ls": "none", "marker": "o", "ms": 4, "zorder": 3} if beyond == 0 else {"lw": 1, "marker": "o", "ms": 2}


def _stretches(panels: Mapping[str, np.ndarray], title: str, longest: int) -> Figure:
    """Draw each stretch's values by column in one panel; those of a path in its colours."""
    figure, axes = _tiles(len(panels), min(len(panels), 2), 1.9, title)
    path = all(1 < len(rows) <= longest for rows in panels.values())
    for axis, (name, rows) in zip(axes, panels.items(), strict=True):
        colours: Any = PATH(np.linspace(0, 1, len(rows))) if path else [(COLOURS[0], 0.4)] * len(rows)
        for row, colour in zip(rows, colours, strict=True):
            axis.plot(row, color=colour, lw=0.9)
        axis.set_title(name, fontsize=8, loc="left")
    if path:
        ends = [Line2D([], [], color=PATH(end), label=word) for end, word in ((0.0, "first row"), (1.0, "last row"))]
        figure.legend(handles=ends, loc="outside upper right", ncols=2, **SMALL)
    return figure


def draw_scores(scores: Mapping[str, tuple[np.ndarray, np.ndarray, float]], anomalous: np.ndarray | None) -> Figure:
    """Draw histograms of each score: of the rows, of held-out normal rows, and its threshold."""
    columns = min(3, len(scores))
    figure = _figure(0.5 + 2.1 * -(-len(scores) // columns), "")
    which = {"rows": slice(None)} if anomalous is None else {"normal": ~anomalous, "anomalous": anomalous}
    for axis, name in zip(style.panel_grid(figure, len(scores), columns), scores, strict=True):
        values, reference, threshold = scores[name]
        kinds = {"held-out normal rows": reference} | {kind: values[rows] for kind, rows in which.items()}
        _histogram(axis, kinds, threshold)
        axis.set_title(name, fontsize=8)
    for axis in figure.axes[::columns]:
        axis.set_ylabel("share of rows", fontsize=8)
    figure.supxlabel("score; the outermost bars hold what lies beyond", fontsize=8)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4, **SMALL)
    return figure


def _histogram(axis: Any, kinds: Mapping[str, np.ndarray], threshold: float) -> None:
    whole = np.concatenate([values[np.isfinite(values)] for values in kinds.values()])
    low, high = np.quantile(whole, [0.002, 0.99])
    edges: Any = np.linspace(low, max(high, low + 1e-6), 31)
    for colour, (kind, values) in zip((GREY, COLOURS[0], COLOURS[1]), kinds.items(), strict=False):
        look: Any = {"histtype": "stepfilled" if colour == GREY else "step", "lw": 1.4, "color": colour, "bins": edges}
        if len(values):
            axis.hist(np.clip(values, low, high), weights=np.full(len(values), 1 / len(values)), label=kind, **look)
    axis.axvline(threshold, color="black", lw=1, ls="--", label="threshold")
    style.plain_histogram(axis, 4)


def draw_confusion_matrix(counts: np.ndarray, names: Sequence[str]) -> Figure:
    """Draw a confusion matrix of row counts, coloured by their shares of the true label."""
    figure, (axis,) = style.subplots(1, width=WIDTH, height=min(1.2 + 0.34 * len(names), 7.0))
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    display = ConfusionMatrixDisplay(shares, display_labels=names)
    display.plot(ax=axis, cmap="Blues", colorbar=False, im_kw={"vmin": 0, "vmax": 1}, text_kw={"fontsize": 7})
    for text, count in zip(display.text_.flat, counts.flat, strict=True):
        text.set_text(str(count) if count else "")
    axis.tick_params(labelsize=8)
    axis.spines[:].set_visible(False)
    return figure
