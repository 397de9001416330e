"""Latent health: closed forms of linear Gaussians, silence where encodings fill the prior, alarms where they do not."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from oracles import LinearGaussian
from torch import nn
from torch.distributions import kl_divergence

from pvae.diagnostics.latent_usage import _discrepancy, _holes, measure_latent_usage
from pvae.errors import UserError
from pvae.generative import priors
from pvae.generative.likelihoods import Gaussian
from pvae.generative.vae import VAE
from pvae.inference.families import Delta, DiagonalNormal, FlowFamily, FullRankNormal, MixtureOfNormals
from pvae.inference.guides import Amortized, PerDatapoint
from pvae.inference.latents import find_latent_sites
from pvae.runtime.pyro_params import LocalModule, local_method
from pvae.runtime.torch_state import seeded
from pvae.stats import uniform_p

D, M, N = 2, 5, 1500


class Encoder(nn.Module):
    """The exact posterior of a linear Gaussian as FullRankNormal's q_params, its means moved and stretched."""

    def __init__(self, oracle, shift=0.0, stretch=1.0):
        super().__init__()
        self.oracle, self.shift, self.stretch = oracle, shift, torch.as_tensor(stretch)

    def forward(self, x):
        root = torch.linalg.cholesky(self.oracle.covariance).to(x)
        rows, columns = torch.tril_indices(D, D, -1)
        fixed = torch.cat([root.diag().log(), root[rows, columns]])
        mean = self.oracle.mean(x).to(x) * self.stretch + self.shift
        return torch.cat([mean, fixed.expand(len(x), -1)], -1)


class Constant(nn.Module):
    """An encoder that says the same of every row."""

    def __init__(self, q_params):
        super().__init__()
        self.q_params = torch.as_tensor(q_params)

    def forward(self, x):
        return self.q_params.expand(len(x), -1)


@pytest.fixture(scope="module")
def oracle():
    return LinearGaussian(D, M)


def encoded(oracle, **own):
    return Amortized(Encoder(oracle, **own), FullRankNormal(D))


@pytest.fixture(scope="module")
def healthy(oracle):
    return measure_latent_usage(oracle.model, encoded(oracle), oracle.sample(N))


def near(estimate, exact, errors=5):
    return abs(estimate.mean - exact) < errors * estimate.se


# The exact posterior on rows of the program itself: encodings are draws of the prior.


def test_kl_of_each_dimension_is_the_closed_form(oracle, healthy):
    x, variance = oracle.sample(N), oracle.covariance.diag()
    exact = (variance + oracle.mean(x) ** 2 - 1 - variance.log()) / 2
    assert torch.allclose(healthy.kl.double(), exact.mean(0), atol=1e-4)
    assert torch.allclose(healthy.kl_se.double(), exact.std(0) / N**0.5, rtol=1e-3)
    assert ((healthy.kl + variance.log() / 2).abs() < 5 * healthy.kl_se).all()  # its mean over p(x)


def test_total_kl_is_the_closed_form(oracle, healthy):
    x = oracle.sample(N)
    q = dist.MultivariateNormal(oracle.mean(x), oracle.covariance)
    exact = kl_divergence(q, dist.MultivariateNormal(torch.zeros(D).double(), torch.eye(D).double())).mean()
    # 20 draws a row of log q - log p, whose standard deviation is near 1: 1 / sqrt(20 N) = 0.006 nats
    assert abs(healthy.total_kl - exact) < 0.03
    assert abs(healthy.kl.sum() - exact) > 0.1  # dimensions that depend on each other do not add up


def test_mutual_information_is_the_closed_form_and_nothing_is_left_of_the_kl(oracle, healthy):
    exact = torch.logdet(oracle.precision).item() / 2
    figures = healthy.summary()
    assert figures["mutual_information"].se < 0.04
    assert near(figures["mutual_information"], exact)
    assert near(figures["total_kl"], exact)
    assert near(figures["marginal_kl"], 0.0)
    assert not healthy.saturated()


