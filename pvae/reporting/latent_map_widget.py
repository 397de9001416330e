"""Latent maps and sliders: static figures, interactive pieces of a page, and a page of their own."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.patches import Ellipse
from sklearn.decomposition import PCA

from pvae.applications.latent_map import LatentMap, Sliders
from pvae.errors import UserError
from pvae.reporting import style
from pvae.reporting.rendering import render_template
from pvae.reporting.style import CLASS_COLOURS, COLOURS, GREY, STYLE
from pvae.runtime.torch_state import to_numpy

# Largest numbers of codes on a page, of ellipses in a figure, and of lines of a grid that it draws.
CODES, ELLIPSES, LINES = 1500, 30, 12
Labels = Sequence[Any] | np.ndarray


@rc_context(STYLE)
def draw_latent_map(shown: LatentMap | Sliders, labels: Labels | None = None, shape: Sequence[int] = ()) -> Figure:
    """Draw codes, with q's ellipses of one standard deviation, beside images decoded from a grid of the plane.

    Sliders are each drawn as a line of decoded rows while the others are 0. Up to ten ``labels`` of rows, [B], are
    coloured; ``shape`` is that of one row, if it is an image.
    """
    if isinstance(shown, Sliders):
        return _lines(shown, _shape(shown.grid, shape))
    classes = _labels(shown, labels)
    figure, axes = _pairs(1 if shown.how == "tsne" else 2, height=4.2)
    codes = to_numpy(shown.codes, float)
    if shown.spread is not None:
        _outline(axes[0], codes, _ellipses(shown.spread), classes)
    prior = np.zeros((0, 2)) if shown.prior is None else to_numpy(shown.prior, float)
    style.scatter_latents(axes[0], codes, prior, classes, "codes of rows")
    across, up = _axes(shown.how, shown.share)
    axes[0].set(xlabel=across, ylabel=up)
    if shown.spread is not None:
        lines = _evenly(len(shown.grid_y), LINES)
        images = to_numpy(shown.grid, float)[lines[::-1]][:, lines]
        style.image_grid(axes[1], images.reshape(len(lines) ** 2, -1), _shape(shown.grid, shape), len(lines))
        across, up = (f"from {float(line[0]):.1f} to {float(line[-1]):.1f} u" for line in (shown.grid_x, shown.grid_y))
        axes[1].set(title="what the plane's points decode to", xlabel=across, ylabel=up)
    return figure


@rc_context(STYLE)
def draw_latent_maps(maps: Mapping[str, tuple[np.ndarray, np.ndarray]], labels: Labels | None = None) -> Figure:
    """Draw codes [B, D] over prior draws [S, D] for several fits by name; more than two dimensions by PCA."""
    classes = np.zeros(0) if labels is None else np.asarray(labels)
    figure, axes = _pairs(len(maps), height=3.9)
    for axis, (name, (codes, prior)) in zip(axes, maps.items(), strict=True):
        places, draws, words = _plane(codes, prior)
        style.scatter_latents(axis, places, draws, classes, "codes")
        axis.set(xlabel=words[0], ylabel=words[1], title=name)
    return figure


def _pairs(count: int, height: float) -> tuple[Figure, list[Any]]:
    """Return panels two by two; a single one has an empty place beside it, so that all have one size on a page."""
    figure = Figure(figsize=(9.6, height * -(-count // 2)), layout="constrained")
    return figure, style.panel_grid(figure, count, 2)


def _plane(codes: np.ndarray, prior: np.ndarray) -> tuple[np.ndarray, np.ndarray, tuple[str, str]]:
    """Return codes and prior draws in the plane of two dimensions or of the first principal ones, and axis labels."""
    if codes.shape[1] == 1:  # a line, as histograms would show it, spread by the rows' order
        codes, prior = (np.column_stack([line[:, 0], np.linspace(-1, 1, len(line))]) for line in (codes, prior))
        return codes, prior, ("latent dimension (u)", "row, by its order")
    if codes.shape[1] == 2 or len(codes) < 3:
        return codes[:, :2], prior[:, :2], _axes("plane")
    pca = PCA(2, svd_solver="full").fit(codes)
    directions = pca.components_.T  # without centering, so that 0 stays the centre of a standard normal prior
    return codes @ directions, prior @ directions, _axes("pca", np.nan_to_num(pca.explained_variance_ratio_))


def _axes(how: str, share: Any = None) -> tuple[str, str]:
    if how == "tsne":
        return "t-SNE, which keeps neighbours and no distances", ""
    if how == "plane":
        return "first latent dimension (u)", "second latent dimension (u)"
    first, second = (f"principal direction (u), {part:.0%} of the codes' variance" for part in share.tolist())
    return f"first {first}", f"second {second}"


def render_widget(shown: LatentMap | Sliders, labels: Labels | None = None, shape: Sequence[int] = ()) -> Any:
    """Return a map, or sliders, as a piece of HTML that shows what the place under the pointer decodes to.

    The pointer, a finger or the arrow keys move over the plane, whose decoded rows are interpolated between the grid's
    points; in print, and without scripts, the figure of `draw_latent_map`, which has the same arguments, is shown
    instead. Of more than 1,500 rows some are shown. The piece fetches nothing.

    Raises:
        UserError: labels of another number of rows, or a shape of another number of values.
    """
    still = style.data_uri(draw_latent_map(shown, labels, shape))
    if isinstance(shown, Sliders):
        data: dict[str, Any] = {"positions": len(shown.positions), "reach": float(shown.positions[-1])}
        data["shares"] = [f"{part:.0%}" for part in shown.share.tolist()]
        data |= _image_data(shown.grid, shape)
        return render_template("sliders.html.jinja", data=data, still=still)
    data = _map_data(shown, labels) | ({} if shown.how == "tsne" else _image_data(shown.grid, shape))
    return render_template("latent_map.html.jinja", data=data, still=still)


def render_page(title: str, blocks: Sequence[tuple[str, Any]]) -> str:
    """Return a self-contained HTML page of `render_widget` pieces, each under a heading."""
    return str(render_template("maps_page.html.jinja", title=title, blocks=blocks))


def _map_data(shown: LatentMap, labels: Labels | None) -> dict[str, Any]:
    """Return what the script of a map needs."""
    classes = _labels(shown, labels)
    names, indices = style.class_names(classes), _evenly(len(shown.codes), CODES)
    kinds = np.unique(classes, return_inverse=True)[1] if names else np.zeros(len(shown.codes), int)
    codes = to_numpy(shown.codes, float)
    axes = (shown.grid_x, shown.grid_y) if shown.how != "tsne" else tuple(shown.codes.T)
    circled = shown.prior is not None and style.standard_normal(to_numpy(shown.prior, float))
    return {
        "total": len(shown.codes),
        "codes": [(*codes[b].round(4).tolist(), int(kinds[b])) for b in indices],
        "ellipses": [] if shown.spread is None else _ellipses(shown.spread)[indices].round(5).tolist(),
        "colours": [*CLASS_COLOURS] if names else [COLOURS[0]],
        "legend": list(zip(names, CLASS_COLOURS, strict=False)),
        "extent": [round(float(end), 5) for line in axes for end in (line.min(), line.max())],
        "circles": [1, 2, 3] if circled else [],
        "axes": list(_axes(shown.how, shown.share)),
        "ticks": shown.how != "tsne",
        "unit": "u, along the principal directions" if shown.how == "pca" else "u",
        "nodes": [len(shown.grid_y), len(shown.grid_x)],
        "grid": "",
    }


def _image_data(grid: Any, shape: Sequence[int]) -> dict[str, Any]:
    """Return a grid of rows as bytes from 0 to 255, the values of these two, and height and width of a row."""
    values = to_numpy(grid, float).reshape(-1, grid.shape[-1])
    low, high = style.grey_limits(values)
    scaled = (np.nan_to_num(values, nan=low) - low) / max(high - low, 1e-30) * 255
    packed = base64.b64encode(scaled.round().astype(np.uint8).tobytes()).decode()
    height, width = style.image_shape(_shape(grid, shape))
    return {"grid": packed, "low": low, "high": high, "height": height, "width": width, "columns": values.shape[1]}


def _evenly(count: int, most: int) -> np.ndarray:
    return np.linspace(0, count - 1, min(most, count)).round().astype(int)


def _ellipses(spread: Any) -> np.ndarray:
    """Return half axes, the long one first, and angle of each row's ellipse of one standard deviation, [B, 3]."""
    values, ways = np.linalg.eigh(to_numpy(spread, float))
    axes = np.sqrt(np.clip(values[:, ::-1], 0, None))
    return np.column_stack([axes, np.arctan2(ways[:, 1, 1], ways[:, 0, 1])])


