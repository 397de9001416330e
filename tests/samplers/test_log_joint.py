"""Targets of samplers: the density that is written by hand, of any program, and rows drawn from the program itself."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from oracles import LinearGaussian
from test_programs import PROGRAMS, rows
from torch import nn
from torch.distributions import constraints

from pvae.errors import UserError
from pvae.generative.likelihoods import Bernoulli
from pvae.generative.priors import StandardNormal
from pvae.generative.vae import VAE
from pvae.inference.latents import LatentSite, LatentSites, find_latent_sites
from pvae.samplers.log_joint import LogJoint, simulate_joint, unconstrain
from tests.inference.test_latents import counts

each_program = pytest.mark.parametrize("make", PROGRAMS.values(), ids=PROGRAMS)
pytestmark = pytest.mark.usefixtures("double")


@pytest.mark.parametrize("chains", [1, 3])
def test_a_target_is_the_joint_density_written_by_hand(chains):
    oracle = LinearGaussian(2, 5)
    x, u = oracle.sample(4), torch.randn(chains, 4, 2)
    log_lik, log_prior = LogJoint(oracle.model, x).log_lik_and_prior(u)
    torch.testing.assert_close(log_lik, dist.Normal(oracle.decoder(u), oracle.scale).log_prob(x).sum(-1))
    torch.testing.assert_close(log_prior, dist.Normal(0.0, 1.0).log_prob(u).sum(-1))
    torch.testing.assert_close(LogJoint(oracle.model, x)(u), log_lik + log_prior)


def test_bounded_latents_bring_the_volume_of_their_change_of_variables():
    x, u = torch.tensor([[0.0, 1.0, 0.0], [2.0, 3.0, 4.0]]), torch.randn(4, 2, 3)
    log_lik, log_prior = LogJoint(counts, x).log_lik_and_prior(u)
    rate, share = u[..., :1].exp(), dist.transforms.StickBreakingTransform()(u[..., 1:])
    torch.testing.assert_close(log_lik, dist.Poisson(rate * share).log_prob(x).sum(-1))
    volume = dist.transforms.StickBreakingTransform().log_abs_det_jacobian(u[..., 1:], share) + u[..., 0]
    by_hand = dist.Gamma(3.0, 0.5).log_prob(rate[..., 0]) + dist.Dirichlet(torch.tensor([1.0, 2.0, 3.0])).log_prob(
        share
    )
    torch.testing.assert_close(log_prior, by_hand + volume)


def positive(x, index=None):
    """log(rate) has density Gamma(2, 1.5) in rate."""
    with pyro.plate("data", len(x), dim=-1):
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.5))
        pyro.sample("x", dist.Poisson(rate.unsqueeze(-1)).to_event(1), obs=x)


def test_the_prior_of_u_integrates_to_one_and_is_what_its_draws_have():
    target, line = LogJoint(positive, torch.ones(1, 1)), torch.linspace(-25, 5, 6001)
    density = target.log_lik_and_prior(line.view(-1, 1, 1))[1].exp()
    assert abs((density.sum() * (line[1] - line[0])).item() - 1) < 1e-6
    torch.manual_seed(0)
    u = target.prior(20_000).flatten()
    mean, sd = torch.digamma(torch.tensor(2.0)) - math.log(1.5), torch.polygamma(1, torch.tensor(2.0)).sqrt()
    assert (u.mean() - mean).abs() < 4.5 * sd / 20_000**0.5  # 4.5 standard errors


@each_program
def test_every_program_has_a_target_whose_prior_draws_it_scores(make):
    program = make()
    target = LogJoint(program.model, rows(program))
    u = target.prior(3)
    assert u.shape == (3, len(target.x), target.latents.dim)
    assert target(u).isfinite().all()


@each_program
def test_one_chain_is_scored_as_one_of_many(make):
    program = make()
    target = LogJoint(program.model, rows(program))
    u = target.prior(3)
    torch.testing.assert_close(target(u)[1:2], target(u[1:2]))


def test_some_rows_of_a_target_are_scored_as_among_all():
    oracle = LinearGaussian(2, 5)
    target, u = LogJoint(oracle.model, oracle.sample(6), torch.arange(6)), torch.randn(3, 6, 2)
    part = target.rows(slice(2, 4))
    torch.testing.assert_close(part(u[:, 2:4]), target(u)[:, 2:4])
    assert part.index.tolist() == [2, 3]


def test_free_is_the_inverse_of_drawing_at_u():
    sites = LatentSites(
        (
            LatentSite("s", (), constraints.positive),
            LatentSite("m", (2, 3), constraints.independent(constraints.real, 2)),
            LatentSite("w", (4,), constraints.simplex),
            LatentSite("p", (2,), constraints.independent(constraints.interval(-1.0, 2.0), 1)),
        )
    )
    u = torch.randn(5, 7, sites.dim)

    def guide():
        with pyro.plate("data", 7, dim=-1):
            sites.sample(dist.Delta(u, event_dim=1))

    trace = pyro.poutine.trace(guide).get_trace()
    torch.testing.assert_close(unconstrain(sites, {s.name: trace.nodes[s.name]["value"] for s in sites.sites}), u)


def test_gradients_leave_the_programs_parameters_as_they_are():
    vae = VAE(nn.Linear(2, 5), Bernoulli(), StandardNormal(2))
    target, u = LogJoint(vae.model, torch.zeros(3, 5)), torch.zeros(4, 3, 2, requires_grad=True)
    torch.autograd.grad(target(u).sum(), u)
    assert all(p.grad is None and p.requires_grad for p in vae.parameters())


def test_dropout_is_off():
    vae = VAE(nn.Sequential(nn.Dropout(0.5), nn.Linear(2, 5)), Bernoulli(), StandardNormal(2))
    target, u = LogJoint(vae.train().model, torch.zeros(3, 5)), torch.ones(4, 3, 2)
    assert torch.equal(target(u), target(u))
    assert not vae.training


def test_a_point_too_far_off_to_score_is_no_error():
    u = torch.tensor([1e300, torch.inf, torch.nan]).view(3, 1, 1).expand(3, 2, 1)
    assert not LogJoint(positive, torch.ones(2, 1))(u).isfinite().any()


# Simulation


def test_simulated_rows_and_latents_have_the_joint_law():
    oracle, N = LinearGaussian(2, 5), 4000
    u, x = simulate_joint(oracle.model, torch.zeros(N, 5), seed=1)
    apart = (u - oracle.mean(x)) @ torch.linalg.cholesky(oracle.precision)  # standard normal if u is a posterior draw
    assert (apart.mean(0).abs() < 4.5 / N**0.5).all()  # 4.5 standard errors, here and below
    assert ((apart.T @ apart / N - torch.eye(2)).abs() < 4.5 * (2 / N) ** 0.5).all()
    assert ((apart.T @ (x - oracle.bias) / N).abs() < 4.5 * x.std(0) / N**0.5).all()
    assert abs(oracle.evidence(x).mean() - oracle.evidence(oracle.sample(N)).mean()) < 4.5 * (5 / N) ** 0.5


@each_program
def test_every_program_simulates_rows_that_it_scores(make):
    program = make()
    like = rows(program)
    u, x = simulate_joint(program.model, like)
    assert x.shape == like.shape
    assert LogJoint(program.model, x)(u.unsqueeze(0)).isfinite().all()


def test_what_a_program_does_not_observe_of_its_rows_is_kept():
    program = PROGRAMS["conditional"]()
    like = rows(program)
    x = simulate_joint(program.model, like, seed=3).x
    assert torch.equal(x[:, 5:], like[:, 5:])
    assert not torch.equal(x[:, :5], like[:, :5])


def test_values_go_back_to_the_places_that_a_program_observes():
    def model(x, index=None):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample(
                "odd", dist.Normal(z.unsqueeze(-1) + 100, 1e-3).expand([len(x), 2]).to_event(1), obs=x[:, [3, 1]]
            )
            pyro.sample("first", dist.Normal(z - 100, 1e-3), obs=x[:, 0])

    u, x = simulate_joint(model, torch.zeros(4, 5))
    assert torch.equal(x[:, [2, 4]], torch.zeros(4, 2))
    torch.testing.assert_close(
        x[:, [0, 1, 3]] - u, torch.tensor([[-100.0, 100.0, 100.0]]).expand(4, 3), atol=0.01, rtol=0
    )


def test_rows_that_are_changed_before_they_are_observed_can_not_be_simulated():
    def model(x, index=None):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=(x[:, :2] + 0.5).log())

    with pytest.raises(
        UserError, match=r"the values that the program observes \(x\) are not entries of its rows of shape \(3,\)"
    ):
        simulate_joint(model, torch.ones(4, 3))


def test_the_seed_fixes_a_simulation_and_the_stream_outside_is_left_alone():
    model, like, before = LinearGaussian(2, 5).model, torch.zeros(3, 5), torch.get_rng_state()
    once, again, other = (simulate_joint(model, like, seed=seed).x for seed in (1, 1, 2))
    assert torch.equal(once, again)
    assert not torch.equal(once, other)
    assert torch.equal(torch.get_rng_state(), before)
    assert simulate_joint(model, like, find_latent_sites(model, like), seed=1).x.equal(once)
