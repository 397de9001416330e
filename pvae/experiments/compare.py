"""Compare variants: train a sweep, evaluate each variant, and judge what it gives and what it costs."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor

from pvae.data.dataset import Batch
from pvae.diagnostics.evaluation import BUDGETS as EVALUATION_BUDGETS
from pvae.diagnostics.evaluation import batch_seed, bounds, evaluate, refinement_curve
from pvae.diagnostics.latent_geometry import measure_latent_geometry
from pvae.errors import UserError, check_range
from pvae.experiments import arviz_export, run_folder, sweep
from pvae.experiments.conclusions import EvaluatedVariant, SameDecoder
from pvae.experiments.results import SCHEMA, Group, collect_results, group_results
from pvae.experiments.run import TrainedVariant
from pvae.experiments.run_folder import CACHE_DIRS, cache_folder
from pvae.experiments.sweep import DatasetCache, RunOptions
from pvae.inference.families import Family
from pvae.inference.guides import Guide
from pvae.inference.latents import base_measure
from pvae.inference.posterior import freeze
from pvae.inference.refinement import CHECK_STEPS
from pvae.recipes import preflight, registry
from pvae.recipes.build import FittedModel
from pvae.recipes.recipe import Recipe, resolve
from pvae.runtime.files import read_json, write_json
from pvae.runtime.precision import check_precision
from pvae.runtime.progress import progress_bar
from pvae.runtime.result_cache import ResultCache
from pvae.runtime.torch_state import pick_device

INFERENCE_METHODS = ("Amortized", "PerDatapoint", "SemiAmortized")
# Rows and budget of an evaluation by one word; annealing is for who asks for it.
ROWS = {"quick": 100, "standard": 300, "thorough": 1000}
BUDGETS = {word: (rows, EVALUATION_BUDGETS[word]) for word, rows in ROWS.items()}


def compare(
    recipe: Recipe,
    options: RunOptions,
    *,
    vary: Mapping[str, Sequence[Any]] | None = None,
    data_folder: str | Path | None = None,
    overwrite: bool = False,
    resume: bool = False,
) -> dict[str, Any]:
    """Train the variants of a sweep from one seed and budget, evaluate them, write the run folder, return its results.

    Arguments:
        vary: values of the recipe's keys to be combined; the three inference methods unless given.
        resume: continue a run that the folder holds; finished trainings are loaded.

    See also: `pvae.compare`.
    """
    given = (vary or {"guide": INFERENCE_METHODS}).items()
    axes = {k: [registry.with_absolute_path(v) if k in registry.KINDS else v for v in values] for k, values in given}
    check_range(least=1, jobs=options.jobs)
    device, datasets = pick_device(options.device), DatasetCache(data_folder)
    points, left_out = sweep.runnable(sweep.sweep_points(recipe, axes), datasets)
    for point in points:
        check_precision(point.recipe.precision, device)
    for data in {id(data): data for data in (datasets[point.recipe] for point in points)}.values():
        options.say(data.summary())
    for name, reason in left_out.items():
        options.say(f"{name} is left out: {reason}")
    for point in points:
        for warning in preflight.recipe_warnings(point.recipe):
            options.say(f"warning: {point.folder_name}: {warning}")
    run_folder.prepare_folder(options.folder, resolve(recipe), axes, overwrite=overwrite, resume=resume)
    fits = sweep.train_sweep(points, options, datasets, overwrite=overwrite, resume=resume)
    variants: dict[str, TrainedVariant] = {}
    for point, fitted in zip(points, fits, strict=True):
        variants.setdefault(point.name, TrainedVariant(point.name, [], datasets[point.recipe])).fits.append(fitted)
    return evaluate_variants(list(variants.values()), options, left_out)


def left_out(folder: Path) -> dict[str, str]:
    """Return the variants that a run's results leave out, with the reasons; empty without results."""
    return dict(_results(folder).get("left_out", {}))


