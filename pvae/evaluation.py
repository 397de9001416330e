"""Evaluation: bounds, evidence and gaps of each datapoint, by the waist and by refinement."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from torch import Tensor

from pvae.errors import UserError
from pvae.guides import NEW_DRAWS, Guide, ascent, local_bound, local_optimum
from pvae.refine import RowAdam, refine
from pvae.runtime import module_of, seeded, unchecked
from pvae.stats import Estimate, log_mean_exp, mean_se
from pvae.weights import LogWeights, Program, log_weights

__all__ = ["Budget", "Evaluation", "RefinementCurve", "bounds", "evaluate", "reconstruct", "refinement_curve", "sample"]

# Datapoints that are evaluated together.
ROWS = 250


@dataclass(frozen=True)
class Budget:
    """What an evaluation may cost.

    Attributes:
        K: draws for each datapoint and bound.
        steps: the most refinement steps in search of the best lam of the family.
    """

    K: int = 1000
    steps: int = 300


@dataclass(frozen=True)
class Evaluation:
    """Quantities of each datapoint in nats, by name, [B] each, and what it took.

    ``elbo``, ``iwae``, ``kl``, ``reconstruction`` belong to the guide; ``best_elbo`` to the best lam of its family
    that refinement found; ``evidence`` is IWAE-K from there, a lower bound of log p(x) in expectation, as ``iwae`` is.
    ``approximation_gap`` = evidence - best_elbo, ``amortization_gap`` = best_elbo - elbo under common noise, with its
    Monte Carlo error ``amortization_gap_se`` for each datapoint; ``inference_gap`` is their sum. ``optimization_gap``
    is what the search for the best may have left (see :class:`~pvae.refine.Refined`).

    A point-mass family has ``log_joint`` and ``reconstruction`` alone: it bounds no evidence.
    """

    values: dict[str, Tensor]
    K: int
    seconds: float

    def summary(self) -> dict[str, Estimate]:
        """Mean over datapoints and standard error of every quantity."""
        return {name: mean_se(values) for name, values in self.values.items() if not name.endswith("_se")}


@dataclass(frozen=True)
class RefinementCurve:
    """What refinement steps buy: the ELBO after ``steps[m]`` steps, [M, B] nats, and the price of one step.

    Attributes:
        seconds_per_step: of wall time, for one step of one datapoint in a batch.
    """

    steps: tuple[int, ...]
    elbo: Tensor
    seconds_per_step: float


def bounds(
    model: Program, guide: Program, x: Tensor, index: Tensor | None = None, *, K: int = 100, seed: int = 0
) -> Evaluation:
    r"""ELBO, IWAE-K, KL and reconstruction of each datapoint under a guide, from K draws each.

    Arguments:
        model, guide: Pyro programs of one signature.
        x, index: rows [B, D] and which training datapoints they are; None for new ones.
        K: draws for each datapoint.
        seed: of the draws; the random stream outside is left alone.

    Source of IWAE: Burda, Grosse, Salakhutdinov (2016), arXiv:1509.00519.
    """

    def judge(rows: _Rows) -> dict[str, Tensor]:
        return _bounds(_common(model, rows.q, rows, K), guide)

    return _collect(model, guide, x, index, K, seed, judge)


def evaluate(
    model: Program,
    guide: Guide,
    x: Tensor,
    index: Tensor | None = None,
    *,
    budget: Budget | None = None,
    seed: int = 0,
    progress: Callable[[int], None] = lambda rows: None,
) -> Evaluation:
    r"""All quantities of :class:`Evaluation`: the bounds, and the gap between ELBO and evidence split into its causes.

    .. math::
        \log p(x) - \mathrm{ELBO}(\lambda) = \underbrace{\log p(x) - \mathrm{ELBO}(\lambda^*)}_{\text{approximation}}
        + \underbrace{\mathrm{ELBO}(\lambda^*) - \mathrm{ELBO}(\lambda)}_{\text{amortization}}

    Arguments:
        model: a Pyro program.
        guide: a family with a source of its parameters.
        x, index: rows [B, D] and which training datapoints they are; None for new ones.
        budget: draws and refinement steps.
        seed: of all noise.
        progress: called with the number of rows done.

    The search for lam* starts at the guide's lam and once more, by another rule, at the family's initial one; the
    best of both ends and of the guide's own lam counts.

    Source: Cremer, Li, Duvenaud (2018), *Inference Suboptimality in Variational Autoencoders*, arXiv:1801.03558.
    """
    budget = budget or Budget()
    family = guide.family

    def judge(rows: _Rows) -> dict[str, Tensor]:
        own = _common(model, rows.q, rows, budget.K)
        values = _bounds(own, guide)
        if not family.point_mass:
            values |= _gaps(model, guide, rows, budget, own)
        progress(len(rows.x))
        return values

    return _collect(model, guide, x, index, budget.K, seed, judge)


def refinement_curve(
    model: Program,
    guide: Guide,
    x: Tensor,
    index: Tensor | None = None,
    *,
    steps: Sequence[int] = (1, 2, 5, 10, 20, 50, 100),
    seed: int = 0,
) -> RefinementCurve:
    """The ELBO of the guide's lam after so many refinement steps, under noise common to all of them."""
    bound, rule = local_bound(model, guide.family, guide.sites), ascent(guide.family)
    curves, seconds = [], 0.0
    with unchecked():
        for rows in _batches(guide, x, index, seed):
            watched = local_optimum(
                bound, rows.lam, rows.x, rows.index, steps=max(steps), rule=rule, tolerance=-torch.inf, seed=rows.seed
            )
            curves.append(watched.curve[[watched.marks.index(s) for s in (0, *steps)]])
            start = time.perf_counter()
            with seeded(rows.seed):
                refine(partial(bound, x=rows.x, index=rows.index, K=NEW_DRAWS), rows.lam, 10, rule=rule)
            seconds += (time.perf_counter() - start) / 10
    return RefinementCurve((0, *steps), torch.cat(curves, 1), seconds / len(x))


