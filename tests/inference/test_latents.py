"""Latent sites: found in any sound program, refused by name in an unsound one, and drawn with the right density."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch.distributions import biject_to, constraints

from pvae.errors import UserError
from pvae.generative import priors
from pvae.generative.likelihoods import Bernoulli
from pvae.generative.networks import MLP
from pvae.generative.vae import VAE
from pvae.inference.families import DiagonalNormal, FullRankNormal
from pvae.inference.guides import Amortized
from pvae.inference.importance import log_weights, random_sites
from pvae.inference.latents import LatentSite, LatentSites, base_measure, find_latent_sites, real_vector_latent
from pvae.inference.refinement import LocalELBO, fixed_guide, maximize_local_elbo
from pvae.runtime.torch_state import seeded
from pvae.stats import log_mean_exp, log_mean_exp_se

ROWS = torch.arange(12.0).view(4, 3)

# id: (prior of one datapoint's latent, shape of its values, real numbers behind them)
LATENTS = {
    "Normal": (lambda: dist.Normal(0.5, 2.0), (), 1),
    "normal vector": (lambda: dist.Normal(torch.zeros(3), 1.0).to_event(1), (3,), 3),
    "MultivariateNormal": (lambda: dist.MultivariateNormal(torch.zeros(2), torch.eye(2)), (2,), 2),
    "normal matrix": (lambda: dist.Normal(torch.zeros(2, 3), 1.0).to_event(2), (2, 3), 6),
    "LogNormal": (lambda: dist.LogNormal(0.3, 0.5), (), 1),
    "Gamma": (lambda: dist.Gamma(torch.tensor([2.0, 3.0]), 1.5).to_event(1), (2,), 2),
    "Beta": (lambda: dist.Beta(2.0, torch.ones(3)).to_event(1), (3,), 3),
    "Uniform": (lambda: dist.Uniform(-1.0, 2.0), (), 1),
    "Dirichlet": (lambda: dist.Dirichlet(torch.tensor([1.0, 2.0, 3.0])), (3,), 2),
}


def program(**latents):
    """A program of these latents by name; x stands beside them."""

    def model(x, index=None):
        with pyro.plate("data", len(x), dim=-1):
            for name, prior in latents.items():
                pyro.sample(name, prior())
            pyro.sample("x", dist.Normal(torch.zeros_like(x), 1.0).to_event(1), obs=x)

    return model


@pytest.mark.parametrize(("prior", "shape", "free"), LATENTS.values(), ids=LATENTS)
def test_a_latent_is_found_with_its_shape_and_the_real_numbers_behind_it(prior, shape, free):
    found = find_latent_sites(program(w=prior), ROWS)
    assert [(site.name, site.shape) for site in found.sites] == [("w", shape)]
    assert found.dim == free


def test_several_latents_lie_end_to_end_in_the_programs_order():
    found = find_latent_sites(program(**{name.replace(" ", "_"): prior for name, (prior, *_) in LATENTS.items()}), ROWS)
    assert [site.shape for site in found.sites] == [shape for _, shape, _ in LATENTS.values()]
    assert found.dim == sum(free for *_, free in LATENTS.values())


def test_a_search_leaves_the_stream_outside_alone_and_takes_a_single_row():
    before = torch.get_rng_state()
    assert find_latent_sites(program(z=LATENTS["normal vector"][0]), ROWS[:1]) == real_vector_latent(3)
    assert torch.equal(torch.get_rng_state(), before)


# Density: q(z) by change of variables, the Jacobian by automatic differentiation.


def log_volume(transform, free):
    """log |det dz / du|, of a simplex in all its entries but the last."""

    def own(u):
        z = transform(u).flatten()
        return z[: u.numel()]

    return torch.func.jacrev(own)(free).reshape(free.numel(), free.numel()).slogdet().logabsdet


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize(("prior", "shape", "free"), LATENTS.values(), ids=LATENTS)
def test_density_of_a_draw_is_that_of_the_change_of_variables(prior, shape, free):
    K, B, model = 3, len(ROWS), program(other=LATENTS["LogNormal"][0], w=prior)
    sites, family = find_latent_sites(model, ROWS), DiagonalNormal(1 + free)
    with seeded(1):
        q_params = 0.5 * torch.randn(B, family.num_params)
        w = log_weights(model, fixed_guide(family, q_params, sites), ROWS.double(), K=K, keep_latents=True)
    assert w.latents.keys() == {"other", "w"}
    assert w.latents["w"].shape == (K, B, *shape)
    transform, expected = biject_to(prior().support), torch.zeros(K, B)
    for k in range(K):
        for b in range(B):
            other, value = w.latents["other"][k, b], w.latents["w"][k, b]
            u = transform.inv(value)
            whole = torch.cat([other.log().view(1), u.reshape(-1)])
            expected[k, b] = family(q_params[b]).log_prob(whole) - other.log() - log_volume(transform, u)
    torch.testing.assert_close(w.log_q, expected)
    other = dist.LogNormal(0.3, 0.5).log_prob(w.latents["other"])
    torch.testing.assert_close(w.log_prior, prior().log_prob(w.latents["w"]) + other)


def test_one_real_vector_is_drawn_by_its_own_name_alone():
    family = DiagonalNormal(3)
    trace = pyro.poutine.trace(fixed_guide(family, torch.zeros(4, family.num_params))).get_trace(ROWS)
    assert [name for name, site in trace.nodes.items() if site["type"] == "sample"] == ["data", "z"]


# Counts of three kinds, x ~ Poisson(rate * share): the sum is a Gamma-Poisson, the kinds a Dirichlet-multinomial.

SHAPE, RATE, ALPHA = 3.0, 0.5, torch.tensor([1.0, 2.0, 3.0])


def counts(x, index=None):
    with pyro.plate("data", len(x), dim=-1):
        rate = pyro.sample("rate", dist.Gamma(SHAPE, RATE))
        share = pyro.sample("share", dist.Dirichlet(ALPHA))
        pyro.sample("x", dist.Poisson(rate.unsqueeze(-1) * share).to_event(1), obs=x)


def counts_evidence(x):
    total, prior = x.sum(-1), torch.tensor(SHAPE)
    sums = (
        (prior + total).lgamma()
        - prior.lgamma()
        - (total + 1).lgamma()
        + prior * math.log(RATE / (1 + RATE))
        - total * math.log(1 + RATE)
    )
    kinds = (ALPHA.sum().lgamma() - (ALPHA.sum() + total).lgamma()) + ((ALPHA + x).lgamma() - ALPHA.lgamma()).sum(-1)
    return sums + kinds + (total + 1).lgamma() - (x + 1).lgamma().sum(-1)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("family", [DiagonalNormal(3), FullRankNormal(3)], ids=lambda family: type(family).__name__)
def test_weights_of_bounded_latents_average_to_the_evidence(family):
    x = torch.tensor([[0.0, 1.0, 0.0], [2.0, 3.0, 4.0], [0.0, 0.0, 0.0], [9.0, 1.0, 2.0]])
    sites = find_latent_sites(counts, x)
    assert sites.dim == 3
    q_params = family.initial_params().to(x).expand(len(x), -1)
    q_params = maximize_local_elbo(LocalELBO(counts, family, sites), q_params, x, steps=100).q_params.detach()
    with seeded(2):
        log_w = log_weights(counts, fixed_guide(family, q_params, sites), x, K=20_000).log_w
    evidence = counts_evidence(x)
    assert ((log_mean_exp(log_w) - evidence).abs() < 4.5 * log_mean_exp_se(log_w)).all()  # 4.5 standard errors
    assert (log_w.mean(0) < evidence).all()
    assert (log_w.mean(0) > evidence - 0.5).all()


# Refusals


def in_plate(name, distribution, size=None):
    def model(x, index=None):
        with pyro.plate(name, len(x) if size is None else size, dim=-1):
            pyro.sample("w", distribution(x))
        with pyro.plate("observed", len(x), dim=-1):
            pyro.sample("x", dist.Normal(torch.zeros_like(x), 1.0).to_event(1), obs=x)

    return model


def global_latent(x, index=None):
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", len(x), dim=-1):
        pyro.sample("z", dist.Normal(0.0, scale))
        pyro.sample("x", dist.Normal(torch.zeros_like(x), 1.0).to_event(1), obs=x)


def inner_plate(x, index=None):
    with pyro.plate("data", len(x), dim=-1):
        with pyro.plate("parts", 2, dim=-2):
            pyro.sample("w", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(torch.zeros_like(x), 1.0).to_event(1), obs=x)


def no_latent(x, index=None):
    with pyro.plate("data", len(x), dim=-1):
        pyro.sample("x", dist.Normal(torch.zeros_like(x), 1.0).to_event(1), obs=x)


def nothing_observed(x, index=None):
    with pyro.plate("data", len(x), dim=-1):
        pyro.sample("z", dist.Normal(0.0, 1.0))


def failing(x, index=None):
    raise RuntimeError("no\nsuch thing")


UNSOUND = {
    "another plate": (in_plate("rows", lambda x: dist.Normal(0.0, 1.0)), "latent 'w' stands outside pyro.plate"),
    "no plate": (global_latent, "latent 'scale' stands outside pyro.plate"),
    "inner plate": (inner_plate, "latent 'w' stands in a plate inside"),
    "discrete": (in_plate("data", lambda x: dist.Bernoulli(0.5)), "latent 'w' is discrete"),
    "shapes of the rows": (
        in_plate("data", lambda x: dist.Normal(torch.zeros(len(x)), 1.0).to_event(1)),
        "'w' changes",
    ),
    "plate of another size": (in_plate("data", lambda x: dist.Normal(0.0, 1.0), 7), "'w' has batch shape (7,)"),
    "no latent": (no_latent, "the program has no latent"),
    "no observation": (nothing_observed, "the program observes nothing"),
    "failure": (failing, "the program fails on 3 rows of shape (3,): no such thing"),
}


@pytest.mark.parametrize(("model", "words"), UNSOUND.values(), ids=UNSOUND)
def test_a_program_that_is_not_of_the_form_is_refused_in_one_line(model, words):
    with pytest.raises(UserError) as error:
        find_latent_sites(model, ROWS)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_a_latent_that_comes_and_goes_is_refused():
    def model(x, index=None):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(0.0, 1.0))
            if len(x) > 2:
                pyro.sample("more", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(torch.zeros_like(x), 1.0).to_event(1), obs=x)

    with pytest.raises(UserError, match=r"latent 'more' changes from run to run \(\(\), then None\)"):
        find_latent_sites(model, ROWS)


def test_a_guide_refuses_a_family_of_another_size():
    sites = LatentSites((LatentSite("z", (3,), constraints.real_vector), LatentSite("s", (), constraints.positive)))
    family = DiagonalNormal(3)
    with pytest.raises(UserError, match="the family has 3 dimensions, but the program's latents have 4"):
        Amortized(MLP(3, family.num_params), family, sites=sites)


@pytest.mark.parametrize(
    ("kinds", "measure"),
    [
        ((dist.Poisson,), "mass"),
        ((dist.Exponential,), "density"),
        ((dist.Poisson, dist.Exponential), "mixed"),
        ((dist.Poisson, dist.Geometric), "mass"),
    ],
)
def test_the_base_measure_is_that_of_all_observed_sites(kinds, measure):
    def model(x, index=None):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(0.0, 1.0))
            for kind in kinds:
                pyro.sample(kind.__name__, kind(torch.full_like(x, 0.5)).to_event(1), obs=x)

    assert base_measure(model, ROWS) == measure


@pytest.mark.parametrize(
    ("latent", "shape"),
    [
        (lambda n: dist.Uniform(torch.zeros(n), torch.ones(n)), ()),
        (lambda n: dist.Uniform(torch.zeros(n, 4), 2 * torch.ones(n, 4)).to_event(1), (4,)),
        (lambda n: dist.Pareto(torch.ones(n), torch.ones(n)), ()),
    ],
)
def test_bounds_given_by_row_do_not_make_rows_dimensions(latent, shape):
    def model(x, index=None):
        with pyro.plate("data", len(x), dim=-1):
            s = pyro.sample("s", latent(len(x)))
            pyro.sample("x", dist.Poisson(s.sum(-1) if shape else s), obs=x[:, 0])

    x = torch.ones(7, 1)
    sites = find_latent_sites(model, x)
    assert (sites.sites[0].shape, sites.dim) == (shape, 4 if shape else 1)
    q = DiagonalNormal(sites.dim)
    assert log_weights(model, fixed_guide(q, torch.zeros(7, q.num_params), sites), x, K=3).log_w.isfinite().all()


def test_bounds_that_differ_by_row_are_refused():
    def model(x, index=None):
        with pyro.plate("data", len(x), dim=-1):
            s = pyro.sample("s", dist.Uniform(torch.zeros(len(x)), 1 + torch.arange(1.0 * len(x))))
            pyro.sample("x", dist.Poisson(s), obs=x[:, 0])

    with pytest.raises(UserError, match="the support of latent 's' is not the same everywhere"):
        find_latent_sites(model, torch.ones(3, 1))


@pytest.mark.parametrize("prior", [priors.StandardNormal(3), priors.GaussianMixture(3), priors.FlowPrior(3)], ids=str)
def test_one_real_vector_is_drawn_as_itself(prior):
    """Not through an auxiliary site, which has no closed forms and costs a copy."""
    vae = VAE(MLP(3, 4, hidden=[5]), Bernoulli(), prior)
    sites = find_latent_sites(vae.model, torch.zeros(4, 4))
    assert sites.sites[0].is_real_vector
    guide = Amortized(MLP(4, 6, hidden=[5]), DiagonalNormal(3), sites=sites)
    assert set(dict(random_sites(poutine.trace(guide).get_trace(torch.zeros(4, 4))))) == {"z"}
