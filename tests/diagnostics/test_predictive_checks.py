"""Predictive checks: silent on rows of the program's own, loud on others; forecasts against conditional Gaussians."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from oracles import SOURCES, LinearGaussian
from torch import nn

from pvae.diagnostics.predictive_checks import STATISTICS, _mask, _p, run_predictive_checks
from pvae.errors import UserError
from pvae.generative.likelihoods import Bernoulli, Categorical
from pvae.generative.priors import StandardNormal
from pvae.generative.vae import VAE
from pvae.inference.families import Delta, DiagonalNormal, FullRankNormal
from pvae.inference.guides import Amortized
from pvae.runtime.pyro_params import LocalModule, local_method
from pvae.runtime.torch_state import seeded
from pvae.stats import mean_se

D, M, N = 2, 6, 300


class Exact(nn.Module):
    """An encoder of the exact posterior of a linear Gaussian as FullRankNormal's q_params."""

    def __init__(self, oracle):
        super().__init__()
        self.oracle = oracle

    def forward(self, x):
        root = torch.linalg.cholesky(self.oracle.covariance).to(x)
        rows, columns = torch.tril_indices(D, D, -1)
        fixed = torch.cat([root.diag().log(), root[rows, columns]])
        return torch.cat([self.oracle.mean(x).to(x), fixed.expand(len(x), -1)], -1)


@pytest.fixture(scope="module")
def oracle():
    return LinearGaussian(D, M)


@pytest.fixture(scope="module")
def guide(oracle):
    return Amortized(Exact(oracle), FullRankNormal(D))


def checked(oracle, guide, x, **own):
    return run_predictive_checks(oracle.model, guide, x, **{"replicates": 100, "hidden": 0.0} | own)


def statistic(found, name):
    return found.statistics_p[list(STATISTICS).index(name)].item()


def test_rows_of_the_program_itself_look_like_its_replicates(oracle, guide):
    found = checked(oracle, guide, oracle.sample(N))
    assert found.pixel_p.shape == (M,)
    assert found.replicated.shape == (100, len(STATISTICS))
    for p in (found.pixel_p, found.statistics_p):
        assert (p > 0.02).all()
        assert (p < 0.98).all()
    assert found.imputation.isnan().all()


def test_a_column_that_is_shifted_is_named(oracle, guide):
    shift = torch.zeros(M)
    shift[4] = 0.5  # the program's noise is 0.5 a value; its column mean over 300 rows is known to 0.05
    found = checked(oracle, guide, oracle.sample(N) + shift)
    assert found.pixel_p.argmin() == 4
    assert found.pixel_p[4] < 0.01


