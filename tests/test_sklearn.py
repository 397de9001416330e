"""The scikit-learn interface: its laws, the core's numbers, exact evidence, and lines for what is wrong."""

import copy
import pickle
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from joblib import Parallel, delayed
from oracles import LinearGaussian
from sklearn.base import clone
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks
from torch import nn

from pvae import sklearn as interface
from pvae.applications import coding
from pvae.data.dataset import Dataset
from pvae.diagnostics.evaluation import bounds
from pvae.inference import families
from pvae.inference.families import DiagonalNormal
from pvae.inference.guides import Amortized
from pvae.recipes.build import build_model
from pvae.runtime.signals import TrainingInterrupt
from pvae.sklearn import VAE
from pvae.training import loop

X = LinearGaussian(2, 5).sample(60).double().numpy()
TINY = {"max_iter": 1, "n_draws": 3, "hidden": (4,), "engine": "pyro", "device": "cpu", "random_state": 0}
EXACT = {"max_iter": 0, "device": "cpu", "random_state": 0}


def small(**changes):
    return VAE(**(TINY | changes))


def holed(x, share=0.2):
    return np.where(np.random.default_rng(1).random(x.shape) < share, np.nan, x)


class Best(nn.Module):
    """The exact posterior's q_params, a little moved where asked."""

    def __init__(self, oracle, moved=0.0):
        super().__init__()
        self.oracle, self.moved = oracle, moved

    def forward(self, x):
        return self.oracle.best(x) + self.moved


def exact(moved=0.0, **changes):
    """An estimator whose program is linear and Gaussian and whose guide is its posterior, of one variance."""
    oracle = LinearGaussian(2, 5, conditioning=1.0).double()
    estimator = VAE(**(EXACT | changes)).fit(X)
    estimator.model_, estimator.guide_ = oracle, Amortized(Best(oracle, moved), DiagonalNormal(2)).double()
    return estimator, oracle


@parametrize_with_checks([small(max_iter=2)])
def test_scikit_learns_own_laws(estimator, check):
    check(estimator)


@pytest.mark.parametrize("family", families.__all__)
def test_a_row_does_not_feel_its_neighbours(family):
    fitted = small(family=family).fit(X)
    for compute in [fitted.transform] + [fitted.score_samples] * (family != "Delta"):
        whole, alone, turned = compute(X[:8]), compute(X[3:4]), compute(X[:8][::-1])
        np.testing.assert_allclose(alone[0], whole[3], atol=1e-12)
        np.testing.assert_allclose(turned[::-1], whole, atol=1e-12)
        assert np.ptp(whole, axis=0).min() > 1e-6


def test_the_fit_is_the_cores():
    fitted = small(max_iter=3, batch_size=16).fit(X)
    rows = torch.tensor(X, dtype=torch.float32)
    built = build_model(fitted.recipe_, Dataset("X", rows, rows[:0], rows[:0], (5,)))
    found = loop.fit(built.model, built.guide, rows, epochs=3, batch_size=16, seed=fitted.recipe_.seed, engine="pyro")
    assert [row["objective"] for row in fitted.history_] == [row["objective"] for row in found.history]
    for own, core in ((fitted.model_, built.program), (fitted.guide_, built.guide)):
        for name, tensor in core.state_dict().items():
            assert torch.equal(own.state_dict()[name], tensor.double()), name


@pytest.mark.parametrize("missing", [False, True])
def test_numbers_are_the_cores(missing):
    rows = holed(X) if missing else X
    fitted = small(max_iter=20, n_draws=2000, missing=missing).fit(rows)
    x, model, guide = torch.tensor(rows), fitted.model_.model, fitted.guide_
    codes = coding.encode(model, guide, x, K=1)
    np.testing.assert_allclose(fitted.transform(rows), codes.mean, atol=1e-12)
    np.testing.assert_allclose(fitted.inverse_transform(codes.mean.numpy()), coding.decode(model, guide, codes.mean))
    core = bounds(model, guide, x, K=2000, seed=9).values
    error = (2 * core["iwae_se"].square().sum()).sqrt() / len(rows)
    assert abs(fitted.score(rows) - core["iwae"].mean()) < 4.5 * error < 0.1
    assert fitted.score(rows) > core["elbo"].mean() + 5 * error


def test_evidence_is_exact_under_the_exact_posterior():
    estimator, oracle = exact()
    x = oracle.sample(300)
    np.testing.assert_allclose(estimator.score_samples(x.numpy()), oracle.evidence(x), atol=1e-9)
    # Elsewhere draws weigh unequally, and on average they stay below the evidence, a few of them further.
    few, many = (exact(moved=0.3, n_draws=K)[0].score_samples(x.numpy()) - oracle.evidence(x).numpy() for K in (2, 200))
    assert few.mean() < -5 * few.std() / 300**0.5
    assert abs(many.mean()) < 4.5 * many.std() / 300**0.5 + 0.005  # which is lost at K = 200


