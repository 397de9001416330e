"""Anomaly detection with a run: which rows are scored, against which reference, and what the scores say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from pvae import applications
from pvae.applications.anomalies import AnomalyScores
from pvae.cli.run_restoration import name_rows
from pvae.cli.use_context import UseContext, make_result
from pvae.errors import UserError, param
from pvae.experiments.row_selection import SPLIT_LABELS, SelectedRows, select_rows
from pvae.experiments.run import Run
from pvae.experiments.use_results import UseResult
from pvae.inference.streaming import MIN_DRAWS_FOR_K_HAT
from pvae.recipes import recipe
from pvae.reporting.application_figures import draw_scores
from pvae.runtime.torch_state import to_numpy
from pvae.stats import number

ALL_LABELS = "test rows of all labels"
UNITS = {"distance": "sd²", "neighbours": "u"}


def select_all_labels(run: Run, data_folder: str | Path | None = None) -> SelectedRows:
    """Return the test rows of a run; if it was trained on some labels alone, those of all others too, at place -1."""
    only = run.recipe.only
    if only is None or run.data.num_label_columns:  # a program that takes the label has no columns for others
        return select_rows(run)
    data = recipe.load_recipe_data(replace(run.recipe, only=None), data_folder)
    assert data.test_labels is not None  # the run's rows were chosen by label
    known = torch.isin(data.test_labels, torch.tensor(only))
    return SelectedRows(data.test, data.test_labels, None, ALL_LABELS, torch.where(known, known.cumsum(0) - 1, -1))


def anomalies(
    context: UseContext,
    *,
    anomalous: Sequence[str] | None = None,
    scores: Sequence[str] | None = None,
    K: int = 16,
    accuracy: str | None = None,
    false_alarm: float = 0.05,
) -> UseResult:
    """Score how unlike held-out normal rows the rows are, and flag those beyond each score's threshold.

    Labels count as ``anomalous`` by default if the run was not trained on them, or if 1 in a file. In the result
    ``row`` is a row's position as ``--select`` counts it, -1 for other labels; ``row_of_all`` that among all test rows.
    """
    labels = None if anomalous is None else [_label(context.run, word) for word in anomalous]
    truth, (reference, scored) = _truth(context, labels), _reference(context, labels)
    known = _known(context, labels)
    place = (scored & known).nonzero()[:, 0]
    rows, truth = context.rows.at(place), None if truth is None else truth[place]
    options = {"reference": reference, "scores": scores, "K": K, "accuracy": accuracy, "false_alarm": false_alarm}
    result = context.apply(applications.detect_anomalies, rows.x, rows.index, **options)
    arrays = {"row": rows.place} | ({"row_of_all": place} if rows.where == ALL_LABELS else {}) | dict(result.scores)
    arrays |= {f"flagged_{name}": result.flagged(name) for name in result.scores}
    arrays |= {f"p_{name}": result.p_values(name) for name in result.scores}
    arrays |= {"reliable": result.reliable[0]} if "evidence" in result.scores else {}
    arrays |= {} if truth is None else {"anomalous": truth}
    sentences = _sentences(result, len(reference), rows, truth, int((~known).sum()))
    histograms = {}
    for name, values in result.scores.items():
        drawn = (to_numpy(values), to_numpy(result.reference[name]), result.thresholds[name])
        histograms[f"{name} ({UNITS.get(name, 'nats')})"] = drawn
    figure = draw_scores(histograms, None if truth is None else to_numpy(truth))
    return make_result("anomalies", arrays, sentences, figure, tables=[_table(result, truth)])


def _reference(context: UseContext, anomalous: Sequence[float] | None) -> tuple[Tensor, Tensor]:
    """Return held-out normal rows [R, C], and which of the given rows are not among them, [B].

    They are validation rows; if there are none or these are given, test rows that are not given. If all of these are
    given, every other one is reference and is not scored.
    """
    data, rows = context.run.data, context.rows
    part = "validation" if len(data.validation) and rows.where != SPLIT_LABELS["validation"] else "test"
    held, labels = getattr(data, part), getattr(data, f"{part}_labels")
    normal = torch.ones(len(held), dtype=torch.bool)
    if anomalous is not None and labels is not None:
        normal = ~torch.isin(labels, torch.tensor(anomalous))
    if part == "validation" or rows.where not in (SPLIT_LABELS["test"], ALL_LABELS):
        return held[normal], torch.ones(len(rows.x), dtype=torch.bool)
    used = normal.clone()
    used[rows.place[rows.place >= 0]] = False
    if not used.any():
        used = normal & (normal.cumsum(0) % 2 == 0)
    return held[used], (rows.place < 0) | ~used[rows.place.clamp(min=0)]


def _truth(context: UseContext, anomalous: Sequence[float] | None) -> Tensor | None:
    """Return which rows are known to be anomalous, [B], if labels say so."""
    only, labels, where = context.run.recipe.only, context.rows.labels, context.rows.where
    if anomalous is not None:
        if labels is None:
            raise UserError(f"{param('anomalous')}: the {where} have no labels")
        if missing := set(anomalous) - set(labels.tolist()):
            message = f"no row has label {min(missing):g}; there are {labels.unique().tolist()}"
            raise UserError(f"{param('anomalous')}: {message}")
        return torch.isin(labels, torch.tensor(list(anomalous)))
    if labels is None:
        return None
    if only is not None:
        return ~torch.isin(labels, torch.tensor(only))
    return labels == 1 if set(labels.tolist()) == {0, 1} and not context.rows.from_run else None


def _label(run: Run, word: str) -> float:
    """Return a label as a number: one of the run's, or a file's own."""
    try:
        return float(word) if run.data.label_names is None else run.label_of(word)
    except ValueError:
        raise UserError(f"{param('anomalous')}: '{word}' is no label; the labels are numbers") from None


def _known(context: UseContext, anomalous: Sequence[float] | None) -> Tensor:
    """Return which rows have a label that the run was trained on or that is named anomalous, [B]; all if none is."""
    only, labels = context.run.recipe.only, context.rows.labels
    if anomalous is None or only is None or labels is None:
        return torch.ones(len(context.rows.x), dtype=torch.bool)
    return torch.isin(labels, torch.tensor([*only, *anomalous]))


def _sentences(result: AnomalyScores, held: int, rows: SelectedRows, truth: Tensor | None, others: int) -> list[str]:
    expected = result.expected
    exceed = f"{100 * expected.mean:.2g} ± {100 * expected.se:.2g}% of fresh normal rows exceed"
    rule = f"a row is flagged beyond a threshold that {exceed}"
    sentences = [f"{len(rows.x)} {rows.where} against {held} held-out normal rows; {rule}."]
    if others:
        sentences.append(f"{others} rows of labels that are neither the run's nor named anomalous are left out.")
    for reason in dict.fromkeys(result.left_out.values()):
        names = ", ".join(name for name, why in result.left_out.items() if why == reason)
        sentences.append(f"Left out: {names} ({reason}).")
    if truth is None:
        known = "Which rows are anomalous is not known"
        sentences.append(f"{known}; with labels (--anomalous) the scores themselves are evaluated.")
    elif len(truth.unique()) < 2:
        kind = "anomalous" if truth.all() else "normal"
        sentences.append(f"All rows are {kind}: no AUROC without rows of both kinds.")
    if "evidence" in result.scores:
        sentences += check_words(result.reliable[0], result.K, rows.place)
    if not result.comparable:
        here, there = (100 * share.mean().item() for share in result.missing)
        effect = "scores sum over observed entries, so that rows with more missing entries seem more normal"
        sentences.append(f"Rows lack {here:.2g}% of their entries, the reference {there:.2g}%; {effect}.")
    return sentences


def check_words(reliable: Tensor, K: int, place: Tensor) -> list[str]:
    """Say of how many rows the weights behind the evidence failed their checks, and of which; of none if none did."""
    if K < MIN_DRAWS_FOR_K_HAT:
        return [f"The evidence is a lower bound by {K} draws, too few to check: {param('samples', 100)} checks them."]
    if reliable.all():
        return []
    failed = name_rows(place[~reliable])
    return [f"The evidence of {failed} is unreliable: their weights fail their checks, and it may be far too low."]


def _table(result: AnomalyScores, truth: Tensor | None) -> tuple[str, list[str], list[list[str]]]:
    """Return a table with a line for each score: its AUROC and rates if there are known rows of both kinds."""
    figures = {} if truth is None or len(truth.unique()) < 2 else result.summary(truth)
    header = ["score", "threshold", *(["AUROC", "detected", "false alarms"] if figures else ["flagged"])]
    lines = []
    for name in result.scores:
        known = [number(figures[f"{kind}[{name}]"]) for kind in ("auroc", "detected", "false_alarms") if figures]
        flagged = known or [str(int(result.flagged(name).sum()))]
        lines.append([name, f"{result.thresholds[name]:.4g} {UNITS.get(name, 'nats')}", *flagged])
    return "Scores, higher for more anomalous rows", header, lines
