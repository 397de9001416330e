"""Annealed importance sampling (AIS) and bidirectional Monte Carlo (BDMC): each datapoint's evidence, by HMC."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from pvae.errors import UserError, check_range, nearest
from pvae.inference.families import Family
from pvae.inference.guides import Guide
from pvae.runtime.pyro_params import Program
from pvae.runtime.torch_state import halve_on_oom, seeded
from pvae.samplers import hmc
from pvae.samplers.hmc import TARGET_ACCEPT, HMCState, Progress, ValueAndGrad, refuse_if_all_diverge
from pvae.samplers.log_joint import LogJoint, simulate_joint
from pvae.stats import effective_sample_size, log_mean_exp, log_mean_exp_se

# Datapoints times chains in one batch, by whether the device is a CPU, where they should stay near its cache.
ROWS_PER_PASS = {True: 2048, False: 65536}

Schedule = Literal["linear", "sigmoid", "geometric"]

# The pilot run: chains of the run for each of its chains (at least 2), transitions at its first temperature, draws that
# give the initial scale, its least number of transitions over the path, and how many step sizes it keeps.
CHAINS_PER_PILOT, SETTLE, SCALE_DRAWS, MIN_TRANSITIONS, KEPT = 4, 20, 64, 50, 100


@dataclass(frozen=True)
class AISEstimate:
    r"""Log-weights of C annealed chains for each of B datapoints, with statistics of the sampler.

    Attributes:
        log_w: [C, B] in nats; weights average to p(x), those of reverse chains to 1 / p(x). -inf is a weight of 0;
            NaN marks a datapoint of which every trajectory diverged.
        position: final positions of the chains, [C, B, D].
        acceptance_rate: mean acceptance probability over the path, [B]; NaN for a single temperature (no moves).
        divergence_rate: share of divergent trajectories, [B], or NaN. They are rejected, which biases no weight.
        reverse: the chains started from the posterior.
    """

    log_w: Tensor
    position: Tensor
    acceptance_rate: Tensor
    divergence_rate: Tensor
    reverse: bool = False

    @property
    def evidence(self) -> Tensor:
        r"""Return :math:`\log \frac1C \sum_c w_c`, [B]: in expectation below log p(x), for reverse chains above."""
        return -log_mean_exp(self.log_w) if self.reverse else log_mean_exp(self.log_w)

    @property
    def evidence_se(self) -> Tensor:
        r"""Return the Monte Carlo error of the evidence, [B], by the delta method over chains.

        It is widened by :math:`\sqrt{(C - 1) / (C - 3)}`, by which few chains understate it on average. Weights of
        reverse chains are skewed, so that theirs is at least that of log-normal weights of the same variance.
        """
        C, error = len(self.log_w), log_mean_exp_se(self.log_w)
        if self.reverse:
            error = torch.maximum(error, (self.log_w.var(0).expm1() / C).log1p().clamp(max=self.log_w.var(0)).sqrt())
        return error * ((C - 1) / (C - 3)) ** 0.5 if C > 3 else error

    @property
    def ess(self) -> Tensor:
        """Return the effective sample size (ESS) of the C weights, [B]."""
        return effective_sample_size(self.log_w)


@dataclass(frozen=True)
class SandwichBounds:
    """Stochastic lower and upper bounds of the evidence of B simulated rows x, [B] each in nats.

    In expectation ``lower`` (forward chains) is below the evidence and ``upper`` (reverse chains) above; where the
    ``width`` between them vanishes, either is the evidence.
    """

    x: Tensor
    forward: AISEstimate
    backward: AISEstimate

    @property
    def lower(self) -> Tensor:
        return self.forward.evidence

    @property
    def upper(self) -> Tensor:
        return self.backward.evidence

    @property
    def width(self) -> Tensor:
        return self.upper - self.lower

    def interval(self, errors: float = 2.0) -> tuple[float, float]:
        """Return an interval of the rows' mean evidence: the bounds' means, widened by so many Monte Carlo errors."""
        low, high = (
            (a.evidence.double().mean(), (a.evidence_se.double() ** 2).sum().sqrt() / len(self.x))
            for a in (self.forward, self.backward)
        )
        return (low[0] - errors * low[1]).item(), (high[0] + errors * high[1]).item()


def inverse_temperatures(name: str, temperatures: int) -> Tensor:
    r"""Return the T + 1 inverse temperatures :math:`0 = \beta_0 < \dots < \beta_T = 1` in float64, with s = t / T.

    ``linear`` is :math:`\beta = s`; ``sigmoid`` :math:`\sigma(4 (2 s - 1))`, stretched to end at 0 and 1 (Grosse et al.
    2015); ``geometric`` goes from 0 to :math:`10^{-4}`, then to 1 by a constant factor.

    >>> inverse_temperatures("linear", 4).tolist()
    [0.0, 0.25, 0.5, 0.75, 1.0]
    """
    check_range(least=1, temperatures=temperatures)
    if name not in get_args(Schedule):
        raise UserError(f"unknown schedule '{name}'{nearest(name, get_args(Schedule))}")
    s = torch.linspace(0, 1, temperatures + 1, dtype=torch.double)
    if name == "sigmoid":
        s = (4 * (2 * s - 1)).sigmoid()
        return (s - s[0]) / (s[-1] - s[0])
    if name == "geometric":
        return torch.cat([s[:1], 1e-4 ** ((1 - s[1:]) * temperatures / max(1, temperatures - 1))])
    return s


class _Path(NamedTuple):
    r"""Geometric path from a normalized density to p(x, u), :math:`\log f_\beta = \sum_p \beta_p(\beta) \log f_p`."""

    draw: Callable[[int], Tensor]  # number of chains C to draws of the first density, [C, B, D]
    density: ValueAndGrad  # u to the log f_p
    split: Callable[[float], tuple[float, float]]  # beta to the beta_p


def _path(target: LogJoint, family: Family | None, q_params: Tensor | None) -> _Path:
    if family is None or q_params is None:
        return _Path(target.prior, ValueAndGrad(target.log_lik_and_prior), lambda beta: (beta, 1.0))
    if family.point_mass:
        raise UserError(f"{type(family).__name__} is a point mass: a path can't start there; start from the prior")
    q = family(q_params.detach())
    density = ValueAndGrad(lambda u: (target(u), q.log_prob(u)))
    return _Path(lambda chains: q.sample((chains,)), density, lambda beta: (beta, 1.0 - beta))


def anneal(
    target: LogJoint,
    family: Family | None = None,
    q_params: Tensor | None = None,
    *,
    chains: int = 16,
    temperatures: int = 500,
    schedule: str = "sigmoid",
    num_integration_steps: int = 5,
    start_from: Tensor | None = None,
    seed: int = 0,
    progress: Progress = lambda share: None,
) -> AISEstimate:
    r"""Run annealed importance sampling (AIS), whose weights average to an unbiased estimate of p(x).

    .. math:: \log w = \sum_{t=1}^T \log f_{\beta_t}(u_{t-1}) - \log f_{\beta_{t-1}}(u_{t-1}),
        \qquad f_\beta = q^{1 - \beta}\, p(x, u)^\beta

    Arguments:
        target: log joint density p(x, u) of the rows.
        family, q_params: q = family(q_params) with q_params [B, P]; the prior of the program by default.
        chains: C, for each datapoint.
        temperatures: T.
        schedule: of beta, see `inverse_temperatures`.
        num_integration_steps: leapfrog steps of the one HMC transition at each temperature.
        start_from: exact posterior draws u [B, D] of the rows. All chains of a row start there and anneal from beta = 1
            to 0; each weight then has mean 1 / p(x), although the chains share their first position.
        seed: of all noise; the random stream outside is left alone.
        progress: called with the share of the work done.

    Returns:
        Log-weights. A pilot run of a quarter of the chains (at least 2) adapts step sizes and scales before, at the
        same cost per chain; they stay fixed in the run, since adapting them on the way would bias the weights.
        Batches of rows are halved where the device has no memory for them.

    Raises:
        UserError: a count below 1, an unknown schedule, a point mass to start from, or HMC that diverges everywhere.

    Source: Neal (2001), *Annealed Importance Sampling*, arXiv:physics/9803008; Wu, Burda, Salakhutdinov, Grosse
    (2017), *On the Quantitative Analysis of Decoder-Based Generative Models*, arXiv:1611.04273.
    """
    check_range(least=1, temperatures=temperatures, chains=chains, num_integration_steps=num_integration_steps)
    config = _Config(chains, temperatures, schedule, num_integration_steps, start_from is not None)
    rows = len(target.x)

    def anneal_batch(part: slice) -> AISEstimate:
        path = _path(target.rows(part), family, None if q_params is None else q_params[part])
        first = None if start_from is None else start_from[part]
        return _anneal_rows(config, path, first, _within(progress, part.start / rows, part.stop / rows))

    size = max(1, ROWS_PER_PASS[target.x.device.type == "cpu"] // chains)
    with seeded(seed):
        batches = list(halve_on_oom(anneal_batch, rows, size, "rows of annealed chains"))
    log_w, position = (torch.cat([getattr(b, name) for b in batches], 1) for name in ("log_w", "position"))
    rates = [torch.cat([getattr(b, name) for b in batches]) for name in ("acceptance_rate", "divergence_rate")]
    log_w = log_w.where(~refuse_if_all_diverge(rates[1]), torch.nan)
    return AISEstimate(log_w, position, rates[0], rates[1], config.reverse)


def sandwich(
    model: Program,
    like: Tensor,
    guide: Guide | None = None,
    *,
    seed: int = 0,
    progress: Progress = lambda share: None,
    **options: Any,
) -> SandwichBounds:
    """Bound the evidence of simulated rows from both sides (bidirectional Monte Carlo, BDMC).

    Arguments:
        model: a Pyro program.
        like: rows [B, ...]; as many of their shape are simulated.
        guide: start from its posterior; from the program's prior by default.
        seed: of the rows and of all noise.
        progress: called with the share of the work done.
        options: ``chains``, ``temperatures``, ``schedule``, ``num_integration_steps`` of `anneal`, either direction.

    The width on simulated rows shows how far to trust the lower bound on real rows, where there is no upper bound.

    Source: Grosse, Ghahramani, Adams (2015), *Sandwiching the marginal likelihood using bidirectional Monte Carlo*,
    arXiv:1511.02543.
    """
    sites, family = (guide.sites, guide.family) if guide else (None, None)
    u, x = simulate_joint(model, like, sites, seed=seed)
    with seeded(seed + 1), torch.no_grad():
        q_params = guide.params(x) if guide else None
    run = partial(anneal, LogJoint(model, x, None, sites), family, q_params, **options)
    forward = run(seed=seed + 2, progress=_within(progress, 0.0, 0.5))
    backward = run(start_from=u, seed=seed + 3, progress=_within(progress, 0.5, 1.0))
    return SandwichBounds(x, forward, backward)


def _within(progress: Progress, begin: float, end: float) -> Progress:
    """Return the progress of a part of the work, from share ``begin`` to ``end`` of the whole."""
    return lambda share: progress(begin + (end - begin) * share)


class _Config(NamedTuple):
    chains: int
    temperatures: int
    schedule: str
    num_integration_steps: int
    reverse: bool

    def betas(self) -> list[float]:
        betas = inverse_temperatures(self.schedule, self.temperatures).tolist()
        return betas[::-1] if self.reverse else betas

    def transition(self, path: _Path, state: HMCState, size: Tensor, scale: Tensor) -> hmc.HMCInfo:
        return hmc.transition(path.density, state, size, num_integration_steps=self.num_integration_steps, scale=scale)


class _StepSizes(NamedTuple):
    """Logarithms of step sizes [S, B] and of scales [S, B, D], at every so many temperatures of the path."""

    log_step_size: Tensor
    log_scale: Tensor
    every: int

    def at(self, t: int) -> tuple[Tensor, Tensor]:
        """Interpolate step size [B] and scale [B, D] after t changes of temperature."""
        place = min(t / self.every, len(self.log_step_size) - 1)
        low = min(int(place), len(self.log_step_size) - 2)
        log_step_size, log_scale = (torch.lerp(logs[low], logs[low + 1], place - low) for logs in self[:2])
        return log_step_size.exp(), log_scale.exp()


def _anneal_rows(config: _Config, path: _Path, first: Tensor | None, progress: Progress) -> AISEstimate:
    betas, T = config.betas(), config.temperatures
    pilot = config._replace(chains=max(2, config.chains // CHAINS_PER_PILOT), reverse=False)
    ahead = pilot.chains / (pilot.chains + config.chains)
    sizes = _pilot(pilot, path, _within(progress, 0.0, ahead))
    state = _init_chains(config, path, first)
    for _ in range(SETTLE if config.reverse else 0):  # exact draws that start at one place move apart
        state = config.transition(path, state, *sizes.at(T)).state
    log_w = torch.zeros_like(state.log_p)
    rates: list[Tensor] = []
    for t in range(1, T + 1):
        log_w, state = _reweight(path, state, betas[t], log_w)
        if t == T:
            break
        state, acceptance_rate, is_divergent = config.transition(path, state, *sizes.at(T - t if config.reverse else t))
        rates.append(torch.stack([acceptance_rate.mean(0), is_divergent.to(log_w).mean(0)]))
        progress(ahead + (1 - ahead) * t / T)
    progress(1.0)
    means = torch.stack(rates).mean(0) if rates else torch.full_like(log_w[:1].expand(2, -1), torch.nan)
    return AISEstimate(log_w, state.position, means[0], means[1], config.reverse)


def _init_chains(config: _Config, path: _Path, first: Tensor | None) -> HMCState:
    u = path.draw(config.chains) if first is None else first.expand(config.chains, *first.shape)
    betas = path.split(1.0 if config.reverse else 0.0)
    return hmc.init(path.density, u, torch.tensor(betas, dtype=u.dtype, device=u.device))


def _reweight(path: _Path, state: HMCState, beta: float, log_w: Tensor) -> tuple[Tensor, HMCState]:
    """Update the log-weights after a change of temperature, at no new evaluation of the density."""
    old, new = state.inverse_temperatures, state.inverse_temperatures.new_tensor(path.split(beta))
    increment = state._replace(inverse_temperatures=new - old).log_p
    return log_w + torch.where(increment.isnan(), -torch.inf, increment), state._replace(inverse_temperatures=new)


def _pilot(config: _Config, path: _Path, progress: Progress) -> _StepSizes:
    """Anneal few chains, adapting step sizes to each datapoint's acceptance rate and scales to its chains' variance.

    The pilot goes forward for reverse chains too: moves that depend on their posterior draw leave no density invariant.
    """
    state, betas, T = _init_chains(config, path, None), config.betas(), config.temperatures
    variance = path.draw(SCALE_DRAWS).var(0)
    log_step_size = hmc.initial_step_size(path.density, state, variance.sqrt()).log()
    repeats, every = -(-MIN_TRANSITIONS // T), -(-T // KEPT)
    rate = min(0.3, max(0.02, 10 / (repeats * T)))
    log_step_sizes, log_scales = [], []
    for move in range(-SETTLE, repeats * T + 1):
        t = -(-max(move, 0) // repeats)
        _, state = _reweight(path, state, betas[t], state.log_p)
        scale = variance.sqrt()
        state, acceptance_rate, _ = config.transition(path, state, log_step_size.exp(), scale)
        gain = max(0.2, 2 / (move + SETTLE + 1) ** 0.5)
        log_step_size = log_step_size + gain * (acceptance_rate.mean(0) - TARGET_ACCEPT)
        variance = torch.lerp(variance, state.position.var(0), rate)
        if move == t * repeats and t % every == 0:
            log_step_sizes.append(log_step_size)
            log_scales.append(scale.log())
        progress(t / T)
    steps = torch.stack(log_step_sizes)  # smoothed over 5 places of the path, fewer at its ends
    smooth = torch.stack([steps[max(0, t - 2) : t + 3].mean(0) for t in range(len(steps))])
    return _StepSizes(smooth, torch.stack(log_scales), every)
