"""Refinement: gradient ascent of each datapoint's ELBO over its own variational parameters, batched over datapoints.

`refine` serves semi-amortized guides, the rows of a per-datapoint guide, new rows, and the gaps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol

import pyro
import torch
from pyro import poutine
from torch import Tensor

from pvae.inference.batching import tile_rows
from pvae.inference.families import Family
from pvae.inference.importance import score_draws
from pvae.inference.latents import LatentSites, real_vector_latent
from pvae.runtime.pyro_params import Program
from pvae.runtime.torch_state import seeded
from pvae.runtime.tracing import AutoTraced

# Steps after which the bound is checked: each has another one at about half its steps before it.
CHECK_STEPS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000)

# Draws of a step, and of a check, in the search for a datapoint's optimum.
REFINE_DRAWS, CHECK_DRAWS = 8, 100

MIN_STEPS_TO_TRACE = 100  # from which on tracing one pays


class RowState(NamedTuple):
    """Optimizer state of each row: first and second moment [B, P], and the number of the row's own steps [B]."""

    exp_avg: Tensor
    exp_avg_sq: Tensor
    steps: Tensor


class UpdateRule(Protocol):
    """Maps gradients to steps of ascent, by each row's state alone, so that gradients pass through it."""

    def start(self, q_params: Tensor) -> RowState: ...

    def step(self, q_params: Tensor, gradient: Tensor, state: RowState) -> tuple[Tensor, RowState]: ...


@dataclass(frozen=True)
class RowAdam:
    r"""Adam with moments and a step count for each row, at a learning rate that decays with the row's steps t.

    .. math:: \lambda \leftarrow \lambda + \frac{r}{\sqrt{1 + t / \tau}} \frac{\hat m}{\sqrt{\hat v + \epsilon^2}}

    Arguments:
        learning_rate: r, in units of q_params.
        decay_steps: tau, steps after which the rate decays, without which a row would not converge.

    Epsilon keeps the step finite, and its derivative too, where a gradient is zero.

    Source: Kingma and Ba (2015), *Adam*, arXiv:1412.6980.

    >>> rule = RowAdam(0.1, decay_steps=1e9)
    >>> q_params = torch.zeros(2, 3)
    >>> q_params, state = rule.step(q_params, torch.ones(2, 3), rule.start(q_params))
    >>> q_params[0]
    tensor([0.1000, 0.1000, 0.1000])
    """

    learning_rate: float = 0.1
    decay_steps: float = 20.0

    def start(self, q_params: Tensor) -> RowState:
        zeros = torch.zeros_like(q_params, requires_grad=False)
        return RowState(zeros, zeros, torch.zeros(len(q_params), dtype=torch.int32, device=q_params.device))

    def step(self, q_params: Tensor, gradient: Tensor, state: RowState) -> tuple[Tensor, RowState]:
        beta_1, beta_2, eps = 0.9, 0.999, 1e-8
        exp_avg = beta_1 * state.exp_avg + (1 - beta_1) * gradient
        exp_avg_sq = beta_2 * state.exp_avg_sq + (1 - beta_2) * gradient * gradient
        steps = state.steps + 1
        t = steps.to(q_params.dtype).unsqueeze(-1)
        rate = self.learning_rate * (1 + (t - 1) / self.decay_steps).rsqrt()
        mean, square = exp_avg / (1 - beta_1**t), exp_avg_sq / (1 - beta_2**t)
        return q_params + rate * mean * (square + eps**2).rsqrt(), RowState(exp_avg, exp_avg_sq, steps)


@dataclass(frozen=True)
class NaturalAscent:
    r"""Natural gradient steps, :math:`\lambda \leftarrow \lambda + r F(\lambda)^{-1} g`, at a falling rate.

    Steps are in units of the posterior: r moves a mean by about r standard deviations for a gradient of one nat each.
    No moments are kept, so that unrolled steps stay smooth.

    Arguments:
        natural_gradient: maps q_params and gradient to F(q_params)^-1 gradient, see `Family.natural_gradient`.
        learning_rate: r; 1 jumps to the optimum of a single latent with a Gaussian posterior.
        decay_steps: tau, steps after which the rate decays.

    Source: Amari (1998), *Natural Gradient Works Efficiently in Learning*, Neural Computation 10.
    """

    natural_gradient: Callable[[Tensor, Tensor], Tensor]
    learning_rate: float = 0.2
    decay_steps: float = 20.0

    def start(self, q_params: Tensor) -> RowState:
        nothing = q_params.new_zeros(len(q_params), 0)
        return RowState(nothing, nothing, torch.zeros(len(q_params), dtype=torch.int32, device=q_params.device))

    def step(self, q_params: Tensor, gradient: Tensor, state: RowState) -> tuple[Tensor, RowState]:
        rate = self.learning_rate * (1 + state.steps.to(q_params.dtype) / self.decay_steps).rsqrt().unsqueeze(-1)
        uphill = self.natural_gradient(q_params, gradient).clamp(-1, 1)  # lest rows that start far off diverge
        return q_params + rate * uphill, RowState(state.exp_avg, state.exp_avg_sq, state.steps + 1)


