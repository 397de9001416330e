"""Rules of trust: limits of the diagnostics' figures, who drew them, and the verdict for each use of a posterior."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

from pvae.diagnostics.quantities import Figures, describe
from pvae.errors import param
from pvae.stats import number

USES = {
    "posterior": "the posterior: its means, standard deviations and intervals",
    "proposal": "the proposal: importance weights and what is computed with them",
    "bound": "the ELBO in the place of log p(x)",
    "model": "the model: prior and likelihood, whatever the variational family",
}
TRUST, REFINE, DISTRUST, UNKNOWN = "trust", "trust with refinement", "don't trust", "no number"


class Rule(NamedTuple):
    """Limits of a figure beyond which one use of a posterior is not trusted.

    Attributes:
        says, source: the sentence, with the figure in the place of {}; who drew the limits, or why they are there.
        use, figure: keys of ``USES`` and ``QUANTITIES``; the rule fires if the figure is below low or above high.
        along: a second figure and its limits, which it must be beyond too: a p-value falls with the number of rows, so
            a rule on one also asks for an effect size.
    """

    says: str
    source: str
    use: str
    figure: str
    low: float
    high: float
    along: tuple[str, float, float] | None = None

    def fires(self, figures: Figures) -> bool:
        """Return whether the figures are known and beyond the limits."""
        limits = [(self.figure, self.low, self.high), *([self.along] if self.along else [])]
        return all(name in figures and not low <= figures[name].mean <= high for name, low, high in limits)


INF = math.inf
# By use, figure, its limits, and those of the figure along with it: the sentence, and the limits' source.
_TABLE: dict[tuple[Any, ...], tuple[str, str]] = {
    ("posterior", "mean_error", 0, 0.5): (
        "The posterior means deviate from those of long HMC chains by {} posterior standard deviations (RMS)",
        "half a standard deviation takes a 90% interval's coverage to 86%",
    ),
    ("posterior", "sd_ratio", 0.7, 1.4): (
        "The posterior standard deviations are {} times those of long HMC chains",
        "a factor of 1.4 in a standard deviation is one of 2 in a variance; at 0.7 a 90% interval covers 75%",
    ),
    ("posterior", "coverage_90", 0.8, 0.97): (
        "The posterior's 90% intervals cover a share of {} of the draws of long HMC chains",
        "an interval that fails twice as often as it says",
    ),
    ("posterior", "sbc_p", 0.01, 1, ("sbc_distance", -INF, 0.1)): (
        "The posterior fails SBC: ranks of true latents among its draws are not uniform on simulated data (p = {})",
        "Talts et al. 2018, arXiv:1804.06788; a largest distance of 0.1 is a tenth of all rows misplaced",
    ),
    ("posterior", "tarp_p", 0.01, 1, ("tarp_distance", -INF, 0.1)): (
        "The posterior's joint coverage is off on simulated data (TARP, p = {})",
        "Lemos et al. 2023, arXiv:2302.03026; with a distance of 0.1, as above",
    ),
    ("posterior", "active_units", 1, INF): (
        "The posterior has collapsed to the prior: {} latent dimensions are active",
        "Burda, Grosse, Salakhutdinov 2016, arXiv:1509.00519: active if the mean's variance over rows exceeds 0.01",
    ),
    ("proposal", "k_hat_above", 0, 0.1): (
        "Importance weights are unreliable: Pareto k-hat is above 0.7 for a share of {} of the rows",
        "Vehtari et al. 2024, arXiv:1507.02646; Yao et al. 2018, arXiv:1802.02538: above 0.7 weights are unreliable",
    ),
    ("bound", "inference_gap", -INF, 1): (
        "The ELBO is {} nats below the best estimate of log p(x)",
        "one nat is the size of differences that papers report between models",
    ),
    ("bound", "evidence_width", -INF, 1): (
        "Annealing brackets the evidence of simulated rows only to within {} nats",
        "Grosse, Ghahramani, Adams 2015, arXiv:1511.02543",
    ),
    ("model", "holes", 0, 0.05): (
        "A share of {} of the prior's draws lies in holes, where no row is encoded and the decoder is untrained",
        "0.01 is expected without holes",
    ),
    ("model", "mmd_p", 0.01, 1, ("ks_distance", -INF, 0.1)): (
        "The aggregate posterior differs from the prior (MMD, p = {})",
        "Gretton et al. 2012, JMLR 13; a distance of 0.1 in some dimension is a tenth of the codes misplaced",
    ),
    ("model", "columns_off", 0, 0.1): (
        "A share of {} of the columns has a mean that replicated data do not have (p < 0.025 or > 0.975)",
        "Gelman, Meng, Stern 1996, Statistica Sinica 6: a share of 0.05 at most is expected",
    ),
    ("model", "statistics_off", 0, 0): (
        "Replicated data do not have {} of the rows' summary statistics (p < 0.005 or > 0.995)",
        "as above",
    ),
}
RULES = tuple(Rule(*texts, *limits) for limits, texts in _TABLE.items())

# A use is not assessed unless one of these figures is known.
EVIDENCE = {
    "posterior": ("mean_error", "sbc_p"),
    "proposal": ("k_hat_above",),
    "bound": ("inference_gap",),
    "model": ("mmd_p", "columns_off"),
}


class TrustVerdict(NamedTuple):
    """Verdict for one use of a posterior: its level, the sentences it rests on, and what to change first."""

    use: str
    level: str
    because: list[str]
    first: str


def assess_trust(
    figures: Figures, refined: Figures, *, inference: str = "", family: str = ""
) -> dict[str, TrustVerdict]:
    """Return the verdict for each use: trust if no rule fires, trust with refinement if none fires for the refined q.

    Arguments:
        figures: of the guide as it was trained.
        refined: those that differ once each row's variational parameters are refined.
        inference, family: class names of the guide and of its family, so that no advice names what is in use.

    See also: `pvae.diagnostics.diagnose`, which computes the figures.
    """
    advice = partial(_advice, figures=figures, inference=inference, family=family)
    return {use: _assess(use, figures, refined, advice) for use in USES}


def _assess(use: str, figures: Figures, refined: Figures, advice: Callable[[str, str], str]) -> TrustVerdict:
    after = {**figures, **refined}
    rules = [rule for rule in RULES if rule.use == use and _known(use, figures)]
    fired = [rule for rule in rules if rule.fires(figures)]
    notes = list(_not_assessed(use, figures, after))
    if not fired:
        return TrustVerdict(use, UNKNOWN if notes else TRUST, [*_within_limits(rules, figures), *notes], "")
    left = [rule for rule in rules if rule.fires(after)]
    level = DISTRUST if left else REFINE
    sentences = [_sentence(rule, figures, refined) for rule in (*fired, *(r for r in left if r not in fired))]
    return TrustVerdict(use, level, [*sentences, *notes], advice(use, level))


def _known(use: str, figures: Figures) -> bool:
    return any(name in figures for name in EVIDENCE[use])


def _not_assessed(use: str, figures: Figures, refined: Figures) -> Iterator[str]:
    """Say what would have to be known for a verdict, and is not."""
    if not _known(use, figures):
        yield "Not assessed: this needs a posterior with a density, and at least 30 draws for k-hat"
    if use == "posterior" and "sound" in figures and figures["sound"].mean < 0.5:
        yield f"Not assessed against MCMC: chains converged for a share of only {number(figures['sound'])} of the rows"
    if use == "bound" and "ais" not in figures and "k_hat_above" in refined and refined["k_hat_above"].mean > 0.1:
        yield (
            f"The evidence is by importance sampling with k-hat above 0.7 for {number(refined['k_hat_above'])} of the "
            f"rows even for the refined posterior, and may be too low: evaluate with {param('temperatures', 500)}"
        )


def _sentence(rule: Rule, figures: Figures, refined: Figures) -> str:
    sentence = rule.says.format(number(figures[rule.figure]))
    return sentence + (f"; after refinement {number(refined[rule.figure])}" if rule.figure in refined else "")


def _within_limits(rules: list[Rule], figures: Figures) -> list[str]:
    names = [rule.figure for rule in rules if rule.figure in figures]
    known = ", ".join(f"{describe(name).label} {number(figures[name])}" for name in names)
    return [f"Within limits: {known}"] if names else []


def _advice(use: str, level: str, *, figures: Figures, inference: str, family: str) -> str:
    """Say what to change first where a rule has fired, by the figure that weighs most."""
    guide = "" if inference == "SemiAmortized" else f" or set {param('guide', 'SemiAmortized')}"
    if level == REFINE:
        return f"the inference method: refine the rows at use{guide}; else a larger encoder"
    values = {name: figure.mean for name, figure in figures.items()}
    if use == "model":
        if values.get("columns_off", 0) > 0.1 or values.get("statistics_off", 0) > 0:
            return "another likelihood or a larger decoder"
        return f"a prior that follows the encodings: set {param('prior', 'VampPrior')} or {param('prior', 'FlowPrior')}"
    if values.get("active_units", 1) < 1:
        warm_up, free_bits = (param("objective", f"'ELBO({word}=...)'") for word in ("warm_up", "free_bits"))
        return f"the posterior collapse: set {warm_up} or {free_bits}, or use a weaker decoder"
    if use == "bound" and values.get("evidence_width", 0) > 1:
        return f"the annealing: more {param('temperatures')}"
    if values.get("amortization_gap", 0.0) > values.get("approximation_gap", 0.0):
        return f"the inference method, then the family: refine the rows at use{guide}"
    families = [param("family", name) for name in ("FullRankNormal", "FlowFamily") if name != family]
    return f"the variational family: set {' or '.join(families)}"
