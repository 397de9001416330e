"""Figures of a diagnosis, one function each: from the arrays of its parts to matplotlib figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pvae.diagnostics.calibration import ecdf_band
from pvae.reporting.latent_figures import draw_aggregate, draw_kl, draw_predictive
from pvae.reporting.style import COLOURS, GREY, SMALL, STYLE, plain_ticks, subplots
from pvae.runtime.torch_state import to_numpy
from pvae.stats import UNRELIABLE

BLUE, ORANGE, GREEN = COLOURS[:3]
WHO = {"guide": ("guide", BLUE), "best": ("refined", ORANGE)}  # best: refined variational parameters
USABLE = 0.5
BEYOND = 2.5  # a k-hat above it is drawn at the edge


@rc_context(STYLE)
def draw_diagnosis(parts: Mapping[str, Any], shape: tuple[int, ...]) -> dict[str, Figure]:
    """Return all figures that the parts of a variant's diagnosis (see `battery`) allow, by the names of ``DRAWN``.

    ``gaps`` among them maps a gap's label to its mean and the ends of its interval, in nats per row.
    """
    return {name: figure for name, draw in DRAWN.items() if (figure := draw(parts, shape)) is not None}


def _whose(parts: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """Return the parts of this kind, of the guide and of the refined one."""
    return {who: parts[f"{kind}-{who}"] for who in WHO if f"{kind}-{who}" in parts}


def _gaps(parts: Mapping[str, Any], shape: tuple[int, ...]) -> Figure | None:
    gaps = {name: value for name, value in parts.get("gaps", {}).items() if np.isfinite(value).all()}
    if not gaps:
        return None
    figure, (axis,) = subplots(1, height=0.9 + 0.34 * len(gaps))
    mean, low, high = np.array(list(gaps.values()), dtype=float).T
    colours = {"inference": GREY, "approximation": BLUE, "amortization": ORANGE}
    places = np.arange(len(gaps))
    axis.barh(places, mean, color=[colours.get(name.split()[0], GREEN) for name in gaps], height=0.6)
    axis.hlines(places, low, high, color="black", lw=1)
    axis.axvline(0, color="black", lw=0.6)
    axis.set_yticks(places, [name.replace("$", r"\$") for name in gaps])  # no formulas
    axis.set_xlabel("nats per row")
    axis.invert_yaxis()
    for place, value in enumerate(mean):
        axis.text(max(high.max(), 0), place, f"  {value:.3g}", va="center", fontsize=8)
    axis.margins(x=0.1)
    return figure


def _k_hat(parts: Mapping[str, Any], shape: tuple[int, ...]) -> Figure | None:
    values = {who: to_numpy(part.k_hat, float) for who, part in _whose(parts, "weights").items()}
    values = {who: k[~np.isnan(k)] if who == "best" else k for who, k in values.items() if not np.isnan(k).all()}
    if not values:
        return None
    k = next(iter(values.values()))
    worst = np.argsort(-np.where(np.isnan(k), -np.inf, k), kind="stable")
    worst = worst[np.isfinite(k[worst]) | (k[worst] == np.inf)][:12]
    figure = Figure(figsize=(8.6, 3.4), layout="constrained")
    if not len(worst):
        _k_histogram(figure.subplots(), values)
        return figure
    left, right = np.asarray(figure.subfigures(1, 2, width_ratios=(1.15, 1)))
    _k_histogram(left.subplots(), values)
    if len(shape) == 2 and "rows" in parts:
        x = to_numpy(parts["rows"].x, float)
        images = x.reshape(len(x), -1)[worst, : int(np.prod(shape))]
        _pictured(right, images.reshape(-1, *shape), k[worst])
    else:
        _listed(right.subplots(), worst, k[worst])
    return figure


def _listed(axis: Axes, rows: np.ndarray, k: np.ndarray) -> None:
    """Draw a bar with the k-hat of each of these rows."""
    places = np.arange(len(rows))
    bars = axis.barh(places, np.minimum(k, BEYOND), color=BLUE, height=0.6)
    axis.bar_label(bars, [f"{value:.2f}" for value in k], padding=3, fontsize=8)
    axis.margins(x=0.12)
    axis.set_yticks(places, [f"row {n}" for n in rows])
    axis.invert_yaxis()
    axis.set(xlabel="k-hat", title="rows of largest k-hat, counted from 0")


def _k_histogram(axis: Axes, values: dict[str, np.ndarray]) -> None:
    every = np.concatenate(list(values.values()))
    finite = every[np.isfinite(every)]
    low = max(min(finite.min(initial=0.0), 0.0) - 0.05, -1.0)
    high = min(max(finite.max(initial=0.0), 1.0) + 0.05, BEYOND)
    edges: Any = np.linspace(low, high, int(np.clip(2 * len(every) ** 0.5, 12, 36)))
    for who, k in values.items():
        k, (name, colour) = k[~np.isnan(k)], WHO[who]
        alike, beyond = int(np.sum(k == -np.inf)), int(np.sum(k > high))
        notes = [f"{alike} rows of equal weights, at the left edge"] * (alike > 0)
        notes += [f"{beyond} rows beyond, at the right edge"] * (beyond > 0)
        kind: Any = {"histtype": "stepfilled", "alpha": 0.45} if who == "guide" else {"histtype": "step", "lw": 1.4}
        label = "\n".join([f"{name}:", *notes] if notes else [name])
        axis.hist(np.clip(k, low, high), bins=edges, color=colour, label=label, **kind)
    axis.margins(y=0.12)
    for line in (USABLE, UNRELIABLE):
        axis.axvline(line, color="black", lw=0.8, ls="--")
    centres = {"good": (low + USABLE) / 2, "usable": (USABLE + UNRELIABLE) / 2, "unreliable": (UNRELIABLE + high) / 2}
    for word, centre in centres.items():
        axis.text(centre, 1.01, word, transform=axis.get_xaxis_transform(), ha="center", va="bottom", fontsize=8)
    axis.set(xlabel="k-hat of a row's importance weights", ylabel="rows", xlim=(low, high))
    axis.yaxis.set_major_locator(MaxNLocator(integer=True))
    noted = np.any((every == -np.inf) | (every > high))
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=1 if noted else 2, **SMALL)


def _pictured(figure: Any, images: np.ndarray, k: np.ndarray) -> None:
    """Draw images with their k-hat below, twelve at the most."""
    figure.suptitle("rows of largest k-hat", fontsize=9)
    known = np.nan_to_num(images)  # what is missing stays blank
    for axis in figure.subplots(3, 4).flat:
        axis.set_axis_off()
    for axis, image, value in zip(figure.axes, images, k, strict=False):
        axis.imshow(image, cmap="gray_r", vmin=min(known.min(), 0), vmax=max(known.max(), 1e-9))
        axis.text(0.5, -0.04, f"{value:.2f}", transform=axis.transAxes, ha="center", va="top", fontsize=8)


def _reference(parts: Mapping[str, Any], shape: tuple[int, ...]) -> Figure | None:
    references = {who: part for who, part in _whose(parts, "reference").items() if part.reliable.any()}
    if not references:
        return None
    figure, (means, spreads, coverage) = subplots(3, height=3.3)
    scale, unit = np.ones(1), "u"
    if "health" in parts:
        scale, unit = to_numpy(parts["health"].prior, float).std(0), "prior sd"
    for place, (who, part) in enumerate(references.items()):
        (name, colour), sound = WHO[who], to_numpy(part.reliable, bool)
        moments = (part.mean, part.sd, part.guide_mean, part.guide_sd)
        mean, sd, ours, our_sd = (to_numpy(moment, float)[sound] / scale for moment in moments)
        dots: Any = {"s": 9, "alpha": 0.5, "color": colour, "linewidths": 0, "label": name}
        means.scatter(mean, ours, **dots)
        spreads.scatter(sd, our_sd, **dots)
        shares = [to_numpy(values, float)[sound].mean(-1) for values in (part.coverage_50, part.coverage_90)]
        _coverage_bars(coverage, np.arange(2) + (place - (len(references) - 1) / 2) * 0.36, shares, colour)
    spreads.set(xscale="log", yscale="log")
    for axis, moment in ((means, "mean"), (spreads, "sd")):
        _diagonal(axis)
        axis.set(xlabel=f"{moment}, reference ({unit})", ylabel=f"{moment} of q ({unit})")
    plain_ticks(spreads.get_xlim(), spreads.xaxis, spreads.yaxis)
    handles = [*means.get_legend_handles_labels()[0], *coverage.get_legend_handles_labels()[0][:1]]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, markerscale=2, **SMALL)
    first = next(iter(references.values())).reliable
    figure.suptitle(f"{int(first.sum())} of {len(first)} rows have a reference that passed its checks", fontsize=9)
    return figure


def _coverage_bars(axis: Axes, places: np.ndarray, shares: list[np.ndarray], colour: str) -> None:
    """Draw the coverage of 50% and 90% intervals, in percent, with two standard errors over rows."""
    percent = [100 * share.mean() for share in shares]
    errors = [200 * s.std(ddof=1) / len(s) ** 0.5 if len(s) > 1 else 0.0 for s in shares]
    axis.bar(places, percent, width=0.34, color=colour, alpha=0.75)
    axis.errorbar(places, percent, errors, fmt="none", ecolor="black", lw=1)
    axis.hlines([50, 90], [-0.45, 0.55], [0.45, 1.45], color="black", lw=1.2, ls="--", label="nominal")
    axis.set_xticks([0, 1], ["50% intervals", "90% intervals"])
    axis.set(ylabel="reference draws inside (%)", ylim=(0, 105))


def _diagonal(axis: Axes) -> None:
    """Set equal limits on both axes, and draw the line on which both agree."""
    low, high = min(*axis.get_xlim(), *axis.get_ylim()), max(*axis.get_xlim(), *axis.get_ylim())
    axis.plot([low, high], [low, high], color="black", lw=0.8, zorder=0)
    axis.set(xlim=(low, high), ylim=(low, high))
    axis.set_box_aspect(1)


def _calibration(parts: Mapping[str, Any], shape: tuple[int, ...]) -> Figure | None:
    calibrations = {who: part for who, part in _whose(parts, "calibration").items() if part.ranks.numel()}
    if not calibrations:
        return None
    figure, axes = subplots(len(calibrations), width=8.6 if len(calibrations) > 1 else 5.0, height=3.6)
    for axis, (who, part) in zip(axes, calibrations.items(), strict=True):
        _ranks(axis, to_numpy(part.ranks, float), to_numpy(part.tarp, float))
        axis.set_title(f"{WHO[who][0]}: {len(part.ranks)} simulated rows")
        axis.set_xlabel("normalized rank of the true latent among draws")
    axes[0].set_ylabel("ECDF - uniform (share of rows)")
    reach = max(max(np.abs(axis.get_ylim())) for axis in axes)
    for axis in axes:
        axis.set(xlim=(0, 1), ylim=(-reach, reach))
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=2, **SMALL)
    return figure


def _ranks(axis: Axes, ranks: np.ndarray, tarp: np.ndarray) -> None:
    N, D = ranks.shape
    at = np.linspace(0, 1, 201)
    lines = np.stack([_excess(ranks[:, d], at) for d in range(D)])
    worst = int(np.argmax(np.max(np.abs(lines), axis=1)))
    axis.axhspan(-ecdf_band(N, D), ecdf_band(N, D), color=GREY, alpha=0.2, lw=0, label="95% band of all dimensions")
    for place, line in enumerate(np.delete(lines, worst, 0)):
        label = None if place else "other dimensions"
        axis.plot(at, line, color=COLOURS[4], lw=0.7, alpha=0.7, label=label)
    axis.plot(at, lines[worst], color=ORANGE, lw=1.6, label=f"dimension {worst}, the worst")
    axis.plot(at, _excess(tarp, at), color="black", lw=1.2, ls="--", label="TARP")
    for side in (-1, 1):
        axis.axhline(side * ecdf_band(N), color="black", lw=0.8, ls=":")


def _excess(u: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Return the ECDF of u minus the uniform one."""
    return np.asarray(np.searchsorted(np.sort(u), at, side="right") / len(u) - at)