def test_new_rows_follow_the_program():
    estimator, oracle = exact()
    drawn = estimator.sample(4000, random_state=3)
    covariance = (oracle.weight @ oracle.weight.T + oracle.scale**2 * torch.eye(5)).numpy()
    error = np.sqrt(np.diag(covariance) / 4000)
    assert (abs(drawn.mean(0) - oracle.bias.numpy()) < 4.5 * error).all()
    # A covariance of normals has the error sqrt((c_ij^2 + c_ii c_jj) / n).
    error = np.sqrt((covariance**2 + np.outer(np.diag(covariance), np.diag(covariance))) / 4000)
    assert (abs(np.cov(drawn.T) - covariance) < 4.5 * error).all()
    np.testing.assert_array_equal(drawn, estimator.sample(4000, random_state=3))
    assert not np.array_equal(drawn, estimator.sample(4000, random_state=4))


def test_a_linear_program_comes_near_probabilistic_pca():
    x = LinearGaussian(2, 5, conditioning=1.0).sample(1500).double().numpy()
    train, test = x[:1000], x[1000:]
    linear = VAE(hidden=(), family="FullRankNormal", max_iter=80, learning_rate=0.02, engine="pyro", random_state=0)
    lost = PCA(2).fit(train).score_samples(test) - linear.fit(train).score_samples(test)
    # Probabilistic PCA has its maximum in closed form. Adam's noise leaves some hundredths of a nat; the paired
    # difference over 500 rows has an error of some thousandths.
    assert lost.std() / 500**0.5 < 0.01
    assert -0.04 < lost.mean() < 0.04
    assert PCA(2).fit(train).score(test) - PCA(1).fit(train).score(test) > 0.3


def test_what_is_fitted_is_decided_by_the_seed():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, again, other = (small(random_state=seed).fit(X) for seed in (0, 0, 1))
    for name in ("transform", "score_samples"):
        np.testing.assert_array_equal(getattr(first, name)(X), getattr(again, name)(X))
        assert not np.array_equal(getattr(first, name)(X), getattr(other, name)(X))
    np.testing.assert_array_equal(first.sample(2), again.sample(2))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "chosen",
    [
        {"inference": "PerDatapoint(num_steps_new_data=3)"},
        {"inference": "SemiAmortized(steps=2)", "prior": "VampPrior(pseudo_inputs=5)"},
        {"missing": True, "inference": "SemiAmortized(steps=2)"},
        {"family": "FlowFamily(hidden=[4])"},
    ],
    ids=["rows", "refined", "missing", "flow"],
)
def test_a_fitted_one_is_kept(chosen):
    rows = holed(X) if "missing" in chosen else X
    fitted = small(**chosen).fit(rows)
    for kept in (pickle.loads(pickle.dumps(fitted)), copy.deepcopy(fitted)):
        assert kept.model_ is not fitted.model_
        for name in ("transform", "score_samples"):
            np.testing.assert_array_equal(getattr(kept, name)(rows), getattr(fitted, name)(rows))
        np.testing.assert_array_equal(kept.sample(2), fitted.sample(2))


def test_a_fitted_one_goes_into_other_processes():
    fitted = small(inference="SemiAmortized(steps=2)", prior="VampPrior(pseudo_inputs=5)").fit(X)
    for scores in Parallel(n_jobs=2)(delayed(fitted.score_samples)(X) for _ in range(2)):
        np.testing.assert_allclose(scores, fitted.score_samples(X), rtol=1e-9)


@pytest.mark.parametrize("prior", ["StandardNormal", "VampPrior(pseudo_inputs=5)"])
def test_the_rows_are_not_kept(prior):
    few, many = (len(pickle.dumps(small(prior=prior, max_iter=0).fit(np.tile(X, (n, 1))))) for n in (1, 50))
    assert many - few < 100


def test_a_copys_guide_refines_on_its_own_program():
    fitted = small(inference="SemiAmortized(steps=3)").fit(X)
    kept, before = copy.deepcopy(fitted), fitted.transform(X)
    with torch.no_grad():
        kept.model_.decoder.requires_grad_(False)
        for tensor in kept.model_.decoder.parameters():
            tensor.add_(1.0)
    np.testing.assert_array_equal(fitted.transform(X), before)
    assert abs(kept.transform(X) - before).max() > 0.01


def test_in_a_pipeline_and_a_grid():
    y = PCA(1).fit_transform(X)[:, 0] > 0
    vae = small(max_iter=30, batch_size=16, learning_rate=0.01, hidden=(32,))
    classify = make_pipeline(StandardScaler(), vae, LogisticRegression())
    assert classify.fit(X, y).score(X, y) > 0.8  # chance has 0.5 with an error of 0.06
    grid = GridSearchCV(
        make_pipeline(StandardScaler(), small()),
        {"vae__n_components": np.arange(1, 3), "vae__hidden": [(3,), [4, 4]]},
        cv=2,
    )
    found = grid.fit(X)
    assert np.isfinite(found.cv_results_["mean_test_score"]).all()
    assert len(np.unique(found.cv_results_["mean_test_score"])) == 4
    assert found.best_estimator_[-1].get_feature_names_out().tolist() == [
        f"vae{d}" for d in range(found.best_params_["vae__n_components"])
    ]


