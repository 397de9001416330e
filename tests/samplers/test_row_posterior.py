"""Posterior draws of each row against closed forms: evidence, moments, modes that guides miss, rows that fail."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from oracles import Curved, LinearGaussian
from posteriors import Exact
from torch import Tensor, nn

from pvae.errors import UserError
from pvae.inference.families import DiagonalNormal
from pvae.inference.guides import Guide
from pvae.samplers import AISEstimate, LogJoint, PosteriorDraws, posterior
from pvae.samplers.posterior_draws import METHODS
from pvae.samplers.row_posterior import ACCURACIES, GAUSSIAN, GUIDE, IMPORTANCE, MIXTURE, Accuracy, draw_rows

SIGMAS = 5  # standard errors allowed; each test looks at up to 600 numbers


class Fixed(Guide):
    """The same diagonal normal for every row."""

    def __init__(self, mean: list[float], sd: list[float]) -> None:
        super().__init__(DiagonalNormal(len(mean)))
        self.q_params = torch.tensor([*mean, *(math.log(s) for s in sd)])

    def params(self, x: Tensor, index: Tensor | None = None) -> Tensor:
        return self.q_params.expand(len(x), -1)


class Program(nn.Module):
    """A program of one latent "z" [D] by its prior and by the distribution of x [B, C] given z."""

    def __init__(self, dim, likelihood):
        super().__init__()
        self.dim, self.likelihood = dim, likelihood

    def forward(self, x, index=None):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(self.dim), 1.0).to_event(1))
            pyro.sample("x", self.likelihood(z, x).to_event(1), obs=x)


# Likelihoods of two latents at x = (1,) and their weights over a grid; the second mode is out of the first's reach.
SHAPES = {
    "two modes of |z|": lambda z, x: dist.Normal(z[..., :1].abs() * 2, 0.3),
    "ring": lambda z, x: dist.Normal(z.square().sum(-1, keepdim=True), 0.15),
    "banana": lambda z, x: dist.Normal(z[..., 1:] + z[..., :1].square(), 0.1),
}


def quadrature(likelihood, x):
    """Log evidence, and means and standard deviations of both latents, by the trapezoid rule: spacing 0.01."""
    line = torch.linspace(-6, 6, 1201, dtype=torch.double)
    grid = torch.cartesian_prod(line, line)
    log_joint = likelihood(grid, None).log_prob(torch.tensor([x]).double()).sum(-1)
    log_joint = log_joint - grid.square().sum(-1) / 2 - math.log(2 * math.pi)
    weights = log_joint.softmax(0)
    mean = weights @ grid
    return log_joint.logsumexp(0) + 2 * math.log(0.01), mean, (weights @ (grid - mean) ** 2).sqrt()


def agrees(drawn, mean, sd, evidence=None, kurtosis=3.0):
    """Means, standard deviations and evidence within SIGMAS standard errors at the stated effective sample size."""
    assert drawn.reliable.all()
    draws_mean, draws_sd = drawn.moments
    error = drawn.ess.rsqrt().unsqueeze(-1)
    assert ((draws_mean - mean).abs() < SIGMAS * sd * error).all()
    assert ((draws_sd / sd - 1).abs() < SIGMAS * error * ((kurtosis - 1) / 4) ** 0.5 + 0.005).all()
    if evidence is not None:
        K = len(drawn.u)
        relative = (1 / drawn.ess - 1 / K).clamp(min=0).sqrt()  # of the weights' mean, so of the evidence's logarithm
        assert ((drawn.log_evidence - evidence).abs() < SIGMAS * relative + 1e-3).all()


@pytest.mark.parametrize(("dim", "conditioning"), [(2, 1.0), (2, 100.0), (2, 1e4), (12, 30.0), (50, 10.0)])
def test_linear_gaussian_from_a_guide_half_as_wide(dim, conditioning):
    oracle = LinearGaussian(dim, dim + 3, conditioning=conditioning)
    x = oracle.sample(6, seed=1)
    drawn = posterior(oracle.model, Exact(oracle, 0.5), x, accuracy="quick", seed=3)
    agrees(drawn, oracle.mean(x), oracle.covariance.diag().sqrt(), oracle.evidence(x))


def test_exact_guide_passes_with_equal_weights_and_another_does_not():
    oracle = LinearGaussian(2, 5)
    x = oracle.sample(8, seed=1)
    drawn = posterior(oracle.model, Exact(oracle), x, accuracy="quick")
    assert (drawn.method == GUIDE).all()
    assert torch.allclose(drawn.log_weights, torch.full_like(drawn.log_weights, -math.log(len(drawn.u))), atol=1e-3)
    moved = posterior(oracle.model, Exact(oracle, shift=0.5), x, accuracy="quick")
    assert ((moved.method == IMPORTANCE) | (moved.method == GAUSSIAN)).all()


def test_curved_posteriors_without_a_guide():
    oracle = Curved()
    x = oracle.sample(12, seed=2)
    drawn = posterior(oracle.model, None, x, accuracy="quick", seed=1)
    assert not ((drawn.method == GUIDE) | (drawn.method == IMPORTANCE)).any()
    agrees(drawn, *oracle.moments(x), oracle.evidence(x), kurtosis=6)


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_that_no_normal_has(shape):
    evidence, mean, sd = quadrature(SHAPES[shape], 1.0)
    model = Program(2, SHAPES[shape])
    drawn = posterior(model, Fixed([0.5, 0.0], [0.2, 0.5]), torch.ones(4, 1), accuracy="standard", seed=2)
    agrees(drawn, mean, sd, evidence, kurtosis=6)
    assert (drawn.method >= GAUSSIAN).all()


def one_mode():
    """A program of two equal modes, and a guide that is exact on one: all draws effective, half the evidence lost."""
    sd = (1 + 4 / 0.04) ** -0.5
    return Program(1, lambda z, x: dist.Normal(2 * z.abs(), 0.2)), Fixed([2 / 0.04 * sd**2], [sd])


def test_guide_on_one_of_two_modes_is_taken_no_more_often_than_all_particles_fall_there():
    """Eight particles in two equal modes: 1 row of 256; of 120 rows 0.5, with a standard deviation of 0.7."""
    model, guide = one_mode()
    drawn = posterior(model, guide, torch.ones(120, 1), accuracy=Accuracy(500, 100, 8, 20, 16, 20, 0), seed=5)
    assert (drawn.method <= IMPORTANCE).sum() <= 0.5 + SIGMAS * 0.7
    mixed = drawn.method >= GAUSSIAN
    share = (drawn.log_weights.exp() * (drawn.u[..., 0] > 0)).sum(0)
    sound = mixed & drawn.reliable
    assert sound.double().mean() > 0.9
    assert ((share - 0.5).abs() < SIGMAS * 0.5 * drawn.ess.rsqrt())[sound].all()


def test_particles_alone_tell_that_a_mode_is_missed():
    """Where they all lie on the guide's mode it passes every check."""
    model, guide = one_mode()
    x = torch.ones(5, 1)
    target, q = LogJoint(model, x, None, guide.sites), (guide.family, guide.params(x))
    position = guide.family(q[1]).sample(torch.Size([8]))
    log_w = torch.zeros(8, 5)
    for side, taken in ((1, GUIDE), (-1, MIXTURE)):
        scouts = AISEstimate(log_w, side * position, log_w[0], log_w[0])
        drawn = draw_rows(target, q, ACCURACIES["quick"], scouts=scouts)
        assert (drawn.method == taken).all()


