"""Evaluation of a guide: bounds, evidence and inference gaps of each row."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from html import escape
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from pvae.diagnostics.gaps import ANNEAL, EVIDENCE, FamilyGain, FamilySearch, PosteriorBatch, paired_moments
from pvae.diagnostics.quantities import number_frame, summary_frame
from pvae.errors import AllChainsDiverged, UserError, check_range, nearest, param
from pvae.inference.batching import ROWS, Progress, RowBatch, map_batches, silent
from pvae.inference.families import Family
from pvae.inference.guides import Guide, check_guide
from pvae.inference.refinement import REFINE_DRAWS, LocalELBO, default_update_rule, maximize_local_elbo, refine
from pvae.inference.streaming import MIN_DRAWS_FOR_K_HAT, StreamingWeights
from pvae.runtime.pyro_params import Program
from pvae.runtime.result_cache import ResultCache
from pvae.runtime.torch_state import seeded
from pvae.samplers.ais import anneal, inverse_temperatures
from pvae.samplers.log_joint import LogJoint
from pvae.samplers.row_posterior import Accuracy, anneal_particles, draw_rows
from pvae.stats import Estimate, bootstrap, mean_se

STARTS = ("prior", "guide")
SECONDS = "seconds"  # of wall time, among the cached values of a batch

Compute = Callable[[PosteriorBatch], dict[str, Tensor]]


@dataclass(frozen=True)
class Budget:
    """Cost of an evaluation: draws, refinement steps, annealing and other families.

    Arguments:
        K: draws for each row and bound.
        steps: the most refinement steps in the search for the best variational parameters of the family.
        temperatures, chains, schedule: of annealed importance sampling (AIS), see `anneal`; 0 temperatures for none.
        start: AIS starts from the ``prior``, or from the best q of the guide's family (``guide``).
        families: makers of other variational families by name, from the number of dimensions, see `family_gains`.

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
        check_range(least=1, K=self.K, chains=self.chains)
        check_range(least=0, steps=self.steps, temperatures=self.temperatures)
        inverse_temperatures(self.schedule, max(self.temperatures, 1))
        if self.start not in STARTS:
            raise UserError(f"unknown start '{self.start}'{nearest(self.start, STARTS)}")

    @property
    def accuracy(self) -> Accuracy:
        """Of the draws for the evidence: a fifth of K effective, for a bias below 2 / K nats; chains give none."""
        return Accuracy(max(self.K, MIN_DRAWS_FOR_K_HAT), max(self.K // 5, 5), 8, 20, 32, 50, 0)


BUDGETS = {"quick": Budget(K=200, steps=100), "standard": Budget(), "thorough": Budget(K=5000, steps=1000)}


@dataclass(frozen=True, repr=False)
class Evaluation:
    """Bounds, evidence and gaps of each row, [B] nats each.

    Attributes:
        values: quantities by name. ``elbo``, ``iwae``, ``kl``, ``reconstruction`` belong to the guide, and so do the
            effective sample size ``ess`` and Pareto ``k_hat`` (from 30 draws on) of its importance weights;
            ``best_elbo`` and ``best_iwae`` to the best variational parameters that refinement found in its family.
            ``ais`` is annealed, with its mean ``ais_acceptance``, where the budget asks for it. ``evidence`` is that of
            ``best_iwae`` and ``ais`` with the higher mean, each a lower bound of log p(x) in expectation.
            ``approximation_gap`` = evidence - best_elbo, ``amortization_gap`` = best_elbo - elbo under common noise,
            ``inference_gap`` is their sum; ``optimization_gap`` is the convergence error of the search. A name with
            ``_se`` is the Monte Carlo error of each row. A point mass has ``log_joint`` and ``reconstruction`` alone.
        K, seconds, estimator: draws for each row, wall time, and how the evidence was estimated.
        family_gains: of the budget's other families, by name.
    """

    values: dict[str, Tensor]
    K: int
    seconds: float
    estimator: str = ""
    family_gains: dict[str, FamilyGain] = field(default_factory=dict)

    def named_values(self) -> dict[str, Tensor]:
        """Return all values; a family F adds ``best_elbo[F]``, ``family_gain[F]`` and ``family_gain[F]_se``."""
        return self.values | _named_gains(self.family_gains)

    def summary(self) -> dict[str, Estimate]:
        """Return mean over rows and standard error of every quantity."""
        return {name: mean_se(values) for name, values in self.named_values().items() if not name.endswith("_se")}

    def intervals(self, level: float = 0.95) -> dict[str, tuple[float, float]]:
        """Return the bootstrap interval of each gap's and family gain's mean over rows.

        What the search may have left, the optimization gap, widens the amortization gap's upwards, and the
        approximation gap's downwards.
        """
        gaps = {k: v for k, v in self.named_values().items() if k.endswith("_gap") or k.startswith("family_gain")}
        ends = {name: bootstrap(gap, level=level) for name, gap in gaps.items() if not name.endswith("_se")}
        if "optimization_gap" in self.values:
            left = max(self.values["optimization_gap"].double().mean().item(), 0.0)
            (low, high), (lowest, highest) = ends["approximation_gap"], ends["amortization_gap"]
            ends |= {"approximation_gap": (low - left, high), "amortization_gap": (lowest, highest + left)}
        return ends

    def to_frame(self) -> Any:
        """Return the summary as a pandas.DataFrame: label, unit, mean and se of each quantity."""
        return summary_frame(self.summary())

    def __repr__(self) -> str:
        return f"{self._title()}\n{number_frame(self.summary()).to_string()}"

    def _repr_html_(self) -> str:
        return f"<p>{escape(self._title())}</p>{number_frame(self.summary()).to_html()}"

    def _title(self) -> str:
        estimator = f"; evidence by {self.estimator}" if self.estimator else ""
        return f"Evaluation of {len(next(iter(self.values.values())))} rows, K = {self.K}{estimator}"


@dataclass(frozen=True)
class RefinementCurve:
    """ELBO [M, B] in nats after M numbers of refinement steps, 0 first, and the wall time of one step of one row."""

    steps: tuple[int, ...]
    elbo: Tensor
    seconds_per_step: float


def bounds(
    model: Program, guide: Program, x: Tensor, index: Tensor | None = None, *, K: int = 100, seed: int = 0
) -> Evaluation:
    r"""Compute ELBO, importance-weighted bound (IWAE-K), KL, reconstruction and weight diagnostics of each row.

    Arguments:
        model, guide: Pyro programs of one signature.
        x, index: rows [B, D] and which training datapoints they are; None for new rows.
        K: draws for each row; memory does not grow with it.
        seed: of the draws; the random stream outside is left alone.

    See also: `evaluate` for the gaps and the evidence; `pvae.diagnostics.diagnose` for everything.

    Source of IWAE: Burda, Grosse, Salakhutdinov (2016), arXiv:1509.00519.
    """

    return _map_posteriors(model, guide, partial(_guide_bounds, model, guide, K=K), K, seed, x=x, index=index)


def evaluate(
    model: Program,
    guide: Guide,
    x: Tensor,
    index: Tensor | None = None,
    *,
    budget: Budget | str | None = None,
    seed: int = 0,
    progress: Progress = silent,
    cache: ResultCache | None = None,
    prefix: str = "rows",
) -> Evaluation:
    r"""Estimate the evidence of each row, and split the gap between ELBO and evidence into its causes.

    .. math::
        \log p(x) - \mathrm{ELBO}(\lambda) = \underbrace{\log p(x) - \mathrm{ELBO}(\lambda^*)}_{\text{approximation}}
        + \underbrace{\mathrm{ELBO}(\lambda^*) - \mathrm{ELBO}(\lambda)}_{\text{amortization}}

    Arguments:
        model, guide: a Pyro program and its approximate posterior, with variational parameters lambda.
        x, index: rows [B, D] and which training datapoints they are; None for new rows.
        budget: draws, refinement steps, annealing and other families; or ``quick``, ``standard``, ``thorough``.
        seed: of all noise; the random stream outside is left alone.
        progress: called with the number of rows done.
        cache, prefix: keeps finished batches of rows, under names with this prefix. The cache's key must hold
            everything that they depend on, the budget and the seed included.

    The search for the best variational parameters lambda* starts at the guide's own and, by another update rule, at the
    family's initial ones; the best of both ends and of the guide's own counts.

    See also: `bounds` without the search; `family_gains`; `refinement_curve`; `pvae.diagnostics.diagnose`.

    Source: Cremer, Li, Duvenaud (2018), *Inference Suboptimality in Variational Autoencoders*, arXiv:1801.03558.
    """
    check_guide("evaluate", guide)
    if isinstance(budget, str) and budget not in BUDGETS:
        raise UserError(f"{param('budget')} is '{budget}'{nearest(budget, BUDGETS)}")
    budget, point_mass = BUDGETS[budget] if isinstance(budget, str) else budget or Budget(), guide.family.point_mass
    of_point_mass = partial(_guide_bounds, model, guide, K=budget.K)
    compute = of_point_mass if point_mass else partial(_gaps, model, guide, budget=budget)
    options: Any = {"x": x, "index": index, "progress": progress, "cache": cache, "prefix": prefix}
    evaluation = _map_posteriors(model, guide, compute, budget.K, seed, budget.families, **options)
    return evaluation if point_mass else _with_evidence(evaluation, budget)


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
    """Compute the best ELBO of other variational families for each row, and its gain on that of the guide's family.

    Arguments:
        model, guide, x, index, seed: as of `evaluate`; the model is frozen.
        families: makers of families by name, from the number of dimensions.
        budget: draws of each comparison and steps of each search.

    Parameters that rows share, such as a flow's, are fitted to each batch together with the rows' own: any q is a
    bound, so a gain is a lower estimate, as good as its search.
    """
    budget = budget or Budget()

    def compute(rows: PosteriorBatch) -> dict[str, Tensor]:
        search = FamilySearch(model, guide.family, guide.sites, rows, budget.K, budget.steps)
        q_params, _ = search.from_guide()
        return _named_gains({name: search.gain_of(make, q_params) for name, make in families.items()})

    return _map_posteriors(model, guide, compute, budget.K, seed, families, x=x, index=index).family_gains


def refinement_curve(
    model: Program,
    guide: Guide,
    x: Tensor,
    index: Tensor | None = None,
    *,
    steps: Sequence[int] = (1, 2, 5, 10, 20, 50, 100),
    seed: int = 0,
) -> RefinementCurve:
    """Compute the ELBO after refinement steps from the guide's variational parameters, under noise common to all."""
    local_elbo, rule = LocalELBO(model, guide.family, guide.sites), default_update_rule(guide.family)

    def compute(batch: RowBatch) -> dict[str, Tensor]:
        x, index, _, q_params, seed = _posterior_batch(guide, batch)
        search: Any = {"steps": max(steps), "rule": rule, "tolerance": -torch.inf, "seed": seed}
        refined = maximize_local_elbo(local_elbo, q_params, x, index, **search)
        start = time.perf_counter()
        with seeded(seed):
            refine(partial(local_elbo, x=x, index=index, K=REFINE_DRAWS), q_params, 10, rule=rule)
        price = torch.tensor((time.perf_counter() - start) / 10)
        return {"elbo": refined.curve[[refined.check_steps.index(s) for s in (0, *steps)]].T, SECONDS: price}

    values = map_batches(model, guide, compute, x, index, batch_size=ROWS, seed_of=partial(batch_seed, seed))
    return RefinementCurve((0, *steps), values["elbo"].T, values[SECONDS].sum().item() / len(x))


def batch_seed(seed: int, start: int) -> int:
    number, inside = divmod(start, ROWS)
    return seed + 100 * number + 1_000_003 * inside


def _posterior_batch(guide: Program, batch: RowBatch) -> PosteriorBatch:
    """Fix the posterior of a batch for all draws."""
    x, index, _, seed = batch
    if not isinstance(guide, Guide):
        return PosteriorBatch(x, index, guide, x.new_zeros(len(x), 0), seed)
    with seeded(seed):
        q_params = guide.params(x, index).detach()
    return PosteriorBatch(x, index, guide.with_params(q_params), q_params, seed)


def _map_posteriors(
    model: Program, guide: Program, compute: Compute, K: int, seed: int, families: Iterable[str] = (), **options: Any
) -> Evaluation:
    """Compute the values of batches under their posteriors, with the wall time; options are those of `map_batches`."""

    def timed(batch: RowBatch) -> dict[str, Tensor]:
        start = time.perf_counter()
        values = compute(_posterior_batch(guide, batch))
        return values | {SECONDS: torch.tensor(time.perf_counter() - start)}

    values = map_batches(model, guide, timed, batch_size=ROWS, seed_of=partial(batch_seed, seed), **options)
    seconds = values.pop(SECONDS).sum().item()
    gains = {name: FamilyGain(*(values.pop(key) for key in _gain_keys(name))) for name in families}
    return Evaluation(values, K, seconds, family_gains=gains)


def _gain_keys(family: str) -> tuple[str, str, str]:
    """Return the names of a `FamilyGain`'s tensors in batches and results."""
    return f"best_elbo[{family}]", f"family_gain[{family}]", f"family_gain[{family}]_se"


def _named_gains(gains: Mapping[str, FamilyGain]) -> dict[str, Tensor]:
    named = (zip(_gain_keys(family), vars(gain).values(), strict=True) for family, gain in gains.items())
    return dict(chain.from_iterable(named))


def _guide_bounds(model: Program, guide: Program, rows: PosteriorBatch, K: int) -> dict[str, Tensor]:
    return _bounds(paired_moments(model, [rows.q], rows, K)[0][0], guide)


def _bounds(weights: StreamingWeights, guide: Program) -> dict[str, Tensor]:
    if isinstance(guide, Guide) and guide.family.point_mass:
        return {"log_joint": weights.reconstruction - weights.kl, "reconstruction": weights.reconstruction}
    names = ["elbo", "elbo_se", "iwae", "iwae_se", "kl", "reconstruction", "ess"]
    return {name: getattr(weights, name) for name in names + ["k_hat"] * (weights.K >= MIN_DRAWS_FOR_K_HAT)}


def _gaps(model: Program, guide: Guide, rows: PosteriorBatch, budget: Budget) -> dict[str, Tensor]:
    target, accuracy = LogJoint(model, rows.x, rows.index, guide.sites), budget.accuracy
    with seeded(rows.seed + ANNEAL):
        scouts = anneal_particles(target, accuracy.chains, accuracy.temperatures)
    heaviest = scouts.log_w.nan_to_num(nan=-torch.inf).argsort(0, descending=True).unsqueeze(-1)
    particles = scouts.position.gather(0, heaviest.expand_as(scouts.position))
    search = FamilySearch(model, guide.family, guide.sites, rows, budget.K, budget.steps, particles)
    q_params, optimization_gap = search.from_guide()
    (weights, best), (_, gain) = paired_moments(model, [rows.q, guide.with_params(q_params)], rows, budget.K)
    q = (guide.family, q_params)
    draws = draw_rows(target, q, accuracy, scouts=scouts, seed=rows.seed + EVIDENCE)
    values = _bounds(weights, guide) | {
        "evidence": torch.where(draws.reliable, draws.log_evidence, torch.fmax(draws.log_evidence, best.iwae)).to(
            best.elbo
        ),
        "evidence_reliable": draws.reliable.to(best.elbo),
        "best_elbo": best.elbo,
        "best_iwae": best.iwae,
        "amortization_gap": gain.mean.to(rows.q_params.dtype),
        "amortization_gap_se": gain.se.to(rows.q_params.dtype),
        "optimization_gap": optimization_gap,
    }
    if budget.temperatures:
        values |= _anneal(model, guide, q_params, rows, budget)
    gains = {name: search.gain_of(make, q_params) for name, make in budget.families.items()}
    return values | _named_gains(gains)


def _anneal(model: Program, guide: Guide, q_params: Tensor, rows: PosteriorBatch, budget: Budget) -> dict[str, Tensor]:
    """Estimate the rows' evidence by AIS, from the prior or from q = family(q_params), [B] each."""
    target = LogJoint(model, rows.x, rows.index, guide.sites)
    start = (guide.family, q_params) if budget.start == "guide" else ()
    options: Any = {name: getattr(budget, name) for name in ("chains", "temperatures", "schedule")}
    try:
        estimate = anneal(target, *start, seed=rows.seed + ANNEAL, **options)
    except AllChainsDiverged:  # the rows may be few; `_with_evidence` raises if all rows of the data are lost
        return dict.fromkeys(("ais", "ais_se", "ais_acceptance"), torch.full_like(rows.q_params[:, 0], torch.nan))
    return {"ais": estimate.evidence, "ais_se": estimate.evidence_se, "ais_acceptance": estimate.acceptance_rate}


def _with_evidence(evaluation: Evaluation, budget: Budget) -> Evaluation:
    """Add the evidence by the estimator with the highest mean over rows, and the gaps to it."""
    values, estimator, besides = evaluation.values, "importance sampling, by each row's first proposal that passes", ""
    evidence = values["evidence"]
    if "ais" in values:
        lost = values["ais"].isnan()
        if lost.all():
            raise AllChainsDiverged
        annealed = torch.where(lost, evidence, values["ais"].to(evidence))
        if annealed.double().mean() > evidence.double().mean():
            start = "the prior" if budget.start == "prior" else "the best q of the family"
            besides = f", but {estimator} for {int(lost.sum())} rows where every chain diverged" if lost.any() else ""
            estimator = f"AIS over {budget.temperatures} temperatures of {budget.chains} chains from {start}"
            evidence = annealed
    gaps = {"approximation_gap": evidence - values["best_elbo"], "inference_gap": evidence - values["elbo"]}
    return replace(evaluation, values=values | {"evidence": evidence} | gaps, estimator=estimator + besides)
