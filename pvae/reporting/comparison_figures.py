"""Figures of the page: arrays to pictures as data addresses, one function each."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from pvae.reporting.latent_map_widget import draw_latent_maps
from pvae.reporting.style import COLOURS, STYLE, data_uri, grey_limits, image_grid, image_shape, subplots

GUIDES = {"Amortized": COLOURS[0], "PerDatapoint": COLOURS[1], "SemiAmortized": COLOURS[2]}
# Maps that stand side by side.
MAPS = 4
OTHERS = (*COLOURS[3:6], *COLOURS[:3], COLOURS[6])


def draw_comparison(group: dict[str, Any], idata: xr.DataTree) -> dict[str, str]:
    """All figures that the results of a group allow, by name, as addresses for an image's ``src``."""
    import matplotlib

    shape, rows = tuple(group["data"]["shape"]), group["rows"]
    with matplotlib.rc_context(STYLE):
        found = {"curves": _curves(rows), "pictures": _pictures(idata, shape), "prior": _prior(idata, shape)}
        found["maps"] = _maps(idata)
        if any("evidence" in row["test"] for row in rows):
            found["gaps"] = _gaps(rows)
        if "refinement" in group:
            found["refinement"] = _refinement(group)
            found["scatter"] = _scatter(idata, next(row["name"] for row in rows if row["guide"] == "Amortized"))
    return found


def _colour(guide: str, position: int = 0) -> str:
    return GUIDES.get(guide, OTHERS[position % len(OTHERS)])


def _curves(rows: list[dict[str, Any]]) -> str:
    """Training objective by epoch and by second."""
    figure, axes = subplots(2)
    last = [row["history"][-1]["objective"] for row in rows if row["history"]]
    for axis, key, label in zip(axes, ("epoch", "seconds"), ("epoch", "training time (s)"), strict=True):
        for position, row in enumerate(rows):
            steps, colour = [entry[key] for entry in row["history"]], _colour(row["name"], position)
            axis.plot(steps, [e["objective"] for e in row["history"]], color=colour, label=row["name"])
            if row["history"] and "validation_elbo" in row["history"][0]:
                validation = [e["validation_elbo"] for e in row["history"]]
                axis.plot(steps, validation, color=colour, ls=":", label=f"{row['name']}, validation")
        axis.set(xlabel=label, ylabel="training objective (nats per row)")
        if key == "epoch":
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        if key == "seconds" and all(row["history"] for row in rows):
            axis.set_xscale("log")
            axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.xaxis.set_major_formatter("{x:g}")
            axis.xaxis.set_minor_formatter(NullFormatter())
        if last:
            axis.set_ylim(*_window(rows))
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, loc="outside lower center", ncols=min(len(labels), 3), fontsize=8)
    return data_uri(figure, "svg")


def _window(rows: list[dict[str, Any]]) -> tuple[float, float]:
    """Limits that show where the curves end rather than where they begin."""
    values = np.concatenate([[e["objective"] for e in row["history"]] for row in rows if row["history"]])
    top = values.max()
    ends = min(row["history"][-1]["objective"] for row in rows if row["history"])
    low = max(values.min(), ends - 4 * max(top - ends, 0.05 * abs(top)))
    return low, top + 0.05 * max(top - low, 0.01 * abs(top))


def _gaps(rows: list[dict[str, Any]]) -> str:
    """Approximation and amortization gap of each variant, end to end, with errors; train and test."""
    rows = [row for row in rows if "evidence" in row["test"]]
    figure, axes = subplots(2, height=1.3 + 0.42 * len(rows))
    names = [row["name"] for row in rows]
    for axis, split in zip(axes, ("train", "test"), strict=True):
        left = np.zeros(len(rows))
        for gap, colour in (("approximation_gap", "#999999"), ("amortization_gap", None)):
            mean, se = (np.array([row[split][gap][key] for row in rows], dtype=float) for key in ("mean", "se"))
            colours = [colour or _colour(name, i) for i, name in enumerate(names)]
            bars = axis.barh(names, mean, left=left, color=colours, height=0.6)
            axis.errorbar(left + mean, names, xerr=2 * se, fmt="none", ecolor="black", capsize=3, lw=1)
            written = [f"{value:.2f}" if abs(value) > 0.08 * max(left + mean) else "" for value in mean]
            axis.bar_label(bars, written, label_type="center", color="white", fontsize=8)
            left = left + mean
        axis.set_title({"train": "training rows", "test": "test rows"}[split], fontsize=9)
        axis.set_xlabel("evidence - ELBO (nats per row)")
        axis.set_xlim(min(0, 1.15 * float(np.min(left))), 1.15 * max(float(np.max(left)), 1e-3))
        axis.invert_yaxis()
    axes[1].set_yticklabels([])
    figure.legend(handles=_gap_handles(), loc="outside lower center", ncols=1, frameon=False, fontsize=8)
    return data_uri(figure, "svg")


def _gap_handles() -> list[Any]:
    from matplotlib.patches import Patch

    coloured = "coloured: amortization gap (for PerDatapoint: its rows' optimization gap)"
    return [
        Patch(color="#999999", label="grey: approximation gap (family); bars: 2 standard errors"),
        Patch(color="#0072B2", label=coloured),
    ]


