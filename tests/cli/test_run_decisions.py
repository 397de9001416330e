"""Decisions about rows of a run: what counts as anomalous, who is the reference, and class models, trained once."""

import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pvae.applications import classification
from pvae.cli import run_anomalies
from pvae.cli.run_anomalies import anomalies, with_others
from pvae.cli.run_classification import class_models, classify
from pvae.cli.use_context import UseContext
from pvae.errors import UserError
from pvae.experiments import sweep
from pvae.experiments.opened_run import open_run, select_rows
from tests.experiments.test_opened_run import DIGITS, run_of, written

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


# Anomalies


def test_the_rows_of_a_run_of_some_labels_are_the_test_rows_of_all():
    run = opened(ONLY)
    rows = with_others(run)
    assert rows.where == "test rows of all labels"
    assert len(rows.x) == 359
    assert rows.x[torch.isin(rows.labels, torch.tensor([0, 1, 2]))].equal(run.data.test)
    own = with_others(opened(ALL))
    assert own.x.equal(opened(ALL).data.test)
    assert own.labels.equal(opened(ALL).data.test_labels)


@pytest.mark.parametrize("line", [ONLY, HELD], ids=["test rows", "validation rows"])
def test_rows_of_other_labels_are_the_anomalies_and_no_row_is_its_own_reference(line):
    run = opened(line)
    rows = with_others(run)
    made = anomalies(asked(run, rows), K=2, chosen=["elbo"], false_alarm=0.1)
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
    made = anomalies(asked(run, with_others(run)), K=2, false_alarm=0.2)
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
    whole = replace(run, variant=run.variant._replace(recipe=replace(run.variant.recipe, only=None)))
    made = anomalies(asked(whole, select_rows(run, path)), K=4, chosen=["evidence"])
    assert made.arrays["anomalous"].tolist() == [False] * 30 + [True] * 30
    assert "against 116 held-out normal rows" in made.sentences[0]
    _, header, (line,) = made.tables[0]
    assert float(line[header.index("AUROC")].split()[0]) > 0.95


def test_labels_given_count_as_anomalous():
    run = opened(ALL)
    made = anomalies(asked(run, with_others(run)), named=["3", "8"], K=2, chosen=["elbo"])
    rows = torch.from_numpy(made.arrays["row"])
    expected = torch.isin(run.data.test_labels[rows], torch.tensor([3, 8]))
    assert made.arrays["anomalous"].tolist() == expected.tolist()
    with pytest.raises(UserError, match="--anomalous: no row has label 11; there are"):
        anomalies(asked(run), named=["11"], K=2)
    bare = select_rows(run)._replace(labels=None)
    with pytest.raises(UserError, match="--anomalous: the test rows have no labels"):
        anomalies(asked(run, bare), named=["3"], K=2)


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
    "all": lambda run: with_others(run),
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
            named=None if named is None else [str(label) for label in named],
            K=1,
            chosen=["reconstruction"],
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
    rows = with_others(run)
    assert rows.x.equal(run.data.test)
    made = anomalies(asked(run, rows), named=["2"], K=1, chosen=["elbo"])
    assert set(rows.labels.tolist()) == {0, 1, 2}
    assert made.arrays["anomalous"].sum() == (rows.labels == 2).sum()
    with pytest.raises(UserError, match="--anomalous: no row has label 7; there are"):
        anomalies(asked(run, rows), named=["7"], K=1)


def test_without_knowledge_nothing_is_judged():
    run = opened(ALL)
    made = anomalies(asked(run), K=2, chosen=["elbo"])
    assert "anomalous" not in made.arrays
    assert made.tables[0][1] == ["score", "threshold", "flagged"]
    assert any("Which rows are anomalous is not known" in line for line in made.sentences)
    rows = select_rows(opened(ONLY))
    made = anomalies(asked(opened(ONLY), rows), K=2, chosen=["elbo"])
    assert any("All rows are normal: no AUROC" in line for line in made.sentences)


# Classes


@pytest.fixture(scope="module")
def classified(tmp_path_factory):
    """A run of three classes whose class models are trained, with what was said while they were."""
    folder = tmp_path_factory.mktemp("classified") / "run"
    shutil.copytree(run_of(ONLY), folder)
    run, said = open_run(folder), []
    return run, class_models(run, epochs=3, say=said.append), said


