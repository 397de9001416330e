"""Noisy observations: densities against sums, quadrature and draws, and programs that are refused."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import COLUMNS, LATENT, LIKELIHOODS
from pyro import poutine
from torch import nn

from pvae.distributions import noise_convolution as noisy_module
from pvae.distributions.noise_convolution import NoiseConvolution, entry_moments
from pvae.distributions.supports import base_constraint
from pvae.errors import Incompatible, UserError
from pvae.generative import noise
from pvae.generative.effect_handlers import ObserveThroughNoise, mask_missing, with_noise
from pvae.generative.noise import FlipNoise, GaussianNoise, make_noise
from pvae.generative.priors import StandardNormal
from pvae.generative.vae import VAE
from pvae.inference.families import DiagonalNormal
from pvae.inference.importance import log_weights
from pvae.inference.refinement import fixed_guide
from pvae.runtime.pyro_params import module_of
from pvae.runtime.torch_state import seeded

B = 4


def clean(likelihood):
    """p(x|z) of some rows, [B, COLUMNS]."""
    outputs = likelihood.params_per_value * COLUMNS
    return likelihood(torch.linspace(-1.5, 1.5, B * outputs).view(B, -1))


@pytest.fixture(params=LIKELIHOODS)
def p(request):
    return clean(LIKELIHOODS[request.param]())


def grid(fn, scale):
    """Points y far beyond where p(y|z) lies, [G, 1, 1], and their spacing."""
    mean, variance = entry_moments(fn)
    spread = 12 * (variance.max() + scale**2).sqrt().item()
    low, high = mean.min().item() - spread, mean.max().item() + spread
    return torch.linspace(low, high, 4001, dtype=torch.double).view(-1, 1, 1), (high - low) / 4000


@pytest.mark.parametrize("scale", [0.5, 3.0])
def test_gaussian_noise_has_a_density_with_the_mean_and_variance_of_clean_and_noise_together(p, scale):
    own, (y, step) = NoiseConvolution(p, GaussianNoise(scale=scale)), grid(p, scale)
    density = own.log_prob(y).exp() * step
    mean, variance = (values.double() for values in entry_moments(p))
    assert torch.allclose(density.sum(0), torch.ones(B, COLUMNS).double(), atol=1e-4)
    assert torch.allclose((density * y).sum(0), mean, rtol=1e-3, atol=1e-3)
    assert torch.allclose((density * (y - mean) ** 2).sum(0), variance + scale**2, rtol=2e-3)


# Those whose noisy density is exact; of the others two moments are.
EXACT = ["Bernoulli", "Gaussian(decoder)", "Categorical", "DiscretizedLogistic(mixture)"]


@pytest.mark.parametrize("name", EXACT)
def test_exact_densities_and_clean_means_are_those_of_many_draws(name):
    fn, noise, draws = clean(LIKELIHOODS[name]()), GaussianNoise(scale=0.7), 40_000
    y = entry_moments(fn).mean + torch.linspace(-1, 1, B * COLUMNS).view(B, COLUMNS)
    with seeded(0):
        x = fn.sample((draws,))
    weights = noise(x).log_prob(y).exp()
    expected, se = weights.mean(0), weights.std(0) / draws**0.5
    own = NoiseConvolution(fn, noise)
    assert ((own.log_prob(y).exp() - expected).abs() < 5 * se).all()
    mean, variance = own.clean_moments(y)
    share = weights / weights.sum(0)
    error = (share**2 * (x - mean) ** 2).sum(0).sqrt()  # of a mean under weights
    assert (((share * x).sum(0) - mean).abs() < 5 * error).all()
    off = (x - mean) ** 2 - variance
    assert ((share * off).sum(0).abs() < 5 * (share**2 * off**2).sum(0).sqrt()).all()
    wrong = NoiseConvolution(fn, GaussianNoise(scale=1.0)).log_prob(y).exp()
    assert ((wrong - expected).abs() > 5 * se).any()


@pytest.mark.parametrize("name", [name for name in LIKELIHOODS if name.startswith(("Gaussian", "StudentT", "Laplace"))])
def test_the_linear_estimate_is_unbiased_and_its_variance_right(name):
    """E[x - estimate] = 0 and E[(x - estimate)^2] = v s^2 / (v + s^2), whatever p(x|z) is where nothing is clipped."""
    p, draws, noise = clean(LIKELIHOODS[name]()), 40_000, GaussianNoise(scale=0.5)
    with seeded(1):
        x = p.sample((draws,))
        y = noise.add_to(x)
    mean, variance = NoiseConvolution(p, noise).clean_moments(y)
    error = x - mean
    assert (error.mean(0).abs() < 5 * error.std(0) / draws**0.5).all()
    square = error**2 - variance
    if "StudentT" not in name:  # whose squares have no variance to go by, at 4 degrees of freedom
        assert (square.mean(0).abs() < 5 * square.std(0) / draws**0.5).all()


def test_clean_means_stay_where_x_may_be_and_are_y_without_noise(p):
    with seeded(2):
        x = p.sample()
        y = GaussianNoise(scale=3.0).add_to(x)
    inside = base_constraint(p.support)
    found = NoiseConvolution(p, GaussianNoise(scale=3.0)).clean_moments(y)
    assert torch.equal(noisy_module.clamp_to_support(p, found.mean), found.mean)
    assert (found.variance >= 0).all()
    assert inside.is_discrete or inside.check(found.mean).all()
    still = NoiseConvolution(p, GaussianNoise(scale=1e-4)).clean_moments(x)
    assert torch.allclose(still.mean, x, atol=1e-4)
    assert (still.variance < 1e-7).all()


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_flipped_bits_by_hand(rate):
    logits = torch.linspace(-4, 4, COLUMNS)
    own, one = NoiseConvolution(dist.Bernoulli(logits=logits).to_event(1), FlipNoise(rate=rate)), logits.sigmoid()
    seen = one * (1 - rate) + (1 - one) * rate
    for y, p_y, was_one in ((1.0, seen, one * (1 - rate) / seen), (0.0, 1 - seen, one * rate / (1 - seen))):
        y = torch.full((COLUMNS,), y)
        assert torch.allclose(own.log_prob(y).exp(), p_y)
        mean, variance = own.clean_moments(y)
        assert torch.allclose(mean, was_one)
        assert torch.allclose(variance, was_one * (1 - was_one), atol=1e-6)


def test_any_function_to_a_distribution_of_y_is_a_noise():
    logits, y = torch.tensor([-1.0, 2.0]), torch.tensor([0.3, -1.5])
    own = NoiseConvolution(dist.Bernoulli(logits=logits).to_event(1), lambda x: dist.Laplace(x, 2.0))
    one, zero = dist.Laplace(1.0, 2.0).log_prob(y).exp(), dist.Laplace(0.0, 2.0).log_prob(y).exp()
    assert torch.allclose(own.log_prob(y).exp(), logits.sigmoid() * one + (-logits).sigmoid() * zero)
    counts = NoiseConvolution(
        dist.Poisson(torch.tensor([4.0])).to_event(1), dist.Poisson
    )  # y ~ Poisson(x): variances add, 4 + 4
    assert torch.allclose(counts.log_prob(torch.zeros(1)), dist.Normal(4.0, 8**0.5).log_prob(torch.zeros(1)))


def test_a_noisy_program_scores_noisy_values_and_keeps_its_latents(p):
    class Fixed(nn.Module):
        def forward(self, x, index=None):
            with pyro.plate("data", len(x), dim=-1):
                pyro.sample("z", StandardNormal(LATENT)())
                pyro.sample("x", p, obs=x)

    program, noise = Fixed(), GaussianNoise(scale=0.5)
    with seeded(3):
        x = p.sample()
        y = noise.add_to(x)
    guide = fixed_guide(DiagonalNormal(LATENT), torch.zeros(B, 2 * LATENT))
    with pyro.validation_enabled(False):
        found = log_weights(with_noise(program, noise), guide, y, K=3).log_lik
        there = torch.rand(B, COLUMNS, generator=torch.Generator().manual_seed(0)) < 0.5
        some = log_weights(
            mask_missing(with_noise(program, noise), there), guide, y.where(there, torch.nan), K=3
        ).log_lik
        same = log_weights(with_noise(mask_missing(program), noise), guide, y, K=3).log_lik
    entries = NoiseConvolution(p, noise).log_prob(y)
    assert torch.allclose(found, entries.sum(-1).expand(3, B), atol=1e-4)
    assert torch.allclose(some, entries.where(there, 0).sum(-1).expand(3, B), atol=1e-4)
    assert torch.equal(same, found)
    assert module_of(with_noise(program, noise)) is program


def test_only_the_named_site_is_noisy_and_plates_of_draws_go_through():
    def program(x, index=None):
        with pyro.plate("data", len(x), dim=-1):
            for name in ("x", "w"):
                pyro.sample(name, dist.Normal(torch.zeros(2), 1.0).to_event(1), obs=x)

    with pyro.plate("samples", 3, dim=-2):
        nodes = poutine.trace(with_noise(program, GaussianNoise(scale=1.0), "x")).get_trace(torch.zeros(4, 2)).nodes
    assert nodes["w"]["fn"].log_prob(torch.zeros(2))[0, 0].item() == pytest.approx(-math.log(2 * math.pi))
    assert nodes["x"]["fn"].batch_shape == (3, 4)
    assert nodes["x"]["fn"].log_prob(torch.zeros(2))[0, 0].item() == pytest.approx(-math.log(4 * math.pi))


def test_gradients_are_those_of_the_sum_by_hand():
    logits = torch.tensor([0.3, -2.0], requires_grad=True)
    y = torch.tensor([0.2, 0.9])
    (found,) = torch.autograd.grad(
        NoiseConvolution(dist.Bernoulli(logits=logits).to_event(1), GaussianNoise(scale=0.5)).log_prob(y).sum(), logits
    )
    one, zero = (dist.Normal(k, 0.5).log_prob(y).exp() for k in (1.0, 0.0))
    p = logits.sigmoid()
    (exact,) = torch.autograd.grad((p * one + (1 - p) * zero).log().sum(), logits)
    assert torch.allclose(found, exact)


def test_added_noise_keeps_what_is_missing_and_follows_the_seed():
    x = torch.tensor([[0.0, torch.nan, 1.0]]).repeat(20_000, 1)
    with seeded(0):
        flipped = FlipNoise(rate=0.2).add_to(x)
    with seeded(0):
        assert torch.equal(FlipNoise(rate=0.2).add_to(x)[:, 0], flipped[:, 0])
    assert flipped[:, 1].isnan().all()
    se = (0.2 * 0.8 / len(x)) ** 0.5
    assert abs(flipped[:, 0].mean().item() - 0.2) < 5 * se
    assert abs(flipped[:, 2].mean().item() - 0.8) < 5 * se
    noisy_rows = GaussianNoise(scale=2.0).add_to(x)[:, 0]
    assert abs(noisy_rows.std().item() - 2) < 5 * 2 / (2 * len(x)) ** 0.5


WRONG = {
    "scale": (lambda: GaussianNoise(scale=0.0), "GaussianNoise: scale is 0.0, but it must be positive"),
    "rate": (lambda: FlipNoise(rate=1.0), "FlipNoise: rate is 1.0, but it must be between 0 and 1"),
    "word": (lambda: make_noise({"type": "FlipNois"}), "unknown noise 'FlipNois'; did you mean 'FlipNoise'"),
    "argument": (lambda: make_noise({"type": "FlipNoise", "scale": 1}), "takes no argument 'scale'"),
    "type": (lambda: make_noise({"type": "FlipNoise", "rate": "a"}), "rate is 'a', but it takes a number"),
    "grey": (
        lambda: FlipNoise().add_to(torch.tensor([[0.0, 0.5]])),
        "row 0, column 1 is 0.5, which FlipNoise does not take",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_mistakes_are_refused(name):
    make, line = WRONG[name]
    with pytest.raises(UserError, match=line):
        make()


def test_every_word_makes_its_noise_and_nothing_else_has_one():
    assert {type(make_noise({"type": word})).__name__ for word in noise.__all__} == set(noise.__all__)
    assert make_noise({"type": "GaussianNoise", "scale": 2}).scale == 2


@pytest.mark.parametrize("name", [name for name in LIKELIHOODS if name != "Bernoulli"])
def test_flips_are_for_bits(name):
    likelihood = LIKELIHOODS[name]()
    vae = VAE(nn.Linear(LATENT, likelihood.params_per_value * COLUMNS), likelihood, StandardNormal(LATENT))
    with pytest.raises(Incompatible, match="FlipNoise takes binary values, but observed site 'x' is"):
        with_noise(vae.model, FlipNoise())(torch.zeros(B, COLUMNS))


def test_a_site_that_scores_whole_rows_is_refused_by_name():
    refused = pytest.raises(Incompatible, match="noise on observed site 'x': its MultivariateNormal scores whole rows")
    with refused, ObserveThroughNoise(GaussianNoise()):
        pyro.sample("x", dist.MultivariateNormal(torch.zeros(2), torch.eye(2)), obs=torch.zeros(2))
