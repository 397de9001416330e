"""Battery of diagnostics: its budgets, and the tasks that make it up."""

from __future__ import annotations

import math
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

# Rows of a task: few, so that a long job can stop and go on anywhere, and shows its progress.
TASK_ROWS = 10
# Mean leapfrog steps of a transition of long chains: about a quarter of a period at usual step sizes, after which a
# draw has forgotten the one before. Transitions of their warm-up, and chains for each row.
LEAPFROGS, WARM_UP, CHAINS = 3, 300, 8


@dataclass(frozen=True)
class DiagnosisBudget:
    """Size of a diagnosis, from which its cost follows.

    Attributes:
        rows: rows whose importance weights, latents and columns are diagnosed.
        draws: K, for each of them.
        steps: the most refinement steps of a row.
        annealed: simulated rows whose evidence AIS puts between two bounds.
        temperatures, chains: of AIS.
        simulated: rows that are simulated for calibration.
        references: rows that long HMC chains are run for.
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
    """Diagnosed rows [B, ...] and their labels [B]; no labels where the data have none."""

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
    """Importance weights of rows under a posterior: bounds in nats, Pareto k-hat, effective sample size, [B] each."""

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


class Task(NamedTuple):
    """Piece of a diagnosis whose result is cached: its name, about how many decoder passes it takes, and the work.

    A name is a key of ``KINDS``, then the posterior's after a dash, then the number of the first row after a dot.
    """

    name: str
    passes: float
    compute: Callable[[], Any]

    @property
    def part(self) -> str:
        """Name of the part that the result belongs to: without the number."""
        return self.name.partition(".")[0]

    @property
    def kind(self) -> type:
        return KINDS[self.part.partition("-")[0]]


@dataclass(frozen=True)
class Battery:
    """Battery of diagnostics of a guide, and of the same guide refined, on rows.

    Arguments:
        model, guide: a Pyro program and its approximate posterior.
        x, index: rows [B, ...], and which training datapoints they are; None for new rows.
        labels: [B], or empty.
        budget: the battery's size.
        seed: of all noise.
    """

    model: Program
    guide: Guide
    x: Tensor
    index: Tensor | None
    labels: Tensor
    budget: DiagnosisBudget
    seed: int

    @cached_property
    def posteriors(self) -> dict[str, Guide]:
        """The guide and the same guide refined, by the words that stand for them in names of parts."""
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
        like = torch.arange(rows.start, rows.stop, device=self.x.device) % len(self.x)
        bracket = sandwich(
            self.model,
            self.x[like],
            chains=self.budget.chains,
            temperatures=self.budget.temperatures,
            seed=self.seed + 1000 * rows.start,
        )
        return Bounds(bracket.lower, bracket.upper)

    def _chains(self, rows: slice) -> Chains:
        return run_long_chains(
            self.model,
            *self._batch(rows),
            self.guide.sites,
            chains=CHAINS,
            draws=self.budget.length,
            warm_up=WARM_UP,
            num_integration_steps=LEAPFROGS,
            seed=self.seed + rows.start,
        )

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
    pieces: dict[str, list[Any]] = {}
    for name, result in results.items():
        task = Task(name, 0, lambda: None)
        pieces.setdefault(task.part, []).append(task.kind(**result) if isinstance(result, Mapping) else result)
    return {part: _concatenate(batches) for part, batches in pieces.items()}


def _concatenate(batches: list[Any]) -> Any:
    """Concatenate batches of rows of one kind; tensors without rows are the first one's."""
    if len(batches) == 1:
        return batches[0]
    values = {
        name: torch.cat([getattr(batch, name) for batch in batches]) if value.dim() else value
        for name, value in vars(batches[0]).items()
    }
    return type(batches[0])(**values)
