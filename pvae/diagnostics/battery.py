"""Battery of diagnostics: its budgets, and the tasks that make it up."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property, partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pvae.diagnostics.calibration import Calibration, calibrate
from pvae.diagnostics.evaluation import bounds
from pvae.diagnostics.latent_usage import LatentUsage, measure_latent_usage
from pvae.diagnostics.mcmc_reference import MCMCReference, compare_with_chains, run_long_chains
from pvae.diagnostics.predictive_checks import PredictiveChecks, run_predictive_checks
from pvae.inference.guides import Guide, RefinedGuide
from pvae.runtime.pyro_params import Program
from pvae.samplers.ais import sandwich
from pvae.samplers.hmc import Chains
from pvae.stats import UNRELIABLE, Estimate, draws_needed, mean_se

TASK_ROWS = 10  # few, so that a long job can stop and go on anywhere, and shows its progress
# Of long chains: mean leapfrog steps of a transition (about a quarter of a period, after which a draw has forgotten the
# one before), transitions of the warm-up, and chains for each row.
LEAPFROGS, WARM_UP, CHAINS = 3, 300, 8


@dataclass(frozen=True)
class DiagnosisBudget:
    """Size of a diagnosis, from which its cost follows.

    Attributes:
        rows, draws, steps: diagnosed rows, K importance draws of each, and the most refinement steps of a row.
        annealed, temperatures, chains: simulated rows whose evidence AIS puts between two bounds; of AIS.
        simulated: rows that are simulated for calibration.
        references, length: rows that eight long HMC chains are run for; draws of each chain.
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
        """Return about how many rows each kind of task passes through the decoder; a gradient counts as two more."""
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
    """Diagnosed rows [B, ...] and their labels, [B] or empty."""

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
        """Return the nats between the bounds, over rows on which annealing did not diverge."""
        width = self.upper - self.lower
        return {"evidence_width": mean_se(width[width.isfinite()])}


@dataclass(frozen=True)
class Weights:
    """Bounds in nats, Pareto k-hat and effective sample size of rows' importance weights, [B] each."""

    elbo: Tensor
    iwae: Tensor
    k_hat: Tensor
    ess: Tensor

    def summary(self) -> dict[str, Estimate]:
        """Return means over rows, the share of rows with k-hat above 0.7, and the draws that half of the rows need."""
        above = (~(self.k_hat <= UNRELIABLE)).double()  # NaN, of a row whose weights are all zero, is above too
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


def kind_of(name: str) -> type:
    """Return the class of a task's result."""
    return KINDS[re.split("[-.]", name)[0]]


class Task(NamedTuple):
    """Piece of a diagnosis whose result is cached: its name, about how many decoder passes it takes, and the work.

    A name is a key of ``KINDS``, then the posterior's after a dash, then the number of the first row after a dot.
    """

    name: str
    passes: float
    compute: Callable[[], Any]


@dataclass(frozen=True)
class Battery:
    """Battery of diagnostics of a guide, and of the same guide refined, on rows [B, ...] with labels, [B] or empty."""

    model: Program
    guide: Guide
    x: Tensor
    index: Tensor | None
    labels: Tensor
    budget: DiagnosisBudget
    seed: int

    @cached_property
    def posteriors(self) -> dict[str, Guide]:
        """The guide and the same guide refined, by their words in names of parts."""
        return {"guide": self.guide, "best": RefinedGuide(self.guide, self.model, steps=self.budget.steps).eval()}

    def list_tasks(self) -> Iterator[Task]:
        """Yield the tasks, cheap ones first; run each before the next is asked for: tasks share the chains of rows."""
        budget, cost = self.budget, self.budget.passes()
        about = (self.model, self.guide, self.x, self.index)
        yield Task("rows", 0, lambda: Rows(self.x, self.labels))
        yield Task("health", cost["health"], partial(measure_latent_usage, *about, seed=self.seed))
        checks = partial(run_predictive_checks, *about, K=budget.draws, steps=budget.steps, seed=self.seed)
        yield Task("predictive", cost["predictive"], checks)
        if self.guide.family.point_mass:
            return
        for who, q in self.posteriors.items():
            yield Task(f"weights-{who}", cost["weights"] / 2, partial(self._weights, q))
        for who, q in self.posteriors.items():
            work = partial(calibrate, self.model, q, self.x, rows=budget.simulated, seed=self.seed)
            yield Task(f"calibration-{who}", cost["calibration"] / 2, work)
        for rows in _slices(budget.annealed):
            share = (rows.stop - rows.start) / budget.annealed
            yield Task(f"sandwich.{rows.start:05}", cost["sandwich"] * share, partial(self._bounds, rows))
        for rows in _slices(min(budget.references, len(self.x))):
            chains, share = cache(partial(self._chains, rows)), (rows.stop - rows.start) / budget.references
            for who, q in self.posteriors.items():
                compare = partial(self._compare_with_chains, chains, q, rows)
                yield Task(f"reference-{who}.{rows.start:05}", cost["reference"] * share / 2, compare)

    def _weights(self, q: Guide) -> Weights:
        values = bounds(self.model, q, self.x, self.index, K=self.budget.draws, seed=self.seed).values
        return Weights(**{name: values[name] for name in ("elbo", "iwae", "k_hat", "ess")})

    def _bounds(self, rows: slice) -> Bounds:
        like = self.x[torch.arange(rows.start, rows.stop, device=self.x.device) % len(self.x)]
        chains, temperatures, seed = self.budget.chains, self.budget.temperatures, self.seed + 1000 * rows.start
        bracket = sandwich(self.model, like, chains=chains, temperatures=temperatures, seed=seed)
        return Bounds(bracket.lower, bracket.upper)

    def _chains(self, rows: slice) -> Chains:
        length: Any = {"draws": self.budget.length, "warm_up": WARM_UP, "num_integration_steps": LEAPFROGS}
        seed = self.seed + rows.start
        return run_long_chains(self.model, *self._batch(rows), self.guide.sites, chains=CHAINS, seed=seed, **length)

    def _compare_with_chains(self, chains: Callable[[], Chains], q: Guide, rows: slice) -> MCMCReference:
        return compare_with_chains(chains(), q, *self._batch(rows), seed=self.seed + rows.start)

    def _batch(self, rows: slice) -> tuple[Tensor, Tensor | None]:
        return self.x[rows], None if self.index is None else self.index[rows]


def _slices(rows: int) -> Iterator[slice]:
    """Split rows into slices of ``TASK_ROWS`` each; the last one takes what is left over."""
    ends = [*range(TASK_ROWS, rows - TASK_ROWS + 1, TASK_ROWS), rows]
    return (slice(begin, end) for begin, end in pairwise([0, *ends]))


def join_parts(results: Mapping[str, Any]) -> dict[str, Any]:
    """Join the results of tasks, by name, into parts; results may be the tensors by name that a cache has loaded."""
    parts: dict[str, list[Any]] = {}
    for name, result in results.items():
        batch = kind_of(name)(**result) if isinstance(result, Mapping) else result
        parts.setdefault(name.partition(".")[0], []).append(batch)
    return {part: batches[0] if len(batches) == 1 else _concatenate(batches) for part, batches in parts.items()}


def _concatenate(batches: list[Any]) -> Any:
    """Concatenate batches of rows of one kind; tensors without rows are the first one's."""
    values = {name: [getattr(batch, name) for batch in batches] for name in vars(batches[0])}
    return type(batches[0])(**{name: torch.cat(v) if v[0].dim() else v[0] for name, v in values.items()})