def current_results(folder: Path, variants: list[TrainedVariant]) -> dict[str, Any]:
    """Return the results that a folder holds, if they are whole and of just these fits; else an empty mapping."""
    results = _results(folder)
    fitted = {row["name"]: row.get("fitted") for group in results.get("groups", []) for row in group["rows"]}
    exports = (folder / arviz_export.idata_name(number) for number, _ in enumerate(results.get("groups", []), 1))
    current = {variant.name: [run_folder.fingerprint(fit) for fit in variant.fits] for variant in variants}
    return results if fitted == current and all(path.is_file() for path in exports) else {}


def _results(folder: Path) -> dict[str, Any]:
    """Read ``results.json``; empty where it is missing, broken or of another version."""
    with suppress(UserError, KeyError, TypeError):
        results = read_json(folder / "results.json", "")
        if results["schema"] == SCHEMA and all(row["name"] for group in results["groups"] for row in group["rows"]):
            return results
    return {}


def evaluate_variants(
    variants: list[TrainedVariant], options: RunOptions, left_out: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Evaluate fitted variants on rows of both splits and write ``results.json`` and ``idata.nc``."""
    work = f"K = {options.budget.K}, at most {options.budget.steps} refinement steps"
    options.say(f"evaluating on up to {options.rows} training and test rows, {work}")
    groups = []
    for number, (measure, members) in enumerate(_comparable(variants, options), 1):
        group, draws = _evaluate_group(members, measure, options)
        groups.append(group_results(group))
        labels = None if group.data.test_labels is None else group.data.test_labels[: options.rows]
        about = arviz_export.attributes(groups[-1], {v.name: v.fits[0].recipe for v in members})
        arviz_export.save_idata(arviz_export.to_datatree(draws, group.test, labels, about), options.folder, number)
    recipes = [fit.recipe for variant in variants for fit in variant.fits]
    results = collect_results(groups, recipes, str(pick_device(options.device)), left_out or {})
    write_json(options.folder / "results.json", results)
    return results


def _comparable(variants: list[TrainedVariant], options: RunOptions) -> list[tuple[str, list[TrainedVariant]]]:
    """Group variants whose nats can be compared, of the same rows and base measure; with the measure of each group."""
    groups: dict[tuple[str, ...], list[TrainedVariant]] = {}
    for variant in variants:
        data, device = variant.data, pick_device(options.device)
        measure = base_measure(variant.fits[0].model, data.train[:2].to(device))
        groups.setdefault((measure, data.identity, data.digest), []).append(variant)
    return [(measure, members) for (measure, *_), members in groups.items()]


def _evaluate_group(
    variants: list[TrainedVariant], measure: str, options: RunOptions
) -> tuple[Group, dict[str, arviz_export.Draws]]:
    """Evaluate variants that can be compared; returns also what the export shows of each."""
    data, device = variants[0].data, pick_device(options.device)
    train = Batch(*(values.to(device) for values in data.fixed_train(options.rows)))
    test = data.test[: options.rows].to(device)
    frozen = {variant.name: _freeze(variant.fits[0], test, variant.fits[0].guide) for variant in variants}
    evaluated = [_evaluate(variant, frozen[variant.name], train, test, options) for variant in variants]
    spaces, draws = {}, {}
    for variant, one in zip(variants, evaluated, strict=True):
        model, guide, seed = variant.fits[0].model, frozen[variant.name], variant.fits[0].recipe.seed
        if len(test) > 1:
            spaces[variant.name] = measure_latent_geometry(model, guide, test, data.sample, seed=seed).summary()
        values = {"train": one.train.named_values(), "test": one.test.named_values()}
        draws[variant.name] = replace(arviz_export.draw_for_export(model, guide, test, seed=seed), values=values)
    group = Group(data, measure, test, variants, evaluated, spaces)
    base = next((v for v in variants if v.fits[0].recipe.type_name("guide") == "Amortized"), None)
    recipes = {variant.name: variant.fits[0].recipe for variant in variants}
    first, *others = [replace(recipe, guide="") for recipe in recipes.values()]
    if base is None or any(other != first for other in others) or base.fits[0].guide.family.point_mass:
        return group, draws
    options.say("evaluating every inference method on the amortized variant's decoder")
    fitted = base.fits[0]
    guides = {name: recipe.guide for name, recipe in recipes.items() if recipe.type_name("guide") != "Amortized"}
    present = {recipe.type_name("guide") for recipe in recipes.values()}
    guides |= {method: method for method in INFERENCE_METHODS[1:] if method not in present}
    steps = [step for step in CHECK_STEPS if step <= max(options.budget.steps, 1)]
    return group._replace(
        same=_same_decoder(fitted, {"Amortized": fitted.recipe.guide} | guides, test, options.budget.K),
        curve=refinement_curve(fitted.model, frozen[base.name], test, steps=steps, seed=fitted.recipe.seed),
    ), draws


def _freeze(fitted: FittedModel, x: Tensor, guide: Guide) -> Guide:
    """Compute a guide's variational parameters of test rows once, under the noise that evaluation gives each batch."""
    return freeze(fitted.model, guide, x, seed_of=partial(batch_seed, fitted.recipe.seed))


def _evaluate(
    variant: TrainedVariant, frozen: Guide, train: Batch, test: Tensor, options: RunOptions
) -> EvaluatedVariant:
    """Evaluate each seed of a variant on rows of both splits; the first seed's guide is frozen for the test rows."""
    rows, done, evaluated = len(train.x) + len(test), [], []
    budget = replace(options.budget, families={word: _family_maker(word) for word in options.families})
    with progress_bar("rows", rows * len(variant.fits), wanted=options.progress) as show:

        def count(rows: int) -> None:
            done.append(rows)
            show(sum(done), variant.name)

        for fitted in variant.fits:
            model, guide, recipe = fitted.model, fitted.guide, fitted.recipe
            settings: dict[str, Any] = {"budget": budget, "seed": recipe.seed, "progress": count}
            settings["cache"] = _cache(variant, fitted, options)
            on_train = evaluate(model, guide, *train, prefix=f"train-{recipe.seed}", **settings)
            guide = frozen if fitted is variant.fits[0] else guide
            on_test = evaluate(model, guide, test, prefix=f"test-{recipe.seed}", **settings)
            method = recipe.type_name("guide")
            evaluated.append(EvaluatedVariant(variant.name, fitted.fit.seconds, on_train, on_test, method))
    return replace(evaluated[0], further=tuple(evaluated[1:]))


def _family_maker(word: str) -> Callable[[int], Family]:
    """Return a function from a number of dimensions to the family of a word, as ``LowRankNormal(rank=4)``."""
    component = registry.parse_component(word)
    registry.find_class("family", registry.as_table(component)["type"])
    return lambda dim: registry.make("family", component, dim=dim)


def _cache(variant: TrainedVariant, fitted: FittedModel, options: RunOptions) -> ResultCache:
    """Return the cache of a fit's evaluation, under everything that it depends on."""
    families = {word: registry.source_code(registry.parse_component(word)) for word in options.families}
    key = {"rows": options.rows, "budget": asdict(options.budget), "families": families, "data": variant.data.digest}
    key |= {"fitted": run_folder.fingerprint(fitted), "version": version("pvae-pyro")}
    return ResultCache(cache_folder(options.folder, CACHE_DIRS[0], variant.name), key)


def _same_decoder(base: FittedModel, guides: Mapping[str, Any], x: Tensor, K: int) -> list[SameDecoder]:
    """Evaluate each guide on the amortized decoder; semi-amortized steps start from its encoder's parameters."""
    supplied = {name: getattr(base.guide, name) for name in ("encoder", "family", "sites")}
    supplied |= {"model": base.model, "num_data": 1}
    results = []
    for name, component in guides.items():
        guide = registry.make("guide", component, **supplied).to(x.device).eval()
        start = time.perf_counter()
        frozen = _freeze(base, x, guide)
        seconds = time.perf_counter() - start
        elbo = bounds(base.model, frozen, x, K=K, seed=base.recipe.seed).values["elbo"]
        results.append(SameDecoder(name, elbo, seconds / len(x)))
    return results