def test_encodings_of_the_programs_own_rows_fill_its_prior(healthy):
    assert healthy.mmd_p > 0.05
    assert (healthy.ks_p > 0.05).all()
    assert abs(healthy.mmd) < 4 * healthy.mmd_se
    assert near(healthy.summary()["holes"], 0.01, errors=4)
    assert healthy.active() == D


def test_activity_is_the_variance_of_the_means(oracle, healthy):
    exact = 1 - oracle.covariance.diag()
    assert (healthy.activity - exact).abs().max() < 5 * (2 / N) ** 0.5


def test_draws_and_means_have_the_stated_shapes(healthy):
    assert healthy.codes.shape == healthy.prior.shape == (1000, D)
    assert healthy.means.shape == (N, D)
    assert all(isinstance(value, torch.Tensor) for value in vars(healthy).values())
    few = measure_latent_usage(
        LinearGaussian(D, M).model, encoded(LinearGaussian(D, M)), LinearGaussian(D, M).sample(30)
    )
    assert few.codes.shape == (30, D)


# Encodings that miss the prior.

# id: what is done to the exact posterior's means, the least KL(q(u) || p(u))
OFF = {"shifted": ({"shift": 0.5}, 0.1), "stretched": ({"stretch": 1.5}, 0.03), "narrowed": ({"stretch": 0.4}, 0.05)}


@pytest.mark.parametrize("name", OFF)
def test_encodings_that_miss_the_prior_are_told(oracle, name):
    change, least = OFF[name]
    found = measure_latent_usage(oracle.model, encoded(oracle, **change), oracle.sample(N))
    assert found.mmd_p < 0.01
    assert found.ks_p.min() < 0.001
    marginal = found.summary()["marginal_kl"]
    assert marginal.mean - 4 * marginal.se > 0
    assert marginal.mean > least


def test_a_shift_of_one_dimension_is_found_in_that_dimension(oracle):
    guide = encoded(oracle, shift=torch.tensor([0.0, 0.5]))
    found = measure_latent_usage(oracle.model, guide, oracle.sample(N))
    assert found.ks_p[1] < 1e-6
    assert found.ks_p[0] > 0.01


def test_two_clusters_leave_a_hole(oracle):
    class Apart(Encoder):
        def forward(self, x):
            q_params = super().forward(x)
            return torch.cat([q_params[:, :1] + 3 * q_params[:, :1].sign(), q_params[:, 1:]], -1)

    found = measure_latent_usage(oracle.model, Amortized(Apart(oracle), FullRankNormal(D)), oracle.sample(N))
    assert found.holes - 5 * found.holes_se > 0.1


def test_a_collapsed_guide_has_no_active_unit_and_no_information(oracle):
    guide = Amortized(Constant(torch.zeros(2 * D)), DiagonalNormal(D))
    found = measure_latent_usage(oracle.model, guide, oracle.sample(300))
    assert found.active() == 0
    assert found.summary()["active_units"].se < 0.01
    for value in (found.total_kl, found.mutual_information, found.marginal_kl, found.kl):
        assert value.abs().max() < 1e-5
    assert found.mmd_p > 0.01  # it fills the prior all the same


def test_one_dimension_may_collapse_alone(oracle):
    found = measure_latent_usage(oracle.model, encoded(oracle, stretch=torch.tensor([1.0, 0.0])), oracle.sample(300))
    assert found.active() == 1
    assert found.activity[1] < 1e-6


def test_information_is_never_above_the_logarithm_of_the_rows(oracle):
    class Narrow(Encoder):
        def forward(self, x):
            mean = super().forward(x)[:, :D]
            return torch.cat([100 * mean, torch.full_like(mean, -5.0)], -1)

    guide = Amortized(Narrow(oracle), DiagonalNormal(D))
    found = measure_latent_usage(oracle.model, guide, oracle.sample(50))
    assert found.mutual_information.item() == pytest.approx(math.log(50), abs=1e-3)
    assert found.saturated()
    assert found.total_kl > 100


# Other families, priors and programs.


