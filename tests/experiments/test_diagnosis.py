"""The diagnosis of a run: its stages, what it keeps, how it goes on, and what it says of good and of bad posteriors."""

import json
import math
from dataclasses import replace

import pytest
import torch

from pvae.diagnostics import battery
from pvae.diagnostics.battery import DIAGNOSIS_BUDGETS, DiagnosisBudget
from pvae.diagnostics.evaluation import Budget
from pvae.diagnostics.trust import USES
from pvae.errors import UserError
from pvae.experiments import compare, diagnosis
from pvae.experiments.run import open_variants
from pvae.runtime.files import write_json
from pvae.samplers import ais

SMALL = DiagnosisBudget(
    rows=12, draws=30, steps=3, annealed=3, temperatures=4, chains=2, simulated=20, references=2, reference_draws=100
)
JOB = {"rows": 6, "budget": Budget(6, 2)}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A fitted and evaluated run of two variants, and a function that diagnoses it."""
    from pvae.recipes.recipe import Recipe

    folder = tmp_path_factory.mktemp("runs") / "run"
    recipe = Recipe(epochs=1, latent=2, network={"type": "MLP", "hidden": [8]})
    results = compare.compare(recipe, compare.RunOptions(folder, **JOB), vary={"family": ["DiagonalNormal", "Delta"]})
    return folder, results


@pytest.fixture(autouse=True)
def short_warm_up(monkeypatch):
    monkeypatch.setattr(ais, "SETTLE", 4)
    monkeypatch.setattr(ais, "MIN_TRANSITIONS", 8)


def diagnosed(run, plan=SMALL, only=(), say=lambda line: None):
    folder, results = run
    job = compare.RunOptions(folder, **JOB, say=say)
    return diagnosis.diagnose_run(open_variants(folder), results, job, plan, only)


KINDS = ("weights", "calibration", "symmetric", "reference")


def test_every_stage_is_made_and_judged(run):
    good, point = diagnosed(run)["variants"]
    assert good["name"] == "DiagonalNormal"
    assert set(diagnosis.load_parts(run[0], good)) == {
        "rows",
        "health",
        "predictive",
        "sandwich",
        "health-best",
        *(f"{kind}-{who}" for kind in KINDS for who in ("guide", "best")),
    }
    assert {"elbo", "k_hat_above", "sbc_p", "evidence_width", "reliable", "holes", "columns_off"} <= set(
        good["figures"]
    )
    assert {"k_hat_above", "sbc_p", "reliable", "inference_gap"} <= set(good["refined"])
    assert [verdict["use"] for verdict in good["verdicts"]] == list(USES)
    # A point mass has no weights, no bound and no spread: only its codes and its model are looked at.
    assert set(diagnosis.load_parts(run[0], point)) == {"rows", "health", "predictive"}
    assert not {"k_hat_above", "sbc_p", "inference_gap"} & set(point["figures"])
    assert diagnosis.load_diagnosis(run[0])["variants"][0]["figures"].keys() == good["figures"].keys()


def test_what_is_finished_is_not_made_again(run, monkeypatch):
    before = diagnosed(run)

    def no(*args, **kwargs):
        raise AssertionError("made again")

    for stage in (
        "sandwich",
        "posterior",
        "compare_with_reference",
        "measure_symmetric_divergence",
        "measure_latent_usage",
        "run_predictive_checks",
        "calibrate",
        "bounds",
    ):
        monkeypatch.setattr(battery, stage, no)
    after = diagnosed(run)
    for one, other in zip(before["variants"], after["variants"], strict=True):
        assert json.dumps(one | {"seconds": 0}) == json.dumps(other | {"seconds": 0})


def test_it_goes_on_where_it_was_stopped(run, monkeypatch):
    plan, calls, whole = replace(SMALL, annealed=76), [], battery.sandwich

    def stopped(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return whole(*args, **kwargs)

    monkeypatch.setattr(battery, "sandwich", stopped)
    with pytest.raises(KeyboardInterrupt):
        diagnosed(run, plan, ["DiagonalNormal"])
    found = diagnosed(run, plan, ["DiagonalNormal"])
    assert len(calls) == 4  # three batches, one of them twice
    assert len(diagnosis.load_parts(run[0], found["variants"][0])["sandwich"].lower) == 76


def test_another_plan_does_not_read_what_an_earlier_one_left(run):
    diagnosed(run, replace(SMALL, annealed=76), ["DiagonalNormal"])
    found = diagnosed(run, SMALL, ["DiagonalNormal"])
    assert len(diagnosis.load_parts(run[0], found["variants"][0])["sandwich"].lower) == 3


def test_one_variant_alone_leaves_the_others_diagnosis(run):
    diagnosed(run)
    found = diagnosed(run, only=["Delta"])
    assert {own["name"] for own in found["variants"]} == {"DiagonalNormal", "Delta"}


def test_the_same_seed_gives_the_same_figures(run, tmp_path):
    import shutil

    other = shutil.copytree(run[0], tmp_path / "run")
    shutil.rmtree(other / "diagnosis", ignore_errors=True)
    for one, again in zip(diagnosed(run)["variants"], diagnosed((other, run[1]))["variants"], strict=True):
        assert json.dumps(one["figures"]) == json.dumps(again["figures"])


def test_the_price_is_said_before_anything_is_done(run):
    said = []
    diagnosed(run, say=said.append)
    assert "rows through the decoder" in said[0]


def test_an_unknown_variant_is_a_mistake_of_the_user(run):
    with pytest.raises(UserError, match="no such variant; did you mean 'Delta'"):
        diagnosed(run, only=["Delt"])


def test_a_diagnosis_of_another_version_is_refused(run, tmp_path):
    write_json(tmp_path / "diagnosis.json", {"schema": 0})
    with pytest.raises(UserError, match="another version"):
        diagnosis.load_diagnosis(tmp_path)
    assert diagnosis.load_diagnosis(tmp_path / "nothing") == {}


def test_results_of_other_fits_are_not_current(run):
    folder, _ = run
    entries = open_variants(folder)
    assert compare.current_results(folder, entries) == json.loads((folder / "results.json").read_text())
    with torch.no_grad():
        next(entries[0].fits[0].program.parameters()).add_(1)
    assert compare.current_results(folder, entries) == {}


@pytest.mark.parametrize("name", DIAGNOSIS_BUDGETS)
def test_plans_grow_in_every_number_and_in_cost(name):
    order = list(DIAGNOSIS_BUDGETS)
    if order.index(name):
        less, more = DIAGNOSIS_BUDGETS[order[order.index(name) - 1]], DIAGNOSIS_BUDGETS[name]
        assert all(vars(less)[field] <= vars(more)[field] for field in vars(more))
        assert sum(less.passes().values()) < sum(more.passes().values())
    assert all(math.isfinite(cost) and cost > 0 for cost in DIAGNOSIS_BUDGETS[name].passes().values())


def test_pages_show_the_diagnosis_of_these_fits_alone(run):
    from pvae.reporting import html_report

    folder, _ = run
    diagnosed(run)
    page = html_report.write_report(folder).read_text()
    assert page.count("Diagnosis of ") == 2
    assert "Calibration, simulated rows" in page
    there = json.loads((folder / "diagnosis.json").read_text())
    for own in there["variants"]:
        own["fitted"] = "0" * 16
    write_json(folder / "diagnosis.json", there)
    assert "Diagnosis of " not in html_report.write_report(folder).read_text()
