"""Rules of the verdict: one table of what is looked at, where the line is drawn and who drew it, and how it is read.

A fit is judged for each use one may make of it: q as the posterior, q as a proposal for importance weights, the ELBO
as a stand-in for the evidence, and the model itself. A use fails if one of its rules fires; refinement mends it if none
fires for the same q refined to its best q_params.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from pvae.stats import Estimate, number

Figures = Mapping[str, Estimate]

USES = {
    "posterior": "q as the posterior: its means, spreads and intervals",
    "proposal": "q as a proposal: importance weights and what is computed with them",
    "bound": "the ELBO as a stand-in for log p(x)",
    "model": "the model: prior and likelihood, whatever q is",
}
TRUST, REFINE, DISTRUST, UNKNOWN = "trust", "trust with refinement", "don't trust", "no number"


class Rule(NamedTuple):
    """One line of the table.

    Attributes:
        use: what it speaks of, a key of ``USES``.
        figure: by name; it fires when the figure is below ``low`` or above ``high``.
        says: the sentence, with the figure in the place of {}.
        source: who drew the line, or why it is drawn there.
        along: a second figure and its limits, which it must be beyond too: a p-value falls with the number of rows, so
            that a rule on one asks for a size as well.
    """

    use: str
    figure: str
    low: float
    high: float
    says: str
    source: str
    along: tuple[str, float, float] | None = None

    def fires(self, figures: Figures) -> bool:
        """Whether the figures are there and beyond the limits."""
        asked = [(self.figure, self.low, self.high), *([self.along] if self.along else [])]
        return all(name in figures and not low <= figures[name].mean <= high for name, low, high in asked)


INF = math.inf
RULES = (
    Rule(
        "posterior",
        "mean_error",
        0,
        0.5,
        "its means miss those of long HMC chains by {} posterior standard deviations (root mean square)",
        "half a standard deviation takes a 90% interval's coverage to 86%",
    ),
    Rule(
        "posterior",
        "sd_ratio",
        0.7,
        1.4,
        "its standard deviations are {} times those of long HMC chains",
        "a factor of 1.4 in a standard deviation is one of 2 in a variance; at 0.7 a 90% interval covers 75%",
    ),
    Rule(
        "posterior",
        "coverage_90",
        0.8,
        0.97,
        "its 90% intervals hold {} of the draws of long HMC chains",
        "an interval that fails twice as often as it says",
    ),
    Rule(
        "posterior",
        "sbc_p",
        0.01,
        1,
        "ranks of true latents among its draws are not uniform on simulated data (p = {})",
        "Talts et al. 2018, arXiv:1804.06788; a largest distance of 0.1 is a tenth of all rows misplaced",
        along=("sbc_distance", -INF, 0.1),
    ),
    Rule(
        "posterior",
        "tarp_p",
        0.01,
        1,
        "its joint coverage is off on simulated data (TARP, p = {})",
        "Lemos et al. 2023, arXiv:2302.03026; with a distance of 0.1, as above",
        along=("tarp_distance", -INF, 0.1),
    ),
    Rule(
        "posterior",
        "active_units",
        1,
        INF,
        "it has collapsed to the prior: {} latent dimensions are active",
        "Burda, Grosse, Salakhutdinov 2016, arXiv:1509.00519: active if the mean's variance over rows exceeds 0.01",
    ),
    Rule(
        "proposal",
        "k_hat_above",
        0,
        0.1,
        "k-hat is above 0.7 for a share of {} of the rows",
        "Vehtari et al. 2024, arXiv:1507.02646; Yao et al. 2018, arXiv:1802.02538: above 0.7 weights are unreliable",
    ),
    Rule(
        "bound",
        "inference_gap",
        -INF,
        1,
        "it lies {} nats below the best estimate of log p(x)",
        "one nat is the size of differences that papers report between models",
    ),
    Rule(
        "bound",
        "evidence_width",
        -INF,
        1,
        "annealing brackets the evidence of simulated rows only within {} nats",
        "Grosse, Ghahramani, Adams 2015, arXiv:1511.02543",
    ),
    Rule(
        "model",
        "holes",
        0,
        0.05,
        "a share of {} of the prior's draws lies where no row is encoded, so that samples there are untrained",
        "0.01 is expected without holes",
    ),
    Rule(
        "model",
        "mmd_p",
        0.01,
        1,
        "the aggregate of q over the rows differs from the prior (MMD, p = {})",
        "Gretton et al. 2012, JMLR 13; a distance of 0.1 in some dimension is a tenth of the codes misplaced",
        along=("ks_distance", -INF, 0.1),
    ),
    Rule(
        "model",
        "columns_off",
        0,
        0.1,
        "a share of {} of the columns has a mean that data drawn from the model do not have (p < 0.025 or > 0.975)",
        "Gelman, Meng, Stern 1996, Statistica Sinica 6: a share of 0.05 at most is expected",
    ),
    Rule(
        "model",
        "statistics_off",
        0,
        0,
        "{} summary statistics of the rows are not those of data drawn from the model (p < 0.005 or > 0.995)",
        "as above",
    ),
)


# Without one of these figures nothing was looked at that could speak for a use.
ASKED = {
    "posterior": ("mean_error", "sbc_p"),
    "proposal": ("k_hat_above",),
    "bound": ("inference_gap",),
    "model": ("mmd_p", "columns_off"),
}


class TrustVerdict(NamedTuple):
    """What the rules say of one use: the level, the sentences of those that fired, and what to change first."""

    use: str
    level: str
    because: list[str]
    first: str


def assess_trust(guide: Figures, refined: Figures, *, source: str = "", family: str = "") -> list[TrustVerdict]:
    """The verdict for each use.

    Arguments:
        guide: figures of the guide as it was trained.
        refined: figures of the same q refined to its best q_params; what refinement does not change may be left out.
        source, family: the guide's classes, so that no advice names what is there.
    """
    return [_verdict(use, guide, refined, _advice(use, guide, source, family)) for use in USES]


def _verdict(use: str, guide: Figures, refined: Figures, advice: Mapping[str, str]) -> TrustVerdict:
    after = {**guide, **refined}
    rules = [rule for rule in RULES if rule.use == use]
    asked = any(name in guide for name in ASKED[use])
    fired = [rule for rule in rules if asked and rule.fires(guide)]
    left = [rule for rule in rules if rule.fires(after)] if fired else []
    notes = list(_missing(use, guide, after))
    if fired:
        level = DISTRUST if left else REFINE
        because = [_sentence(rule, guide, refined) for rule in (*fired, *(r for r in left if r not in fired))]
    else:
        looked = [rule for rule in rules if rule.figure in guide]
        level = UNKNOWN if notes else TRUST
        because = [_silent(looked, guide)] if asked and looked else []
    return TrustVerdict(use, level, [*because, *notes], advice[level])


def _missing(use: str, guide: Figures, refined: Figures) -> Iterator[str]:
    """What would have to be known for a verdict, and is not."""
    if not any(name in guide for name in ASKED[use]):
        yield "not looked at: it takes a q with a density, and 30 draws at least for k-hat"
    if use == "posterior" and "sound" in guide and guide["sound"].mean < 0.5:
        yield f"no number from long chains: they agree for a share of {number(guide['sound'])} of the rows alone"
    if use == "bound" and "ais" not in guide and "k_hat_above" in refined and refined["k_hat_above"].mean > 0.1:
        yield (
            f"the evidence is by importance sampling, with k-hat above 0.7 for {number(refined['k_hat_above'])} of the "
            "rows even from the refined q, and may be too low: evaluate with --ais"
        )


def _sentence(rule: Rule, guide: Figures, refined: Figures) -> str:
    said = rule.says.format(number(guide[rule.figure]))
    if rule.figure not in refined:
        return said
    return f"{said}; after refinement {number(refined[rule.figure])}"


def _silent(looked: list[Rule], figures: Figures) -> str:
    """What was looked at and found to be within its limits."""
    return "within limits: " + ", ".join(f"{NAMES[r.figure]} {number(figures[r.figure])}" for r in looked)


NAMES = {
    "mean_error": "error of means in posterior standard deviations",
    "sd_ratio": "ratio of standard deviations",
    "coverage_90": "coverage of 90% intervals",
    "sbc_p": "p of ranks",
    "tarp_p": "p of joint coverage",
    "active_units": "active dimensions",
    "k_hat_above": "share of rows with k-hat above 0.7",
    "inference_gap": "nats below the evidence",
    "evidence_width": "nats between annealing's bounds on simulated rows",
    "holes": "share of the prior without codes",
    "mmd_p": "p of the aggregate",
    "columns_off": "share of columns off",
    "statistics_off": "statistics off",
}


def _advice(use: str, figures: Figures, source: str, family: str) -> dict[str, str]:
    """What to change first at each level, by the figure that weighs most."""
    value = {name: figure.mean for name, figure in figures.items()}
    encoder = "refine rows when they are used" + ("" if source == "SemiAmortized" else ", or --guide SemiAmortized")
    others = [name for name in ("FullRankNormal", "FlowFamily") if name != family]
    of_family = f"the family of q: --family {' or '.join(others)}"
    gaps = value.get("approximation_gap", 0.0), value.get("amortization_gap", 0.0)
    change = f"the source of q_params, then the family: {encoder}" if gaps[1] > gaps[0] else of_family
    if use == "bound" and value.get("evidence_width", 0) > 1:
        change = "more --temperatures"
    if use == "model":
        likelihood = value.get("columns_off", 0) > 0.1 or value.get("statistics_off", 0) > 0
        change = (
            "another likelihood or a larger decoder"
            if likelihood
            else "a prior that follows the codes: --prior VampPrior or FlowPrior"
        )
    if use != "model" and value.get("active_units", 1) < 1:
        change = "the collapse: --objective 'ELBO(warm_up=...)' or 'ELBO(free_bits=...)', or a weaker decoder"
    return {
        TRUST: "",
        UNKNOWN: "",
        REFINE: f"the source of q_params: {encoder}; else a larger encoder",
        DISTRUST: change,
    }
