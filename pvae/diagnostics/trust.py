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
TRUST, REFINE, UNKNOWN, DISTRUST = "trust", "trust with refinement", "not established", "don't trust"
FIRES, OPEN, SILENT = "fires", "open", "silent"

# Standard errors by which a figure must be beyond a limit to fire, and within it to be silent; else the rule is open.
BEYOND, WITHIN = 1.0, 2.0


class Rule(NamedTuple):
    """Limits of a figure beyond which one use of a posterior is not trusted.

    Attributes:
        says, source: the sentence, with the figure in the place of {}; who drew the limits, or why they are there.
        use, figure: keys of ``USES`` and ``QUANTITIES``; the rule fires if the figure is below low or above high.
        along: a second figure and its limits, which it must be beyond too: a p-value falls with the number of rows, so
            a rule on one also asks for an effect size.
        condemns: whether the use is not to be trusted if the rule fires; else trust is only not established.
    """

    says: str
    source: str
    use: str
    figure: str
    low: float
    high: float
    along: tuple[str, float, float] | None = None
    condemns: bool = True

    def judge(self, figures: Figures) -> str:
        """Return whether the rule fires, is silent or, since figures are unknown or their errors large, open."""
        if self.figure not in figures or (self.along and self.along[0] not in figures):
            return OPEN
        if self.along and self.along[1] <= figures[self.along[0]].mean <= self.along[2]:
            return SILENT
        mean, se = figures[self.figure]
        se = se if se > 0 else 0.0  # NaN too
        if math.isnan(mean):
            return OPEN
        if mean < self.low - BEYOND * se or mean > self.high + BEYOND * se:
            return FIRES if self.condemns else OPEN
        return SILENT if self.low <= mean - WITHIN * se and mean + WITHIN * se <= self.high else OPEN


