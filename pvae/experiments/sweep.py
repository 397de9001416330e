"""Sweeps: the product of a recipe's axes becomes points, each trained in a folder of its own."""

from __future__ import annotations

import ast
import itertools
import multiprocessing
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from pvae.data.dataset import Dataset
from pvae.errors import Incompatible, UserError, param
from pvae.experiments.run_folder import folder_name, load_fit, prepare_folder, train_in_folder
from pvae.recipes import registry
from pvae.recipes.build import FittedModel, build_model
from pvae.recipes.preflight import check_recipe
from pvae.recipes.recipe import Recipe, check_value, load_recipe_data, resolve
from pvae.runtime.progress import progress_bar
from pvae.runtime.signals import TrainingInterrupt, handle_first_signal, raise_interrupt


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
class Workers:
    """Processes that train the points of a sweep.

    Attributes:
        jobs: processes at a time.
        device: ``auto``, ``cpu`` or ``cuda``.
        data_folder: where torchvision's data sets are.
        progress: show progress bars.
        say: takes lines for the user.
    """

    jobs: int = 1
    device: str = "auto"
    data_folder: str | Path | None = None
    progress: bool = False
    say: Callable[[str], None] = lambda line: None


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
    """Parse an axis as one writes it on the command line.

    Raises:
        UserError: it is not of the form ``name=value,value``, or names no key of a recipe.

    >>> parse_axis("objective=ELBO,IWAE(K=5)"), parse_axis("latent=2,8")
    (('objective', ['ELBO', 'IWAE(K=5)']), ('latent', [2, 8]))
    """
    name, equals, text = words.partition("=")
    name = name.strip().replace("-", "_")
    values = [_parse_value(name, word) for word in registry.split_words(text)]
    axis = param("vary", words)
    if not equals or "" in values or None in values or len(values) != len({str(value) for value in values}):
        raise UserError(f"{axis}: write {name}=VALUE,VALUE,... with different values")
    for value in values:
        check_value(name, value, f"{axis}: ")
    return name, values


def _parse_value(name: str, word: str) -> Any:
    if name in registry.KINDS:
        return word
    try:
        return ast.literal_eval(word)
    except (ValueError, SyntaxError):
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
    """Check points before anything is trained.

    Returns:
        The points that can be trained, with their models, and by name those that are left out with the reason.

    Raises:
        UserError: a mistake in any point, or no point that can be trained.
    """
    accepted: list[SweepPoint] = []
    refused: dict[str, str] = {}
    checked: set[tuple[int, str, str]] = set()
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
    folder: Path,
    datasets: DatasetCache,
    workers: Workers,
    *,
    overwrite: bool = False,
    resume: bool = False,
) -> list[FittedModel]:
    """Train each point in its own folder and return the fitted models in their order.

    Arguments:
        folder: of the sweep.
        overwrite: replace what the points' folders hold.
        resume: continue trainings that their folders hold; finished ones are loaded.
    """
    folders = [folder / point.folder_name for point in points]
    begun = [resume and (path / "recipe.toml").is_file() for path in folders]
    for point, path, known in zip(points, folders, begun, strict=True):
        prepare_folder(path, point.recipe, overwrite=overwrite, resume=known)
    if workers.jobs > 1 and len(points) > 1:
        _train_in_processes(points, folders, begun, workers)
        pairs = [(path, point, datasets[point.recipe]) for path, point in zip(folders, points, strict=True)]
        return [load_fit(path, data, device=workers.device, untrained=point.build(data)) for path, point, data in pairs]
    models, options = [], {"device": workers.device, "progress": workers.progress}
    for number, (point, path, known) in enumerate(zip(points, folders, begun, strict=True), 1):
        data, batch_size = datasets[point.recipe], point.recipe.batch_size
        count = f" ({number} of {len(points)})" if len(points) > 1 else ""
        workers.say(f"training {_title(point)}: {_epochs(point.recipe)}, batches of {batch_size}{count}")
        is_checked = point.untrained is not None
        models.append(
            train_in_folder(point.build(data), data, path, resume=known, check_data=not is_checked, **options)
        )
    return models


def _title(point: SweepPoint) -> str:
    return point.folder_name.replace(",seed=", ", seed ")


def _epochs(recipe: Recipe) -> str:
    return f"{recipe.epochs} epoch{'' if recipe.epochs == 1 else 's'}"


def _train_in_processes(points: list[SweepPoint], folders: list[Path], begun: list[bool], workers: Workers) -> None:
    """Train points in processes of their own, which share the machine's threads; a signal ends them all, saved."""
    jobs = min(workers.jobs, len(points))
    threads = max(1, torch.get_num_threads() // jobs)
    workers.say(f"training {len(points)} variants, {jobs} at a time, {threads} threads each")
    spawning = multiprocessing.get_context("spawn")
    with (
        # In process groups of their own, Ctrl-C reaches them once, through this process, and not twice.
        ProcessPoolExecutor(jobs, mp_context=spawning, initializer=os.setpgrp) as pool,
        progress_bar("variants", len(points), wanted=workers.progress) as show,
        handle_first_signal(raise_interrupt),
    ):
        waiting, running, trained = list(zip(points, folders, begun, strict=True)), dict[Any, SweepPoint](), 0
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    point, path, known = waiting.pop(0)
                    arguments = (point.recipe, path, workers.device, workers.data_folder, known, threads)
                    running[pool.submit(_train_in_process, *arguments)] = point
                for done in wait(running, return_when=FIRST_COMPLETED).done:
                    done.result()
                    trained += 1
                    show(trained, _title(running.pop(done)))
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
