"""Class models: one fitted model for each label of a run's data, trained at the first use and stored in its folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from pvae.data.dataset import Dataset
from pvae.errors import UserError, param
from pvae.experiments import sweep
from pvae.experiments.run_folder import CLASS_MODELS_DIR, cache_folder, is_trained, load_fit
from pvae.experiments.sweep import DatasetCache, RunOptions, SweepPoint
from pvae.recipes.build import FittedModel
from pvae.recipes.recipe import read_recipe
from pvae.runtime.progress import progress_bar
from pvae.runtime.signals import TrainingInterrupt

if TYPE_CHECKING:
    from pvae.experiments.run import Run

# Share of the training rows that class models are not fitted to, so that their probabilities can be calibrated.
HELD_OUT = 0.1


def class_labels(data: Dataset) -> Tensor:
    """Return the labels that have training rows, and so a model."""
    assert data.train_labels is not None
    return data.train_labels.unique()


def fit_class_models(
    run: Run,
    *,
    epochs: int | None = None,
    data_folder: str | Path | None = None,
    progress: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> tuple[list[tuple[Any, Any]] | None, Dataset]:
    """Fit a model of the run's recipe to the rows of each label, or load those that its folder holds.

    Returns:
        Program and guide for each label, or None if the run's own program takes the label; and the data with rows held
        out from the models.
    """
    _check(run)
    if run.data.num_label_columns:
        return None, run.data
    base = run.recipe
    base = replace(base, validation_size=base.validation_size or HELD_OUT, epochs=epochs or base.epochs, patience=None)
    datasets = DatasetCache(data_folder)
    labels = [int(label) for label in class_labels(datasets[base]).tolist()]
    points = sweep.sweep_points(base, {"only": [[label] for label in labels]})
    points = [replace(point, folder_name=str(label)) for point, label in zip(points, labels, strict=True)]
    folder = cache_folder(run.folder, CLASS_MODELS_DIR, f"{run.name}-{base.epochs}-epochs")
    try:
        models = _load(points, folder, datasets, run.device)
        if not models:
            say(f"training a model for each of {len(points)} classes: {base.epochs} epochs each")
            with progress_bar("classes", len(points), wanted=progress) as show:
                numbers = iter(range(len(points)))
                options = RunOptions(folder, run.device, say=lambda line: show(next(numbers), line.split(",")[0]))
                models = sweep.train_sweep(points, options, datasets, resume=True)
                show(len(points), "")
    except TrainingInterrupt as error:
        message = f"stopped; what is trained is kept in {folder}; the same command goes on"
        raise TrainingInterrupt(message, error.signal) from None
    return [(model.model, model.guide) for model in models], datasets[base]


def _check(run: Run) -> None:
    """Refuse a run whose rows can't be classified by evidence."""
    labels = run.data.train_labels
    if run.guide.family.point_mass:
        family, use = run.recipe.name("family"), param("family")
        raise UserError(f"classify needs evidence, and family {family} has none; fit with another {use}")
    if labels is None or len(class_labels(run.data)) < 2:
        hint = "give its rows a column 'label' (.csv, .parquet) or an array y (.npz)"
        number = "none" if labels is None else "one alone"
        raise UserError(f"classify needs labels, and {run.recipe.data} has {number}", hint)
    if run.data.num_label_columns and not len(run.data.validation):
        hint = f"fit with {param('validation_size', 0.1)}"
        raise UserError("classify calibrates on rows that the program has not seen", hint)


def _load(points: Sequence[SweepPoint], folder: Path, datasets: DatasetCache, device: str) -> list[FittedModel]:
    """Return the class models of a folder, if all of them are trained to their end."""
    pairs = [(folder / point.folder_name, point.recipe) for point in points]
    if not all(is_trained(path) and read_recipe(path, trust=True) == recipe for path, recipe in pairs):
        return []
    models = [load_fit(path, datasets[recipe], device=device, trust=True) for path, recipe in pairs]
    return models if all(len(model.fit.history) == model.recipe.epochs for model in models) else []
