"""Evidence whose weights are checked: on ridges that the guide's family can't hold, against the closed form."""

import pytest
import torch
from oracles import LinearGaussian
from torch import nn

from pvae.applications.anomalies import detect_anomalies
from pvae.applications.classification import classify
from pvae.errors import UserError
from pvae.generative.likelihoods import Gaussian
from pvae.generative.priors import StandardNormal
from pvae.generative.vae import VAE
from pvae.inference.families import DiagonalNormal
from pvae.inference.guides import Amortized

D, M, REFERENCE = 2, 5, 20


class Shifted(nn.Module):
    """The best independent normals of each row, moved by two of their deviations: weights of them fail."""

    def __init__(self, oracle):
        super().__init__()
        self.best = oracle.best

    def forward(self, x):
        mean, log_sd = self.best(x).chunk(2, -1)
        return torch.cat([mean + 2 * log_sd.exp(), log_sd], -1)


@pytest.fixture(scope="module", params=[0, 1])
def ridge(request):
    oracle = LinearGaussian(D, M, scale=0.05, conditioning=30.0, seed=request.param)
    return oracle, Amortized(Shifted(oracle), DiagonalNormal(D))


def scores(oracle, guide, x, **options):
    reference = oracle.sample(REFERENCE, seed=9)
    return detect_anomalies(oracle.model, guide, x, reference=reference, scores=["evidence"], **options)


def test_rows_whose_weights_fail_get_the_exact_evidence_of_another_proposal(ridge):
    (oracle, guide), rows = ridge, ridge[0].sample(40, seed=3)
    checked, plain = (scores(oracle, guide, rows, K=500, accuracy=a) for a in ("quick", None))
    assert checked.reliable[0].all()
    assert checked.reliable[1].all()
    assert not plain.reliable[0].any()
    # A fifth of 500 draws is effective: a standard error of at most 0.1 nats.
    assert (checked.scores["evidence"] + oracle.evidence(rows)).abs().max() < 0.5
    assert (checked.reference["evidence"] + oracle.evidence(oracle.sample(REFERENCE, seed=9))).abs().max() < 0.5
    assert (plain.scores["evidence"] + oracle.evidence(rows)).mean() > 1.0


def test_weights_that_pass_stay_as_they_are():
    oracle = LinearGaussian(D, M, scale=0.5, conditioning=1.0)
    x = oracle.sample(30)
    guide = Amortized(nn.Linear(M, 2 * D), DiagonalNormal(D))
    guide.encoder.forward = oracle.best  # exact where the posterior's covariance is a multiple of I
    checked, plain = (scores(oracle, guide, x, K=500, accuracy=a) for a in ("quick", None))
    assert torch.equal(checked.scores["evidence"], plain.scores["evidence"])
    assert plain.reliable[0].all()
    assert not scores(oracle, guide, x, K=16).reliable[0].any()  # too few to check


def test_classes_are_compared_by_checked_evidence():
    pairs = [(oracle.model, Amortized(Shifted(oracle), DiagonalNormal(D))) for oracle in two()]
    x = torch.cat([oracle.sample(20, seed=5) for oracle in two()])
    exact = torch.stack([oracle.evidence(x) for oracle in two()], 1)
    checked, plain = (classify(pairs, x, K=500, accuracy=a) for a in ("quick", None))
    assert checked.reliable.shape == (40, 2)
    assert checked.reliable.all()
    assert (checked.log_evidence - exact).abs().max() < 0.5
    assert ((checked.log_evidence - exact).abs() < 5 * checked.log_evidence_se + 1e-3).all()
    assert (plain.log_evidence - exact).abs().mean() > 1.0
    assert not plain.reliable.all()


def two():
    return [LinearGaussian(D, M, scale=0.05, conditioning=30.0, seed=seed) for seed in (0, 1)]


class Rough(nn.Module):
    """A wave of some two hundred crests, in which no proposal meets them all."""

    def forward(self, z):
        return (300 * z).sin()


def test_rows_on_which_every_proposal_fails_are_told():
    vae = VAE(Rough(), Gaussian(scale=0.01), StandardNormal(1))
    guide, x = Amortized(nn.Linear(1, 2), DiagonalNormal(1)), torch.full((8, 1), 0.5)
    result = detect_anomalies(vae.model, guide, x, reference=x, accuracy="quick", false_alarm=0.4)
    # A mixture that sits on a few crests alone passes in one of twenty rows.
    assert result.reliable[0].double().mean() < 0.5


def test_an_unknown_accuracy_is_refused():
    oracle = LinearGaussian(D, M)
    with pytest.raises(UserError, match=r"accuracy is 'quik'.*'quick'"):
        scores(oracle, oracle.posterior, oracle.sample(2), accuracy="quik")