def test_frames_in_and_out():
    frame = pd.DataFrame(X, columns=list("abcde"), index=range(100, 160))
    fitted = small().set_output(transform="pandas").fit(frame)
    found = fitted.transform(frame)
    assert found.columns.tolist() == ["vae0", "vae1"]
    assert found.index.equals(frame.index)
    assert fitted.feature_names_in_.tolist() == list("abcde")
    np.testing.assert_array_equal(found.to_numpy(), small().fit(X).transform(X))
    with pytest.raises(ValueError, match="feature names"):
        fitted.transform(frame[["b", "a", "c", "d", "e"]])


def test_parameters_are_copied_and_changed():
    given = small(prior="GaussianMixture(components=3)", network="MLP(hidden=[3, 3])")
    assert clone(given).get_params() == given.get_params()
    fitted = given.set_params(n_components=3).fit(X)
    assert fitted.transform(X).shape == (60, 3)
    assert fitted.recipe_.network["hidden"] == [3, 3]
    assert fitted.recipe_.prior["components"] == 3
    assert fitted.fit(X[:, :4]).n_features_in_ == 4


def test_pictures_and_binary_values():
    binary = (X[:, :4] > X[:, :4].mean(0)) * 1.0
    fitted = small(likelihood="Bernoulli", network="Conv(channels=[2])", shape=(2, 2)).fit(binary)
    assert set(np.unique(fitted.sample(50))) == {0.0, 1.0}
    assert -4 * np.log(2) - 1 < fitted.score(binary) < 0
    means = fitted.inverse_transform(fitted.transform(binary))
    assert ((means > 0) & (means < 1)).all()


def test_stops_early_and_goes_back():
    # At this rate five epochs ruin what the first have won.
    fitted = small(max_iter=40, n_iter_no_change=2, learning_rate=0.3, validation_fraction=0.25, hidden=(32,)).fit(X)
    held_out = [row["validation_elbo"] for row in fitted.history_]
    assert fitted.n_iter_ == len(held_out) < 40
    assert int(np.argmax(held_out)) == fitted.n_iter_ - 3


LINES = {
    "n_components is 0, but it must be at least 1": lambda: small(n_components=0).fit(X),
    "n_components is 'two', but it takes a whole number": lambda: small(n_components="two").fit(X),
    "max_iter is -1": lambda: small(max_iter=-1).fit(X),
    "unknown likelihood 'Gausian'; did you mean 'Gaussian'": lambda: small(likelihood="Gausian").fit(X),
    "row 0, column 0 is .*, outside the support of site 'x' .*choose another likelihood \\(": lambda: small(
        likelihood="Poisson"
    ).fit(X),
    "row 2, column 1 is 0.5, outside the support": lambda: (
        small(likelihood="Bernoulli").fit(X > 0).score_samples([[0, 1, 0, 1, 0]] * 2 + [[0, 0.5, 0, 0, 0]])
    ),
    "X contains NaN": lambda: small().fit(holed(X)),
    "column 3 has no value in any row; drop it": lambda: small(missing=True).fit(
        np.where(np.arange(5) == 3, np.nan, X)
    ),
    r"row 0, column 0 is 1e\+39": lambda: small().fit(np.where(np.eye(60, 5), 1e39, X)),
    "expecting 5 features": lambda: small().fit(X).transform(X[:, :3]),
    "the codes have 3 columns, but the program's latents have 2": lambda: small().fit(X).inverse_transform(X[:, :3]),
    "sample: n_samples is 0": lambda: small().fit(X).sample(0),
    "n_draws is 0": lambda: small(n_draws=0).fit(X).score(X),
    "n_draws is -1": lambda: small(family="FlowFamily", n_draws=-1).fit(X).score_samples(X),
    "family Delta has no density": lambda: small(family="Delta").fit(X).score(X),
    "VampPrior needs an encoder, .*use inference=Amortized": lambda: small(
        prior="VampPrior", inference="PerDatapoint"
    ).fit(X),
    "validation_fraction=0.001 of 60 rows is 0": lambda: small(n_iter_no_change=1, validation_fraction=0.001).fit(X),
    r"shape \(2, 2\) holds 4 values, but X has 5 columns": lambda: small(network="Conv", shape=(2, 2)).fit(X),
    "unknown device 'nonsense'": lambda: small(device="nonsense").fit(X),
}


@pytest.mark.parametrize("line", LINES)
def test_mistakes_are_value_errors_of_one_line(line):
    with pytest.raises(ValueError, match=line) as found:
        LINES[line]()
    assert "--" not in str(found.value)


def test_ctrl_c_stops_a_grid_too(monkeypatch):
    def stopped(*args, **options):
        raise TrainingInterrupt("stopped in epoch 1", 2)

    monkeypatch.setattr(interface, "fit_recipe", stopped)
    with pytest.raises(KeyboardInterrupt, match="epoch 1"):
        GridSearchCV(small(), {"n_components": [1]}, cv=2).fit(X)


def test_the_package_goes_without_it():
    code = "import sys, pvae; sys.exit('sklearn' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