INF = math.inf
# By use, figure, its limits, and those of the figure along with it: the sentence, and the limits' source.
_TABLE: dict[tuple[Any, ...], tuple[str, str]] = {
    ("posterior", "mean_error", -INF, 0.5): (
        "The posterior means deviate from those of the reference by {} posterior standard deviations (RMS)",
        "half a standard deviation takes a 90% interval's coverage to 86%",
    ),
    ("posterior", "sd_ratio", 0.7, 1.4): (
        "The posterior standard deviations are {} times those of the reference",
        "a factor of 1.4 in a standard deviation is one of 2 in a variance; at 0.7 a 90% interval covers 75%",
    ),
    ("posterior", "coverage_90", 0.8, 0.97): (
        "The posterior's 90% intervals cover a share of {} of the reference posterior",
        "an interval that fails twice as often as it says",
    ),
    ("posterior", "sbc_p", 0.001, 1, ("sbc_distance", -INF, 0.1)): (
        "The posterior fails SBC: ranks of true latents among its draws are not uniform on simulated data (p = {})",
        "Talts et al. 2018, arXiv:1804.06788; a largest distance of 0.1 is a tenth of all rows misplaced",
    ),
    ("posterior", "tarp_p", 0.001, 1, ("tarp_distance", -INF, 0.1)): (
        "The posterior's joint coverage is off on simulated data (TARP, p = {})",
        "Lemos et al. 2023, arXiv:2302.03026; with a distance of 0.1, as above",
    ),
    ("posterior", "missed_mass", -INF, 0.02): (
        "The posterior has hardly any mass where a share of {} of the true latents of simulated rows lie",
        "true latents are exact posterior draws: a posterior that misses a mode of 2% misses 2% of them",
    ),
    ("posterior", "reliable", 0.9, INF, None, False): (
        "The reference posterior passed its checks for a share of only {} of the rows",
        "rows without a reference may be the ones that are wrong",
    ),
    ("proposal", "k_hat_above", -INF, 0.1): (
        "Importance weights are unreliable: Pareto k-hat is above 0.7 for a share of {} of the rows",
        "Vehtari et al. 2024, arXiv:1507.02646; Yao et al. 2018, arXiv:1802.02538: above 0.7 weights are unreliable",
    ),
    ("proposal", "weighted_off", -INF, 0.1): (
        "Weighted means, standard deviations or evidence are off by more than 0.25 for a share of {} of the rows",
        "against the reference, with 1000 draws; 0.25 posterior standard deviations or nats",
    ),
    ("proposal", "missed_mass", -INF, 0.02): (
        "The proposal hardly ever draws where a share of {} of the true latents of simulated rows lie",
        "as above: weights of draws that are never made do not show",
    ),
    ("proposal", "reliable", 0.9, INF, None, False): (
        "The reference posterior passed its checks for a share of only {} of the rows",
        "as above",
    ),
    ("bound", "inference_gap", -INF, 1): (
        "The ELBO is {} nats below the best estimate of log p(x)",
        "one nat is the size of differences that papers report between models",
    ),
    ("bound", "gap_limit", -INF, 1, None, False): (
        "The ELBO may be up to {} nats below log p(x): the gap, and what the evidence of simulated rows falls short",
        "Grosse, Ghahramani, Adams 2015, arXiv:1511.02543",
    ),
    ("bound", "evidence_reliable", 0.9, INF, None, False): (
        "The evidence is a lower bound that passed its checks for a share of only {} of the rows",
        "Vehtari et al. 2024, arXiv:1507.02646: k-hat below 0.7, and no mode missed",
    ),
    ("model", "active_units", 1, INF): (
        "The latents are not used (posterior collapse): {} latent dimensions are active",
        "Burda, Grosse, Salakhutdinov 2016, arXiv:1509.00519: active if the mean's variance over rows exceeds 0.01",
    ),
    ("model", "holes", -INF, 0.05): (
        "A share of {} of the prior's draws lies in holes, where no row is encoded and the decoder is untrained",
        "0.01 is expected without holes",
    ),
    ("model", "mmd_p", 0.002, 1, ("ks_distance", -INF, 0.1)): (
        "The aggregate posterior differs from the prior (MMD, p = {})",
        "Gretton et al. 2012, JMLR 13; a distance of 0.1 in some dimension is a tenth of the codes misplaced",
    ),
    ("model", "columns_off", -INF, 0.1, ("columns_p", 0.01, 1)): (
        "A share of {} of the columns has a mean that replicated data do not have (p < 0.025 or > 0.975)",
        "Gelman, Meng, Stern 1996, Statistica Sinica 6: a share of 0.05 at most is expected",
    ),
    ("model", "statistics_off", -INF, 0): (
        "Replicated data do not have {} of the rows' summary statistics (p < 0.005 or > 0.995)",
        "as above",
    ),
}
RULES = tuple(Rule(*texts, *limits) for limits, texts in _TABLE.items())

# Figures that say something of the model only if the draws of the rows' posteriors passed their checks.
OF_CODES = ("active_units", "holes", "mmd_p")


class TrustVerdict(NamedTuple):
    """Verdict for one use of a posterior: its level, the sentences it rests on, and what to change or to do first."""

    use: str
    level: str
    because: list[str]
    first: str

    @property
    def advice(self) -> str:
        """What to change first or, where trust is not established, what would establish it; may be empty."""
        words = "To establish it" if self.level == UNKNOWN else "Change first"
        return f"{words}: {self.first}" if self.first else ""


def assess_trust(
    figures: Figures, refined: Figures, *, inference: str = "", family: str = "", next_step: str = ""
) -> dict[str, TrustVerdict]:
    """Return the verdict for each use of a posterior.

    *Trust*: every rule is silent, with its figure known and within its limits by two standard errors. *Trust with
    refinement*: rules fire for the guide, and all are silent for the refined q. *Don't trust*: a rule fires, by a
    standard error at least. *Not established*: no rule fires, but some figure is unknown or too near its limit.

    Arguments:
        figures: of the guide as it was trained.
        refined: those that differ once each row's variational parameters are refined.
        inference, family: class names of the guide and of its family, so that no advice names what is in use.
        next_step: what would establish a verdict that is not, such as a larger budget and its time.

    The model is judged by the refined q and by each row's checked draws, if most rows have such.

    See also: `pvae.diagnostics.diagnose`, which computes the figures.
    """
    advice = partial(_advice, figures=figures, inference=inference, family=family, next_step=next_step)
    return {use: _assess(use, figures, refined, advice) for use in USES}


