"""Evaluation: bounds, evidence and gaps of each datapoint, by the waist and by refinement."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import pyro
import torch
from torch import Tensor

from pvae.diagnostics.gaps import (
    Annealing,
    FamilyGain,
    PosteriorBatch,
    anneal_evidence,
    family_gain,
    find_best_params,
    paired_moments,
)
from pvae.errors import AllChainsDiverged, UserError, nearest
from pvae.inference.families import Family
from pvae.inference.guides import Guide
from pvae.inference.refinement import REFINE_DRAWS, LocalELBO, default_update_rule, maximize_local_elbo, refine
from pvae.inference.streaming import MIN_DRAWS_FOR_K_HAT, StreamingWeights
from pvae.runtime.pyro_params import Program, module_of
from pvae.runtime.result_cache import ResultCache
from pvae.runtime.torch_state import halve_on_oom, no_validation, seeded
from pvae.samplers.ais import inverse_temperatures as temperatures_of
from pvae.stats import Estimate, bootstrap, mean_se

# Datapoints that are evaluated together.
ROWS = 250

STARTS = ("prior", "guide")
# What a kept part calls the time that it took when it was made.
SECONDS = "seconds"


@dataclass(frozen=True)
class Budget:
    """What an evaluation may cost.

    Attributes:
        K: draws for each datapoint and bound.
        steps: the most refinement steps in search of the best q_params of the family.
        temperatures: of annealed importance sampling, see `anneal`; 0 goes without it.
        chains, schedule: of it.
        start: ``prior``, or ``guide`` for the best q_params of the guide's family.
        families: makers of other posterior families by name, from the number of dimensions; each is asked what it
            would buy, see `family_gains`.

    Raises:
        UserError: a count that is too small, an unknown schedule or start.
    """

    K: int = 1000
    steps: int = 300
    temperatures: int = 0
    chains: int = 16
    schedule: str = "sigmoid"
    start: str = "prior"
    families: Mapping[str, Callable[[int], Family]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, least in {"K": 1, "steps": 0, "temperatures": 0, "chains": 1}.items():
            if getattr(self, name) < least:
                raise UserError(f"budget: {name} is {getattr(self, name)}, but it must be at least {least}")
        temperatures_of(self.schedule, max(self.temperatures, 1))
        if self.start not in STARTS:
            raise UserError(f"budget: unknown start '{self.start}'{nearest(self.start, STARTS)}")

    @property
    def annealing(self) -> Annealing:
        """What concerns annealing alone."""
        return Annealing(self.temperatures, self.chains, self.schedule, self.start)


@dataclass(frozen=True)
class Evaluation:
    """Quantities of each datapoint in nats, by name, [B] each, and what it took.

    ``elbo``, ``iwae``, ``kl``, ``reconstruction`` belong to the guide, and so do ``ess``, the number of its draws that
    count, and ``k_hat``, the Pareto shape of its weights (from 30 draws on). ``best_elbo`` belongs to the best q_params of
    its family that refinement found, and ``best_iwae`` is IWAE-K from there. ``ais`` is annealed, with its mean
    acceptance probability ``ais_acceptance``, where the budget asks for it. ``evidence`` is that of ``best_iwae`` and
    ``ais`` with the highest mean over rows: each is a lower bound of log p(x) in expectation. ``estimator`` names it.

    ``approximation_gap`` = evidence - best_elbo, ``amortization_gap`` = best_elbo - elbo under common noise;
    ``inference_gap`` is their sum. ``optimization_gap`` is what the search for the best may have left (see
    `Refined`). ``best_elbo[F]`` and ``family_gain[F]`` belong to another family F of the budget.
    A name with ``_se`` is the Monte Carlo error for each datapoint of the name before it.

    A point-mass family has ``log_joint`` and ``reconstruction`` alone: it bounds no evidence.
    """

    values: dict[str, Tensor]
    K: int
    seconds: float
    estimator: str = ""

    def summary(self) -> dict[str, Estimate]:
        """Mean over datapoints and standard error of every quantity."""
        return {name: mean_se(values) for name, values in self.values.items() if not name.endswith("_se")}

    def intervals(self, level: float = 0.95) -> dict[str, tuple[float, float]]:
        """Bootstrap interval of each gap's mean over datapoints."""
        gaps = [name for name in self.values if name.endswith("_gap") or name.startswith("family_gain[")]
        return {name: bootstrap(self.values[name], level=level) for name in gaps if not name.endswith("_se")}


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
    model: Program,
    guide: Program,
    x: Tensor,
    index: Tensor | None = None,
    *,
    K: int = 100,
    seed: int = 0,
    ledger: ResultCache | None = None,
    prefix: str = "bounds",
) -> Evaluation:
    r"""ELBO, IWAE-K, KL, reconstruction and the weights' diagnostics of each datapoint, from K draws under a guide.

    Arguments:
        model, guide: Pyro programs of one signature.
        x, index: rows [B, D] and which training datapoints they are; None for new ones.
        K: draws for each datapoint, in memory that K does not change.
        seed: of the draws; the random stream outside is left alone.
        ledger, prefix: where finished batches of rows are kept, and what their names begin with.

    Source of IWAE: Burda, Grosse, Salakhutdinov (2016), arXiv:1509.00519.
    """

    def judge(rows: PosteriorBatch) -> dict[str, Tensor]:
        (own,), _ = paired_moments(model, [rows.q], rows, K)
        return _bounds(own, guide)

    return _collect(_Job(model, guide, x, index, seed, ledger, prefix), K, judge)


