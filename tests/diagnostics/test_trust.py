"""Rules of the verdict: each fires beyond its limits, is silent within them, open between; the levels follow."""

import math

import pytest

from pvae.diagnostics.quantities import QUANTITIES
from pvae.diagnostics.trust import (
    DISTRUST,
    FIRES,
    OF_CODES,
    OPEN,
    REFINE,
    RULES,
    SILENT,
    TRUST,
    UNKNOWN,
    USES,
    Rule,
    assess_trust,
)
from pvae.stats import Estimate

# Figures with which no rule fires.
SOUND = {
    "reliable": 1.0,
    "mean_error": 0.1,
    "sd_ratio": 1.0,
    "coverage_90": 0.9,
    "sbc_p": 0.4,
    "sbc_distance": 0.03,
    "tarp_p": 0.4,
    "tarp_distance": 0.03,
    "missed_mass": 0.0,
    "active_units": 5,
    "k_hat_above": 0.02,
    "weighted_off": 0.0,
    "inference_gap": 0.4,
    "gap_limit": 0.5,
    "evidence_reliable": 1.0,
    "holes": 0.01,
    "mmd_p": 0.5,
    "ks_distance": 0.03,
    "columns_off": 0.01,
    "columns_p": 0.5,
    "statistics_off": -0.01,
}
CONDEMNING = [rule for rule in RULES if rule.condemns]


def figures(**changed):
    return {name: Estimate(float(value), 0.001) for name, value in (SOUND | changed).items()}


def identify(rule):
    return f"{rule.use}-{rule.figure}"


every_rule = pytest.mark.parametrize("rule", RULES, ids=identify)
every_condemning = pytest.mark.parametrize("rule", CONDEMNING, ids=identify)


def beyond(rule: Rule):
    """Figures with which this rule fires, and its size with it: below its lower limit or above its upper one."""
    low = rule.figure.endswith("_p") or rule.high == math.inf
    value = rule.low - 0.002 if low else rule.high + 0.5
    along = {}
    if rule.along:
        name, least, most = rule.along
        along = {name: most + 0.1 if most < 1 else least - 0.005}
    return {rule.figure: value} | along


@every_rule
def test_each_rule_is_silent_within_its_limits_and_beyond_them_fires_or_withholds_trust(rule):
    assert rule.judge(figures()) == SILENT
    assert rule.judge(figures(**beyond(rule))) == (FIRES if rule.condemns else OPEN)


@every_rule
def test_a_rule_without_its_figure_is_open(rule):
    known = figures(**beyond(rule))
    del known[rule.figure]
    assert rule.judge(known) == OPEN
    assert rule.judge(known | {rule.figure: Estimate(math.nan, math.nan)}) == OPEN


@pytest.mark.parametrize("rule", [rule for rule in RULES if math.isfinite(rule.high) and not rule.along], ids=identify)
def test_a_figure_whose_error_reaches_over_the_limit_leaves_its_rule_open(rule):
    near = figures() | {rule.figure: Estimate(rule.high - 0.01, 0.006)}
    assert rule.judge(near) == OPEN
    assert rule.judge(near | {rule.figure: Estimate(rule.high - 0.01, 0.004)}) == SILENT
    assert rule.judge(near | {rule.figure: Estimate(rule.high + 0.01, 0.02)}) == OPEN


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule.figure.endswith("_p")], ids=identify)
def test_a_small_p_value_alone_does_not_fire(rule):
    assert rule.judge(figures(**{rule.figure: 1e-6})) == SILENT


@every_rule
def test_every_line_names_its_use_its_source_and_the_place_of_its_figure(rule):
    assert rule.use in USES
    assert rule.source
    assert "{}" in rule.says
    assert rule.figure in QUANTITIES
    assert rule.along is None or rule.along[0] in QUANTITIES


def test_sound_figures_are_trusted_for_every_use():
    found = assess_trust(figures(), figures())
    assert {use: v.level for use, v in found.items()} == dict.fromkeys(USES, TRUST)
    assert all(v.use == use and not v.first and v.because[0].startswith("Within limits") for use, v in found.items())


