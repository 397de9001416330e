"""Calibration: silent for exact posteriors, their p-values uniform; narrowed, widened and shifted ones are found."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from oracles import SOURCES, LinearGaussian
from posteriors import MISSES, Exact, Gridded

from pvae.diagnostics.calibration import Calibration, calibrate, ecdf_band, ecdf_distance
from pvae.errors import UserError
from pvae.inference.families import Delta, Family
from pvae.inference.guides import Amortized, Guide, RefinedGuide
from pvae.inference.latents import find_latent_sites
from pvae.stats import uniform_p

SHAPES = [(2, 1.0), (2, 100.0), (10, 1.0), (10, 100.0), pytest.param(50, 100.0, marks=pytest.mark.slow)]
# What TARP sees at 500 rows. A shift moves truth and reference point apart, which few dimensions bury in noise.
SEEN = {"narrowed": 2, "widened": 2, "shifted": 10}


def linear(dim, conditioning):
    oracle = LinearGaussian(dim, dim + 3, conditioning=conditioning)
    return oracle, torch.zeros(1, dim + 3)


def calibrated(oracle, like, scale=1.0, shift=0.0, **settings):
    return calibrate(oracle.model, Exact(oracle, scale, shift), like, **settings)


def p(found):
    return found.summary()["sbc_p"].mean, found.summary()["tarp_p"].mean


@pytest.mark.parametrize(("dim", "conditioning"), SHAPES)
def test_an_exact_posterior_is_calibrated(dim, conditioning):
    assert min(p(calibrated(*linear(dim, conditioning), seed=1))) > 0.01


@pytest.mark.parametrize("miss", MISSES)
@pytest.mark.parametrize(("dim", "conditioning"), SHAPES)
def test_a_narrowed_widened_or_shifted_one_is_not(dim, conditioning, miss):
    sbc, tarp = p(calibrated(*linear(dim, conditioning), *MISSES[miss]))
    assert sbc < 1e-3
    if dim >= SEEN[miss]:
        assert tarp < 1e-3


def test_a_posterior_that_is_no_normal_is_calibrated():
    guide = Gridded()
    assert min(p(calibrate(guide.oracle.model, guide, torch.zeros(1, 8)))) > 0.01


@pytest.mark.parametrize("miss", MISSES)
def test_nor_is_one_that_is_no_normal(miss):
    guide = Gridded(*MISSES[miss])
    assert p(calibrate(guide.oracle.model, guide, torch.zeros(1, 8)))[0] < 1e-3


def repeated(scale=1.0):
    """p-values of 100 repeats: of the first dimension's ranks, of TARP, and the smallest after adjustment, [100, 3]."""
    oracle, like = linear(2, 3.0)
    found = [calibrated(oracle, like, scale, rows=100, draws=50, seed=seed) for seed in range(100)]
    return torch.tensor([[uniform_p(c.ranks)[0], p(c)[1], p(c)[0]] for c in found])


def test_p_values_of_the_exact_posterior_are_uniform_themselves():
    values = repeated()
    assert (uniform_p(values[:, :2]) > 0.01).all()
    assert (values[:, 2] < 0.05).sum() <= 13  # expected 5 at most, standard error 2.2


def test_p_values_of_a_somewhat_narrow_one_are_not():
    values = repeated(0.8)
    assert (uniform_p(values[:, :2]) < 1e-3).all()
    assert (values[:, 2] < 0.05).sum() > 13


def test_figures_of_a_missed_posterior_are_those_of_closed_forms():
    oracle, like = linear(2, 100.0)
    narrow = calibrated(oracle, like, 0.5, rows=2000, draws=1000).summary()
    moved = calibrated(oracle, like, 1.0, 0.5, rows=2000, draws=1000).summary()
    normal = torch.distributions.Normal(0.0, 1.0)
    for name, level in (("sbc_coverage_50", 0.5), ("sbc_coverage_90", 0.9)):
        share = 2 * normal.cdf(0.5 * normal.icdf(torch.tensor((1 + level) / 2))).item() - 1
        assert abs(narrow[name].mean - share) < 4.5 * narrow[name].se  # standard error 0.008
    assert abs(narrow["z_sd"].mean - 2) < 4.5 * narrow["z_sd"].se  # standard error 0.02
    assert abs(moved["z_mean"].mean - 0.5) < 4.5 * moved["z_mean"].se  # standard error 0.02
    exact = 1 - oracle.covariance.diag().mean().item() / 4
    assert narrow["contraction"].mean == pytest.approx(exact, abs=0.02)  # standard error 0.004, of the prior's variance


