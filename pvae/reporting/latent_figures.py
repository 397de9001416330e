"""Figures of latent usage and of predictive checks, one function each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pvae.diagnostics.predictive_checks import STATISTICS
from pvae.reporting import style
from pvae.reporting.style import COLOURS, GREY, SMALL
from pvae.runtime.torch_state import to_numpy

BLUE, ORANGE = COLOURS[:2]
ACTIVE = 0.01


def draw_kl(parts: Mapping[str, Any], shape: tuple[int, ...]) -> Figure | None:
    """Draw KL from the prior and activity of each latent dimension."""
    if "health" not in parts:
        return None
    kl, se, activity = (to_numpy(getattr(parts["health"], name), float) for name in ("kl", "kl_se", "activity"))
    known = not np.isnan(kl).any()
    order = np.argsort(-(kl if known else activity), kind="stable")
    figure, axes = style.subplots(2 if known else 1, width=8.6 if known else 5.0)
    ticks, active = np.arange(len(kl)), activity[order] > ACTIVE
    colours = np.where(active, BLUE, GREY)
    if known:
        axes[0].bar(ticks, kl[order], color=colours, yerr=2 * se[order], error_kw={"lw": 0.8})
        axes[0].set(ylabel="KL from the prior (nats)", title=f"{active.sum()} of {len(kl)} dimensions are active")
    shown, right = np.maximum(activity[order], 1e-6), axes[-1]
    right.vlines(ticks, 1e-6, shown, color=colours, lw=1)
    right.scatter(ticks, shown, color=colours, s=14)
    right.axhline(ACTIVE, color="black", lw=0.8, ls="--")
    for word, side in (("active", "bottom"), ("inactive", "top")):
        right.annotate(word, (1.01, ACTIVE), xycoords=right.get_yaxis_transform(), va=side, fontsize=8)
    right.set(yscale="log", ylabel="variance of the posterior's mean (u²)")
    right.set_ylim(bottom=min(shown.min() / 2, ACTIVE / 10))
    every = -(-len(kl) // 17)
    for axis in axes:
        axis.set_xticks(ticks[::every], [str(d) for d in order[::every]])
        axis.set_xlabel("dimension")
    return figure


def draw_aggregate(parts: Mapping[str, Any], shape: tuple[int, ...]) -> Figure | None:
    """Draw the aggregate posterior over the prior, and the marginal that differs most."""
    health = parts.get("health")
    if health is None or not len(health.codes):
        return None
    values = (health.codes, health.prior, health.kl, health.ks_p, health.ks)
    codes, prior, kl, ks_p, ks = (to_numpy(value, float) for value in values)
    flat = codes.shape[1] == 1
    figure, axes = style.subplots(1 if flat else 2, width=5.0 if flat else 8.6, height=3.8)
    if not flat:
        size = to_numpy(health.activity, float) if np.isnan(kl).any() else kl
        pair = np.argsort(-size, kind="stable")[:2]
        labels = to_numpy(parts["rows"].labels, float) if "rows" in parts else np.zeros(0)
        style.scatter_latents(axes[0], codes[:, pair], prior[:, pair], labels)
        axes[0].set(xlabel=f"dimension {pair[0]} (u)", ylabel=f"dimension {pair[1]} (u)")
    least = int(np.lexsort((-ks, ks_p))[0])
    # An outlier must not squeeze the rest of both into one bin.
    low, high = np.quantile(np.concatenate([codes[:, least], prior[:, least]]), [0.002, 0.998])
    edges: Any = np.linspace(low, high, int(np.clip(2 * len(codes) ** 0.5, 6, 41))) if high > low else 10
    shared: Any = {"bins": edges, "density": True, "lw": 1.4}
    axes[-1].hist(prior[:, least], color=GREY, label="prior", histtype="stepfilled", **shared)
    axes[-1].hist(codes[:, least], color=BLUE, label="aggregate posterior", histtype="step", **shared)
    p = f"p = {ks_p[least]:.2g}" if ks_p[least] >= 1e-4 else "p < 0.0001"
    axes[-1].set(xlabel=f"dimension {least} (u)", ylabel="density (1/u)")
    axes[-1].set_title(f"largest KS distance from the prior: {p}")
    axes[-1].legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, **SMALL)
    return figure


def draw_predictive(parts: Mapping[str, Any], shape: tuple[int, ...]) -> Figure | None:
    """Draw the posterior predictive p-value of each column and the replicates of each statistic."""
    if "predictive" not in parts:
        return None
    part = parts["predictive"]
    pixel_p, observed, replicated = (to_numpy(v, float) for v in (part.pixel_p, part.observed, part.replicated))
    names = list(STATISTICS) if len(STATISTICS) == len(observed) else [f"statistic {s}" for s in range(len(observed))]
    varying = [s for s in range(len(observed)) if np.ptp(np.append(replicated[:, s], observed[s])) > 0]
    figure = Figure(figsize=(8.6, 3.6), layout="constrained")
    left, right = np.asarray(figure.subfigures(1, 2, width_ratios=(1, 1.5))) if varying else (figure, None)
    _columns(left, pixel_p, shape)
    if varying:
        _statistics(right, {names[s]: (replicated[:, s], observed[s]) for s in varying})
    return figure


def _columns(figure: Any, p: np.ndarray, shape: tuple[int, ...]) -> None:
    axis = figure.subplots()
    if len(shape) == 2 and int(np.prod(shape)) == len(p):
        colours = LinearSegmentedColormap.from_list("p", [ORANGE, "#ffffff", BLUE])
        image = axis.imshow(p.reshape(style.image_shape(shape)), cmap=colours, vmin=0, vmax=1)
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(True)
        scale = figure.colorbar(image, ax=axis, location="bottom", shrink=0.9)
        scale.set_label("p-value of each pixel's mean\n0: the data's is larger, 1: it is smaller", fontsize=8)
        return
    marked = np.where((p < 0.025) | (p > 0.975), ORANGE, BLUE)
    axis.axhspan(0.025, 0.975, color=GREY, alpha=0.15, lw=0)
    axis.scatter(np.arange(len(p)), p, s=16, color=marked, clip_on=False, zorder=3)
    axis.axhline(0.5, color="black", lw=0.6)
    axis.set(xlabel="column, counted from 0", ylabel="p-value of the column's mean", ylim=(0, 1))
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))


def _statistics(figure: Any, values: dict[str, tuple[np.ndarray, float]]) -> None:
    """Draw a small histogram of each statistic over replicates, with a line at the data's."""
    axes = style.panel_grid(figure, len(values), min(len(values), 3))
    for axis, (name, (draws, data)) in zip(axes, values.items(), strict=True):
        axis.hist(draws, bins=20, color=GREY)
        axis.axvline(data, color=ORANGE, lw=1.8)
        axis.set_title(name, fontsize=8)
        style.plain_histogram(axis, 2)
        axis.margins(x=0.15)
    figure.supxlabel("units of the data; grey: replicates, line: the data", fontsize=8)
