"""Panels of a diagnosis: the arrays behind its figures to pictures as data addresses, one function each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from pvae.diagnostics.calibration import ecdf_band
from pvae.reporting.latent_figures import aggregate, kl, predictive
from pvae.reporting.style import COLOURS, GREY, SMALL, STYLE, data_uri, subplots, to_numpy
from pvae.stats import UNRELIABLE

BLUE, ORANGE, GREEN = COLOURS[:3]
# The guide, and the same posterior family with each row's parameters refined.
WHO = {"guide": ("the guide", BLUE), "best": ("refined", ORANGE)}
USABLE, WORST = 0.5, 12
# A k-hat above it is drawn at the edge.
BEYOND = 2.5

CAPTIONS = {
    "gaps": "Nats per row between the evidence and the ELBO, and what causes them: inference gap = approximation "
    "gap (the family) + amortization gap (where its parameters come from). Below them what the best of another family "
    "would win. Bars: 95% bootstrap intervals.",
    "k_hat": "Tail index k-hat of each row's importance weights: below 0.5 estimates by weights are good, above 0.7 "
    "they can't be relied on. Beside it the rows with the largest k-hat of the guide.",
    "reference": "The posterior against long HMC chains, a dot for each row and dimension; rows whose chains are "
    "not sound are left out. On the line the two agree: below it, posterior spreads are too small. Right: share of "
    "the chains' draws inside the posterior's central intervals, with two standard errors over rows.",
    "calibration": "Ranks of known latents among draws of the posterior, for rows simulated from the model: their "
    "ECDF less the uniform one, a line for each dimension (counted from 0). Lines leave the 95% band where the "
    "posterior is wrong: up, then down: too narrow; down, then up: too wide; one hill: it leans to large values; one "
    "valley: to small ones. TARP, dashed, looks at all dimensions at once and has its own band, dotted.",
    "kl": "Left: KL from the prior by dimension (counted from 0), largest first, with two standard errors over "
    "rows. Right: variance over rows of the posterior's mean; a dimension is active above 0.01.",
    "aggregate": "Posterior draws of all rows together against the prior, which they should fill. Left: the "
    "dimensions of largest KL; rings: 1, 2 and 3 standard deviations of a standard normal prior. Right: the dimension "
    "that fits the prior least.",
    "predictive": "Data drawn from the fit against the data. Left: for each column the share of replicates whose "
    "mean is above the data's; near 0 or 1 the fit misses it. Right: statistics of replicates, with the data's as a "
    "line.",
    "sandwich": "Lower and upper bound of the evidence of simulated rows, by annealing forwards and backwards. The "
    "evidence lies between the two on average; where they are apart, annealing was too short.",
}


def draw_diagnosis(found: Mapping[str, Any], shape: tuple[int, ...]) -> dict[str, str]:
    """All panels that the parts of a variant's diagnosis allow, by the names of ``CAPTIONS``, as addresses for ``src``.

    Arguments:
        found: the parts by name, see `battery`; any may be absent. ``gaps`` maps a gap's name to its mean and
            the ends of its interval, in nats per row.
        shape: of a row; two numbers make it an image.

    Returns:
        Pictures of what is there. A panel without anything to show is left out.
    """
    import matplotlib

    drawn = {}
    with matplotlib.rc_context(STYLE):
        for name in CAPTIONS:
            if picture := DRAWN[name](found, shape):
                drawn[name] = picture
    return drawn


def _whose(found: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """The parts of this kind, by whose q they are of."""
    return {who: found[f"{kind}-{who}"] for who in WHO if f"{kind}-{who}" in found}


def _gaps(found: Mapping[str, Any], shape: tuple[int, ...]) -> str | None:
    gaps = {name: value for name, value in found.get("gaps", {}).items() if np.isfinite(value).all()}
    if not gaps:
        return None
    figure, (axis,) = subplots(1, height=0.9 + 0.34 * len(gaps))
    mean, low, high = np.array(list(gaps.values()), dtype=float).T
    own = {"inference": GREY, "approximation": BLUE, "amortization": ORANGE}
    places = np.arange(len(gaps))
    axis.barh(places, mean, color=[own.get(name.split()[0], GREEN) for name in gaps], height=0.6)
    axis.hlines(places, low, high, color="black", lw=1)
    axis.axvline(0, color="black", lw=0.6)
    axis.set_yticks(places, [_plain(name) for name in gaps])
    axis.set_xlabel("nats per row")
    axis.invert_yaxis()
    right = max(high.max(), 0)
    for place, value in enumerate(mean):
        axis.text(right, place, f"  {value:.3g}", va="center", fontsize=8)
    axis.margins(x=0.1)
    return data_uri(figure, "svg")


def _plain(text: str) -> str:
    """Text of which matplotlib makes no formula."""
    return text.replace("$", r"\$")


def _k_hat(found: Mapping[str, Any], shape: tuple[int, ...]) -> str | None:
    values = {who: to_numpy(part, "k_hat") for who, part in _whose(found, "weights").items()}
    values = {who: k[~np.isnan(k)] if who == "best" else k for who, k in values.items() if not np.isnan(k).all()}
    if not values:
        return None
    worst = _worst(next(iter(values.values())))
    figure = Figure(figsize=(8.6, 3.4), layout="constrained")
    if not len(worst):
        _k_histogram(figure.subplots(), values)
        return data_uri(figure, "svg")
    left, right = np.asarray(figure.subfigures(1, 2, width_ratios=(1.15, 1)))
    _k_histogram(left.subplots(), values)
    k = next(iter(values.values()))[worst]
    if len(shape) == 2 and "rows" in found:
        images = to_numpy(found["rows"], "x").reshape(len(found["rows"].x), -1)[worst, : int(np.prod(shape))]
        right.suptitle("rows of largest k-hat", fontsize=9)
        _pictured(right, images.reshape(-1, *shape), k)
        return data_uri(figure, "png")
    axis = right.subplots()
    places = np.arange(len(worst))
    bars = axis.barh(places, np.minimum(k, BEYOND), color=BLUE, height=0.6)
    axis.bar_label(bars, [f"{value:.2f}" for value in k], padding=3, fontsize=8)
    axis.margins(x=0.12)
    axis.set_yticks(places, [f"row {n}" for n in worst])
    axis.invert_yaxis()
    axis.set(xlabel="k-hat", title="rows of largest k-hat, counted from 0")
    axis.title.set_fontsize(9)
    return data_uri(figure, "svg")


def _worst(k: np.ndarray) -> np.ndarray:
    """Numbers of the rows of largest k-hat, largest first."""
    order = np.argsort(-np.where(np.isnan(k), -np.inf, k), kind="stable")
    return order[np.isfinite(k[order]) | (k[order] == np.inf)][:WORST]


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
        label = ":\n".join([name, "\n".join(notes)]) if notes else name
        kind: Any = {"histtype": "stepfilled", "alpha": 0.45} if who == "guide" else {"histtype": "step", "lw": 1.4}
        axis.hist(np.clip(k, low, high), bins=edges, color=colour, label=label, **kind)
    axis.margins(y=0.12)
    for line in (USABLE, UNRELIABLE):
        axis.axvline(line, color="black", lw=0.8, ls="--")
    centres = {"good": (low + USABLE) / 2, "usable": (USABLE + UNRELIABLE) / 2, "unreliable": (UNRELIABLE + high) / 2}
    for word, centre in centres.items():
        axis.text(centre, 1.01, word, transform=axis.get_xaxis_transform(), ha="center", va="bottom", fontsize=8)
    axis.set(xlabel="k-hat of a row's importance weights", ylabel="rows", xlim=(low, high))
    axis.yaxis.set_major_locator(MaxNLocator(integer=True))
    noted = bool(np.any((every == -np.inf) | (every > high)))
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=1 if noted else 2, **SMALL)


def _pictured(figure: Any, images: np.ndarray, k: np.ndarray) -> None:
    """Images with their k-hat below, twelve at the most."""
    axes = figure.subplots(3, 4).flat
    for axis in axes:
        axis.set_axis_off()
    known = np.nan_to_num(images)  # what is missing stays blank
    for axis, image, value in zip(figure.axes, images, k, strict=False):
        axis.imshow(image, cmap="gray_r", vmin=min(known.min(), 0), vmax=max(known.max(), 1e-9))
        axis.text(0.5, -0.04, f"{value:.2f}", transform=axis.transAxes, ha="center", va="top", fontsize=8)


def _reference(found: Mapping[str, Any], shape: tuple[int, ...]) -> str | None:
    parts = {who: part for who, part in _whose(found, "reference").items() if part.sound.any()}
    if not parts:
        return None
    figure, (means, spreads, coverage) = subplots(3, height=3.3)
    scale, unit = np.ones(1), "u"
    if "health" in found:
        scale, unit = to_numpy(found["health"], "prior").std(0), "prior sd"
    for place, (who, part) in enumerate(parts.items()):
        sound = np.asarray(part.sound.cpu(), dtype=bool)
        mean, sd, ours, our_sd = (to_numpy(part, n)[sound] for n in ("mean", "sd", "guide_mean", "guide_sd"))
        name, colour = WHO[who]
        dots: Any = {"s": 9, "alpha": 0.5, "color": colour, "linewidths": 0, "label": name}
        means.scatter(mean / scale, ours / scale, **dots)
        spreads.scatter(sd / scale, our_sd / scale, **dots)
        share = [to_numpy(part, n)[sound].mean(-1) for n in ("coverage_50", "coverage_90")]
        errors = [2 * s.std(ddof=1) / len(s) ** 0.5 if len(s) > 1 else 0.0 for s in share]
        at = np.arange(2) + (place - (len(parts) - 1) / 2) * 0.36
        coverage.bar(at, [100 * s.mean() for s in share], width=0.34, color=colour, alpha=0.75)
        coverage.errorbar(
            at, [100 * s.mean() for s in share], [100 * e for e in errors], fmt="none", ecolor="black", lw=1
        )
    spreads.set(xscale="log", yscale="log")
    for axis, what in ((means, "mean"), (spreads, "sd")):
        _diagonal(axis)
        axis.set(xlabel=f"{what} by HMC ({unit})", ylabel=f"{what} of q ({unit})")
    _plain_ticks(spreads)
    coverage.hlines([50, 90], [-0.45, 0.55], [0.45, 1.45], color="black", lw=1.2, ls="--", label="nominal")
    coverage.set_xticks([0, 1], ["50% intervals", "90% intervals"])
    coverage.set(ylabel="chains' draws inside (%)", ylim=(0, 105))
    handles = [*means.get_legend_handles_labels()[0], *coverage.get_legend_handles_labels()[0]]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, markerscale=2, **SMALL)
    first = next(iter(parts.values())).sound
    figure.suptitle(f"{int(first.sum())} of {len(first)} rows have sound chains", fontsize=9)
    return data_uri(figure, "png" if sum(p.mean.numel() for p in parts.values()) > 1000 else "svg")


def _plain_ticks(axis: Axes) -> None:
    """Few ticks on logarithmic axes, written as plain numbers."""
    low, high = axis.get_xlim()
    for line in (axis.xaxis, axis.yaxis):
        line.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=5) if high > 8 * low else MaxNLocator(4))
        line.set_major_formatter("{x:g}")
        line.set_minor_formatter(NullFormatter())


def _diagonal(axis: Axes) -> None:
    """Equal limits on both axes, with the line on which both agree."""
    low, high = min(axis.get_xlim()[0], axis.get_ylim()[0]), max(axis.get_xlim()[1], axis.get_ylim()[1])
    axis.plot([low, high], [low, high], color="black", lw=0.8, zorder=0)
    axis.set(xlim=(low, high), ylim=(low, high))
    axis.set_box_aspect(1)


def _calibration(found: Mapping[str, Any], shape: tuple[int, ...]) -> str | None:
    parts = {who: part for who, part in _whose(found, "calibration").items() if part.ranks.numel()}
    if not parts:
        return None
    figure, axes = subplots(len(parts), width=8.6 if len(parts) > 1 else 5.0, height=3.6)
    for axis, (who, part) in zip(axes, parts.items(), strict=True):
        _ranks(axis, to_numpy(part, "ranks"), to_numpy(part, "tarp"))
        axis.set_title(f"{WHO[who][0]}: {len(part.ranks)} simulated rows", fontsize=9)
        axis.set_xlabel("rank of the true latent among draws (share)")
    axes[0].set_ylabel("ECDF - uniform (share of rows)")
    reach = max(max(np.abs(axis.get_ylim())) for axis in axes)
    for axis in axes:
        axis.set(xlim=(0, 1), ylim=(-reach, reach))
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=2, **SMALL)
    return data_uri(figure, "svg")


def _ranks(axis: Axes, ranks: np.ndarray, tarp: np.ndarray) -> None:
    N, D = ranks.shape
    at = np.linspace(0, 1, 201)
    lines = np.stack([_excess(ranks[:, d], at) for d in range(D)])
    worst = int(np.argmax(np.max(np.abs(lines), axis=1)))
    axis.axhspan(-ecdf_band(N, D), ecdf_band(N, D), color=GREY, alpha=0.2, lw=0, label="95% band of all dimensions")
    others = [d for d in range(D) if d != worst]
    if others:
        axis.plot(at, lines[others].T, color=COLOURS[4], lw=0.7, alpha=0.7)
        axis.lines[0].set_label("other dimensions")
    axis.plot(at, lines[worst], color=ORANGE, lw=1.6, label=f"dimension {worst}, the worst")
    axis.plot(at, _excess(tarp, at), color="black", lw=1.2, ls="--", label="TARP")
    for side in (-1, 1):
        axis.axhline(side * ecdf_band(N), color="black", lw=0.8, ls=":")


def _excess(u: np.ndarray, at: np.ndarray) -> np.ndarray:
    """ECDF of u less the uniform one."""
    excess: np.ndarray = np.searchsorted(np.sort(u), at, side="right") / len(u) - at
    return excess


def _sandwich(found: Mapping[str, Any], shape: tuple[int, ...]) -> str | None:
    if "sandwich" not in found or not len(found["sandwich"].lower):
        return None
    lower, upper = (to_numpy(found["sandwich"], name) for name in ("lower", "upper"))
    order = np.argsort(lower, kind="stable")
    rows, width = np.arange(len(order)), (upper - lower)[order]
    figure, (both, apart) = subplots(2)
    both.vlines(rows, lower[order], upper[order], color=GREY, lw=1)
    both.scatter(rows, upper[order], marker="v", s=14, color=ORANGE, linewidths=0, label="upper bound")
    both.scatter(rows, lower[order], marker="^", s=14, color=BLUE, linewidths=0, label="lower bound")
    both.set(xlabel="simulated row, by its lower bound", ylabel="evidence (nats)")
    both.legend(**SMALL)
    apart.axhline(0, color="black", lw=0.6)
    apart.vlines(rows, 0, width, color=GREEN, lw=1)
    apart.scatter(rows, width, s=14, color=GREEN, linewidths=0)
    apart.set(xlabel="simulated row, by its lower bound", ylabel="upper - lower bound (nats)")
    error = f" ± {width.std(ddof=1) / len(width) ** 0.5:.2g}" if len(width) > 1 else ""
    apart.set_title(f"mean {width.mean():.3g}{error} nats", fontsize=9)
    for axis in (both, apart):
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    return data_uri(figure, "svg")


DRAWN = {
    "gaps": _gaps,
    "k_hat": _k_hat,
    "reference": _reference,
    "calibration": _calibration,
    "kl": kl,
    "aggregate": aggregate,
    "predictive": predictive,
    "sandwich": _sandwich,
}
