"""Refinement: each datapoint's own q_params climbs its own bound, batched over datapoints.

One function serves semi-amortized guides, the rows of a per-datapoint guide, held-out fitting and the gaps.
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

# Steps after which a refinement is looked at: each mark has one at about half its steps before it.
CHECK_STEPS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000)


# Steps from which on it is worth while to record one.
MIN_STEPS_TO_TRACE = 100


@dataclass(frozen=True)
class RowState:
    """What a rule remembers of each row: first and second moment [B, P], the number of its own steps [B]."""

    first: Tensor
    second: Tensor
    steps: Tensor


class UpdateRule(Protocol):
    """How a gradient becomes a step: a function of the rows' own state, through which gradients pass."""

    def start(self, q_params: Tensor) -> RowState:
        """The state of rows q_params [B, P] before their first step."""

    def step(self, q_params: Tensor, gradient: Tensor, state: RowState) -> tuple[Tensor, RowState]:
        """q_params [B, P] after a step uphill, and the new state."""


@dataclass(frozen=True)
class RowAdam:
    r"""Adam with moments and step count of each row's own, at a rate that falls with the row's steps t.

    .. math:: \lambda \leftarrow \lambda + \frac{r}{\sqrt{1 + t / \tau}} \frac{\hat m}{\sqrt{\hat v + \epsilon^2}}

    Arguments:
        learning_rate: r, in units of q_params.
        slow: tau, steps after which the rate begins to fall: without that a row would never come to rest.
        betas: decay of the first and the second moment.
        eps: keeps the step finite, and its derivative too, where a gradient is zero.

    Source: Kingma and Ba (2015), *Adam*, arXiv:1412.6980.

    >>> rule = RowAdam(0.1, slow=1e9)
    >>> q_params = torch.zeros(2, 3)
    >>> q_params, state = rule.step(q_params, torch.ones(2, 3), rule.start(q_params))
    >>> q_params[0]
    tensor([0.1000, 0.1000, 0.1000])
    """

    learning_rate: float = 0.1
    slow: float = 20.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def start(self, q_params: Tensor) -> RowState:
        zeros = torch.zeros_like(q_params, requires_grad=False)
        return RowState(zeros, zeros, torch.zeros(len(q_params), dtype=torch.int32, device=q_params.device))

    def step(self, q_params: Tensor, gradient: Tensor, state: RowState) -> tuple[Tensor, RowState]:
        one, two = self.betas
        first = one * state.first + (1 - one) * gradient
        second = two * state.second + (1 - two) * gradient * gradient
        steps = state.steps + 1
        t = steps.to(q_params.dtype).unsqueeze(-1)
        rate = self.learning_rate * (1 + (t - 1) / self.slow).rsqrt()
        mean, square = first / (1 - one**t), second / (1 - two**t)
        return q_params + rate * mean * (square + self.eps**2).rsqrt(), RowState(first, second, steps)


@dataclass(frozen=True)
class NaturalAscent:
    r"""Natural gradient steps, :math:`\lambda \leftarrow \lambda + r F(\lambda)^{-1} g`, at a falling rate.

    In the posterior's own units: a step of r moves a mean by about r standard deviations at a gradient of one nat each,
    whatever the standard deviation is. It keeps no moments, so that unrolled steps stay smooth.

    Arguments:
        natural: (q_params, gradient) to F(q_params)^-1 gradient, a family's.
        learning_rate: r; 1 would jump to the optimum of a single latent with a Gaussian posterior.
        slow: tau, steps after which the rate begins to fall.
        largest: bound of each entry of a natural gradient, so that a start far off can't throw a row out.

    Source: Amari (1998), *Natural Gradient Works Efficiently in Learning*, Neural Computation 10.
    """

    natural: Callable[[Tensor, Tensor], Tensor]
    learning_rate: float = 0.2
    slow: float = 20.0
    largest: float = 1.0

    def start(self, q_params: Tensor) -> RowState:
        nothing = q_params.new_zeros(len(q_params), 0)
        return RowState(nothing, nothing, torch.zeros(len(q_params), dtype=torch.int32, device=q_params.device))

    def step(self, q_params: Tensor, gradient: Tensor, state: RowState) -> tuple[Tensor, RowState]:
        rate = self.learning_rate * (1 + state.steps.to(q_params.dtype) / self.slow).rsqrt().unsqueeze(-1)
        uphill = self.natural(q_params, gradient).clamp(-self.largest, self.largest)
        return q_params + rate * uphill, RowState(state.first, state.second, state.steps + 1)


