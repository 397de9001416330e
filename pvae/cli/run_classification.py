"""Classification with a run: calibration rows, class probabilities by Bayes' rule, and what labels say of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
import typer
from torch import Tensor

from pvae import applications
from pvae.applications import classification
from pvae.applications.classification import Classification
from pvae.cli.run_anomalies import check_words
from pvae.cli.use_context import UseContext, make_result
from pvae.data.dataset import Dataset
from pvae.errors import UserError
from pvae.experiments.class_models import class_labels, fit_class_models
from pvae.experiments.row_selection import SPLIT_LABELS
from pvae.experiments.use_results import UseResult
from pvae.reporting.application_figures import draw_confusion_matrix
from pvae.runtime.torch_state import to_numpy
from pvae.stats import number

CALIBRATION = 2000  # rows that probabilities are calibrated on, at most
FIGURES = {
    **{"accuracy": "accuracy", "log_loss": "log loss (nats)", "brier": "Brier score"},
    **{"calibration_error": "calibration error", "calibration_error_by_chance": "of it by chance"},
}


def fit_and_classify(
    context: UseContext, *, epochs: int | None = None, K: int = 16, accuracy: str | None = None
) -> UseResult:
    """Classify rows with the run's class models, which are trained first if they are not."""
    folder = context.data_folder
    models, data = fit_class_models(context.run, epochs=epochs, data_folder=folder, progress=True, say=typer.echo)
    return classify(context, models, data=data, K=K, accuracy=accuracy)


def classify(
    context: UseContext, models: Sequence[Any] | None, *, data: Dataset, K: int = 16, accuracy: str | None = None
) -> UseResult:
    """Classify rows by Bayes' rule on their evidence under a model for each class, or (None) one that takes the label.

    Validation rows of ``data`` calibrate the probabilities; its training rows give the prior of the classes.
    """
    labels, train = class_labels(data), data.train_labels
    assert train is not None
    prior = torch.bincount(torch.searchsorted(labels, train), minlength=len(labels)).double()
    score = partial(_score, context, models, data, prior, {"K": K, "accuracy": accuracy})
    held, x, y = _calibration_rows(context, data, labels)
    temperature = classification.fit_temperature(score(x, context.seed + 1).log_evidence, y, prior)
    result = score(context.rows.x, context.seed).at(temperature.mean)
    at = f"at temperature {number(temperature)}, at which {len(x)} {held} have the smallest log loss"
    sentences = [f"{context.count} into {len(labels)} classes by the evidence of each (IWAE-{result.K}), {at}."]
    if context.rows.index is not None:
        sentences.append("Models were fitted to these rows or calibrated on them: fresh rows are harder.")
    return _against_labels(context, result, labels, sentences)


def _score(
    context: UseContext,
    models: Sequence[Any] | None,
    data: Dataset,
    prior: Tensor,
    options: Mapping[str, Any],
    x: Tensor,
    seed: int,
) -> Classification:
    """Return the evidence of each class that has training rows, for rows x."""
    if models is not None:
        return applications.classify(models, x, prior=prior, seed=seed, progress=context.progress, **options)
    x = x[:, : context.run.columns]
    every = classification.classify_conditional(*context.programs, x, data.num_label_columns, seed=seed, **options)
    assert data.labels is not None  # the columns are theirs
    known = _subset(every, (slice(None), torch.isin(data.labels, class_labels(data))))
    return replace(known, log_prior=(prior / prior.sum()).log())


def _subset(result: Classification, which: Any) -> Classification:
    """Return some rows or classes of a classification."""
    of_rows = ("log_evidence", "log_evidence_se", "reliable")
    return replace(result, **{name: getattr(result, name)[which] for name in of_rows})


def _calibration_rows(context: UseContext, data: Dataset, labels: Tensor) -> tuple[str, Tensor, Tensor]:
    """Return words for the rows that probabilities are calibrated on, these rows [B, C], and their classes [B]."""
    # To validation rows no class model was fitted.
    part = "test" if context.rows.where == SPLIT_LABELS["validation"] else "validation"
    truth = getattr(data, f"{part}_labels")
    known = torch.zeros(0, dtype=torch.bool) if truth is None else torch.isin(truth, labels)
    if not known.any():
        raise UserError(f"classify calibrates on {part} rows of its classes, and there are none; hold out others")
    words = "held-out training rows" if part == "validation" else SPLIT_LABELS[part]
    y = torch.searchsorted(labels, truth[known][:CALIBRATION])
    return words, getattr(data, part)[known][:CALIBRATION], y


def _against_labels(context: UseContext, result: Classification, labels: Tensor, sentences: list[str]) -> UseResult:
    """Return predictions and probabilities, and how good they are if the rows have labels."""
    truth, where = context.rows.labels, context.rows.where
    names = [context.run.label_name(label) for label in labels.tolist()]
    arrays = {"predicted": labels[result.predicted], "probability": result.log_probabilities.exp()}
    arrays |= {"log_evidence": result.log_evidence, "reliable": result.reliable.all(1)}
    arrays |= {"row": context.rows.place} | context.labels
    sentences += check_words(result.reliable.all(1), result.K, context.rows.place)
    tables: list[Any] = []
    if truth is None:
        figure = context.strips({"row": context.x}, [names[y] for y in result.predicted.tolist()])
        sentences.append("The rows have no labels to compare with.")
    else:
        known = torch.isin(truth, labels)
        if not known.any():
            raise UserError(f"the {where} have labels that no class model knows; known are {labels.tolist()}")
        if others := int((~known).sum()):
            sentences.append(f"{others} rows have labels that no class model knows; the figures leave them out.")
        labelled, y = _subset(result, known), torch.searchsorted(labels, truth[known])
        plain, calibrated = labelled.at(1.0).summary(y), labelled.summary(y)
        lines = [[words, number(plain[name]), number(calibrated[name])] for name, words in FIGURES.items()]
        tables.append(("Against the labels", ["probabilities", "as they are", "calibrated"], lines))
        sentences.append(f"Accuracy {number(calibrated['accuracy'])}.")
        figure = draw_confusion_matrix(to_numpy(labelled.confusion(y)), names)
    use = make_result("classify", arrays, sentences, figure, tables=tables)
    if not all(name.lstrip("-").replace(".", "").isdigit() for name in names):
        use.arrays["predicted_name"] = np.array(names)[to_numpy(result.predicted)]
    return use
