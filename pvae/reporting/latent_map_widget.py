"""Latent maps as pictures, as pieces of a page that one can move in, and as a page of their own."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Ellipse

from pvae.applications.latent_map import LatentMap, Sliders
from pvae.errors import UserError
from pvae.reporting.style import (
    CLASS_COLOURS,
    COLOURS,
    GREY,
    STYLE,
    class_names,
    data_uri,
    grey_limits,
    image_grid,
    image_shape,
    scatter_latents,
    standard_normal,
)

# Codes that a page holds, ellipses that a picture shows, and lines of a grid that it draws.
CODES, ELLIPSES, LINES = 1500, 30, 12
Labels = Sequence[Any] | np.ndarray
AXES = {
    "plane": ("first latent dimension (u)", "second latent dimension (u)"),
    "tsne": ("t-SNE, which keeps neighbours and no distances", ""),
}


def draw_latent_map(found: LatentMap | Sliders, labels: Labels | None = None, shape: Sequence[int] = ()) -> Figure:
    """Codes, with q's ellipses of one standard deviation, beside a sheet of what a grid of the plane decodes to.

    Arguments:
        found: the map; or sliders, each drawn as a line of what it decodes to while the others stand at 0.
        labels: class of each row, [B]; up to ten are coloured.
        shape: of one row, where it is a picture.

    Returns:
        A figure that belongs to no window.

    Raises:
        UserError: labels of another number of rows, or a shape of another number of values.
    """
    if isinstance(found, Sliders):
        return _lines(found, _shape(found.grid, shape))
    own = _labels(found, labels)
    figure, axes = _pairs(1 if found.how == "tsne" else 2, height=4.2)
    codes = _array(found.codes)
    if found.spread is not None:
        _outline(axes[0], codes, _ellipses(found), own)
    scatter_latents(
        axes[0], codes, np.zeros((0, 2)) if found.prior is None else _array(found.prior), own, "codes of rows"
    )
    words = _axes(found)
    axes[0].set(xlabel=words[0], ylabel=words[1])
    if found.spread is not None:
        lines = np.linspace(0, len(found.up) - 1, min(LINES, len(found.up))).round().astype(int)
        images = _array(found.grid)[lines[::-1]][:, lines]
        image_grid(axes[1], images.reshape(len(lines) ** 2, -1), _shape(found.grid, shape), len(lines))
        axes[1].set_title("what the plane's points decode to", fontsize=9)
        axes[1].set(xlabel=_span(found.across), ylabel=_span(found.up))
    return figure


def draw_latent_maps(maps: Mapping[str, tuple[np.ndarray, np.ndarray]], labels: Labels | None = None) -> Figure:
    """Codes of the same rows under several fits, each over its prior; more than two dimensions by the codes' PCA.

    Arguments:
        maps: codes [B, D] and prior draws [S, D] by the fit's name.
        labels: class of each row, [B].
    """
    own = np.zeros(0) if labels is None else np.asarray(labels)
    figure, axes = _pairs(len(maps), height=3.9)
    for axis, (name, (codes, prior)) in zip(axes, maps.items(), strict=True):
        places, draws, words = _plane(codes, prior)
        scatter_latents(axis, places, draws, own, "codes")
        axis.set(xlabel=words[0], ylabel=words[1])
        axis.set_title(name, fontsize=9)
    return figure


def _pairs(count: int, height: float) -> tuple[Figure, list[Any]]:
    """Panels two by two; one alone has an empty place beside it, so that a page shows all of one size."""
    lines = -(-count // 2)
    figure = Figure(figsize=(9.6, height * lines), layout="constrained")
    axes = list(figure.subplots(lines, 2, squeeze=False).flat)
    for axis in axes[count:]:
        axis.set_axis_off()
    return figure, axes[:count]


def _plane(codes: np.ndarray, prior: np.ndarray) -> tuple[np.ndarray, np.ndarray, tuple[str, str]]:
    """Codes and prior draws in the plane of two dimensions or of the first principal directions; and its axes."""
    if codes.shape[1] == 1:  # a line, as histograms would show it, spread by the rows' order
        return _risen(codes), _risen(prior), ("latent dimension (u)", "row, by its order")
    if codes.shape[1] == 2 or len(codes) < 3:
        return codes[:, :2], prior[:, :2], AXES["plane"]
    centre = codes.mean(0)
    _, values, ways = np.linalg.svd(codes - centre, full_matrices=False)
    share = values[:2] ** 2 / max((values**2).sum(), 1e-300)
    return (codes - centre) @ ways[:2].T, (prior - centre) @ ways[:2].T, _principal(share)


def _risen(line: np.ndarray) -> np.ndarray:
    return np.column_stack([line[:, 0], np.linspace(-1, 1, len(line))])


def _principal(share: Sequence[float] | np.ndarray) -> tuple[str, str]:
    first, second = (
        f"{ordinal} principal direction (u), {part:.0%} of the codes' variance"
        for ordinal, part in zip(("first", "second"), share, strict=True)
    )
    return first, second


def _axes(found: LatentMap) -> tuple[str, str]:
    return AXES[found.how] if found.how in AXES or found.share is None else _principal(found.share.tolist())


def render_widget(found: LatentMap | Sliders, labels: Labels | None = None, shape: Sequence[int] = ()) -> Any:
    """A map, or sliders, as a piece of HTML that shows what the pointed place decodes to; it fetches nothing.

    Moving the pointer, a finger or the arrow keys over the plane shows what lies there, interpolated between the grid's
    points; in print, and without scripts, the static picture stands instead.

    Arguments:
        found, labels, shape: as for `draw_latent_map`; of more than 1,500 rows some are shown.

    Returns:
        Text that jinja takes as markup; all names in it are escaped.

    Raises:
        UserError: labels of another number of rows, or a shape of another number of values.
    """
    import matplotlib

    with matplotlib.rc_context(STYLE):
        still = data_uri(draw_latent_map(found, labels, shape), "png")
    if isinstance(found, Sliders):
        data = _slider_data(found) | _image_data(found.grid, shape)
        text = "What the latents decode to along each of the codes' principal directions."
        return _rendered("sliders.html.jinja", data=data, still=still, alt=text)
    data = _map_data(found, labels) | ({} if found.how == "tsne" else _image_data(found.grid, shape))
    text = "Codes of rows on a plane" + (", and what a grid of it decodes to." if found.grid.numel() else ".")
    return _rendered("latent_map.html.jinja", data=data, still=still, alt=text)


def render_page(title: str, blocks: Sequence[tuple[str, Any]]) -> str:
    """A self-contained HTML page of `render_widget` pieces, each under a heading."""
    return str(_rendered("maps_page.html.jinja", title=title, blocks=blocks))


def _rendered(name: str, **values: Any) -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("pvae.reporting", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    return Markup(environment.get_template(name).render(**values))


def _map_data(found: LatentMap, labels: Labels | None) -> dict[str, Any]:
    """What the script of a map needs."""
    own = _labels(found, labels)
    names, colours = class_names(own), [*CLASS_COLOURS] if len(own) else [COLOURS[0]]
    kinds = np.unique(own, return_inverse=True)[1] if names else np.zeros(len(found.codes), int)
    some = np.linspace(0, len(found.codes) - 1, min(CODES, len(found.codes))).round().astype(int)
    codes = _array(found.codes)
    places = [(*codes[b].round(4).tolist(), int(kinds[b])) for b in some]
    ellipses = [] if found.spread is None else _ellipses(found)[some].round(5).tolist()
    axes = (found.across, found.up) if found.how != "tsne" else tuple(found.codes.T)
    circles = [1, 2, 3] if found.prior is not None and standard_normal(_array(found.prior)) else []
    return {
        "total": len(found.codes),
        "codes": places,
        "ellipses": ellipses,
        "colours": colours if names else [COLOURS[0]],
        "legend": list(zip(names, CLASS_COLOURS, strict=False)),
        "extent": [round(float(end), 5) for line in axes for end in (line.min(), line.max())],
        "circles": circles,
        "axes": list(_axes(found)),
        "ticks": found.how != "tsne",
        "unit": "u, along the principal directions" if found.how == "pca" else "u",
        "nodes": [len(found.up), len(found.across)],
        "grid": "",
        "note": "The mean of p(x|z) at the place in the plane, interpolated between the points of a grid; u are the "
        "latents' own units." + (" Circles: 1, 2 and 3 from 0, the prior's centre." if circles else ""),
    }


def _slider_data(found: Sliders) -> dict[str, Any]:
    """What the script of sliders needs."""
    return {
        "positions": len(found.positions),
        "reach": float(found.positions[-1]),
        "shares": [f"{part:.0%}" for part in found.share.tolist()],
        "names": [f"direction {d}" for d, _ in enumerate(found.scale, 1)],
    }


def _image_data(grid: Any, shape: Sequence[int]) -> dict[str, Any]:
    """A grid of rows as bytes from 0 to 255, the values that these stand for, and height and width of a row."""
    values = _array(grid).reshape(-1, grid.shape[-1])
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    if low >= 0 and high <= 1:
        low, high = 0.0, 1.0
    scaled = (np.nan_to_num(values, nan=low) - low) / max(high - low, 1e-30) * 255
    packed = base64.b64encode(scaled.round().astype(np.uint8).tobytes()).decode()
    height, width = image_shape(_shape(grid, shape))
    return {"grid": packed, "low": low, "high": high, "height": height, "width": width, "columns": values.shape[1]}


def _ellipses(found: LatentMap) -> np.ndarray:
    """Half axes, the long one first, and turn of each row's ellipse of one standard deviation, [B, 3]."""
    values, ways = np.linalg.eigh(_array(found.spread))
    axes = np.sqrt(np.clip(values[:, ::-1], 0, None))
    return np.column_stack([axes, np.arctan2(ways[:, 1, 1], ways[:, 0, 1])])