class RefinementResult(NamedTuple):
    """Refined q_params [B, P] of rows, and how the search went; without ``check``, its values are NaN or empty.

    Attributes:
        value: the checked bound at q_params, [B] nats.
        state: the rule's state of each row, to go on from.
        steps: number of steps made.
        check_steps, curve: when the bound was checked, from step 0, and its values at the plain iterate, [M, B] nats.
        optimization_gap: nats that each row gained by at least doubling its steps, [B], an estimate of what more steps
            would gain. As the checks share their noise, it may be too small, by up to 0.01 nats where measured.
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
            ``CHECK_STEPS``, and the best of the iterate and of its mean since the last check is kept for each row.
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

    def ascend(q_params: Tensor, *moments: Tensor) -> tuple[Tensor, ...]:
        q_params = q_params if unroll and q_params.requires_grad else q_params.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(bound(q_params).sum(), q_params, create_graph=unroll)
        q_params, after = rule.step(q_params if unroll else q_params.detach(), gradient, RowState(*moments))
        return q_params, *after

    step = ascend if unroll or steps < MIN_STEPS_TO_TRACE else AutoTraced(ascend)
    stopping = _EarlyStopping(q_params, check, tolerance) if check else None
    done = 0
    with torch.enable_grad():
        for done in range(1, steps + 1):
            q_params, *moments = step(q_params, *state)
            state = RowState(*moments)
            if stopping and stopping.update(q_params, done, last=done == steps):
                break
    if stopping:
        checked, curve = tuple(stopping.checked), torch.stack(stopping.curve)
        return RefinementResult(stopping.best, stopping.value, state, done, checked, curve, stopping.gap)
    unknown = q_params.new_full((len(q_params),), torch.nan)
    return RefinementResult(q_params, unknown, state, done, (), q_params.new_zeros(0, len(q_params)), unknown)


class _EarlyStopping:
    """Checks a refinement at given steps, keeps the best q_params of each row, and decides when to stop."""

    def __init__(self, q_params: Tensor, check: Callable[[Tensor], Tensor], tolerance: float) -> None:
        self.check, self.tolerance = torch.no_grad()(check), tolerance
        self.best, self.value = q_params, self.check(q_params)
        self.checked, self.curve, self.best_values = [0], [self.value], [self.value]
        self.gap = torch.full_like(self.value, torch.inf)
        self.total, self.count = torch.zeros_like(q_params), 0

    def _keep_best(self, q_params: Tensor) -> Tensor:
        value = self.check(q_params)
        better = value > self.value
        self.best = torch.where(better.unsqueeze(-1), q_params, self.best)
        self.value = torch.where(better, value, self.value)
        return value

    def update(self, q_params: Tensor, done: int, *, last: bool) -> bool:
        """Return whether to stop after ``done`` steps."""
        self.total, self.count = self.total + q_params, self.count + 1
        if not (last or done in CHECK_STEPS):
            return False
        self.curve.append(self._keep_best(q_params))
        if self.count > 1:
            self._keep_best(self.total / self.count)
        self.total, self.count = torch.zeros_like(q_params), 0
        self.checked.append(done)
        self.best_values.append(self.value)
        half = max(i for i, step in enumerate(self.checked) if step <= done / 2)
        self.gap = self.value - self.best_values[half]
        return done >= 20 and self.gap.mean().item() < self.tolerance


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

    With ``path_gradient`` gradients leave out the score of q, whose mean is zero: they have no noise where q is exact
    (Roeder, Wu, Duvenaud 2017, arXiv:1703.09194).
    """

    model: Program
    family: Family
    sites: LatentSites | None = None
    path_gradient: bool = False

    def __call__(
        self, q_params: Tensor, x: Tensor, index: Tensor | None = None, K: int = 1, kl_weight: float | Tensor = 1.0
    ) -> Tensor:
        r"""Compute the ELBO of rows x [B, ...], :math:`E_q[\log p(x|z)] - \beta\, KL(q \| p)`, by K draws, [B] in nats.

        A KL weight beta other than 1 is for training alone.
        """
        # K copies of the rows, not a plate of samples: the bound may run inside a trace that has one already, and
        # must not show there.
        rows, q = tile_rows(x, index, slice(0, K)), fixed_guide(self.family, q_params.repeat(K, 1), self.sites)
        with poutine.block():
            w = score_draws(self.model, q, *rows, path_gradient=self.path_gradient)
        return (w.log_lik + kl_weight * (w.log_prior - w.log_q)).view(K, -1).mean(0)


def default_update_rule(family: Family, learning_rate: float = 0.2) -> UpdateRule:
    """Return natural gradient steps if the family knows its Fisher information, else `RowAdam`."""
    if not family.has_natural_gradient:
        return RowAdam(learning_rate)
    # Noise grows with the q_params of a dimension: full rank has 26 at D = 50, where steps of 0.2 with 8 draws diverge.
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
        steps: the most steps to make.
        rule: maps gradients to steps; `RowAdam` unless given.
        tolerance: stop when at least doubling the steps gains less than this, in nats on average over rows.
        seed: of the noise; the random stream outside is left alone.
    """
    check = seeded(seed + 1)(partial(local_elbo, x=x, index=index, K=CHECK_DRAWS))
    bound = partial(local_elbo, x=x, index=index, K=REFINE_DRAWS)
    with seeded(seed):
        return refine(bound, q_params, steps, rule=rule, check=check, tolerance=tolerance)