# id: rows that the program does not make, and the statistic that must tell: 0 where it is too large, 1 too small
WRONG = {
    "noise twice as strong": (lambda x, e: x + 0.9 * e, "spread over rows", 0),
    "noise missing": (lambda x, e: x.mean(0) + 0.3 * (x - x.mean(0)), "spread over rows", 1),
    "an outlier": (lambda x, e: torch.cat([x[1:], 4 * x[:1].abs() + 3]), "largest value", 0),
    "dropouts": (lambda x, e: torch.where(e > 1.5, 0.0, x), "share of zeros", 0),
    "rough": (lambda x, e: x + torch.tensor([0.7, -0.7] * (M // 2)) * e[:, :1], "difference of neighbours", 0),
    "brightness varies": (lambda x, e: x + 1.5 * e[:, :1], "spread of row means", 0),
}


@pytest.mark.parametrize("name", WRONG)
def test_rows_of_another_kind_are_told_by_a_statistic_made_for_it(oracle, guide, name):
    change, loud, side = WRONG[name]
    x = oracle.sample(N)
    noise = torch.randn(N, M, generator=torch.Generator().manual_seed(5))
    found = checked(oracle, guide, change(x, noise))
    assert abs(statistic(found, loud) - side) < 0.01


def test_a_statistic_that_can_not_vary_tells_nothing():
    vae = VAE(nn.Linear(D, M), Bernoulli(), StandardNormal(D))
    family = DiagonalNormal(D)
    x = (torch.arange(40 * M) % 3 == 0).float().view(40, M)
    found = run_predictive_checks(vae.model, Amortized(nn.Linear(M, 2 * D), family), x, replicates=20, hidden=0)
    assert statistic(found, "largest value") == 0.5


def test_p_values_count_ties_and_the_data_by_half():
    replicated = torch.tensor([[1.0], [2.0], [2.0], [3.0]])
    assert _p(torch.tensor([2.0]), replicated).item() == pytest.approx((1 + 3 / 2) / 5)
    assert _p(torch.tensor([9.0]), replicated).item() == pytest.approx(0.1)
    assert _p(torch.tensor([-9.0]), replicated).item() == pytest.approx(0.9)


@pytest.mark.slow
def test_p_values_of_the_exact_posterior_are_no_smaller_than_uniform_ones_over_repeats(oracle, guide):
    found = torch.stack([checked(oracle, guide, oracle.sample(100, seed=s), seed=s).statistics_p for s in range(100)])
    vary = [i for i, name in enumerate(STATISTICS) if name != "share of zeros"]
    off = (2 * torch.minimum(found, 1 - found) < 0.05)[:, vary].double().mean(0)
    assert (off <= 0.11).all()  # uniform ones: 0.05 +- 0.022 of 100 repeats
    assert off.mean() < 0.05  # measured 0.018: the latents saw the rows
    assert (found[:, vary].std(0) > 0.2).all()  # uniform ones: 0.29


def forecasts(oracle, x, there):
    """log p(x_mis | x_obs) and the sum of log p(x_d) of linear Gaussians, [B]."""
    covariance = oracle.weight @ oracle.weight.T + oracle.scale**2 * torch.eye(M)
    own, alone = [], []
    for row, seen in zip(x.double(), there, strict=True):
        some = dist.MultivariateNormal(oracle.bias[seen], covariance[seen][:, seen]).log_prob(row[seen])
        own.append(dist.MultivariateNormal(oracle.bias, covariance).log_prob(row) - some)
        columns = dist.Normal(oracle.bias, covariance.diag().sqrt()).log_prob(row)
        alone.append(columns[~seen].sum())
    return torch.stack(own), torch.stack(alone)


def hidden_by(x, seed=0, share=0.5):
    """The entries that predictive_checks leaves under this seed."""
    with seeded(seed + 1):
        return _mask(x, share)


@pytest.mark.parametrize("scale", [0.25, 0.5])
def test_the_forecast_of_hidden_values_is_the_conditional_gaussian(scale):
    oracle = LinearGaussian(D, M, scale=scale)
    guide = Amortized(Exact(oracle), FullRankNormal(D))
    x = oracle.sample(100)
    found = checked(oracle, guide, x, replicates=1, hidden=0.5, K=2000)
    there = hidden_by(x)
    assert (there.sum(1) == M // 2).all()
    own, alone = forecasts(oracle, x, there)
    for scores, exact in ((found.imputation, own), (found.imputation_marginal, alone)):
        error = mean_se(scores.double() - exact / (M // 2))
        assert error.se < 0.004  # nats: the forecasts' own Monte Carlo error
        assert abs(error.mean) < 5 * error.se
    gain = found.summary()["imputation_gain"]
    assert (gain.mean > 5 * gain.se) == (scale == 0.25)  # where noise drowns the latents, looking wins little


@pytest.mark.parametrize("source", SOURCES)
def test_forecasts_come_from_the_program_whatever_the_source_of_lam(oracle, source):
    x, index = oracle.sample(60), torch.arange(60)
    with seeded(3):
        guide = SOURCES[source](oracle.model, D, M, 60)
    found = run_predictive_checks(oracle.model, guide, x, index, replicates=1, K=500)
    exact = forecasts(oracle, x, hidden_by(x))[0] / (M // 2)
    error = mean_se(found.imputation.double() - exact)
    assert error.se < 0.01
    assert abs(error.mean) < 5 * error.se + 0.002  # the logarithm's bias at K = 500


def test_what_is_hidden_can_not_be_seen(oracle, guide):
    """Other values in the hidden places change the score and nothing that leads to it."""
    x = oracle.sample(20)
    there = hidden_by(x)
    other = torch.where(there, x, x.flip(0))
    found = checked(oracle, guide, other, replicates=1, hidden=0.5, K=2000).imputation
    error = mean_se(found.double() - forecasts(oracle, other, there)[0] / (M // 2))
    assert error.se < 0.01
    assert abs(error.mean) < 5 * error.se


def test_a_program_whose_columns_are_confused_forecasts_worse_than_columns_alone(oracle, guide):
    x = oracle.sample(100).roll(1, 1) - oracle.bias.float().roll(1) + oracle.bias.float()
    gain = checked(oracle, guide, x, replicates=1, hidden=0.5).summary()["imputation_gain"]
    assert gain.mean < -2 * gain.se


def test_levels_are_forecast_too():
    with seeded(0):
        vae = VAE(nn.Linear(D, 4 * M), Categorical(levels=4), StandardNormal(D))
        guide = Amortized(nn.Linear(M, 2 * D), DiagonalNormal(D))
    x = (torch.arange(30 * M) % 4).float().view(30, M)
    found = run_predictive_checks(vae.model, guide, x, replicates=5, K=200, steps=20)
    assert (found.imputation < 0).all()
    assert (found.imputation_marginal < 0).all()


def test_a_point_mass_is_checked_but_forecasts_nothing(oracle):
    guide = Amortized(nn.Linear(M, D), Delta(D))
    found = run_predictive_checks(oracle.model, guide, oracle.sample(20), replicates=5)
    assert found.imputation.isnan().all()
    assert "imputation" not in found.summary()
    assert not found.pixel_p.isnan().any()


class Whole(LocalModule):
    """A program that scores whole rows, the last two of whose columns it only reads."""

    @local_method
    def model(self, x, index=None):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(D), 1.0).to_event(1))
            pyro.sample("x", dist.MultivariateNormal(z, torch.eye(D)), obs=x[:, :D])


class Labelled(LocalModule):
    """A program that observes the first columns and reads the last two."""

    @local_method
    def model(self, x, index=None):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(D), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z + x[:, D:], 1.0).to_event(1), obs=x[:, :D])


@pytest.mark.parametrize("program", [Whole, Labelled])
def test_programs_that_observe_a_part_of_the_row_are_checked(program):
    x = torch.randn(20, D + 2, generator=torch.Generator().manual_seed(0))
    guide = Amortized(nn.Linear(D + 2, 2 * D), DiagonalNormal(D))
    found = run_predictive_checks(program().model, guide, x, replicates=5, K=50, steps=10)
    assert found.pixel_p.shape == (D,)
    assert found.imputation.isnan().all() == (program is Whole)


def test_checks_repeat_and_leave_the_random_stream_alone(oracle, guide):
    x = oracle.sample(20)
    torch.manual_seed(7)
    before = torch.get_rng_state()
    one, two, other = (
        checked(oracle, guide, x, hidden=0.5, replicates=5, K=50, steps=5, seed=seed) for seed in (0, 0, 1)
    )
    assert torch.equal(before, torch.get_rng_state())
    for field in ("pixel_p", "statistics_p", "replicated", "imputation"):
        assert torch.equal(getattr(one, field), getattr(two, field))
    assert not torch.equal(one.replicated, other.replicated)


@pytest.mark.parametrize(
    ("own", "message"),
    [({"replicates": 0}, "replicates is 0"), ({"hidden": 1.0}, "hidden is 1.0"), ({"K": 0}, "K is 0")],
)
def test_numbers_out_of_range_are_mistakes_of_the_user(oracle, guide, own, message):
    with pytest.raises(UserError, match=message):
        checked(oracle, guide, oracle.sample(5), **own)


def test_figures_are_of_every_statistic(oracle, guide):
    found = checked(oracle, guide, oracle.sample(50), replicates=40, hidden=0.5, K=50, steps=5).summary()
    told = {"statistics_off", "columns_off", "columns_p", "imputation", "imputation_marginal", "imputation_gain"}
    assert {f"p of {name}" for name in STATISTICS} | told == set(found)
    p = found["p of mean"]
    assert p.se == pytest.approx((p.mean * (1 - p.mean) / 40) ** 0.5)
