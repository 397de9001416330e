"""Sweeps: the product of a recipe's axes becomes points, each trained in a folder of its own."""

from __future__ import annotations

import ast
import itertools
import multiprocessing
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from pvae.data.dataset import Dataset
from pvae.diagnostics.evaluation import Budget
from pvae.errors import Incompatible, UserError, param
from pvae.experiments.run_folder import RECIPE, folder_name, load_fit, prepare_folder, train_in_folder
from pvae.recipes import registry
from pvae.recipes.build import FittedModel, build_model
from pvae.recipes.preflight import check_recipe
from pvae.recipes.recipe import Recipe, check_value, load_recipe_data, resolve
from pvae.runtime.progress import progress_bar
from pvae.runtime.signals import TrainingInterrupt, handle_first_signal, raise_interrupt
from pvae.runtime.torch_state import seeded


@dataclass(frozen=True)
class SweepPoint:
    """One run of a sweep.

    Attributes:
        name: of its variant: the values of the axes, without the seed.
        recipe: resolved.
        folder_name: of its run, in the folder of the sweep.
        untrained: the model of the recipe, if it was built to be checked.
    """

    name: str
    recipe: Recipe
    folder_name: str
    untrained: FittedModel | None = field(default=None, repr=False, compare=False)

    def build(self, data: Dataset) -> FittedModel:
        """Return the untrained model, built unless it was."""
        return self.untrained or build_model(self.recipe, data)


