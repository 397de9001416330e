"""Refinement: gradient ascent of each datapoint's ELBO over its own variational parameters, batched over datapoints.

`refine` serves semi-amortized guides, the rows of a per-datapoint guide, new rows, and the gaps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import pyro
import torch
from pyro import poutine
from torch import Tensor

from pvae.inference.families import Family
from pvae.inference.importance import elbo
from pvae.inference.latents import LatentSites, real_vector_latent
from pvae.runtime.pyro_params import Program
from pvae.runtime.torch_state import seeded
from pvae.runtime.tracing import AutoTraced

# Steps after which the bound is checked: each has another one at about half its steps before it.
CHECK_STEPS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000)

# Steps from which on tracing one pays.
MIN_STEPS_TO_TRACE = 100


@dataclass(frozen=True)
class RowState:
    """Optimizer state of each row: first and second moment [B, P], and the number of the row's own steps [B]."""

    exp_avg: Tensor
    exp_avg_sq: Tensor
    steps: Tensor


class UpdateRule(Protocol):
    """Maps gradients to steps, by the state of each row alone, so that gradients pass through it."""

    def start(self, q_params: Tensor) -> RowState:
        """Return the state of rows q_params [B, P] before their first step."""

    def step(self, q_params: Tensor, gradient: Tensor, state: RowState) -> tuple[Tensor, RowState]:
        """Return q_params [B, P] after a step of ascent, and the new state."""


@dataclass(frozen=True)
class RowAdam:
    r"""Adam with moments and a step count for each row, at a learning rate that decays with the row's steps t.

    .. math:: \lambda \leftarrow \lambda + \frac{r}{\sqrt{1 + t / \tau}} \frac{\hat m}{\sqrt{\hat v + \epsilon^2}}

    Arguments:
        learning_rate: r, in units of q_params.
        decay_steps: tau, steps after which the rate decays, without which a row would not converge.
        betas: decay of the first and the second moment.
        eps: keeps the step finite, and its derivative too, where a gradient is zero.

    Source: Kingma and Ba (2015), *Adam*, arXiv:1412.6980.

    >>> rule = RowAdam(0.1, decay_steps=1e9)
    >>> q_params = torch.zeros(2, 3)
    >>> q_params, state = rule.step(q_params, torch.ones(2, 3), rule.start(q_params))
    >>> q_params[0]
    tensor([0.1000, 0.1000, 0.1000])
    """

    learning_rate: float = 0.1
    decay_steps: float = 20.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def start(self, q_params: Tensor) -> RowState:
        zeros = torch.zeros_like(q_params, requires_grad=False)
        return RowState(zeros, zeros, torch.zeros(len(q_params), dtype=torch.int32, device=q_params.device))

    def step(self, q_params: Tensor, gradient: Tensor, state: RowState) -> tuple[Tensor, RowState]:
        beta_1, beta_2 = self.betas
        exp_avg = beta_1 * state.exp_avg + (1 - beta_1) * gradient
        exp_avg_sq = beta_2 * state.exp_avg_sq + (1 - beta_2) * gradient * gradient
        steps = state.steps + 1
        t = steps.to(q_params.dtype).unsqueeze(-1)
        rate = self.learning_rate * (1 + (t - 1) / self.decay_steps).rsqrt()
        mean, square = exp_avg / (1 - beta_1**t), exp_avg_sq / (1 - beta_2**t)
        return q_params + rate * mean * (square + self.eps**2).rsqrt(), RowState(exp_avg, exp_avg_sq, steps)


@dataclass(frozen=True)
class NaturalAscent:
    r"""Natural gradient steps, :math:`\lambda \leftarrow \lambda + r F(\lambda)^{-1} g`, at a falling rate.

    Steps are in units of the posterior: r moves a mean by about r standard deviations for a gradient of one nat each.
    No moments are kept, so that unrolled steps stay smooth.

    Arguments:
        natural_gradient: maps q_params and gradient to F(q_params)^-1 gradient, see `Family.natural_gradient`.
        learning_rate: r; 1 jumps to the optimum of a single latent with a Gaussian posterior.
        decay_steps: tau, steps after which the rate decays.
        max_entry: limit of each entry of a natural gradient, so that rows that start far off do not diverge.

    Source: Amari (1998), *Natural Gradient Works Efficiently in Learning*, Neural Computation 10.
    """

    natural_gradient: Callable[[Tensor, Tensor], Tensor]
    learning_rate: float = 0.2
    decay_steps: float = 20.0
    max_entry: float = 1.0

    def start(self, q_params: Tensor) -> RowState:
        nothing = q_params.new_zeros(len(q_params), 0)
        return RowState(nothing, nothing, torch.zeros(len(q_params), dtype=torch.int32, device=q_params.device))

    def step(self, q_params: Tensor, gradient: Tensor, state: RowState) -> tuple[Tensor, RowState]:
        rate = self.learning_rate * (1 + state.steps.to(q_params.dtype) / self.decay_steps).rsqrt().unsqueeze(-1)
        uphill = self.natural_gradient(q_params, gradient).clamp(-self.max_entry, self.max_entry)
        return q_params + rate * uphill, RowState(state.exp_avg, state.exp_avg_sq, state.steps + 1)