def evaluate(
    model: Program,
    guide: Guide,
    x: Tensor,
    index: Tensor | None = None,
    *,
    budget: Budget | None = None,
    seed: int = 0,
    progress: Callable[[int], None] = lambda rows: None,
    ledger: ResultCache | None = None,
    prefix: str = "rows",
) -> Evaluation:
    r"""All quantities of `Evaluation`: the bounds, and the gap between ELBO and evidence split into its causes.

    .. math::
        \log p(x) - \mathrm{ELBO}(\lambda) = \underbrace{\log p(x) - \mathrm{ELBO}(\lambda^*)}_{\text{approximation}}
        + \underbrace{\mathrm{ELBO}(\lambda^*) - \mathrm{ELBO}(\lambda)}_{\text{amortization}}

    Arguments:
        model: a Pyro program.
        guide: a family with a source of its parameters.
        x, index: rows [B, D] and which training datapoints they are; None for new ones.
        budget: draws, refinement steps, and what is asked beyond.
        seed: of all noise.
        progress: called with the number of rows done.
        ledger, prefix: where finished batches of rows are kept, and what their names begin with. The ledger's key must
            hold everything that they depend on; the budget's own numbers and the seed among it.

    The search for q_params* starts at the guide's q_params and once more, by another rule, at the family's initial one; the
    best of both ends and of the guide's own q_params counts.

    Source: Cremer, Li, Duvenaud (2018), *Inference Suboptimality in Variational Autoencoders*, arXiv:1801.03558.
    """
    budget = budget or Budget()

    def judge(rows: PosteriorBatch) -> dict[str, Tensor]:
        if not guide.family.point_mass:
            return _gaps(model, guide, rows, budget)
        (own,), _ = paired_moments(model, [rows.q], rows, budget.K)
        return _bounds(own, guide)

    found = _collect(_Job(model, guide, x, index, seed, ledger, prefix, progress), budget.K, judge)
    return found if guide.family.point_mass else _with_evidence(found, budget)