@dataclass(frozen=True)
class RunOptions:
    """Options of a comparison, beside the recipe that fixes its numbers.

    Attributes:
        folder: of the run.
        device: ``auto``, ``cpu`` or ``cuda``.
        rows: how many rows of each split are evaluated.
        budget: of the evaluation.
        families: words for other variational families; evaluation measures what each would gain.
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

    def __post_init__(self) -> None:
        for word in self.families:  # each is built once, so that a mistake shows before anything is trained
            with seeded(0):
                if registry.make("family", registry.parse_component(word), dim=2).point_mass:
                    raise UserError(f"{param('families')}: {word} is a point mass, which has no ELBO to compare")


@dataclass
class DatasetCache:
    """Data sets of recipes, each loaded once."""

    folder: str | Path | None = None
    loaded: dict[tuple[str, ...], Dataset] = field(default_factory=dict)

    def __getitem__(self, recipe: Recipe) -> Dataset:
        keys = ("data", "binarize", "test_size", "validation_size", "split_seed", "missing", "only", "program")
        key = tuple(str(getattr(recipe, name)) for name in keys)
        if key not in self.loaded:
            self.loaded[key] = load_recipe_data(recipe, self.folder)
        return self.loaded[key]


def parse_axis(words: str) -> tuple[str, list[Any]]:
    """Parse an axis ``name=value,value`` as one writes it on the command line.

    >>> parse_axis("objective=ELBO,IWAE(K=5)"), parse_axis("latent=2,8")
    (('objective', ['ELBO', 'IWAE(K=5)']), ('latent', [2, 8]))
    """
    name, equals, text = words.partition("=")
    name, axis = name.strip().replace("-", "_"), param("vary", words)
    values = [_parse_value(name, word) for word in registry.split_words(text)]
    if not equals or "" in values or None in values or len(values) != len({str(value) for value in values}):
        raise UserError(f"{axis}: write {name}=VALUE,VALUE,... with different values")
    for value in values:
        check_value(name, value, f"{axis}: ")
    return name, values


def _parse_value(name: str, word: str) -> Any:
    with suppress(ValueError, SyntaxError):
        return word if name in registry.KINDS else ast.literal_eval(word)
    return word


def sweep_points(recipe: Recipe, vary: Mapping[str, Sequence[Any]]) -> list[SweepPoint]:
    """Return the product of the axes, the last one fastest; an axis ``seed`` repeats each variant on the same rows.

    Raises:
        UserError: an unknown component, or two points of one name.
    """
    seeds = list(vary.get("seed", [recipe.seed]))
    axes = {name: values for name, values in vary.items() if name != "seed"}
    base = replace(recipe, split_seed=seeds[0] if recipe.split_seed is None else recipe.split_seed)
    naming = [name for name, values in axes.items() if len(values) > 1] or list(axes)
    points = []
    for values in itertools.product(*axes.values()):
        settings = dict(zip(axes, values, strict=True))
        name = " / ".join(_value_label(key, settings[key]) for key in naming) or recipe.name("guide")
        for seed in seeds:
            folder = folder_name(name) + (f",seed={seed}" if len(seeds) > 1 else "")
            points.append(SweepPoint(name, resolve(replace(base, **settings, seed=seed)), folder))
    if len({point.folder_name for point in points}) < len(points):
        raise UserError("two variants have the same name; give each value once")
    return points


def _value_label(key: str, value: Any) -> str:
    """Write a value with the arguments that it was given, so that IWAE(K=5) shows its K, default or not."""
    return registry.label(value) if key in registry.KINDS else f"{key.replace('_', ' ')} {value}"


def runnable(points: list[SweepPoint], datasets: DatasetCache) -> tuple[list[SweepPoint], dict[str, str]]:
    """Return the points that can be trained, with their models, and the reasons of those left out, by name."""
    accepted, refused, checked = list[SweepPoint](), dict[str, str](), set[tuple[int, str, str]]()
    for point in points:
        data, recipe = datasets[point.recipe], point.recipe
        # The program and its likelihood alone say which values may be observed.
        observed = id(data), str(recipe.program), str(recipe.likelihood)
        try:
            untrained = check_recipe(recipe, data, check_data=observed not in checked)
        except Incompatible as error:
            refused[point.name] = str(error)
        else:
            checked.add(observed)
            accepted.append(replace(point, untrained=untrained))
    if not accepted:
        raise UserError(next(iter(refused.values())))
    return accepted, refused


def train_sweep(
    points: list[SweepPoint],
    options: RunOptions,
    datasets: DatasetCache,
    *,
    overwrite: bool = False,
    resume: bool = False,
) -> list[FittedModel]:
    """Train each point in a folder of its own in ``options.folder``, and return the fitted models in their order.

    Arguments:
        overwrite: replace what the points' folders hold.
        resume: continue trainings that their folders hold; finished ones are loaded.
    """
    paths = [(point, options.folder / point.folder_name) for point in points]
    jobs = [(point, path, resume and (path / RECIPE).is_file()) for point, path in paths]
    for point, path, begun in jobs:
        prepare_folder(path, point.recipe, overwrite=overwrite, resume=begun)
    if in_processes := options.jobs > 1 and len(points) > 1:
        _train_in_processes(list(jobs), options, datasets.folder)
    models = []
    for number, (point, path, begun) in enumerate(jobs, 1):
        data, recipe = datasets[point.recipe], point.recipe
        if in_processes:
            models.append(load_fit(path, data, device=options.device, untrained=point.build(data)))
            continue
        epochs = f"{recipe.epochs} epoch{'' if recipe.epochs == 1 else 's'}"
        count = f" ({number} of {len(points)})" if len(points) > 1 else ""
        options.say(f"training {_title(point)}: {epochs}, batches of {recipe.batch_size}{count}")
        settings = {"device": options.device, "progress": options.progress, "check_data": point.untrained is None}
        models.append(train_in_folder(point.build(data), data, path, resume=begun, **settings))
    return models


def _title(point: SweepPoint) -> str:
    return point.folder_name.replace(",seed=", ", seed ")


def _train_in_processes(
    waiting: list[tuple[SweepPoint, Path, bool]], options: RunOptions, data_folder: str | Path | None
) -> None:
    """Train points in processes of their own, which share the machine's threads; a signal ends them all, saved."""
    total, jobs = len(waiting), min(options.jobs, len(waiting))
    threads = max(1, torch.get_num_threads() // jobs)
    options.say(f"training {total} variants, {jobs} at a time, {threads} threads each")
    spawning = multiprocessing.get_context("spawn")
    with (
        # In process groups of their own, Ctrl-C reaches them once, through this process, and not twice.
        ProcessPoolExecutor(jobs, mp_context=spawning, initializer=os.setpgrp) as pool,
        progress_bar("variants", total, wanted=options.progress) as show,
        handle_first_signal(raise_interrupt),
    ):
        running = dict[Any, SweepPoint]()
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    point, path, begun = waiting.pop(0)
                    arguments = (point.recipe, path, options.device, data_folder, begun, threads)
                    running[pool.submit(_train_in_process, *arguments)] = point
                for done in wait(running, return_when=FIRST_COMPLETED).done:
                    done.result()
                    title = _title(running.pop(done))
                    show(total - len(waiting) - len(running), title)
        except TrainingInterrupt:
            for process in multiprocessing.active_children():
                process.terminate()
            raise


def _train_in_process(
    recipe: Recipe, folder: Path, device: str, data_folder: str | Path | None, resume: bool, threads: int
) -> None:
    torch.set_num_threads(threads)
    data = load_recipe_data(recipe, data_folder)
    train_in_folder(build_model(recipe, data), data, folder, device=device, resume=resume)