@dataclass(frozen=True)
class RefinementResult:
    """What a refinement found.

    Attributes:
        q_params: refined parameters, [B, P].
        value: the checked bound at q_params, [B] nats; NaN without ``check``.
        state: the rule's memory of each row, to go on from.
        steps: number of steps made.
        marks: the steps at which the bound was checked, from 0; empty without ``check``.
        curve: the checked bound of the plain iterate at each mark, [M, B] nats.
        gap: nats that each row won by at least doubling its steps, [B]: an estimate of the optimization gap. The
            looks' own fixed noise lets it fall short of what is left, by up to 0.01 nats where that was measured.
            NaN without ``check``.
    """

    q_params: Tensor
    value: Tensor
    state: RowState
    steps: int
    marks: tuple[int, ...]
    curve: Tensor
    gap: Tensor


def refine(
    bound: Callable[[Tensor], Tensor],
    q_params: Tensor,
    steps: int,
    *,
    rule: UpdateRule | None = None,
    state: RowState | None = None,
    unroll: bool = False,
    check: Callable[[Tensor], Tensor] | None = None,
    marks: Sequence[int] = CHECK_STEPS,
    tolerance: float = 0.0,
) -> RefinementResult:
    r"""Let each row of q_params climb its own bound by gradient steps, :math:`\lambda_i \leftarrow \lambda_i + r g_i`.

    Arguments:
        bound: q_params [B, P] to a (noisy) bound of each row [B]; row i may depend on lam_i alone.
        q_params: where to start, [B, P].
        steps: the most steps to make.
        rule: how a gradient becomes a step.
        state: the rule's memory of the rows, when a refinement goes on.
        unroll: keep the graph, so that gradients of what follows pass through the steps (Kim et al. 2018).
        check: q_params to the bound under noise that is the same at each call. With it, the bound is checked at ``marks``
            and the best of the iterate and of its mean since the last mark is kept for each row.
        marks: steps at which to check.
        tolerance: with ``check``: stop when the rows' mean gain over the last (at least) doubling is below this, nats.

    Source: Kim, Wiseman, Miller, Sontag, Rush (2018), *Semi-Amortized Variational Autoencoders*, arXiv:1802.02550.

    >>> target = torch.tensor([[1.0], [-2.0]])
    >>> found = refine(lambda q_params: -((q_params - target) ** 2).sum(-1), torch.zeros(2, 1), 400)
    >>> bool((found.q_params - target).abs().max() < 0.01)
    True
    """
    rule = rule or RowAdam()
    state = state or rule.start(q_params)
    if not unroll:
        q_params = q_params.detach()
    climb = _climbing(bound, rule, unroll, steps)
    watch = _EarlyStopping(q_params, check, tolerance) if check else None
    done = 0
    with torch.enable_grad():
        while done < steps:
            q_params, *memory = climb(q_params, state.first, state.second, state.steps)
            state = RowState(*memory)
            done += 1
            if watch and watch.saw(q_params, done, last=done == steps, marks=marks):
                break
    if watch is None:
        unknown = q_params.new_full((len(q_params),), torch.nan)
        return RefinementResult(q_params, unknown, state, done, (), q_params.new_zeros(0, len(q_params)), unknown)
    return RefinementResult(
        watch.best, watch.value, state, done, tuple(watch.marks), torch.stack(watch.curve), watch.gap
    )


def _climbing(
    bound: Callable[[Tensor], Tensor], rule: UpdateRule, unroll: bool, count: int
) -> Callable[..., tuple[Tensor, ...]]:
    """One step: q_params and the rows' state, before and after."""

    def climb(q_params: Tensor, first: Tensor, second: Tensor, steps: Tensor) -> tuple[Tensor, ...]:
        q_params = q_params if unroll and q_params.requires_grad else q_params.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(bound(q_params).sum(), q_params, create_graph=unroll)
        q_params, state = rule.step(q_params if unroll else q_params.detach(), gradient, RowState(first, second, steps))
        return q_params, state.first, state.second, state.steps

    return climb if unroll or count < MIN_STEPS_TO_TRACE else AutoTraced(climb).__call__


