"""The main job: variants side by side, judged by what they give and what they cost."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pvae.data.dataset import Batch, Dataset
from pvae.diagnostics.evaluation import Budget, bounds, evaluate, refinement_curve
from pvae.diagnostics.latent_geometry import measure_latent_geometry
from pvae.errors import UserError
from pvae.experiments import arviz_export, run_folder, sweep
from pvae.experiments.conclusions import EvaluatedVariant, SameDecoder
from pvae.experiments.results import SCHEMA, Group, collect_results
from pvae.experiments.run_folder import CACHE_DIRS, folder_name
from pvae.experiments.sweep import DatasetCache, SweepPoint, Workers
from pvae.inference.families import Family
from pvae.inference.latents import base_measure
from pvae.inference.refinement import CHECK_STEPS
from pvae.recipes import preflight, recipe, registry
from pvae.recipes.build import FittedModel
from pvae.recipes.recipe import Recipe
from pvae.recipes.registry import KINDS
from pvae.runtime.files import read_json, write_json
from pvae.runtime.precision import check_precision
from pvae.runtime.progress import progress_bar
from pvae.runtime.result_cache import ResultCache
from pvae.runtime.torch_state import no_validation, pick_device, seeded
from pvae.stats import Estimate
from pvae.training import checkpoints

INFERENCE_METHODS = ("Amortized", "PerDatapoint", "SemiAmortized")
# Rows and budget of an evaluation by one word; annealing is for who asks for it.
BUDGETS = {
    "quick": (100, Budget(K=200, steps=100)),
    "standard": (300, Budget()),
    "thorough": (1000, Budget(K=5000, steps=1000)),
}


@dataclass(frozen=True)
class RunOptions:
    """How a comparison is carried out, beside the recipe that fixes its numbers.

    Attributes:
        folder: of the run.
        device: ``auto``, ``cpu`` or ``cuda``.
        rows: how many rows of each split are evaluated.
        budget: of the evaluation.
        families: words for other posterior families; evaluation says what each would win.
        jobs: variants that are trained at a time, each in a process of its own.
        trust: run the code of files that a run's recipe names.
        progress: show progress bars.
        say: takes lines for the user.
    """

    folder: Path
    device: str = "auto"
    rows: int = 300
    budget: Budget = field(default_factory=Budget)
    families: Sequence[str] = ()
    jobs: int = 1
    trust: bool = False
    progress: bool = False
    say: Callable[[str], None] = lambda line: None


class TrainedVariant(NamedTuple):
    """A variant as it was trained, once for each seed, and its data."""

    name: str
    variants: list[FittedModel]
    data: Dataset


def compare(
    own: Recipe,
    job: RunOptions,
    *,
    vary: Mapping[str, Sequence[Any]] | None = None,
    data_folder: str | Path | None = None,
    overwrite: bool = False,
    resume: bool = False,
) -> dict[str, Any]:
    """Train the variants of a grid from one seed and budget, evaluate them, and write the run folder.

    Arguments:
        own: the recipe.
        job: where and how.
        vary: values of the recipe's keys to be combined; the three sources of q_params unless given.
        data_folder: where torchvision's data sets are.
        overwrite: replace a run that the folder holds.
        resume: go on with it; what is trained is not trained again.

    Returns:
        The results, as in ``results.json``.

    Raises:
        UserError: anything that the user can mend; nothing has been overwritten if it could be known before.
    """
    given = (vary or {"guide": INFERENCE_METHODS}).items()
    axes = {name: [registry.with_absolute_path(v) if name in KINDS else v for v in values] for name, values in given}
    if job.jobs < 1:
        raise UserError(f"--jobs is {job.jobs}, but it must be at least 1")
    device, shelf = pick_device(job.device), DatasetCache(data_folder)
    wanted, left_out = sweep.runnable(sweep.sweep_points(own, axes), shelf)
    for cell in wanted:
        check_precision(cell.recipe.precision, device)
    for line in dict.fromkeys(shelf[cell.recipe].summary() for cell in wanted):
        job.say(line)
    for name, reason in left_out.items():
        job.say(f"{name} is left out: {reason}")
    for cell in wanted:
        for warning in preflight.recipe_warnings(cell.recipe):
            job.say(f"warning: {cell.place}: {warning}")
    run_folder.prepare_folder(job.folder, recipe.resolve(own), axes, overwrite=overwrite, resume=resume)
    pool = Workers(job.jobs, job.device, data_folder, job.progress, job.say)
    variants = sweep.train_sweep(wanted, job.folder, shelf, pool, overwrite=overwrite, resume=resume)
    return evaluate_variants(_entries(wanted, variants, shelf), job, left_out)


def load_variants(job: RunOptions, data_folder: str | Path | None = None) -> list[TrainedVariant]:
    """The variants of a run that ``fit`` (one) or ``compare`` (several) has trained, and their data.

    Raises:
        UserError: no run, a broken one, or one whose data have changed.
    """
    if not (job.folder / "recipe.toml").is_file():
        raise UserError(f"{job.folder} is not a run: it has no recipe.toml")
    own, axes, _ = recipe.read_recipe_file(job.folder / "recipe.toml", trust=job.trust)
    shelf = DatasetCache(data_folder)
    if not axes:
        variant = run_folder.load_fit(job.folder, shelf[own], device=job.device, trust=job.trust)
        if left := run_folder.unfinished_note(variant):
            job.say(f"warning: {job.folder} {left}")
        return [TrainedVariant(own.name("guide"), [variant], shelf[own])]
    begun = [cell for cell in sweep.sweep_points(own, axes) if (job.folder / cell.place / "recipe.toml").is_file()]
    there = [
        replace(cell, recipe=recipe.read_recipe(job.folder / cell.place, trust=job.trust))
        for cell in begun
        if (job.folder / cell.place / checkpoints.FILE).is_file()
    ]
    if not there:
        raise UserError(f"{job.folder} holds no trained variant; the command that began it with --resume goes on")
    found = [
        run_folder.load_fit(job.folder / c.place, shelf[c.recipe], device=job.device, trust=job.trust) for c in there
    ]
    for cell in begun:
        if cell.place not in {other.place for other in there}:
            job.say(f"warning: {cell.place} is not trained and stays out; the first command with --resume trains it")
    for cell, variant in zip(there, found, strict=True):
        if left := run_folder.unfinished_note(variant):
            job.say(f"warning: {cell.place} {left}")
    return _entries(there, found, shelf)


def left_out(folder: Path) -> dict[str, str]:
    """The variants that a run's results say were left out, with the reasons; none where there are no results."""
    return dict(_results(folder).get("left_out", {}))


