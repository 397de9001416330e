"""Symmetric divergence over simulations: closed forms of linear-Gaussian posteriors, missed modes, and its laws."""

import math

import pytest
import torch
from oracles import LinearGaussian
from posteriors import Exact

from pvae.diagnostics.symmetric_divergence import measure_symmetric_divergence
from pvae.errors import UserError
from pvae.inference.families import Delta
from pvae.inference.guides import Amortized
from pvae.stats import mean_se


@pytest.fixture(scope="module", params=[2, 10])
def oracle(request):
    return LinearGaussian(request.param, request.param + 3)


def measure(oracle, *miss, **options):
    return measure_symmetric_divergence(oracle.model, Exact(oracle, *miss), oracle.sample(5), rows=800, **options)


def test_it_is_zero_for_the_exact_posterior_in_every_row(oracle):
    found = measure(oracle)
    assert found.divergence.abs().max() < 2e-3  # float32
    assert found.width.abs().max() < 2e-3
    assert not found.missed.any()


@pytest.mark.parametrize(("scale", "shift"), [(0.5, 0.0), (2.0, 0.0), (1.0, 0.5)])
def test_it_is_the_sum_of_both_divergences_in_closed_form(oracle, scale, shift):
    dim = len(oracle.covariance)
    # With sds times s and means off by the vector d: D (s^2 + s^-2 - 2) / 2 + d^T P d (1 + s^-2) / 2.
    off = shift * oracle.covariance.diag().sqrt()
    spread = dim * (scale**2 + scale**-2 - 2) / 2
    exact = spread + (off @ oracle.precision @ off).item() * (1 + scale**-2) / 2
    divergence = mean_se(measure(oracle, scale, shift).divergence)
    assert abs(divergence.mean - exact) < 4.5 * divergence.se + 2e-3


@pytest.mark.parametrize(("scale", "shift"), [(0.7, 0.0), (1.0, 1.0)])
def test_the_bounds_stand_around_the_evidence(oracle, scale, shift):
    # Lower and upper bound of log p(x) bracket it in expectation, so that the width is positive on average.
    width = mean_se(measure(oracle, scale, shift, draws=50).width)
    assert width.mean > 3 * width.se


def test_true_latents_far_outside_are_missed(oracle):
    assert measure(oracle, 0.05).missed.double().mean() > 0.9
    assert measure(oracle, 0.8).missed.double().mean() < 0.01


def test_the_share_that_is_missed_has_an_error_even_where_none_is(oracle):
    share = measure(oracle).summary()["missed_mass"]
    assert share.mean == 0
    assert share.se == pytest.approx(math.sqrt(1 / 802 * 801 / 802 / 800))


def test_a_seed_fixes_all_and_the_stream_outside_goes_on(oracle):
    before = torch.get_rng_state()
    one, same, other = (measure(oracle, 0.5, seed=seed).divergence for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_what_it_cannot_measure_is_refused(oracle):
    guide = Amortized(torch.nn.Linear(len(oracle.bias), len(oracle.covariance)), Delta(len(oracle.covariance)))
    with pytest.raises(UserError, match="Delta is a point mass"):
        measure_symmetric_divergence(oracle.model, guide, oracle.sample(2))
    with pytest.raises(UserError, match="draws is 0"):
        measure(oracle, draws=0)