def test_each_class_has_a_model_of_its_own_rows(classified):
    run, (models, data), said = classified
    assert len(models) == 3
    assert said == ["training a model for each of 3 classes: 3 epochs each"]
    assert data.test.equal(run.data.test)
    # What calibrates is held out from the run's training rows, a tenth of them, and no class model has seen it.
    assert len(data.validation) + len(data.train) == len(run.data.train) == 421
    assert abs(len(data.validation) - 42) < 4.5 * np.sqrt(421 * 0.1 * 0.9)
    kept = sorted(str(path.parent.relative_to(run.folder)) for path in run.folder.rglob("classes/*/*/recipe.toml"))
    assert kept == [f"classes/Amortized-3-epochs/{label}" for label in (0, 1, 2)]
    for label in (0, 1, 2):
        own = open_run(run.folder / kept[label])
        assert own.variant.recipe.only == [label]
        assert own.data.train.equal(data.train[data.train_labels == label])
        assert len(own.variant.fit.history) == 3


def test_class_models_are_trained_once(classified, monkeypatch):
    run, (models, data), _ = classified

    def fail(*args, **kwargs):
        raise AssertionError("trained again")

    monkeypatch.setattr(sweep, "train_sweep", fail)
    again, same = class_models(run, epochs=3)
    assert same.validation.equal(data.validation)
    for (model, guide), (other, other_guide) in zip(models, again, strict=True):
        for one, two in ((model.__self__, other.__self__), (guide, other_guide)):
            pairs = zip(one.state_dict().values(), two.state_dict().values(), strict=True)
            assert all(a.equal(b) for a, b in pairs)
    with pytest.raises(AssertionError, match="trained again"):
        class_models(run, epochs=2)