def current_results(folder: Path, entries: list[TrainedVariant]) -> dict[str, Any]:
    """The results that the folder holds, if they are whole and of just these fits; else none."""
    results = _results(folder)
    there = {row["name"]: row.get("fitted") for group in results.get("groups", []) for row in group["rows"]}
    exports = (folder / arviz_export.idata_name(number) for number, _ in enumerate(results.get("groups", []), 1))
    same = there == {e.name: [run_folder.fingerprint(v) for v in e.variants] for e in entries}
    return results if same and all(path.is_file() for path in exports) else {}


def _results(folder: Path) -> dict[str, Any]:
    """``results.json`` as far as it can be used: what can't is made anew by who asks for it."""
    with suppress(UserError, KeyError, TypeError):
        results = read_json(folder / "results.json", "")
        if results["schema"] == SCHEMA and all(row["name"] for group in results["groups"] for row in group["rows"]):
            return results
    return {}


def _entries(wanted: list[SweepPoint], variants: list[FittedModel], shelf: DatasetCache) -> list[TrainedVariant]:
    found: dict[str, TrainedVariant] = {}
    for cell, variant in zip(wanted, variants, strict=True):
        found.setdefault(cell.name, TrainedVariant(cell.name, [], shelf[cell.recipe])).variants.append(variant)
    return list(found.values())


