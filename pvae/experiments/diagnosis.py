"""Diagnosis of a run: each variant's posterior diagnosed on test rows, written to ``diagnosis.json``."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor

from pvae.diagnostics.battery import DiagnosisBudget, join_parts
from pvae.diagnostics.diagnosis import diagnose, estimate_seconds
from pvae.errors import UserError, nearest, param
from pvae.experiments.compare import RunOptions
from pvae.experiments.run import TrainedVariant
from pvae.experiments.run_folder import CACHE_DIRS, cache_folder, fingerprint
from pvae.runtime.files import read_json, write_json
from pvae.runtime.progress import progress_bar
from pvae.runtime.result_cache import ResultCache, load_all
from pvae.runtime.torch_state import pick_device
from pvae.stats import Estimate

FILE, SCHEMA = "diagnosis.json", 1
FOLDER = CACHE_DIRS[1]
FIELDS = {"name", "plan", "fitted", "parts", "seconds", "figures", "refined", "verdicts"}


def diagnose_run(
    variants: Sequence[TrainedVariant],
    results: Mapping[str, Any],
    options: RunOptions,
    budget: DiagnosisBudget,
    only: Sequence[str] = (),
) -> dict[str, Any]:
    """Diagnose the first seed of variants on test rows and write ``diagnosis.json``; finished tasks are cached.

    Arguments:
        results: of the evaluation, as in ``results.json``.
        options: where and how; rows and budget there are the evaluation's and not used.
        only: names of variants; all unless given.

    See also: `pvae.diagnose`, for one model and guide.
    """
    wanted = select_variants(variants, only)
    others: list[dict[str, Any]] = []
    with suppress(UserError):
        before = load_diagnosis(options.folder).get("variants", []) if only else []
        others += [variant for variant in before if variant["name"] not in only]
    rows = {row["name"]: row for group in results["groups"] for row in group["rows"]}
    diagnoses = []
    for variant in wanted:
        fitted, x = variant.fits[0], variant.data.test[: budget.rows].to(pick_device(options.device))
        if variant is wanted[0]:
            options.say(_announce(estimate_seconds(fitted.model, fitted.guide, x, budget), budget, len(wanted)))
        diagnoses.append(_diagnose(variant, x, budget, dict(_bounds_and_gaps(rows[variant.name])), options))
    contents = {"schema": SCHEMA, "variants": diagnoses + others}
    write_json(options.folder / FILE, contents)
    return contents


def load_diagnosis(folder: Path) -> dict[str, Any]:
    """Read what `diagnose_run` has written; an empty mapping without it."""
    path = folder / FILE
    if not path.is_file():
        return {}
    contents = read_json(path, f"pvae diagnose {folder} writes it")
    with suppress(KeyError, TypeError, AttributeError):
        if contents["schema"] == SCHEMA and all(variant.keys() >= FIELDS for variant in contents["variants"]):
            return contents
    raise UserError(f"{path} is broken or of another version; pvae diagnose {folder} writes it anew")


def load_parts(folder: Path, variant: Mapping[str, Any]) -> dict[str, Any]:
    """Read the arrays behind a variant's figures, by part; parts that are not cached are left out."""
    return join_parts(load_all(cache_folder(folder, FOLDER, variant["name"]), variant["parts"]))


def select_variants(variants: Sequence[TrainedVariant], only: Sequence[str]) -> list[TrainedVariant]:
    """Return the variants of these names, all of them if none is given."""
    known = {variant.name: variant for variant in variants}
    for name in only:
        if name not in known:
            raise UserError(f"{param('only', name)}: the run has no such variant{nearest(name, known)}")
    return [known[name] for name in only] or list(variants)


def _announce(seconds: float, budget: DiagnosisBudget, variants: int) -> str:
    """Write what a diagnosis is going to cost."""
    millions, minutes = sum(budget.passes().values()) / 1e6, seconds / 60
    wait = "less than a minute" if minutes < 1 else f"about {minutes:.0f} min"
    each = f" for each of {variants} variants" if variants > 1 else ""
    return f"diagnosis: {millions:.2g} million rows through the decoder, {wait}{each}"


def _diagnose(
    variant: TrainedVariant, x: Tensor, budget: DiagnosisBudget, evaluation: Mapping[str, Estimate], options: RunOptions
) -> dict[str, Any]:
    """Diagnose a variant's first seed, with a progress bar; returns its entry of ``diagnosis.json``."""
    start, fitted, name = time.perf_counter(), variant.fits[0], variant.name
    stored = {"plan": asdict(budget), "fitted": fingerprint(fitted)}
    seed = fitted.recipe.seed
    key = stored | {"rows": variant.data.digest, "seed": seed, "version": version("pvae-pyro")}
    cache = ResultCache(cache_folder(options.folder, FOLDER, name), key)
    with progress_bar("%", 100, wanted=options.progress) as show:
        diagnosis = diagnose(
            fitted.model,
            fitted.guide,
            x,
            budget=budget,
            labels=variant.data.test_labels,
            seed=seed,
            progress=lambda share, task: show(int(100 * share), f"{name}: {task}" if task else name),
            cache=cache,
            evaluation=evaluation,
        )
    tables = {part: {k: v._asdict() for k, v in getattr(diagnosis, part).items()} for part in ("figures", "refined")}
    verdicts = [verdict._asdict() | {"advice": verdict.advice} for verdict in diagnosis.verdicts.values()]
    seconds = time.perf_counter() - start
    return {"name": name, **stored, "parts": cache.key, "seconds": seconds, **tables, "verdicts": verdicts}


def _bounds_and_gaps(row: Mapping[str, Any]) -> Iterator[tuple[str, Estimate]]:
    """Bounds and gaps of a row of ``results.json``, of the first seed as the diagnosis is."""
    gaps = ("inference_gap", "approximation_gap", "amortization_gap", "optimization_gap")
    for name in ("elbo", "ais", "evidence", "evidence_reliable", *gaps):
        if name in row["test"]:
            value = row["test"][name]
            mean, se = (value["by_seed"][0], None) if "by_seed" in value else (value["mean"], value["se"])
            yield name, Estimate(*(math.nan if number is None else number for number in (mean, se)))