@dataclass(frozen=True)
class RefinementResult:
    """Refined variational parameters of B rows, and how the search went.

    Attributes:
        q_params: refined parameters, [B, P].
        value: the checked bound at q_params, [B] nats; NaN without ``check``.
        state: the rule's state of each row, to go on from.
        steps: number of steps made.
        check_steps: the steps at which the bound was checked, from 0; empty without ``check``.
        curve: the checked bound of the plain iterate at each of them, [M, B] nats.
        optimization_gap: nats that each row gained by at least doubling its steps, [B], an estimate of what more steps
            would gain. As the checks share their noise, it may be too small, by up to 0.01 nats where measured. NaN
            without ``check``.
    """

    q_params: Tensor
    value: Tensor
    state: RowState
    steps: int
    check_steps: tuple[int, ...]
    curve: Tensor
    optimization_gap: Tensor


def refine(
    bound: Callable[[Tensor], Tensor],
    q_params: Tensor,
    steps: int,
    *,
    rule: UpdateRule | None = None,
    state: RowState | None = None,
    unroll: bool = False,
    check: Callable[[Tensor], Tensor] | None = None,
    check_steps: Sequence[int] = CHECK_STEPS,
    tolerance: float = 0.0,
) -> RefinementResult:
    r"""Maximize each row's bound over its q_params by gradient ascent, :math:`\lambda_i \leftarrow \lambda_i + r g_i`.

    Arguments:
        bound: maps q_params [B, P] to a (noisy) bound of each row, [B]; row i may depend on its own q_params alone.
        q_params: where to start, [B, P].
        steps: the most steps to make.
        rule: maps gradients to steps; `RowAdam` unless given.
        state: the rule's state of the rows, to continue a refinement.
        unroll: keep the graph, so that later gradients pass through the steps (Kim et al. 2018).
        check: maps q_params to the bound under common random numbers. With it, the bound is checked at
            ``check_steps``, and the best of the iterate and of its mean since the last check is kept for each row.
        check_steps: steps at which to check.
        tolerance: with ``check``, stop when the rows' mean gain over the last (at least) doubling is below it, in nats.

    See also `maximize_local_elbo`, which refines on the ELBO until convergence.

    Source: Kim, Wiseman, Miller, Sontag, Rush (2018), *Semi-Amortized Variational Autoencoders*, arXiv:1802.02550.

    >>> target = torch.tensor([[1.0], [-2.0]])
    >>> refined = refine(lambda q_params: -((q_params - target) ** 2).sum(-1), torch.zeros(2, 1), 400)
    >>> bool((refined.q_params - target).abs().max() < 0.01)
    True
    """
    rule = rule or RowAdam()
    state = state or rule.start(q_params)
    if not unroll:
        q_params = q_params.detach()
    ascend = _ascent_step(bound, rule, unroll, steps)
    stopping = _EarlyStopping(q_params, check, check_steps, tolerance) if check else None
    done = 0
    with torch.enable_grad():
        while done < steps:
            q_params, *moments = ascend(q_params, state.exp_avg, state.exp_avg_sq, state.steps)
            state = RowState(*moments)
            done += 1
            if stopping and stopping.update(q_params, done, last=done == steps):
                break
    if stopping:
        return stopping.result(state, done)
    unknown = q_params.new_full((len(q_params),), torch.nan)
    return RefinementResult(q_params, unknown, state, done, (), q_params.new_zeros(0, len(q_params)), unknown)


def _ascent_step(
    bound: Callable[[Tensor], Tensor], rule: UpdateRule, unroll: bool, count: int
) -> Callable[..., tuple[Tensor, ...]]:
    """Return one step of ascent as a function of tensors, traced if ``count`` steps pay for that."""

    def ascend(q_params: Tensor, *moments: Tensor) -> tuple[Tensor, ...]:
        q_params = q_params if unroll and q_params.requires_grad else q_params.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(bound(q_params).sum(), q_params, create_graph=unroll)
        q_params, state = rule.step(q_params if unroll else q_params.detach(), gradient, RowState(*moments))
        return q_params, state.exp_avg, state.exp_avg_sq, state.steps

    return ascend if unroll or count < MIN_STEPS_TO_TRACE else AutoTraced(ascend).__call__