class _EarlyStopping:
    """Checks a refinement at its marks, keeps the best of each row, and says when to stop."""

    def __init__(self, q_params: Tensor, check: Callable[[Tensor], Tensor], tolerance: float) -> None:
        self.check, self.tolerance = check, tolerance
        self.best, self.value = q_params, self._look(q_params)
        self.marks, self.curve, self.tops = [0], [self.value], [self.value]
        self.gap = torch.full_like(self.value, torch.inf)
        self.total, self.count = torch.zeros_like(q_params), 0

    def _look(self, q_params: Tensor) -> Tensor:
        with torch.no_grad():
            return self.check(q_params)

    def _offer(self, q_params: Tensor) -> Tensor:
        value = self._look(q_params)
        better = value > self.value
        self.best = torch.where(better.unsqueeze(-1), q_params, self.best)
        self.value = torch.where(better, value, self.value)
        return value

    def saw(self, q_params: Tensor, done: int, *, last: bool, marks: Sequence[int]) -> bool:
        self.total, self.count = self.total + q_params, self.count + 1
        if not (last or done in marks):
            return False
        self.curve.append(self._offer(q_params))
        if self.count > 1:
            self._offer(self.total / self.count)
        self.total, self.count = torch.zeros_like(q_params), 0
        self.marks.append(done)
        self.tops.append(self.value)
        half = max(i for i, mark in enumerate(self.marks) if mark <= done / 2)
        self.gap = self.value - self.tops[half]
        return done >= 20 and self.gap.mean().item() < self.tolerance


# Draws of a step and of a look with which a datapoint's own optimum is sought.
REFINE_DRAWS, CHECK_DRAWS = 8, 100


def fixed_guide(family: Family, q_params: Tensor, sites: LatentSites | None = None) -> Program:
    """The guide whose parameters are these: q(z) = family(q_params), q_params [B, P], over these sites, else one vector "z"."""
    latents = sites or real_vector_latent(family.dim)

    def guide(x: Tensor, index: Tensor | None = None) -> None:
        with pyro.plate("data", len(x), dim=-1):
            latents.sample(family(q_params))

    return guide


@dataclass(frozen=True)
class LocalELBO:
    """Each datapoint's own ELBO under a model, as a function of its own q_params, with gradients.

    Arguments:
        model: the Pyro program.
        family: the posterior family.
        sites: the latents that q is over; one vector "z" unless given.
    """

    model: Program
    family: Family
    sites: LatentSites | None = None

    def __call__(
        self, q_params: Tensor, x: Tensor, index: Tensor | None = None, K: int = 1, kl_weight: float | Tensor = 1.0
    ) -> Tensor:
        """ELBO [B] in nats of q_params [B, P] for the rows x [B, ...], over K draws; training may weigh the KL."""
        # K copies of the rows, not a plate of samples: the bound may run inside a trace that has one already,
        # and nothing of it may be seen there.
        rows = x.repeat(K, *(1,) * (x.dim() - 1))
        which = index if index is None else index.repeat(K)
        q = fixed_guide(self.family, q_params.repeat(K, 1), self.sites)
        with poutine.block():
            return elbo(self.model, q, rows, which, kl_weight=kl_weight).view(K, -1).mean(0)


def default_update_rule(family: Family, learning_rate: float = 0.2) -> UpdateRule:
    """Natural gradient steps where the family knows its Fisher information, else Adam's.

    A step's noise grows with the entries of q_params for each dimension; beyond 6 of these natural steps become shorter. At
    D = 50 full rank has 26, and steps of 0.2 with 8 draws throw it out; steps of 0.04 do not.
    """
    if type(family).natural is Family.natural:
        return RowAdam(learning_rate)
    return NaturalAscent(family.natural, learning_rate * min(1.0, 6 * family.dim / family.size))


def maximize_local_elbo(
    bound: LocalELBO,
    q_params: Tensor,
    x: Tensor,
    index: Tensor | None = None,
    *,
    steps: int,
    rule: UpdateRule | None = None,
    tolerance: float = 0.002,
    seed: int = 0,
) -> RefinementResult:
    """Refine q_params [B, P] until the rows come to rest, watched under noise that is common to all looks.

    Arguments:
        bound: the datapoints' own bound.
        q_params: where to start.
        x, index: the rows.
        steps: the most steps to make.
        rule: how a gradient becomes a step.
        tolerance: stop when doubling the steps wins less than this, in nats on average.
        seed: of the noise; the random stream outside is left alone.
    """

    def check(q_params: Tensor) -> Tensor:
        with seeded(seed + 1):
            return bound(q_params, x, index, CHECK_DRAWS)

    with seeded(seed):
        return refine(
            lambda q_params: bound(q_params, x, index, REFINE_DRAWS),
            q_params,
            steps,
            rule=rule,
            check=check,
            tolerance=tolerance,
        )
