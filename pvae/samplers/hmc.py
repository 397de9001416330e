r"""Hamiltonian Monte Carlo (HMC), batched over chains and datapoints.

A density maps positions u [C, B, D] of C chains for each of B datapoints to log f(u) [C, B], or to the tuple of its
parts, :math:`\log f = \sum_p \beta_p \log f_p`, whose inverse temperatures a sampler changes as it goes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from pvae.errors import AllChainsDiverged, check_range
from pvae.runtime.torch_state import seeded
from pvae.runtime.tracing import AutoTraced

Density = Callable[[Tensor], Tensor | tuple[Tensor, ...]]
Progress = Callable[[float], None]

# Acceptance rate that step sizes aim at: optimal in high dimensions (Beskos et al. 2013, arXiv:1001.4460).
TARGET_ACCEPT = 0.65
# Energy error, in nats, beyond which a trajectory counts as divergent.
DIVERGENCE = 1000.0
# Shares of a warm-up at whose ends the scale is estimated anew, from the positions since the previous end.
WINDOWS = (0.1, 0.25, 0.5, 0.85)


class HMCState(NamedTuple):
    """Positions of the chains, with the density's values and gradients there.

    Attributes:
        position: u, [C, B, D].
        values: log f_p of each part, [P, C, B] in nats.
        gradients: of log f_p in u, [P, C, B, D].
        inverse_temperatures: beta_p of each part, [P].
    """

    position: Tensor
    values: Tensor
    gradients: Tensor
    inverse_temperatures: Tensor

    @property
    def log_p(self) -> Tensor:
        """Return log f, [C, B] in nats."""
        return _mix(self.inverse_temperatures.view(-1, 1, 1), self.values)

    @property
    def gradient(self) -> Tensor:
        """Return the gradient of log f, [C, B, D]."""
        return _mix(self.inverse_temperatures.view(-1, 1, 1, 1), self.gradients)


class HMCInfo(NamedTuple):
    """Outcome of a transition: the new state, each chain's acceptance probability and divergence flag, [C, B]."""

    state: HMCState
    acceptance_rate: Tensor
    is_divergent: Tensor


@dataclass(frozen=True)
class Chains:
    """Draws of C chains for each of B datapoints, with statistics of the sampler after its warm-up.

    Attributes:
        draws: u, [C, T, B, D]; NaN for a datapoint of which every trajectory diverged.
        acceptance_rate: mean acceptance probability, [B].
        step_size: step size adapted in the warm-up, [B], in units of ``scale``.
        scale: standard deviations that set the mass matrix, [B, D].
        divergence_rate: share of divergent trajectories, [B].
    """

    draws: Tensor
    acceptance_rate: Tensor
    step_size: Tensor
    scale: Tensor
    divergence_rate: Tensor


def _mix(inverse_temperatures: Tensor, parts: Tensor) -> Tensor:
    # A part with inverse temperature 0 is left out, infinite or not.
    return torch.where(inverse_temperatures == 0, 0.0, inverse_temperatures * parts).sum(0)


