"""Refinement: rows climb their own bounds, alone or together, and say how far they have come."""

from dataclasses import dataclass

import pytest
import torch
from oracles import LinearGaussian
from torch import nn

from pvae.inference.families import DiagonalNormal
from pvae.inference.guides import SemiAmortized
from pvae.inference.importance import log_weights
from pvae.inference.refinement import CHECK_STEPS, LocalELBO, NaturalAscent, RowAdam, RowState, refine
from pvae.runtime.torch_state import seeded

CURVATURE = torch.tensor([[2.0, 0.6], [0.6, 1.0]])
TARGET = torch.tensor([[1.0, -2.0], [0.5, 3.0], [-4.0, 0.2]])


def newton(q_params, gradient):
    return gradient @ torch.linalg.inv(CURVATURE.to(gradient))


RULES = [RowAdam(), NaturalAscent(lambda q_params, gradient: gradient), NaturalAscent(newton, learning_rate=0.5)]
every_rule = pytest.mark.parametrize("rule", RULES, ids=["adam", "plain", "newton"])


def quadratic(q_params, target=TARGET):
    away = q_params - target
    return -((away @ CURVATURE.to(q_params)) * away).sum(-1) / 2


@every_rule
def test_rows_reach_the_optimum_of_a_quadratic(rule):
    found = refine(quadratic, torch.zeros(3, 2), 500, rule=rule)
    assert (found.q_params - TARGET).abs().max() < 1e-3
    assert found.steps == 500
    assert (found.state.steps == 500).all()
    assert found.check_steps == ()
    assert found.curve.shape == (0, 3)
    assert found.value.isnan().all()
    assert found.optimization_gap.isnan().all()


def test_rows_reach_the_best_diagonal_of_their_own_elbo():
    oracle = LinearGaussian(2, 5)
    x = oracle.sample(10)
    for rule in (RowAdam(), NaturalAscent(DiagonalNormal(2).natural_gradient)):
        found = refine(lambda q_params: oracle.elbo(q_params, x), torch.zeros(10, 4), 300, rule=rule)
        assert (oracle.elbo(oracle.best(x), x) - oracle.elbo(found.q_params, x)).max() < 1e-3


def test_adam_is_torch_adam_for_rows_that_do_not_slow_down():
    rule, q_params, target = RowAdam(0.05, decay_steps=float("inf")), torch.zeros(3, 2).double(), TARGET.double()
    theirs = torch.zeros(3, 2).double().requires_grad_()
    adam, state = torch.optim.Adam([theirs], lr=0.05), rule.start(q_params)
    for _ in range(20):
        adam.zero_grad()
        (-quadratic(theirs, target).sum()).backward()
        adam.step()
        found = refine(lambda q_params: quadratic(q_params, target), q_params, 1, rule=rule, state=state)
        q_params, state = found.q_params, found.state
        torch.testing.assert_close(q_params, theirs.detach(), atol=1e-8, rtol=1e-7)


