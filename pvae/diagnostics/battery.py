"""The stages of a diagnosis: how closely to look, and the pieces of work that make it up."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pvae.diagnostics.calibration import Calibration, calibrate
from pvae.diagnostics.evaluation import bounds
from pvae.diagnostics.latent_usage import LatentUsage, measure_latent_usage
from pvae.diagnostics.mcmc_reference import MCMCReference, compare_with_chains, run_long_chains
from pvae.diagnostics.predictive_checks import PredictiveChecks, run_predictive_checks
from pvae.inference.guides import Guide
from pvae.runtime.pyro_params import Program
from pvae.samplers.ais import sandwich
from pvae.samplers.hmc import Chains
from pvae.stats import UNRELIABLE, Estimate, draws_needed, mean_se

# Rows of a part: small, so that a long job can stop and go on anywhere, and shows how far it is.
SOME = 10
# Leapfrogs of a transition of long chains, on average: about a quarter of a period at usual steps, after which a draw
# has forgotten the one before. Transitions of their warm-up, and chains for each row.
LEAPFROGS, WARM_UP, CHAINS = 3, 300, 8


@dataclass(frozen=True)
class DiagnosisBudget:
    """How closely a diagnosis looks; its cost follows.

    Attributes:
        rows: test rows whose weights, codes and columns are looked at.
        draws: K, for each of them.
        steps: the most refinement steps of a row.
        annealed: simulated rows whose evidence is put between two bounds.
        temperatures, chains: of annealing.
        simulated: rows that are simulated for calibration.
        references: test rows that long chains are run for.
        length: draws of each of these eight chains.
    """

    rows: int
    draws: int
    steps: int
    annealed: int
    temperatures: int
    chains: int
    simulated: int
    references: int
    length: int

    def passes(self) -> dict[str, int]:
        """About how many rows go through the decoder in each stage; a gradient counts as two more."""
        refine = 24 * self.steps
        return {
            "weights": self.rows * (2 * self.draws + refine),
            "sandwich": 2 * 3 * 5 * self.annealed * self.chains * self.temperatures,
            "calibration": self.simulated * refine,
            "reference": self.references * (CHAINS * 3 * LEAPFROGS * (WARM_UP + self.length) + 2 * refine),
            "health": self.rows * 10,
            "predictive": self.rows * (refine + 200 + 2 * self.draws),
        }


DIAGNOSIS_BUDGETS = {
    "quick": DiagnosisBudget(200, 500, 100, 20, 200, 8, 200, 10, 600),
    "standard": DiagnosisBudget(500, 1000, 300, 50, 500, 16, 500, 50, 1000),
    "thorough": DiagnosisBudget(1000, 5000, 1000, 100, 5000, 16, 2000, 100, 4000),
}


@dataclass(frozen=True)
class Rows:
    """The test rows that are looked at, [B, ...], and their labels [B]; no labels where the data have none."""

    x: Tensor
    labels: Tensor

    def summary(self) -> dict[str, Estimate]:
        return {}


@dataclass(frozen=True)
class Bounds:
    """Lower and upper bound of the evidence of simulated rows, [B] nats."""

    lower: Tensor
    upper: Tensor

    def summary(self) -> dict[str, Estimate]:
        """Nats between the bounds, of the rows that annealing did not lose."""
        width = self.upper - self.lower
        return {"evidence_width": mean_se(width[width.isfinite()])}


@dataclass(frozen=True)
class Weights:
    """Of each test row under a q, [B]: bounds in nats, k-hat of its importance weights and their effective number."""

    elbo: Tensor
    iwae: Tensor
    k_hat: Tensor
    ess: Tensor

    def summary(self) -> dict[str, Estimate]:
        """Means over the rows, the share whose k-hat is above 0.7, and the draws that half of the rows need."""
        above = (~(self.k_hat <= UNRELIABLE)).double()  # a row whose weights are all zero has none, and is no better
        needed = Estimate(draws_needed(self.k_hat).median().item(), math.nan)
        means = {"ess": mean_se(self.ess), "iwae": mean_se(self.iwae)}
        return {"k_hat_above": mean_se(above), "draws_needed": needed} | means


KINDS: dict[str, type] = {
    "rows": Rows,
    "health": LatentUsage,
    "predictive": PredictiveChecks,
    "weights": Weights,
    "calibration": Calibration,
    "sandwich": Bounds,
    "reference": MCMCReference,
}


class Subject(NamedTuple):
    """A variant under diagnosis: its program, its guide, the same guide refined; and the rows."""

    name: str
    model: Program
    guide: Guide
    best: Guide
    x: Tensor
    labels: Tensor
    seed: int


class Task(NamedTuple):
    """A piece of work that the ledger keeps: its name, about how many decoder passes it takes, and the work.

    A name is that of what is made, the q of which it is made after a dash, and the number of its first row after a dot.
    """

    name: str
    passes: float
    compute: Callable[[], Any]

    @property
    def of(self) -> str:
        """The name without the number."""
        return self.name.partition(".")[0]

    @property
    def kind(self) -> type:
        return KINDS[self.of.partition("-")[0]]


def list_tasks(subject: Subject, plan: DiagnosisBudget) -> Iterator[Task]:
    """The pieces of work, cheap ones first; what follows a dot in a name numbers its batches of rows."""
    cost, model, x, seed = plan.passes(), subject.model, subject.x, subject.seed
    yield Task("rows", 0, lambda: Rows(x, subject.labels))
    yield Task("health", cost["health"], partial(measure_latent_usage, model, subject.guide, x, seed=seed))
    checks = partial(run_predictive_checks, model, subject.guide, x, K=plan.draws, steps=plan.steps, seed=seed)
    yield Task("predictive", cost["predictive"], checks)
    if subject.guide.family.point_mass:
        return
    both = (("guide", subject.guide), ("best", subject.best))
    for who, q in both:
        yield Task(f"weights-{who}", cost["weights"] / 2, partial(_weights, subject, q, plan))
    for who, q in both:
        work: Callable[[], Any] = partial(calibrate, model, q, x, rows=plan.simulated, seed=seed)
        yield Task(f"calibration-{who}", cost["calibration"] / 2, work)
    for batch in _batches(plan.annealed):
        work = partial(_bounds, subject, plan, batch)
        yield Task(f"sandwich.{batch.start:05}", cost["sandwich"] * (batch.stop - batch.start) / plan.annealed, work)
    for batch in _batches(min(plan.references, len(x))):
        chains = cache(partial(_chains, subject, plan, batch))
        for who, q in both:
            work = partial(_reference, chains, q, x[batch], seed + batch.start)
            cost_of = cost["reference"] * (batch.stop - batch.start) / plan.references / 2
            yield Task(f"reference-{who}.{batch.start:05}", cost_of, work)


def _batches(rows: int) -> Iterator[slice]:
    """Slices of some rows each; the last one takes what is left over."""
    ends = [*range(SOME, rows - SOME + 1, SOME), rows]
    return (slice(begin, end) for begin, end in pairwise([0, *ends]))


def _weights(subject: Subject, q: Guide, plan: DiagnosisBudget) -> Weights:
    found = bounds(subject.model, q, subject.x, K=plan.draws, seed=subject.seed).values
    return Weights(**{name: found[name] for name in ("elbo", "iwae", "k_hat", "ess")})


def _bounds(subject: Subject, plan: DiagnosisBudget, batch: slice) -> Bounds:
    rows = torch.arange(batch.start, batch.stop, device=subject.x.device) % len(subject.x)
    found = sandwich(
        subject.model,
        subject.x[rows],
        chains=plan.chains,
        temperatures=plan.temperatures,
        seed=subject.seed + 1000 * batch.start,
    )
    return Bounds(found.lower, found.upper)


def _chains(subject: Subject, plan: DiagnosisBudget, batch: slice) -> Chains:
    return run_long_chains(
        subject.model,
        subject.x[batch],
        None,
        subject.guide.sites,
        chains=CHAINS,
        draws=plan.length,
        warm_up=WARM_UP,
        num_integration_steps=LEAPFROGS,
        seed=subject.seed + batch.start,
    )


def _reference(chains: Callable[[], Chains], q: Guide, x: Tensor, seed: int) -> MCMCReference:
    return compare_with_chains(chains(), q, x, seed=seed)


def concatenate(pieces: list[Any]) -> Any:
    """One part of several batches of rows; what is not of rows is the first one's."""
    if len(pieces) == 1:
        return pieces[0]
    values = {
        name: torch.cat([getattr(p, name) for p in pieces]) if value.dim() else value
        for name, value in vars(pieces[0]).items()
    }
    return type(pieces[0])(**values)
