"""Figures of a comparison, one function each: from results and draws to matplotlib figures."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas
import xarray as xr
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from pvae.reporting import style
from pvae.reporting.latent_map_widget import draw_latent_maps
from pvae.reporting.style import COLOURS, GREY, SMALL, STYLE
from pvae.reporting.tables import SPLITS

GUIDES = {"Amortized": COLOURS[0], "PerDatapoint": COLOURS[1], "SemiAmortized": COLOURS[2]}
OTHERS = (*COLOURS[3:6], *COLOURS[:3], COLOURS[6])


@rc_context(STYLE)
def draw_comparison(group: dict[str, Any], idata: xr.DataTree) -> dict[str, Figure]:
    """Return all figures that a group of ``results.json`` and its draws allow, by name."""
    shape, rows = tuple(group["data"]["shape"]), group["rows"]
    figures = {"curves": _curves(rows), "reconstructions": _reconstructions(idata, shape)}
    priors = _by_variant(idata["means"]["prior_x"])  # means of p(x|z) at draws from the prior
    figures |= {"prior": _side_by_side(priors, shape, style.grey_limits(*priors.values())), "maps": _maps(idata)}
    evaluated = [row for row in rows if "evidence" in row["test"]]
    if evaluated:
        figures["gaps"] = _gaps(evaluated)
    if "refinement" in group:
        figures["refinement"] = _refinement(group)
        figures["scatter"] = _scatter(idata, next(row["name"] for row in rows if row["guide"] == "Amortized"))
    return figures


def _colour(guide: str, position: int = 0) -> str:
    return GUIDES.get(guide, OTHERS[position % len(OTHERS)])


def _curves(rows: list[dict[str, Any]]) -> Figure:
    """Draw the training objective by epoch and by second."""
    figure, axes = style.subplots(2)
    for axis, key, label in zip(axes, ("epoch", "seconds"), ("epoch", "training time (s)"), strict=True):
        for position, row in enumerate(rows):
            history, colour = pandas.DataFrame(row["history"]), _colour(row["name"], position)
            axis.plot(history.get(key, []), history.get("objective", []), color=colour, label=row["name"])
            if "validation_elbo" in history:
                label = f"{row['name']}, validation"
                axis.plot(history[key], history["validation_elbo"], color=colour, ls=":", label=label)
        axis.set(xlabel=label, ylabel="training objective (nats per row)")
        if key == "epoch":
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        elif all(row["history"] for row in rows):
            axis.set_xscale("log")
            style.plain_ticks(axis.get_xlim(), axis.xaxis)
        if curves := [[entry["objective"] for entry in row["history"]] for row in rows if row["history"]]:
            axis.set_ylim(*_window(curves))
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 3), **SMALL)
    return figure


def _window(curves: list[list[float]]) -> tuple[float, float]:
    """Return limits that show where the curves end rather than where they begin."""
    top, bottom, ends = max(map(max, curves)), min(map(min, curves)), min(curve[-1] for curve in curves)
    low = max(bottom, ends - 4 * max(top - ends, 0.05 * abs(top)))
    return low, top + 0.05 * max(top - low, 0.01 * abs(top))


def _gaps(rows: list[dict[str, Any]]) -> Figure:
    """Draw approximation and amortization gap of each variant end to end, with errors, for both splits."""
    figure, axes = style.subplots(2, height=1.3 + 0.42 * len(rows))
    names = [row["name"] for row in rows]
    for axis, split in zip(axes, ("train", "test"), strict=True):
        left, reach = np.zeros(len(rows)), np.zeros(len(rows))
        for gap, colour in (("approximation_gap", GREY), ("amortization_gap", None)):
            mean, se = (np.array([row[split][gap][key] for row in rows], dtype=float) for key in ("mean", "se"))
            colours = [colour or _colour(name, i) for i, name in enumerate(names)]
            axis.barh(names, mean, left=left, color=colours, height=0.6)
            axis.errorbar(left + mean, names, xerr=2 * se, fmt="none", ecolor="black", capsize=3, lw=1)
            for place, value in enumerate(mean):
                if value > 0.12 * max(left + mean):
                    axis.text(left[place], place, f" {value:.2f}", color="white", fontsize=8, ha="left", va="center")
            left, reach = left + mean, np.fmax(reach, left + mean + 2 * np.nan_to_num(se))
        axis.set(title=SPLITS[split], xlabel="inference gap: evidence - ELBO (nats per row)")
        axis.set_xlim(min(0, 1.15 * float(np.min(left))), 1.05 * max(float(np.max(reach)), 1e-3))
        axis.invert_yaxis()
    axes[1].set_yticklabels([])
    legend = {"grey: approximation gap; bars: 2 standard errors": GREY, "coloured: amortization gap": COLOURS[0]}
    handles = [Patch(color=colour, label=label) for label, colour in legend.items()]
    figure.legend(handles=handles, loc="outside lower center", **SMALL)
    return figure


def _refinement(group: dict[str, Any]) -> Figure:
    """Draw the test ELBO gained by refinement steps, and the gap that each inference method leaves against its time."""
    curve, same = group["refinement"], group["same_decoder"]
    figure, (axis, price) = style.subplots(2)
    mean, se = (np.array([point[key] for point in curve["gain"]], dtype=float) for key in ("mean", "se"))
    ticks = np.arange(len(curve["steps"]))
    axis.errorbar(ticks, mean, yerr=2 * se, color=_colour("Amortized"), marker="o", ms=4, capsize=3)
    best = same["best_elbo"]["mean"] - curve["elbo"][0]["mean"]
    axis.axhline(best, color=GREY, ls="--", lw=1)
    axis.text(0, best, "best ELBO in family", va="bottom", fontsize=8, color="#555555")
    axis.set_xticks(ticks, [str(s) for s in curve["steps"]])
    axis.set(xlabel="refinement steps from the encoder's output", ylabel="test ELBO gained (nats per row)")
    axis.margins(y=0.12)
    for position, row in enumerate(same["rows"]):
        gap, look = row["left"], {"color": _colour(row["guide"], position), "label": row["guide"], "marker": "o"}
        price.errorbar(row["seconds_per_row"] * 1e3, gap["mean"], 2 * (gap["se"] or 0), capsize=3, ls="none", **look)
    price.set(xscale="log", xlabel="time of inference (ms per row, in a batch)")
    price.set_ylabel("amortization gap (nats per row)")
    price.legend(**SMALL)
    price.axhline(0, color=GREY, lw=0.8)
    price.margins(x=0.25)
    return figure


def _scatter(idata: xr.DataTree, amortized: str) -> Figure:
    """Draw each test row's ELBO by the encoder against its best one, and the distribution of the gap over rows."""
    values = idata["test"].to_dataset().sel(variant=amortized)
    figure, (axis, spread) = style.subplots(2)
    elbo, best = values["elbo"].to_numpy(), values["best_elbo"].to_numpy()
    limits = [min(elbo.min(), best.min()), max(elbo.max(), best.max())]
    axis.plot(limits, limits, color=GREY, lw=1)
    axis.scatter(elbo, best, s=7, alpha=0.5, color=_colour("Amortized"), linewidths=0)
    axis.set(xlabel="amortized ELBO (nats)", ylabel="best ELBO in family (nats)")
    spread.hist(best - elbo, bins=40, color=_colour("Amortized"))
    spread.set(xlabel="amortization gap (nats)", ylabel="test rows")
    return figure


