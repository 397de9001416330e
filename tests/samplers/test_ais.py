"""Annealed importance sampling: weights that average to the evidence, and bounds that close around it."""

import math

import pytest
import torch
from oracles import Curved, LinearGaussian

from pvae.errors import UserError
from pvae.inference.families import Delta, DiagonalNormal, FullRankNormal
from pvae.inference.guides import Amortized
from pvae.inference.importance import log_weights
from pvae.inference.latents import real_vector_latent
from pvae.inference.refinement import fixed_guide
from pvae.samplers import ais, hmc
from pvae.samplers.ais import anneal, inverse_temperatures, sandwich
from pvae.samplers.log_joint import LogJoint, simulate_joint
from pvae.stats import log_mean_exp, log_mean_exp_se
from tests.inference.test_latents import counts, counts_evidence

pytestmark = pytest.mark.usefixtures("double")

ROWS = 40

# Latents, conditioning of the decoder, its noise (at 0.1 and 100 variances of the posterior differ by a factor of 100),
# and temperatures enough for weights within a factor of 3 or so of each other.
CASES = [
    (2, 1.0, 0.5, 60),
    (2, 100.0, 0.1, 100),
    (10, 1.0, 0.5, 100),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in ((10, 100.0, 0.1, 300), (50, 1.0, 1.0, 400))),
    pytest.param(50, 100.0, 0.1, 1000, marks=pytest.mark.slow),
]
each_case = pytest.mark.parametrize(("dim", "conditioning", "scale", "temperatures"), CASES)


def off(weights):
    """How many standard errors weights over p(x) [C, B] are off their mean of 1; the rows are independent."""
    return above(weights.mean(0) - 1)


def above(errors):
    """How many standard errors the mean of independent rows [B] is above 0."""
    return (errors.mean() / errors.std() * len(errors) ** 0.5).item()


def linear(dim, conditioning, scale):
    oracle = LinearGaussian(dim, dim + 3, conditioning=conditioning, scale=scale)
    return oracle, *simulate_joint(oracle.model, torch.zeros(ROWS, dim + 3), seed=3)


def wide(oracle, x):
    """The q_params of normals with the posterior's mean and 1.3 times its covariance."""
    root = torch.linalg.cholesky(1.3 * oracle.covariance)
    rows, columns = torch.tril_indices(*root.shape, -1)
    return torch.cat([oracle.mean(x), torch.cat([root.diag().log(), root[rows, columns]]).expand(len(x), -1)], -1)


@each_case
def test_iwae_weights_average_to_the_evidence(dim, conditioning, scale, temperatures):
    oracle, _, x = linear(dim, conditioning, scale)
    torch.manual_seed(1)
    w = log_weights(oracle.model, fixed_guide(FullRankNormal(dim), wide(oracle, x)), x, K=2000).log_w
    assert abs(off((w - oracle.evidence(x)).exp())) < 4  # standard errors
    assert ((log_mean_exp(w) - oracle.evidence(x)).abs() < 4.5 * log_mean_exp_se(w)).all()


@each_case
def test_annealed_weights_from_the_prior_average_to_the_evidence(dim, conditioning, scale, temperatures):
    oracle, _, x = linear(dim, conditioning, scale)
    found = anneal(LogJoint(oracle.model, x), chains=8, temperatures=temperatures, seed=1)
    assert abs(off((found.log_w - oracle.evidence(x)).exp())) < 4  # standard errors
    assert above(found.evidence - oracle.evidence(x)) < 4  # a lower bound in expectation
    assert found.divergence_rate.max() < 0.2


@each_case
def test_annealed_weights_from_a_guide_average_to_the_evidence(dim, conditioning, scale, temperatures):
    oracle, _, x = linear(dim, conditioning, scale)
    q_params = oracle.best(x) + 0.3 * torch.randn(len(x), 2 * dim, generator=torch.Generator().manual_seed(0))
    start = DiagonalNormal(dim), q_params
    found = anneal(LogJoint(oracle.model, x), *start, chains=8, temperatures=temperatures, seed=1)
    assert abs(off((found.log_w - oracle.evidence(x)).exp())) < 4  # standard errors


