"""Uses of an opened run that decide about rows: anomalous or not, and of which class."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pvae import applications
from pvae.applications import classification
from pvae.applications.classification import Classification
from pvae.cli.use_context import UseContext
from pvae.data.dataset import Dataset
from pvae.errors import UserError
from pvae.experiments import run_folder, sweep
from pvae.experiments.opened_run import SPLIT_LABELS, Run
from pvae.experiments.use_results import UseResult
from pvae.recipes import recipe
from pvae.recipes.build import FittedModel
from pvae.reporting.application_figures import draw_confusion_matrix, draw_strips
from pvae.runtime.progress import progress_bar
from pvae.runtime.signals import TrainingInterrupt
from pvae.stats import Estimate, number
from pvae.training import checkpoints

# Training rows that class models are not fitted to, so that their probabilities can be calibrated; most of these.
HELD_OUT, CALIBRATION = 0.1, 2000


def classify(asked: UseContext, models: Sequence[Any] | None, *, data: Dataset, K: int = 16) -> UseResult:
    """The class of each row by Bayes' rule on its evidence under a program for each class, or one for all of them.

    Arguments:
        models: program and guide for each class; None for a program that takes the label.
        data: whose validation rows no class model was fitted to, and whose training rows tell how frequent classes are.
        K: draws for each row and class.
    """
    kinds, train = _kinds(data), data.train_labels
    assert train is not None
    prior = torch.bincount(torch.searchsorted(kinds, train), minlength=len(kinds)).double()

    def judged(x: Tensor, seed: int) -> Classification:
        if models is not None:
            return applications.classify(models, x, prior=prior, K=K, seed=seed, progress=asked.progress)
        own = x[:, : asked.run.columns]
        every = classification.evidence_by_label(*asked.programs, own, data.num_label_columns, K=K, seed=seed)
        assert data.labels is not None  # the columns are theirs
        return _of_classes(every, torch.isin(data.labels, kinds), prior)

    part, held, known = _calibrating(asked, data, kinds)
    temperature = classification.fit_temperature(judged(held, asked.seed + 1).log_evidence, known, prior)
    found = judged(asked.rows.x, asked.seed).at(temperature.mean)
    return _classified(asked, found, temperature, f"{len(held)} {part}", kinds)


def _of_classes(found: Classification, which: Tensor, prior: Tensor) -> Classification:
    """The same evidence of some classes alone: those with training rows."""
    kept = {name: getattr(found, name)[:, which] for name in ("log_evidence", "log_evidence_se")}
    return replace(found, **kept, log_prior=(prior / prior.sum()).log())


def _calibrating(asked: UseContext, data: Dataset, kinds: Tensor) -> tuple[str, Tensor, Tensor]:
    """In words what probabilities are calibrated on; these rows [B, C], and which of the kinds each is of [B].

    They are validation rows, to which no class model was fitted; where these are to be judged, test rows.
    """
    part = "test" if asked.rows.where == SPLIT_LABELS["validation"] else "validation"
    labels = getattr(data, f"{part}_labels")
    known = torch.zeros(0, dtype=torch.bool) if labels is None else torch.isin(labels, kinds)
    if not known.any():
        raise UserError(f"classify calibrates on {part} rows of its classes, and there are none; hold out others")
    words = "held-out training rows" if part == "validation" else SPLIT_LABELS[part]
    y = torch.searchsorted(kinds, labels[known][:CALIBRATION])
    return words, getattr(data, part)[known][:CALIBRATION], y


def _classified(asked: UseContext, found: Classification, temperature: Estimate, held: str, kinds: Tensor) -> UseResult:
    told = [
        f"{len(asked.x)} {asked.rows.where} into {len(kinds)} classes by the evidence of each (IWAE-{found.K}), at "
        f"temperature {number(temperature)}, at which {held} have the smallest log loss."
    ]
    if asked.rows.index is not None:
        told.append("Models were fitted to these rows or calibrated on them: of fresh rows they know less.")
    arrays = {"predicted": kinds[found.predicted], "probability": found.log_probabilities.exp()}
    arrays |= {"log_evidence": found.log_evidence, "row": asked.rows.place}
    labels = asked.rows.labels
    names = [asked.run.label_name(kind) for kind in kinds.tolist()]
    if labels is None:
        figure = draw_strips(
            {"row": asked.x.numpy()}, asked.run.data.shape, [names[y] for y in found.predicted.tolist()]
        )
        told.append("The rows have no labels to judge this by.")
        return UseResult("classify", _with_names(_plain(arrays), found, names), told, figure=figure)
    known = torch.isin(labels, kinds)
    if not known.any():
        raise UserError(f"the {asked.rows.where} have labels that no class model knows; known are {kinds.tolist()}")
    if others := int((~known).sum()):
        told.append(f"{others} rows have labels that no class model knows; what follows is of the others.")
    y = torch.searchsorted(kinds, labels[known])
    judged = replace(found, log_evidence=found.log_evidence[known], log_evidence_se=found.log_evidence_se[known])
    plain, calibrated = judged.at(1.0).summary(y), judged.summary(y)
    lines = [[words, number(plain[name]), number(calibrated[name])] for name, words in FIGURES.items()]
    told.append(f"Accuracy {number(calibrated['accuracy'])}.")
    table = ("Against the labels", ["probabilities", "as they are", "calibrated"], lines)
    figure = draw_confusion_matrix(judged.confusion(y).numpy(), names)
    return UseResult("classify", _with_names(_plain(arrays | {"label": labels}), found, names), told, [table], figure)


def _with_names(arrays: dict[str, np.ndarray], found: Classification, names: list[str]) -> dict[str, np.ndarray]:
    """The arrays, with predicted classes in words where the run's labels are words."""
    if all(name.lstrip("-").replace(".", "").isdigit() for name in names):
        return arrays
    return arrays | {"predicted_name": np.array(names)[found.predicted.numpy()]}