@pytest.mark.parametrize("rule", [rule for rule in CONDEMNING if rule.use != "model"], ids=identify)
def test_the_level_follows_from_what_refinement_leaves(rule):
    wrong, sound = figures(**beyond(rule)), figures()
    for refined, level in ((sound, REFINE), (wrong, DISTRUST), ({}, DISTRUST)):
        found = assess_trust(wrong, refined)
        assert found[rule.use].level == level
        assert found[rule.use].first


@pytest.mark.parametrize("rule", [rule for rule in CONDEMNING if rule.use == "model"], ids=identify)
def test_the_model_is_judged_by_the_refined_posterior(rule):
    wrong, sound = figures(**beyond(rule)), figures()
    assert assess_trust(wrong, sound)["model"].level == TRUST
    assert assess_trust(sound, wrong)["model"].level == DISTRUST
    unchecked = assess_trust(figures(reliable=0.5), {name: wrong[name] for name in beyond(rule)})["model"].level
    assert unchecked == (UNKNOWN if rule.figure in OF_CODES else DISTRUST)


@pytest.mark.parametrize("rule", [rule for rule in RULES if not rule.condemns], ids=identify)
def test_a_rule_that_does_not_condemn_withholds_trust(rule):
    found = assess_trust(figures(**beyond(rule)), {}, next_step="diagnose with budget=standard")[rule.use]
    assert found.level == UNKNOWN
    assert found.advice == "To establish it: diagnose with budget=standard"


def without(*names):
    return {name: value for name, value in figures().items() if name not in names}


@every_rule
def test_a_use_whose_figure_is_unknown_is_not_trusted(rule):
    known = without(rule.figure)
    found = assess_trust(known, known)[rule.use]
    assert found.level == UNKNOWN
    assert found.because[0].startswith("Not known: ")


def test_refinement_that_spoils_something_else_is_no_cure():
    posterior = assess_trust(figures(sd_ratio=0.5), figures(mean_error=0.9))["posterior"]
    assert posterior.level == DISTRUST
    assert any("deviate from those of the reference" in sentence for sentence in posterior.because)


@pytest.mark.parametrize("name", ["inference_gap", "gap_limit"])
def test_a_gap_that_is_negative_by_noise_is_no_fault(name):
    assert {v.level for v in assess_trust(figures(**{name: -0.002}), figures()).values()} == {TRUST}


def test_no_advice_names_what_is_there():
    wrong = figures(inference_gap=4.0, k_hat_above=0.9, amortization_gap=2.0, approximation_gap=1.0)
    said = " ".join(
        v.first for v in assess_trust(wrong, wrong, inference="SemiAmortized", family="FlowFamily").values()
    )
    assert "SemiAmortized" not in said
    wrong = figures(inference_gap=4.0, k_hat_above=0.9, amortization_gap=1.0, approximation_gap=2.0)
    said = " ".join(v.first for v in assess_trust(wrong, wrong, inference="Amortized", family="FlowFamily").values())
    assert "family=FullRankNormal" in said
    assert "FlowFamily" not in said


def test_sentences_give_the_figure_its_error_and_what_refinement_makes_of_it():
    found = assess_trust(figures(mean_error=0.8), figures(mean_error=0.05))
    assert "0.800 ± 0.001" in found["posterior"].because[0]
    assert "after refinement 0.050 ± 0.001" in found["posterior"].because[0]


@pytest.mark.parametrize(("encoder", "family"), [(0.2, 2.0), (2.0, 0.2), (2.0, 1.9)])
def test_what_to_change_first_is_what_loses_more(encoder, family):
    wrong = figures(inference_gap=4.0, amortization_gap=encoder, approximation_gap=family)
    first = assess_trust(wrong, wrong)["bound"].first
    assert first.startswith("the inference method" if encoder > family else "the variational family")
