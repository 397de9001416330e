"""A run folder: a recipe, its checkpoint and the results made of them; prepared, trained in and loaded again."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from pvae.data.dataset import Dataset
from pvae.errors import UserError, param
from pvae.recipes import registry
from pvae.recipes.build import FittedModel, build_model, fit_recipe
from pvae.recipes.recipe import Recipe, read_recipe, read_recipe_file, write_recipe
from pvae.runtime.torch_state import pick_device
from pvae.training import checkpoints
from pvae.training.loop import Fit

RECIPE = "recipe.toml"
RESULTS = ("history.csv", "results.json", "idata.nc", "report.html", "diagnosis.json")
# Folders of cached results, of the applications' results, and of class models.
CLASS_MODELS_DIR = "classes"
CACHE_DIRS = ("evaluation", "diagnosis", "uses", CLASS_MODELS_DIR)


def prepare_folder(
    folder: Path, recipe: Recipe, vary: Mapping[str, list[Any]] = {}, *, overwrite: bool = False, resume: bool = False
) -> None:
    """Prepare a folder for the run of a resolved recipe, with the axes of a comparison, and write the recipe there."""
    if overwrite and resume:
        raise UserError(f"{param('overwrite', True)} and {param('resume', True)} exclude each other")
    label = param("out", folder)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{label} is a file; name a folder")
    holds_run = (folder / RECIPE).is_file()
    if resume:
        _check_same(folder, recipe, dict(vary))
    elif holds_run and not overwrite:
        ways = f"give {param('overwrite', True)}, {param('resume', True)} or another {param('out')}"
        raise UserError(f"{label} holds a run", ways)
    elif holds_run:
        _clear(folder)
    elif folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{label} holds files that are not a run's; name another folder")
    write_recipe(recipe, folder, dict(vary))


def _check_same(folder: Path, recipe: Recipe, vary: dict[str, list[Any]]) -> None:
    # Code that the folder's recipe names does not run: only the recipe at hand is built.
    stored, axes, _ = read_recipe_file(folder / RECIPE, trust=True)
    label, hint = f"{param('resume', True)}: {folder}", f"give the same values, or another {param('out')}"
    if bool(axes) != bool(vary):
        stored_kind, kind = ("compare's" if keys else "fit's" for keys in (axes, vary))
        raise UserError(f"{label} is {stored_kind}, not {kind}; name another folder")
    if axes != vary:
        raise UserError(f"{label} varies {axes}, but now {vary}", hint)
    for name, value in vars(recipe).items():
        if value != (before := getattr(stored, name)):
            raise UserError(f"{label} was made with {name} = {before}, but now it is {value}", hint)


def _clear(folder: Path) -> None:
    """Remove the files that pvae wrote, and nothing else."""
    names = (RECIPE, checkpoints.FILE, checkpoints.STATE, *RESULTS)
    for path in (*(folder / name for name in names), *folder.glob("idata-*.nc")):
        path.unlink(missing_ok=True)
    checkpoints.remove(folder)
    for name in CACHE_DIRS:
        shutil.rmtree(folder / name, ignore_errors=True)
    for inner in folder.iterdir():
        if inner.is_dir() and (inner / RECIPE).is_file():
            shutil.rmtree(inner)


def train_in_folder(
    untrained: FittedModel, data: Dataset, folder: Path, *, resume: bool = False, **options: Any
) -> FittedModel:
    """Fit a model in its prepared folder by `fit_recipe`; with ``resume`` from the folder's checkpoint, if any."""
    return fit_recipe(untrained, data, folder=folder, resume=resume and is_trained(folder), **options)


def is_trained(folder: Path) -> bool:
    """Return whether a folder holds a checkpoint, of a training that may be unfinished."""
    return (folder / checkpoints.FILE).is_file()


def load_fit(
    folder: Path, data: Dataset, *, device: str = "auto", trust: bool = False, untrained: FittedModel | None = None
) -> FittedModel:
    """Load the fitted model of a run folder: a new one, or ``untrained``, which takes the parameters."""
    recipe = untrained.recipe if untrained else read_recipe(folder, trust=trust)
    tensors, header = checkpoints.read(folder)
    if header["digest"] != data.digest:
        raise UserError(f"{folder} was fitted to other rows than {data.identity} has now; fit it anew")
    model = untrained or build_model(recipe, data)
    tensors = checkpoints.best_params(tensors) or tensors
    for kind, module in model.modules.items():
        checkpoints.load_module(module, kind, tensors, folder)
        module.to(pick_device(device)).eval()
    return replace(model, fit=Fit.from_header(header))


def unfinished_note(fitted: FittedModel) -> str:
    """Return how many epochs of a stopped training are left, in words; empty for a finished one."""
    done, wanted, resume = len(fitted.fit.history), fitted.recipe.epochs or 0, param("resume", True)
    if done >= wanted or fitted.fit.stopped == "early":
        return ""
    return f"has had {done} of its {wanted} epochs; the command that began it with {resume} trains the rest"


def count_parameters(fitted: FittedModel) -> dict[str, int]:
    """Count trained numbers: global ones, shared by all rows, and local ones, the rows' variational parameters."""
    shared = {id(p): p.numel() for module in fitted.modules.values() for p in module.parameters() if p.requires_grad}
    table = getattr(fitted.guide, "table", torch.empty(0))
    return {"global": sum(shared.values()), "local": table.numel()}


def fingerprint(fitted: FittedModel) -> str:
    """Return the SHA-256 of a fit, first 16 hex digits: of its parameters, its recipe, and the code that this names."""
    recipe = fitted.recipe
    words = asdict(recipe) | {kind: registry.with_old_words(getattr(recipe, kind)) for kind in registry.KINDS}
    digest = hashlib.sha256(json.dumps(words, sort_keys=True, default=str).encode())
    digest.update("".join(registry.source_code(getattr(recipe, kind)) for kind in registry.KINDS).encode())
    for module in fitted.modules.values():
        for name, values in module.state_dict().items():
            digest.update(f"{name}{tuple(values.shape)}".encode())
            digest.update(values.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def folder_name(name: str) -> str:
    """Return the folder name of a variant.

    >>> folder_name("MLP(hidden=[8, 4]) / latent 2")
    'MLP_hidden=_8,_4_latent_2'
    """
    return re.sub(r"[^\w.=,-]+", "_", name).strip("_")


def cache_folder(folder: Path, kind: str, name: str) -> Path:
    """Return the folder of a variant's cached results of a kind: of `CACHE_DIRS`; folders of version 0.1 are found."""
    before = (re.sub(r"[^\w.=,()+-]", "_", name), name.replace("/", "_"))
    return next((path for old in before if (path := folder / kind / old).is_dir()), folder / kind / folder_name(name))