def _outline(axis: Any, codes: np.ndarray, ellipses: np.ndarray, labels: np.ndarray) -> None:
    """Draw the ellipses of some codes, so few that they can be told apart, in the colours of their labels."""
    if not ellipses[:, 0].any():
        return
    kinds = np.unique(labels, return_inverse=True)[1] if style.class_names(labels) else None
    for b in _evenly(len(codes), ELLIPSES):
        long, short, turn = ellipses[b]
        colour = GREY if kinds is None else CLASS_COLOURS[kinds[b]]
        axis.add_patch(Ellipse(codes[b], 2 * long, 2 * short, angle=math.degrees(turn), fill=False, lw=0.6, ec=colour))
    axis.plot([], [], ls="none", marker="o", ms=4, mfc="none", mec=GREY, mew=0.6, label="q(z|x), 1 sd")


def _lines(shown: Sliders, shape: tuple[int, ...]) -> Figure:
    """Draw each slider's line of rows while the others are 0."""
    count, G = len(shown.scale), len(shown.positions)
    middle: list[Any] = [G // 2] * (count - 1)
    rows = [to_numpy(shown.grid, float)[(*middle[:d], slice(None), *middle[d:])].reshape(G, -1) for d in range(count)]
    figure = Figure(figsize=(8.6, 0.6 + 1.0 * count), layout="constrained")
    for d, (axis, images) in enumerate(zip(figure.subplots(count, 1, squeeze=False).flat, rows, strict=True)):
        style.image_grid(axis, images, shape, G if style.image_shape(shape)[0] > 1 else 1, style.grey_limits(*rows))
        axis.set_ylabel(f"direction {d + 1}\n{shown.share[d]:.0%}", rotation=0, ha="right", va="center", fontsize=8)
    reach = float(shown.positions[-1])
    figure.supxlabel(f"{-reach:g} to {reach:g} standard deviations of the codes from their mean", fontsize=8)
    return figure


def _labels(shown: LatentMap, labels: Labels | None) -> np.ndarray:
    classes = np.zeros(0) if labels is None else np.asarray(labels)
    if labels is not None and len(classes) != len(shown.codes):
        raise UserError(f"{len(classes)} labels are given for a map of {len(shown.codes)} rows; give one for each row")
    return classes


def _shape(grid: Any, shape: Sequence[int]) -> tuple[int, ...]:
    """Return the shape of one row, a strip unless given."""
    size = tuple(shape) or (grid.shape[-1],)
    if grid.numel() and math.prod(size) != grid.shape[-1]:
        raise UserError(f"shape {size} has {math.prod(size)} values, but the rows have {grid.shape[-1]} columns")
    return size
