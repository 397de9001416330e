"""The page: results and pictures in one self-contained HTML file."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pvae.applications.latent_map import LatentMap, Sliders
from pvae.diagnostics.trust import USES
from pvae.errors import UserError
from pvae.experiments import arviz_export, diagnosis, use_results
from pvae.reporting.comparison_figures import draw_comparison
from pvae.reporting.diagnosis_figures import CAPTIONS, draw_diagnosis
from pvae.reporting.latent_map_widget import render_widget
from pvae.reporting.tables import comparison_tables, diagnosis_tables
from pvae.runtime.files import read_json, write_text

FILE = "report.html"


def write_report(folder: Path) -> Path:
    """Write ``report.html`` of an evaluated run folder and return its path.

    Raises:
        UserError: the folder has no results, or they are broken or of another version.
    """
    results = read_json(folder / "results.json", f"pvae evaluate {folder} writes it")
    if not isinstance(results, dict) or results.get("schema") != 2:
        raise UserError(f"{folder / 'results.json'} is of another version; pvae evaluate {folder} writes it anew")
    try:
        groups = results["groups"]
        pictures = [draw_comparison(group, arviz_export.load_idata(folder, n)) for n, group in enumerate(groups, 1)]
        fitted = {mark for group in groups for row in group["rows"] for mark in row.get("fitted", [])}
        kept = [use | {"blocks": _blocks(use)} for use in use_results.load_from_run(folder, fitted)]
        page = render(results, pictures, [_diagnoses(folder, group) for group in groups], kept)
    except (KeyError, IndexError, TypeError) as error:
        path = folder / "results.json"
        raise UserError(
            f"{path} lacks {error} or does not go with {arviz_export.FILE}; pvae evaluate writes both"
        ) from error
    write_text(folder / FILE, page)
    return folder / FILE


def _diagnoses(folder: Path, group: dict[str, Any]) -> list[dict[str, Any]]:
    """The diagnosis of each variant of a group, with its panels; one of an earlier fit is left out."""
    rows, shape = {row["name"]: row for row in group["rows"]}, tuple(group["data"]["shape"])
    found = []
    for own in diagnosis.load_diagnosis(folder).get("variants", []):
        row = rows.get(own["name"], {})
        if own["fitted"] in row.get("fitted", []):
            parts = diagnosis.parts(folder, own) | {"gaps": _gaps(row["test"])}
            found.append(own | {"tables": diagnosis_tables(own), "panels": draw_diagnosis(parts, shape)})
    return found


def _gaps(test: dict[str, Any]) -> dict[str, tuple[float, float, float]]:
    """Mean and interval of each gap of a variant's test rows, and of what other families would win, in words."""
    gaps = {f"{cause}_gap": f"{cause} gap" for cause in ("inference", "approximation", "amortization")}
    gains = {name: f"{name[12:-1]} would win" for name in test if name.startswith("family_gain[")}
    there = {name: words for name, words in (gaps | gains).items() if "interval" in test.get(name, {})}
    return {words: (test[name]["mean"], *test[name]["interval"]) for name, words in there.items()}


def _blocks(use: dict[str, Any]) -> list[Any]:
    """Of a latent map what one can move in: the plane, and sliders where there are more than two dimensions."""
    if use["verb"] != "map" or not use["arrays"].is_file():
        return []
    with np.load(use["arrays"], allow_pickle=False) as archive:
        known, shape = {name: archive[name] for name in archive.files}, tuple(use["shape"])
    tensors = {name: torch.from_numpy(values) for name, values in known.items() if name != "how"}
    fields = {field.name: tensors.get(field.name) for field in dataclasses.fields(LatentMap)}
    found: Any = LatentMap(**fields | {"how": str(known["how"])})  # type: ignore[arg-type]
    sliding = {name.removeprefix("slider_"): values for name, values in tensors.items() if name.startswith("slider_")}
    moved: list[Any] = [render_widget(Sliders(**sliding), None, shape)] if sliding else []
    return [render_widget(found, known.get("label"), shape), *moved]


def render(
    results: dict[str, Any],
    pictures: list[dict[str, str]],
    diagnoses: list[list[dict[str, Any]]] | None = None,
    uses: Sequence[dict[str, Any]] = (),
) -> str:
    """The page's HTML, with each group's pictures; everything that comes from data, flags or files is escaped."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("pvae.reporting", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    template = environment.get_template("report.html.jinja")
    told = [comparison_tables(group) for group in results["groups"]]
    return template.render(
        results=results,
        groups=list(zip(results["groups"], told, pictures, strict=True)),
        diagnosed=diagnoses or [[] for _ in told],
        captions=CAPTIONS,
        trusted=USES,
        uses=uses,
    )
