"""Style shared by all figures: colours, panels, image grids, scatter plots of latents, and data URIs."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.collections import LineCollection
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

# Okabe and Ito's colours, which people with any colour vision tell apart; yellow, too pale for lines, comes last.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#F0E442")
# Enough to tell ten classes apart, as digits have; two of them are none of Okabe and Ito's.
CLASS_COLOURS = (*COLOURS, "#7A7A00", "#882255")
GREY = "#999999"
MISSING = "#cfe3f1"
CORNERS = np.array([(0, 0), (1, 0), (1, 1), (0, 1), (0, 0)])
SMALL: Any = {"frameon": False, "fontsize": 8}  # legends
STYLE: Any = {
    **{"axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 9, "font.size": 9},
    **{"svg.fonttype": "path", "svg.hashsalt": "pvae"},
}


@rc_context(STYLE)
def data_uri(figure: Figure) -> str:
    """Encode a figure as a data URI: SVG, or PNG if it has images or many marks. Equal figures give equal bytes."""
    file = io.BytesIO()
    marks = sum(np.size(points.get_offsets()) // 2 for axis in figure.axes for points in axis.collections)
    drawn = marks <= 1000 and not any(axis.images for axis in figure.axes)
    kind: Any = {"format": "svg", "metadata": {"Date": None}} if drawn else {"format": "png"}
    figure.savefig(file, dpi=160, bbox_inches="tight", **kind)
    return encode_uri(file.getvalue(), "svg+xml" if drawn else "png")


def encode_uri(image: bytes, kind: str = "png") -> str:
    """Encode the bytes of an image file as a data URI."""
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"


def subplots(columns: int, width: float = 8.6, height: float = 3.2) -> tuple[Figure, list[Axes]]:
    """Return a figure with this many panels side by side, sizes in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(np.atleast_1d(figure.subplots(1, columns)))


def panel_grid(figure: Any, count: int, columns: int, **options: Any) -> list[Axes]:
    """Return this many panels of a figure, so many in a line; the places that they leave stay blank."""
    axes = list(figure.subplots(-(-count // columns), columns, squeeze=False, **options).flat)
    for axis in axes[count:]:
        axis.set_axis_off()
    return axes[:count]


def plain_histogram(axis: Axes, ticks: int) -> None:
    """Take the scale of counts off a small histogram, and set few ticks below it."""
    axis.set_yticks([])
    axis.spines["left"].set_visible(False)
    axis.xaxis.set_major_locator(MaxNLocator(ticks))
    axis.tick_params(labelsize=7)


def plain_ticks(limits: tuple[float, float], *axes: Axis) -> None:
    """Set few ticks on logarithmic axes, written as plain numbers."""
    wide = limits[1] > 8 * limits[0]
    for axis in axes:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=5) if wide else MaxNLocator(4))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter(NullFormatter())


def image_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return the height and width of a row as it is drawn: an image's own, else those of one strip.

    >>> image_shape((28, 28)), image_shape((5,))
    ((28, 28), (1, 5))
    """
    return (shape[0], shape[1]) if len(shape) == 2 else (1, int(np.prod(shape)))


def grey_limits(*groups: np.ndarray) -> tuple[float, float]:
    """Return the limits of a grey scale for rows: 0 and 1 if all values lie between them, else the extremes.

    >>> grey_limits(np.array([0.2, np.nan]), np.array([0.7])), grey_limits(np.array([-1.0, 3.0]))
    ((0.0, 1.0), (-1.0, 3.0))
    """
    known = np.concatenate([rows[np.isfinite(rows)] for rows in groups])
    low, high = (float(known.min()), float(known.max())) if len(known) else (0.0, 1.0)
    return (0.0, 1.0) if low >= 0 and high <= 1 else (low, high)


def image_grid(
    axis: Axes, images: np.ndarray, shape: tuple[int, ...], per_line: int, limits: tuple[float, float] | None = None
) -> None:
    """Draw rows [B, columns] as a grid of framed images, this many a line; missing entries are pale blue."""
    height, width = image_shape(shape)
    lines = -(-len(images) // per_line)
    whole = np.full((lines * (height + 1) - 1, per_line * (width + 1) - 1), np.nan)
    gaps, frames = np.full_like(whole, np.nan), []
    for place, image in enumerate(images):
        top, left = place // per_line * (height + 1), place % per_line * (width + 1)
        area = np.s_[top : top + height, left : left + width]
        whole[area] = image.reshape(height, width)
        gaps[area] = np.where(np.isnan(whole[area]), 1, np.nan)
        frames.append(CORNERS * (width, height) + (left - 0.5, top - 0.5))
    low, high = limits or grey_limits(images)
    aspect: Any = "equal" if height > 1 else "auto"
    axis.imshow(whole, cmap="gray_r", vmin=low, vmax=high, aspect=aspect)
    if not np.isnan(gaps).all():
        axis.imshow(gaps, cmap=ListedColormap([MISSING]), aspect=aspect)
    if height > 1:
        axis.add_collection(LineCollection(frames, colors="#d0d0d0", linewidths=0.5, clip_on=False), autolim=False)
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(False)


def class_names(labels: np.ndarray) -> list[str]:
    """Return the names of labels in order; none if there is one label, or more than colours can tell apart.

    >>> class_names(np.array([2.0, 0.0, 2.0])), class_names(np.array(["b", "a"])), class_names(np.arange(99))
    (['0', '2'], ['a', 'b'], [])
    """
    kinds = np.unique(labels)
    named = 1 < len(kinds) <= len(CLASS_COLOURS)
    return [str(kind) if kinds.dtype.kind in "US" else f"{kind:g}" for kind in kinds] if named else []


def scatter_latents(
    axis: Axes, codes: np.ndarray, prior: np.ndarray, labels: np.ndarray, name: str = "posterior draws"
) -> None:
    """Draw codes [M, 2], coloured by label if there are few, over prior draws [S, 2]; circles for a standard normal."""
    axis.scatter(prior[:, 0], prior[:, 1], s=5, color="#cccccc", linewidths=0, label="prior" if len(prior) else None)
    names = class_names(labels) if len(labels) == len(codes) else []
    for colour, kind, word in zip(CLASS_COLOURS, np.unique(labels), names, strict=False):
        axis.scatter(codes[labels == kind, 0], codes[labels == kind, 1], s=7, color=colour, linewidths=0, label=word)
    if not names:
        axis.scatter(codes[:, 0], codes[:, 1], s=7, color=COLOURS[0], alpha=0.7, linewidths=0, label=name)
    if len(prior) and standard_normal(prior):
        turn = np.linspace(0, 2 * np.pi, 200)
        for radius in (1, 2, 3):
            known = "1, 2, 3 sd of the prior" if radius == 1 else None
            axis.plot(radius * np.cos(turn), radius * np.sin(turn), color="black", lw=0.6, label=known)
    axis.set_aspect("equal", adjustable="datalim")
    axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), markerscale=2, handletextpad=0.4, **SMALL)


def standard_normal(prior: np.ndarray) -> bool:
    """Return whether draws [S, D] pass for standard normal in each dimension (KS test, 0.1% false alarms)."""
    from scipy.stats import kstest

    return all(kstest(column, "norm").pvalue > 0.001 / prior.shape[1] for column in prior.T)
