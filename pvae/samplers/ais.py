r"""Annealed importance sampling: the evidence of each datapoint along a path from a start that is known, by HMC.

Forward chains give a lower bound of log p(x) in expectation; chains that start from exact posterior draws and go the
path backward give an upper bound, on data simulated from the model, where such draws are at hand.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from pvae.errors import UserError, nearest
from pvae.inference.families import Family
from pvae.inference.guides import Guide
from pvae.runtime.pyro_params import Program
from pvae.runtime.torch_state import halve_on_oom, seeded
from pvae.samplers import hmc
from pvae.samplers.hmc import TARGET_ACCEPT, HMCState, ValueAndGrad, at_least_one, refuse_if_all_diverge
from pvae.samplers.log_joint import LogJoint, simulate_joint
from pvae.stats import effective_sample_size, log_mean_exp, log_mean_exp_se

# Datapoints times chains that move together, by whether the device is a CPU: there they should stay near its cache.
ROWS_PER_PASS = {True: 2048, False: 65536}

Schedule = Literal["linear", "sigmoid", "geometric"]

# Of the sigmoid's argument, at either end; and the first temperature of the geometric schedule.
DELTA, FIRST = 4.0, 1e-4
# The pilot has a chain for every FEWER of the run's, at least 2; SETTLE transitions at its first temperature find the
# step sizes from scratch, and SPREAD draws of the start its standard deviations. It makes one more transition at each
# temperature, several on a short path, LEAST in all; what it found is kept at KEPT places.
FEWER, SETTLE, SPREAD, LEAST, KEPT = 4, 20, 64, 50, 100


@dataclass(frozen=True)
class AISEstimate:
    r"""Log-weights of C chains for each of B datapoints, and how their sampler fared.

    Attributes:
        log_w: [C, B] in nats; weights average to p(x), those of reverse chains to 1 / p(x). -inf is a weight of 0,
            NaN stands where every trajectory of a datapoint diverged.
        position: where the chains ended, [C, B, D].
        acceptance: mean acceptance probability over the path, [B]; NaN for a single temperature, which has no moves.
        divergent: share of trajectories that diverged, [B]; likewise. They are rejected, which biases no weight.
        reverse: the chains came from the posterior.
    """

    log_w: Tensor
    position: Tensor
    acceptance: Tensor
    divergent: Tensor
    reverse: bool = False

    @property
    def evidence(self) -> Tensor:
        r"""log p(x), [B]: :math:`\log \frac1C \sum_c w_c`, below it in expectation; above it for reverse chains."""
        return -log_mean_exp(self.log_w) if self.reverse else log_mean_exp(self.log_w)

    @property
    def evidence_se(self) -> Tensor:
        """Its Monte Carlo error, [B], by the delta method over chains."""
        return log_mean_exp_se(self.log_w)

    @property
    def ess(self) -> Tensor:
        """How many of the C chains count, [B]."""
        return effective_sample_size(self.log_w)


@dataclass(frozen=True)
class SandwichBounds:
    """Bounds of the evidence of B rows simulated from the model, with their Monte Carlo errors, [B] each in nats.

    The evidence lies between ``lower`` and ``upper`` in expectation: where they meet, either is the evidence.
    """

    x: Tensor
    forward: AISEstimate
    backward: AISEstimate

    @property
    def lower(self) -> Tensor:
        """By forward chains, [B]."""
        return self.forward.evidence

    @property
    def upper(self) -> Tensor:
        """By reverse chains, [B]."""
        return self.backward.evidence

    @property
    def width(self) -> Tensor:
        """Between the bounds, [B]."""
        return self.upper - self.lower

    def interval(self, errors: float = 2.0) -> tuple[float, float]:
        """Where the rows' mean evidence lies: the bounds' means, widened by so many of their Monte Carlo errors."""
        low, high = (
            (a.evidence.double().mean(), (a.evidence_se.double() ** 2).sum().sqrt() / len(self.x))
            for a in (self.forward, self.backward)
        )
        return (low[0] - errors * low[1]).item(), (high[0] + errors * high[1]).item()


def inverse_temperatures(name: str, temperatures: int) -> Tensor:
    r"""The T + 1 inverse temperatures :math:`0 = \beta_0 < \dots < \beta_T = 1` in float64, with s = t / T.

    * ``linear``: :math:`\beta = s`.
    * ``sigmoid``: :math:`\sigma(4 (2 s - 1))`, shifted and stretched to end at 0 and 1 (Grosse et al. 2015).
    * ``geometric``: 0, then from :math:`10^{-4}` to 1 by a constant factor.

    Raises:
        UserError: no such schedule, or temperatures below 1.

    >>> inverse_temperatures("linear", 4).tolist()
    [0.0, 0.25, 0.5, 0.75, 1.0]
    """
    at_least_one(temperatures=temperatures)
    if name not in get_args(Schedule):
        raise UserError(f"unknown schedule '{name}'{nearest(name, get_args(Schedule))}")
    s = torch.linspace(0, 1, temperatures + 1, dtype=torch.double)
    if name == "sigmoid":
        s = (DELTA * (2 * s - 1)).sigmoid()
        return (s - s[0]) / (s[-1] - s[0])
    if name == "geometric":
        return torch.cat([s[:1], FIRST ** ((1 - s[1:]) * temperatures / max(1, temperatures - 1))])
    return s


class _Path(NamedTuple):
    r"""Densities from a normalized start to p(x, u): :math:`\log f_\beta = \sum_p \alpha_p(\beta) \log f_p`.

    Attributes:
        draw: a number of chains to draws of the start, [C, B, D].
        parts: u to the log f_p.
        powers: beta to the alpha_p.
    """

    draw: Callable[[int], Tensor]
    parts: ValueAndGrad
    powers: Callable[[float], tuple[float, float]]


def _from_prior(target: LogJoint) -> _Path:
    return _Path(target.prior, ValueAndGrad(target.parts), lambda beta: (beta, 1.0))


def _from_guide(target: LogJoint, family: Family, q_params: Tensor) -> _Path:
    if family.point_mass:
        raise UserError(f"{type(family).__name__} is a point mass: a path can't start there; start from the prior")
    q = family(q_params.detach())
    return _Path(
        lambda chains: q.sample((chains,)),
        ValueAndGrad(lambda u: (target(u), q.log_prob(u))),
        lambda beta: (beta, 1.0 - beta),
    )


def anneal(
    target: LogJoint,
    family: Family | None = None,
    q_params: Tensor | None = None,
    *,
    chains: int = 16,
    temperatures: int = 500,
    schedule: str = "sigmoid",
    leapfrogs: int = 5,
    start_from: Tensor | None = None,
    seed: int = 0,
    progress: Callable[[float], None] = lambda share: None,
) -> AISEstimate:
    r"""Log-weights of annealed importance sampling, whose mean over chains is an unbiased estimate of p(x).

    .. math:: \log w = \sum_{t=1}^T \log f_{\beta_t}(u_{t-1}) - \log f_{\beta_{t-1}}(u_{t-1}),
        \qquad f_\beta = q^{1 - \beta}\, p(x, u)^\beta

    Arguments:
        target: p(x, u) of the rows.
        family, q_params: q = family(q_params) with q_params [B, P]; the prior of the program unless given.
        chains: C, for each datapoint.
        temperatures: T.
        schedule: of beta, see `inverse_temperatures`.
        leapfrogs: of the one HMC transition at each temperature.
        start_from: exact posterior draws u [B, D] of the rows. All chains of a row start there and go the path from
            1 to 0; each weight then has mean 1 / p(x), whatever the chains share.
        seed: of all noise; the random stream outside is left alone.
        progress: called with the share of the work done.

    Rows go in pieces, which are halved where the device has no memory for them.

    Returns:
        Log-weights. Step sizes and scales come from a pilot run of a quarter of the chains (at least 2), which goes
        before and costs as much, and stay fixed in the run: adapting them on the way would bias the weights.

    Raises:
        UserError: a count below 1, an unknown schedule, a point mass to start from, or HMC that diverges everywhere.

    Source: Neal (2001), *Annealed Importance Sampling*, arXiv:physics/9803008; Wu, Burda, Salakhutdinov, Grosse
    (2017), *On the Quantitative Analysis of Decoder-Based Generative Models*, arXiv:1611.04273.
    """
    at_least_one(temperatures=temperatures, chains=chains, leapfrogs=leapfrogs)
    plan = _Config(chains, temperatures, schedule, leapfrogs, start_from is not None)
    rows = len(target.x)

    def some(part: slice) -> AISEstimate:
        own = target.rows(part)
        path = _from_prior(own) if family is None or q_params is None else _from_guide(own, family, q_params[part])
        begin = None if start_from is None else start_from[part]
        return _anneal_rows(plan, path, begin, _within(progress, part.start / rows, part.stop / rows))

    size = max(1, ROWS_PER_PASS[target.x.device.type == "cpu"] // chains)
    with seeded(seed):
        parts = list(halve_on_oom(some, rows, size, "rows of annealed chains"))
    log_w, position = (torch.cat([getattr(p, name) for p in parts], 1) for name in ("log_w", "position"))
    acceptance, divergent = (torch.cat([getattr(p, name) for p in parts]) for name in ("acceptance", "divergent"))
    lost = refuse_if_all_diverge(divergent)
    return AISEstimate(torch.where(lost, torch.nan, log_w), position, acceptance, divergent, plan.reverse)


def sandwich(
    model: Program,
    like: Tensor,
    guide: Guide | None = None,
    *,
    chains: int = 16,
    temperatures: int = 500,
    schedule: str = "sigmoid",
    leapfrogs: int = 5,
    seed: int = 0,
    progress: Callable[[float], None] = lambda share: None,
) -> SandwichBounds:
    """Bidirectional Monte Carlo: the evidence of simulated rows between a lower and an upper bound.

    Arguments:
        model: a Pyro program.
        like: rows [B, ...]; as many of their shape are simulated.
        guide: start from its posterior; from the program's prior unless given.
        chains, temperatures, schedule, leapfrogs: of either direction, see `anneal`.
        seed: of the rows and of all noise.
        progress: called with the share of the work done.

    How close the bounds come on simulated rows tells how far the lower bound may be trusted on real rows; it bounds
    nothing there.

    Source: Grosse, Ghahramani, Adams (2015), *Sandwiching the marginal likelihood using bidirectional Monte Carlo*,
    arXiv:1511.02543.
    """
    u, x = simulate_joint(model, like, guide.sites if guide else None, seed=seed)
    target = LogJoint(model, x, None, guide.sites if guide else None)
    family = guide.family if guide else None
    with seeded(seed + 1), torch.no_grad():
        q_params = guide.params(x) if guide else None
    forward, backward = (
        anneal(
            target,
            family,
            q_params,
            chains=chains,
            temperatures=temperatures,
            schedule=schedule,
            leapfrogs=leapfrogs,
            start_from=begin,
            seed=seed + 2 + way,
            progress=_within(progress, way / 2, (way + 1) / 2),
        )
        for way, begin in enumerate((None, u))
    )
    return SandwichBounds(x, forward, backward)


def _within(progress: Callable[[float], None], begin: float, end: float) -> Callable[[float], None]:
    """Progress of a part of the work that lies between these shares of the whole."""
    return lambda share: progress(begin + (end - begin) * share)


class _Config(NamedTuple):
    chains: int
    temperatures: int
    schedule: str
    leapfrogs: int
    reverse: bool

    @property
    def pilot(self) -> _Config:
        return self._replace(chains=max(2, self.chains // FEWER), reverse=False)

    def betas(self) -> list[float]:
        """In the order of the chains' way."""
        betas = inverse_temperatures(self.schedule, self.temperatures).tolist()
        return betas[::-1] if self.reverse else betas


