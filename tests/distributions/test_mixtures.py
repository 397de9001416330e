"""Mixtures: the fast score against the plain one, and draws against an inversion of their distribution functions."""

import math

import pytest
import torch
from scipy.optimize import brentq
from scipy.stats import norm

from pvae.distributions.mixtures import DiagonalMixture, ReparametrizedMixture, well_spread

C, D = 3, 2


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def plain(mixture, z):
    """log sum_c pi_c prod_d N(z_d; mu_cd, sigma_cd^2), term by term in double precision."""
    normals = torch.distributions.Normal(mixture.means.double(), mixture.scales.double())
    return (mixture.log_weights.double() + normals.log_prob(z.double().unsqueeze(-2)).sum(-1)).logsumexp(-1)


@pytest.mark.parametrize("scale", [1.0, 1e-2, 1e-4])
def test_expanded_square_is_the_plain_one_in_float32_where_scales_are_small(scale):
    mixture = DiagonalMixture(torch.randn(50), 3 * torch.randn(50, 4), scale * (1 + torch.rand(50, 4)))
    near = (mixture.means[:20] + scale * torch.randn(20, 4)).requires_grad_()
    log_p, wanted = mixture.log_prob(near), plain(mixture, near)
    torch.testing.assert_close(log_p.double(), wanted, rtol=1e-5, atol=1e-5)
    slopes = (torch.autograd.grad(value.sum(), near)[0] for value in (log_p, wanted))
    torch.testing.assert_close(*slopes, rtol=1e-4, atol=1e-3)


def test_own_batch_is_scored_and_drawn_place_by_place():
    mixture = DiagonalMixture(torch.randn(4, C), torch.randn(4, C, D), torch.rand(4, C, D) + 0.1).expand([5, 4])
    z = mixture.sample((6,))
    assert z.shape == (6, 5, 4, D)
    torch.testing.assert_close(mixture.log_prob(z).double(), plain(mixture, z), rtol=1e-5, atol=1e-5)
    assert len(z.flatten(0, 2).unique(dim=0)) == 6 * 5 * 4


def test_mean_is_that_of_the_draws():
    mixture = DiagonalMixture(torch.randn(C), torch.randn(C, D), torch.rand(C, D) + 0.1)
    draws = mixture.sample((40_000,))
    assert ((draws.mean(0) - mixture.mean).abs() < 5 * draws.std(0) / math.sqrt(40_000)).all()


def split(q_params):
    """q_params [C (1 + 2 D)] as a mixture."""
    logits, means, log_scales = q_params.split([C, C * D, C * D])
    return ReparametrizedMixture(logits, means.view(C, D), log_scales.view(C, D).exp())


def conditional(mixture, z, d):
    """F_d(. | z_<d) in scipy's terms."""
    log_weights, means, scales = (tensor.detach().numpy() for tensor in vars_of(mixture))
    log_weights = log_weights + norm(means[:, :d], scales[:, :d]).logpdf(z[:d]).sum(-1)
    weights = torch.tensor(log_weights).softmax(-1).numpy()
    return lambda value: float((weights * norm(means[:, d], scales[:, d]).cdf(value)).sum())


def vars_of(mixture):
    return mixture.log_weights, mixture.means, mixture.scales


def levels(q_params, z):
    return [conditional(split(q_params), z, d)(z[d]) for d in range(D)]


def inverted(q_params, u):
    """z(q_params) at noise u by root finding, dimension by dimension."""
    z = []
    for d in range(D):
        below = conditional(split(q_params), z, d)
        z.append(brentq(lambda value, below=below, d=d: below(value) - u[d], -20, 20, xtol=1e-14, rtol=1e-14))
    return torch.tensor(z)


@pytest.mark.usefixtures("double")
def test_a_draw_moves_as_the_inverse_distribution_functions_do():
    for seed in range(5):
        q_params = (0.7 * torch.randn(C * (1 + 2 * D))).requires_grad_()
        direction = torch.randn_like(q_params)
        torch.manual_seed(seed)
        z = split(q_params).rsample()
        u = levels(q_params, z.detach().numpy())
        step = 1e-3
        ahead, back = (inverted(q_params.detach() + sign * step * direction, u) for sign in (1, -1))
        for d in range(D):
            (slope,) = torch.autograd.grad(z[d], q_params, create_graph=True)
            (bend,) = torch.autograd.grad(slope @ direction, q_params, retain_graph=True)
            along = ((ahead - back)[d] / (2 * step)).item()
            second = ((ahead + back - 2 * z.detach())[d] / step**2).item()
            assert (slope @ direction).item() == pytest.approx(along, rel=1e-4, abs=1e-5)
            assert (bend @ direction).item() == pytest.approx(second, rel=1e-3, abs=1e-3)


def test_chord_steps_leave_the_draw_in_place():
    mixture = split(torch.randn(C * (1 + 2 * D)))
    torch.manual_seed(3)
    reparametrized = mixture.rsample((100,))
    torch.manual_seed(3)
    assert reparametrized.equal(mixture.sample((100,)))


def test_weights_feel_draws_in_either_tail_in_float32():
    slopes = []
    for dtype in (torch.float32, torch.float64):
        for side in (-1.0, 1.0):
            logits = torch.zeros(2, dtype=dtype, requires_grad=True)
            mixture = ReparametrizedMixture(
                logits, torch.tensor([[0.0], [0.5]], dtype=dtype), torch.ones(2, 1, dtype=dtype)
            )
            mixture.sample = lambda _, side=side, dtype=dtype: torch.tensor([0.25 + 7 * side], dtype=dtype)
            slopes += torch.autograd.grad(mixture.rsample().sum(), logits)
    narrow, wide = torch.stack(slopes[:2]).double(), torch.stack(slopes[2:])
    torch.testing.assert_close(narrow, wide, rtol=1e-4, atol=0)
    torch.testing.assert_close(wide[0], wide[1], rtol=1e-9, atol=0)  # the mirror image, with components exchanged


def test_points_are_apart_and_always_the_same():
    points = well_spread(10, 2)
    assert points.equal(well_spread(10, 2))
    assert torch.pdist(points).min() > 0.2
    assert well_spread(4096, 3).std(0) == pytest.approx(torch.ones(3), abs=0.01)
