"""Grids: a recipe whose axes vary becomes the cells of a product, each trained in a folder of its own."""

from __future__ import annotations

import ast
import itertools
import multiprocessing
import os
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from pvae.data.dataset import Dataset
from pvae.errors import Incompatible, UserError
from pvae.experiments import run_folder
from pvae.recipes import preflight, recipe, registry
from pvae.recipes.build import FittedModel
from pvae.recipes.recipe import Recipe
from pvae.runtime.progress import progress_bar
from pvae.runtime.signals import TrainingInterrupt, handle_first_signal, raise_interrupt


@dataclass(frozen=True)
class SweepPoint:
    """One run of a grid.

    Attributes:
        name: of its variant: the values of the axes, without the seed.
        recipe: resolved.
        place: the name of its folder.
    """

    name: str
    recipe: Recipe
    place: str


@dataclass(frozen=True)
class Workers:
    """How cells are trained.

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
    """Data sets of recipes, each read once."""

    folder: str | Path | None = None
    known: dict[tuple[Any, ...], Dataset] = field(default_factory=dict)

    def __getitem__(self, own: Recipe) -> Dataset:
        keys = ("data", "binarize", "test_size", "validation_size", "split_seed", "missing", "only", "program")
        key = tuple(str(getattr(own, name)) for name in keys)
        if key not in self.known:
            self.known[key] = recipe.load_recipe_data(own, self.folder)
        return self.known[key]


def parse_axis(words: str) -> tuple[str, list[Any]]:
    """An axis as one writes it on the command line.

    Raises:
        UserError: it is not of the form ``name=value,value``, or names no key of a recipe.

    >>> parse_axis("objective=ELBO,IWAE(K=5)"), parse_axis("latent=2,8")
    (('objective', ['ELBO', 'IWAE(K=5)']), ('latent', [2, 8]))
    """
    name, equals, values = words.partition("=")
    name = name.strip().replace("-", "_")
    found = [_value(name, word) for word in registry.split_words(values)]
    if not equals or "" in found or None in found or len(found) != len({str(value) for value in found}):
        raise UserError(f"--vary {words}: write {name}=VALUE,VALUE,... with different values")
    for value in found:
        recipe.check_value(name, value, f"--vary {words}: ")
    return name, found


def _value(name: str, word: str) -> Any:
    if name in registry.KINDS:
        return word
    try:
        return ast.literal_eval(word)
    except (ValueError, SyntaxError):
        return word


def sweep_points(own: Recipe, vary: Mapping[str, Sequence[Any]]) -> list[SweepPoint]:
    """The product of the axes, the last one fastest; an axis ``seed`` repeats each variant on the same rows.

    Raises:
        UserError: an unknown component, or two cells of one name.
    """
    seeds = list(vary.get("seed", [own.seed]))
    axes = {name: values for name, values in vary.items() if name != "seed"}
    base = replace(own, split_seed=seeds[0] if own.split_seed is None else own.split_seed)
    told = [name for name, values in axes.items() if len(values) > 1]
    found = []
    for values in itertools.product(*axes.values()):
        chosen = dict(zip(axes, values, strict=True))
        name = " / ".join(_word(kind, chosen[kind]) for kind in told or axes) or own.name("guide")
        for seed in seeds:
            resolved = recipe.resolve(replace(base, **chosen, seed=seed))
            place = re.sub(r"[^\w.=,-]+", "_", name).strip("_") + (f",seed={seed}" if len(seeds) > 1 else "")
            found.append(SweepPoint(name, resolved, place))
    if len({cell.place for cell in found}) < len(found):
        raise UserError("two variants have the same name; give each value once")
    return found


def _word(kind: str, value: Any) -> str:
    """A value as it was given, so that IWAE(K=5) says its K, default or not."""
    return registry.label(value) if kind in registry.KINDS else f"{kind.replace('_', ' ')} {value}"


def runnable(all_cells: list[SweepPoint], shelf: DatasetCache) -> tuple[list[SweepPoint], dict[str, str]]:
    """The cells that can be trained, and by name those that are left out with the reason.

    Raises:
        UserError: a mistake in any cell, or no cell that can be trained.
    """
    kept, refused = [], {}
    for cell in all_cells:
        try:
            preflight.check_recipe(cell.recipe, shelf[cell.recipe])
            kept.append(cell)
        except Incompatible as error:
            refused[cell.name] = str(error)
    if not kept:
        raise UserError(next(iter(refused.values())))
    return kept, refused


def train_sweep(
    wanted: list[SweepPoint],
    folder: Path,
    shelf: DatasetCache,
    pool: Workers,
    *,
    overwrite: bool = False,
    resume: bool = False,
) -> list[FittedModel]:
    """Train each cell in its own folder and return the variants in the order of the cells.

    Arguments:
        wanted: the cells.
        folder: of the comparison.
        shelf: their data.
        pool: how.
        overwrite: replace what the folders hold.
        resume: go on with what is there; what is trained is not trained again.
    """
    begun = [resume and (folder / cell.place / "recipe.toml").is_file() for cell in wanted]
    for cell, known in zip(wanted, begun, strict=True):
        run_folder.prepare_folder(folder / cell.place, cell.recipe, overwrite=overwrite, resume=known)
    if pool.jobs > 1 and len(wanted) > 1:
        _train_apart(wanted, folder, pool, begun)
        return [run_folder.load_fit(folder / c.place, shelf[c.recipe], device=pool.device, trust=True) for c in wanted]
    found = []
    for number, (cell, known) in enumerate(zip(wanted, begun, strict=True), 1):
        own = cell.recipe
        count = f" ({number} of {len(wanted)})" if len(wanted) > 1 else ""
        pool.say(f"training {_told(cell)}: {_epochs(own)}, batches of {own.batch_size}{count}")
        found.append(
            run_folder.train_in_folder(
                own,
                shelf[own],
                folder / cell.place,
                device=pool.device,
                resume=known,
                progress=pool.progress,
            )
        )
    return found


def _told(cell: SweepPoint) -> str:
    return cell.place.replace(",seed=", ", seed ")


def _epochs(own: Recipe) -> str:
    return f"{own.epochs} epoch{'' if own.epochs == 1 else 's'}"


def _train_apart(wanted: list[SweepPoint], folder: Path, pool: Workers, begun: list[bool]) -> None:
    """Train cells in processes of their own, which share the machine's threads; a signal ends them all, saved."""
    jobs = min(pool.jobs, len(wanted))
    threads = max(1, torch.get_num_threads() // jobs)
    pool.say(f"training {len(wanted)} variants, {jobs} at a time, {threads} threads each")
    spawning = multiprocessing.get_context("spawn")
    with (
        # In process groups of their own, Ctrl-C reaches them once, through this process, and not twice.
        ProcessPoolExecutor(jobs, mp_context=spawning, initializer=os.setpgrp) as workers,
        progress_bar("variants", len(wanted), wanted=pool.progress) as show,
        handle_first_signal(raise_interrupt),
    ):
        waiting, running, trained = list(zip(wanted, begun, strict=True)), dict[Any, SweepPoint](), 0
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    cell, known = waiting.pop(0)
                    place = folder / cell.place
                    job = workers.submit(_train_alone, cell, place, pool.device, pool.data_folder, known, threads)
                    running[job] = cell
                for done in wait(running, return_when=FIRST_COMPLETED).done:
                    done.result()
                    trained += 1
                    show(trained, _told(running.pop(done)))
        except TrainingInterrupt:
            for process in multiprocessing.active_children():
                process.terminate()
            raise


def _train_alone(
    cell: SweepPoint, folder: Path, device: str, data_folder: str | Path | None, resume: bool, threads: int
) -> None:
    torch.set_num_threads(threads)
    run_folder.train_in_folder(
        cell.recipe, recipe.load_recipe_data(cell.recipe, data_folder), folder, device=device, resume=resume
    )
