"""The page: results, diagnoses and uses of a run, with figures, in one self-contained HTML file."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pvae.applications.latent_map import LatentMap, Sliders
from pvae.diagnostics.quantities import QUANTITIES, Quantity, describe
from pvae.diagnostics.trust import USES
from pvae.errors import UserError
from pvae.experiments import arviz_export, diagnosis, use_results
from pvae.reporting.comparison_figures import draw_comparison
from pvae.reporting.diagnosis_figures import draw_diagnosis
from pvae.reporting.latent_map_widget import render_widget
from pvae.reporting.rendering import render_template
from pvae.reporting.style import data_uri, encode_uri
from pvae.reporting.tables import comparison_tables, diagnosis_tables
from pvae.runtime.files import read_json, write_text

FILE = "report.html"
OLD = {"across": "grid_x", "up": "grid_y"}  # names of latent maps' arrays in version 0.1


def write_report(folder: str | Path, results: dict[str, Any] | None = None) -> Path:
    """Write ``report.html`` of an evaluated run folder and return its path.

    Arguments:
        folder: of the run.
        results: what its ``results.json`` holds, read from there unless given.

    Raises:
        UserError: the folder has no results, or they are broken or of another version.
    """
    folder = Path(folder)
    results = read_results(folder) if results is None else results
    try:
        groups = results["groups"]
        figures = [draw_comparison(group, arviz_export.load_idata(folder, n)) for n, group in enumerate(groups, 1)]
        fitted = {mark for group in groups for row in group["rows"] for mark in row.get("fitted", [])}
        uses = [use | {"blocks": _blocks(use)} for use in use_results.load_from_run(folder, fitted)]
        for use in uses:
            use["picture"] = use["picture"] and encode_uri(use["picture"].read_bytes())
        page = render(results, figures, [_diagnoses(folder, group) for group in groups], uses)
    except (KeyError, IndexError, TypeError) as error:
        message = f"{folder / 'results.json'} lacks {error} or does not go with {arviz_export.FILE}"
        raise UserError(f"{message}; pvae evaluate writes both") from error
    write_text(folder / FILE, page)
    return folder / FILE


def read_results(folder: Path) -> dict[str, Any]:
    """Read ``results.json`` of an evaluated run folder; refuse one that is missing, broken or of another version."""
    results = read_json(folder / "results.json", f"pvae evaluate {folder} writes it")
    if not isinstance(results, dict) or results.get("schema") != 2:
        raise UserError(f"{folder / 'results.json'} is of another version; pvae evaluate {folder} writes it anew")
    return results


def _diagnoses(folder: Path, group: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the diagnosis of each variant of a group, with its figures; those of earlier fits are left out."""
    rows, shape = {row["name"]: row for row in group["rows"]}, tuple(group["data"]["shape"])
    diagnoses = []
    for one in diagnosis.load_diagnosis(folder).get("variants", []):
        row = rows.get(one["name"], {})
        if one["fitted"] in row.get("fitted", []):
            parts = diagnosis.load_parts(folder, one) | {"gaps": _gaps(row["test"])}
            panels = {name: data_uri(figure) for name, figure in draw_diagnosis(parts, shape).items()}
            diagnoses.append(one | {"tables": diagnosis_tables(one), "panels": panels})
    return diagnoses


def _gaps(test: dict[str, Any]) -> dict[str, tuple[float, float, float]]:
    """Return mean and interval of each gap and family gain of a variant's test rows, by its label."""
    gaps = ["inference_gap", "approximation_gap", "amortization_gap"]
    keys = [*gaps, *(key for key in test if key.startswith("family_gain["))]
    known = {describe(key).label: test[key] for key in keys if "interval" in test.get(key, {})}
    return {label: (gap["mean"], *gap["interval"]) for label, gap in known.items()}


def _blocks(use: dict[str, Any]) -> list[Any]:
    """Return the interactive pieces of a latent map: the plane, and sliders if there are more than two dimensions."""
    if use["verb"] != "map" or not use["arrays"].is_file():
        return []
    with np.load(use["arrays"], allow_pickle=False) as archive:
        arrays, shape = {OLD.get(name, name): archive[name] for name in archive.files}, tuple(use["shape"])
    tensors = {name: torch.from_numpy(values) for name, values in arrays.items() if name != "how"}
    fields: Any = {field.name: tensors.get(field.name) for field in dataclasses.fields(LatentMap)}
    plane = LatentMap(**fields | {"how": str(arrays["how"])})
    sliding = {name.removeprefix("slider_"): values for name, values in tensors.items() if name.startswith("slider_")}
    sliders = [render_widget(Sliders(**sliding), None, shape)] if sliding else []
    return [render_widget(plane, arrays.get("label"), shape), *sliders]


def render(
    results: dict[str, Any],
    figures: Sequence[Mapping[str, Any]],
    diagnoses: Sequence[list[dict[str, Any]]] | None = None,
    uses: Sequence[dict[str, Any]] = (),
) -> str:
    """Return the page's HTML, with each group's figures; everything from data, options or files is escaped."""
    diagnosed = diagnoses or [[] for _ in results["groups"]]
    tables = [comparison_tables(group) for group in results["groups"]]
    encoded = [{name: data_uri(figure) for name, figure in drawn.items()} for drawn in figures]
    groups = list(zip(results["groups"], tables, encoded, diagnosed, strict=True))
    texts = {"trusted": USES, "glossary": _glossary(results, diagnosed)}
    return str(render_template("report.html.jinja", results=results, groups=groups, uses=uses, **texts))


def _glossary(results: dict[str, Any], diagnoses: Sequence[list[dict[str, Any]]]) -> list[Quantity]:
    """Return the quantities that the page shows, in the order of their table."""
    rows = [row for group in results["groups"] for row in group["rows"]]
    shown = {key for row in rows for key in row["test"] | row.get("latent_space", {})}
    shown |= {key for group in diagnoses for one in group for key in one["figures"]}
    return [quantity for key, quantity in QUANTITIES.items() if key in {name.partition("[")[0] for name in shown}]
