"""Battery of diagnostics: its budgets, and the tasks that make it up."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from functools import cache, cached_property, partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pvae.diagnostics.calibration import Calibration, calibrate
from pvae.diagnostics.evaluation import bounds
from pvae.diagnostics.latent_usage import LatentUsage, measure_latent_usage
from pvae.diagnostics.predictive_checks import PredictiveChecks, run_predictive_checks
from pvae.diagnostics.reference_posterior import ReferencePosterior, compare_with_reference
from pvae.diagnostics.symmetric_divergence import SymmetricDivergence, measure_symmetric_divergence
from pvae.errors import AllChainsDiverged
from pvae.inference.guides import Guide, RefinedGuide
from pvae.inference.posterior import freeze
from pvae.runtime.pyro_params import Program
from pvae.samplers.ais import sandwich
from pvae.samplers.log_joint import LogJoint
from pvae.samplers.posterior_draws import PosteriorDraws
from pvae.samplers.row_posterior import ACCURACIES, Accuracy, draw_rows, posterior
from pvae.stats import UNRELIABLE, Estimate, draws_needed, mean_se

TASK_ROWS = 25  # few, so that a long job can stop and go on anywhere, and shows its progress
CHECKED_PASSES, REFERENCE_PASSES = (
    5_000,
    12_000,
)  # about what a row's quick, and its reference draws take beside K: particles, a fit


@dataclass(frozen=True)
class DiagnosisBudget:
    """Size of a diagnosis, from which its cost follows.

    Attributes:
        rows, draws, steps: diagnosed rows, K importance draws of each, and the most refinement steps of a row.
        annealed, temperatures, chains: simulated rows whose evidence AIS puts between two bounds; of AIS.
        simulated: rows that are simulated for calibration.
        references, reference_draws: rows of which reference draws are made; draws of each.
    """

    rows: int
    draws: int
    steps: int
    annealed: int
    temperatures: int
    chains: int
    simulated: int
    references: int
    reference_draws: int

    @property
    def accuracy(self) -> Accuracy:
        """Of the reference draws: a fifth of them effective, many particles that look for modes."""
        return Accuracy(self.reference_draws, self.reference_draws // 5, 16, 30, 48, 60, 1000)

    def passes(self) -> dict[str, int]:
        """Return about how many rows each kind of task passes through the decoder; a gradient counts as two more."""
        refine = 24 * self.steps
        return {
            "weights": self.rows * (2 * self.draws + refine),
            "sandwich": 2 * 3 * 5 * self.annealed * self.chains * self.temperatures,
            "calibration": self.simulated * refine,
            "symmetric": 2 * self.simulated * self.draws,
            "reference": self.references * (REFERENCE_PASSES + 4 * self.reference_draws),
            "health": self.rows * CHECKED_PASSES,
            "predictive": self.rows * (refine + 200 + 2 * self.draws),
        }


DIAGNOSIS_BUDGETS = {
    "quick": DiagnosisBudget(200, 500, 100, 20, 200, 8, 200, 40, 2000),
    "standard": DiagnosisBudget(500, 1000, 300, 50, 500, 16, 500, 100, 4000),
    "thorough": DiagnosisBudget(1000, 5000, 1000, 100, 5000, 16, 2000, 200, 10_000),
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
    """Lower and upper bound of the evidence of simulated rows by annealing, and its estimate by draws, [B] nats."""

    lower: Tensor
    upper: Tensor
    evidence: Tensor

    def summary(self) -> dict[str, Estimate]:
        """Return the nats from the evidence by draws to the upper bound, over rows where annealing did not diverge."""
        width = self.upper - self.evidence
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
    "reference": ReferencePosterior,
    "symmetric": SymmetricDivergence,
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
        """The guide and the same guide refined, once for all tasks, by their words in names of parts."""
        refined = RefinedGuide(self.guide, self.model, steps=self.budget.steps).eval()
        return {"guide": self.guide, "best": freeze(self.model, refined, self.x, self.index, seed=self.seed)}

    def list_tasks(self) -> Iterator[Task]:
        """Yield the tasks, cheap ones first; run each before the next is asked for: tasks share the chains of rows."""
        budget, cost = self.budget, self.budget.passes()
        yield Task("rows", 0, lambda: Rows(self.x, self.labels))
        if self.guide.family.point_mass:
            yield from self._usage_and_fit(self.guide, self.guide)
            return
        yield from self._usage_and_fit(self.guide, self.posteriors["best"])
        yield Task("health-best", cost["health"] / 2, self._usage_of_draws)
        for who, q in self.posteriors.items():
            yield Task(f"weights-{who}", cost["weights"] / 2, partial(self._weights, q))
        simulated: Any = {"rows": budget.simulated, "seed": self.seed}
        for who, q in self.posteriors.items():
            work = partial(calibrate, self.model, q, self.x, **simulated)
            yield Task(f"calibration-{who}", cost["calibration"] / 2, work)
            divergence = partial(measure_symmetric_divergence, self.model, q, self.x, **simulated)
            yield Task(f"symmetric-{who}", cost["symmetric"] / 2, divergence)
        for rows in _slices(budget.annealed):
            share = (rows.stop - rows.start) / budget.annealed
            yield Task(f"sandwich.{rows.start:05}", cost["sandwich"] * share, partial(self._bounds, rows))
        draws = cache(self._reference_draws)
        for who, q in self.posteriors.items():
            yield Task(f"reference-{who}", cost["reference"] / 2, partial(self._compare_with_reference, draws, q))

    def _usage_and_fit(self, q: Guide, best: Guide) -> Iterator[Task]:
        """Yield latent usage under q, and predictive checks of the model under the best q there is."""
        budget, cost, rows = self.budget, self.budget.passes(), (self.x, self.index)
        yield Task("health", cost["health"] / 2, partial(measure_latent_usage, self.model, q, *rows, seed=self.seed))
        options: Any = {"K": budget.draws, "steps": budget.steps, "seed": self.seed}
        checks = partial(run_predictive_checks, self.model, best, *rows, **options)
        yield Task("predictive", cost["predictive"], checks)

    def _usage_of_draws(self) -> LatentUsage:
        """Measure latent usage of the refined q, with the aggregate of each row's checked draws."""
        about = (self.model, self.posteriors["best"], self.x, self.index)
        quick = ACCURACIES["quick"]._replace(length=0)
        draws = posterior(*about, accuracy=quick, seed=self.seed).resample(1, seed=self.seed)
        return measure_latent_usage(*about, codes=draws[0], permutations=1000, seed=self.seed)

    def _weights(self, q: Guide) -> Weights:
        values = bounds(self.model, q, self.x, self.index, K=self.budget.draws, seed=self.seed).values
        return Weights(**{name: values[name] for name in ("elbo", "iwae", "k_hat", "ess")})

    def _bounds(self, rows: slice) -> Bounds:
        like = self.x[torch.arange(rows.start, rows.stop, device=self.x.device) % len(self.x)]
        chains, temperatures, seed = self.budget.chains, self.budget.temperatures, self.seed + 1000 * rows.start
        try:
            bracket = sandwich(self.model, like, chains=chains, temperatures=temperatures, seed=seed)
        except AllChainsDiverged:
            return Bounds(*torch.full((3, len(like)), torch.nan))
        target = LogJoint(self.model, bracket.x, None, self.guide.sites)
        draws = draw_rows(target, None, self.budget.accuracy._replace(length=0), scouts=bracket.forward, seed=seed)
        evidence = torch.where(draws.reliable, draws.log_evidence.to(bracket.lower), bracket.lower)
        return Bounds(bracket.lower, bracket.upper, evidence)

    def _reference_draws(self) -> PosteriorDraws:
        rows, seed = self._batch(slice(self.budget.references)), self.seed
        return posterior(self.model, None, *rows, accuracy=self.budget.accuracy, seed=seed)

    def _compare_with_reference(self, draws: Callable[[], PosteriorDraws], q: Guide) -> ReferencePosterior:
        rows = self._batch(slice(self.budget.references))
        return compare_with_reference(self.model, q, *rows, draws=draws(), seed=self.seed)

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
        if isinstance(result, Mapping) and result.keys() != {field.name for field in fields(kind_of(name))}:
            continue  # of an earlier version
        batch = kind_of(name)(**result) if isinstance(result, Mapping) else result
        parts.setdefault(name.partition(".")[0], []).append(batch)
    return {part: batches[0] if len(batches) == 1 else _concatenate(batches) for part, batches in parts.items()}


def _concatenate(batches: list[Any]) -> Any:
    """Concatenate batches of rows of one kind; tensors without rows are the first one's."""
    values = {name: [getattr(batch, name) for batch in batches] for name in vars(batches[0])}
    return type(batches[0])(**{name: torch.cat(v) if v[0].dim() else v[0] for name, v in values.items()})