def test_natural_ascent_jumps_to_the_optimum_of_a_gaussian_posterior():
    oracle = LinearGaussian(1, 3)
    x = oracle.sample(5)
    best = oracle.best(x)
    start = best - torch.tensor([0.05, 0.0])
    rule = NaturalAscent(DiagonalNormal(1).natural_gradient, learning_rate=1.0)
    found = refine(lambda q_params: oracle.elbo(q_params, x), start, 1, rule=rule)
    torch.testing.assert_close(found.q_params, best, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rule", [RowAdam(0.1), NaturalAscent(lambda q_params, gradient: gradient, 0.1)])
def test_the_rate_falls_with_the_rows_own_steps(rule):
    lengths = 0.1 / (1 + torch.arange(100).double() / 20).sqrt()
    start = torch.zeros(1, 2).double()
    young = refine(lambda q_params: q_params.sum(-1), start, 60, rule=rule)
    torch.testing.assert_close(young.q_params, lengths[:60].sum().expand(1, 2))
    old, new = young.state, rule.start(start)
    both = RowState(*(torch.cat(pair) for pair in zip(old, new, strict=True)))
    mixed = refine(lambda q_params: q_params.sum(-1), start.expand(2, 2), 40, rule=rule, state=both)
    torch.testing.assert_close(mixed.q_params[:, 0], torch.stack([lengths[60:].sum(), lengths[:40].sum()]))
    assert mixed.state.steps.tolist() == [100, 40]


def test_a_step_is_bounded_however_far_the_start():
    rule = NaturalAscent(lambda q_params, gradient: gradient, 0.2)
    found = refine(lambda q_params: -1e6 * (q_params**2).sum(-1), torch.full((2, 2), 100.0), 1, rule=rule)
    torch.testing.assert_close(found.q_params, torch.full((2, 2), 99.8))


@every_rule
def test_a_row_does_not_know_of_the_others(rule):
    together = refine(quadratic, torch.zeros(3, 2), 30, rule=rule).q_params
    for i in range(3):
        alone = refine(lambda q_params, i=i: quadratic(q_params, TARGET[i]), torch.zeros(1, 2), 30, rule=rule).q_params
        torch.testing.assert_close(alone[0], together[i], atol=1e-6, rtol=1e-6)


@every_rule
def test_going_on_equals_going_through(rule):
    whole = refine(quadratic, torch.zeros(3, 2), 12, rule=rule)
    part = refine(quadratic, torch.zeros(3, 2), 5, rule=rule)
    rest = refine(quadratic, part.q_params, 7, rule=rule, state=part.state)
    assert torch.equal(rest.q_params, whole.q_params)
    for name in ("exp_avg", "exp_avg_sq", "steps"):
        assert torch.equal(getattr(rest.state, name), getattr(whole.state, name))


def test_no_steps_change_nothing():
    q_params = torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
    found = refine(quadratic, q_params, 0, check=quadratic)
    assert torch.equal(found.q_params, q_params)
    assert found.check_steps == (0,)
    assert found.optimization_gap.isinf().all()


@every_rule
def test_gradients_pass_through_the_steps(rule):
    random = torch.Generator().manual_seed(1)
    q_params = torch.randn(3, 2, generator=random, dtype=torch.double).requires_grad_()
    target = TARGET.double().requires_grad_()

    def refined(q_params, target):
        bound = lambda q_params: quadratic(q_params, target) - (q_params**4).sum(-1) / 40  # noqa: E731
        return refine(bound, q_params, 4, rule=rule, unroll=True).q_params

    # A plain step is clamped on some entries, where its derivative is 0: gradcheck sees both sides.
    assert torch.autograd.gradcheck(refined, (q_params, target))
    assert not refine(quadratic, q_params, 4, rule=rule).q_params.requires_grad


@pytest.mark.parametrize("draws", [1, 3])
def test_gradients_pass_through_a_semi_amortized_guide(draws):
    oracle, family = LinearGaussian(2, 5).double().requires_grad_(), DiagonalNormal(2)
    x = oracle.sample(4)
    torch.manual_seed(2)
    encoder = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4)).double()
    guide = SemiAmortized(encoder, family, 3, model=oracle.model, draws=draws)

    def bound():
        with seeded(3):
            return log_weights(oracle.model, guide, x).log_w.sum()

    def bound_at(values, own):
        with torch.no_grad():
            for p, value in zip(own, values, strict=True):
                p.copy_(value)
        return bound().item()

    for own in (list(encoder.parameters()), list(oracle.parameters())):
        gradients, here = torch.autograd.grad(bound(), own), [p.detach().clone() for p in own]
        for _ in range(3):
            along = [torch.randn_like(p) for p in own]
            slope = sum((g * v).sum().item() for g, v in zip(gradients, along, strict=True))
            up, down = (bound_at([p + h * v for p, v in zip(here, along, strict=True)], own) for h in (1e-6, -1e-6))
            assert slope == pytest.approx((up - down) / 2e-6, rel=1e-6, abs=1e-6)
        bound_at(here, own)


@dataclass(frozen=True)
class Harmonic:
    """A rule that stands at 1 / t after t steps, whatever the gradient."""

    def start(self, q_params):
        return RowState(q_params[:, :0], q_params[:, :0], torch.zeros(len(q_params), dtype=torch.int32))

    def step(self, q_params, gradient, state):
        after = RowState(state.exp_avg, state.exp_avg_sq, state.steps + 1)
        return torch.full_like(q_params, 1 / after.steps[0].item()), after