def _reconstructions(idata: xr.DataTree, shape: tuple[int, ...], count: int = 20) -> Figure:
    """Draw test rows, and below them each variant's reconstruction."""
    originals = idata["observed_data"]["x"].to_numpy()[:count, : int(np.prod(shape))]  # a label comes last
    lines = {"original": originals} | {name: rows[:count] for name, rows in _by_variant(idata["means"]["x"]).items()}
    height, width = style.image_shape(shape)
    limits = style.grey_limits(originals)
    if height == 1:
        return _side_by_side(lines, shape, limits)
    tall = len(lines) * (0.1 + 7.4 * height / (count * width))
    figure = Figure(figsize=(8.6, 0.35 + tall), layout="constrained")
    for axis, (name, images) in zip(figure.subplots(len(lines), 1), lines.items(), strict=True):
        style.image_grid(axis, images, shape, count, limits)
        axis.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
    return figure


def _by_variant(means: Any) -> dict[str, np.ndarray]:
    return {str(name): means.sel(variant=name).to_numpy() for name in means.variant.to_numpy()}


def _side_by_side(panels: dict[str, np.ndarray], shape: tuple[int, ...], limits: tuple[float, float]) -> Figure:
    """Draw a panel of images under each name; rows that are no images as strips, one above the other."""
    height, width = style.image_shape(shape)
    per_line = (8 if len(panels) > 1 else 16) if height > 1 else 1
    lines = max(-(-len(images) // per_line) for images in panels.values())
    tall = 8.4 / len(panels) * lines * height / (per_line * width)
    figure = Figure(figsize=(8.6, 0.4 + min(max(tall, 1.0), 6.0)), layout="constrained")
    for axis, (name, images) in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels.items(), strict=True):
        style.image_grid(axis, images, shape, per_line, limits)
        axis.set_title(name)
    return figure


def _maps(idata: xr.DataTree) -> Figure:
    """Draw codes of the test rows over draws of the prior, for the first variants, coloured by label if known."""
    names = [str(name) for name in idata["posterior"].variant.to_numpy()[:4]]
    maps = {name: (_latents(idata, "posterior", name), _latents(idata, "prior", name)) for name in names}
    labelled = "constant_data" in idata and "label" in idata["constant_data"]
    labels = idata["constant_data"]["label"].to_numpy() if labelled else None
    return draw_latent_maps(maps, labels)


def _latents(idata: xr.DataTree, group: str, name: str) -> np.ndarray:
    """Return a variant's latents concatenated, [B, D]: means for each row, or draws; without those it lacks (NaN)."""
    draws = idata[group].to_dataset().sel(variant=name).isel(chain=0)
    draws = draws.mean("draw") if "row" in draws.dims else draws
    latents = np.concatenate([values.to_numpy().reshape(len(values), -1) for values in draws.data_vars.values()], 1)
    return latents[:, ~np.isnan(latents).all(0)]