class _EarlyStopping:
    """Checks a refinement at given steps, keeps the best q_params of each row, and decides when to stop."""

    def __init__(
        self, q_params: Tensor, check: Callable[[Tensor], Tensor], check_steps: Sequence[int], tolerance: float
    ) -> None:
        self.check, self.check_steps, self.tolerance = check, check_steps, tolerance
        self.best, self.value = q_params, self._evaluate(q_params)
        self.checked, self.curve, self.best_values = [0], [self.value], [self.value]
        self.optimization_gap = torch.full_like(self.value, torch.inf)
        self.total, self.count = torch.zeros_like(q_params), 0

    def _evaluate(self, q_params: Tensor) -> Tensor:
        with torch.no_grad():
            return self.check(q_params)

    def _keep_best(self, q_params: Tensor) -> Tensor:
        value = self._evaluate(q_params)
        better = value > self.value
        self.best = torch.where(better.unsqueeze(-1), q_params, self.best)
        self.value = torch.where(better, value, self.value)
        return value

    def update(self, q_params: Tensor, done: int, *, last: bool) -> bool:
        """Take the iterate after ``done`` steps, and return whether to stop."""
        self.total, self.count = self.total + q_params, self.count + 1
        if not (last or done in self.check_steps):
            return False
        self.curve.append(self._keep_best(q_params))
        if self.count > 1:
            self._keep_best(self.total / self.count)
        self.total, self.count = torch.zeros_like(q_params), 0
        self.checked.append(done)
        self.best_values.append(self.value)
        half = max(i for i, step in enumerate(self.checked) if step <= done / 2)
        self.optimization_gap = self.value - self.best_values[half]
        return done >= 20 and self.optimization_gap.mean().item() < self.tolerance

    def result(self, state: RowState, done: int) -> RefinementResult:
        curve = torch.stack(self.curve)
        return RefinementResult(self.best, self.value, state, done, tuple(self.checked), curve, self.optimization_gap)


# Draws of a step, and of a check, in the search for a datapoint's optimum.
REFINE_DRAWS, CHECK_DRAWS = 8, 100


def fixed_guide(family: Family, q_params: Tensor, sites: LatentSites | None = None) -> Program:
    """Return the guide q(z) = family(q_params) of given q_params [B, P], over these sites, else one vector "z"."""
    latents = sites or real_vector_latent(family.dim)

    def guide(x: Tensor, index: Tensor | None = None) -> None:
        with pyro.plate("data", len(x), dim=-1):
            latents.sample(family(q_params))

    return guide


@dataclass(frozen=True)
class LocalELBO:
    """ELBO of each datapoint under a model as a function of its own q_params, with gradients.

    Arguments:
        model: the Pyro program.
        family: the variational family.
        sites: the latents that q is over; one vector "z" unless given.
    """

    model: Program
    family: Family
    sites: LatentSites | None = None

    def __call__(
        self, q_params: Tensor, x: Tensor, index: Tensor | None = None, K: int = 1, kl_weight: float | Tensor = 1.0
    ) -> Tensor:
        """Compute the ELBO [B] in nats of q_params [B, P] for rows x [B, ...], by K draws, with a weight on the KL."""
        # K copies of the rows, not a plate of samples: the bound may run inside a trace that has one already, and
        # must not show there.
        rows = x.repeat(K, *(1,) * (x.dim() - 1))
        index = index if index is None else index.repeat(K)
        q = fixed_guide(self.family, q_params.repeat(K, 1), self.sites)
        with poutine.block():
            return elbo(self.model, q, rows, index, kl_weight=kl_weight).view(K, -1).mean(0)


def default_update_rule(family: Family, learning_rate: float = 0.2) -> UpdateRule:
    """Return natural gradient steps if the family knows its Fisher information, else `RowAdam`.

    The noise of a step grows with the number of q_params for each dimension; beyond 6, natural steps are shortened. At
    D = 50 full rank has 26, and steps of 0.2 with 8 draws diverge, while steps of 0.04 do not.
    """
    if not family.has_natural_gradient:
        return RowAdam(learning_rate)
    return NaturalAscent(family.natural_gradient, learning_rate * min(1.0, 6 * family.dim / family.num_params))


def maximize_local_elbo(
    local_elbo: LocalELBO,
    q_params: Tensor,
    x: Tensor,
    index: Tensor | None = None,
    *,
    steps: int,
    rule: UpdateRule | None = None,
    tolerance: float = 0.002,
    seed: int = 0,
) -> RefinementResult:
    """Maximize each row's ELBO over its q_params [B, P] until convergence under common random numbers.

    Arguments:
        local_elbo: the datapoints' ELBO.
        q_params: where to start.
        x, index: the rows.
        steps: the most steps to make.
        rule: maps gradients to steps.
        tolerance: stop when at least doubling the steps gains less than this, in nats on average over rows.
        seed: of the noise; the random stream outside is left alone.
    """

    def check(q_params: Tensor) -> Tensor:
        with seeded(seed + 1):
            return local_elbo(q_params, x, index, CHECK_DRAWS)

    def bound(q_params: Tensor) -> Tensor:
        return local_elbo(q_params, x, index, REFINE_DRAWS)

    with seeded(seed):
        return refine(bound, q_params, steps, rule=rule, check=check, tolerance=tolerance)
