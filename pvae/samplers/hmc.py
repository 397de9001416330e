r"""Hamiltonian Monte Carlo, batched over chains and datapoints: a density in, draws out; nothing here knows of models.

A density takes positions u [C, B, D] of C chains for each of B datapoints to log f(u) [C, B], each value a chain's own.
It may be a sum of parts, :math:`\log f = \sum_p \alpha_p \log f_p`, whose powers a sampler changes as it goes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pvae.errors import AllChainsDiverged, UserError
from pvae.runtime.torch_state import seeded
from pvae.runtime.tracing import AutoTraced

Density = Callable[[Tensor], Tensor | tuple[Tensor, ...]]

# The share of accepted proposals that step sizes aim at: optimal in high dimensions (Beskos et al. 2013, 1001.4460).
TARGET_ACCEPT = 0.65
# An energy error, in nats, beyond which a trajectory has left the level set it should follow.
DIVERGENCE = 1000.0
# How often a first step is halved before it is given up: down to 1e-9.
HALVINGS = 30


class HMCState(NamedTuple):
    """Where chains stand, and all that is known of the density there.

    Attributes:
        position: u, [C, B, D].
        values: log f of each part, [P, C, B] in nats.
        gradients: of each part, [P, C, B, D].
        powers: of each part, [P].
    """

    position: Tensor
    values: Tensor
    gradients: Tensor
    powers: Tensor

    @property
    def log_p(self) -> Tensor:
        """log f, [C, B]."""
        return _mix(self.powers.view(-1, 1, 1), self.values)

    @property
    def gradient(self) -> Tensor:
        """Of log f, [C, B, D]."""
        return _mix(self.powers.view(-1, 1, 1, 1), self.gradients)


class HMCInfo(NamedTuple):
    """A transition's outcome: the new state; each chain's acceptance probability and whether it diverged, [C, B]."""

    state: HMCState
    acceptance: Tensor
    divergent: Tensor


@dataclass(frozen=True)
class Chains:
    """Draws of C chains for each of B datapoints, and how the sampler fared after its warm-up.

    Attributes:
        draws: u, [C, T, B, D]; NaN for a datapoint of which every trajectory diverged.
        acceptance: mean acceptance probability, [B].
        step: the step size that the warm-up found, [B], in units of ``scale``.
        scale: standard deviations by which steps are measured, [B, D].
        divergent: share of trajectories that diverged, [B].
    """

    draws: Tensor
    acceptance: Tensor
    step: Tensor
    scale: Tensor
    divergent: Tensor


def _mix(powers: Tensor, parts: Tensor) -> Tensor:
    # A part with power 0 is left out, infinite or not.
    return torch.where(powers == 0, 0.0, powers * parts).sum(0)


def at_least_one(**counts: int) -> None:
    """Refuse a count below 1, by name.

    >>> at_least_one(chains=4)
    """
    for name, value in counts.items():
        if value < 1:
            raise UserError(f"{name} is {value}, but it must be at least 1")


class ValueAndGrad:
    """A density with its gradient, which is recorded once it was asked for again and again.

    Arguments:
        density: positions u [C, B, D] to log f [C, B], or to its parts.

    Calling it gives the values of the parts [P, C, B] and their gradients [P, C, B, D].
    """

    def __init__(self, density: Density) -> None:
        self.density, self._repeated = density, AutoTraced(self._graded)

    def __call__(self, u: Tensor) -> tuple[Tensor, Tensor]:
        values, gradients = self._repeated(u)
        return values, gradients

    def _graded(self, u: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            u = u.detach().requires_grad_()
            found = self.density(u)
            parts = found if isinstance(found, tuple) else (found,)
            gradients = [
                torch.autograd.grad(part.sum(), u, retain_graph=True, materialize_grads=True)[0]
                if part.requires_grad
                else torch.zeros_like(u)
                for part in parts
            ]
        return torch.stack(parts).detach(), torch.stack(gradients)


def init(density: Density | ValueAndGrad, u: Tensor, powers: Tensor | None = None) -> HMCState:
    """The state of chains at u [C, B, D]; the powers [P] of the density's parts are 1 unless given."""
    graded = density if isinstance(density, ValueAndGrad) else ValueAndGrad(density)
    values, gradients = graded(u)
    return HMCState(u.detach(), values, gradients, values.new_ones(len(values)) if powers is None else powers)