def test_row_without_finite_evidence_fails_alone():
    def likelihood(z, x):
        return dist.Normal(torch.where(x > 5, torch.nan, z), 1.0, validate_args=False)

    x = torch.tensor([[1.0], [9.0], [-1.0]])
    drawn = posterior(Program(1, likelihood), Fixed([0.0], [0.7]), x, accuracy="quick")
    assert drawn.reliable.tolist() == [True, False, True]
    assert METHODS[drawn.method[1]] == "none"
    agrees(_rows(drawn, [0, 2]), x[[0, 2]] / 2, torch.tensor(0.5**0.5))


def test_flat_target_gives_the_prior():
    """A likelihood that says nothing, of a single latent: evidence is its value."""
    model = Program(1, lambda z, x: dist.Normal(0 * z, 1.0))
    drawn = posterior(model, Fixed([0.0], [1.0]), torch.zeros(5, 1), accuracy="quick")
    assert (drawn.method == GUIDE).all()
    evidence = torch.tensor(-0.5 * math.log(2 * math.pi)).double()
    agrees(drawn, torch.zeros(1), torch.ones(1), evidence)


class Constrained(nn.Module):
    """A rate and a probability in one row: counts whose means are the first, and ten times the second."""

    def forward(self, x, index=None):
        with pyro.plate("data", len(x), dim=-1):
            rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
            p = pyro.sample("p", dist.Beta(1.5, 1.5))
            pyro.sample("x", dist.Poisson(torch.stack([rate, 10 * p], -1)).to_event(1), obs=x)