def test_training_goes_on_where_it_was_stopped(classified, tmp_path):
    run, (models, _), _ = classified
    shutil.copytree(run.folder, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/classes/Amortized-3-epochs/1")
    kept = tmp_path / "run/classes/Amortized-3-epochs/0/checkpoint.safetensors"
    before = kept.read_bytes()
    again, _ = class_models(open_run(tmp_path / "run"), epochs=3)
    assert kept.read_bytes() == before
    for (model, _), (other, _) in zip(models, again, strict=True):
        pairs = zip(model.__self__.state_dict().values(), other.__self__.state_dict().values(), strict=True)
        assert all(a.equal(b) for a, b in pairs)


def test_classes_are_told_by_bayes_rule_on_the_evidence_of_each(classified):
    run, (models, data), _ = classified
    made = classify(asked(run), models, data=data, K=4)
    predicted, probability = made.arrays["predicted"], made.arrays["probability"]
    np.testing.assert_allclose(probability.sum(1), 1, rtol=1e-5)
    assert (predicted == probability.argmax(1)).all()  # of labels 0, 1, 2
    # Counts of the training rows are the prior; the temperature is that of the held-out rows.
    prior = torch.bincount(data.train_labels).double()
    found = classification.classify(models, run.data.test, prior=prior, K=4, seed=0)
    held = classification.classify(models, data.validation, prior=prior, K=4, seed=1).log_evidence
    temperature = classification.fit_temperature(held, data.validation_labels, prior).mean
    np.testing.assert_allclose(probability, found.at(temperature).log_probabilities.exp(), rtol=1e-4, atol=1e-6)
    right = (predicted == run.data.test_labels.numpy()).mean()
    assert f"Accuracy {right:.2f}" in made.sentences[-1]
    assert right > 1 / 3 + 3 * np.sqrt(2 / 9 / 116)
    assert made.figure is not None


def test_labels_need_not_count_from_0_and_may_be_unknown(classified):
    run, (models, data), _ = classified
    shifted = replace(data, **{f"{part}_labels": getattr(data, f"{part}_labels") * 2 + 5 for part in PARTS})
    rows = select_rows(run)
    base = classify(asked(run, rows._replace(labels=rows.labels * 2 + 5)), models, data=shifted, K=2)
    assert set(base.arrays["predicted"].tolist()) <= {5, 7, 9}
    bare = classify(asked(run, rows._replace(labels=None)), models, data=shifted, K=2)
    assert bare.arrays["predicted"].tolist() == base.arrays["predicted"].tolist()
    assert "The rows have no labels to judge this by." in bare.sentences
    with pytest.raises(UserError, match=r"have labels that no class model knows; known are \[5, 7, 9\]"):
        classify(asked(run, rows), models, data=shifted, K=2)


PARTS = ("train", "validation", "test")


def test_rows_that_are_judged_do_not_calibrate():
    run = opened(f"{LABELLED} --validation-size 0.1")
    held = select_rows(run, "validation")
    made = classify(asked(run, held), None, data=run.data, K=2)
    assert "at which 116 test rows have the smallest log loss" in made.sentences[0]
    swapped = replace(run.data, validation=run.data.test, validation_labels=run.data.test_labels)
    other = classify(asked(run, held._replace(where="rows of a file")), None, data=swapped, K=2)
    assert "at which 116 held-out training rows have" in other.sentences[0]
    np.testing.assert_array_equal(made.arrays["probability"], other.arrays["probability"])
    fitted = classify(asked(run, select_rows(run, "train", "0:50")), None, data=run.data, K=2)
    assert any("Models were fitted to these rows or calibrated on them" in line for line in fitted.sentences)
    assert not any("Models were fitted" in line for line in made.sentences)
    with pytest.raises(UserError, match="classify calibrates on test rows of its classes, and there are none"):
        classify(asked(run, held), None, data=replace(run.data, test_labels=None), K=2)


def test_a_kind_without_training_rows_has_no_model_and_one_of_few_rows_has(tmp_path):
    x, y = (DIGITS.images[:300] > 8).reshape(300, 64).astype("float32"), DIGITS.target[:300] % 4
    train = np.concatenate([np.flatnonzero(y[:200] < 2), np.flatnonzero(y[:200] == 2)[:2]])  # two rows of label 2
    np.savez(tmp_path / "rare.npz", x_train=x[train], y_train=y[train], x_test=x[200:], y_test=y[200:])
    run = opened(f"fit {SMALL} --data {tmp_path}/rare.npz")
    models, data = class_models(run, epochs=1)
    assert len(models) == 3
    assert 2 not in data.validation_labels
    made = classify(asked(run), models, data=data, K=1)
    strange = (y[200:] == 3).sum()
    assert any(f"{strange} rows have labels that no class model knows" in line for line in made.sentences)
    assert set(made.arrays["predicted"].tolist()) <= {0, 1, 2}
    assert len(made.arrays["predicted"]) == 100


def test_columns_of_kinds_without_training_rows_are_no_classes(tmp_path):
    x, y = (DIGITS.images[:300] > 8).reshape(300, 64).astype("float32"), DIGITS.target[:300] % 4
    train = np.flatnonzero(y[:200] != 0)
    np.savez(tmp_path / "rare.npz", x_train=x[train], y_train=y[train], x_test=x[200:], y_test=y[200:])
    line = f"fit {SMALL} --trust --program {CONDITIONAL}:ConditionalVAE --validation-size 0.2 --data {tmp_path}"
    run = opened(f"{line}/rare.npz")
    made = classify(asked(run), None, data=class_models(run)[1], K=2)
    assert made.arrays["probability"].shape == (100, 3)
    assert set(made.arrays["predicted"].tolist()) <= {1, 2, 3}
    again = classification.evidence_by_label(run.model, run.guide, run.data.test[:, :64], 4, K=2).log_evidence
    np.testing.assert_array_equal(made.arrays["log_evidence"], again[:, 1:].numpy())


def test_a_program_that_takes_the_label_is_its_own_class_model(monkeypatch):
    monkeypatch.setattr(sweep, "train_sweep", lambda *args, **kwargs: pytest.fail("nothing is to be trained"))
    run = opened(f"{LABELLED} --validation-size 0.1")
    models, data = class_models(run)
    assert models is None
    assert data is run.data
    made = classify(asked(run), None, data=data, K=2)
    assert made.arrays["probability"].shape == (116, 3)
    # The label's columns, which hold the truth, are not looked at.
    rows = select_rows(run)
    x = rows.x.clone()
    x[:, run.columns :] = x[:, run.columns :].roll(1, 1)
    again = classify(asked(run, rows._replace(x=x)), None, data=data, K=2)
    assert again.arrays["predicted"].tolist() == made.arrays["predicted"].tolist()
    with pytest.raises(UserError, match="calibrates on rows that the program has not seen; fit with --validation-size"):
        class_models(opened(LABELLED))


def test_rows_without_labels_or_with_one_have_no_classes():
    bare = opened(f"fit {SMALL} --likelihood Poisson --data {{place}}/counts.npy")
    with pytest.raises(UserError, match=r"classify needs labels, and .*counts.npy has none"):
        class_models(bare)
    with pytest.raises(UserError, match="classify needs labels, and digits has one alone"):
        class_models(opened(f"fit {SMALL} --only 4"))


def test_the_units_of_scores_are_known():
    assert set(run_anomalies.UNITS) < {"evidence", "elbo", "reconstruction", "typicality", "distance", "neighbours"}