def _refinement(group: dict[str, Any]) -> str:
    """What refinement steps buy: test ELBO against steps, with the family's best and the evidence as lines."""
    curve, same = group["refinement"], group["same_decoder"]
    figure, (axis, price) = subplots(2)
    mean, se = (np.array([point[key] for point in curve["gain"]], dtype=float) for key in ("mean", "se"))
    ticks = np.arange(len(curve["steps"]))
    axis.errorbar(ticks, mean, yerr=2 * se, color=_colour("Amortized"), marker="o", ms=4, capsize=3)
    best = same["best_elbo"]["mean"] - curve["elbo"][0]["mean"]
    axis.axhline(best, color="#999999", ls="--", lw=1)
    axis.text(0, best, "best q_params of the family", va="bottom", fontsize=8, color="#555555")
    axis.set_xticks(ticks, [str(s) for s in curve["steps"]])
    axis.set(xlabel="refinement steps from the encoder's q_params", ylabel="test ELBO won (nats per row)")
    axis.margins(y=0.12)
    for position, row in enumerate(same["rows"]):
        seconds, left = row["seconds_per_row"] * 1e3, row["left"]
        price.errorbar(
            seconds,
            left["mean"],
            yerr=2 * (left["se"] or 0),
            marker="o",
            color=_colour(row["guide"], position),
            capsize=3,
            ls="none",
            label=row["guide"],
        )
    price.set_xscale("log")
    price.set(xlabel="time to find q_params (ms per row, in a batch)", ylabel="below the family's best (nats per row)")
    price.legend(frameon=False, fontsize=8)
    price.axhline(0, color="#999999", lw=0.8)
    price.margins(x=0.25)
    return data_uri(figure, "svg")


def _scatter(idata: xr.DataTree, amortized: str) -> str:
    """Each test row's ELBO by the encoder against its best one, and how the loss is spread over rows."""
    values = idata["test"].to_dataset().sel(variant=amortized)
    figure, (axis, spread) = subplots(2)
    elbo, best = values["elbo"].to_numpy(), values["best_elbo"].to_numpy()
    limits = [min(elbo.min(), best.min()), max(elbo.max(), best.max())]
    axis.plot(limits, limits, color="#999999", lw=1)
    axis.scatter(elbo, best, s=7, alpha=0.5, color=_colour("Amortized"), linewidths=0)
    axis.set(xlabel="amortized ELBO (nats)", ylabel="refined ELBO (nats)")
    spread.hist(best - elbo, bins=40, color=_colour("Amortized"))
    spread.set(xlabel="amortization gap (nats)", ylabel="test rows")
    return data_uri(figure, "svg")


def _pictures(idata: xr.DataTree, shape: tuple[int, ...], count: int = 20) -> str:
    """Originals, and below them each variant's reconstruction."""
    originals = idata["observed_data"]["x"].to_numpy()[:count, : int(np.prod(shape))]  # a label comes last
    found = idata["means"]["x"]
    lines = [
        ("original", originals),
        *((str(v), found.sel(variant=v).to_numpy()[:count]) for v in found.variant.to_numpy()),
    ]
    height, width = image_shape(shape)
    ends = grey_limits(originals)
    if height == 1:
        return _side_by_side(dict(lines), shape, ends)
    tall = len(lines) * (0.1 + 7.4 * height / (count * width))
    figure = Figure(figsize=(8.6, 0.35 + tall), layout="constrained")
    for axis, (name, images) in zip(figure.subplots(len(lines), 1), lines, strict=True):
        image_grid(axis, images, shape, count, ends)
        axis.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
    return data_uri(figure, "png")


def _prior(idata: xr.DataTree, shape: tuple[int, ...]) -> str:
    """Means of x at draws from the prior, for each variant."""
    found = idata["means"]["prior_x"]
    panels = {str(v): found.sel(variant=v).to_numpy() for v in found.variant.to_numpy()}
    return _side_by_side(panels, shape, grey_limits(*panels.values()))


def _side_by_side(panels: dict[str, np.ndarray], shape: tuple[int, ...], ends: tuple[float, float]) -> str:
    """A panel of pictures under each name; rows that are no images stand as strips, one above the other."""
    height, width = image_shape(shape)
    per_line = (8 if len(panels) > 1 else 16) if height > 1 else 1
    lines = max(-(-len(images) // per_line) for images in panels.values())
    tall = 8.4 / len(panels) * lines * height / (per_line * width)
    figure = Figure(figsize=(8.6, 0.4 + min(max(tall, 1.0), 6.0)), layout="constrained")
    for axis, (name, images) in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels.items(), strict=True):
        image_grid(axis, images, shape, per_line, ends)
        axis.set_title(name, fontsize=9)
    return data_uri(figure, "png")


def _maps(idata: xr.DataTree) -> str:
    """Codes of the test rows over draws of the prior, for the first variants, coloured by label where there are any."""
    names = [str(name) for name in idata["posterior"].variant.to_numpy()[:MAPS]]
    maps = {name: (_latents(idata, "posterior", name), _latents(idata, "prior", name)) for name in names}
    labelled = "constant_data" in idata and "label" in idata["constant_data"]
    labels = idata["constant_data"]["label"].to_numpy() if labelled else None
    return data_uri(draw_latent_maps(maps, labels), "png")


def _latents(idata: xr.DataTree, group: str, name: str) -> np.ndarray:
    """A variant's latents end to end, without those that others alone have: means for each row, or draws."""
    own = idata[group].to_dataset().sel(variant=name).isel(chain=0)
    own = own.mean("draw") if "row" in own.dims else own
    columns = [values.to_numpy().reshape(len(values), -1) for values in own.data_vars.values()]
    whole = np.concatenate(columns, 1)
    return whole[:, ~np.isnan(whole).all(0)]
