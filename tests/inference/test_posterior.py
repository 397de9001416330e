"""Operations on q: moments, predictive draws, importance weights against the exact posterior, and refitting."""

import math

import pytest
import torch
from cases import FAMILIES
from oracles import SOURCES, LinearGaussian
from torch import nn

from pvae.applications.anomalies import detect_anomalies
from pvae.applications.coding import encode, interpolate
from pvae.applications.latent_map import map_latents
from pvae.inference import batching, posterior
from pvae.inference.families import Delta, DiagonalNormal, FlowFamily
from pvae.inference.guides import Amortized
from pvae.inference.importance import log_weights
from pvae.inference.posterior import (
    WeightedDraws,
    decode_latents,
    encode_rows,
    importance_draws,
    likelihood_at,
    posterior_means,
    posterior_moments,
    posterior_predictive,
    prior_predictive,
    refit_params,
    with_fixed_params,
)
from pvae.inference.refinement import LocalELBO, fixed_guide
from pvae.runtime import torch_state
from pvae.runtime.torch_state import no_validation
from pvae.stats import log_mean_exp, mean_se

ROWS = 23


class Best(nn.Module):
    """An encoder to the best q_params of every row."""

    def __init__(self, oracle):
        super().__init__()
        self.best = oracle.best

    def forward(self, x):
        return self.best(x)


@pytest.fixture
def oracle(double):
    return LinearGaussian()


@pytest.fixture
def guide(oracle):
    return Amortized(Best(oracle), DiagonalNormal(2))


def test_fixed_params_are_computed_once(oracle, guide):
    x, calls = oracle.sample(3), []
    guide.encoder.best = lambda x: calls.append(1) or oracle.best(x)
    program = with_fixed_params(guide, x, None)
    for _ in range(3):
        program(x)
    assert len(calls) == 1
    assert with_fixed_params(oracle.posterior, x, None) == oracle.posterior


@pytest.mark.parametrize("name", FAMILIES)
def test_moments_are_those_of_draws_and_a_rows_own(name):
    family = FAMILIES[name]()
    with torch_state.seeded(0), torch.no_grad():
        q_params = torch.randn(6, family.num_params) / 2
        z = family(q_params).sample((20_000,))
        torch.manual_seed(5)
        undisturbed = torch.rand(1)
        torch.manual_seed(5)
        mean, sd = posterior_moments(family, q_params)
        assert torch.rand(1).equal(undisturbed)
        error = z.std(0) * (1 / posterior.MOMENT_DRAWS + 1 / len(z)) ** 0.5
        assert ((mean - z.mean(0)).abs() <= 5 * error + 1e-6).all()
        # Four times a normal's error, for tails heavier than its.
        assert ((sd - z.std(0)).abs() <= 4 * 5 * error / 2**0.5 + 1e-6).all()
        for one, other in zip(posterior_moments(family, q_params[[4, 1]]), (mean, sd), strict=True):
            torch.testing.assert_close(one, other[[4, 1]])


def test_a_row_has_one_code_whatever_asks_and_whatever_stands_beside_it(oracle):
    family = FlowFamily(2, hidden=[4], bins=4, context=2)
    guide, x = Amortized(nn.Linear(5, family.num_params), family), oracle.sample(12)
    codes = encode(oracle.model, guide, x).mean
    mapped = map_latents(oracle.model, guide, x, size=2, seed=1).codes
    torch.testing.assert_close(mapped, codes)
    torch.testing.assert_close(encode(oracle.model, guide, x[5:7], K=1, seed=1).mean, codes[5:7])
    torch.testing.assert_close(interpolate(oracle.model, guide, x[3:5], seed=2).z[[0, -1]], codes[3:5])
    apart = detect_anomalies(
        oracle.model, guide, x[:4], reference=x[2:], scores=["neighbours"], false_alarm=0.3, K=1, seed=3
    )
    fifth = torch.cdist(codes[:4], codes[2:]).sort().values[:, 4]
    torch.testing.assert_close(apart.scores["neighbours"], fifth)


