"""Posteriors against reference draws: exact ones pass, missed ones are found, unreliable references give no number."""

import math
from dataclasses import replace

import pyro
import pyro.distributions as dist
import pytest
import torch
from oracles import LinearGaussian
from posteriors import MISSES, Exact, Gridded

from pvae.diagnostics.reference_posterior import (
    _draw_particles,
    compare_with_mcmc,
    compare_with_reference,
    run_long_chains,
)
from pvae.errors import UserError
from pvae.inference.families import Delta, DiagonalNormal
from pvae.inference.guides import Amortized, Guide
from pvae.samplers.ais import AISEstimate
from pvae.samplers.posterior_draws import pool_chains
from pvae.samplers.row_posterior import posterior
from pvae.stats import uniform_p

ROWS = 10
SHORT = {"draws": 800, "warm_up": 200, "temperatures": 30}
LINEAR = [("chains", 10, 100.0), ("draws", 10, 100.0)]
SLOW = [("chains", dim, c) for dim, c in [(2, 1.0), (2, 100.0), (10, 1.0), (50, 1.0), (50, 100.0)]]


def make_draws(source, model, x, draws=800):
    """Reference draws by long chains or by the cheapest method whose checks pass."""
    if source == "chains":
        return pool_chains(run_long_chains(model, x, **SHORT | {"draws": draws}))
    return posterior(model, None, x, accuracy="high")


def linear(source, dim, conditioning):
    oracle = LinearGaussian(dim, dim + 3, conditioning=conditioning)
    x = oracle.sample(ROWS)
    # The largest R-hat of 50 dimensions is below 1.01 in longer chains only.
    draws = make_draws(source, oracle.model, x, 800 if (source, dim, conditioning) in LINEAR else 2000)

    def compare(*miss):
        return compare_with_reference(oracle.model, Exact(oracle, *miss), x, draws=draws)

    return compare, (oracle.mean(x), oracle.covariance.diag().sqrt().expand(len(x), -1))


def curved():
    oracle = Gridded().oracle
    x = oracle.sample(ROWS)
    draws = make_draws("draws", oracle.model, x)

    def compare(*miss):
        guide = Gridded(*miss)
        guide.oracle = oracle
        return compare_with_reference(oracle.model, guide, x, draws=draws)

    return compare, oracle.moments(x)


@pytest.fixture(
    scope="module",
    params=[*LINEAR, *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW), "curved"],
    ids=str,
)
def case(request):
    """A function from a miss to the comparison with a reference, and the exact means and standard deviations."""
    return curved() if request.param == "curved" else linear(*request.param)


def test_references_are_reliable_and_have_the_exact_means_and_standard_deviations(case):
    compare, (mean, sd) = case
    found = compare()
    assert found.reliable.all()
    assert ((found.mean - mean).abs() < 4.5 * found.sd / found.ess.sqrt().unsqueeze(-1)).all()  # 4.5 standard errors
    # The error that is stated is the reference's and that of 4000 draws of q together, the latter about a third of it.
    assert ((found.sd / sd).log().abs() < 4.5 * found.sd_se).all()


def test_an_exact_posterior_passes(case):
    compare, _ = case
    figures = compare().summary()
    assert figures["reference_p"].mean > 0.01
    assert figures["mean_error"].mean < 0.02  # a sampler's noise, 0.03, is taken off
    for name, value in (("sd_ratio", 1.0), ("coverage_50", 0.5), ("coverage_90", 0.9)):
        assert figures[name].mean == pytest.approx(value, abs=0.02)  # standard error at most 0.004
    assert figures["weighted_off"].mean == 0


@pytest.mark.parametrize("miss", MISSES)
def test_a_missed_posterior_is_found_and_by_how_much(case, miss):
    compare, _ = case
    scale, shift = MISSES[miss]
    figures = compare(scale, shift).summary()
    assert figures["reference_p"].mean < 1e-3
    assert figures["mean_error"].mean == pytest.approx(shift, abs=0.03)  # standard error at most 0.007
    assert figures["sd_ratio"].mean == pytest.approx(scale, rel=0.02)  # standard error at most 0.4%


@pytest.mark.parametrize("case", LINEAR, indirect=True, ids=str)
@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_coverage_is_that_of_closed_forms(case, scale):
    compare, _ = case
    figures, normal = compare(scale).summary(), torch.distributions.Normal(0.0, 1.0)
    for name, level in (("coverage_50", 0.5), ("coverage_90", 0.9)):
        exact = 2 * normal.cdf(scale * normal.icdf(torch.tensor((1 + level) / 2))).item() - 1
        assert figures[name].mean == pytest.approx(exact, abs=0.02)  # standard error at most 0.004


def test_weighted_estimates_of_a_narrow_posterior_are_off(case):
    compare, _ = case
    assert compare(0.2).summary()["weighted_off"].mean > 0.5


@pytest.mark.slow
def test_p_values_of_the_exact_posterior_are_uniform_themselves():
    # Rows have chains of their own: 500 rows are 100 repeats of 5.
    oracle = LinearGaussian(2, 5)
    x = oracle.sample(500)
    draws = pool_chains(run_long_chains(oracle.model, x, **SHORT))

    def repeats(scale):
        found = compare_with_reference(oracle.model, Exact(oracle, scale), x, draws=draws)
        return torch.stack([some(found, slice(i, None, 100)).p_values().flatten() for i in range(100)])

    assert (uniform_p(repeats(1.0)) > 0.01).all()
    assert (uniform_p(repeats(0.95))[2:] < 1e-3).all()  # by standard deviations