def _outline(axis: Any, codes: np.ndarray, ellipses: np.ndarray, labels: np.ndarray) -> None:
    """Ellipses of some codes, so few that they can be told apart, in the colours of their classes."""
    if not ellipses[:, 0].any():
        return
    kinds = np.unique(labels, return_inverse=True)[1] if class_names(labels) else None
    for b in np.linspace(0, len(codes) - 1, min(ELLIPSES, len(codes))).round().astype(int):
        long, short, turn = ellipses[b]
        colour = GREY if kinds is None else CLASS_COLOURS[kinds[b]]
        axis.add_patch(Ellipse(codes[b], 2 * long, 2 * short, angle=math.degrees(turn), fill=False, lw=0.6, ec=colour))
    axis.plot([], [], ls="none", marker="o", ms=4, mfc="none", mec=GREY, mew=0.6, label="q(z|x), 1 sd")


def _lines(found: Sliders, shape: tuple[int, ...]) -> Figure:
    """Each slider's line of rows while the others stand at 0."""
    count, G = len(found.scale), len(found.positions)
    whole, middle = _array(found.grid), G // 2
    rows = [
        whole[tuple(slice(None) if way == d else middle for way in range(count))].reshape(G, -1) for d in range(count)
    ]
    figure = Figure(figsize=(8.6, 0.6 + 1.0 * count), layout="constrained")
    for d, (axis, images) in enumerate(zip(figure.subplots(count, 1, squeeze=False).flat, rows, strict=True)):
        image_grid(axis, images, shape, G if image_shape(shape)[0] > 1 else 1, grey_limits(*rows))
        axis.set_ylabel(f"direction {d + 1}\n{found.share[d]:.0%}", rotation=0, ha="right", va="center", fontsize=8)
    reach = float(found.positions[-1])
    figure.supxlabel(f"{-reach:g} to {reach:g} standard deviations of the codes from their mean", fontsize=8)
    return figure


def _span(line: Any) -> str:
    return f"from {float(line[0]):.1f} to {float(line[-1]):.1f} u"


def _array(values: Any) -> np.ndarray:
    return values.detach().cpu().double().numpy()


def _labels(found: LatentMap, labels: Labels | None) -> np.ndarray:
    own = np.zeros(0) if labels is None else np.asarray(labels)
    if labels is not None and len(own) != len(found.codes):
        raise UserError(f"{len(own)} labels are given for a map of {len(found.codes)} rows; give one for each row")
    return own


def _shape(grid: Any, shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of one row, a strip unless given."""
    own = tuple(shape) or (grid.shape[-1],)
    if grid.numel() and math.prod(own) != grid.shape[-1]:
        raise UserError(f"shape {own} has {math.prod(own)} values, but the rows have {grid.shape[-1]} columns")
    return own
