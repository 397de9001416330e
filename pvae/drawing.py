"""What all figures of the page share: style, colours, panels, sheets of images, and pictures as data addresses."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

__all__ = ["COLOURS", "GREY", "SMALL", "STYLE", "address", "array", "digits_of", "framed", "sheet"]

# Okabe and Ito's colours, which people with any colour vision tell apart; yellow, too pale for lines, comes last.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#F0E442")
GREY = "#999999"
# Legends.
SMALL: Any = {"frameon": False, "fontsize": 8}
STYLE: Any = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "font.size": 9,
    "svg.fonttype": "path",
    "svg.hashsalt": "pvae",
}


def address(figure: Figure, kind: str) -> str:
    """A figure as an address for an image's ``src``; kind is svg or png. The same figure has the same bytes."""
    file = io.BytesIO()
    figure.savefig(file, format=kind, dpi=160, bbox_inches="tight", metadata={"Date": None} if kind == "svg" else None)
    media = {"svg": "image/svg+xml", "png": "image/png"}[kind]
    return f"data:{media};base64,{base64.b64encode(file.getvalue()).decode()}"


def array(part: Any, name: str) -> np.ndarray:
    """A tensor of a part as an array of doubles."""
    return np.asarray(getattr(part, name).detach().cpu().double())


def framed(columns: int, width: float = 8.6, height: float = 3.2) -> tuple[Figure, list[Axes]]:
    """A figure with this many panels beside each other, sizes in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(np.atleast_1d(figure.subplots(1, columns)))


def digits_of(shape: tuple[int, ...]) -> tuple[int, int]:
    """Height and width as which a row is drawn: an image's own, else one strip.

    >>> digits_of((28, 28)), digits_of((5,))
    ((28, 28), (1, 5))
    """
    return (shape[0], shape[1]) if len(shape) == 2 else (1, int(np.prod(shape)))


def sheet(axis: Axes, images: np.ndarray, shape: tuple[int, ...], per_line: int) -> None:
    """Draw rows [B, columns] as a sheet of images, this many a line."""
    height, width = digits_of(shape)
    lines = -(-len(images) // per_line)
    whole = np.full((lines * (height + 1) - 1, per_line * (width + 1) - 1), np.nan)
    for place, image in enumerate(images):
        top, left = place // per_line * (height + 1), place % per_line * (width + 1)
        whole[top : top + height, left : left + width] = image.reshape(height, width)
    low, high = np.nanmin(whole), np.nanmax(whole)
    binary_like = low >= 0 and high <= 1
    axis.imshow(
        whole,
        cmap="gray_r",
        vmin=0 if binary_like else low,
        vmax=1 if binary_like else high,
        aspect="equal" if height > 1 else "auto",
    )
    axis.set_xticks([])
    axis.set_yticks([])
    axis.spines[:].set_visible(False)
