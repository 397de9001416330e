"""Run folders: a recipe, its checkpoint and what was made of them; prepared, trained and loaded again."""

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
from pvae.errors import UserError
from pvae.recipes import recipe, registry
from pvae.recipes.build import FittedModel, build_model, fit_recipe
from pvae.recipes.recipe import Recipe
from pvae.runtime.torch_state import pick_device
from pvae.training import checkpoints
from pvae.training.loop import Fit

FILES = (
    "recipe.toml",
    "checkpoint.safetensors",
    "state.json",
    "history.csv",
    "results.json",
    "idata.nc",
    "report.html",
    "diagnosis.json",
)
# Folders of finished parts, which a longer job goes on from, and of what the run was used for.
CLASS_MODELS_DIR = "classes"
CACHE_DIRS = ("evaluation", "diagnosis", "uses", CLASS_MODELS_DIR)


def prepare_folder(
    folder: Path,
    own: Recipe,
    vary: Mapping[str, list[Any]] | None = None,
    *,
    overwrite: bool = False,
    resume: bool = False,
) -> None:
    """Make a folder ready for a run of a resolved recipe, and write the recipe there.

    Raises:
        UserError: the folder holds something else, can't be written to, or is to be resumed with another recipe.
    """
    if overwrite and resume:
        raise UserError("--overwrite and --resume exclude each other")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out {folder} is a file; name a folder")
    holds_run = (folder / "recipe.toml").is_file()
    if resume:
        _check_same(folder, own, dict(vary or {}))
    elif holds_run and not overwrite:
        raise UserError(f"--out {folder} holds a run; give --overwrite, --resume or another --out")
    elif holds_run:
        _clear(folder)
    elif folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"--out {folder} holds files that are not a run's; name another folder")
    recipe.write_recipe(own, folder, dict(vary or {}))


def _check_same(folder: Path, own: Recipe, vary: dict[str, list[Any]]) -> None:
    # Nothing of it is run: what is built is the recipe at hand.
    there, axes, _ = recipe.read_recipe_file(folder / "recipe.toml", trust=True)
    if bool(axes) != bool(vary):
        kinds = {True: "compare's", False: "fit's"}
        raise UserError(f"--resume: {folder} is {kinds[bool(axes)]}, not {kinds[bool(vary)]}; name another --out")
    if axes != vary:
        raise UserError(f"--resume: {folder} varies {axes}, but now {vary}; give the same flags, or another --out")
    for name, value in vars(own).items():
        if value != getattr(there, name):
            raise UserError(
                f"--resume: {folder} was made with {name.replace('_', '-')} = {getattr(there, name)}, but now it is "
                f"{value}; give the same flags, or another --out"
            )


def _clear(folder: Path) -> None:
    """Remove what pvae wrote, and nothing else."""
    for name in FILES:
        (folder / name).unlink(missing_ok=True)
    for further in folder.glob("idata-*.nc"):
        further.unlink()
    checkpoints.remove(folder)
    for name in CACHE_DIRS:
        shutil.rmtree(folder / name, ignore_errors=True)
    for inner in folder.iterdir():
        if inner.is_dir() and (inner / "recipe.toml").is_file():
            shutil.rmtree(inner)


def train_in_folder(
    own: Recipe, data: Dataset, folder: Path, *, device: str = "auto", resume: bool = False, progress: bool = False
) -> FittedModel:
    """Fit a resolved recipe in its prepared folder."""
    resumed = resume and (folder / checkpoints.FILE).is_file()
    return fit_recipe(build_model(own, data), data, device=device, folder=folder, resume=resumed, progress=progress)


def load_fit(folder: Path, data: Dataset, *, device: str = "auto", trust: bool = False) -> FittedModel:
    """The fitted variant of a run folder.

    Arguments:
        trust: run the code of files that the recipe names.

    Raises:
        UserError: no run, or a checkpoint that is broken, of another model or of other data.
    """
    own = recipe.read_recipe(folder, trust=trust)
    tensors, header = checkpoints.read(folder)
    if header["digest"] != data.digest:
        raise UserError(f"{folder} was fitted to other rows than {data.identity} has now; fit it anew")
    built = build_model(own, data)
    tensors = checkpoints.best_params(tensors) or tensors
    for kind, module in built.modules.items():
        checkpoints.load_module(module, kind, tensors, folder)
        module.to(pick_device(device)).eval()
    return replace(built, fit=Fit(header["history"], header["seconds"], header["stopped"], header.get("engine", "")))


def unfinished_note(variant: FittedModel) -> str:
    """What is left of a training that was stopped, in words; empty where nothing is."""
    done, wanted = len(variant.fit.history), variant.recipe.epochs or 0
    if done >= wanted or variant.fit.stopped == "early":
        return ""
    return f"has had {done} of its {wanted} epochs; the command that began it with --resume trains the rest"


def count_parameters(variant: FittedModel) -> dict[str, int]:
    """How many numbers are trained: shared by all datapoints, and of the datapoints' own."""
    shared = {id(p): p.numel() for module in variant.modules.values() for p in module.parameters() if p.requires_grad}
    table = getattr(variant.guide, "table", torch.empty(0))
    return {"global": sum(shared.values()), "local": table.numel()}


def fingerprint(variant: FittedModel) -> str:
    """SHA-256 of a fit, first 16 hex digits: its numbers, its recipe, and the code of files that this names.

    What was found under another one is not of this fit.
    """
    own = variant.recipe
    found = hashlib.sha256(json.dumps(asdict(own), sort_keys=True, default=str).encode())
    found.update("".join(registry.source_code(getattr(own, kind)) for kind in registry.KINDS).encode())
    for module in variant.modules.values():
        for name, values in module.state_dict().items():
            found.update(f"{name}{tuple(values.shape)}".encode())
            found.update(values.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


def folder_name(name: str) -> str:
    """The folder of a variant's parts."""
    return re.sub(r"[^\w=.,()+-]", "_", name)
