"""Verdicts: sentences computed from the numbers, each with the figures and errors it rests on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pvae.diagnostics.evaluation import Evaluation, RefinementCurve
from pvae.stats import Estimate, mean_se, number

# Standard errors beyond which a difference is called one.
Z_CLEAR = 3.0

GAPS = ("inference", "approximation", "amortization")

# Nats of an optimization gap that nobody would act on.
NEGLIGIBLE = 0.02


@dataclass(frozen=True)
class EvaluatedVariant:
    """A variant trained for itself: what it gave on ``train`` and ``test`` rows, and what it cost.

    Attributes:
        name: of the variant.
        source: its guide's class.
        further: the same variant from further seeds.
    """

    name: str
    seconds: float
    train: Evaluation
    test: Evaluation
    source: str = "Amortized"
    further: tuple[EvaluatedVariant, ...] = ()


@dataclass(frozen=True)
class SameDecoder:
    """A source of q_params on another's decoder: each test row's ELBO, [B] nats, and seconds to find q_params for a row."""

    guide: str
    elbo: Tensor
    seconds_per_row: float


def draw_conclusions(
    own: list[EvaluatedVariant], same: list[SameDecoder], curve: RefinementCurve | None, *, dynamic: bool = False
) -> list[str]:
    """The sentences that the numbers bear out, most important first.

    Arguments:
        own: the variants, each with its own decoder.
        same: the sources on the amortized variant's decoder, that one's own encoder first.
        curve: what refinement steps buy there.
        dynamic: binarization is drawn afresh for each batch.
    """
    judged = [j for j in own if "evidence" in j.test.values]
    sentences = [*_own_decoders(judged), *_amortization(judged, same, curve)]
    sentences += [*_families(judged), *_rows(judged), *_faults(judged)]
    if dynamic and any(j.source == "PerDatapoint" for j in own):
        sentences.append(
            "Under dynamic binarization a row of PerDatapoint is fitted to all binarizations of its image at once, "
            "while evaluation shows it one: compare it under --binarize threshold."
        )
    for j in own:
        if "log_joint" in j.test.values:
            sentences.append(
                f"{j.name} uses a point mass: its objective is log p(x, z) at one point, which bounds no evidence; "
                "it has no gaps and stands in no ranking."
            )
    return sentences


def _clear(estimate: Estimate, seeds: int = 1) -> bool:
    """Whether a difference is beyond its error; of few seeds the error is itself so uncertain that more is asked."""
    from scipy.stats import norm, t

    asked = Z_CLEAR if seeds == 1 else float(t.isf(norm.sf(Z_CLEAR), seeds - 1))
    return abs(estimate.mean) > asked * estimate.se


def _paired_difference(one: EvaluatedVariant, other: EvaluatedVariant, quantity: str) -> Estimate:
    """How far one variant's test mean stands above another's: paired by rows, or by seeds where there are several."""
    pairs = list(zip((one, *one.further), (other, *other.further), strict=False))
    leads = [a.test.values[quantity] - b.test.values[quantity] for a, b in pairs]
    return mean_se(leads[0] if len(leads) == 1 else torch.stack([lead.mean() for lead in leads]))


def _mean(one: EvaluatedVariant, quantity: str, split: str = "test") -> Estimate:
    """A quantity's mean and its error: over rows, or over seeds where there are several."""
    every = [getattr(j, split).values[quantity] for j in (one, *one.further)]
    return mean_se(every[0] if len(every) == 1 else torch.stack([values.mean() for values in every]))


def _mean_gain(one: EvaluatedVariant, family: str) -> Estimate:
    """A family gain's mean and its error: over rows, or over seeds where there are several."""
    every = [j.test.family_gains[family].gain for j in (one, *one.further)]
    return mean_se(every[0] if len(every) == 1 else torch.stack([values.mean() for values in every]))


def _own_decoders(judged: list[EvaluatedVariant]) -> Iterator[str]:
    if len(judged) < 2:
        return
    ranked = sorted(judged, key=lambda j: -_mean(j, "evidence").mean)
    best, rest = ranked[0], ranked[1:]
    leads = []
    for j in rest:
        lead = _paired_difference(best, j, "evidence")
        leads.append(
            f"{number(lead)} above {j.name}" + ("" if _clear(lead, 1 + len(best.further)) else " (no clear difference)")
        )
    times = ", ".join(f"{j.name} {_seconds(j):.3g} s" for j in judged)
    repeated = f", over {1 + len(best.further)} seeds" if best.further else ""
    yield (
        f"Each with its own decoder: {best.name} gives the best test evidence, {number(_mean(best, 'evidence'))} nats"
        f"{repeated}, {_listed(leads)}. Training took {times}."
    )


def _seconds(one: EvaluatedVariant) -> float:
    every = (one, *one.further)
    return sum(j.seconds for j in every) / len(every)


def _listed(parts: list[str]) -> str:
    return " and ".join(parts) if len(parts) < 3 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _amortization(
    judged: list[EvaluatedVariant], same: list[SameDecoder], curve: RefinementCurve | None
) -> Iterator[str]:
    amortized = [j for j in judged if j.source == "Amortized"]
    if not amortized:
        return
    for split in ("test", "train") if len(amortized) == 1 else ("test",):
        for j in amortized:
            lost, family, encoder = (_mean(j, f"{gap}_gap", split) for gap in GAPS)
            who = "the amortized guide" if len(amortized) == 1 else j.name
            yield (
                f"On {split} rows {who} loses {number(lost)} nats of evidence: {number(encoder)} because an encoder "
                f"gives q_params (amortization gap), {number(family)} because of the family of q (approximation gap)."
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


def _families(judged: list[EvaluatedVariant]) -> Iterator[str]:
    for j in judged:
        gains = {name: _mean_gain(j, name) for name in j.test.family_gains}
        if gains:
            phrases = [f"{name} {'+' if gain.mean >= 0 else ''}{number(gain)}" for name, gain in gains.items()]
            yield f"The best q of another family on the decoder of {j.name}, nats of test ELBO won: {_listed(phrases)}."


def _rows(judged: list[EvaluatedVariant]) -> Iterator[str]:
    for j in judged:
        if j.source == "PerDatapoint":
            far = _mean(j, "amortization_gap", "train")
            yield (
                f"The rows of {j.name} stand {number(far)} nats below their optimum after training (optimization "
                "gap); more local steps or epochs would win that."
            )


def _faults(judged: list[EvaluatedVariant]) -> Iterator[str]:
    for j in judged:
        for split in ("train", "test"):
            values = getattr(j, split).values
            for gap in ("approximation_gap", "amortization_gap"):
                found = mean_se(values[gap])
                if found.mean < 0 and _clear(found):
                    yield (
                        f"The {gap.replace('_', ' ')} of {j.name} on {split} rows is negative beyond its error, "
                        f"{number(found)}: the estimate is at fault; evaluate with more --samples or --refine-steps."
                    )
            left = mean_se(values["optimization_gap"]).mean
            if left > max(0.1 * mean_se(values["inference_gap"]).mean, NEGLIGIBLE):
                yield (
                    f"The search for the best q_params of {j.name} on {split} rows had not come to rest: doubling its "
                    f"steps still won {left:.3f} nats; evaluate with more --refine-steps."
                )