@pytest.mark.parametrize("family", [MixtureOfNormals(D, components=1), FlowFamily(D, hidden=[8], bins=4)])
def test_families_without_moments_in_closed_form_agree_with_normals(oracle, family):
    x = oracle.sample(400)

    class Wide(nn.Module):
        def forward(self, x):
            q_params = oracle.best(x)
            start = family.initial_params().expand(len(x), -1)
            return (
                torch.cat([start[:, :1], q_params], -1)
                if family.num_params == 2 * D + 1
                else torch.cat([q_params, start[:, 4:]], -1)
            )

    found = measure_latent_usage(oracle.model, Amortized(Wide(), family), x)
    normal = measure_latent_usage(oracle.model, Amortized(Best(oracle), DiagonalNormal(D)), x)
    # 100 draws for a variance: half its relative variance, 0.01, enters the KL; the flow starts near the identity.
    assert (found.kl - normal.kl).abs().max() < 0.05
    assert (found.activity - normal.activity).abs().max() < 0.03
    assert abs(found.mutual_information - normal.mutual_information) < 0.2


class Best(nn.Module):
    """The best diagonal normal of every row."""

    def __init__(self, oracle):
        super().__init__()
        self.oracle = oracle

    def forward(self, x):
        return self.oracle.best(x)


def with_prior(prior):
    return VAE(nn.Linear(D, M), Gaussian(scale=0.5), prior).requires_grad_(False)


def test_independent_priors_are_scored_as_they_are():
    """KL of N(0.3, 0.5) from a Laplace density, by quadrature."""
    u = torch.linspace(-8, 8, 200001, dtype=torch.double)
    q, p = dist.Normal(torch.tensor(0.3).double(), 0.5), dist.Laplace(torch.tensor(0.0).double(), 0.7)
    exact = torch.trapezoid(q.log_prob(u).exp() * (q.log_prob(u) - p.log_prob(u)), u)
    q_params = torch.tensor([0.3, 0.3, math.log(0.5), math.log(0.5)])
    guide = Amortized(Constant(q_params), DiagonalNormal(D))
    found = measure_latent_usage(with_prior(priors.Laplace(D, scale=0.7)).model, guide, torch.zeros(500, M))
    assert (found.kl.double() - exact).abs().max() < 5 * found.kl_se.max()
    assert found.kl_se.max() < 0.01


def test_other_priors_are_compared_by_the_moments_of_their_draws():
    prior = priors.GaussianMixture(D, components=3)
    with seeded(0):
        drawn = prior().sample((20000,))
    guide = Amortized(Constant(torch.zeros(2 * D)), DiagonalNormal(D))
    found = measure_latent_usage(with_prior(prior).model, guide, torch.zeros(2000, M))
    exact = kl_divergence(dist.Normal(torch.zeros(D), 1.0), dist.Normal(drawn.mean(0), drawn.std(0)))
    assert (found.kl - exact).abs().max() < 0.03  # 2000 draws tell a standard deviation to 0.016 of it


def test_a_point_mass_has_encodings_but_no_kl(oracle):
    guide = Amortized(nn.Linear(M, D), Delta(D))
    found = measure_latent_usage(oracle.model, guide, oracle.sample(100))
    for name in ("kl", "total_kl", "mutual_information", "marginal_kl"):
        assert getattr(found, name).isnan().all()
    assert not found.saturated()
    for name in ("activity", "mmd", "mmd_p", "ks_p", "holes", "codes"):
        assert not getattr(found, name).isnan().any()


class TwoSites(LocalModule):
    """A vector and a positive scale."""

    @local_method
    def model(self, x, index=None):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            s = pyro.sample("s", dist.LogNormal(0.0, 0.5))
            pyro.sample(
                "x", dist.Normal(z.sum(-1, keepdim=True), s.unsqueeze(-1)).expand([*s.shape, M]).to_event(1), obs=x
            )


def test_bounded_latents_are_seen_as_the_real_vectors_behind_them():
    program, x = TwoSites(), torch.zeros(1000, M)
    sites = find_latent_sites(program.model, x)
    q_params = torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, math.log(0.5)])
    found = measure_latent_usage(program.model, Amortized(Constant(q_params), DiagonalNormal(3), sites=sites), x)
    assert found.total_kl.abs() < 1e-4  # q is the prior
    assert found.kl.max() < 0.01
    assert found.mmd_p > 0.01
    assert found.ks_p.min() > 0.01


