"""The oracles' closed forms against torch.distributions, quadrature and their own draws."""

import math

import pyro
import pytest
import torch
from oracles import Curved, LinearGaussian
from torch.distributions import MultivariateNormal, Normal, kl_divergence

SHAPES = [(1, 3), (2, 5), (3, 4)]


@pytest.fixture(params=SHAPES, ids=str)
def oracle(request):
    return LinearGaussian(*request.param, scale=0.7, conditioning=4.0, seed=1)


def test_evidence_is_the_density_of_the_marginal(oracle):
    x = oracle.sample(20)
    noise = oracle.scale**2 * torch.eye(x.shape[1])
    marginal = MultivariateNormal(oracle.bias, oracle.weight @ oracle.weight.T + noise)
    torch.testing.assert_close(oracle.evidence(x), marginal.log_prob(x.double()))


def test_evidence_is_the_integral_over_a_single_latent():
    oracle = LinearGaussian(1, 3, scale=0.7)
    x, z = oracle.sample(5), torch.linspace(-12, 12, 4001, dtype=torch.double)
    step = z[1] - z[0]
    mean = z[:, None, None] * oracle.weight.T + oracle.bias
    joint = Normal(mean, oracle.scale).log_prob(x.double()).sum(-1) + Normal(0.0, 1.0).log_prob(z)[:, None]
    torch.testing.assert_close(oracle.evidence(x), joint.logsumexp(0) + step.log())


def test_elbo_is_the_evidence_less_the_divergence(oracle):
    x = oracle.sample(20)
    q_params = torch.randn(20, 2 * oracle.weight.shape[1], generator=torch.Generator().manual_seed(2)).double()
    mu, log_sigma = q_params.chunk(2, -1)
    q = MultivariateNormal(mu, torch.diag_embed((2 * log_sigma).exp()))
    divergence = kl_divergence(q, MultivariateNormal(oracle.mean(x), oracle.covariance))
    torch.testing.assert_close(oracle.elbo(q_params, x), oracle.evidence(x) - divergence)


def test_gap_is_the_divergence_of_the_best_diagonal(oracle):
    x = oracle.sample(20).double()
    mu, log_sigma = oracle.best(x).chunk(2, -1)
    q = MultivariateNormal(mu, torch.diag_embed((2 * log_sigma).exp()))
    divergence = kl_divergence(q, MultivariateNormal(oracle.mean(x), oracle.covariance))
    torch.testing.assert_close(divergence, oracle.gap.expand(20))


def test_gap_opens_with_the_conditioning():
    gaps = [LinearGaussian(2, 5, conditioning=c).gap.item() for c in (1.0, 2.0, 5.0, 10.0)]
    assert gaps == sorted(gaps)
    assert abs(gaps[0]) < 1e-6
    assert gaps[-1] > 0.1


def test_best_diagonal_is_stationary_and_a_maximum(oracle):
    x = oracle.sample(20).double()
    q_params = oracle.best(x).requires_grad_()
    top = oracle.elbo(q_params, x)
    (gradient,) = torch.autograd.grad(top.sum(), q_params)
    assert gradient.abs().max() < 1e-10
    aside = 0.1 * torch.randn(100, *q_params.shape, generator=torch.Generator().manual_seed(3)).double()
    assert all((oracle.elbo(q_params + step, x) < top).all() for step in aside)


def test_program_scores_what_the_equations_say(oracle):
    x = oracle.sample(20)
    torch.manual_seed(4)
    trace = pyro.poutine.trace(oracle.model).get_trace(x)
    trace.compute_log_prob()
    z = trace.nodes["z"]["value"].double()
    prior = -(z**2).sum(-1) / 2 - z.shape[1] / 2 * math.log(2 * math.pi)
    noise = Normal(z @ oracle.weight.T + oracle.bias, oracle.scale).log_prob(x.double()).sum(-1)
    torch.testing.assert_close(trace.nodes["z"]["log_prob"].double(), prior, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(trace.nodes["x"]["log_prob"].double(), noise, atol=1e-4, rtol=1e-5)
    assert not any(p.requires_grad for p in oracle.parameters())


def test_data_have_the_moments_of_the_marginal(oracle):
    n = 20_000
    x = oracle.sample(n).double()
    covariance = oracle.weight @ oracle.weight.T + oracle.scale**2 * torch.eye(x.shape[1])
    variance = covariance.diag()
    # Standard errors: sqrt(C_ii / n) of a mean, sqrt((C_ii C_jj + C_ij^2) / n) of a covariance.
    assert ((x.mean(0) - oracle.bias).abs() < 5 * (variance / n).sqrt()).all()
    assert ((x.T.cov() - covariance).abs() < 5 * ((variance.outer(variance) + covariance**2) / n).sqrt()).all()


def test_posterior_guide_draws_from_the_posterior(oracle):
    n = 20_000
    x = oracle.sample(1).expand(n, -1)
    torch.manual_seed(5)
    z = pyro.poutine.trace(oracle.posterior).get_trace(x).nodes["z"]["value"].double()
    variance = oracle.covariance.diag()
    # Standard errors as above.
    assert ((z.mean(0) - oracle.mean(x[:1])).abs() < 5 * (variance / n).sqrt()).all()
    spread = ((variance.outer(variance) + oracle.covariance**2) / n).sqrt()
    assert ((z.T.cov().reshape(spread.shape) - oracle.covariance).abs() < 5 * spread).all()


def test_quadrature_gives_all_rows_of_binary_values_a_total_probability_of_one():
    x = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 8)
    assert abs(Curved().evidence(x).exp().sum().item() - 1) < 1e-10  # what lies outside the grid is 4e-12


def test_moments_by_quadrature_are_those_of_weighted_draws():
    oracle = Curved()
    x, z = oracle.sample(4), torch.randn(100_000, 2, generator=torch.Generator().manual_seed(1)).double()
    w = oracle.double().likelihood(oracle.decoder(z)).log_prob(x.double().unsqueeze(1)).softmax(-1)
    mean, sd = oracle.moments(x)
    errors = ((w**2).unsqueeze(-1) * (z - mean.unsqueeze(1)) ** 2).sum(1).sqrt()
    assert ((w @ z - mean).abs() < 4.5 * errors).all()  # 4.5 standard errors of the weighted mean
    spread = (w.unsqueeze(-1) * (z - mean.unsqueeze(1)) ** 2).sum(1).sqrt()
    torch.testing.assert_close(spread, sd, rtol=0.03, atol=0)  # its standard error is 0.5 to 0.7 percent