def reconstruct(model: Program, guide: Program, x: Tensor, index: Tensor | None = None, *, seed: int = 0) -> Tensor:
    """Mean of p(x|z) at one draw of z from the guide, [B, D]."""
    with seeded(seed), torch.no_grad():
        trace = poutine.trace(guide).get_trace(x, index)
        return _observed_mean(poutine.replay(model, trace=trace), x, index)


def sample(model: Program, like: Tensor, *, seed: int = 0) -> Tensor:
    """Mean of p(x|z) at draws of z from the prior, as many and of the shape as the rows ``like`` [B, D]."""
    with seeded(seed), torch.no_grad():
        return _observed_mean(model, like, torch.zeros(len(like), dtype=torch.long, device=like.device))


def _observed_mean(program: Program, x: Tensor, index: Tensor | None) -> Tensor:
    trace: Any = poutine.trace(program).get_trace(x, index)
    for site in trace.nodes.values():
        if site["type"] == "sample" and site["is_observed"] and site["value"].dim() == x.dim():
            return site["fn"].mean
    raise UserError("the program observes no site of the data's shape")


class _Rows(NamedTuple):
    """Datapoints that are evaluated together: their fixed posterior, its parameters where it has any, their noise."""

    x: Tensor
    index: Tensor | None  # type: ignore[assignment]
    q: Program
    lam: Tensor
    seed: int


def _batches(guide: Program, x: Tensor, index: Tensor | None, seed: int) -> Iterator[_Rows]:
    for number, start in enumerate(range(0, len(x), ROWS)):
        part = slice(start, start + ROWS)
        rows, which, own = x[part], None if index is None else index[part], seed + 100 * number
        if not isinstance(guide, Guide):
            yield _Rows(rows, which, guide, rows.new_zeros(len(rows), 0), own)
            continue
        with seeded(own), torch.no_grad():
            lam = guide.params(rows, which).detach()
        yield _Rows(rows, which, guide.at(lam), lam, own)


def _common(model: Program, q: Program, rows: _Rows, K: int, stream: int = 2) -> LogWeights:
    """Log-weights under noise that depends on the rows alone, so that two posteriors are compared without it."""
    with seeded(rows.seed + stream):
        return log_weights(model, q, rows.x, rows.index, K)


def _bounds(w: LogWeights, guide: Program) -> dict[str, Tensor]:
    if isinstance(guide, Guide) and guide.family.point_mass:
        return {"log_joint": (w.log_lik + w.log_prior).mean(0), "reconstruction": w.log_lik.mean(0)}
    return {
        "elbo": w.log_w.mean(0),
        "iwae": log_mean_exp(w.log_w),
        "kl": (w.log_q - w.log_prior).mean(0),
        "reconstruction": w.log_lik.mean(0),
    }


def _gaps(model: Program, guide: Guide, rows: _Rows, budget: Budget, own: LogWeights) -> dict[str, Tensor]:
    best, left = _best(model, guide, rows, budget)
    found = _common(model, guide.at(best), rows, budget.K)
    gain = found.log_w - own.log_w
    evidence, best_elbo = log_mean_exp(found.log_w), found.log_w.mean(0)
    return {
        "best_elbo": best_elbo,
        "evidence": evidence,
        "approximation_gap": evidence - best_elbo,
        "amortization_gap": gain.mean(0),
        "amortization_gap_se": gain.std(0) / budget.K**0.5,
        "inference_gap": evidence - own.log_w.mean(0),
        "optimization_gap": left,
    }


def _best(model: Program, guide: Guide, rows: _Rows, budget: Budget) -> tuple[Tensor, Tensor]:
    """The best lam of the family that two different searches find, [B, P], and what the search may have left, [B]."""
    family, bound = guide.family, local_bound(model, guide.family, guide.sites)
    fresh = family.initial().to(rows.lam).expand_as(rows.lam)
    found = [
        local_optimum(bound, start, rows.x, rows.index, steps=budget.steps, rule=rule, seed=rows.seed)
        for start, rule in ((rows.lam, ascent(family)), (fresh, RowAdam()))
    ]
    # Chosen on draws that the reported bounds do not use, so that the choice does not flatter them.
    candidates = torch.stack([rows.lam, *(f.lam for f in found)])
    judged = [_common(model, guide.at(lam), rows, budget.K, stream=3).log_w.mean(0) for lam in candidates]
    best = torch.stack(judged).argmax(0)
    left = torch.stack([f.gap for f in found]).amin(0)
    return candidates[best, torch.arange(len(best), device=best.device)], left


def _collect(
    model: Program,
    guide: Program,
    x: Tensor,
    index: Tensor | None,
    K: int,
    seed: int,
    judge: Callable[[_Rows], dict[str, Tensor]],
) -> Evaluation:
    """Apply ``judge`` to batches of rows, each under a posterior that stays fixed for all draws."""
    start = time.perf_counter()
    for program in (model, guide):
        module_of(program).eval()
    with torch.no_grad(), unchecked(), pyro.get_param_store().scope():
        parts = []
        for rows in _batches(guide, x, index, seed):
            with seeded(rows.seed):
                parts.append(judge(rows))
    values = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return Evaluation(values, K, time.perf_counter() - start)