def test_rows_of_a_table_are_seen_by_their_index(oracle):
    guide = PerDatapoint(40, DiagonalNormal(D), model=oracle.model)
    guide.table[:, 0] = torch.linspace(-2, 2, 40)
    found = measure_latent_usage(oracle.model, guide, oracle.sample(40), torch.arange(40))
    assert torch.equal(found.means, guide.table[:, :D])
    assert found.active() == 1


# The tests' own laws.


def test_p_values_of_the_discrepancy_are_uniform_over_repeats():
    with seeded(0):
        p = torch.stack([_discrepancy(torch.randn(40, D), torch.randn(40, D), 99)["mmd_p"] for _ in range(200)])
    # Spread over the steps of a hundredth, on which p lies.
    assert uniform_p((p - torch.rand(200, generator=torch.Generator().manual_seed(1)) / 100).unsqueeze(-1)) > 0.01


def test_the_discrepancy_is_zero_on_average_and_found_by_hand():
    with seeded(0):
        one, two = torch.randn(30, D), torch.randn(20, D) + 1
    found = _discrepancy(one, two, 10)["mmd"]
    both = torch.cat([one, two]).double()
    squares = ((both[:, None] - both[None]) ** 2).sum(-1)
    away = ~torch.eye(50, dtype=torch.bool)
    kernel = (-squares / (2 * squares[away].median())).exp() * away
    exact = kernel[:30, :30].sum() / 870 + kernel[30:, 30:].sum() / 380 - 2 * kernel[:30, 30:].mean()
    assert found.item() == pytest.approx(exact.item(), rel=1e-6)
    with seeded(1):
        null = torch.stack([_discrepancy(torch.randn(30, D), torch.randn(20, D), 2)["mmd"] for _ in range(300)])
    assert abs(null.mean()) < 5 * null.std() / 300**0.5


def test_holes_are_one_in_a_hundred_where_there_are_none():
    with seeded(0):
        found = [_holes(torch.randn(300, D), torch.randn(300, D)) for _ in range(100)]
    share, se = (torch.stack([f[name] for f in found]) for name in ("holes", "holes_se"))
    assert abs(share.mean() - 0.01) < 5 * share.std() / 10
    assert share.std() == pytest.approx(se.mean().item(), rel=0.3)  # the stated error is the real one


@pytest.mark.slow
def test_p_values_of_an_exact_posterior_are_uniform_over_repeats(oracle):
    found = [
        measure_latent_usage(oracle.model, encoded(oracle), oracle.sample(200, seed=s), seed=s) for s in range(100)
    ]
    p = torch.stack([f.mmd_p for f in found]) - torch.rand(100, generator=torch.Generator().manual_seed(1)) / 501
    assert uniform_p(p.unsqueeze(-1)) > 0.01
    assert (torch.stack([f.ks_p.min() for f in found]) < 0.05).double().mean() < 0.12  # 0.05 +- 0.022
    holes = torch.stack([f.holes for f in found])
    assert abs(holes.mean() - 0.01) < 5 * holes.std() / 10


def test_health_repeats_and_leaves_the_random_stream_alone(oracle):
    x = oracle.sample(50)
    torch.manual_seed(7)
    before = torch.get_rng_state()
    one, two, other = (measure_latent_usage(oracle.model, encoded(oracle), x, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state())
    for name, value in vars(one).items():
        assert torch.equal(value, getattr(two, name))
    assert not torch.equal(one.codes, other.codes)


def test_too_few_rows_or_draws_are_mistakes_of_the_user(oracle):
    with pytest.raises(UserError, match="1 is too few"):
        measure_latent_usage(oracle.model, encoded(oracle), oracle.sample(1))
    with pytest.raises(UserError, match="draws is 0"):
        measure_latent_usage(oracle.model, encoded(oracle), oracle.sample(5), draws=0)
