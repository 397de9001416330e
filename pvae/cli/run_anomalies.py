"""cli.run_anomalies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from pvae import applications
from pvae.applications.anomalies import AnomalyScores
from pvae.cli.run_classification import _plain
from pvae.cli.use_context import UseContext
from pvae.errors import UserError
from pvae.experiments import opened_run
from pvae.experiments.opened_run import SPLIT_LABELS, Run, SelectedRows
from pvae.experiments.use_results import UseResult
from pvae.recipes import recipe
from pvae.reporting.application_figures import draw_scores
from pvae.stats import Estimate, number

EVERY = "test rows of all labels"


UNITS = {"distance": "sd²", "neighbours": "u"}


def with_others(run: Run, data_folder: str | Path | None = None) -> SelectedRows:
    """The test rows of a run; of one that was trained on some labels alone, those of all other labels too.

    The place of rows of other labels is -1. A program that takes the label has no columns for others.
    """
    own = run.variant.recipe
    if own.only is None or run.data.num_label_columns:
        return opened_run.select_rows(run)
    every = recipe.load_recipe_data(replace(own, only=None), data_folder)
    assert every.test_labels is not None  # else none could be kept
    known = torch.isin(every.test_labels, torch.tensor(own.only))
    return SelectedRows(every.test, every.test_labels, None, EVERY, torch.where(known, known.cumsum(0) - 1, -1))


def anomalies(
    asked: UseContext,
    *,
    named: Sequence[str] | None = None,
    chosen: Sequence[str] | None = None,
    K: int = 16,
    false_alarm: float = 0.05,
) -> UseResult:
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
    found = applications.detect_anomalies(
        *asked.programs,
        rows.x,
        rows.index,
        reference=reference,
        scores=chosen,
        K=K,
        false_alarm=false_alarm,
        **asked.options,
    )
    figures = found.summary(truth) if truth is not None and truth.any() and not truth.all() else {}
    told = _told_anomalies(found, len(reference), rows, truth, int((~told_of).sum()))
    arrays: dict[str, Tensor] = {"row": rows.place, **({"row_of_all": place} if rows.where == EVERY else {})}
    arrays |= found.scores | {f"flagged_{name}": found.flagged(name) for name in found.scores}
    arrays |= {f"p_{name}": found.p_values(name) for name in found.scores}
    arrays |= {} if truth is None else {"anomalous": truth}
    drawn = {
        f"{name} ({UNITS.get(name, 'nats')})": (own.numpy(), found.reference[name].numpy(), found.thresholds[name])
        for name, own in found.scores.items()
    }
    figure = draw_scores(drawn, None if truth is None else truth.numpy())
    if not found.comparable:
        own, other = (100 * share.mean().item() for share in found.missing)
        told.append(
            f"Rows lack {own:.2g}% of their entries, the reference {other:.2g}%; scores add up what is there, so that "
            "rows with more gaps seem more normal."
        )
    tables = [_table(found, figures)]
    return UseResult("anomalies", _plain(arrays), told, tables, figure)


def _reference(asked: UseContext, anomalous: Sequence[float] | None) -> tuple[Tensor, Tensor]:
    """Held-out normal rows [R, C], and which of the given rows are none of them, [B].

    They are validation rows; where there are none or these are given, test rows that are not given. Where all of these
    are given, every other one is reference and is not scored.
    """
    data, rows = asked.run.data, asked.rows
    part = "validation" if len(data.validation) and rows.where != SPLIT_LABELS["validation"] else "test"
    held, labels = getattr(data, part), getattr(data, f"{part}_labels")
    normal = torch.ones(len(held), dtype=torch.bool)
    if anomalous is not None and labels is not None:
        normal = ~torch.isin(labels, torch.tensor(anomalous))
    if part == "validation" or rows.where not in (SPLIT_LABELS["test"], EVERY):
        return held[normal], torch.ones(len(rows.x), dtype=torch.bool)
    used = normal.clone()
    used[rows.place[rows.place >= 0]] = False
    if not used.any():
        used = normal & (normal.cumsum(0) % 2 == 0)
    return held[used], (rows.place < 0) | ~used[rows.place.clamp(min=0)]


def _anomalous(asked: UseContext, given: Sequence[float] | None) -> Tensor | None:
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


def _label(run: Run, word: str) -> float:
    """A label as a number: one of the run's, or of a file's own."""
    try:
        return float(word) if run.data.label_names is None else run.label_of(word)
    except ValueError:
        raise UserError(f"--anomalous: '{word}' is no label; the labels are numbers") from None


def _told_of(asked: UseContext, anomalous: Sequence[float] | None) -> Tensor:
    """Rows whose kind is told, [B]: where anomalous labels are named, others that the run does not know are neither."""
    only, labels = asked.run.variant.recipe.only, asked.rows.labels
    if anomalous is None or only is None or labels is None:
        return torch.ones(len(asked.rows.x), dtype=torch.bool)
    return torch.isin(labels, torch.tensor([*only, *anomalous]))


def _told_anomalies(
    found: AnomalyScores, held: int, rows: SelectedRows, truth: Tensor | None, others: int
) -> list[str]:
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


def _table(found: AnomalyScores, figures: dict[str, Estimate]) -> tuple[str, list[str], list[list[str]]]:
    """A line for each score."""
    header = ["score", "threshold", *(["AUROC", "detected", "false alarms"] if figures else ["flagged"])]
    lines = []
    for name in found.scores:
        known = [number(figures[f"{what}[{name}]"]) for what in ("auroc", "detected", "false_alarms") if figures]
        flagged = known or [str(int(found.flagged(name).sum()))]
        lines.append([name, f"{found.thresholds[name]:.4g} {UNITS.get(name, 'nats')}", *flagged])
    return "Scores, higher for what is more anomalous", header, lines
