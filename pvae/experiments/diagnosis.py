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

import torch

from pvae.diagnostics.battery import DiagnosisBudget, Subject, Task, concatenate, list_tasks
from pvae.diagnostics.evaluation import bounds
from pvae.diagnostics.trust import assess_trust
from pvae.errors import UserError, nearest
from pvae.experiments import run_folder
from pvae.experiments.compare import RunOptions, TrainedVariant
from pvae.inference.guides import RefinedGuide
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
    found = []
    for entry in wanted:
        subject = _subject(entry, job, plan)
        if entry is wanted[0]:
            job.say(_price(subject, plan, len(wanted)))
        start, ledger = time.perf_counter(), _ledger(entry, job, plan)
        made = _made(subject, ledger, plan, job)
        guide, best = _figures(made, rows[entry.name])
        found.append(
            {
                "name": entry.name,
                "plan": asdict(plan),
                "fitted": run_folder.fingerprint(entry.variants[0]),
                "parts": ledger.key,
                "seconds": time.perf_counter() - start,
                "figures": {name: value._asdict() for name, value in guide.items()},
                "refined": {name: value._asdict() for name, value in best.items()},
                "verdicts": [verdict._asdict() for verdict in assess_trust(guide, best, **_classes(entry))],
            }
        )
    whole = {"schema": SCHEMA, "variants": found + kept}
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
    found: dict[str, list[Any]] = {}
    for name, tensors in load_all(folder / FOLDER / run_folder.folder_name(variant["name"]), variant["parts"]).items():
        part = Task(name, 0, lambda: None)
        found.setdefault(part.of, []).append(part.kind(**tensors))
    return {name: concatenate(pieces) for name, pieces in found.items()}


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


def _subject(entry: TrainedVariant, job: RunOptions, plan: DiagnosisBudget) -> Subject:
    variant, device = entry.variants[0], pick_device(job.device)
    x = entry.data.test[: plan.rows].to(device)
    best = RefinedGuide(variant.guide, variant.model, steps=plan.steps).to(device).eval()
    labels = torch.empty(0) if entry.data.test_labels is None else entry.data.test_labels[: plan.rows]
    return Subject(entry.name, variant.model, variant.guide, best, x, labels, variant.recipe.seed)


def _ledger(entry: TrainedVariant, job: RunOptions, plan: DiagnosisBudget) -> ResultCache:
    variant = entry.variants[0]
    key = {
        "fitted": run_folder.fingerprint(variant),
        "rows": entry.data.digest,
        "plan": asdict(plan),
        "seed": variant.recipe.seed,
        "version": version("pvae-pyro"),
    }
    return ResultCache(job.folder / FOLDER / run_folder.folder_name(entry.name), key)


def _price(subject: Subject, plan: DiagnosisBudget, variants: int) -> str:
    """What a diagnosis is going to cost, by the time that a few thousand passes take here."""
    passes, rows = sum(plan.passes().values()), subject.x[:50]
    for _ in range(2):  # the first time is slow
        start = time.perf_counter()
        bounds(subject.model, subject.guide, rows, K=100)
    minutes = passes * (time.perf_counter() - start) / (100 * len(rows)) / 60
    told = "less than a minute" if minutes < 1 else f"about {minutes:.0f} min"
    each = f" for each of {variants} variants" if variants > 1 else ""
    return f"diagnosis: {passes / 1e6:.2g} million rows through the decoder, {told}{each}"


def _made(subject: Subject, ledger: ResultCache, plan: DiagnosisBudget, job: RunOptions) -> dict[str, Any]:
    """All parts of a variant's diagnosis, by name, from the ledger or made now."""
    found: dict[str, list[Any]] = {}
    done, total = 0.0, sum(part.passes for part in list_tasks(subject, plan))
    with progress_bar("%", 100, wanted=job.progress) as show:
        for part in list_tasks(subject, plan):  # one after the other: a part may hold the chains of its rows
            show(int(100 * done / total), f"{subject.name}: {part.name}")
            found.setdefault(part.of, []).append(ledger.get_or_compute(part.name, part.kind, part.compute))
            done += part.passes
        show(100, subject.name)
    return {name: concatenate(pieces) for name, pieces in found.items()}


def _classes(entry: TrainedVariant) -> dict[str, str]:
    own = entry.variants[0].recipe
    return {"source": own.name("guide"), "family": own.name("family")}


def _figures(parts: dict[str, Any], row: Mapping[str, Any]) -> tuple[dict[str, Estimate], dict[str, Estimate]]:
    """What the rules look at: of the guide, and of the same q refined."""
    guide, best = dict(_of_evaluation(row)), dict[str, Estimate]()
    for name, part in parts.items():
        found = part.summary()
        if name.endswith("-best"):
            best |= found
        else:
            guide |= found
    if "approximation_gap" in guide:
        best["inference_gap"] = guide["approximation_gap"]
    return guide, best


def _of_evaluation(row: Mapping[str, Any]) -> Iterator[tuple[str, Estimate]]:
    for name in ("elbo", "ais", "evidence", "inference_gap", "approximation_gap", "amortization_gap"):
        if name in row["test"]:
            value = row["test"][name]
            # The other figures are of the first seed, and so are these.
            mean, se = (value["by_seed"][0], None) if "by_seed" in value else (value["mean"], value["se"])
            yield name, Estimate(*(math.nan if number is None else number for number in (mean, se)))
