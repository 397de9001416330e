"""HMC: the density stays invariant, chains find it from far off, and what is broken is seen."""

import math

import pytest
import torch
from oracles import Curved, LinearGaussian

from pvae.errors import UserError
from pvae.samplers import hmc
from pvae.samplers.log_joint import LogJoint, simulate_joint
from pvae.stats import chain_ess, r_hat

pytestmark = pytest.mark.usefixtures("double")

SCALES = torch.tensor([[0.01, 1.0, 10.0], [3.0, 0.1, 0.5]])


def normal(u):
    """Independent normals of two datapoints, with the standard deviations SCALES."""
    return -((u / SCALES) ** 2).sum(-1) / 2


def constant(value):
    return lambda u: (0 * u).sum(-1) + value


def whitened(oracle, x, u):
    """Standard normal, where u [N, D] are posterior draws of the rows x."""
    return (u - oracle.mean(x)) @ torch.linalg.cholesky(oracle.precision)


def moved(density, u, step, transitions=20, num_integration_steps=5):
    """Where single chains [N, D] stand after some transitions."""
    state = hmc.init(density, u.unsqueeze(0))
    for _ in range(transitions):
        state = hmc.transition(
            density, state, torch.full((len(u),), step), num_integration_steps=num_integration_steps
        ).state
    return state.position[0]


def off_linear():
    """How many standard errors the moments of whitened draws are off after transitions from exact posterior draws."""
    oracle, N = LinearGaussian(2, 5, scale=1.0), 4000
    u, x = simulate_joint(oracle.model, torch.zeros(N, 5), seed=1)
    torch.manual_seed(2)
    white = whitened(oracle, x, moved(LogJoint(oracle.model, x), u, 1.1))
    mean, square = white.mean(0) * N**0.5, ((white**2).mean(0) - 1) * (N / 2) ** 0.5
    return torch.cat([mean, square]).abs().max().item()


def off_curved():
    """The same on the posterior that quadrature knows; errors from the spread over rows."""
    oracle, N = Curved().double(), 2000
    u, x = simulate_joint(oracle.model, torch.zeros(N, 8), seed=1)
    torch.manual_seed(2)
    kinds, which = x.unique(dim=0, return_inverse=True)
    mean, sd = (moment[which] for moment in oracle.moments(kinds))
    white = (moved(LogJoint(oracle.model, x), u, 0.7) - mean) / sd
    both = torch.cat([white, white**2 - 1], -1)
    return (both.mean(0) / both.std(0) * N**0.5).abs().max().item()


@pytest.mark.parametrize("off", [off_linear, off_curved])
def test_the_exact_posterior_stays_what_it_is(off):
    assert off() < 4.5  # standard errors