def _assess(use: str, figures: Figures, refined: Figures, advice: Callable[[str, str], str]) -> TrustVerdict:
    after = {**figures, **refined}
    rules = [rule for rule in RULES if rule.use == use]
    if use == "model":
        figures, refined = after, {}
        if not all(rule.judge(after) == SILENT for rule in RULES if rule.figure == "reliable"):
            rules = [rule._replace(condemns=rule.condemns and rule.figure not in OF_CODES) for rule in rules]
    now, then = ([rule.judge(known) for rule in rules] for known in (figures, after))
    unclear = [rule for rule, status in zip(rules, now, strict=True) if status == OPEN]
    if FIRES in now:
        level = REFINE if set(then) == {SILENT} else DISTRUST
        fired = [rule for rule, *both in zip(rules, now, then, strict=True) if FIRES in both]
        return TrustVerdict(use, level, [_sentence(rule, figures, refined) for rule in fired], advice(use, level))
    within = _within_limits([rule for rule in rules if rule not in unclear], figures)
    if not unclear:
        return TrustVerdict(use, TRUST, within, "")
    return TrustVerdict(use, UNKNOWN, [*_open_sentences(unclear, figures), *within], advice(use, UNKNOWN))


def _open_sentences(rules: list[Rule], figures: Figures) -> Iterator[str]:
    """Say which figures are unknown or too near their limits."""
    unknown = [rule.figure for rule in rules if rule.figure not in figures or math.isnan(figures[rule.figure].mean)]
    if unknown:
        yield f"Not known: {', '.join(describe(name).label for name in unknown)}"
    for rule in rules:
        if rule.figure not in unknown:
            mean, value = figures[rule.figure].mean, number(figures[rule.figure])
            limit = rule.low if mean < rule.low or mean - rule.low < rule.high - mean else rule.high
            near = f"{describe(rule.figure).label} {value}: its errors reach over the limit {limit:g}"
            yield near if rule.low <= mean <= rule.high or rule.condemns else rule.says.format(value)


def _sentence(rule: Rule, figures: Figures, refined: Figures) -> str:
    sentence = rule.says.format(number(figures[rule.figure]))
    return sentence + (f"; after refinement {number(refined[rule.figure])}" if rule.figure in refined else "")


def _within_limits(rules: list[Rule], figures: Figures) -> list[str]:
    known = ", ".join(f"{describe(rule.figure).label} {number(figures[rule.figure])}" for rule in rules)
    return [f"Within limits: {known}"] if rules else []


def _advice(use: str, level: str, *, figures: Figures, inference: str, family: str, next_step: str) -> str:
    """Say what to change first where a rule has fired, by the figure that weighs most, or what establishes trust."""
    if level == UNKNOWN:
        return next_step
    guide = "" if inference == "SemiAmortized" else f" or set {param('guide', 'SemiAmortized')}"
    if level == REFINE:
        return f"the inference method: refine the rows at use{guide}; else a larger encoder"
    values = {name: figure.mean for name, figure in figures.items()}
    if use == "model":
        if values.get("active_units", 1) < 1:
            warm_up, free_bits = (param("objective", f"'ELBO({word}=...)'") for word in ("warm_up", "free_bits"))
            return f"the posterior collapse: set {warm_up} or {free_bits}, or use a weaker decoder"
        if values.get("columns_off", 0) > 0.1 or values.get("statistics_off", 0) > 0:
            return "another likelihood or a larger decoder"
        return f"a prior that follows the encodings: set {param('prior', 'VampPrior')} or {param('prior', 'FlowPrior')}"
    if values.get("amortization_gap", 0.0) > values.get("approximation_gap", 0.0):
        return f"the inference method, then the family: refine the rows at use{guide}"
    families = [param("family", name) for name in ("FullRankNormal", "FlowFamily") if name != family]
    return f"the variational family: set {' or '.join(families)}"