@each_case
def test_reverse_weights_average_to_one_over_the_evidence(dim, conditioning, scale, temperatures):
    oracle, u, x = linear(dim, conditioning, scale)
    found = anneal(LogJoint(oracle.model, x), chains=8, temperatures=temperatures, start_from=u, seed=1)
    assert abs(off((found.log_w + oracle.evidence(x)).exp())) < 4  # standard errors
    assert above(found.evidence - oracle.evidence(x)) > -4  # an upper bound in expectation


@pytest.mark.parametrize("name", ["linear", "sigmoid", "geometric"])
@pytest.mark.parametrize("reverse", [False, True])
def test_every_schedule_is_unbiased(name, reverse):
    oracle, u, x = linear(2, 3.0, 0.5)
    begin, sign = (u, 1) if reverse else (None, -1)
    found = anneal(LogJoint(oracle.model, x), chains=8, temperatures=50, schedule=name, start_from=begin, seed=1)
    assert abs(off((found.log_w + sign * oracle.evidence(x)).exp())) < 4  # standard errors


FAULTS = {
    "kinetic energy counted twice": lambda patch: patch.setattr(hmc, "_kinetic", lambda p: (p**2).sum(-1)),
    "a temperature's weight left out": lambda patch: patch.setattr(
        ais,
        "_reweight",
        lambda path, state, beta, log_w, own=ais._reweight: (
            own(path, state, beta, log_w) if beta < 0.9 else (log_w, own(path, state, beta, log_w)[1])
        ),
    ),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
@pytest.mark.parametrize("reverse", [False, True])
def test_a_broken_sampler_misses_the_evidence(reverse, fault, monkeypatch):
    fault(monkeypatch)
    oracle, u, x = linear(2, 3.0, 0.5)
    found = anneal(LogJoint(oracle.model, x), chains=24, temperatures=50, start_from=u if reverse else None, seed=1)
    assert abs(above(found.evidence - oracle.evidence(x))) > 8  # standard errors


def test_more_temperatures_leave_a_smaller_error():
    oracle, _, x = linear(5, 3.0, 0.3)
    errors = [
        (anneal(LogJoint(oracle.model, x), chains=4, temperatures=T, seed=1).evidence - oracle.evidence(x)).abs().mean()
        for T in (4, 20, 100)
    ]
    assert errors[0] > 2 * errors[1] > 4 * errors[2]


def test_a_single_temperature_is_importance_sampling_from_the_prior():
    oracle, _, x = linear(2, 3.0, 0.5)
    target = LogJoint(oracle.model, x)
    found = anneal(target, chains=8, temperatures=1, seed=1)
    torch.testing.assert_close(found.log_w, target.log_lik_and_prior(found.position)[0])
    assert found.acceptance_rate.isnan().all()


def test_an_exact_guide_leaves_nothing_to_anneal():
    oracle, _, x = linear(3, 1.0, 0.5)
    found = anneal(LogJoint(oracle.model, x), DiagonalNormal(3), oracle.best(x), chains=4, temperatures=5, seed=1)
    torch.testing.assert_close(
        found.log_w, oracle.evidence(x).expand(4, -1), rtol=0, atol=1e-5
    )  # W is rotated in float32
    torch.testing.assert_close(found.ess, torch.full((ROWS,), 4.0))


def test_bounded_latents_have_their_evidence():
    x = torch.tensor([[0.0, 1.0, 0.0], [2.0, 3.0, 4.0], [0.0, 0.0, 0.0], [9.0, 1.0, 2.0]]).repeat(10, 1)
    found = anneal(LogJoint(counts, x), chains=8, temperatures=60, seed=1)
    assert abs(off((found.log_w - counts_evidence(x)).exp())) < 4  # standard errors


def test_step_sizes_meet_their_acceptance_for_every_datapoint():
    """Rows whose posteriors differ much in width: a step of all would suit none."""
    x = torch.tensor([[0.0, 1.0, 0.0], [20.0, 30.0, 4.0], [90.0, 100.0, 200.0], [0.0, 0.0, 0.0]])
    found = anneal(LogJoint(counts, x), chains=16, temperatures=100, seed=1)
    assert ((found.acceptance_rate - hmc.TARGET_ACCEPT).abs() < 0.1).all()


# Both directions


def curved():
    oracle = Curved().double()
    return oracle, oracle.sample(ROWS, seed=1)


def test_evidence_is_what_quadrature_finds():
    oracle, x = curved()
    found = anneal(LogJoint(oracle.model, x), chains=8, temperatures=60, seed=1)
    assert abs(off((found.log_w - oracle.evidence(x)).exp())) < 4  # standard errors


@pytest.mark.parametrize(
    "oracle",
    [pytest.param(LinearGaussian(2, 8), id="linear", marks=pytest.mark.slow), pytest.param(Curved(), id="curved")],
)
def test_a_short_path_leaves_the_bounds_apart_and_a_long_one_closes_them(oracle):
    widths = []
    for temperatures in (3, 100):
        found = sandwich(oracle.double().model, torch.zeros(ROWS, 8), chains=8, temperatures=temperatures, seed=1)
        low, high = found.interval()
        assert low < oracle.evidence(found.x).mean() < high
        widths.append(found.width.mean().item())
    assert widths[0] > 0.3
    assert abs(widths[1]) < 0.1


def test_a_sandwich_may_start_from_the_guide():
    oracle = LinearGaussian(2, 5)
    encoder = torch.nn.Linear(5, 4)
    with torch.no_grad():
        encoder.weight.copy_(torch.cat([oracle.covariance @ oracle.weight.T / oracle.scale**2, torch.zeros(2, 5)]))
        encoder.bias.copy_(torch.cat([oracle.mean(torch.zeros(1, 5))[0], torch.full((2,), -1.0)]))
    guide = Amortized(encoder, DiagonalNormal(2))
    found = sandwich(oracle.model, torch.zeros(ROWS, 5), guide, chains=8, temperatures=30, seed=1)
    low, high = found.interval()
    assert low < oracle.evidence(found.x).mean() < high
    assert found.width.mean().abs() < 0.1


def test_a_sandwich_of_a_broken_sampler_misses_the_evidence(monkeypatch):
    FAULTS["kinetic energy counted twice"](monkeypatch)
    oracle = LinearGaussian(5, 8, scale=0.3)
    found = sandwich(oracle.model, torch.zeros(ROWS, 8), chains=8, temperatures=30, seed=1)
    low, high = found.interval()
    assert not low < oracle.evidence(found.x).mean() < high


@pytest.mark.slow
@pytest.mark.parametrize("oracle", [LinearGaussian(2, 8), Curved()], ids=["linear", "curved"])
@pytest.mark.parametrize("temperatures", [10, 50])
def test_the_sandwich_holds_the_evidence_in_95_of_100_repeats(oracle, temperatures):
    held = 0
    for repeat in range(100):
        found = sandwich(
            oracle.double().model, torch.zeros(20, 8), chains=8, temperatures=temperatures, seed=10 * repeat
        )
        low, high = found.interval()
        held += low < oracle.evidence(found.x).mean() < high
    assert held >= 95


# Schedules


@pytest.mark.parametrize("name", ["linear", "sigmoid", "geometric"])
@pytest.mark.parametrize("temperatures", [1, 2, 7, 100])
def test_a_schedule_rises_from_zero_to_one(name, temperatures):
    betas = inverse_temperatures(name, temperatures)
    assert len(betas) == temperatures + 1
    assert (betas[0], betas[-1]) == (0, 1)
    assert (betas.diff() > 0).all()


def test_a_sigmoid_schedule_is_dense_at_both_ends_and_a_geometric_one_at_the_start():
    steps = inverse_temperatures("sigmoid", 10).diff()
    assert steps[0] < steps[5] / 5 > steps[-1]
    torch.testing.assert_close(steps, steps.flip(0))
    ratios = inverse_temperatures("geometric", 10)[1:]
    torch.testing.assert_close(ratios[1:] / ratios[:-1], torch.full((9,), 1e4 ** (1 / 9)))


# Calls


@pytest.mark.parametrize("name", ["temperatures", "chains", "num_integration_steps"])
@pytest.mark.parametrize("value", [0, -3])
def test_counts_below_one_are_refused(name, value):
    oracle, x = curved()
    with pytest.raises(UserError, match=f"{name} is {value}, but it must be at least 1"):
        anneal(LogJoint(oracle.model, x), **{name: value})


def test_a_schedule_that_does_not_exist_is_refused():
    oracle, x = curved()
    with pytest.raises(UserError, match="unknown schedule 'sigmoidal'; did you mean 'sigmoid'"):
        anneal(LogJoint(oracle.model, x), schedule="sigmoidal")


def test_a_path_can_not_start_from_a_point():
    oracle, x = curved()
    with pytest.raises(UserError, match="Delta is a point mass"):
        anneal(LogJoint(oracle.model, x), Delta(2), torch.zeros(ROWS, 2), temperatures=5)


def test_a_model_that_is_nowhere_finite_is_refused_and_gives_no_number():
    oracle, x = curved()
    oracle.decoder[0].weight.fill_(math.nan)
    with pytest.raises(UserError, match="HMC diverges everywhere, so there is no number to give"):
        anneal(LogJoint(oracle.model, x, sites=real_vector_latent(2)), temperatures=5)


def test_a_datapoint_that_diverges_everywhere_gives_no_number_and_the_others_theirs():
    oracle, _, x = linear(2, 3.0, 0.5)
    x[1] = math.nan
    found = anneal(LogJoint(oracle.model, x), chains=8, temperatures=50, seed=1)
    assert found.evidence.isnan().nonzero().flatten().tolist() == [1]
    assert (found.divergence_rate == 1).nonzero().flatten().tolist() == [1]


def test_the_seed_fixes_the_weights_and_the_stream_outside_is_left_alone():
    oracle, x = curved()
    before = torch.get_rng_state()
    once, again, other = (anneal(LogJoint(oracle.model, x), chains=2, temperatures=5, seed=s).log_w for s in (1, 1, 2))
    assert torch.equal(once, again)
    assert not torch.equal(once, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_many_datapoints_go_in_pieces(monkeypatch):
    monkeypatch.setattr(ais, "ROWS_PER_PASS", {True: 100})
    oracle, _, x = linear(2, 3.0, 0.5)
    seen, own = [], LogJoint.log_lik_and_prior
    monkeypatch.setattr(
        LogJoint, "log_lik_and_prior", lambda self, u: seen.append(u.shape[0] * u.shape[1]) or own(self, u)
    )
    found = anneal(LogJoint(oracle.model, x), chains=8, temperatures=30, seed=1)
    assert 96 in seen
    assert max(seen) <= 100
    assert found.log_w.shape == (8, ROWS)
    assert abs(off((found.log_w - oracle.evidence(x)).exp())) < 4  # standard errors


def test_a_device_without_memory_gets_smaller_pieces_and_the_evidence_stays(monkeypatch, capsys):
    oracle, _, x = linear(2, 3.0, 0.5)
    own = LogJoint.log_lik_and_prior

    def parts(self, u):
        if u.shape[1] > 15:
            raise torch.OutOfMemoryError
        return own(self, u)

    monkeypatch.setattr(LogJoint, "log_lik_and_prior", parts)
    found = anneal(LogJoint(oracle.model, x), chains=8, temperatures=30, seed=1)
    assert abs(off((found.log_w - oracle.evidence(x)).exp())) < 4  # standard errors
    assert "going on with 10 instead of" in capsys.readouterr().err


def test_progress_rises_to_one():
    oracle, seen = Curved().double(), []
    sandwich(oracle.model, torch.zeros(3, 8), chains=2, temperatures=7, progress=seen.append)
    assert seen == sorted(seen)
    assert seen[-1] == pytest.approx(1)