def _sandwich(parts: Mapping[str, Any], shape: tuple[int, ...]) -> Figure | None:
    if "sandwich" not in parts or not len(parts["sandwich"].lower):
        return None
    lower, upper = (to_numpy(bound, float) for bound in (parts["sandwich"].lower, parts["sandwich"].upper))
    order = np.argsort(lower, kind="stable")
    rows, width = np.arange(len(order)), (upper - lower)[order]
    figure, (both, apart) = subplots(2)
    both.vlines(rows, lower[order], upper[order], color=GREY, lw=1)
    both.scatter(rows, upper[order], marker="v", s=14, color=ORANGE, linewidths=0, label="upper bound")
    both.scatter(rows, lower[order], marker="^", s=14, color=BLUE, linewidths=0, label="lower bound")
    both.legend(**SMALL)
    apart.axhline(0, color="black", lw=0.6)
    apart.vlines(rows, 0, width, color=GREEN, lw=1)
    apart.scatter(rows, width, s=14, color=GREEN, linewidths=0)
    error = f" ± {width.std(ddof=1) / len(width) ** 0.5:.2g}" if len(width) > 1 else ""
    apart.set_title(f"mean {width.mean():.3g}{error} nats")
    for axis, label in ((both, "evidence (nats)"), (apart, "upper - lower bound (nats)")):
        axis.set(xlabel="simulated row, by its lower bound", ylabel=label)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


DRAWN: dict[str, Callable[[Mapping[str, Any], tuple[int, ...]], Figure | None]] = {
    **{"gaps": _gaps, "k_hat": _k_hat, "reference": _reference, "calibration": _calibration},
    **{"kl": draw_kl, "aggregate": draw_aggregate, "predictive": draw_predictive, "sandwich": _sandwich},
}