def family_gains(
    model: Program,
    guide: Guide,
    x: Tensor,
    index: Tensor | None = None,
    *,
    families: Mapping[str, Callable[[int], Family]],
    budget: Budget | None = None,
    seed: int = 0,
) -> dict[str, FamilyGain]:
    """What other posterior families would buy: the best ELBO that each reaches for each row, the decoder frozen.

    Arguments:
        model, guide, x, index, seed: as of `evaluate`.
        families: makers of families by name, from the number of dimensions.
        budget: draws of each comparison and steps of each search.

    A gain is on the best q_params of the guide's own family. Parameters that rows share, such as a flow's, are fitted to
    each batch of rows together with these: any q is a bound, so a gain is a lower estimate, as good as its search.
    """
    budget = budget or Budget()

    def judge(rows: PosteriorBatch) -> dict[str, Tensor]:
        q_params, _ = find_best_params(model, guide, rows, budget.K, budget.steps)
        return _family_gains(model, guide, q_params, rows, replace(budget, families=families))

    found = _collect(_Job(model, guide, x, index, seed), budget.K, judge).values
    return {
        name: FamilyGain(
            *(found[key] for key in (f"best_elbo[{name}]", f"family_gain[{name}]", f"family_gain[{name}]_se"))
        )
        for name in families
    }


def refinement_curve(
    model: Program,
    guide: Guide,
    x: Tensor,
    index: Tensor | None = None,
    *,
    steps: Sequence[int] = (1, 2, 5, 10, 20, 50, 100),
    seed: int = 0,
) -> RefinementCurve:
    """The ELBO of the guide's q_params after so many refinement steps, under noise common to all of them."""
    bound, rule = LocalELBO(model, guide.family, guide.sites), default_update_rule(guide.family)
    curves, seconds = [], 0.0
    with no_validation():
        for rows in _Job(model, guide, x, index, seed).batches():
            watched = maximize_local_elbo(
                bound,
                rows.q_params,
                rows.x,
                rows.index,
                steps=max(steps),
                rule=rule,
                tolerance=-torch.inf,
                seed=rows.seed,
            )
            curves.append(watched.curve[[watched.marks.index(s) for s in (0, *steps)]])
            start = time.perf_counter()
            with seeded(rows.seed):
                refine(partial(bound, x=rows.x, index=rows.index, K=REFINE_DRAWS), rows.q_params, 10, rule=rule)
            seconds += (time.perf_counter() - start) / 10
    return RefinementCurve((0, *steps), torch.cat(curves, 1), seconds / len(x))


@dataclass(frozen=True)
class _Job:
    """What is evaluated, and where its parts are kept."""

    model: Program
    guide: Program
    x: Tensor
    index: Tensor | None
    seed: int
    ledger: ResultCache | None = None
    prefix: str = ""
    progress: Callable[[int], None] = lambda rows: None

    def rows(self, part: slice) -> PosteriorBatch:
        """Some of the rows, under a posterior that stays fixed for all draws."""
        x, index = self.x[part], None if self.index is None else self.index[part]
        number, inside = divmod(part.start, ROWS)
        seed = self.seed + 100 * number + 1_000_003 * inside
        if not isinstance(self.guide, Guide):
            return PosteriorBatch(x, index, self.guide, x.new_zeros(len(x), 0), seed)
        with seeded(seed), torch.no_grad():
            q_params = self.guide.params(x, index).detach()
        return PosteriorBatch(x, index, self.guide.with_params(q_params), q_params, seed)

    def batches(self) -> Iterator[PosteriorBatch]:
        return (self.rows(slice(start, start + ROWS)) for start in range(0, len(self.x), ROWS))


def _bounds(own: StreamingWeights, guide: Program) -> dict[str, Tensor]:
    if isinstance(guide, Guide) and guide.family.point_mass:
        return {"log_joint": own.reconstruction - own.kl, "reconstruction": own.reconstruction}
    names = ["elbo", "elbo_se", "iwae", "iwae_se", "kl", "reconstruction", "ess"] + ["k_hat"] * (
        own.K >= MIN_DRAWS_FOR_K_HAT
    )
    return {name: getattr(own, name) for name in names}