class _StepSizes(NamedTuple):
    """Logarithms of step sizes [S, B] and of scales [S, B, D], at every so many temperatures of the way."""

    log_step: Tensor
    log_scale: Tensor
    every: int

    def at(self, t: int) -> tuple[Tensor, Tensor]:
        """Step size [B] and scale [B, D] after t changes of temperature."""
        place = min(t / self.every, len(self.log_step) - 1)
        low = min(int(place), len(self.log_step) - 2)
        step, scale = (torch.lerp(own[low], own[low + 1], place - low).exp() for own in self[:2])
        return step, scale


def _anneal_rows(plan: _Config, path: _Path, begin: Tensor | None, progress: Callable[[float], None]) -> AISEstimate:
    betas = plan.betas()
    ahead = plan.pilot.chains / (plan.pilot.chains + plan.chains)
    tuning = _pilot(plan.pilot, path, _within(progress, 0.0, ahead))
    state = _init_chains(plan, path, begin)
    if plan.reverse:
        state = _decorrelate(plan, path, state, tuning)
    log_w = torch.zeros_like(state.log_p)
    acceptance: list[Tensor] = []
    divergent: list[Tensor] = []
    for t in range(1, plan.temperatures + 1):
        log_w, state = _reweight(path, state, betas[t], log_w)
        if t == plan.temperatures:
            break
        step, scale = tuning.at(plan.temperatures - t if plan.reverse else t)
        state, accepted, diverged = hmc.transition(path.parts, state, step, leapfrogs=plan.leapfrogs, scale=scale)
        acceptance.append(accepted.mean(0))
        divergent.append(diverged.to(step).mean(0))
        progress(ahead + (1 - ahead) * t / plan.temperatures)
    progress(1.0)
    return AISEstimate(log_w, state.position, _mean(acceptance, log_w), _mean(divergent, log_w), plan.reverse)


