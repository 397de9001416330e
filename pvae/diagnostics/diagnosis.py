"""Diagnosis of a posterior: the battery and the gaps, summed up in a verdict for each use."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from html import escape
from typing import Any

import torch
from torch import Tensor

from pvae.diagnostics.battery import DIAGNOSIS_BUDGETS, Battery, DiagnosisBudget, Rows, join_parts, kind_of
from pvae.diagnostics.evaluation import Budget, Evaluation, bounds, evaluate
from pvae.diagnostics.quantities import SECTIONS, Figures, number_frame, summary_frame
from pvae.diagnostics.trust import USES, TrustVerdict, assess_trust
from pvae.errors import UserError, nearest, param
from pvae.inference.batching import as_rows
from pvae.inference.guides import Guide, check_guide
from pvae.runtime.pyro_params import Program
from pvae.runtime.result_cache import ResultCache
from pvae.stats import Estimate


@dataclass(frozen=True, repr=False)
class Diagnosis:
    """Figures of a guide and of the same guide refined, and how far each use of it may be trusted.

    Attributes:
        figures: of the guide, by keys of ``QUANTITIES``.
        refined: those that differ once each row's variational parameters are refined.
        verdicts: by use: posterior, proposal, bound, model.
        left_out: numbers of the rows that were left out, since their ELBO is not finite.
        parts: the diagnostics behind the figures, by name, with the values of each row or dimension.
    """

    figures: dict[str, Estimate]
    refined: dict[str, Estimate]
    verdicts: dict[str, TrustVerdict]
    parts: dict[str, Any]
    left_out: tuple[int, ...] = ()

    @property
    def title(self) -> str:
        """How many rows were diagnosed, and which were left out."""
        rows = f"Diagnosis of {len(self.parts['rows'].x)} rows"
        numbers = ", ".join(map(str, self.left_out[:10])) + ", ..." * (len(self.left_out) > 10)
        return rows + f"; left out, for their ELBO is not finite: {numbers} (counted from 0)" * bool(self.left_out)

    def to_frame(self) -> Any:
        """Return a pandas.DataFrame: label, unit, mean, se, refined_mean and refined_se of each quantity."""
        return summary_frame(self.figures, self.refined)

    def __repr__(self) -> str:
        lines = [self.title]
        for verdict in self.verdicts.values():
            lines += [f"{verdict.level.upper()}: {USES[verdict.use]}", *(f"  - {line}" for line in _sentences(verdict))]
        return "\n".join([*lines, "", number_frame(self.figures, self.refined).to_string()])

    def _repr_html_(self) -> str:
        verdicts = "".join(
            f"<dt><b>{escape(verdict.level)}</b>: {escape(USES[verdict.use])}</dt>"
            + "".join(f"<dd>{escape(line)}</dd>" for line in _sentences(verdict))
            for verdict in self.verdicts.values()
        )
        return f"<p>{escape(self.title)}</p><dl>{verdicts}</dl>{number_frame(self.figures, self.refined).to_html()}"


def _sentences(verdict: TrustVerdict) -> list[str]:
    return verdict.because + [verdict.advice] * bool(verdict.advice)


def diagnose(
    model: Program,
    guide: Guide,
    x: Tensor,
    index: Tensor | None = None,
    *,
    budget: str | DiagnosisBudget = "quick",
    labels: Tensor | None = None,
    seed: int = 0,
    progress: Callable[[float, str], None] | None = None,
    cache: ResultCache | None = None,
    evaluation: Evaluation | Figures | None = None,
) -> Diagnosis:
    """Diagnose a posterior: gaps, weights, calibration, reference posterior, latent usage, predictive checks.

    Arguments:
        model, guide: a fitted Pyro program and its approximate posterior, diagnosed as it is and with each row refined.
        x, index: rows [B, D], at least 2, of which the first ``budget.rows`` are used, and which training datapoints
            they are; None for new rows.
        budget: ``quick``, ``standard`` or ``thorough``, or numbers of your own.
        labels: of the rows, [B]; they are passed on to figures.
        seed: of all noise; the random stream outside is left alone.
        progress: called with the share of the work done and the name of the task that begins.
        cache: keeps finished tasks. Its key must hold everything that they depend on, budget and seed included.
        evaluation: bounds and gaps from `evaluate`, or their summary; computed from ``budget`` unless given.

    Raises:
        UserError: an unknown budget, or a single row.

    Rows whose ELBO is not finite are left out, and named.

    See also: `evaluate` for bounds and gaps alone; `assess_trust` for the rules of the verdicts.
    """
    check_guide("diagnose", guide)
    if not isinstance(budget, DiagnosisBudget) and budget not in DIAGNOSIS_BUDGETS:
        raise UserError(f"{param('budget')} is '{budget}'{nearest(budget, DIAGNOSIS_BUDGETS)}")
    plan = budget if isinstance(budget, DiagnosisBudget) else DIAGNOSIS_BUDGETS[budget]
    show = progress or (lambda share, task: None)
    x, index = as_rows(x[: plan.rows], model), None if index is None else index[: plan.rows]
    values = bounds(model, guide, x, index, K=1, seed=seed).values
    finite = values["log_joint" if guide.family.point_mass else "elbo"].isfinite()
    left_out = tuple((~finite).nonzero().flatten().tolist())
    labels = torch.empty(0) if labels is None else labels[: plan.rows][finite.to(labels.device)]
    x, index = x[finite.to(x.device)], None if index is None else index[finite.to(index.device)]
    words = {"inference": type(guide).__name__, "family": type(guide.family).__name__}
    words["next_step"] = _next_step(plan, guide) if len(x) else "a program whose log-density is finite at these rows"
    if not len(x):
        return Diagnosis({}, {}, assess_trust({}, {}, **words), {"rows": Rows(x, labels)}, left_out)
    if evaluation is None:
        show(0.0, "evaluation")
        gaps = Budget(plan.draws, plan.steps)
        evaluation = evaluate(model, guide, x, index, budget=gaps, seed=seed, cache=cache, prefix="evaluation")
    parts = _run(Battery(model, guide, x, index, labels, plan, seed), cache or ResultCache(None, {}), show)
    figures, refined = _summaries(parts, evaluation)
    return Diagnosis(figures, refined, assess_trust(figures, refined, **words), parts, left_out)


def _next_step(plan: DiagnosisBudget, guide: Guide) -> str:
    """Say what would establish a verdict that is not: the next larger budget and how many times as long it takes."""
    if guide.family.point_mass:
        return f"a posterior with a density: set {param('family', 'DiagonalNormal')}"
    passes = sum(plan.passes().values())
    for name, larger in DIAGNOSIS_BUDGETS.items():
        times = sum(larger.passes().values()) / passes
        if times > 1.5:
            return f"diagnose with {param('budget', name)}, which takes about {times:.0f} times as long"
    return "more rows and draws than the budget thorough has"


def estimate_seconds(model: Program, guide: Guide, x: Tensor, budget: DiagnosisBudget) -> float:
    """Estimate the wall time of a diagnosis from that of a few thousand decoder passes."""
    rows = x[:50]
    for _ in range(2):  # the first time is slow
        start = time.perf_counter()
        bounds(model, guide, rows, K=100)
    return sum(budget.passes().values()) * (time.perf_counter() - start) / (100 * len(rows))


def _run(battery: Battery, cache: ResultCache, progress: Callable[[float, str], None]) -> dict[str, Any]:
    """Run the tasks that the cache does not hold, one after the other, and join their results into parts."""
    results: dict[str, Any] = {}
    done, total = 0.0, sum(task.passes for task in battery.list_tasks())
    for task in battery.list_tasks():
        progress(done / total, task.name)
        results[task.name] = cache.get_or_compute(task.name, kind_of(task.name), task.compute)
        done += task.passes
    progress(1.0, "")
    return join_parts(results)


def _summaries(
    parts: Mapping[str, Any], evaluation: Evaluation | Figures
) -> tuple[dict[str, Estimate], dict[str, Estimate]]:
    """Return the figures of the guide and, where they differ, of the same guide refined."""
    if isinstance(evaluation, Evaluation):  # the battery computes the figures of importance weights itself
        evaluation = {k: v for k, v in evaluation.summary().items() if k not in SECTIONS["Importance weights"]}
    figures, refined = dict(evaluation), dict[str, Estimate]()
    for name, part in parts.items():
        (refined if name.endswith("-best") else figures).update(part.summary())
    at_best = {"inference_gap": "approximation_gap", "elbo": "best_elbo"}
    refined |= {name: figures[best] for name, best in at_best.items() if best in figures}
    for known in (figures, refined):
        if "inference_gap" in known and "evidence_width" in figures:
            (gap, gap_se), (width, width_se) = known["inference_gap"], figures["evidence_width"]
            known["gap_limit"] = Estimate(gap + max(width, 0.0), math.hypot(gap_se, width_se))
    return figures, refined
