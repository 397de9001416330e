"""Estimates against direct computation, and standard errors against the spread over repeats."""

import math

import numpy as np
import pytest
import torch

from pvae.stats import effective_sample_size, log_mean_exp, log_mean_exp_se, mean_se


@pytest.fixture
def log_w():
    """Log-weights of 6 draws for 4 datapoints, in float64."""
    return torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_log_mean_exp_is_what_it_says(log_w, dim):
    torch.testing.assert_close(log_mean_exp(log_w, dim), log_w.exp().mean(dim).log())


@pytest.mark.parametrize("shift", [-1e4, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_log_mean_exp_moves_with_a_shift_and_never_overflows(log_w, shift, dtype):
    found = log_mean_exp((log_w + shift).to(dtype))
    torch.testing.assert_close(found.double(), log_mean_exp(log_w) + shift, rtol=3e-7, atol=0)


def test_log_mean_exp_counts_draws_of_no_weight():
    assert log_mean_exp(torch.tensor([0.0, -math.inf])).item() == pytest.approx(-math.log(2))


def test_log_mean_exp_se_is_the_spread_over_repeats():
    # The ratio of the mean SE to the empirical one is 1 up to 1 / sqrt(2 (R - 1)) = 1.1 % from R repeats
    # (5 of them allowed) and O(1 / K) < 0.5 % from the delta method.
    K, R = 500, 4000
    log_w = 0.5 * torch.randn(K, R, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ratio = log_mean_exp_se(log_w).mean() / log_mean_exp(log_w).std()
    assert ratio.item() == pytest.approx(1, abs=5 / math.sqrt(2 * (R - 1)) + 0.005)


def test_log_mean_exp_se_is_that_of_each_datapoints_weights(log_w):
    w = log_w.exp()
    expected = w.std(0) / math.sqrt(len(w)) / w.mean(0)
    shifted = log_w + torch.tensor([-1e4, 0, 1, 1e4])
    torch.testing.assert_close(log_mean_exp_se(shifted), expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(log_mean_exp_se(shifted.T, dim=1), expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_mean_se_is_the_sample_mean_and_its_error(offset):
    values = np.random.default_rng(0).normal(size=1000).astype(np.float32) + np.float32(offset)
    found = mean_se(torch.from_numpy(values))
    wide = values.astype(np.float64)
    assert found.mean == pytest.approx(wide.mean(), rel=1e-12)
    assert found.se == pytest.approx(wide.std(ddof=1) / math.sqrt(1000), rel=1e-12)


def test_one_value_has_no_standard_error():
    found = mean_se(torch.tensor([2.0]))
    assert found.mean == 2
    assert math.isnan(found.se)


@pytest.mark.parametrize("K", [1, 2, 100])
def test_effective_sample_size_is_K_for_equal_weights_and_1_for_a_single_one(K):
    single = torch.full((K, 3), -1e4, dtype=torch.float64)
    assert effective_sample_size(single).tolist() == pytest.approx([K] * 3)
    single[0] = 0
    assert effective_sample_size(single).tolist() == pytest.approx([1] * 3)


@pytest.mark.parametrize("spread", [0.01, 1.0, 10.0])
def test_effective_sample_size_is_kishs_and_between_1_and_K(spread):
    w = (spread * torch.randn(50, 200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).exp()
    found = effective_sample_size(w.log())
    torch.testing.assert_close(found, w.sum(0) ** 2 / (w**2).sum(0))
    assert ((found >= 1) & (found <= 50)).all()


@pytest.mark.parametrize("shift", [-1e4, 1e4])
def test_effective_sample_size_does_not_feel_a_shift_in_float32(shift):
    equal = torch.full((1000,), shift)
    assert effective_sample_size(equal).item() == pytest.approx(1000, rel=1e-5)