def test_sites_with_constraints_have_their_conjugate_posterior():
    """Gamma(2 + x, 2) for the rate; Beta(1.5, 1.5) times Poisson(10 p) by quadrature for the probability."""
    x = torch.tensor([[3.0, 4.0], [0.0, 9.0]])
    drawn = posterior(Constrained(), None, x, accuracy="standard")
    assert drawn.reliable.all()
    weights = drawn.log_weights.exp()
    rate, p = (weights * drawn.u[..., 0].exp()).sum(0), (weights * drawn.u[..., 1].sigmoid()).sum(0)
    line = (torch.arange(20_000) + 0.5).double() / 20_000
    mass = (line * (1 - line)).sqrt() * line ** x[:, 1:] * (-10 * line).exp()
    mass /= mass.sum(-1, keepdim=True)
    mean = mass @ line
    sd = (mass @ line**2 - mean**2).sqrt()
    shape = 2 + x[:, 0]
    assert ((rate - shape / 2).abs() < SIGMAS * shape.sqrt() / 2 * drawn.ess.rsqrt()).all()
    assert ((p - mean).abs() < SIGMAS * sd * drawn.ess.rsqrt()).all()


def test_a_seed_fixes_all_and_leaves_the_stream_alone():
    oracle = LinearGaussian(2, 5)
    x, before = oracle.sample(3), torch.get_rng_state()
    one, again, other = (posterior(oracle.model, Exact(oracle, 0.5), x, accuracy="quick", seed=s) for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one.u, again.u)
    assert torch.equal(one.log_weights, again.log_weights)
    assert not torch.equal(one.u, other.u)


def test_resampled_draws_have_the_weighted_moments():
    oracle = LinearGaussian(2, 5)
    drawn = posterior(oracle.model, Exact(oracle, 2.0), oracle.sample(5), accuracy="quick")
    mean, sd = drawn.moments
    u = drawn.resample(4000)
    assert u.shape == (4000, 5, 2)
    # A systematic resample moves a mean by less than independent draws' standard error.
    assert ((u.mean(0) - mean).abs() < 4 * sd / 4000**0.5).all()
    assert ((u.std(0) / sd - 1).abs() < 4 / 8000**0.5).all()
    assert ((drawn.u.mean(0) - mean).abs() / sd).max() + ((drawn.u.std(0) / sd - 1).abs()).max() > 0.5  # unweighted


def test_frame_and_words_say_what_became_of_each_row():
    oracle = LinearGaussian(2, 5)
    drawn = posterior(oracle.model, Exact(oracle), oracle.sample(3), accuracy="quick")
    assert drawn.counts() == {"guide": 3}
    frame = drawn.to_frame()
    assert list(frame) == ["method", "ess", "k_hat", "reliable", "log_evidence", "mean0", "mean1", "sd0", "sd1"]
    assert frame["mean1"].tolist() == drawn.moments[0][:, 1].tolist()
    assert "3 rows, 500 draws: rows {'guide': 3}" in repr(drawn)


def test_unknown_accuracy_is_named():
    oracle = LinearGaussian(2, 5)
    with pytest.raises(UserError, match="did you mean 'quick'"):
        posterior(oracle.model, None, oracle.sample(2), accuracy="quik")


def _rows(drawn, rows):
    whole = vars(drawn)
    parts = {name: whole[name][:, rows] for name in ("u", "log_weights")}
    parts |= {name: whole[name][rows] for name in ("log_evidence", "method", "ess", "k_hat")}
    return PosteriorDraws(**parts, seconds=drawn.seconds)
