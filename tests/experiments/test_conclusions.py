"""Conclusions: differences over seeds and rows are clear as seldom as stated, few rows that rule a mean are named."""

import pytest
import torch
from scipy.stats import norm, t

from pvae.diagnostics.evaluation import Evaluation
from pvae.experiments.conclusions import Z_CLEAR, EvaluatedVariant, _clear, draw_conclusions
from pvae.reporting.tables import _estimate
from pvae.stats import crossed_mean_se, mean_se, measure_row_influence

ROWS = 100


def differences(seeds, row_sd, seed_sd, rest_sd, repeats, generator):
    """Paired differences of two variants that are equal in truth, [repeats, seeds, ROWS]."""

    def normal(*shape):
        return torch.randn(repeats, *shape, generator=generator, dtype=torch.double)

    return row_sd * normal(1, ROWS) + seed_sd * normal(seeds, 1) + rest_sd * normal(seeds, ROWS)


def false_rate(values):
    return sum(_clear(crossed_mean_se(one)) for one in values) / len(values)


@pytest.mark.parametrize("seeds", [1, 2, 3, 5, 8])
def test_equal_variants_seldom_differ_clearly_over_shared_rows(seeds):
    # Rows' paired sd 1, seeds' sd 0.02: nominal 0.0027, standard error of a rate over 1000 repeats 0.0016.
    values = differences(seeds, 1.0, 0.02, 0.1, 1000, torch.Generator().manual_seed(seeds))
    assert false_rate(values) < 0.0027 + 4 * 0.0016


@pytest.mark.parametrize("seeds", [2, 3, 5, 8])
@pytest.mark.parametrize(("row_sd", "seed_sd"), [(0.02, 0.5), (1.0, 0.5), (1.0, 0.1)])
def test_equal_variants_seldom_differ_clearly_over_seeds(seeds, row_sd, seed_sd):
    # Two and three seeds can't tell their own spread: up to 0.036 and 0.02 in simulations of 20,000 repeats, 0.008 for
    # five and more, see docs/verdict-error-rates.md; standard error here at most 0.006.
    values = differences(seeds, row_sd, seed_sd, 0.3, 800, torch.Generator().manual_seed(seeds))
    most, error = {2: (0.036, 0.0066), 3: (0.02, 0.005)}.get(seeds, (0.008, 0.0032))
    assert false_rate(values) < most + 4 * error


def test_the_error_over_seeds_alone_would_not_do():
    values = differences(5, 1.0, 0.02, 0.1, 300, torch.Generator().manual_seed(0))
    critical = float(t.isf(norm.sf(Z_CLEAR), 4))
    over_seeds = [mean_se(one.mean(1)) for one in values]
    assert sum(abs(e.mean) > critical * e.se for e in over_seeds) / 300 > 0.03


def test_a_difference_that_is_there_is_clear():
    five = differences(5, 1.0, 0.02, 0.1, 200, torch.Generator().manual_seed(0)) + 0.5  # five standard errors
    assert false_rate(five) > 0.9
    values = differences(3, 0.3, 0.02, 0.1, 200, torch.Generator().manual_seed(0)) + 1.0
    assert all(_clear(crossed_mean_se(one)) for one in values)


def test_one_seed_has_the_error_over_rows():
    values = torch.randn(1, 50, generator=torch.Generator().manual_seed(0))
    mean, se, df = crossed_mean_se(values)
    assert (mean, se, df) == (*mean_se(values[0]), 49)


# Few rows

SEEDED = torch.Generator().manual_seed(1)
ORDINARY = {
    "normal": torch.randn(100, generator=SEEDED),
    "lognormal": torch.randn(100, generator=SEEDED).exp(),
    "uniform": torch.rand(200, generator=SEEDED),
}


@pytest.mark.parametrize("values", ORDINARY.values(), ids=ORDINARY)
def test_ordinary_rows_rule_no_mean(values):
    assert not measure_row_influence(values).dominates


def evaluation(elbo, reliable=1.0):
    names = ("evidence", "inference_gap", "approximation_gap", "amortization_gap", "optimization_gap")
    values = {name: torch.rand(len(elbo), generator=torch.Generator().manual_seed(0)) for name in names}
    share = (torch.arange(len(elbo)) < reliable * len(elbo)).double()
    return Evaluation(values | {"elbo": elbo, "best_elbo": elbo, "evidence_reliable": share}, 100, 1.0)


def counts():
    """ELBOs of counts of which three explode: median -507, mean about -166,000."""
    elbo = -507 + torch.randn(200, generator=torch.Generator().manual_seed(0))
    elbo[[12, 77, 140]] = torch.tensor([-3e7, -2e6, -1e6])
    return elbo


def test_three_rows_that_make_the_mean_are_named_with_the_median():
    one = EvaluatedVariant("Amortized", 1.0, evaluation(counts()), evaluation(counts()))
    (sentence,) = [s for s in draw_conclusions([one], [], None) if "Three rows" in s and "test" in s]
    assert "Three rows (12, 77, 140, counted from 0) make 100% of the spread of the ELBO of Amortized" in sentence
    assert "the median -507" in sentence
    plain = evaluation(-507 + torch.randn(200, generator=torch.Generator().manual_seed(2)))
    assert not [s for s in draw_conclusions([EvaluatedVariant("A", 1.0, plain, plain)], [], None) if "Three rows" in s]


def test_gaps_to_a_lower_bound_are_at_least_what_is_said():
    elbo = -507 + torch.randn(200, generator=torch.Generator().manual_seed(2))
    for reliable, said in ((0.5, True), (1.0, False)):
        one = EvaluatedVariant("Amortized", 1.0, evaluation(elbo, reliable), evaluation(elbo, reliable))
        sentences = draw_conclusions([one], [], None)
        assert any("is >= " in s for s in sentences) == said
        assert any("is a lower bound that passed its checks" in s for s in sentences) == said


def test_a_table_shows_the_median_and_the_bound():
    assert _estimate({"mean": -165877.0, "se": 164637.0, "median": -507.0}) == "-165877 ± 164637 (median -507)"
    assert _estimate({"mean": 1.0, "se": 0.1, "at_least": True}) == ">= 1.00 ± 0.10"
