"""The best correlated normal: exact for normals, right across kinks, harmless where nothing is finite."""

import math

import pytest
import torch
from oracles import Curved, LinearGaussian

from pvae.inference.families import FullRankNormal, LowRankNormal
from pvae.samplers.gaussian_vi import fit_gaussian
from pvae.samplers.log_joint import LogJoint
from pvae.stats import mean_se


@pytest.mark.parametrize("dim", [1, 10, 50])
@pytest.mark.parametrize("conditioning", [1.0, 100.0])
def test_one_round_finds_a_normal_posterior(dim, conditioning):
    oracle = LinearGaussian(dim, dim + 3, conditioning=conditioning)
    x = oracle.sample(5)
    mean, log_scale = (oracle.best(x) + 0.3).chunk(2, -1)
    mean, covariance = fit_gaussian(LogJoint(oracle.model, x), mean, log_scale, rounds=1)
    torch.testing.assert_close(mean, oracle.mean(x), atol=1e-4, rtol=0)
    torch.testing.assert_close(covariance, oracle.covariance.expand(5, -1, -1), atol=1e-4, rtol=0)


def test_a_kink_counts_although_no_second_derivative_sees_it():
    # For independent Laplace variables E_q|u| = s sqrt(2 / pi), so that s^2 = pi / 2 is best; their Hessian is 0.
    # Being a ratio the regression's slope is off by a share of 1 / n of n = 4,000 pairs, far below the error of seeds.
    start = torch.full((1, 4), 0.5), torch.full((1, 4), 0.2)
    found = [fit_gaussian(laplace, *start, rounds=20, sets=1000, seed=seed) for seed in range(12)]
    variances = mean_se(torch.stack([covariance[0].diagonal().mean() for _, covariance in found]))
    means = mean_se(torch.stack([mean[0].mean() for mean, _ in found]))
    assert abs(variances.mean - math.pi / 2) < 4 * variances.se
    assert abs(means.mean) < 4 * means.se
    assert max(variances.se, means.se) < 0.005


def laplace(u):
    return -u.abs().sum(-1)


def test_every_move_away_from_the_normal_found_loses():
    # The bounds are by quadrature: moved by 0.1 either way, or wider or narrower by a tenth, q is worse.
    oracle = Curved()
    x = oracle.sample(20)
    target = LogJoint(oracle.model, x)
    start = torch.zeros(20, 2), torch.zeros(20, 2)
    mean, covariance = fit_gaussian(target, *start, rounds=40, sets=32)
    bounds = [_elbo(oracle, x, mean + 0.1 * shift, covariance * factor) for shift, factor in MOVED]
    for moved in bounds[1:]:
        assert (moved - bounds[0]).mean() < 0


MOVED = [(0.0, 1.0), (1.0, 1.0), (-1.0, 1.0), (0.0, 1.2), (0.0, 1 / 1.2)]


def _elbo(oracle, x, mean, covariance):
    """ELBO [B] of normals by quadrature."""
    q = torch.distributions.MultivariateNormal(mean, covariance)
    log_q = q.log_prob(oracle.grid.unsqueeze(1))
    return (log_q.exp() * (oracle.log_joint(x) - log_q)).sum(0) * oracle.cell


def test_rows_without_finite_gradients_stay_where_they_are():
    def density(u):
        return -(u**2 * torch.tensor([[torch.nan, 1.0], [1.0, 1.0], [1e30, 1.0]])).sum(-1)

    mean, covariance = fit_gaussian(density, torch.ones(3, 2), torch.zeros(3, 2))
    eye = torch.eye(2).double()
    for lost in (0, 2):  # the last shrinks to nothing
        assert torch.equal(mean[lost], torch.ones(2).double())
        torch.testing.assert_close(covariance[lost], eye)
    torch.testing.assert_close(mean[1], torch.zeros(2).double(), atol=1e-5, rtol=0)
    torch.testing.assert_close(covariance[1], eye / 2)


def test_the_random_stream_outside_is_left_alone():
    torch.manual_seed(3)
    expected = torch.randn(3)
    torch.manual_seed(3)
    fit_gaussian(lambda u: -(u**2).sum(-1), torch.zeros(1, 2), torch.zeros(1, 2))
    assert torch.equal(torch.randn(3), expected)


def covariances(dim, count, seed=0):
    random = torch.randn(count, dim, 2 * dim, generator=torch.Generator().manual_seed(seed), dtype=torch.double)
    return random @ random.mT / dim


def test_full_rank_takes_any_covariance():
    mean, covariance = torch.randn(7, 5, dtype=torch.double), covariances(5, 7)
    family = FullRankNormal(5)
    q = family(family.params_from_gaussian(mean, covariance))
    torch.testing.assert_close(q.mean, mean)
    torch.testing.assert_close(q.covariance_matrix, covariance)


def test_low_rank_takes_the_directions_that_are_wider():
    # One common direction on top of independent scales. Measured by KL(q, p), 0.51 nats for independent normals.
    mean, covariance = torch.zeros(6).double(), (torch.eye(6) + torch.ones(6, 6)).double()
    family = LowRankNormal(6, rank=1)
    found = family(family.params_from_gaussian(mean, covariance)).covariance_matrix
    independent = torch.linalg.inv(covariance).diagonal().reciprocal().diag()
    assert _loss(found, covariance) < _loss(independent, covariance) / 5


def _loss(found, exact):
    """KL between normals of these covariances and mean 0."""
    q, p = (torch.distributions.MultivariateNormal(torch.zeros(len(c)).double(), c) for c in (found, exact))
    return torch.distributions.kl_divergence(q, p)