def evaluate_variants(
    entries: list[TrainedVariant], job: RunOptions, left_out: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Evaluate fitted variants on rows of both splits and write ``results.json`` and ``idata.nc``."""
    job.say(
        f"evaluating on up to {job.rows} training and test rows, K = {job.budget.K}, "
        f"at most {job.budget.steps} refinement steps"
    )
    groups = []
    for number, members in enumerate(_groups(entries, job), 1):
        group = _group(members, job)
        draws = {e.name: _draws(e.variants[0], j, group.test.x) for e, j in zip(members, group.judged, strict=True)}
        labels = None if group.data.test_labels is None else group.data.test_labels[: job.rows]
        recipes = {e.name: asdict(e.variants[0].recipe) for e in members}
        about = arviz_export.attributes(collect_results([group], {}), recipes)
        found = arviz_export.to_datatree(draws, group.test.x, labels, about)
        arviz_export.save_idata(found, job.folder, number)
        groups.append(group)
    results = collect_results(groups, left_out or {})
    write_json(job.folder / "results.json", results)
    return results


def _groups(entries: list[TrainedVariant], job: RunOptions) -> list[list[TrainedVariant]]:
    """Entries whose nats can be compared: of the same rows and the same base measure."""
    found: dict[tuple[str, ...], list[TrainedVariant]] = {}
    for entry in entries:
        rows = entry.data.train[:2].to(pick_device(job.device))
        measure = base_measure(entry.variants[0].model, rows)
        found.setdefault((entry.data.identity, entry.data.digest, measure), []).append(entry)
    return list(found.values())


def _group(entries: list[TrainedVariant], job: RunOptions) -> Group:
    data = entries[0].data.to(pick_device(job.device))
    splits = {"train": data.fixed_train(job.rows), "test": Batch(data.test[: job.rows], torch.empty(0))}
    judged = [_judged(entry, splits, job) for entry in entries]
    measure = base_measure(entries[0].variants[0].model, data.train[:2])
    spaces = {entry.name: _latent_space(entry.variants[0], splits["test"].x, data) for entry in entries}
    group = Group(data, measure, splits["test"], [e.variants for e in entries], judged, spaces)
    base = next((e.variants[0] for e in entries if _source(e) == "Amortized"), None)
    if base is None or not _differ_in_guide_alone(entries) or base.guide.family.point_mass:
        return group
    job.say("evaluating every source on the amortized variant's decoder")
    test, seed = splits["test"].x, base.recipe.seed
    chosen = {e.name: e.variants[0].recipe.guide for e in entries if _source(e) != "Amortized"}
    steps = [mark for mark in CHECK_STEPS if mark <= max(job.budget.steps, 1)]
    missing = {source: source for source in INFERENCE_METHODS[1:] if source not in map(_source, entries)}
    return group._replace(
        same=_same_decoder(base, {"Amortized": base.recipe.guide} | chosen | missing, test, job.budget.K),
        curve=refinement_curve(base.model, base.guide, test, steps=steps, seed=seed),
    )


def _latent_space(variant: FittedModel, x: Tensor, data: Dataset) -> dict[str, Estimate]:
    """How near in latent space is near in the data, by the test rows x; nothing where there is one alone."""
    if len(x) < 2:
        return {}
    return measure_latent_geometry(variant.model, variant.guide, x, data.sample, seed=variant.recipe.seed).summary()


def _source(entry: TrainedVariant) -> str:
    return str(registry.as_table(entry.variants[0].recipe.guide)["type"])


def _differ_in_guide_alone(entries: list[TrainedVariant]) -> bool:
    own = [replace(e.variants[0].recipe, guide="") for e in entries]
    return all(other == own[0] for other in own)


def _judged(entry: TrainedVariant, splits: dict[str, Batch], job: RunOptions) -> EvaluatedVariant:
    """A variant's evaluation, by its first seed and by the further ones."""
    total, found = sum(len(batch.x) for batch in splits.values()) * len(entry.variants), []
    with progress_bar("rows", total, wanted=job.progress) as show:
        done = 0

        def count(rows: int) -> None:
            nonlocal done
            done += rows
            show(done, entry.name)

        budget = replace(job.budget, families={word: _maker(word) for word in job.families})
        for variant in entry.variants:
            own = variant.recipe
            ledger = _ledger(entry, variant, job)
            values: dict[str, Any] = {
                split: evaluate(
                    variant.model,
                    variant.guide,
                    x,
                    index if split == "train" else None,
                    budget=budget,
                    seed=own.seed,
                    progress=count,
                    cache=ledger,
                    prefix=f"{split}-{own.seed}",
                )
                for split, (x, index) in splits.items()
            }
            name = str(registry.as_table(own.guide)["type"])
            found.append(EvaluatedVariant(entry.name, variant.fit.seconds, **values, source=name))
    return replace(found[0], further=tuple(found[1:]))


def _maker(word: str) -> Callable[[int], Family]:
    """From a number of dimensions to the family of a word, as ``LowRankNormal(rank=4)``."""
    component = registry.parse_component(word)
    registry.find_class("family", registry.as_table(component)["type"])
    return lambda dim: registry.make("family", component, dim=dim)


def _ledger(entry: TrainedVariant, variant: FittedModel, job: RunOptions) -> ResultCache:
    """Where finished parts of a fit's evaluation are kept, under all that they depend on."""
    key = {
        "fitted": run_folder.fingerprint(variant),
        "data": entry.data.digest,
        "rows": job.rows,
        "budget": asdict(job.budget),
        "families": {word: registry.source_code(registry.parse_component(word)) for word in job.families},
        "version": version("pvae-pyro"),
    }
    return ResultCache(job.folder / CACHE_DIRS[0] / folder_name(entry.name), key)


def _same_decoder(base: FittedModel, chosen: Mapping[str, Any], x: Tensor, K: int) -> list[SameDecoder]:
    """Each source's q_params for the test rows on the amortized decoder, semi-amortized steps from its encoder's q_params."""
    model, own, found = base.model, base.guide, []
    supplied = {"encoder": own.encoder, "family": own.family, "num_data": 1, "model": model, "sites": own.sites}
    for name, component in chosen.items():
        guide = registry.make("guide", component, **supplied).to(x.device).eval()
        start = time.perf_counter()
        with no_validation(), torch.no_grad(), seeded(base.recipe.seed):
            guide.params(x)
        seconds = time.perf_counter() - start
        elbo = bounds(model, guide, x, K=K, seed=base.recipe.seed).values["elbo"]
        found.append(SameDecoder(name, elbo, seconds / len(x)))
    return found


def _draws(variant: FittedModel, judged: EvaluatedVariant, x: Tensor) -> arviz_export.Draws:
    """What the export and the page show of a variant, for the test rows x."""
    values = {split: {n: v.cpu() for n, v in getattr(judged, split).named_values().items()} for split in ("train", "test")}
    return replace(
        arviz_export.draw_for_export(variant.model, variant.guide, x, seed=variant.recipe.seed), values=values
    )