def _mean(shares: list[Tensor], log_w: Tensor) -> Tensor:
    return torch.stack(shares).mean(0) if shares else torch.full_like(log_w[0], torch.nan)


def _init_chains(plan: _Config, path: _Path, begin: Tensor | None) -> HMCState:
    """Chains at the start of their way."""
    u = path.draw(plan.chains) if begin is None else begin.expand(plan.chains, *begin.shape)
    powers = path.powers(1.0 if plan.reverse else 0.0)
    return hmc.init(path.parts, u, torch.tensor(powers, dtype=u.dtype, device=u.device))


def _decorrelate(plan: _Config, path: _Path, state: HMCState, tuning: _StepSizes) -> HMCState:
    """Chains that set out from one posterior draw, moved apart: each stays an exact draw, now nearly its own."""
    step, scale = tuning.at(plan.temperatures)
    for _ in range(SETTLE):
        state = hmc.transition(path.parts, state, step, leapfrogs=plan.leapfrogs, scale=scale).state
    return state


def _reweight(path: _Path, state: HMCState, beta: float, log_w: Tensor) -> tuple[Tensor, HMCState]:
    """The weights after a change of temperature, at no new evaluation of the density."""
    warmer = state._replace(powers=state.powers.new_tensor(path.powers(beta)))
    gain = (warmer._replace(powers=warmer.powers - state.powers)).log_p
    return log_w + torch.where(gain.isnan(), -torch.inf, gain), warmer


