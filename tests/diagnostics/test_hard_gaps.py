"""Gaps on ridges and of nearly exact posteriors, to their closed forms, from an encoder that is far along the ridge."""

import pytest
import torch
from oracles import LinearGaussian

from pvae.diagnostics import evaluate
from pvae.inference.families import DiagonalNormal
from pvae.inference.guides import Guide
from pvae.samplers.gaussian_vi import newton_decrement
from pvae.samplers.log_joint import LogJoint
from pvae.stats import mean_se


def ridge(loadings, scale):
    """Linear-Gaussian program whose columns load on two latents as given, with noise of this scale."""
    oracle = LinearGaussian(2, len(loadings), scale=scale)
    oracle.decoder.weight.copy_(torch.tensor(loadings))
    oracle.decoder.bias.zero_()
    return oracle


class AlongTheRidge(Guide):
    """The best diagonal normal, its mean moved along the posterior's widest direction by so many of its sds."""

    def __init__(self, oracle, sds):
        super().__init__(DiagonalNormal(2))
        self.oracle, self.sds = oracle, sds

    def params(self, x, index=None):
        values, vectors = torch.linalg.eigh(self.oracle.covariance)
        mean, log_scale = self.oracle.best(x).double().chunk(2, -1)
        moved = mean + self.sds * values[-1].sqrt() * vectors[:, -1]
        return torch.cat([moved, log_scale], -1).to(x.dtype)


# Loadings, noise, and the exact approximation gap; the mean is 2 sds off, which costs an amortization gap of 2 nats.
RIDGES = {
    "one column": (((1.0, 1.0),), 0.03, 3.161),
    "three columns": (((1.0, 1.0), (1.0, 0.8), (1.0, 0.9)), 0.1, 2.084),
    "a wider one": (((1.0, 1.0),), 0.3, 0.922),
}


@pytest.mark.parametrize("name", RIDGES)
@pytest.mark.parametrize("budget", ["quick", None])
def test_gaps_on_a_ridge_are_exact_without_annealing(name, budget):
    loadings, scale, gap = RIDGES[name]
    oracle = ridge(loadings, scale)
    assert oracle.gap.item() == pytest.approx(gap, abs=5e-4)
    found = evaluate(oracle.model, AlongTheRidge(oracle, 2.0), oracle.sample(100), budget=budget)
    summary = found.summary()
    for quantity, exact in (("amortization_gap", 2.0), ("approximation_gap", oracle.gap.item())):
        mean, se = summary[quantity]
        assert abs(mean - exact) < 4.5 * se + 0.002, quantity  # standard errors 0.0005 to 0.008
    assert summary["evidence_reliable"].mean == 1
    assert summary["optimization_gap"].mean < 0.01


@pytest.mark.parametrize("seed", range(4))
def test_the_interval_of_a_small_gap_holds_it(seed):
    oracle = LinearGaussian(2, 5, conditioning=1.5, seed=seed)
    found = evaluate(oracle.model, AlongTheRidge(oracle, 0.3), oracle.sample(100, seed=seed), seed=seed)
    low, high = found.intervals()["approximation_gap"]
    assert low - 5e-4 <= oracle.gap <= high + 5e-4
    assert high - low < 0.01


@pytest.mark.parametrize("dim", [12])
def test_many_well_conditioned_dimensions_leave_nothing(dim):
    oracle = LinearGaussian(dim, dim + 3, conditioning=1.0)
    x = oracle.sample(50)
    found = evaluate(oracle.model, _Beside(oracle), x)
    left = oracle.elbo(oracle.best(x), x) - found.values["best_elbo"]
    assert mean_se(left).mean < 0.002


class _Beside(Guide):
    def __init__(self, oracle):
        super().__init__(DiagonalNormal(len(oracle.covariance)))
        self.oracle = oracle

    def params(self, x, index=None):
        return self.oracle.best(x) + 0.3


@pytest.mark.parametrize("sds", [0.0, 0.2, 2.0])
def test_the_newton_decrement_is_what_is_left_to_win(sds):
    oracle = ridge(((1.0, 1.0),), 0.03)
    x = oracle.sample(10)
    q_params = AlongTheRidge(oracle, sds).params(x)
    left = oracle.elbo(oracle.best(x), x) - oracle.elbo(q_params, x)
    mean, log_scale = q_params.chunk(2, -1)
    said = newton_decrement(LogJoint(oracle.model, x), mean, log_scale.exp().diag_embed(), diagonal=True)
    torch.testing.assert_close(said, left, rtol=0.02, atol=2e-3)
