"""One table of words: every key that a diagnostic reports has an entry, and the document follows the table."""

from pathlib import Path

import pytest
import torch
from oracles import LinearGaussian
from torch import nn

from pvae.diagnostics import DiagnosisBudget, diagnose, measure_latent_geometry
from pvae.diagnostics.evaluation import Budget, evaluate
from pvae.diagnostics.posterior_calibration import calibrate_posterior
from pvae.diagnostics.quantities import QUANTITIES, SECTIONS, describe, summary_frame
from pvae.diagnostics.reference_posterior import ReferencePosterior
from pvae.errors import UserError
from pvae.inference.families import Delta, DiagonalNormal, FullRankNormal
from pvae.inference.guides import Amortized
from pvae.stats import Estimate

SMALL = DiagnosisBudget(
    rows=8, draws=40, steps=4, annealed=3, temperatures=4, chains=3, simulated=12, references=3, reference_draws=100
)
DOCUMENT = Path(__file__).parents[2] / "docs" / "diagnosis.md"


@pytest.fixture(scope="module")
def case():
    torch.manual_seed(0)
    oracle = LinearGaussian(2, 5)
    return oracle.model, Amortized(nn.Linear(5, 4), DiagonalNormal(2)), oracle.sample(10)


def test_every_key_that_evaluation_reports_has_an_entry(case):
    model, guide, x = case
    budget = Budget(40, 4, temperatures=4, chains=3, families={"FullRankNormal": FullRankNormal})
    evaluation = evaluate(model, guide, x, budget=budget)
    point = evaluate(model, Amortized(nn.Linear(5, 2), Delta(2)), x, budget=Budget(2, 1))
    for key in {*evaluation.named_values(), *point.values}:
        assert describe(key).key == key
        assert all(describe(key))


def sound(rows, dim):
    """A reference that is reliable, so that it reports all its figures."""
    flags = torch.ones(rows), torch.ones(rows), torch.ones(rows, dtype=torch.bool), torch.zeros(rows)
    return ReferencePosterior(*(torch.ones(rows, dim) for _ in range(10)), *flags)


def test_every_key_that_a_diagnostic_reports_has_an_entry(case):
    model, guide, x = case
    diagnosis = diagnose(model, guide, x, budget=SMALL)
    spaces = measure_latent_geometry(model, guide, x, x, draws=5).summary()
    ranks = calibrate_posterior(model, guide, x[:1], simulated=5, draws=5).summary()
    reported = {*diagnosis.figures, *diagnosis.refined, *sound(4, 2).summary(), *spaces, *ranks}
    assert not [key for key in reported if describe(key).key != key]
    known = {*reported, "log_joint", "ais", "ais_acceptance", "k_hat", "family_gain"}
    assert known >= QUANTITIES.keys()  # and the table has no more


def test_a_key_that_nothing_reports_has_none():
    with pytest.raises(KeyError):
        describe("elbow")


def test_no_two_quantities_have_one_label_and_every_section_its_own():
    labels = [quantity.label for quantity in QUANTITIES.values()]
    assert len(labels) == len(set(labels))
    assert [key for keys in SECTIONS.values() for key in keys] == list(QUANTITIES)


def test_the_document_lists_the_quantities():
    lines = [line.strip("| ").split(" | ") for line in DOCUMENT.read_text().splitlines() if line.count(" | ") == 3]
    told = [tuple(cells) for cells in lines if cells[0] in QUANTITIES]
    assert told == [
        (q.key, q.label.replace("|", "\\|"), q.unit, q.help.replace("|", "\\|")) for q in QUANTITIES.values()
    ]


def test_a_frame_has_a_row_for_each_quantity_in_the_tables_order():
    figures = {"k_hat_above": Estimate(0.1, 0.02), "elbo": Estimate(-9.0, 0.1), "p of mean": Estimate(0.5, 0.1)}
    frame = summary_frame(figures, {"elbo": Estimate(-8.0, 0.1)})
    assert list(frame.index) == ["elbo", "k_hat_above", "p of mean"]
    assert list(frame.columns) == ["label", "unit", "mean", "se", "refined_mean", "refined_se"]
    assert frame.loc["elbo", "refined_mean"] == -8.0
    assert frame["refined_mean"].isna().sum() == 2
    assert list(summary_frame(figures).columns) == ["label", "unit", "mean", "se"]


# Diagnosis


@pytest.fixture(scope="module")
def diagnosis(case):
    return diagnose(*case, budget=SMALL, seed=1)


def test_a_diagnosis_has_figures_verdicts_and_parts(diagnosis):
    assert {"inference_gap", "k_hat_above", "sbc_p", "active_units", "columns_off"} <= diagnosis.figures.keys()
    assert {"elbo", "inference_gap", "k_hat_above", "sbc_p"} <= diagnosis.refined.keys()
    assert list(diagnosis.verdicts) == ["posterior", "proposal", "bound", "model"]
    assert all(verdict.level for verdict in diagnosis.verdicts.values())
    assert len(diagnosis.parts["rows"].x) == 8
    assert diagnosis.refined["inference_gap"] == diagnosis.figures["approximation_gap"]


def test_a_diagnosis_can_be_read_in_a_terminal_and_in_a_notebook(diagnosis):
    text, page = str(diagnosis), diagnosis._repr_html_()
    assert text.startswith("Diagnosis of 8 rows\n")
    assert repr(diagnosis) == text
    assert "inference gap (nats)" in text
    assert "<table" in page
    assert "inference gap (nats)" in page
    for verdict in diagnosis.verdicts.values():
        assert verdict.level.upper() in text
    assert set(diagnosis.to_frame().index) == diagnosis.figures.keys()


def test_an_evaluation_that_is_given_is_not_made_again(case, diagnosis):
    evaluation = evaluate(*case, budget=Budget(5, 1))
    bounds = evaluation.summary()
    figures = diagnose(*case, budget=SMALL, evaluation=evaluation).figures
    assert figures["inference_gap"] == bounds["inference_gap"]
    assert diagnose(*case, budget=SMALL, evaluation={"elbo": bounds["elbo"]}).figures["elbo"] == bounds["elbo"]


def test_progress_runs_to_one_and_names_each_task(case, diagnosis):
    model, guide, x = case
    seen = []
    again = diagnose(model, guide, x, budget=SMALL, seed=1, progress=lambda share, task: seen.append((share, task)))
    shares, tasks = zip(*seen, strict=True)
    assert list(shares) == sorted(shares)
    assert shares[-1] == 1.0
    assert {"evaluation", "health", "weights-best", "reference-guide"} <= set(tasks)
    assert again.figures.keys() == diagnosis.figures.keys()
    assert again.figures["sbc_p"] == diagnosis.figures["sbc_p"]


def test_an_unknown_budget_is_a_mistake_of_the_user(case):
    with pytest.raises(UserError, match="budget is 'quik'; did you mean 'quick'"):
        diagnose(*case, budget="quik")
