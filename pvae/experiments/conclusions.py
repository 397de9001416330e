"""Conclusions of a comparison: sentences computed from the results, with the figures and errors they rest on."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pvae.diagnostics.evaluation import Evaluation, RefinementCurve
from pvae.diagnostics.quantities import describe
from pvae.errors import param
from pvae.stats import CrossedEstimate, Estimate, crossed_mean_se, mean_se, measure_row_influence, number

# Standard errors beyond which a difference is called one; nats of an optimization gap that nobody would act on.
Z_CLEAR, NEGLIGIBLE = 3.0, 0.02


@dataclass(frozen=True)
class EvaluatedVariant:
    """Evaluation of a variant with its own decoder, after ``seconds`` of training; ``further`` holds further seeds."""

    name: str
    seconds: float
    train: Evaluation
    test: Evaluation
    inference: str = "Amortized"
    further: tuple[EvaluatedVariant, ...] = ()

    @property
    def seeds(self) -> tuple[EvaluatedVariant, ...]:
        """The evaluations of all seeds."""
        return (self, *self.further)

    def mean(self, quantity: str, split: str = "test") -> Estimate:
        """Return a quantity's mean and its error, over rows and over seeds if there are several."""
        return _mean_over_seeds([getattr(one, split).values[quantity] for one in self.seeds])

    def mean_gain(self, family: str) -> Estimate:
        """Return the mean gain of another variational family on test rows, likewise."""
        return _mean_over_seeds([one.test.family_gains[family].gain for one in self.seeds])


class SameDecoder(NamedTuple):
    """An inference method on another's decoder: ELBO of test rows, [B] nats, and seconds to infer a row."""

    guide: str
    elbo: Tensor
    seconds_per_row: float


def draw_conclusions(
    evaluated: list[EvaluatedVariant], same: Sequence[SameDecoder], curve: RefinementCurve | None, dynamic: bool = False
) -> list[str]:
    """Return the sentences that the results support, most important first.

    Arguments:
        same, curve: inference methods on the amortized variant's decoder, its own encoder first; refinement there.
        dynamic: binarization is drawn afresh for each batch.
    """
    with_evidence = [one for one in evaluated if "evidence" in one.test.values]
    sentences = [*_ranking(with_evidence), *_amortization(with_evidence), *_same_decoder(same, curve)]
    sentences += [*_better_params(with_evidence), *_few_rows(evaluated), *_faults(with_evidence)]
    if dynamic and any(one.inference == "PerDatapoint" for one in evaluated):
        sentences.append(
            "Under dynamic binarization PerDatapoint fits a row to all binarizations of its image at once, while "
            f"evaluation shows it one: compare it under {param('binarize', 'threshold')}."
        )
    names = [one.name for one in evaluated if "log_joint" in one.test.values]
    point_mass = "its objective is log p(x, z) at one point, which bounds no evidence"
    limits = "it has no gaps and stands in no ranking"
    return sentences + [f"{name} uses a point mass: {point_mass}; {limits}." for name in names]


def _clear(estimate: Estimate | CrossedEstimate) -> bool:
    """Whether a difference is beyond its error; the error of few seeds is uncertain itself, so that t replaces z."""
    from scipy.stats import norm, t

    df = estimate.df if isinstance(estimate, CrossedEstimate) else math.inf
    return abs(estimate.mean) > float(t.isf(norm.sf(Z_CLEAR), df)) * estimate.se


def _mean_over_seeds(values: list[Tensor]) -> Estimate:
    return Estimate(*crossed_mean_se(torch.stack(values))[:2])


def _signed(estimate: Estimate) -> str:
    return f"{'+' if estimate.mean >= 0 else ''}{number(estimate)}"


def _join(phrases: list[str]) -> str:
    return " and ".join(phrases) if len(phrases) < 3 else f"{', '.join(phrases[:-1])} and {phrases[-1]}"


def _ranking(evaluated: list[EvaluatedVariant]) -> Iterator[str]:
    if len(evaluated) < 2:
        return
    best, *others = sorted(evaluated, key=lambda one: -one.mean("evidence").mean)
    seeds, leads = len(best.seeds), list[str]()
    for other in others:
        pairs = zip(best.seeds, other.seeds, strict=False)
        lead = crossed_mean_se(torch.stack([a.test.values["evidence"] - b.test.values["evidence"] for a, b in pairs]))
        above = f"{number(Estimate(*lead[:2]))} above {other.name}"
        leads.append(above + ("" if _clear(lead) else " (no clear difference)"))
    times = ", ".join(f"{one.name} {sum(s.seconds for s in one.seeds) / len(one.seeds):.3g} s" for one in evaluated)
    evidence = f"{number(best.mean('evidence'))} nats" + (f", over {seeds} seeds" if seeds > 1 else "")
    yield (
        f"Each with its own decoder: {best.name} gives the best test evidence, {evidence}, {_join(leads)}. "
        f"Training took {times}."
    )


