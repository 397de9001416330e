"""A run folder that version 0.1 wrote, before modules and components' arguments were renamed, still opens."""

import html
import json
import shutil
from pathlib import Path

import pytest

import pvae as face

OLD = Path(__file__).parents[1] / "data" / "run_of_0_1"


@pytest.fixture
def old(tmp_path, monkeypatch):
    """A copy of the run, with the current folder where its data are."""
    monkeypatch.chdir(shutil.copytree(OLD, tmp_path / "old"))
    return Path("comparison")


OF_GUIDE = ("elbo", "iwae", "kl", "reconstruction", "ess", "k_hat_above")


def test_its_guide_is_evaluated_to_the_same_numbers_and_the_search_ends_no_lower(old, pvae):
    before = json.loads((old / "results.json").read_text())
    shutil.rmtree(old / "evaluation")  # so that nothing is read that 0.1 computed
    done = pvae("evaluate comparison --rows 12 --samples 40 --refine-steps 5")
    assert done.status == 0, done.err
    after = json.loads((old / "results.json").read_text())
    for one, other in zip(before["groups"][0]["rows"], after["groups"][0]["rows"], strict=True):
        assert one["name"] == other["name"]
        for split in ("train", "test"):
            assert one[split].keys() <= other[split].keys()
            for name in OF_GUIDE:
                for field in ("mean", "se"):
                    value = other[split][name][field]
                    assert value == pytest.approx(one[split][name][field], rel=1e-4, abs=1e-5), name
            best = other[split]["best_elbo"]
            assert best["mean"] >= one[split]["best_elbo"]["mean"] - best["se"] / 10  # from 40 draws, of five steps


@pytest.mark.parametrize(
    "line", ["report comparison", "encode comparison --out codes.npz", "sample comparison --count 4"]
)
def test_its_page_is_written_and_it_is_used(old, pvae, line):
    done = pvae(line)
    assert done.status == 0, done.err


def test_its_diagnosis_is_on_the_page(old, pvae):
    verdicts = json.loads((old / "diagnosis.json").read_text())["variants"][0]["verdicts"]
    assert pvae("report comparison").status == 0
    page = html.unescape((old / "report.html").read_text())
    assert all(sentence in page for verdict in verdicts for sentence in verdict["because"])


@pytest.mark.parametrize("variant", ["Amortized", "PerDatapoint"])
def test_it_opens_in_python(old, variant):
    run = face.open_run(old, variant)
    assert run.encode(run.data.test[:3]).mean.shape == (3, 2)
    assert run.sample(5).shape == (5, 5)