class Folded(torch.nn.Module):
    """Latents of either sign explain a row: two modes at +-x, which merge near 0."""

    def forward(self, x, index=None):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 3.0).to_event(1))
            pyro.sample("x", dist.Normal(z.abs(), 0.5).to_event(1), obs=x)


class Fixed(Guide):
    """One normal for all rows."""

    def __init__(self):
        super().__init__(DiagonalNormal(1))

    def params(self, x, index=None):
        return self.family.initial_params().expand(len(x), -1)


FOLDS = torch.tensor([[0.0], [6.0], [0.0]])


@pytest.fixture(scope="module")
def folds():
    return compare_with_mcmc(Folded(), Fixed(), FOLDS, draws=700, warm_up=200, temperatures=30)


def some(found, rows):
    """The reference of some of the rows."""
    return replace(found, **{name: value[rows] for name, value in vars(found).items() if value.dim()})


def test_chains_that_are_stuck_in_different_modes_are_refused_and_no_figure_uses_them(folds):
    assert folds.reliable.tolist() == [True, False, True]
    figures, alone = folds.summary(), some(folds, [0, 2]).summary()
    assert figures["reliable"].mean == pytest.approx(2 / 3)
    assert alone["reliable"].mean == 1
    assert {n: v.mean for n, v in figures.items() if n != "reliable"} == {
        n: v.mean for n, v in alone.items() if n != "reliable"
    }


def test_checked_draws_hold_both_modes():
    found = compare_with_reference(Folded(), Fixed(), FOLDS, draws=posterior(Folded(), None, FOLDS))
    assert found.reliable.all()
    # Modes at +-6 V / 0.25 with V = 1 / (1 / 9 + 4): a sd of 5.84 about a mean of 0, its error 0.1.
    variance = 1 / (1 / 9 + 4)
    assert found.sd[1, 0] == pytest.approx((variance + (24 * variance) ** 2) ** 0.5, rel=0.02)
    assert abs(found.mean[1, 0]) < 0.5


def test_where_most_references_are_refused_there_is_no_number(folds):
    assert set(some(folds, [0, 1]).summary()) > {"reliable"}
    assert set(some(folds, [0, 1, 1]).summary()) == {"reliable"}


def test_chains_that_are_too_short_are_refused():
    oracle = LinearGaussian(2, 5)
    x = oracle.sample(4)
    found = compare_with_mcmc(oracle.model, Exact(oracle), x, draws=30, warm_up=30, temperatures=10)
    assert not found.reliable.any()


def test_chains_that_diverge_are_refused():
    oracle = LinearGaussian(2, 5)
    chains = run_long_chains(oracle.model, oracle.sample(3), **SHORT)
    divergent = torch.tensor([0.0, 0.05, 0.0])
    assert torch.equal(pool_chains(replace(chains, divergence_rate=divergent)).reliable, divergent == 0)


def test_chains_start_at_different_particles_that_have_weight():
    position = torch.arange(12.0).view(12, 1, 1).expand(12, 3, 2)
    log_w = torch.full((12, 3), -1000.0)
    log_w[4:8], log_w[:, 2] = 0.0, math.nan
    begin = _draw_particles(AISEstimate(log_w, position, log_w[0], log_w[0]), 4)
    assert begin.shape == (4, 3, 2)
    assert begin[:, :2].sort(0).values[:, 0, 0].tolist() == [4, 5, 6, 7]
    assert len(begin[:, 2, 0].unique()) == 4  # without weights any will do


def test_a_seed_fixes_all_and_the_stream_outside_goes_on():
    oracle = LinearGaussian(2, 5)
    x, few = oracle.sample(3), {"draws": 10, "warm_up": 10, "temperatures": 5}
    before, seen = torch.get_rng_state(), []
    one, same, other = (
        compare_with_mcmc(oracle.model, Exact(oracle), x, seed=seed, progress=seen.append, **few) for seed in (3, 3, 4)
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one.mean, same.mean)
    assert torch.equal(one.guide_mean, same.guide_mean)
    assert not torch.equal(one.mean, other.mean)
    third = seen[: len(seen) // 3]
    assert third == sorted(third)
    assert third[-1] == pytest.approx(1)


@pytest.mark.parametrize("name", ["chains", "draws", "warm_up", "temperatures", "num_integration_steps"])
def test_counts_below_one_are_refused(name):
    oracle = LinearGaussian(2, 5)
    with pytest.raises(UserError, match=f"{name} is 0, but it must be at least 1"):
        compare_with_mcmc(oracle.model, Exact(oracle), oracle.sample(2), **{"draws": 5, "warm_up": 5, name: 0})


def test_a_point_mass_is_refused():
    oracle = LinearGaussian(2, 5)
    with pytest.raises(UserError, match="Delta is a point mass"):
        compare_with_mcmc(oracle.model, Amortized(torch.nn.Linear(5, 2), Delta(2)), oracle.sample(2))
