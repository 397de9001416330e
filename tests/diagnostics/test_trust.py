"""Rules of the verdict: each fires beyond its limits and is silent within them, and the levels follow."""

import math

import pytest

from pvae.diagnostics.quantities import QUANTITIES
from pvae.diagnostics.trust import DISTRUST, REFINE, RULES, TRUST, UNKNOWN, USES, Rule, assess_trust
from pvae.stats import Estimate

# Figures with which no rule fires.
SOUND = {
    "sound": 0.95,
    "ais": -90.0,
    "mean_error": 0.1,
    "sd_ratio": 1.0,
    "coverage_90": 0.9,
    "sbc_p": 0.4,
    "sbc_distance": 0.03,
    "tarp_p": 0.4,
    "tarp_distance": 0.03,
    "active_units": 5,
    "k_hat_above": 0.02,
    "inference_gap": 0.4,
    "evidence_width": 0.2,
    "holes": 0.01,
    "mmd_p": 0.5,
    "ks_distance": 0.03,
    "columns_off": 0.01,
    "statistics_off": 0,
}


def figures(**changed):
    return {name: Estimate(float(value), 0.001) for name, value in (SOUND | changed).items()}


def beyond(rule: Rule):
    """Figures with which this rule fires, and its size with it: below its lower limit or above its upper one."""
    value = rule.high + 0.5 if rule.high < math.inf and not rule.figure.endswith("_p") else rule.low - 0.001
    along = {} if rule.along is None else {rule.along[0]: rule.along[2] + 0.1}
    return {rule.figure: value} | along


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.figure)
def test_each_rule_is_silent_within_its_limits_and_fires_beyond_them(rule):
    assert not rule.fires(figures())
    assert rule.fires(figures(**beyond(rule)))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.figure)
def test_a_rule_without_its_figure_says_nothing(rule):
    known = figures(**beyond(rule))
    del known[rule.figure]
    assert not rule.fires(known)


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule.along], ids=lambda rule: rule.figure)
def test_a_small_p_value_alone_does_not_fire(rule):
    assert not rule.fires(figures(**{rule.figure: 1e-6}))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.figure)
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


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.figure)
def test_the_level_follows_from_what_refinement_leaves(rule):
    wrong, sound = figures(**beyond(rule)), figures()
    for refined, level in ((sound, REFINE), (wrong, DISTRUST), ({}, DISTRUST)):
        found = assess_trust(wrong, refined)
        assert found[rule.use].level == level
        assert found[rule.use].first
        assert all(found[use].level == TRUST for use in USES if use != rule.use)


def without(*names):
    return {name: value for name, value in figures().items() if name not in names}


@pytest.mark.parametrize(
    ("use", "names"),
    [
        ("posterior", ("mean_error", "sbc_p")),
        ("proposal", ("k_hat_above",)),
        ("bound", ("inference_gap",)),
        ("model", ("mmd_p", "columns_off")),
    ],
)
def test_a_use_that_was_not_looked_at_is_not_trusted(use, names):
    levels = {use: v.level for use, v in assess_trust(without(*names), without(*names)).items()}
    assert levels[use] == UNKNOWN
    assert all(level == TRUST for other, level in levels.items() if other != use)


def test_chains_that_disagree_are_no_ground_for_trust():
    found = assess_trust(figures(sound=0.3), figures())["posterior"]
    assert found.level == UNKNOWN
    assert "chains converged for a share of only 0.300" in found.because[-1]


def test_evidence_by_unreliable_weights_is_no_ground_for_trust():
    known = without("ais") | {"k_hat_above": Estimate(0.5, 0.01)}
    found = assess_trust(known, known)["bound"]
    assert found.level == UNKNOWN
    assert found.because[-1].endswith("evaluate with temperatures=500")
    assert assess_trust(known | {"ais": figures()["ais"]}, known)["bound"].level == TRUST


def test_refinement_that_spoils_something_else_is_no_cure():
    posterior = assess_trust(figures(sd_ratio=0.5), figures(mean_error=0.9))["posterior"]
    assert posterior.level == DISTRUST
    assert any("deviate from those of long HMC chains" in sentence for sentence in posterior.because)


@pytest.mark.parametrize("name", ["inference_gap", "evidence_width"])
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
