"""Classification with a run: class models are trained once, calibrated on held-out rows, and compared with labels."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pvae.applications import classification
from pvae.cli.run_classification import classify
from pvae.cli.use_context import UseContext
from pvae.errors import UserError
from pvae.experiments import sweep
from pvae.experiments.class_models import fit_class_models
from pvae.experiments.row_selection import select_rows
from pvae.experiments.run import open_run
from tests.experiments.test_run import DIGITS, run_of

pytestmark = pytest.mark.filterwarnings("ignore:constrained_layout not applied")

SMALL = "--epochs 2 --hidden 16 --latent 2"
ONLY = f"fit {SMALL} --only 0,1,2"
ALL = f"fit {SMALL}"
CONDITIONAL = Path(__file__).parents[2] / "models" / "conditional.py"
LABELLED = f"fit {SMALL} --only 0,1,2 --trust --program {CONDITIONAL}:ConditionalVAE"


def opened(line):
    return open_run(run_of(line), trust=True)


def asked(run, rows=None, **more):
    return UseContext(run, select_rows(run) if rows is None else rows, **more)


@pytest.fixture(scope="module")
def classified(tmp_path_factory):
    """A run of three classes whose class models are trained, with what was said while they were."""
    folder = tmp_path_factory.mktemp("classified") / "run"
    shutil.copytree(run_of(ONLY), folder)
    run, said = open_run(folder), []
    return run, fit_class_models(run, epochs=3, say=said.append), said


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
    again, same = fit_class_models(run, epochs=3)
    assert same.validation.equal(data.validation)
    for (model, guide), (other, other_guide) in zip(models, again, strict=True):
        for one, two in ((model.__self__, other.__self__), (guide, other_guide)):
            pairs = zip(one.state_dict().values(), two.state_dict().values(), strict=True)
            assert all(a.equal(b) for a, b in pairs)
    with pytest.raises(AssertionError, match="trained again"):
        fit_class_models(run, epochs=2)


def test_training_goes_on_where_it_was_stopped(classified, tmp_path):
    run, (models, _), _ = classified
    shutil.copytree(run.folder, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/classes/Amortized-3-epochs/1")
    kept = tmp_path / "run/classes/Amortized-3-epochs/0/checkpoint.safetensors"
    before = kept.read_bytes()
    again, _ = fit_class_models(open_run(tmp_path / "run"), epochs=3)
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
    assert "The rows have no labels to compare with." in bare.sentences
    with pytest.raises(UserError, match=r"have labels that no class model knows; known are \[5, 7, 9\]"):
        classify(asked(run, rows), models, data=shifted, K=2)


PARTS = ("train", "validation", "test")


def test_rows_that_are_classified_do_not_calibrate():
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
    models, data = fit_class_models(run, epochs=1)
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
    made = classify(asked(run), None, data=fit_class_models(run)[1], K=2)
    assert made.arrays["probability"].shape == (100, 3)
    assert set(made.arrays["predicted"].tolist()) <= {1, 2, 3}
    again = classification.classify_conditional(run.model, run.guide, run.data.test[:, :64], 4, K=2).log_evidence
    np.testing.assert_array_equal(made.arrays["log_evidence"], again[:, 1:].numpy())


def test_a_program_that_takes_the_label_is_its_own_class_model(monkeypatch):
    monkeypatch.setattr(sweep, "train_sweep", lambda *args, **kwargs: pytest.fail("nothing is to be trained"))
    run = opened(f"{LABELLED} --validation-size 0.1")
    models, data = fit_class_models(run)
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
    with pytest.raises(
        UserError, match=r"calibrates on rows that the program has not seen; fit with validation_size=0\.1"
    ):
        fit_class_models(opened(LABELLED))


def test_rows_without_labels_or_with_one_have_no_classes():
    bare = opened(f"fit {SMALL} --likelihood Poisson --data {{place}}/counts.npy")
    with pytest.raises(UserError, match=r"classify needs labels, and .*counts.npy has none"):
        fit_class_models(bare)
    with pytest.raises(UserError, match="classify needs labels, and digits has one alone"):
        fit_class_models(opened(f"fit {SMALL} --only 4"))