def test_data_are_decoded_at_the_codes_given(oracle, guide):
    z = torch.randn(6, 2)
    fn = likelihood_at(oracle.model, guide.sites, z, torch.zeros(6, 5))
    torch.testing.assert_close(fn.mean, z @ oracle.weight.T + oracle.bias)
    torch.testing.assert_close(fn.stddev, oracle.scale.expand(6, 5))


def test_weighted_draws_are_of_the_exact_posterior(oracle, guide):
    x, K = oracle.sample(ROWS), 4000
    wide = guide.params(x) + torch.tensor([0.2, -0.2, 0.3, 0.3])  # a q that misses the posterior
    torch.manual_seed(0)
    with torch.no_grad():
        codes = importance_draws(oracle.model, guide, wide, x, K=K)
    torch.testing.assert_close(codes.log_weights.logsumexp(0), torch.zeros(ROWS))
    sd = oracle.covariance.diag().sqrt()
    found = (codes.mean(codes.z) - oracle.mean(x)) / sd * codes.ess.sqrt().unsqueeze(-1)
    # About normal, with a variance near 1 where weights are close to even; 46 of them.
    assert found.abs().max() < 6
    assert 0.4 < found.square().mean() < 2.5
    second = codes.mean((codes.z - oracle.mean(x)).square())
    assert ((second / sd**2 - 1).abs() < 6 * (2 / codes.ess).sqrt().unsqueeze(-1)).all()
    unweighed = (codes.z.mean(0) - oracle.mean(x)) / sd * math.sqrt(K)
    assert unweighed.square().mean() > 50  # the check sees draws that are not weighed


def test_draws_of_the_exact_posterior_weigh_alike_and_a_point_mass_has_one(double):
    oracle = LinearGaussian(conditioning=1.0)
    guide, x = Amortized(Best(oracle), DiagonalNormal(2)), oracle.sample(5)
    with torch.no_grad():
        codes = importance_draws(oracle.model, guide, guide.params(x), x, K=50)
        point = importance_draws(oracle.model, Amortized(oracle.mean, Delta(2)), oracle.mean(x), x, K=50)
    torch.testing.assert_close(codes.ess, torch.full((5,), 50.0))
    assert point.z.shape == (1, 5, 2)
    assert point.log_weights.equal(torch.zeros(1, 5))
    torch.testing.assert_close(point.mean(point.z), oracle.mean(x))


def test_weighing_in_pieces_is_weighing(oracle, guide, monkeypatch):
    x = oracle.sample(5)

    def found():
        torch.manual_seed(0)
        with torch.no_grad():
            return importance_draws(oracle.model, guide, guide.params(x), x, K=20)

    whole = found()
    monkeypatch.setattr(batching, "ROWS_PER_PASS", 15)
    torch.testing.assert_close(found(), whole)


def test_means_are_weighed_over_any_values():
    codes = WeightedDraws(torch.zeros(2, 1, 1), torch.tensor([[0.25], [0.75]]).log())
    torch.testing.assert_close(codes.mean(torch.tensor([[[[0.0, 4.0]]], [[[4.0, 0.0]]]])), torch.tensor([[[3.0, 1.0]]]))
    torch.testing.assert_close(codes.ess, torch.tensor([1.6]))


# The best q_params


@pytest.mark.parametrize("name", SOURCES)
def test_rows_are_refitted_to_their_best_params_whatever_the_guide_knows(oracle, name):
    x, guide = oracle.sample(6), SOURCES[name](oracle.model, 2, 5, 6)
    torch.manual_seed(5)
    undisturbed = torch.rand(1)
    torch.manual_seed(5)
    q_params = refit_params(oracle.model, guide, x, candidates=[x], steps=200)
    assert torch.rand(1).equal(undisturbed)
    lost = oracle.elbo(oracle.best(x), x) - oracle.elbo(q_params.detach(), x)
    assert lost.min() > -1e-9  # the closed form's best is best
    assert lost.mean() < 0.05  # steps of 8 draws come no nearer
    assert (oracle.elbo(oracle.best(x), x) - oracle.elbo(guide.family.initial_params().expand(6, -1), x)).mean() > 0.5