FIGURES = {
    "accuracy": "accuracy",
    "log_loss": "log loss (nats)",
    "brier": "Brier score",
    "calibration_error": "calibration error",
    "calibration_error_by_chance": "of it by chance",
}


def class_models(
    run: Run,
    *,
    epochs: int | None = None,
    data_folder: str | Path | None = None,
    progress: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> tuple[list[tuple[Any, Any]] | None, Dataset]:
    """A program and guide for each class of a run's data, of the run's recipe; what is trained is kept in its folder.

    Arguments:
        run: whose recipe is taken.
        epochs: of each class model; the run's unless given.
        data_folder, progress, say: where data sets are, whether to show bars, and who takes lines.

    Returns:
        The models, or None where the run's own program takes the label; and the data with rows held out from them.

    Raises:
        UserError: the data have no labels, or one alone.
    """
    own = run.variant.recipe
    if run.guide.family.point_mass:
        raise UserError(f"classify needs evidence, and family {own.name('family')} has none; fit with another --family")
    if run.data.train_labels is None or len(_kinds(run.data)) < 2:
        has = "none" if run.data.train_labels is None else "one alone"
        raise UserError(
            f"classify needs labels, and {own.data} has {has}; give its rows a column 'label' (.csv, .parquet) or an "
            "array y (.npz)"
        )
    if run.data.num_label_columns:
        if not len(run.data.validation):
            raise UserError("classify calibrates on rows that the program has not seen; fit with --validation-size 0.1")
        return None, run.data
    own = replace(own, validation_size=own.validation_size or HELD_OUT, epochs=epochs or own.epochs, patience=None)
    shelf = sweep.DatasetCache(data_folder)
    data = shelf[own]
    labels = [int(kind) for kind in _kinds(data).tolist()]
    cells = sweep.sweep_points(own, {"only": [[label] for label in labels]})
    cells = [replace(cell, place=str(label)) for cell, label in zip(cells, labels, strict=True)]
    folder = run.folder / run_folder.CLASS_MODELS_DIR / f"{run.name}-{own.epochs}-epochs".replace("/", "_")
    try:
        found = _fitted(cells, folder, shelf, run.device)
        if not found:
            say(f"training a model for each of {len(cells)} classes: {own.epochs} epochs each")
            found = _trained(cells, folder, shelf, run, data_folder, progress)
    except TrainingInterrupt as error:
        words = f"stopped; what is trained is kept in {folder}; the same command goes on"
        raise TrainingInterrupt(words, error.signal) from None
    return [(each.model, each.guide) for each in found], data


def _trained(
    cells: list[sweep.SweepPoint],
    folder: Path,
    shelf: sweep.DatasetCache,
    run: Run,
    data_folder: str | Path | None,
    progress: bool,
) -> list[FittedModel]:
    """Class models, trained as far as they are not yet."""
    with progress_bar("classes", len(cells), wanted=progress) as show:
        begun = iter(range(len(cells)))
        pool = sweep.Workers(
            device=run.device, data_folder=data_folder, say=lambda line: show(next(begun), line.split(",")[0])
        )
        found = sweep.train_sweep(cells, folder, shelf, pool, resume=True)
        show(len(cells), "")
    return found


def _fitted(
    cells: Sequence[sweep.SweepPoint], folder: Path, shelf: sweep.DatasetCache, device: str
) -> list[FittedModel]:
    """The class models of a folder, if all of them are trained to their end."""
    places = [folder / cell.place for cell in cells]
    if not all(
        (place / checkpoints.FILE).is_file() and recipe.read(place, trust=True) == cell.recipe
        for place, cell in zip(places, cells, strict=True)
    ):
        return []
    found = [
        run_folder.load_fit(p, shelf[c.recipe], device=device, trust=True) for p, c in zip(places, cells, strict=True)
    ]
    return found if all(len(own.fit.history) == own.recipe.epochs for own in found) else []


def _kinds(data: Dataset) -> Tensor:
    """The labels that have training rows, and so a model."""
    assert data.train_labels is not None
    return data.train_labels.unique()


def _plain(arrays: dict[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: values.detach().cpu().numpy() for name, values in arrays.items()}