def _gaps(model: Program, guide: Guide, rows: PosteriorBatch, budget: Budget) -> dict[str, Tensor]:
    q_params, left = find_best_params(model, guide, rows, budget.K, budget.steps)
    (own, found), (_, gain) = paired_moments(model, [rows.q, guide.with_params(q_params)], rows, budget.K)
    values = _bounds(own, guide) | {
        "best_elbo": found.elbo,
        "best_iwae": found.iwae,
        "amortization_gap": gain.mean.to(rows.q_params.dtype),
        "amortization_gap_se": gain.se.to(rows.q_params.dtype),
        "optimization_gap": left,
    }
    if budget.temperatures:
        values |= anneal_evidence(model, guide, q_params, rows, budget.annealing)
    return values | _family_gains(model, guide, q_params, rows, budget)


def _family_gains(
    model: Program, guide: Guide, q_params: Tensor, rows: PosteriorBatch, budget: Budget
) -> dict[str, Tensor]:
    values: dict[str, Tensor] = {}
    for name, make in budget.families.items():
        found = family_gain(model, guide, q_params, rows, make, budget.K, budget.steps)
        values |= {
            f"best_elbo[{name}]": found.elbo,
            f"family_gain[{name}]": found.gain,
            f"family_gain[{name}]_se": found.gain_se,
        }
    return values


def _with_evidence(found: Evaluation, budget: Budget) -> Evaluation:
    """The evidence by the estimator that is highest over all rows, and the gaps to it."""
    values = dict(found.values)
    estimators = {"best_iwae": f"IWAE-{budget.K} from the best q_params of the family"}
    if "ais" in values:
        if values["ais"].isnan().all():
            raise AllChainsDiverged
        start = "the prior" if budget.start == "prior" else "the best q_params of the family"
        estimators["ais"] = f"AIS over {budget.temperatures} temperatures of {budget.chains} chains from {start}"
    bound = {name: _without_holes(values[name], values["best_iwae"]) for name in estimators}
    chosen = max(bound, key=lambda name: bound[name].double().mean().item())
    evidence, lost = bound[chosen], int(values[chosen].isnan().sum())
    values |= {
        "evidence": evidence,
        "approximation_gap": evidence - values["best_elbo"],
        "inference_gap": evidence - values["elbo"],
    }
    rest = f", but {estimators['best_iwae']} for {lost} rows where every chain diverged" if lost else ""
    return replace(found, values=values, estimator=estimators[chosen] + rest)


def _without_holes(values: Tensor, others: Tensor) -> Tensor:
    return torch.where(values.isnan(), others.to(values), values)


def _collect(job: _Job, K: int, judge: Callable[[PosteriorBatch], dict[str, Tensor]]) -> Evaluation:
    """Apply ``judge`` to batches of rows, smaller ones where the device has no memory for them."""
    for program in (job.model, job.guide):
        module_of(program).eval()
    ledger = job.ledger or ResultCache(None, {})

    def judged(part: slice) -> dict[str, Tensor]:
        def compute() -> dict[str, Tensor]:
            start, rows = time.perf_counter(), job.rows(part)
            with seeded(rows.seed):
                values = judge(rows)
            return values | {SECONDS: torch.tensor(time.perf_counter() - start)}

        values = ledger.get_or_compute_tensors(f"{job.prefix}-{part.start:06}-{part.stop:06}", compute)
        job.progress(part.stop - part.start)
        return values

    with torch.no_grad(), no_validation(), pyro.get_param_store().scope():
        parts = list(halve_on_oom(judged, len(job.x), ROWS, "rows"))
    seconds = sum(part.pop(SECONDS).item() for part in parts)
    # On the CPU whether they were kept or made just now.
    return Evaluation({name: torch.cat([part[name].cpu() for part in parts]) for name in parts[0]}, K, seconds)