def _amortization(evaluated: list[EvaluatedVariant]) -> Iterator[str]:
    amortized = [one for one in evaluated if one.inference == "Amortized"]
    for split in ("test", "train") if len(amortized) == 1 else ("test",):
        for one in amortized:
            gaps = ("inference_gap", "approximation_gap", "amortization_gap")
            least = ">= " if is_lower_bound(getattr(one, split)) else ""
            total, approximation, amortization = (number(one.mean(gap, split)) for gap in gaps)
            total, approximation = f"{least}{total}", f"{least}{approximation}"
            elbo = "amortized ELBO" if len(amortized) == 1 else f"ELBO of {one.name}"
            yield (
                f"On {split} rows the {elbo} is {total} nats below the evidence: {amortization} from amortization (the "
                f"encoder is not optimal for each row), {approximation} from the variational family (approximation "
                "gap)."
            )


def _same_decoder(same: Sequence[SameDecoder], curve: RefinementCurve | None) -> Iterator[str]:
    if curve is not None:
        gains = {s: mean_se(curve.elbo[m] - curve.elbo[0]) for m, s in enumerate(curve.steps) if s in (1, 5, 20, 100)}
        phrases = ", ".join(f"{number(gain)} nats after {s}" for s, gain in gains.items())
        cost = f"a step takes {curve.seconds_per_step * 1e6:.3g} microseconds per row"
        yield f"Refinement steps on the amortized decoder raise the test ELBO by {phrases}; {cost}."
    if len(same) > 1:
        phrases = ", ".join(f"{one.guide} {_signed(mean_se(one.elbo - same[0].elbo))}" for one in same[1:])
        yield f"On the amortized decoder, test ELBO relative to its own encoder, nats: {phrases}."


def _better_params(evaluated: list[EvaluatedVariant]) -> Iterator[str]:
    """Say what other families, and further local steps, would gain."""
    for one in evaluated:
        if gains := [f"{family} {_signed(one.mean_gain(family))}" for family in one.test.family_gains]:
            change = "the best q of another variational family changes the test ELBO by, nats"
            yield f"On the decoder of {one.name} {change}: {_join(gains)}."
    for one in evaluated:
        if one.inference == "PerDatapoint":
            gap = number(one.mean("amortization_gap", "train"))
            yield (
                f"After training, the rows of {one.name} are {gap} nats below the best ELBO of their family "
                "(amortization gap); more local steps or epochs would close it."
            )


def is_lower_bound(evaluation: Evaluation) -> bool:
    """Whether the evidence of a tenth of the rows or more failed its checks, so that gaps to it may be larger."""
    reliable = evaluation.values.get("evidence_reliable")
    return reliable is not None and reliable.double().mean().item() < 0.9


def _few_rows(evaluated: list[EvaluatedVariant]) -> Iterator[str]:
    """Say where few rows rule a mean, and where the evidence is a lower bound alone."""
    for one in evaluated:
        for split in ("test", "train"):
            evaluation = getattr(one, split)
            name = "elbo" if "elbo" in evaluation.values else "log_joint"
            influence = measure_row_influence(evaluation.values[name])
            if influence.dominates:
                rows, of = ", ".join(map(str, influence.rows)), f"{describe(name).label} of {one.name} on {split} rows"
                yield (
                    f"Three rows ({rows}, counted from 0) make {influence.share:.0%} of the spread of the {of}: its "
                    f"mean is {number(one.mean(name, split))}, the median {influence.median:.5g}, the mean without a "
                    f"tenth at either end {influence.trimmed_mean:.5g} nats. Look at these rows before the means."
                )
            if is_lower_bound(evaluation):
                share = number(mean_se(evaluation.values["evidence_reliable"]))
                yield (
                    f"The evidence of {one.name} on {split} rows is a lower bound that passed its checks for a share "
                    f"of only {share} of the rows: its gaps may be larger; evaluate with more {param('K')} or "
                    f"{param('temperatures', 500)}."
                )


def _faults(evaluated: list[EvaluatedVariant]) -> Iterator[str]:
    steps = param("refine_steps")
    for one in evaluated:
        for split in ("train", "test"):
            values = getattr(one, split).values
            for gap in ("approximation_gap", "amortization_gap"):
                mean = mean_se(values[gap])
                if mean.mean < 0 and _clear(mean):
                    yield (
                        f"The {gap.replace('_', ' ')} of {one.name} on {split} rows is negative beyond its error, "
                        f"{number(mean)}: the estimate is at fault; evaluate with more {param('K')} or {steps}."
                    )
            left = mean_se(values["optimization_gap"]).mean
            if left > max(0.1 * mean_se(values["inference_gap"]).mean, NEGLIGIBLE):
                yield (
                    f"The search for the best variational parameters of {one.name} on {split} rows had not converged: "
                    f"its last doubling of steps gained {left:.3f} nats (optimization gap); evaluate with more {steps}."
                )