def distance(q_params):
    return -torch.tensor([1.0, 50.0]) * q_params.abs().sum(-1)


def test_curve_is_the_bound_at_each_mark():
    q_params, steps = torch.full((2, 1), 3.0, dtype=torch.double), 70
    found = refine(distance, q_params, steps, rule=Harmonic(), check=distance)
    assert found.check_steps == (0, *(m for m in CHECK_STEPS if m <= 50), 70)
    at = torch.tensor([3.0, *(1 / mark for mark in found.check_steps[1:])]).double()
    torch.testing.assert_close(found.curve, -torch.tensor([1.0, 50.0]) * at.unsqueeze(-1))


def test_gap_covers_what_is_left_at_one_over_steps():
    gaps = {}
    for steps in (1, 2, 3, 5, 7, 9, 10, 20, 33, 50, 100, 150, 200, 500):
        found = refine(distance, torch.full((2, 1), 3.0).double(), steps, rule=Harmonic(), check=distance)
        assert (found.optimization_gap >= -distance(found.q_params) * (1 - 1e-9)).all()
        half = max(mark for mark in found.check_steps if mark <= steps / 2)
        gaps[steps] = found.optimization_gap[0].item()
        assert gaps[steps] == pytest.approx((1 / half if half else 3.0) - 1 / steps)
    at_marks = [gap for steps, gap in gaps.items() if steps in CHECK_STEPS]
    assert at_marks == sorted(at_marks, reverse=True)
    assert at_marks[-1] < 0.004


def test_refinement_stops_when_doubling_wins_less_than_the_tolerance():
    def stop(tolerance):
        found = refine(distance, torch.full((2, 1), 3.0), 1000, rule=Harmonic(), check=distance, tolerance=tolerance)
        assert found.check_steps[-1] == found.steps
        assert len(found.curve) == len(found.check_steps)
        return found.steps

    # The rows' mean gain is 25.5 (1 / half - 1 / t): 0.77 nats at t = 50, 0.077 at 500, 0.026 at 1000.
    assert [stop(tolerance) for tolerance in (0.0, 0.03, 0.1, 1.0, 1e9)] == [1000, 1000, 500, 50, 20]


def test_best_is_never_below_the_start_nor_any_mark():
    oracle = LinearGaussian(2, 5)
    x, family = oracle.sample(30), DiagonalNormal(2)
    bound = LocalELBO(oracle.model, family)

    def check(q_params):
        with seeded(4), torch.no_grad():
            return bound(q_params, x, None, 5)

    for start in (torch.zeros(30, 4), oracle.best(x)):
        with seeded(5):
            found = refine(lambda q_params: bound(q_params, x), start, 60, rule=RowAdam(0.3), check=check)
        assert torch.equal(found.curve[0], check(start))
        assert torch.equal(found.value, check(found.q_params))
        assert (found.value >= found.curve.amax(0)).all()
        assert (found.optimization_gap >= 0).all()


@dataclass(frozen=True)
class Swing(Harmonic):
    """A rule that stays far away for 20 steps, and then jumps from one side of 0 to the other."""

    def step(self, q_params, gradient, state):
        after = RowState(state.exp_avg, state.exp_avg_sq, state.steps + 1)
        t = after.steps[0].item()
        return torch.full_like(q_params, 10.0 if t <= 20 else (-1.0) ** t), after


def test_rows_that_swing_end_at_their_mean_since_the_last_mark():
    found = refine(distance, torch.full((2, 1), 3.0), 50, rule=Swing(), check=distance)
    assert (found.q_params == 0).all()
    assert (found.value == 0).all()
    assert found.check_steps == (0, 1, 2, 5, 10, 20, 50)
    assert found.curve[:, 0].tolist() == [-3.0, *[-10.0] * 5, -1.0]


def test_a_refinement_that_only_harms_gives_back_the_start():
    start = torch.randn(3, 2, generator=torch.Generator().manual_seed(6))
    found = refine(lambda q_params: -quadratic(q_params), start, 40, check=quadratic)
    assert torch.equal(found.q_params, start)
    assert (found.optimization_gap == 0).all()
    assert (found.curve[1:] < found.curve[0]).all()