FAULTS = {
    "all proposals accepted": lambda patch: patch.setattr(hmc, "_choose", lambda accepted, new, old: new),
    "kinetic energy counted twice": lambda patch: patch.setattr(hmc, "_kinetic", lambda p: (p**2).sum(-1)),
    "heavy momenta": lambda patch: patch.setattr(torch, "randn_like", lambda u: 1.5 * torch.randn(u.shape)),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
@pytest.mark.parametrize("off", [off_linear, off_curved])
def test_a_broken_transition_drives_it_away(off, fault, monkeypatch):
    fault(monkeypatch)
    assert off() > 8  # standard errors


@pytest.mark.parametrize(
    ("dim", "conditioning"),
    [
        *((dim, 100.0) for dim in (2, 10, 50)),
        *(pytest.param(dim, 1.0, marks=pytest.mark.slow) for dim in (2, 10, 50)),
    ],
)
def test_chains_from_far_off_find_the_posterior(dim, conditioning):
    oracle = LinearGaussian(dim, dim + 3, scale=0.1, conditioning=conditioning)
    x = oracle.sample(3)

    def posterior(u):
        apart = u - oracle.mean(x)
        return -(apart @ oracle.precision * apart).sum(-1) / 2

    chains = hmc.sample(posterior, 10 + torch.randn(8, 3, dim), draws=200, warm_up=200, thin=2, seed=1)
    draws, sd = chains.draws, oracle.covariance.diag().sqrt()
    assert r_hat(draws).max() < 1.05
    errors = chain_ess(draws).rsqrt()
    assert (((draws.mean((0, 1)) - oracle.mean(x)) / sd).abs() < 4.5 * errors).all()  # 4.5 standard errors
    spread = ((draws - oracle.mean(x)) / sd) ** 2
    assert ((spread.mean((0, 1)) - 1).abs() < 4.5 * 2**0.5 * chain_ess(spread).rsqrt()).all()
    assert (chains.acceptance_rate - hmc.TARGET_ACCEPT).abs().max() < 0.15
    assert (chains.divergence_rate == 0).all()


def test_chains_find_the_moments_that_quadrature_knows():
    oracle = Curved().double()
    x = oracle.sample(4, seed=1)
    target = LogJoint(oracle.model, x)
    draws = hmc.sample(target, target.prior(32), draws=100, warm_up=100, thin=2, seed=1).draws
    mean, sd = oracle.moments(x)
    off = (draws.mean((0, 1)) - mean) / sd * chain_ess(draws).sqrt()
    assert off.abs().max() < 4.5  # standard errors
    assert ((draws.std((0, 1)) / sd - 1).abs() < 4.5 * chain_ess((draws - mean) ** 2).rsqrt()).all()


def test_the_scale_of_every_dimension_of_every_datapoint_is_learned():
    chains = hmc.sample(normal, torch.randn(16, 2, 3), draws=50, warm_up=300, seed=1)
    assert ((chains.scale / SCALES).log().abs() < 0.25).all()
    assert (chains.acceptance_rate - hmc.TARGET_ACCEPT).abs().max() < 0.15


def test_a_step_is_in_units_of_the_scale():
    u = torch.randn(4, 2, 3)
    torch.manual_seed(0)
    there = hmc.transition(normal, hmc.init(normal, u * SCALES), torch.ones(2), scale=SCALES).state.position
    torch.manual_seed(0)
    unit = hmc.transition(lambda u: normal(u * SCALES), hmc.init(lambda u: normal(u * SCALES), u), torch.ones(2))
    torch.testing.assert_close(there, unit.state.position * SCALES)


def test_datapoints_do_not_see_each_other():
    """The second one's chains are the same beside a first one that overflows."""
    u, step = torch.randn(4, 2, 3), torch.ones(2)
    ends = []
    for factor in (1.0, 1e300):
        torch.manual_seed(0)

        def density(u, factor=factor):
            return normal(u) * torch.tensor([factor, 1.0])

        ends.append(hmc.transition(density, hmc.init(density, u), step).state.position[:, 1])
    assert torch.equal(*ends)


def test_energy_errors_vanish_with_the_square_of_the_step():
    u, errors = SCALES * torch.randn(200, 2, 3), []
    for num_integration_steps in (8, 16):
        torch.manual_seed(0)
        step = torch.full((2,), 1 / num_integration_steps)
        move = hmc.transition(
            normal, hmc.init(normal, u), step, num_integration_steps=num_integration_steps, scale=SCALES, jitter=0.0
        )
        errors.append((1 - move.acceptance_rate).mean().item())
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.1)


def test_a_leapfrog_costs_one_gradient():
    calls = []

    def density(u):
        calls.append(len(u))
        return normal(u)

    hmc.transition(density, hmc.init(density, torch.randn(4, 2, 3)), torch.ones(2), num_integration_steps=7, jitter=0.0)
    assert calls == [4] * 8  # one at the start, then one each


def test_parts_are_mixed_by_their_inverse_temperatures():
    def parts(u):
        return -(u**2).sum(-1), u.sin().sum(-1)

    u = torch.randn(4, 2, 3)
    state, mixed = (
        hmc.init(parts, u, torch.tensor([0.5, 2.0])),
        hmc.init(lambda u: 0.5 * parts(u)[0] + 2 * parts(u)[1], u),
    )
    torch.testing.assert_close(state.log_p, mixed.log_p)
    torch.testing.assert_close(state.gradient, mixed.gradient)


