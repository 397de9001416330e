"""Anomaly detection with a run: what counts as anomalous, which rows are the reference, and the scores' thresholds."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pvae.cli import run_anomalies
from pvae.cli.run_anomalies import anomalies, select_all_labels
from pvae.cli.use_context import UseContext
from pvae.errors import UserError
from pvae.experiments.row_selection import select_rows
from pvae.experiments.run import open_run
from tests.experiments.test_run import DIGITS, run_of, written

pytestmark = pytest.mark.filterwarnings("ignore:constrained_layout not applied")

SMALL = "--epochs 2 --hidden 16 --latent 2"
ONLY = f"fit {SMALL} --only 0,1,2"
HELD = f"fit {SMALL} --only 0,1,2 --validation-size 0.2"
ALL = f"fit {SMALL}"
CONDITIONAL = Path(__file__).parents[2] / "models" / "conditional.py"
LABELLED = f"fit {SMALL} --only 0,1,2 --trust --program {CONDITIONAL}:ConditionalVAE"


def opened(line):
    return open_run(run_of(line), trust=True)


def asked(run, rows=None, **more):
    return UseContext(run, select_rows(run) if rows is None else rows, **more)


def test_the_rows_of_a_run_of_some_labels_are_the_test_rows_of_all():
    run = opened(ONLY)
    rows = select_all_labels(run)
    assert rows.where == "test rows of all labels"
    assert len(rows.x) == 359
    assert rows.x[torch.isin(rows.labels, torch.tensor([0, 1, 2]))].equal(run.data.test)
    own = select_all_labels(opened(ALL))
    assert own.x.equal(opened(ALL).data.test)
    assert own.labels.equal(opened(ALL).data.test_labels)


@pytest.mark.parametrize("line", [ONLY, HELD], ids=["test rows", "validation rows"])
def test_rows_of_other_labels_are_the_anomalies_and_no_row_is_its_own_reference(line):
    run = opened(line)
    rows = select_all_labels(run)
    made = anomalies(asked(run, rows), K=2, scores=["elbo"], false_alarm=0.1)
    place, anomalous = torch.from_numpy(made.arrays["row_of_all"]), made.arrays["anomalous"]
    own = torch.from_numpy(made.arrays["row"])
    assert ((own < 0) == torch.from_numpy(anomalous)).all()
    assert run.data.test[own[own >= 0]].equal(rows.x[place[own >= 0]])  # as --select counts the run's own
    assert len(place.unique()) == len(place)
    assert (anomalous == ~np.isin(rows.labels[place].numpy(), [0, 1, 2])).all()
    others = (~torch.isin(rows.labels, torch.tensor([0, 1, 2]))).sum().item()
    assert anomalous.sum() == others  # all of them are scored
    held = int(re.search(r"against (\d+) held-out", made.sentences[0]).group(1))
    if line == HELD:
        assert (held, len(place)) == (len(run.data.validation), len(rows.x))
    else:
        assert held + len(place) == len(rows.x)
        assert held == len(run.data.test) // 2
    _, header, lines = made.tables[0]
    (told,) = (dict(zip(header, line, strict=True)) for line in lines)
    assert told["score"] == "elbo"
    share = made.arrays["flagged_elbo"][anomalous].mean()
    assert float(told["detected"].split()[0]) == pytest.approx(share, abs=0.006)  # to the digits that are shown
    assert {"threshold", "AUROC", "false alarms"} < told.keys()


def test_what_is_flagged_is_beyond_what_the_share_of_normal_rows_exceeds():
    run = opened(ONLY)
    made = anomalies(asked(run, select_all_labels(run)), K=2, false_alarm=0.2)
    assert len([name for name in made.arrays if name.startswith("flagged_")]) == 6
    for name in ("evidence", "elbo", "reconstruction", "typicality", "distance", "neighbours"):
        flagged, p = made.arrays[f"flagged_{name}"], made.arrays[f"p_{name}"]
        assert (p[flagged] <= 0.2).all()
        assert made.arrays[name][flagged].min(initial=np.inf) > made.arrays[name][~flagged].max()
    # 58 reference and 58 other normal rows: a Beta and a binomial spread about the share.
    normal = ~made.arrays["anomalous"]
    share = made.arrays["flagged_elbo"][normal].mean()
    assert abs(share - 0.2) < 4.5 * np.sqrt(0.2 * 0.8 * (1 / 58 + 1 / normal.sum()))


def test_an_obvious_anomaly_is_found_in_a_file_whose_labels_say_which():
    run = opened(ONLY)
    normal, odd = (DIGITS.images[np.isin(DIGITS.target, kinds)][:30] / 16 for kinds in ([0, 1, 2], [7]))
    rows = np.concatenate([normal, 1 - odd])
    path = written(run.folder.parent, "judged.npz", rows.astype("float32"), np.repeat([0, 1], 30))
    whole = replace(run, variant=replace(run.variant, recipe=replace(run.recipe, only=None)))
    made = anomalies(asked(whole, select_rows(run, path)), K=4, scores=["evidence"])
    assert made.arrays["anomalous"].tolist() == [False] * 30 + [True] * 30
    assert "against 116 held-out normal rows" in made.sentences[0]
    _, header, (line,) = made.tables[0]
    assert float(line[header.index("AUROC")].split()[0]) > 0.95


def test_labels_given_count_as_anomalous():
    run = opened(ALL)
    made = anomalies(asked(run, select_all_labels(run)), anomalous=["3", "8"], K=2, scores=["elbo"])
    rows = torch.from_numpy(made.arrays["row"])
    expected = torch.isin(run.data.test_labels[rows], torch.tensor([3, 8]))
    assert made.arrays["anomalous"].tolist() == expected.tolist()
    with pytest.raises(UserError, match="anomalous: no row has label 11; there are"):
        anomalies(asked(run), anomalous=["11"], K=2)
    bare = select_rows(run)._replace(labels=None)
    with pytest.raises(UserError, match="anomalous: the test rows have no labels"):
        anomalies(asked(run, bare), anomalous=["3"], K=2)


@pytest.fixture
def compared(monkeypatch):
    """What anomalies are sought in and what they are compared with: labels by rows, no two of which are alike."""
    images = (DIGITS.images / 16).reshape(-1, 64).astype("float32")
    labels, seen = {row.tobytes(): label for row, label in zip(images, DIGITS.target, strict=True)}, []

    def spy(model, guide, x, *args, reference, **kwargs):
        seen[:] = [{row.tobytes(): labels[row.tobytes()] for row in rows.numpy()} for rows in (x, reference)]
        return own(model, guide, x, *args, reference=reference, **kwargs)

    own = run_anomalies.applications.detect_anomalies
    monkeypatch.setattr(run_anomalies.applications, "detect_anomalies", spy)
    return seen


WAYS = {
    "all": lambda run: select_all_labels(run),
    "test": select_rows,
    "some": lambda run: select_rows(run, "test", "0:70"),
    "train": lambda run: select_rows(run, "train", "0:70"),
    "validation": lambda run: select_rows(run, "validation"),
}


@pytest.mark.parametrize(
    ("held", "way"),
    [(held, way) for held in ("", " --validation-size 0.2") for way in WAYS if held or way != "validation"],
)
@pytest.mark.parametrize("which", ["", " --only 0,1,2"], ids=["every", "some"])
def test_the_reference_is_held_out_normal_and_apart_from_what_is_scored(which, held, way, compared):
    run = opened(f"fit {SMALL} --likelihood Gaussian --binarize none{which}{held}")
    rows = WAYS[way](run)
    only = run.variant.recipe.only or range(10)
    for named in (None, [1]):
        made = anomalies(
            asked(run, rows),
            anomalous=None if named is None else [str(label) for label in named],
            K=1,
            scores=["reconstruction"],
            false_alarm=0.2,
        )
        scored, reference = compared
        assert not scored.keys() & reference.keys()
        assert not reference.keys() & {row.tobytes() for row in run.data.train.numpy()}
        assert set(reference.values()) == set(only) - set(named or [])
        assert set(scored.values()) <= ({*only, *named} if named else set(range(10)))
        told = rows.labels if named is None else rows.labels[torch.isin(rows.labels, torch.tensor([*only, *named]))]
        left_out = len(rows.x) - len(told)
        assert any(f"{left_out} rows of labels that are neither" in line for line in made.sentences) == bool(left_out)
        if way in ("some", "train", "validation"):
            assert len(made.arrays["row"]) == len(rows.x)  # all that were asked for
        elif named:
            assert made.arrays["anomalous"].sum() == (rows.labels == 1).sum()


def test_a_program_that_takes_the_label_is_asked_about_its_own_labels_alone():
    run = opened(LABELLED)
    rows = select_all_labels(run)
    assert rows.x.equal(run.data.test)
    made = anomalies(asked(run, rows), anomalous=["2"], K=1, scores=["elbo"])
    assert set(rows.labels.tolist()) == {0, 1, 2}
    assert made.arrays["anomalous"].sum() == (rows.labels == 2).sum()
    with pytest.raises(UserError, match="anomalous: no row has label 7; there are"):
        anomalies(asked(run, rows), anomalous=["7"], K=1)


def test_without_knowledge_nothing_is_judged():
    run = opened(ALL)
    made = anomalies(asked(run), K=2, scores=["elbo"])
    assert "anomalous" not in made.arrays
    assert made.tables[0][1] == ["score", "threshold", "flagged"]
    assert any("Which rows are anomalous is not known" in line for line in made.sentences)
    rows = select_rows(opened(ONLY))
    made = anomalies(asked(opened(ONLY), rows), K=2, scores=["elbo"])
    assert any("All rows are normal: no AUROC" in line for line in made.sentences)


def test_the_units_of_scores_are_known():
    assert set(run_anomalies.UNITS) < {"evidence", "elbo", "reconstruction", "typicality", "distance", "neighbours"}