def _pilot(plan: _Config, path: _Path, progress: Callable[[float], None]) -> _StepSizes:
    """Go the way with few chains, adapting to each datapoint's acceptance and to its chains' spread.

    Forward for reverse chains too: had their pilot set out from the draw that they set out from, their moves would
    depend on it, and no longer leave the densities as they are.
    """
    state, betas, T = _init_chains(plan, path, None), plan.betas(), plan.temperatures
    variance = path.draw(SPREAD).var(0)
    log_step = hmc.initial_step_size(path.parts, state, variance.sqrt()).log()
    each, every = -(-LEAST // T), -(-T // KEPT)
    rate = min(0.3, max(0.02, 10 / (each * T)))
    steps, scales = [], []
    for move in range(-SETTLE, each * T + 1):
        t = -(-max(move, 0) // each)
        _, state = _reweight(path, state, betas[t], state.log_p)
        scale = variance.sqrt()
        state, accepted, _ = hmc.transition(path.parts, state, log_step.exp(), leapfrogs=plan.leapfrogs, scale=scale)
        log_step = log_step + max(0.2, 2 / (move + SETTLE + 1) ** 0.5) * (accepted.mean(0) - TARGET_ACCEPT)
        variance = torch.lerp(variance, state.position.var(0), rate)
        if move == t * each and t % every == 0:
            steps.append(log_step)
            scales.append(scale.log())
        progress(t / T)
    return _StepSizes(_smooth(torch.stack(steps)), torch.stack(scales), every)


def _smooth(values: Tensor, width: int = 5) -> Tensor:
    """Moving average over the first dimension; ends average what there is."""
    return torch.stack([values[max(0, t - width // 2) : t + width // 2 + 1].mean(0) for t in range(len(values))])
