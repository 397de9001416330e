"""Proximity: closed forms of linear decoders, silence where data fill the latent space, alarms at its holes."""

import math

import pytest
import torch
from oracles import LinearGaussian
from torch import nn

from pvae.diagnostics.latent_geometry import measure_latent_geometry
from pvae.errors import UserError
from pvae.generative.likelihoods import Gaussian
from pvae.generative.priors import StandardNormal
from pvae.generative.vae import VAE
from pvae.inference.families import Delta, DiagonalNormal, FlowFamily
from pvae.inference.guides import Amortized

N = 400


class Function(nn.Module):
    """A fixed function as a network."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def exact(oracle):
    """The oracle's best diagonal as a guide."""
    return Amortized(Function(oracle.best), DiagonalNormal(oracle.weight.shape[1]))


def point(encoder, dim):
    return Amortized(Function(encoder), Delta(dim))


def fitted(decoder, dim):
    return VAE(Function(decoder), Gaussian(scale=0.1), StandardNormal(dim))


@pytest.mark.parametrize("dim", [1, 2, 4])
def test_the_step_of_a_linear_decoder_is_known(dim):
    oracle = LinearGaussian(dim, 6, conditioning=5.0)
    x = oracle.sample(N)
    found = measure_latent_geometry(oracle.model, exact(oracle), x, x, draws=2)
    # Over orthonormal directions u the mean of |W S u|^2 is tr(S W'W S) / D: the same from every code.
    stretched = oracle.weight * oracle.mean(x).std(0)
    expected = 0.1 * (stretched.square().sum() / (dim * 6)).sqrt()
    torch.testing.assert_close(found.step, expected.float().expand(N), rtol=1e-3, atol=0)
    assert found.summary()["roughness"].mean == pytest.approx(1, abs=1e-3)


def test_the_step_of_many_dimensions_is_known_on_average():
    oracle = LinearGaussian(20, 30, conditioning=3.0)
    x = oracle.sample(N)
    step = measure_latent_geometry(oracle.model, exact(oracle), x, x, draws=2).step.double().square()
    expected = 0.01 * (oracle.weight * oracle.mean(x).std(0)).square().sum() / (20 * 30)
    assert abs(step.mean() - expected) < 5 * step.std() / math.sqrt(N)  # 8 of 20 directions a row


def test_the_scale_of_the_latent_space_is_no_matter():
    oracle = LinearGaussian(2, 5)
    x = oracle.sample(N)
    decoder, encoder = oracle.decoder, oracle.mean
    found = [
        measure_latent_geometry(
            fitted(lambda z, c=c: decoder(z / c), 2).model, point(lambda x, c=c: c * encoder(x).float(), 2), x, x
        ).summary()
        for c in (1.0, 100.0)
    ]
    assert found[0]["step"].mean == pytest.approx(found[1]["step"].mean, rel=1e-3)
    assert found[0]["vacuum_between"].mean == pytest.approx(found[1]["vacuum_between"].mean, abs=0.01)
    # Prior draws are near the codes of the first and all at the centre of the second's.
    assert found[0]["vacuum_prior"].mean > found[1]["vacuum_prior"].mean
    assert found[1]["variety"].mean == pytest.approx(found[0]["variety"].mean / 100, rel=1e-3)


def test_a_steep_place_makes_a_decoder_rough():
    x = torch.randn(N, 2, generator=torch.Generator().manual_seed(0))
    smooth, steep = (
        measure_latent_geometry(fitted(decoder, 2).model, point(lambda x: x, 2), x, x, draws=2).summary()["roughness"]
        for decoder in (lambda z: z, lambda z: z + 20 * (5 * (z - 1.5)).sigmoid())
    )
    assert smooth.mean == pytest.approx(1, abs=1e-3)
    assert steep.mean - 5 * steep.se > 2


