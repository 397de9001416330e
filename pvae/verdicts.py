"""Verdicts: sentences computed from the numbers, each with the figures and errors it rests on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from pvae.evaluation import Evaluation, RefinementCurve
from pvae.stats import Estimate, mean_se

__all__ = ["Judged", "SameDecoder", "verdicts"]

# Standard errors beyond which a difference is called one.
CLEAR = 3.0


@dataclass(frozen=True)
class Judged:
    """A variant trained for itself: what it gave on ``train`` and ``test`` rows, and what it cost."""

    guide: str
    seconds: float
    train: Evaluation
    test: Evaluation


@dataclass(frozen=True)
class SameDecoder:
    """A source of lam on another's decoder: each test row's ELBO, [B] nats, and seconds to find lam for a row."""

    guide: str
    elbo: Tensor
    seconds_per_row: float


def verdicts(
    own: list[Judged], same: list[SameDecoder], curve: RefinementCurve | None, *, dynamic: bool = False
) -> list[str]:
    """The sentences that the numbers bear out, most important first.

    Arguments:
        own: the variants, each with its own decoder.
        same: the sources on the amortized variant's decoder, that one's own encoder first.
        curve: what refinement steps buy there.
        dynamic: binarization is drawn afresh for each batch.
    """
    judged = [j for j in own if "evidence" in j.test.values]
    sentences = [*_own_decoders(judged), *_amortization(judged, same, curve), *_rows(judged), *_faults(judged)]
    if dynamic and any(j.guide == "PerDatapoint" for j in own):
        sentences.append(
            "Under dynamic binarization a row of PerDatapoint is fitted to all binarizations of its image at once, "
            "while evaluation shows it one: compare it under --binarize threshold."
        )
    for j in own:
        if "log_joint" in j.test.values:
            sentences.append(
                f"{j.guide} uses a point mass: its objective is log p(x, z) at one point, which bounds no evidence; "
                "it has no gaps and stands in no ranking."
            )
    return sentences


def number(estimate: Estimate) -> str:
    """A mean with its standard error, with as many digits as the error bears out.

    >>> number(Estimate(-16.8912, 0.0312))
    '-16.89 ± 0.03'
    """
    digits = 1 if estimate.se >= 0.3 else 2 if estimate.se >= 0.01 else 3
    return f"{estimate.mean:z.{digits}f} ± {estimate.se:.{digits}f}"


def _clear(estimate: Estimate) -> bool:
    return abs(estimate.mean) > CLEAR * estimate.se


def _own_decoders(judged: list[Judged]) -> Iterator[str]:
    if len(judged) < 2:
        return
    ranked = sorted(judged, key=lambda j: -j.test.values["evidence"].mean().item())
    best, rest = ranked[0], ranked[1:]
    leads = []
    for j in rest:
        lead = mean_se(best.test.values["evidence"] - j.test.values["evidence"])
        leads.append(f"{number(lead)} above {j.guide}" + ("" if _clear(lead) else " (no clear difference)"))
    times = ", ".join(f"{j.guide} {j.seconds:.3g} s" for j in judged)
    yield (
        f"Each with its own decoder: {best.guide} gives the best test evidence, "
        f"{number(mean_se(best.test.values['evidence']))} nats, {' and '.join(leads)}. Training took {times}."
    )


def _amortization(judged: list[Judged], same: list[SameDecoder], curve: RefinementCurve | None) -> Iterator[str]:
    amortized = next((j for j in judged if j.guide == "Amortized"), None)
    if amortized is None:
        return
    for split in ("test", "train"):
        values = getattr(amortized, split).values
        lost, family, encoder = (
            mean_se(values[f"{name}_gap"]) for name in ("inference", "approximation", "amortization")
        )
        yield (
            f"On {split} rows the amortized guide loses {number(lost)} nats of evidence: {number(encoder)} because an "
            f"encoder gives lam (amortization gap), {number(family)} because of the family of q (approximation gap)."
        )
    if curve is not None:
        wins = {s: mean_se(curve.elbo[m] - curve.elbo[0]) for m, s in enumerate(curve.steps) if s in (1, 5, 20, 100)}
        bought = ", ".join(f"{number(win)} nats after {s}" for s, win in wins.items())
        yield (
            f"Refinement steps on its decoder win back: {bought}; a step costs {curve.seconds_per_step * 1e6:.3g} "
            "microseconds per test row."
        )
    if len(same) > 1:
        gains = [(s.guide, mean_se(s.elbo - same[0].elbo)) for s in same[1:]]
        parts = ", ".join(f"{guide} {'+' if gain.mean >= 0 else ''}{number(gain)}" for guide, gain in gains)
        yield f"On the same decoder, against its own encoder, nats of test ELBO: {parts}."


def _rows(judged: list[Judged]) -> Iterator[str]:
    for j in judged:
        if j.guide == "PerDatapoint":
            far = mean_se(j.train.values["amortization_gap"])
            yield (
                f"The rows of PerDatapoint stand {number(far)} nats below their optimum after training (optimization "
                "gap); more local steps or epochs would win that."
            )


def _faults(judged: list[Judged]) -> Iterator[str]:
    for j in judged:
        for split in ("train", "test"):
            values = getattr(j, split).values
            for gap in ("approximation_gap", "amortization_gap"):
                found = mean_se(values[gap])
                if found.mean < 0 and _clear(found):
                    yield (
                        f"The {gap.replace('_', ' ')} of {j.guide} on {split} rows is negative beyond its error, "
                        f"{number(found)}: the estimate is at fault; evaluate with more --samples or --refine-steps."
                    )
            left = mean_se(values["optimization_gap"]).mean
            if left > 0.1 * max(mean_se(values["inference_gap"]).mean, 1e-9):
                yield (
                    f"The search for the best lam of {j.guide} on {split} rows had not come to rest: doubling its "
                    f"steps still won {left:.3f} nats; evaluate with more --refine-steps."
                )