def transition(
    density: Density | ValueAndGrad,
    state: HMCState,
    step: Tensor,
    *,
    leapfrogs: int = 10,
    scale: Tensor | None = None,
    jitter: float = 0.2,
) -> HMCInfo:
    r"""One trajectory of leapfrogs for every chain, accepted or rejected each by itself; f stays invariant.

    Arguments:
        density: log f, with gradients.
        state: where the chains stand; a transition costs one gradient of the density a leapfrog.
        step: step size of each datapoint [B], in units of ``scale``.
        leapfrogs: of one trajectory.
        scale: standard deviations [B, D]; momenta are standard normal for u / scale. 1 unless given.
        jitter: a trajectory's number of leapfrogs is drawn from ``leapfrogs -+ jitter * (leapfrogs - 1)``, so that no
            chain goes in circles. Were it the step that varies, it would cross the largest that is stable.

    Source: Neal (2011), *MCMC Using Hamiltonian Dynamics*, arXiv:1206.1901.
    """
    size = step.unsqueeze(-1) if scale is None else step.unsqueeze(-1) * scale
    momentum = torch.randn_like(state.position)
    energy, end = state.log_p - _kinetic(momentum), state
    momentum = momentum + size / 2 * end.gradient
    for left in reversed(range(_about(leapfrogs, jitter))):
        end = init(density, end.position + size * momentum, state.powers)
        momentum = momentum + (size if left else size / 2) * end.gradient
    gain = end.log_p - _kinetic(momentum) - energy
    gain = torch.where(gain.isnan(), -torch.inf, gain)
    accepted = torch.rand_like(gain).log() < gain
    return HMCInfo(_choose(accepted, end, state), gain.clamp(max=0.0).exp(), ~(gain > -DIVERGENCE))


def _about(count: int, jitter: float) -> int:
    most = round(jitter * (count - 1))
    return count + int(torch.randint(-most, most + 1, ())) if most else count


def _kinetic(momentum: Tensor) -> Tensor:
    return (momentum**2).sum(-1) / 2


def _choose(accepted: Tensor, new: HMCState, old: HMCState) -> HMCState:
    rows = accepted.unsqueeze(-1)
    return HMCState(
        torch.where(rows, new.position, old.position),
        torch.where(accepted, new.values, old.values),
        torch.where(rows, new.gradients, old.gradients),
        old.powers,
    )


class StepSize:
    r"""Step sizes by dual averaging: each datapoint's own [B], toward a mean acceptance of :data:`TARGET_ACCEPT`.

    Arguments:
        step: where to start, [B].

    Attributes:
        step: the size to try next, [B].
        settled: the average of past sizes to which they converge, [B].

    Source: Hoffman and Gelman (2014), *The No-U-Turn Sampler*, arXiv:1111.4246, with
    gamma = 0.2 instead of 0.05, since acceptance is a mean over chains and steps need not be found from one.

    >>> size = StepSize(torch.ones(2))
    >>> for _ in range(2000): size.learn((-size.step).exp())
    >>> bool(((-size.settled).exp() - TARGET_ACCEPT).abs().max() < 0.01)
    True
    """

    def __init__(self, step: Tensor) -> None:
        self.centre = self.log_step = self.mean = step.log()
        self.count, self.error = 0, torch.zeros_like(step)

    @property
    def step(self) -> Tensor:
        return self.log_step.exp()

    @property
    def settled(self) -> Tensor:
        return self.mean.exp()

    def learn(self, acceptance: Tensor) -> None:
        """Take the mean acceptance [B] over the chains at ``step`` into account."""
        self.count += 1
        rate, weight = 1 / (self.count + 10), self.count**-0.75
        self.error = (1 - rate) * self.error + rate * (TARGET_ACCEPT - acceptance)
        self.log_step = self.centre - self.count**0.5 / 0.2 * self.error
        self.mean = weight * self.log_step + (1 - weight) * self.mean


def initial_step_size(density: Density | ValueAndGrad, state: HMCState, scale: Tensor) -> Tensor:
    """Step sizes [B] to begin with: 1, halved until single leapfrogs are accepted more often than not.

    >>> def normal(u): return -(u**2).sum(-1) / 2
    >>> initial_step_size(normal, init(normal, torch.zeros(50, 1, 1)), torch.full((1, 1), 64.0))
    tensor([0.0156])
    """
    step = torch.ones_like(state.position[0, :, 0])
    for _ in range(HALVINGS):
        rare = transition(density, state, step, leapfrogs=1, scale=scale).acceptance.mean(0) < 0.5
        if not rare.any():
            break
        step = torch.where(rare, step / 2, step)
    return step