def test_where_the_model_is_right_there_is_no_vacuum():
    # The posterior's means and the prior differ by the posterior's variance alone, 0.002 of the prior's.
    oracle = LinearGaussian(2, 3, scale=0.02, conditioning=1.0)
    x, train = oracle.sample(1000, seed=1), oracle.sample(4000, seed=2)
    found = measure_latent_geometry(oracle.model, exact(oracle), x, train, draws=1000).summary()
    vacuum = found["vacuum_prior"]
    # Shares of 1,000 draws beyond a quantile of 1,000 rows: the error of both is 0.0097 where p = 0.05.
    assert 0.006 < vacuum.se < 0.014
    assert abs(vacuum.mean - 0.05) < 4.5 * vacuum.se
    assert abs(found["variety"].mean - 1) < 4.5 * found["variety"].se < 0.2


def test_codes_that_the_prior_does_not_know_leave_a_vacuum():
    oracle = LinearGaussian(2, 3, scale=0.02, conditioning=1.0)
    x, train = oracle.sample(N, seed=1), oracle.sample(2000, seed=2)
    # The same autoencoder in units of a tenth: prior draws lie at ten times the codes' distance.
    model = fitted(lambda z: oracle.decoder(10 * z), 2).model
    found = measure_latent_geometry(model, point(lambda x: oracle.mean(x).float() / 10, 2), x, train).summary()
    # Beyond 4 standard deviations of the codes: exp(-0.4^2 / 2) = 0.92 of the draws.
    assert found["vacuum_prior"].mean > 0.85
    assert found["vacuum_between"].mean < 0.1
    assert abs(found["variety"].mean - 10) < 4.5 * found["variety"].se < 2


def test_a_hole_between_codes_is_seen_halfway():
    random = torch.Generator().manual_seed(0)
    sides = torch.arange(2 * N) % 2 * 2.0 - 1
    x, train = (sides + 0.05 * torch.randn(2 * N, generator=random)).unsqueeze(1).expand(-1, 4).split(N)
    straight, snapping = (
        measure_latent_geometry(fitted(decoder, 1).model, point(lambda x: x[:, :1], 1), x, train).summary()[
            "vacuum_between"
        ]
        for decoder in (lambda z: z.expand(-1, 4), lambda z: (z >= 0).float().mul(2).sub(1).expand(-1, 4))
    )
    # Half of the pairs are of both sides, and halfway between these lies no row.
    assert abs(straight.mean - 0.5) < 0.1  # of 500 pairs, and up to 0.05 of the others
    assert snapping.mean == 0


def test_missing_entries_and_columns_beside_the_latents_are_taken():
    x = torch.randn(30, 3, generator=torch.Generator().manual_seed(0))
    train = x.clone()
    train[::2, 1] = torch.nan
    found = measure_latent_geometry(
        fitted(lambda z: z, 2).model, point(lambda x: x[:, :2], 2), x, torch.cat([train, x], 1), draws=5
    )
    assert all(values.isfinite().all() for values in (found.step, found.rows, found.prior, found.between))
    assert (found.rows[1::2] < 1e-3).all()  # those whose row is among the training rows as it is
    assert (found.rows[::2] > 1e-3).all()


def test_a_family_that_states_no_mean_is_drawn_from():
    oracle = LinearGaussian(2, 3)
    x = oracle.sample(20)
    guide = Amortized(nn.Linear(3, 12), FlowFamily(2, hidden=[4], bins=4))
    assert measure_latent_geometry(oracle.model, guide, x, x, draws=5).step.shape == (20,)


def test_the_seed_fixes_everything_and_the_stream_outside_is_left_alone():
    oracle = LinearGaussian(2, 3)
    x, before = oracle.sample(20), torch.get_rng_state()
    one, two, other = (
        measure_latent_geometry(oracle.model, exact(oracle), x, x, draws=5, seed=seed) for seed in (0, 0, 1)
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one.prior, two.prior)
    assert torch.equal(one.between, two.between)
    assert not torch.equal(one.prior, other.prior)
    assert one.summary() == two.summary()


@pytest.mark.parametrize(
    ("rows", "train", "draws", "said"),
    [
        (1, 5, 5, "latent geometry compares rows with each other: 1 is given"),
        (5, 0, 5, "no rows are given"),
        (5, 5, 0, "draws is 0, but it must be at least 1"),
    ],
)
def test_too_little_is_refused(rows, train, draws, said):
    oracle = LinearGaussian(2, 3)
    with pytest.raises(UserError, match=said):
        measure_latent_geometry(oracle.model, exact(oracle), oracle.sample(rows), oracle.sample(train), draws=draws)