class LogGamma(Family):
    """log s of s ~ Gamma(q_params)."""

    def forward(self, q_params):
        q = dist.Gamma(q_params[..., :1], q_params[..., 1:])
        return dist.TransformedDistribution(q, torch.distributions.ExpTransform().inv).to_event(1)


class Rates(Guide):
    """The posterior of a rate, Gamma(2, 1) before and after it is seen, times a factor."""

    def __init__(self, sites, factor=1.0):
        super().__init__(LogGamma(1), sites)
        self.factor = factor

    def params(self, x, index=None):
        return torch.stack([torch.full((len(x),), 2.0 + x.shape[1]), (1 + x.sum(-1)) / self.factor], -1)


def rates(x, index=None):
    with pyro.plate("data", len(x), dim=-1):
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        pyro.sample("x", dist.Exponential(rate.unsqueeze(-1).expand(*rate.shape, 3)).to_event(1), obs=x)


def test_latents_with_bounds_are_ranked_as_the_real_numbers_behind_them():
    like = torch.ones(5, 3)
    sites = find_latent_sites(rates, like)
    assert min(p(calibrate(rates, Rates(sites), like))) > 0.01
    assert p(calibrate(rates, Rates(sites, 1.5), like))[0] < 1e-3


@pytest.mark.parametrize("source", SOURCES)
def test_every_source_of_lam_is_judged_by_itself(source):
    oracle, like = LinearGaussian(2, 5, conditioning=1.0), torch.zeros(1, 5)
    torch.manual_seed(0)
    untrained = SOURCES[source](oracle.model, 2, 5, 10)
    settings = {"rows": 200, "draws": 50}
    best = calibrate(oracle.model, RefinedGuide(untrained, oracle.model, steps=100), like, **settings)
    # Untrained networks are far off; a table's rows are fitted afresh, and the exact posterior is in the family.
    assert (p(calibrate(oracle.model, untrained, like, **settings))[0] < 1e-3) == (source != "PerDatapoint")
    assert p(best)[0] > 0.01


@pytest.mark.parametrize(("N", "D"), [(20, 1), (200, 5)])
def test_ecdfs_leave_the_band_where_their_p_value_says_so(N, D):
    outside = []
    for seed in range(40):
        u = torch.rand(N, D, generator=torch.Generator().manual_seed(seed)) ** (1 + 0.3 * (seed % 3))
        found = Calibration(u, u[:, 0], u, u, torch.tensor(1))
        outside.append(bool(ecdf_distance(u).max() > ecdf_band(N, D)))
        assert outside[-1] == bool(found.p_values().min() < 0.05)
    assert 0 < sum(outside) < 40


def test_a_distance_is_the_test_statistic_of_kolmogorov_and_smirnov():
    from scipy.stats import kstest

    u = torch.rand(50, 3, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    expected = torch.tensor([kstest(column, "uniform").statistic for column in u.T.numpy()])
    torch.testing.assert_close(ecdf_distance(u), expected)


def test_p_values_and_distances_have_no_error_and_all_else_has():
    figures = calibrated(*linear(2, 3.0), rows=50).summary()
    assert {name for name, value in figures.items() if math.isnan(value.se)} == {
        "sbc_p",
        "sbc_distance",
        "tarp_p",
        "tarp_distance",
    }


def test_a_seed_fixes_all_and_the_stream_outside_goes_on():
    oracle, like = linear(2, 3.0)
    before = torch.get_rng_state()
    one, same, other = (calibrated(oracle, like, rows=20, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one.ranks, same.ranks)
    assert not torch.equal(one.ranks, other.ranks)


def test_progress_ends_at_one():
    seen = []
    calibrated(*linear(2, 3.0), rows=600, progress=seen.append)
    assert seen == sorted(seen)
    assert seen[-1] == 1


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"rows": 0}, "rows is 0, but it must be at least 1"),
        ({"draws": 1}, "draws is 1, but calibration needs at least 2"),
    ],
)
def test_too_few_are_refused(settings, says):
    with pytest.raises(UserError, match=says):
        calibrated(*linear(2, 3.0), **settings)


def test_a_point_mass_is_refused():
    oracle, like = linear(2, 3.0)
    with pytest.raises(UserError, match="Delta is a point mass"):
        calibrate(oracle.model, Amortized(torch.nn.Linear(5, 2), Delta(2)), like)