class _Spread:
    """Pooled variance [B, D] of positions seen over chains and time."""

    def __init__(self, centre: Tensor) -> None:
        self.centre = centre
        self.count, self.total, self.square = 0, torch.zeros_like(centre), torch.zeros_like(centre)

    def see(self, position: Tensor) -> None:
        apart = position - self.centre
        self.count += len(apart)
        self.total, self.square = self.total + apart.sum(0), self.square + (apart**2).sum(0)

    def scale(self, before: Tensor) -> Tensor:
        """Standard deviations, drawn toward those before by the weight of 5 positions."""
        variance = self.square / self.count - (self.total / self.count) ** 2
        return ((self.count * variance.clamp(min=0) + 5 * before**2) / (self.count + 5)).sqrt()


# Shares of a warm-up at whose ends the scale is learned anew, from the positions since the one before.
WINDOWS = (0.1, 0.25, 0.5, 0.85)


def sample(
    density: Density,
    u: Tensor,
    *,
    draws: int = 1000,
    warm_up: int = 500,
    leapfrogs: int = 10,
    thin: int = 1,
    scale: Tensor | None = None,
    seed: int = 0,
    progress: Callable[[float], None] = lambda share: None,
) -> Chains:
    """Run chains from u [C, B, D]: a warm-up that learns step sizes and scales for each datapoint, then draws.

    Arguments:
        density: log f, with gradients.
        u: where the chains start, best spread wider than f.
        draws: T, kept for each chain, one in every ``thin`` transitions.
        warm_up: transitions that are thrown away; from 200 on the scale is learned well.
        leapfrogs: of a transition, on average: their number varies from 1 to twice that, since chains that go for
            half a period each time mirror their position and never learn of its size.
        scale: a first guess of f's standard deviations, [B, D]; 1 unless given.
        seed: of all noise; the random stream outside is left alone.
        progress: called with the share of the transitions made.

    Raises:
        UserError: a count below 1, or trajectories that diverge for every datapoint, however small their steps.
    """
    at_least_one(draws=draws, warm_up=warm_up, leapfrogs=leapfrogs, thin=thin, chains=len(u))
    total = warm_up + draws * thin
    with seeded(seed):
        graded = ValueAndGrad(density)
        state, size, scale = _warmed(graded, u, warm_up, leapfrogs, scale, lambda done: progress(done / total))
        kept, acceptance, divergent = [], torch.zeros_like(size), torch.zeros_like(size)
        for done in range(1, draws * thin + 1):
            state, accepted, diverged = transition(graded, state, size, leapfrogs=leapfrogs, scale=scale, jitter=1.0)
            acceptance, divergent = acceptance + accepted.mean(0), divergent + diverged.to(size).mean(0)
            if done % thin == 0:
                kept.append(state.position)
            progress((warm_up + done) / total)
    acceptance, divergent = acceptance / (draws * thin), divergent / (draws * thin)
    lost = refuse_if_all_diverge(divergent)
    return Chains(_without(torch.stack(kept, 1), lost), acceptance, size, scale, divergent)


def _warmed(
    density: ValueAndGrad, u: Tensor, steps: int, leapfrogs: int, scale: Tensor | None, progress: Callable[[int], None]
) -> tuple[HMCState, Tensor, Tensor]:
    """Chains after their warm-up, the step sizes [B] and the scales [B, D] that they found."""
    state, scale = init(density, u), torch.ones_like(u[0]) if scale is None else scale
    size, spread = StepSize(initial_step_size(density, state, scale)), _Spread(u.mean(0))
    ends = {round(share * steps) for share in WINDOWS}
    for done in range(1, steps + 1):
        state, accepted, _ = transition(density, state, size.step, leapfrogs=leapfrogs, scale=scale, jitter=1.0)
        size.learn(accepted.mean(0))
        spread.see(state.position)
        if done in ends:
            scale, spread = spread.scale(scale), _Spread(state.position.mean(0))
            size = StepSize(size.settled)
        progress(done)
    return state, size.settled, scale


def refuse_if_all_diverge(divergent: Tensor) -> Tensor:
    """The datapoints [B] of which every trajectory diverged; if these are all, there is no number to give."""
    lost = divergent == 1
    if lost.all():
        raise AllChainsDiverged
    return lost


def _without(draws: Tensor, lost: Tensor) -> Tensor:
    return torch.where(lost.view(-1, 1), torch.nan, draws)
