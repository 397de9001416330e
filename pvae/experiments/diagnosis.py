"""The diagnosis of a run: how far each posterior is from the truth, why, for which rows, and what to make of it."""

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
from pvae.diagnostics.diagnosis import Diagnosis, diagnose, estimate_seconds
from pvae.errors import UserError, nearest
from pvae.experiments import run_folder
from pvae.experiments.compare import RunOptions, TrainedVariant
from pvae.runtime.files import read_json, write_json
from pvae.runtime.progress import progress_bar
from pvae.runtime.result_cache import ResultCache, load_all
from pvae.runtime.torch_state import pick_device
from pvae.stats import Estimate

FILE, SCHEMA = "diagnosis.json", 1
FOLDER = run_folder.CACHE_DIRS[1]
FIELDS = {"name", "plan", "fitted", "parts", "seconds", "figures", "refined", "verdicts"}


def diagnose_run(
    entries: Sequence[TrainedVariant],
    results: Mapping[str, Any],
    job: RunOptions,
    plan: DiagnosisBudget,
    only: Sequence[str] = (),
) -> dict[str, Any]:
    """Diagnose fitted variants on test rows and write ``diagnosis.json``; finished parts are kept and not made again.

    Arguments:
        entries: the variants, see `load_diagnosis`; of several seeds the first is looked at.
        results: what evaluation found of them, as in ``results.json``.
        job: where and how; its rows and budget are evaluation's and not used here.
        plan: how closely to look.
        only: names of variants; all unless given.

    Raises:
        UserError: an unknown name, or HMC diverges everywhere.
    """
    wanted = select_variants(entries, only)
    kept = [own for own in _readable(job.folder) if only and own["name"] not in only]
    rows = {row["name"]: row for group in results["groups"] for row in group["rows"]}
    variants = []
    for entry in wanted:
        variant, x = entry.variants[0], entry.data.test[: plan.rows].to(pick_device(job.device))
        if entry is wanted[0]:
            job.say(_price(estimate_seconds(variant.model, variant.guide, x, plan), plan, len(wanted)))
        start, cache = time.perf_counter(), _cache(entry, job, plan)
        diagnosis = _diagnose(entry, x, plan, cache, dict(_of_evaluation(rows[entry.name])), job)
        variants.append(
            {
                "name": entry.name,
                "plan": asdict(plan),
                "fitted": run_folder.fingerprint(variant),
                "parts": cache.key,
                "seconds": time.perf_counter() - start,
                "figures": {name: value._asdict() for name, value in diagnosis.figures.items()},
                "refined": {name: value._asdict() for name, value in diagnosis.refined.items()},
                "verdicts": [verdict._asdict() for verdict in diagnosis.verdicts.values()],
            }
        )
    whole = {"schema": SCHEMA, "variants": variants + kept}
    write_json(job.folder / FILE, whole)
    return whole


def load_diagnosis(folder: Path) -> dict[str, Any]:
    """What ``diagnose_run`` has written, or an empty mapping where it has not.

    Raises:
        UserError: it is broken or of another version.
    """
    path = folder / FILE
    if not path.is_file():
        return {}
    found = read_json(path, f"pvae diagnose {folder} writes it")
    try:
        if found["schema"] == SCHEMA and all(own.keys() >= FIELDS for own in found["variants"]):
            return found
    except (KeyError, TypeError, AttributeError):
        pass
    raise UserError(f"{path} is broken or of another version; pvae diagnose {folder} writes it anew")


def _readable(folder: Path) -> list[dict[str, Any]]:
    with suppress(UserError):
        return list(load_diagnosis(folder).get("variants", []))
    return []


def parts(folder: Path, variant: Mapping[str, Any]) -> dict[str, Any]:
    """The arrays behind a variant's figures, by part; what is not there is left out."""
    return join_parts(load_all(folder / FOLDER / run_folder.folder_name(variant["name"]), variant["parts"]))


def select_variants(entries: Sequence[TrainedVariant], only: Sequence[str]) -> list[TrainedVariant]:
    """The variants of these names, all of them where none is given.

    Raises:
        UserError: the run has none of such a name.
    """
    known = {entry.name: entry for entry in entries}
    for name in only:
        if name not in known:
            raise UserError(f"--only {name}: the run has no such variant{nearest(name, known)}")
    return [known[name] for name in only] or list(entries)


def _cache(entry: TrainedVariant, job: RunOptions, plan: DiagnosisBudget) -> ResultCache:
    variant = entry.variants[0]
    key = {
        "fitted": run_folder.fingerprint(variant),
        "rows": entry.data.digest,
        "plan": asdict(plan),
        "seed": variant.recipe.seed,
        "version": version("pvae-pyro"),
    }
    return ResultCache(job.folder / FOLDER / run_folder.folder_name(entry.name), key)


def _price(seconds: float, plan: DiagnosisBudget, variants: int) -> str:
    """Say what a diagnosis is going to cost."""
    passes, minutes = sum(plan.passes().values()), seconds / 60
    wait = "less than a minute" if minutes < 1 else f"about {minutes:.0f} min"
    each = f" for each of {variants} variants" if variants > 1 else ""
    return f"diagnosis: {passes / 1e6:.2g} million rows through the decoder, {wait}{each}"


def _diagnose(
    entry: TrainedVariant,
    x: Tensor,
    plan: DiagnosisBudget,
    cache: ResultCache,
    evaluation: Mapping[str, Estimate],
    job: RunOptions,
) -> Diagnosis:
    """Diagnose a variant's first seed, with a progress bar."""
    variant = entry.variants[0]
    with progress_bar("%", 100, wanted=job.progress) as show:
        return diagnose(
            variant.model,
            variant.guide,
            x,
            budget=plan,
            labels=entry.data.test_labels,
            seed=variant.recipe.seed,
            progress=lambda share, task: show(int(100 * share), f"{entry.name}: {task}" if task else entry.name),
            cache=cache,
            evaluation=evaluation,
        )


def _of_evaluation(row: Mapping[str, Any]) -> Iterator[tuple[str, Estimate]]:
    for name in ("elbo", "ais", "evidence", "inference_gap", "approximation_gap", "amortization_gap"):
        if name in row["test"]:
            value = row["test"][name]
            # The other figures are of the first seed, and so are these.
            mean, se = (value["by_seed"][0], None) if "by_seed" in value else (value["mean"], value["se"])
            yield name, Estimate(*(math.nan if number is None else number for number in (mean, se)))