def test_a_part_of_inverse_temperature_0_may_be_infinite():
    def parts(u):
        return normal(u), (u * 0).sum(-1) - torch.inf

    state = hmc.init(parts, torch.randn(4, 2, 3), torch.tensor([1.0, 0.0]))
    assert state.log_p.isfinite().all()
    assert state.gradient.isfinite().all()


# Divergence


def test_trajectories_that_leave_their_level_set_are_counted():
    move = hmc.transition(normal, hmc.init(normal, SCALES * torch.randn(50, 2, 3)), torch.tensor([5.0, 0.05]))
    assert move.is_divergent.double().mean(0).tolist() == [1.0, 0.0]
    assert (move.acceptance_rate[:, 0] == 0).all()


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_a_density_that_is_nowhere_finite_is_refused_and_gives_no_number(value):
    with pytest.raises(UserError, match="HMC diverges everywhere, so there is no number to give") as error:
        hmc.sample(constant(value), torch.randn(4, 2, 3), draws=5, warm_up=5)
    assert "\n" not in str(error.value)


def test_a_datapoint_that_diverges_everywhere_gives_no_draws_and_the_others_theirs():
    def density(u):
        return normal(u) + torch.tensor([0.0, math.nan])

    chains = hmc.sample(density, SCALES * torch.randn(4, 2, 3), draws=5, warm_up=20)
    assert chains.divergence_rate.tolist() == [0.0, 1.0]
    assert chains.draws[:, :, 0].isfinite().all()
    assert chains.draws[:, :, 1].isnan().all()


# Calls


@pytest.mark.parametrize("name", ["draws", "warm_up", "num_integration_steps", "thin"])
def test_counts_below_one_are_refused(name):
    with pytest.raises(UserError, match=f"{name} is 0, but it must be at least 1"):
        hmc.sample(normal, torch.randn(4, 2, 3), **{name: 0})


def test_the_seed_fixes_the_draws_and_the_stream_outside_is_left_alone():
    u, before = SCALES * torch.randn(4, 2, 3), torch.get_rng_state()
    once, again, other = (hmc.sample(normal, u, draws=5, warm_up=5, seed=seed).draws for seed in (1, 1, 2))
    assert torch.equal(once, again)
    assert not torch.equal(once, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_progress_goes_from_the_first_transition_to_all():
    seen = []
    hmc.sample(normal, SCALES * torch.randn(4, 2, 3), draws=5, warm_up=10, thin=2, progress=seen.append)
    assert seen == pytest.approx([(n + 1) / 20 for n in range(20)])


@pytest.mark.slow
def test_pyros_nuts_finds_the_same_moments():
    from pyro.infer import MCMC, NUTS

    oracle = Curved().double()
    x = oracle.sample(2, seed=1)
    target = LogJoint(oracle.model, x)
    ours = hmc.sample(target, target.prior(8), draws=500, warm_up=300, thin=2, seed=1).draws
    for row in range(len(x)):
        own = target.rows(slice(row, row + 1))
        torch.manual_seed(row)
        kernel = NUTS(potential_fn=lambda latents, own=own: -own(latents["u"].view(1, 1, 2)).sum())
        mcmc = MCMC(kernel, 2000, 300, initial_params={"u": torch.zeros(2)}, disable_progbar=True)
        mcmc.run()
        theirs = mcmc.get_samples()["u"].unsqueeze(0)
        sd = oracle.moments(x)[1][row]
        error = (1 / chain_ess(ours[:, :, row]) + 1 / chain_ess(theirs)).sqrt()
        assert (((ours[:, :, row].mean((0, 1)) - theirs.mean((0, 1))) / sd).abs() < 4.5 * error).all()
        assert ((ours[:, :, row].std((0, 1)) / theirs.std((0, 1)) - 1).abs() < 4.5 * error).all()