def test_a_row_starts_from_the_best_offer_and_never_from_nan(oracle, guide):
    x = oracle.sample(4)
    worse, missing = x + 10, torch.full_like(x, math.nan)
    with no_validation():
        q_params = refit_params(oracle.model, guide, x, candidates=[worse, x, missing], steps=0)
        torch.testing.assert_close(q_params, guide.params(x))
        q_params = refit_params(oracle.model, guide, x, candidates=[missing], steps=0)
    assert q_params.equal(guide.family.initial_params().expand(4, -1))


def test_an_offer_takes_the_place_of_a_start_that_is_nan(oracle, guide, monkeypatch):
    def bound(model, family, sites):
        exact = LocalELBO(model, family, sites)
        return lambda q_params, *rest, **named: exact(q_params, *rest, **named).where(
            (q_params != family.initial_params()).any(1), torch.nan
        )

    x = oracle.sample(4)
    monkeypatch.setattr(posterior, "LocalELBO", bound)
    with no_validation():
        torch.testing.assert_close(refit_params(oracle.model, guide, x, candidates=[x], steps=0), guide.params(x))


@pytest.mark.parametrize("name", FAMILIES)
def test_seeded_draws_do_not_depend_on_the_rows_beside(name, double):
    torch.manual_seed(0)
    oracle, family = LinearGaussian(3, 5), FAMILIES[name]()
    x, guide = oracle.sample(6), Amortized(nn.Linear(5, family.num_params), family)
    q_params, seeds = guide.params(x).detach(), [3, 1, 4, 1, 5, 9]
    with torch.no_grad():
        draws = importance_draws(oracle.model, guide, q_params, x, K=20, seeds=seeds)
        alone = importance_draws(oracle.model, guide, q_params[4:5], x[4:5], K=20, seeds=[5])
    torch.testing.assert_close(alone.z[:, 0], draws.z[:, 4])
    if family.point_mass:
        assert not len(draws.log_evidence)
        return
    torch.testing.assert_close(alone.log_evidence[0], draws.log_evidence[4])
    log_q = family(q_params).log_prob(draws.z)
    joint = log_weights(oracle.model, fixed_guide(Delta(3), draws.z.flatten(0, 1)), x.repeat(20, 1)).log_w.view(20, 6)
    torch.testing.assert_close(draws.log_evidence, log_mean_exp(joint - log_q))


def test_prior_and_posterior_predictive_draw_what_the_programs_draw(oracle, guide):
    x = oracle.sample(4000)
    with torch.no_grad():
        prior, post = prior_predictive(oracle.model, x), posterior_predictive(oracle.model, oracle.posterior, x)
    assert torch.equal(post.observed, x)
    for draw in (prior, post):
        torch.testing.assert_close(draw.likelihood.mean, oracle.decoder(draw.latents["z"]))
    assert abs(mean_se(prior.latents["z"].flatten()).mean) < 0.05
    torch.testing.assert_close(post.latents["z"].mean(0), oracle.mean(x).mean(0), atol=0.05, rtol=0)


def test_rows_are_encoded_and_decoded_in_batches(oracle, guide):
    x = oracle.sample(ROWS)
    encoded = encode_rows(oracle.model, guide, x)
    torch.testing.assert_close(encoded.q_params, oracle.best(x))
    torch.testing.assert_close(encoded.mean, oracle.mean(x))
    torch.testing.assert_close(encoded.sd.log(), encoded.q_params[:, 2:])
    assert torch.equal(posterior_means(oracle.model, guide, x), encoded.mean)
    for given in (None, x, x[:1]):
        torch.testing.assert_close(
            decode_latents(oracle.model, guide, encoded.mean, given), oracle.decoder(encoded.mean)
        )
    drawn = decode_latents(oracle.model, guide, encoded.mean.repeat(100, 1), draw=True, seed=1)
    assert abs((drawn - oracle.decoder(encoded.mean).repeat(100, 1)).std() / oracle.scale - 1) < 0.05
