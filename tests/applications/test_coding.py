"""Codes against closed forms of the linear-Gaussian model, and laws over every family, prior and likelihood."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import FAMILIES, LATENT, LIKELIHOODS, PRIORS
from oracles import SOURCES, LinearGaussian
from scipy import stats
from test_programs import CLASSES, COLUMNS, PROGRAMS
from test_programs import rows as rows_for
from torch import nn

from pvae.applications.coding import augment, decode, encode, interpolate, reconstruct, sample
from pvae.distributions import flows
from pvae.errors import Incompatible, UserError
from pvae.generative.likelihoods import Gaussian
from pvae.generative.vae import VAE
from pvae.inference import batching, posterior
from pvae.inference.families import Delta, DiagonalNormal
from pvae.inference.guides import Amortized
from pvae.inference.latents import find_latent_sites
from pvae.stats import mean_se

ROWS, DRAWS = 400, 100


class Best(nn.Module):
    """An encoder to the best q_params of every row."""

    def __init__(self, oracle):
        super().__init__()
        self.best = oracle.best

    def forward(self, x):
        return self.best(x)


def amortized(oracle):
    return Amortized(Best(oracle), DiagonalNormal(oracle.weight.shape[1]))


@pytest.fixture
def oracle(double):
    """W with orthogonal columns, so that the exact posterior is a diagonal normal and the guide is exact."""
    return LinearGaussian(conditioning=1.0)


def linear(prior, family, scale=0.3):
    """A program with a linear decoder, and an amortized guide with a linear encoder; all parameters are fixed."""
    torch.manual_seed(0)
    vae = VAE(nn.Linear(LATENT, COLUMNS), Gaussian(scale=scale), prior)
    return vae, Amortized(nn.Linear(COLUMNS, family.num_params), family)


def within(found, expected, times=4.5):
    """Whether the mean over draws or rows is what is expected of it, and its error small enough to tell."""
    estimate = mean_se(torch.as_tensor(found))
    assert abs(estimate.mean - expected) <= times * estimate.se
    return estimate.se


# Encode, against closed forms


def kl(oracle, x):
    """KL from the prior to the exact posterior, [B] nats."""
    m, V = oracle.mean(x), oracle.covariance
    return (V.trace() + (m**2).sum(1) - len(V) - torch.logdet(V)) / 2


def test_codes_of_the_exact_guide_are_the_posterior(oracle):
    x = oracle.sample(ROWS)
    found = encode(oracle.model, amortized(oracle), x)
    torch.testing.assert_close(found.mean, oracle.mean(x))
    torch.testing.assert_close(found.sd, oracle.covariance.diag().sqrt().expand(ROWS, -1))


def test_rate_and_distortion_are_their_closed_forms(oracle):
    x = oracle.sample(ROWS)
    found = encode(oracle.model, amortized(oracle), x, K=DRAWS)
    assert within(found.rate - kl(oracle, x) / math.log(2), 0) < 0.02
    # E|x - Wz - b|^2 = |x - Wm - b|^2 + tr(W V W')
    around = (x - oracle.mean(x) @ oracle.weight.T - oracle.bias).square().sum(1)
    spread = (oracle.weight @ oracle.covariance @ oracle.weight.T).trace()
    expected = x.shape[1] / 2 * (2 * math.pi * oracle.scale**2).log() + (around + spread) / (2 * oracle.scale**2)
    assert within(found.distortion - expected, 0) < 0.02
    torch.testing.assert_close(found.error, around / x.shape[1])
    # What the code costs and what it leaves add up to what the row costs, for each single draw under the exact guide.
    torch.testing.assert_close(found.rate * math.log(2) + found.distortion, -oracle.evidence(x))


def test_the_check_of_rates_sees_nats_taken_for_bits(oracle):
    x = oracle.sample(ROWS)
    found = encode(oracle.model, amortized(oracle), x, K=DRAWS)
    wrong = mean_se(found.rate - kl(oracle, x))
    assert wrong.mean > 20 * wrong.se


def test_a_code_of_the_prior_itself_costs_nothing_and_a_point_mass_has_no_rate(oracle):
    x, (B, D) = oracle.sample(5), (5, 2)
    idle = Amortized(lambda x: torch.zeros(len(x), 2 * D), DiagonalNormal(D))
    assert encode(oracle.model, idle, x).rate.abs().max() < 1e-12
    point = Amortized(oracle.mean, Delta(D))
    found = encode(oracle.model, point, x)
    assert found.rate.isnan().all()
    assert found.sd.equal(torch.zeros(B, D))
    torch.testing.assert_close(found.mean, oracle.mean(x))


def test_decoding_is_the_decoder_and_of_codes_it_is_the_reconstruction(oracle):
    x, guide = oracle.sample(ROWS), amortized(oracle)
    z = torch.randn(7, 2)
    torch.testing.assert_close(decode(oracle.model, guide, z), z @ oracle.weight.T + oracle.bias)
    centre = decode(oracle.model, guide, encode(oracle.model, guide, x).mean)
    found = reconstruct(oracle.model, guide, x, K=DRAWS)
    spread = (oracle.weight @ oracle.covariance @ oracle.weight.T).diag()
    z_scores = (found - centre) / (spread / DRAWS).sqrt()
    # 2000 normal numbers, in pairs that the two latents span; their variance has an error of sqrt(2 / 800).
    assert z_scores.abs().max() < 5
    assert abs(z_scores.var() - 1) < 5 * math.sqrt(2 / (2 * ROWS))


def test_drawn_data_have_the_likelihoods_scale(oracle):
    z = torch.zeros(4000, 2)
    found = decode(oracle.model, amortized(oracle), z, draw=True, seed=3) - oracle.bias
    assert (found.mean(0).abs() < 5 * oracle.scale / math.sqrt(4000)).all()
    assert ((found.std(0) / oracle.scale - 1).abs() < 5 / math.sqrt(2 * 4000)).all()


# Laws of all


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_encodes_decodes_and_augments(name):
    torch.manual_seed(0)
    family = FAMILIES[name]()
    vae, guide = linear(PRIORS["StandardNormal"](), family)
    x = torch.randn(6, COLUMNS)
    found = encode(vae.model, guide, x, K=5)
    for values, shape in ((found.mean, (6, LATENT)), (found.sd, (6, LATENT)), (found.distortion, (6,))):
        assert values.shape == shape
        assert values.isfinite().all()
    assert found.rate.isfinite().all() != family.point_mass
    again = encode(vae.model, guide, x.double().numpy(), K=5)
    for one, other in zip(vars(found).values(), vars(again).values(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
    more = augment(vae.model, guide, x, per_row=3, spread=0.0 if family.point_mass else 1.0)
    assert more.x.shape == (18, COLUMNS)
    assert more.x.isfinite().all()
    assert more.row.tolist() == [row for row in range(6) for _ in range(3)]


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "FlowFamily"])
def test_stated_moments_need_no_draws(name):
    vae, guide = linear(PRIORS["StandardNormal"](), FAMILIES[name]())
    x = torch.randn(6, COLUMNS)
    means = [encode(vae.model, guide, x, K=2, seed=seed).mean for seed in (0, 1)]
    assert means[0].equal(means[1])
    ends = interpolate(vae.model, guide, x[:2], steps=1).z
    torch.testing.assert_close(ends, means[0][:2])


@pytest.mark.parametrize("name", PRIORS)
def test_every_prior_samples_and_has_rates(name):
    torch.manual_seed(0)
    vae, guide = linear(PRIORS[name](), DiagonalNormal(LATENT))
    x = torch.randn(6, COLUMNS)
    assert encode(vae.model, guide, x, K=5).rate.isfinite().all()
    found = sample(vae.model, x, seed=1)
    assert found.shape == x.shape
    assert found.isfinite().all()
    assert found.equal(sample(vae.model, x.numpy(), seed=1))
    assert not found.equal(sample(vae.model, x, seed=2))


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_means_and_draws_of_every_likelihood_have_the_rows_shape(name):
    torch.manual_seed(0)
    likelihood = LIKELIHOODS[name]()
    decoder = nn.Linear(LATENT, likelihood.params_per_value * COLUMNS)
    vae = VAE(decoder, likelihood, PRIORS["StandardNormal"]())
    like = torch.zeros(6, COLUMNS)
    means, draws = (sample(vae.model, like, draw=draw) for draw in (False, True))
    assert means.shape == draws.shape == like.shape
    assert means.isfinite().all()
    assert likelihood.support.check(draws).all()
    guide = Amortized(nn.Linear(COLUMNS, 2 * LATENT), DiagonalNormal(LATENT))
    z = torch.randn(6, LATENT)
    assert likelihood.support.check(decode(vae.model, guide, z, draw=True)).all()


CALLS = {
    "encode": lambda model, guide, x, seed: encode(model, guide, x, K=3, seed=seed).distortion,
    "decode": lambda model, guide, x, seed: decode(model, guide, x[:, :LATENT], draw=True, seed=seed),
    "reconstruct": lambda model, guide, x, seed: reconstruct(model, guide, x, seed=seed),
    "sample": lambda model, guide, x, seed: sample(model, x, seed=seed),
    "augment": lambda model, guide, x, seed: augment(model, guide, x, seed=seed).x,
}


@pytest.mark.parametrize("name", CALLS)
def test_draws_follow_their_seed_and_leave_the_stream_outside(name):
    vae, guide = linear(PRIORS["StandardNormal"](), DiagonalNormal(LATENT))
    x, call = torch.randn(5, COLUMNS), CALLS[name]
    torch.manual_seed(1)
    undisturbed = torch.rand(3)
    torch.manual_seed(1)
    found = call(vae.model, guide, x, 0)
    assert torch.rand(3).equal(undisturbed)
    assert call(vae.model, guide, x.numpy(), 0).equal(found)
    assert not call(vae.model, guide, x, 1).equal(found)
    assert not found.requires_grad


@pytest.mark.parametrize("name", SOURCES)
def test_every_source_of_lam_has_codes_of_its_own_and_of_new_rows(name):
    torch.manual_seed(0)
    oracle = LinearGaussian(conditioning=1.0)
    guide = SOURCES[name](oracle.model, 2, 5, 6)
    x, index = oracle.sample(6), torch.arange(6)
    for which in (index, None):
        found = encode(oracle.model, guide, x, which, K=3)
        assert found.mean.shape == (6, 2)
        assert reconstruct(oracle.model, guide, x, which).isfinite().all()
    if name == "PerDatapoint":  # it searches rows that are new, and knows its own
        assert (encode(oracle.model, guide, x, K=3).mean - oracle.mean(x)).abs().max() < 0.2
        table = guide.params(x, index)[:, :2]
        torch.testing.assert_close(encode(oracle.model, guide, x, index, K=3).mean, table)


# Sampling, and its temperature


def drawn(prior, temperature, count=20_000):
    """Codes z that a program with the identity for a decoder draws, [count, D]."""
    vae = VAE(nn.Identity(), Gaussian(), prior)
    return sample(vae.model, torch.zeros(count, LATENT), temperature=temperature, seed=5)


@pytest.mark.parametrize("name", PRIORS)
def test_at_temperature_1_codes_are_the_priors_own(name):
    torch.manual_seed(0)
    prior = PRIORS[name]()
    found, own = drawn(prior, 1.0), prior().sample((20_000,)).detach()
    for one, other in zip(found.T, own.T, strict=True):  # Kolmogorov-Smirnov: any difference, not of moments alone
        assert stats.ks_2samp(one.numpy(), other.numpy()).pvalue > 1e-5
    for one, other in zip(found.T, own.T, strict=True):
        assert stats.ks_2samp(one.numpy(), other.numpy() * 1.2).pvalue < 1e-5


def moved(name):
    """A prior away from where it starts."""
    torch.manual_seed(0)
    prior = PRIORS[name]()
    for parameter in prior.parameters():
        nn.init.normal_(parameter, std=0.3)
    return prior


SCALED = ("StandardNormal", "DiagonalNormal", "Laplace", "StudentT")


@pytest.mark.parametrize("name", SCALED)
@pytest.mark.parametrize("t", [0.3, 2.0])
def test_temperature_multiplies_deviations_from_the_centre(name, t):
    prior = moved(name)
    centre = prior.mean.detach()
    one, other = drawn(prior, 1.0) - centre, drawn(prior, t) - centre
    # The noise is the same from the same seed: each deviation is multiplied, and so every quantile.
    torch.testing.assert_close(other, t * one, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["GaussianMixture", "VampPrior"])
def test_a_mixture_keeps_its_weights_and_each_component_its_centre(name):
    prior, t, count = moved(name), 0.05, 20_000
    p = prior()
    with torch.no_grad():
        p.means.mul_(20)  # far apart, so that a draw tells its component
    means, scales, weights = p.means.detach(), p.scales.detach(), p.log_weights.exp().detach()

    class Fixed(type(prior)):
        def __init__(self):
            nn.Module.__init__(self)

        def forward(self):
            return p

    z = drawn(Fixed(), t, count)
    which = torch.cdist(z, means).argmin(1)
    shares = torch.bincount(which, minlength=len(means)) / count
    assert ((shares - weights).abs() < 5 * (weights * (1 - weights) / count).sqrt()).all()
    deviations = (z - means[which]) / scales[which]
    assert abs(deviations.std() / t - 1) < 5 / math.sqrt(2 * deviations.numel())


@pytest.mark.parametrize("name", ["FlowPrior", "FlowPrior(autoregressive)"])
def test_temperature_multiplies_a_flows_noise(name):
    prior, t = moved(name), 0.4
    p = prior()
    with torch.no_grad():
        one, other = (p.transform((drawn(prior, at, 200) - p.shift) / p.scale) for at in (1.0, t))
    torch.testing.assert_close(other, t * one, rtol=1e-3, atol=1e-3)
    assert one.std() == pytest.approx(1, abs=5 / math.sqrt(2 * 200 * LATENT))


@pytest.mark.parametrize("t", [0.5, 1.7])
@pytest.mark.parametrize(("dim", "kind"), [(1, "coupling"), (2, "coupling"), (2, "autoregressive")])
def test_the_density_of_a_flow_at_a_temperature_integrates_to_1(t, dim, kind, double):
    torch.manual_seed(0)
    transform = flows.spline(dim, kind=kind, transforms=2, hidden=[8], bins=4)
    for parameter in transform.parameters():
        nn.init.normal_(parameter, std=0.5)
    q = flows.Flow(torch.full((dim,), 0.3), torch.full((dim,), 0.8), transform(), temperature=t)
    line = torch.linspace(-14, 14, 301 if dim == 2 else 20_001)
    grid = torch.cartesian_prod(*[line] * dim).view(-1, dim)
    with torch.no_grad():
        density = q.log_prob(grid).exp()
        draws = q.expand([5000]).sample()
    cell = (line[1] - line[0]) ** dim
    assert density.sum() * cell == pytest.approx(1, abs=2e-3)  # slopes jump at knots: the trapezoid's error there
    mean = (density[:, None] * grid).sum(0) * cell
    assert ((draws.mean(0) - mean).abs() < 5 * draws.std(0) / math.sqrt(5000) + 2e-3).all()


@pytest.mark.parametrize("name", [*SCALED, "FlowPrior", "FlowPrior(autoregressive)"])
def test_at_temperature_0_all_codes_are_the_centre(name):
    z = drawn(moved(name), 0.0, 50)
    assert z.std(0).max() < 1e-4
    assert drawn(moved(name), 1.0, 50).std(0).min() > 0.1


def test_two_layers_are_tempered_both():
    program = PROGRAMS["two_layer(Gaussian)"]().float()
    like = torch.zeros(4000, COLUMNS)
    assert sample(program.model, like, temperature=0.0).std(0).max() < 1e-4
    cold, own = (sample(program.model, like, temperature=t).var(0).sum() for t in (0.5, 1.0))
    assert cold < 0.6 * own


def test_a_latent_without_a_scale_is_refused_and_a_bad_temperature():
    prior = PRIORS["VampPrior(FullRankNormal)"]()
    assert drawn(prior, 1.0, 5).isfinite().all()
    with pytest.raises(Incompatible, match="latent 'z' is MixtureSameFamily, which has no scale for a temperature"):
        drawn(prior, 0.5, 5)
    for t in (-1.0, math.nan, math.inf):
        with pytest.raises(UserError, match=r"temperature is .*, but it must be at least 0"):
            drawn(PRIORS["StandardNormal"](), t, 5)


def test_data_drawn_from_the_program_have_its_moments(oracle):
    count = 20_000
    found = sample(oracle.model, torch.zeros(count, 5), draw=True)
    covariance = oracle.weight @ oracle.weight.T + oracle.scale**2 * torch.eye(5)
    assert ((found.mean(0) - oracle.bias).abs() < 5 * (covariance.diag() / count).sqrt()).all()
    se = ((covariance.diag().outer(covariance.diag()) + covariance**2) / count).sqrt()
    assert ((found.T.cov() - covariance).abs() < 5 * se).all()


# Paths


def test_a_path_passes_through_the_codes_of_its_rows_and_halfway_between(oracle):
    x, guide = oracle.sample(3), amortized(oracle)
    m = oracle.mean(x)
    found = interpolate(oracle.model, guide, x, steps=4)
    assert found.at.tolist() == [k / 4 for k in range(9)]
    torch.testing.assert_close(found.z[::4], m)
    torch.testing.assert_close(found.z[2::4], (m[:-1] + m[1:]) / 2)
    torch.testing.assert_close(found.x, found.z @ oracle.weight.T + oracle.bias)
    torch.testing.assert_close(found.x[::4], decode(oracle.model, guide, m))


def test_many_rows_are_met_exactly():
    x = torch.randn(30, LATENT)
    found = interpolate(*identity(), x, steps=7)
    assert found.z[::7].equal(x)
    assert found.at[::7].tolist() == list(range(30))


def identity(dim=LATENT):
    """A program and a guide whose codes and means are the rows themselves."""
    vae = VAE(nn.Identity(), Gaussian(), PRIORS["StandardNormal"]())
    return vae.model, Amortized(lambda x: torch.cat([x, torch.zeros_like(x)], 1), DiagonalNormal(dim))


def test_spherical_paths_keep_norms_and_turn_evenly():
    x = 3 * nn.functional.normalize(torch.randn(4, LATENT, generator=torch.Generator().manual_seed(0)), dim=1)
    found = interpolate(*identity(), x, steps=6, how="spherical")
    torch.testing.assert_close(found.z.norm(dim=1), torch.full((19,), 3.0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.z[::6], x)
    turns = (found.z[1:] - found.z[:-1]).norm(dim=1).view(3, 6)
    torch.testing.assert_close(turns, turns[:, :1].expand(-1, 6), rtol=1e-3, atol=1e-3)
    linear = interpolate(*identity(), x, steps=6)
    assert linear.z.norm(dim=1).min() < 2.9


@pytest.mark.parametrize(
    "pair",
    [[[1, 2, 3], [-1, -2, -3]], [[1, 2, 3], [1, 2, 3]], [[0, 0, 0], [1, 2, 3]], [[1, 2, 3], [1, 2, 3.001]]],
    ids=["antipodal", "identical", "zero", "near"],
)
@pytest.mark.parametrize("how", ["linear", "spherical"])
def test_degenerate_pairs_have_finite_paths_with_the_right_ends(pair, how):
    x = torch.tensor(pair, dtype=torch.float32)
    found = interpolate(*identity(), x, how=how)
    assert found.z.isfinite().all()
    torch.testing.assert_close(found.z[[0, -1]], x)
    assert found.z.norm(dim=1).max() <= x.norm(dim=1).max() + 1e-3


# Augmentation


def test_spread_0_reconstructs_and_spread_scales_the_deviations_of_codes(oracle):
    x, guide = oracle.sample(3), amortized(oracle)
    centre = decode(oracle.model, guide, oracle.mean(x)).repeat_interleave(4000, 0)
    near = augment(oracle.model, guide, x, per_row=4000, spread=0.0)
    torch.testing.assert_close(near.x, centre)
    covariance = oracle.weight @ oracle.covariance @ oracle.weight.T
    one, other = (augment(oracle.model, guide, x, per_row=4000, spread=s).x - centre for s in (1.0, 2.5))
    torch.testing.assert_close(other, 2.5 * one)
    se = ((covariance.diag().outer(covariance.diag()) + covariance**2) / len(one)).sqrt()
    assert ((one.T.cov() - covariance).abs() < 5 * se).all()


def test_drawn_augmentations_add_the_likelihoods_spread(oracle):
    x = oracle.sample(2)
    found = augment(oracle.model, amortized(oracle), x, per_row=4000, spread=0.0, draw=True)
    for row in range(2):
        deviations = found.x[found.row == row] - decode(oracle.model, amortized(oracle), oracle.mean(x[row, None]))
        assert ((deviations.std(0) / oracle.scale - 1).abs() < 5 / math.sqrt(2 * 4000)).all()


def test_new_rows_stand_beside_the_row_they_were_made_around_across_batches():
    x = torch.arange(600.0)[:, None].expand(-1, LATENT)
    found = augment(*identity(), x, per_row=2, spread=0.0)
    assert found.row.equal(torch.arange(600).repeat_interleave(2))
    assert found.x.equal(x[found.row])


def test_many_new_rows_are_decoded_in_parts(oracle, monkeypatch):
    x, guide, seen = oracle.sample(3), amortized(oracle), []
    whole = augment(oracle.model, guide, x, per_row=50)
    monkeypatch.setattr(batching, "ROWS_PER_PASS", 20)
    at = posterior.likelihood_at
    monkeypatch.setattr(
        posterior, "likelihood_at", lambda model, sites, z, x: seen.append(len(z)) or at(model, sites, z, x)
    )
    parts = augment(oracle.model, guide, x, per_row=50)
    assert max(seen) <= 20
    assert sum(seen) == 150
    torch.testing.assert_close(parts.x, whole.x)
    assert parts.row.equal(whole.row)


def test_a_point_mass_has_no_spread_to_augment_by_but_rows_can_be_drawn():
    vae, guide = linear(PRIORS["StandardNormal"](), Delta(LATENT))
    x = torch.randn(3, COLUMNS)
    with pytest.raises(Incompatible, match=r"point mass has no spread.*fit with another family, or set spread=0"):
        augment(vae.model, guide, x, per_row=2)
    drawn = augment(vae.model, guide, x, per_row=2, spread=0.0, draw=True).x
    assert len(drawn.unique(dim=0)) == 6


# Other programs


def guided(program, x, family=DiagonalNormal):
    torch.manual_seed(0)
    sites = find_latent_sites(program.model, x)
    own = family(sites.dim)
    encoder = nn.Linear(x.shape[1], own.num_params)
    nn.init.normal_(encoder.weight, std=0.1)
    return Amortized(encoder, own, sites=sites)


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_program_is_used_alike(name, double):
    torch.manual_seed(0)
    program = PROGRAMS[name]()
    x = rows_for(program)
    guide = guided(program, x)
    found = encode(program.model, guide, x, K=4)
    assert found.mean.shape == (len(x), guide.sites.dim)
    assert all(values.isfinite().all() for values in vars(found).values())
    for made in (
        decode(program.model, guide, found.mean, x),
        reconstruct(program.model, guide, x),
        sample(program.model, x),
        interpolate(program.model, guide, x, steps=1).x,
        augment(program.model, guide, x).x,
    ):
        assert made.shape == (len(x), COLUMNS)
        assert made.isfinite().all()


def test_labels_tell_what_a_code_decodes_to(double):
    program = PROGRAMS["conditional"]()
    x = rows_for(program)
    guide = guided(program, x)
    z = encode(program.model, guide, x).mean
    expected = torch.sigmoid(program.decoder(z + x[:, COLUMNS:] @ program.places)).detach()
    torch.testing.assert_close(decode(program.model, guide, z, x), expected)
    styled = decode(program.model, guide, z[:1].expand(CLASSES, -1), x[:CLASSES].numpy())
    torch.testing.assert_close(styled[0], expected[0])
    assert len(styled.unique(dim=0)) == CLASSES
    path = interpolate(program.model, guide, x, steps=2)
    torch.testing.assert_close(path.x[::2], expected)  # each row under its own label, the last one too
    one = x[:1].expand(2000, -1)
    found = sample(program.model, one)
    z = torch.randn(2000, z.shape[1])
    own = torch.sigmoid(program.decoder(z + program.places[0])).detach()
    assert ((found.mean(0) - own.mean(0)).abs() < 5 * ((found.var(0) + own.var(0)) / 2000).sqrt()).all()


class Bounded(nn.Module):
    """Rates and a share, whose product is seen."""

    def model(self, x, index=None):
        with pyro.plate("data", len(x), dim=-1):
            rate = pyro.sample("rate", dist.Gamma(2.0, torch.ones(3)).to_event(1))
            share = pyro.sample("share", dist.Beta(2.0, 2.0))
            pyro.sample("x", dist.Normal(rate * share.unsqueeze(-1), 0.1).to_event(1), obs=x)


def test_bounded_latents_are_coded_as_real_vectors():
    model = Bounded().model
    x = torch.ones(4, 3)
    sites = find_latent_sites(model, x)
    guide = Amortized(nn.Linear(3, 8), DiagonalNormal(4), sites=sites)
    found = encode(model, guide, x, K=4)
    assert found.mean.shape == (4, 4)
    u = torch.randn(5, 4)
    torch.testing.assert_close(decode(model, guide, u), u[:, :3].exp() * u[:, 3:].sigmoid())
    with pytest.raises(Incompatible, match="latent 'rate' is Gamma"):
        sample(model, x, temperature=0.5)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda model, guide, x: decode(model, guide, x),
            f"the codes have {COLUMNS} columns, but the program's latents",
        ),
        (
            lambda model, guide, x: decode(model, guide, x[:, :3], x[:2]),
            "5 codes need as many given rows, but there are 2",
        ),
        (lambda model, guide, x: interpolate(model, guide, x[:1]), "a path needs at least 2 rows, but 1 is given"),
        (lambda model, guide, x: interpolate(model, guide, x, how="sphere"), "did you mean 'spherical'?"),
        (lambda model, guide, x: interpolate(model, guide, x, steps=0), "steps is 0"),
        (lambda model, guide, x: augment(model, guide, x, per_row=0), "per_row is 0"),
        (lambda model, guide, x: augment(model, guide, x, spread=-1.0), "spread is -1.0"),
        (lambda model, guide, x: encode(model, guide, x, K=0), "K is 0"),
        (lambda model, guide, x: encode(model, guide, x[0]), r"the rows have shape \(5,\)"),
        (lambda model, guide, x: encode(model, guide, x[:0]), "no rows are given"),
        (lambda model, guide, x: encode(model, guide, np.array([["a"]])), "no table of numbers"),
    ],
)
def test_a_mistake_is_named(call, words):
    vae, guide = linear(PRIORS["StandardNormal"](), DiagonalNormal(LATENT))
    with pytest.raises(UserError, match=words):
        call(vae.model, guide, torch.randn(5, COLUMNS))