class ValueAndGrad(AutoTraced):
    """Values [P, C, B] of a log-density's parts and their gradients [P, C, B, D]; traced after repeated calls."""

    def __init__(self, density: Density) -> None:
        super().__init__(self._value_and_grad)
        self.density = density

    def _value_and_grad(self, u: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            u = u.detach().requires_grad_()
            log_f = self.density(u)
            parts = log_f if isinstance(log_f, tuple) else (log_f,)
            gradients = [
                torch.autograd.grad(part.sum(), u, retain_graph=True, materialize_grads=True)[0]
                if part.requires_grad
                else torch.zeros_like(u)
                for part in parts
            ]
        return torch.stack(parts).detach(), torch.stack(gradients)


def init(density: Density | ValueAndGrad, u: Tensor, inverse_temperatures: Tensor | None = None) -> HMCState:
    """Return the state of chains at u [C, B, D]; the inverse temperatures [P] of the parts are 1 by default."""
    values, gradients = (density if isinstance(density, ValueAndGrad) else ValueAndGrad(density))(u)
    betas = values.new_ones(len(values)) if inverse_temperatures is None else inverse_temperatures
    return HMCState(u.detach(), values, gradients, betas)


def transition(
    density: Density | ValueAndGrad,
    state: HMCState,
    step_size: Tensor,
    *,
    num_integration_steps: int = 10,
    scale: Tensor | None = None,
    jitter: float = 0.2,
) -> HMCInfo:
    r"""Make one HMC transition of every chain: a leapfrog trajectory and its Metropolis step; f stays invariant.

    Arguments:
        density: log f; a transition costs one gradient of it per integration step.
        step_size: step size of each datapoint [B], in units of ``scale``.
        num_integration_steps: L, leapfrog steps of one trajectory.
        scale: standard deviations [B, D]; momenta are standard normal for u / scale. 1 by default.
        jitter: each transition draws its L from ``L -+ jitter * (L - 1)``, so that no chain goes in circles. A
            jittered step size would cross the largest stable one.

    Source: Neal (2011), *MCMC Using Hamiltonian Dynamics*, arXiv:1206.1901.
    """
    size = step_size.unsqueeze(-1) if scale is None else step_size.unsqueeze(-1) * scale
    momentum = torch.randn_like(state.position)
    energy, end = state.log_p - _kinetic(momentum), state
    momentum = momentum + size / 2 * end.gradient
    most = round(jitter * (num_integration_steps - 1))
    count = num_integration_steps + (int(torch.randint(-most, most + 1, ())) if most else 0)
    for left in reversed(range(count)):
        end = init(density, end.position + size * momentum, state.inverse_temperatures)
        momentum = momentum + (size if left else size / 2) * end.gradient
    log_ratio = end.log_p - _kinetic(momentum) - energy
    log_ratio = torch.where(log_ratio.isnan(), -torch.inf, log_ratio)
    accepted = torch.rand_like(log_ratio).log() < log_ratio
    return HMCInfo(_choose(accepted, end, state), log_ratio.clamp(max=0.0).exp(), ~(log_ratio > -DIVERGENCE))


def _choose(accepted: Tensor, new: HMCState, old: HMCState) -> HMCState:
    rows = accepted.unsqueeze(-1)
    position, gradients = new.position.where(rows, old.position), new.gradients.where(rows, old.gradients)
    return HMCState(position, new.values.where(accepted, old.values), gradients, old.inverse_temperatures)


def _kinetic(momentum: Tensor) -> Tensor:
    return (momentum**2).sum(-1) / 2


class DualAveraging:
    r"""Step sizes by dual averaging, one for each datapoint [B], toward a mean acceptance of :data:`TARGET_ACCEPT`.

    Attributes:
        step_size: step sizes to try next, [B]; given the initial ones.
        step_size_avg: weighted average of past step sizes, to which they converge, [B].

    Source: Hoffman and Gelman (2014), *The No-U-Turn Sampler*, arXiv:1111.4246, with gamma = 0.2 instead of 0.05,
    since acceptance is a mean over chains and the initial step size is a good guess.

    >>> adaptation = DualAveraging(torch.ones(2))
    >>> for _ in range(2000): adaptation.update((-adaptation.step_size).exp())
    >>> bool(((-adaptation.step_size_avg).exp() - TARGET_ACCEPT).abs().max() < 0.01)
    True
    """

    def __init__(self, step_size: Tensor) -> None:
        self.mu = self.log_step_size = self.log_step_size_avg = step_size.log()
        self.count, self.avg_error = 0, torch.zeros_like(step_size)

    @property
    def step_size(self) -> Tensor:
        return self.log_step_size.exp()

    @property
    def step_size_avg(self) -> Tensor:
        return self.log_step_size_avg.exp()

    def update(self, acceptance_rate: Tensor) -> None:
        """Update the step sizes by the acceptance rates [B] that ``step_size`` has given."""
        self.count += 1
        rate, weight = 1 / (self.count + 10), self.count**-0.75
        self.avg_error = (1 - rate) * self.avg_error + rate * (TARGET_ACCEPT - acceptance_rate)
        self.log_step_size = self.mu - self.count**0.5 / 0.2 * self.avg_error
        self.log_step_size_avg = weight * self.log_step_size + (1 - weight) * self.log_step_size_avg


def initial_step_size(density: Density | ValueAndGrad, state: HMCState, scale: Tensor) -> Tensor:
    """Return initial step sizes [B]: 1, halved until single leapfrog steps are accepted more often than not.

    >>> def normal(u): return -(u**2).sum(-1) / 2
    >>> initial_step_size(normal, init(normal, torch.zeros(1000, 1, 1)), torch.full((1, 1), 64.0))
    tensor([0.0156])
    """
    step_size = torch.ones_like(state.position[0, :, 0])
    for _ in range(30):  # down to 1e-9
        info = transition(density, state, step_size, num_integration_steps=1, scale=scale)
        rejected = info.acceptance_rate.mean(0) < 0.5
        if not rejected.any():
            break
        step_size = torch.where(rejected, step_size / 2, step_size)
    return step_size


class _PooledVariance:
    """Variance [B, D] of positions, pooled over chains and transitions."""

    def __init__(self, centre: Tensor) -> None:
        self.centre = centre
        self.count, self.total, self.square = 0, torch.zeros_like(centre), torch.zeros_like(centre)

    def update(self, position: Tensor) -> None:
        deviation = position - self.centre
        self.count += len(deviation)
        self.total, self.square = self.total + deviation.sum(0), self.square + (deviation**2).sum(0)

    def shrunk_sd(self, prior: Tensor) -> Tensor:
        """Return standard deviations, shrunk toward prior ones by the weight of 5 positions."""
        variance = self.square / self.count - (self.total / self.count) ** 2
        return ((self.count * variance.clamp(min=0) + 5 * prior**2) / (self.count + 5)).sqrt()


def sample(
    density: Density,
    u: Tensor,
    *,
    draws: int = 1000,
    warm_up: int = 500,
    num_integration_steps: int = 10,
    thin: int = 1,
    scale: Tensor | None = None,
    seed: int = 0,
    progress: Progress = lambda share: None,
) -> Chains:
    """Run HMC chains from u [C, B, D]: a warm-up that adapts step sizes and scales for each datapoint, then draws.

    Arguments:
        density: log f, with gradients.
        u: initial positions, best overdispersed.
        draws: T, kept for each chain, one in every ``thin`` transitions.
        warm_up: transitions that are discarded; from 200 on the scale is estimated well.
        num_integration_steps: L, leapfrog steps of a transition on average: their number varies from 1 to 2 L - 1,
            since chains that go for half a period each time only mirror their position.
        scale: an initial guess of f's standard deviations, [B, D]; 1 by default.
        seed: of all noise; the random stream outside is left alone.
        progress: called with the share of the transitions made.

    Raises:
        UserError: a count below 1, or trajectories that diverge for every datapoint, however small their steps.
    """
    check_range(least=1, draws=draws, warm_up=warm_up, thin=thin, chains=len(u))
    check_range(least=1, num_integration_steps=num_integration_steps)
    total = warm_up + draws * thin
    accepted = diverged = torch.zeros_like(u[0, :, 0])
    with seeded(seed):
        density = ValueAndGrad(density)
        kernel = partial(transition, density, num_integration_steps=num_integration_steps, jitter=1.0)
        state, scale = init(density, u), torch.ones_like(u[0]) if scale is None else scale
        size = initial_step_size(density, state, scale)
        state, size, scale = _warm_up(kernel, state, size, scale, warm_up, lambda done: progress(done / total))
        positions = []
        for done in range(1, draws * thin + 1):
            state, acceptance_rate, is_divergent = kernel(state, size, scale=scale)
            accepted, diverged = accepted + acceptance_rate.mean(0), diverged + is_divergent.to(size).mean(0)
            if done % thin == 0:
                positions.append(state.position)
            progress((warm_up + done) / total)
    accepted, diverged = accepted / (draws * thin), diverged / (draws * thin)
    lost = refuse_if_all_diverge(diverged).view(-1, 1)
    return Chains(torch.where(lost, torch.nan, torch.stack(positions, 1)), accepted, size, scale, diverged)


def _warm_up(
    kernel: Callable[..., HMCInfo], state: HMCState, size: Tensor, scale: Tensor, steps: int, progress: Progress
) -> tuple[HMCState, Tensor, Tensor]:
    """Return the chains after their warm-up, the adapted step sizes [B] and scales [B, D]."""
    adaptation, variance = DualAveraging(size), _PooledVariance(state.position.mean(0))
    ends = {round(share * steps) for share in WINDOWS}
    for done in range(1, steps + 1):
        state, acceptance_rate, _ = kernel(state, adaptation.step_size, scale=scale)
        adaptation.update(acceptance_rate.mean(0))
        variance.update(state.position)
        if done in ends:
            scale, variance = variance.shrunk_sd(scale), _PooledVariance(state.position.mean(0))
            adaptation = DualAveraging(adaptation.step_size_avg)
        progress(done)
    return state, adaptation.step_size_avg, scale


def refuse_if_all_diverge(divergence_rate: Tensor) -> Tensor:
    """Return a mask [B] of datapoints whose trajectories all diverged; raise if these are all datapoints."""
    lost = divergence_rate == 1
    if lost.all():
        raise AllChainsDiverged
    return lost
