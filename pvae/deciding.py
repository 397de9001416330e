"""Uses of an opened run that decide about rows: anomalous or not, and of which class."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pvae import checkpoints, classes, grid, opened, recipe, runs, uses
from pvae.anomalies import Anomalies
from pvae.classes import Classified
from pvae.console import bar
from pvae.data import Dataset
from pvae.errors import UserError
from pvae.opened import WORDS, Chosen, Opened
from pvae.stats import Estimate, number
from pvae.stopping import Interrupted
from pvae.use_pictures import confusions, scores, strips
from pvae.used import Use
from pvae.using import Asked

__all__ = ["anomalies", "class_models", "classify", "with_others"]

# Training rows that class models are not fitted to, so that their probabilities can be calibrated; most of these.
HELD_OUT, CALIBRATION = 0.1, 2000
EVERY = "test rows of all labels"
UNITS = {"distance": "sd²", "neighbours": "u"}


def with_others(run: Opened, data_folder: str | Path | None = None) -> Chosen:
    """The test rows of a run; of one that was trained on some labels alone, those of all other labels too.

    The place of rows of other labels is -1. A program that takes the label has no columns for others.
    """
    own = run.variant.recipe
    if own.only is None or run.data.classes:
        return opened.chosen(run)
    every = recipe.load_data(replace(own, only=None), data_folder)
    assert every.test_labels is not None  # else none could be kept
    known = torch.isin(every.test_labels, torch.tensor(own.only))
    return Chosen(every.test, every.test_labels, None, EVERY, torch.where(known, known.cumsum(0) - 1, -1))


def anomalies(
    asked: Asked,
    *,
    named: Sequence[str] | None = None,
    chosen: Sequence[str] | None = None,
    K: int = 16,
    false_alarm: float = 0.05,
) -> Use:
    """How unlike held-out normal rows the rows are, by each score, and which lie beyond its threshold.

    Arguments:
        named: labels that count as anomalous; unless given those that the run was not trained on, or of a file 1.
        chosen: names of the scores.
        K: draws for each row.
        false_alarm: share of normal rows that may be flagged.

    Returns:
        Scores, p-values and flags of the rows that are scored. ``row`` is their position in the file or in the run's
        own rows, as ``--select`` counts it, -1 for rows of other labels; ``row_of_all`` that among the test rows of all
        labels.
    """
    anomalous = None if named is None else [_label(asked.run, word) for word in named]
    truth = _anomalous(asked, anomalous)
    reference, scored = _reference(asked, anomalous)
    told_of = _told_of(asked, anomalous)
    place = (scored & told_of).nonzero()[:, 0]
    rows, truth = asked.rows.at(place), None if truth is None else truth[place]
    found = uses.anomalies(
        *asked.programs,
        rows.x,
        rows.index,
        reference=reference,
        scores=chosen,
        K=K,
        false_alarm=false_alarm,
        **asked.options,
    )
    figures = found.figures(truth) if truth is not None and truth.any() and not truth.all() else {}
    told = _told_anomalies(found, len(reference), rows, truth, int((~told_of).sum()))
    arrays: dict[str, Tensor] = {"row": rows.place, **({"row_of_all": place} if rows.where == EVERY else {})}
    arrays |= found.scores | {f"flagged_{name}": found.flagged(name) for name in found.scores}
    arrays |= {f"p_{name}": found.p_values(name) for name in found.scores}
    arrays |= {} if truth is None else {"anomalous": truth}
    drawn = {
        f"{name} ({UNITS.get(name, 'nats')})": (own.numpy(), found.reference[name].numpy(), found.thresholds[name])
        for name, own in found.scores.items()
    }
    figure = scores(drawn, None if truth is None else truth.numpy())
    if not found.comparable:
        own, other = (100 * share.mean().item() for share in found.missing)
        told.append(
            f"Rows lack {own:.2g}% of their entries, the reference {other:.2g}%; scores add up what is there, so that "
            "rows with more gaps seem more normal."
        )
    tables = [_table(found, figures)]
    return Use("anomalies", _plain(arrays), told, tables, figure)


def _reference(asked: Asked, anomalous: Sequence[float] | None) -> tuple[Tensor, Tensor]:
    """Held-out normal rows [R, C], and which of the given rows are none of them, [B].

    They are validation rows; where there are none or these are given, test rows that are not given. Where all of these
    are given, every other one is reference and is not scored.
    """
    data, rows = asked.run.data, asked.rows
    part = "validation" if len(data.validation) and rows.where != WORDS["validation"] else "test"
    held, labels = getattr(data, part), getattr(data, f"{part}_labels")
    normal = torch.ones(len(held), dtype=torch.bool)
    if anomalous is not None and labels is not None:
        normal = ~torch.isin(labels, torch.tensor(anomalous))
    if part == "validation" or rows.where not in (WORDS["test"], EVERY):
        return held[normal], torch.ones(len(rows.x), dtype=torch.bool)
    used = normal.clone()
    used[rows.place[rows.place >= 0]] = False
    if not used.any():
        used = normal & (normal.cumsum(0) % 2 == 0)
    return held[used], (rows.place < 0) | ~used[rows.place.clamp(min=0)]


def _anomalous(asked: Asked, given: Sequence[float] | None) -> Tensor | None:
    """Which rows are known to be anomalous, [B], if anything is known."""
    only, rows = asked.run.variant.recipe.only, asked.rows
    if given is not None:
        if rows.labels is None:
            raise UserError(f"--anomalous: the {rows.where} have no labels")
        if missing := set(given) - set(rows.labels.tolist()):
            raise UserError(
                f"--anomalous: no row has label {min(missing):g}; there are {rows.labels.unique().tolist()}"
            )
        return torch.isin(rows.labels, torch.tensor(list(given)))
    if rows.labels is None:
        return None
    if only is not None:
        return ~torch.isin(rows.labels, torch.tensor(only))
    return rows.labels == 1 if set(rows.labels.tolist()) == {0, 1} and not rows.from_run else None


def _label(run: Opened, word: str) -> float:
    """A label as a number: one of the run's, or of a file's own."""
    try:
        return float(word) if run.data.label_names is None else run.label_of(word)
    except ValueError:
        raise UserError(f"--anomalous: '{word}' is no label; the labels are numbers") from None


def _told_of(asked: Asked, anomalous: Sequence[float] | None) -> Tensor:
    """Rows whose kind is told, [B]: where anomalous labels are named, others that the run does not know are neither."""
    only, labels = asked.run.variant.recipe.only, asked.rows.labels
    if anomalous is None or only is None or labels is None:
        return torch.ones(len(asked.rows.x), dtype=torch.bool)
    return torch.isin(labels, torch.tensor([*only, *anomalous]))


def _told_anomalies(found: Anomalies, held: int, rows: Chosen, truth: Tensor | None, others: int) -> list[str]:
    expected = found.expected
    told = [
        f"{len(rows.x)} {rows.where} against {held} held-out normal rows; a row is flagged beyond a "
        f"threshold that {100 * expected.mean:.2g} ± {100 * expected.se:.2g}% of fresh normal rows exceed."
    ]
    if others:
        told.append(f"{others} rows of labels that are neither the run's nor named anomalous are left out.")
    for reason in dict.fromkeys(found.left_out.values()):
        told.append(f"Left out: {', '.join(n for n, why in found.left_out.items() if why == reason)} ({reason}).")
    if truth is None:
        told.append(
            "Which rows are anomalous is not known; with labels (--anomalous) the scores themselves are judged."
        )
    elif truth.all() or not truth.any():
        told.append(f"All rows are {'anomalous' if truth.all() else 'normal'}: no AUROC without rows of both kinds.")
    return told


def _table(found: Anomalies, figures: dict[str, Estimate]) -> tuple[str, list[str], list[list[str]]]:
    """A line for each score."""
    header = ["score", "threshold", *(["AUROC", "detected", "false alarms"] if figures else ["flagged"])]
    lines = []
    for name in found.scores:
        known = [number(figures[f"{what}[{name}]"]) for what in ("auroc", "detected", "false_alarms") if figures]
        flagged = known or [str(int(found.flagged(name).sum()))]
        lines.append([name, f"{found.thresholds[name]:.4g} {UNITS.get(name, 'nats')}", *flagged])
    return "Scores, higher for what is more anomalous", header, lines


def classify(asked: Asked, models: Sequence[Any] | None, *, data: Dataset, K: int = 16) -> Use:
    """The class of each row by Bayes' rule on its evidence under a program for each class, or one for all of them.

    Arguments:
        models: program and guide for each class; None for a program that takes the label.
        data: whose validation rows no class model was fitted to, and whose training rows tell how frequent classes are.
        K: draws for each row and class.
    """
    kinds, train = _kinds(data), data.train_labels
    assert train is not None
    prior = torch.bincount(torch.searchsorted(kinds, train), minlength=len(kinds)).double()

    def judged(x: Tensor, seed: int) -> Classified:
        if models is not None:
            return uses.classify(models, x, prior=prior, K=K, seed=seed, progress=asked.progress)
        own = x[:, : asked.run.columns]
        every = classes.by_label(*asked.programs, own, data.classes, K=K, seed=seed)
        assert data.kinds is not None  # the columns are theirs
        return _of_classes(every, torch.isin(data.kinds, kinds), prior)

    part, held, known = _calibrating(asked, data, kinds)
    temperature = classes.calibrated(judged(held, asked.seed + 1).log_evidence, known, prior)
    found = judged(asked.rows.x, asked.seed).at(temperature.mean)
    return _classified(asked, found, temperature, f"{len(held)} {part}", kinds)


def _of_classes(found: Classified, which: Tensor, prior: Tensor) -> Classified:
    """The same evidence of some classes alone: those with training rows."""
    kept = {name: getattr(found, name)[:, which] for name in ("log_evidence", "log_evidence_se")}
    return replace(found, **kept, log_prior=(prior / prior.sum()).log())


def _calibrating(asked: Asked, data: Dataset, kinds: Tensor) -> tuple[str, Tensor, Tensor]:
    """In words what probabilities are calibrated on; these rows [B, C], and which of the kinds each is of [B].

    They are validation rows, to which no class model was fitted; where these are to be judged, test rows.
    """
    part = "test" if asked.rows.where == WORDS["validation"] else "validation"
    labels = getattr(data, f"{part}_labels")
    known = torch.zeros(0, dtype=torch.bool) if labels is None else torch.isin(labels, kinds)
    if not known.any():
        raise UserError(f"classify calibrates on {part} rows of its classes, and there are none; hold out others")
    words = "held-out training rows" if part == "validation" else WORDS[part]
    y = torch.searchsorted(kinds, labels[known][:CALIBRATION])
    return words, getattr(data, part)[known][:CALIBRATION], y


def _classified(asked: Asked, found: Classified, temperature: Estimate, held: str, kinds: Tensor) -> Use:
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
        figure = strips({"row": asked.x.numpy()}, asked.run.data.shape, [names[y] for y in found.predicted.tolist()])
        told.append("The rows have no labels to judge this by.")
        return Use("classify", _with_names(_plain(arrays), found, names), told, figure=figure)
    known = torch.isin(labels, kinds)
    if not known.any():
        raise UserError(f"the {asked.rows.where} have labels that no class model knows; known are {kinds.tolist()}")
    if others := int((~known).sum()):
        told.append(f"{others} rows have labels that no class model knows; what follows is of the others.")
    y = torch.searchsorted(kinds, labels[known])
    judged = replace(found, log_evidence=found.log_evidence[known], log_evidence_se=found.log_evidence_se[known])
    plain, calibrated = judged.at(1.0).figures(y), judged.figures(y)
    lines = [[words, number(plain[name]), number(calibrated[name])] for name, words in FIGURES.items()]
    told.append(f"Accuracy {number(calibrated['accuracy'])}.")
    table = ("Against the labels", ["probabilities", "as they are", "calibrated"], lines)
    figure = confusions(judged.confusion(y).numpy(), names)
    return Use("classify", _with_names(_plain(arrays | {"label": labels}), found, names), told, [table], figure)


def _with_names(arrays: dict[str, np.ndarray], found: Classified, names: list[str]) -> dict[str, np.ndarray]:
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
    run: Opened,
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
    if run.data.classes:
        if not len(run.data.validation):
            raise UserError("classify calibrates on rows that the program has not seen; fit with --validation-size 0.1")
        return None, run.data
    own = replace(own, validation_size=own.validation_size or HELD_OUT, epochs=epochs or own.epochs, patience=None)
    shelf = grid.Shelf(data_folder)
    data = shelf[own]
    labels = [int(kind) for kind in _kinds(data).tolist()]
    cells = grid.cells(own, {"only": [[label] for label in labels]})
    cells = [replace(cell, place=str(label)) for cell, label in zip(cells, labels, strict=True)]
    folder = run.folder / runs.CLASSES / f"{run.name}-{own.epochs}-epochs".replace("/", "_")
    try:
        found = _fitted(cells, folder, shelf, run.device)
        if not found:
            say(f"training a model for each of {len(cells)} classes: {own.epochs} epochs each")
            found = _trained(cells, folder, shelf, run, data_folder, progress)
    except Interrupted as error:
        words = f"stopped; what is trained is kept in {folder}; the same command goes on"
        raise Interrupted(words, error.signal) from None
    return [(each.built.program.model, each.built.guide) for each in found], data


def _trained(
    cells: list[grid.Cell],
    folder: Path,
    shelf: grid.Shelf,
    run: Opened,
    data_folder: str | Path | None,
    progress: bool,
) -> list[runs.Variant]:
    """Class models, trained as far as they are not yet."""
    with bar("classes", len(cells), wanted=progress) as show:
        begun = iter(range(len(cells)))
        pool = grid.Pool(
            device=run.device, data_folder=data_folder, say=lambda line: show(next(begun), line.split(",")[0])
        )
        found = grid.train(cells, folder, shelf, pool, resume=True)
        show(len(cells), "")
    return found


def _fitted(cells: Sequence[grid.Cell], folder: Path, shelf: grid.Shelf, device: str) -> list[runs.Variant]:
    """The class models of a folder, if all of them are trained to their end."""
    places = [folder / cell.place for cell in cells]
    if not all(
        (place / checkpoints.FILE).is_file() and recipe.read(place, trust=True) == cell.recipe
        for place, cell in zip(places, cells, strict=True)
    ):
        return []
    found = [runs.load(p, shelf[c.recipe], device=device, trust=True) for p, c in zip(places, cells, strict=True)]
    return found if all(len(own.fit.history) == own.recipe.epochs for own in found) else []


def _kinds(data: Dataset) -> Tensor:
    """The labels that have training rows, and so a model."""
    assert data.train_labels is not None
    return data.train_labels.unique()


def _plain(arrays: dict[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: values.detach().cpu().numpy() for name, values in arrays.items()}
