"""Estimates against direct computation, and standard errors against the spread over repeats."""

import math

import numpy as np
import pytest
import torch

from pvae.stats import (
    bootstrap,
    draws_needed,
    effective_sample_size,
    k_hat,
    k_hat_threshold,
    log_mean_exp,
    log_mean_exp_se,
    mean_se,
)


@pytest.fixture
def log_w():
    """Log-weights of 6 draws for 4 datapoints, in float64."""
    return torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_log_mean_exp_is_the_log_of_the_mean_weight(log_w, dim):
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


@pytest.mark.parametrize("K", [30, 100, 225, 226, 400, 900, 5000, 10_000])
def test_k_hat_needs_the_tail_alone(K):
    from arviz_stats.base import array_stats

    log_w = 2 * torch.randn(K, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    whole = [float(array_stats.psislw(-column)[1]) for column in log_w.numpy().T]
    assert k_hat(log_w).tolist() == pytest.approx(whole, rel=1e-12)


def test_a_bootstrap_interval_is_made_of_quantiles_of_resampled_means():
    values = torch.randn(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    resampled = values.numpy()[np.random.default_rng(3).integers(50, size=(2000, 50))].mean(1)
    expected = np.quantile(resampled, [0.05, 0.95])
    assert bootstrap(values, level=0.9, seed=3) == pytest.approx(tuple(expected), rel=1e-12)
    assert bootstrap(torch.tensor([2.0])) == (2, 2)
    assert all(math.isnan(end) for end in bootstrap(torch.tensor([1.0, math.nan])))


@pytest.mark.parametrize("k", [0.2, 0.5, 0.75, 0.9])
def test_k_hat_is_the_shape_of_a_pareto_tail(k):
    K, tail = 10_000, 300
    u = torch.rand(K, 200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = mean_se(k_hat(-k * u.log()))  # weights u^-k; standard error 0.005
    # The fit's prior counts as 10 draws of k = 0.5.
    assert abs(found.mean - (tail * k + 5) / (tail + 10)) < 5 * found.se


def test_k_hat_of_weights_that_are_not_finite_is_nan():
    assert k_hat(torch.full((30, 1), math.nan)).isnan().all()
    assert k_hat(torch.full((30, 1), -math.inf)).isnan().all()


def test_k_hat_of_weights_equal_but_for_rounding_and_of_weights_beyond_a_double():
    equal = torch.where(torch.arange(1000) % 10 > 0, 0.0, -1e-5).unsqueeze(-1)
    assert k_hat(equal).item() == -math.inf
    assert k_hat(-1000.0 * torch.arange(1000.0).unsqueeze(-1)).item() == math.inf


def test_draws_needed_and_the_threshold_are_inverse():
    for K in (10, 100, 1000):
        assert draws_needed(torch.tensor(k_hat_threshold(K))).item() == pytest.approx(K, rel=1e-4)
    assert k_hat_threshold(10**6) == 0.7
    assert draws_needed(torch.tensor([1.0, 2.0])).tolist() == [math.inf] * 2
