"""The command line: runs from flags to page, and one line with exit status 2 for every mistake that leaves no trace."""

import contextlib
import csv
import io
import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pvae.cli import options
from pvae.cli.app import main
from pvae.diagnostics import battery
from pvae.diagnostics.evaluation import Budget
from pvae.errors import UserError
from pvae.experiments import compare, run_folder
from pvae.experiments.compare import BUDGETS
from pvae.recipes import recipe
from pvae.recipes.recipe import Recipe
from pvae.recipes.registry import KINDS
from pvae.reporting import html_report
from pvae.samplers import ais
from pvae.training import checkpoints, loop

pytestmark = pytest.mark.filterwarnings("ignore:constrained_layout not applied")

TINY = "--hidden 16 --latent 2"
SMALL = f"--epochs 2 {TINY}"
FEW = "--rows 20 --samples 20 --refine-steps 20"
COMPARE = f"compare {SMALL} {FEW}"
FIT = f"fit {SMALL} --out new"
GUIDES = ("Amortized", "PerDatapoint", "SemiAmortized")
FITTED = ("checkpoint.safetensors", "history.csv", "recipe.toml", "state.json")
PARTS = [f"{split}-0-000000-000020.safetensors" for split in ("train", "test")]
BOUNDS = {"elbo", "iwae", "kl", "reconstruction", "ess"}
GAPS = {
    "best_elbo",
    "best_iwae",
    "evidence",
    "approximation_gap",
    "amortization_gap",
    "inference_gap",
    "optimization_gap",
    "evidence_reliable",
}


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A function from a command to the folder of its run, made once."""
    folders = {}

    def run(line):
        if line not in folders:
            folders[line] = tmp_path_factory.mktemp("kept") / "run"
            with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
                assert main([*shlex.split(line), "--out", str(folders[line])]) == 0, err.getvalue()
            (folders[line].parent / "out").write_text(out.getvalue())
        return folders[line]

    return run


@pytest.fixture
def compared(kept):
    return kept(COMPARE)


def snapshot(folder="."):
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in Path(folder).rglob("*")}


def results(folder):
    return json.loads((Path(folder) / "results.json").read_text())


def alone(folder):
    """The one group of a run's results."""
    (group,) = results(folder)["groups"]
    return group


def untimed(value):
    """Results without seconds, and without what depends on the machine."""
    if isinstance(value, dict):
        return {k: untimed(v) for k, v in value.items() if "seconds" not in k and k not in ("machine", "verdicts")}
    return [untimed(item) for item in value] if isinstance(value, list) else value


# The main job


def test_a_comparison_leaves_its_files_and_nothing_else(compared):
    inner = {f"{guide}/{name}" for guide in GUIDES for name in FITTED}
    kept = {f"evaluation/{guide}/{part}" for guide in GUIDES for part in PARTS}
    folders = {"evaluation", *(f"evaluation/{guide}" for guide in GUIDES)}
    written = {"recipe.toml", "results.json", "idata.nc", "report.html"}
    assert set(snapshot(compared)) == {*written, *GUIDES, *inner, *folders, *kept}


def test_results_follow_their_schema(compared):
    whole, found = results(compared), alone(compared)
    assert whole.keys() == {"schema", "groups", "versions", "machine", "recipe", "left_out"}
    assert whole["schema"] == 2
    assert whole["left_out"] == {}
    assert found.keys() == {"data", "rows", "verdicts", "same_decoder", "refinement"}
    assert found["data"] | {"digest": "", "summary": ""} == {
        "name": "digits",
        "identity": "digits-threshold",
        "binarize": "threshold",
        "base_measure": "mass",
        "digest": "",
        "training_rows": 1438,
        "test_rows": 359,
        "evaluated_rows": {"train": 20, "test": 20},
        "shape": [8, 8],
        "summary": "",
    }
    assert {"python", "torch", "pyro-ppl"} <= whole["versions"].keys()
    assert whole["recipe"]["latent"] == 2
    assert "guide" not in whole["recipe"]
    assert [row["guide"] for row in found["rows"]] == [row["name"] for row in found["rows"]] == list(GUIDES)
    for row in found["rows"]:
        assert row.keys() == {
            *("name", "guide", "settings", "program", "family", "likelihood", "prior", "network", "objective"),
            *("latent", "parameters", "epochs", "history", "seeds", "fitted", "train", "test"),
            *("seconds", "evaluation_seconds", "latent_space"),
        }
        assert row["latent_space"].keys() == {"step", "roughness", "vacuum_prior", "vacuum_between", "variety"}
        assert (row["latent"], row["seeds"], row["family"]) == (2, [0], "DiagonalNormal")
        assert row["parameters"]["local"] == (1438 * 4 if row["guide"] == "PerDatapoint" else 0)
        for split in ("train", "test"):
            assert row[split].keys() == BOUNDS | GAPS
            for name, quantity in row[split].items():
                interval = {"interval"} if name.endswith("_gap") else set()
                assert quantity.keys() == {"mean", "se", "K", "estimator"} | interval
                assert quantity["K"] == 20
                assert ("IWAE-20" in quantity["estimator"]) == (name == "iwae")
                assert ("first proposal that passes" in quantity["estimator"]) == (name == "evidence")
                for value in (quantity["mean"], quantity["se"]):
                    assert value is None or math.isfinite(value)
                assert quantity["se"] >= 0
    assert [row["guide"] for row in found["same_decoder"]["rows"]] == list(GUIDES)
    assert found["refinement"]["steps"] == [0, 1, 2, 5, 10, 20]
    assert all(isinstance(sentence, str) for sentence in found["verdicts"])


@pytest.mark.parametrize("guide", GUIDES)
def test_history_is_one_row_for_each_epoch(compared, guide):
    with (compared / guide / "history.csv").open() as file:
        rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    state = json.loads((compared / guide / "state.json").read_text())
    (row,) = (row for row in alone(compared)["rows"] if row["guide"] == guide)
    assert [entry["epoch"] for entry in rows] == [1, 2]
    assert rows == row["history"] == state["history"]
    assert (state["epoch"], state["batch"], state["stopped"]) == (2, 0, "finished")


@pytest.mark.parametrize("guide", GUIDES)
def test_recipes_are_those_of_the_flags(compared, guide):
    said = Recipe(epochs=2, latent=2, network={"type": "MLP", "hidden": [16]}, guide=guide)
    assert recipe.read_recipe(compared / guide) == recipe.resolve(said)
    assert recipe.read_recipe(compared) == recipe.read_recipe(compared / GUIDES[0])


def test_the_screen_has_tables_conclusions_and_page(compared):
    out = (compared.parent / "out").read_text()
    words = " ".join(out.split())
    for guide in GUIDES:
        assert f"training {guide}" in out
    for text in ("Each variant with its own decoder, test rows", "Cost", "amortized variant's decoder", "Conclusions"):
        assert text in out
    assert all(" ".join(sentence.split()) in words for sentence in alone(compared)["verdicts"])
    assert out.rstrip().endswith(f"the page: {compared / 'report.html'}")


def test_evaluating_again_changes_no_number_and_reporting_only_the_page(compared, pvae):
    shutil.copytree(compared, "run")
    before = snapshot("run")
    (Path("run") / "report.html").write_text("old")
    done = pvae("report run")
    assert (done.status, done.out) == (0, "the page: run/report.html\n")
    after = snapshot("run")
    assert after["report.html"].startswith(b"<!doctype html>")
    assert after | {"report.html": b""} == before | {"report.html": b""}
    done = pvae(f"evaluate run {FEW}")
    assert done.status == 0
    assert untimed(results("run")) == untimed(results(compared))
    assert "the page: run/report.html" in done.out


def test_one_variant_of_a_comparison_is_a_run_of_its_own(compared, pvae):
    shutil.copytree(compared / "SemiAmortized", "run")
    assert pvae(f"evaluate run {FEW}").status == 0
    (row,) = alone("run")["rows"]
    assert untimed(row) == untimed(alone(compared)["rows"][2])
    kept = {"evaluation", "evaluation/SemiAmortized", *(f"evaluation/SemiAmortized/{part}" for part in PARTS)}
    assert set(snapshot("run")) == {*FITTED, "results.json", "idata.nc", "report.html", *kept}


# Fitting, resuming, overwriting


@pytest.mark.parametrize("guide", GUIDES)
def test_resuming_a_finished_fit_changes_nothing(pvae, guide):
    line = f"fit --epochs 1 {TINY} --guide {guide}"
    done = pvae(line)
    folder = Path("runs/fit-digits")
    assert done.status == 0
    assert set(snapshot(folder)) == set(FITTED)
    assert "digits-threshold: 1438 training + 359 test rows" in done.out
    assert "over 359 rows" in done.out
    before = snapshot()
    again = pvae(f"{line} --resume")
    assert (again.status, again.out) == (0, done.out)
    assert snapshot() == before


def struck(at):
    """An optimizer's step that is struck by Ctrl-C at one of its calls."""
    calls, step = itertools.count(1), loop.FusedAdam.__call__

    def call(self, *arguments):
        if next(calls) == at:
            signal.raise_signal(signal.SIGINT)
        step(self, *arguments)

    return call


@pytest.mark.parametrize(
    ("line", "at", "epoch", "where"),
    [(f"fit {SMALL} --guide PerDatapoint", 12 + 3, 2, "run"), (COMPARE, 24 + 5, 1, "run/PerDatapoint")],
    ids=["fit", "compare"],
)
def test_an_interrupted_command_goes_on_to_the_same_end(pvae, kept, monkeypatch, line, at, epoch, where):
    whole = kept(line)  # 12 steps an epoch
    with monkeypatch.context() as patched:
        patched.setattr(loop.FusedAdam, "__call__", struck(at))
        done = pvae(f"{line} --out run")
    assert done.status == 128 + signal.SIGINT
    said = done.err.splitlines()[-1]
    assert said.startswith(f"error: stopped in epoch {epoch} by SIGINT; saved in {where};")
    assert "--resume" in said
    assert pvae(f"{line} --out run --resume").status == 0
    for path in whole.rglob(checkpoints.FILE):
        one, other = (checkpoints.read(folder)[0] for folder in (path.parent, "run" / path.parent.relative_to(whole)))
        assert one.keys() == other.keys()
        assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    if line == COMPARE:
        assert untimed(results("run")) == untimed(results(whole))


def test_overwriting_replaces_the_run_and_spares_what_is_not_its_own(compared, pvae):
    shutil.copytree(compared, "run")
    Path("run/notes.txt").write_text("mine")
    Path("run/plots").mkdir()
    assert pvae(f"fit --epochs 1 {TINY} --out run --overwrite").status == 0
    assert set(snapshot("run")) == {*FITTED, "notes.txt", "plots"}
    assert recipe.read_recipe(Path("run")).epochs == 1


@pytest.mark.parametrize("suffix", ["npy", "csv"])
def test_own_rows_from_a_file_wherever_one_stands(pvae, monkeypatch, suffix):
    x = np.random.default_rng(0).normal(size=(40, 7)).round(3)
    if suffix == "npy":
        np.save("rows.npy", x)
    else:
        np.savetxt("rows.csv", x, delimiter=",", header="a,b,c,d,e,f,g", comments="")
    done = pvae(f"fit --data rows.{suffix} --likelihood Gaussian {SMALL} --test-size 10")
    assert done.status == 0
    assert "rows-none: 30 training + 10 test rows of 7 values" in done.out
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    assert pvae(f"evaluate ../runs/fit-rows {FEW}").status == 0
    found = alone("../runs/fit-rows")
    assert found["data"]["base_measure"] == "density"
    assert (found["data"]["training_rows"], found["data"]["test_rows"], found["data"]["shape"]) == (30, 10, [7])


def test_early_stopping_ends_with_the_best_epoch(pvae):
    # So large a rate that the validation ELBO soon falls.
    line = f"--guides Amortized --epochs 60 {TINY} --learning-rate 0.1 --validation-size 0.1 --patience 2 --seed 1"
    assert pvae(f"compare {line} {FEW} --out run").status == 0
    found = alone("run")
    (row,) = found["rows"]
    values = [entry["validation_elbo"] for entry in row["history"]]
    assert row["epochs"] == len(values) == values.index(max(values)) + 1 + 2 < 60
    assert json.loads(Path("run/Amortized/state.json").read_text())["stopped"] == "early"
    assert "144 validation" in found["data"]["summary"]
    assert pvae(f"evaluate run {FEW}").status == 0
    assert untimed(alone("run")) == untimed(found)


# Words about itself


def test_the_list_names_every_component(pvae):
    done = pvae("list")
    assert done.status == 0
    lines = [line.split() for line in done.out.splitlines()]
    for kind, module in KINDS.items():
        start = lines.index([f"--{kind}"]) + 1
        assert set(module.__all__) <= {line[0] for line in lines[start:] if line}
    assert ["none,", "threshold,", "dynamic,", "levels"] in lines


@pytest.mark.parametrize(("words", "status"), [("--version", 0), ("--help", 0), ("fit --help", 0), ("fitt", 2)])
def test_the_module_is_the_command(words, status):
    done = subprocess.run([sys.executable, "-m", "pvae", *words.split()], capture_output=True, text=True, check=False)
    assert done.returncode == status
    assert bool(done.stdout) == (status == 0)
    assert done.stderr.startswith("error: ") == (status == 2)


def test_the_version_is_the_packages(pvae):
    from pvae import __version__

    assert pvae("--version") == (0, f"pvae {__version__}\n", "")


# Mistakes. A word of a command line that is a name here stands for a file or a folder that is made before.


def array(change=None):
    def write(path):
        x = np.random.default_rng(0).normal(size=(40, 7))
        if change:
            x[change[0], change[1]] = change[2]
        np.save(path, x)

    return write


def truncated(path):
    array()(path)
    os.truncate(path, 300)


def pickled(path):
    np.save(path, np.array([{"a": 1}, {"b": 2}], dtype=object), allow_pickle=True)


def text(content):
    return lambda path: path.write_text(content)


def images(path):
    (path / "MNIST" / "raw").mkdir(parents=True)
    (path / "MNIST" / "raw" / "train-images-idx3-ubyte").write_bytes(b"half")


FILES = {
    "good.npy": array(),
    "cut.npy": truncated,
    "words.npy": text("these are words\n"),
    "pickled.npy": pickled,
    "empty.npy": text(""),
    "empty.csv": text(""),
    "header.csv": text("a,b\n"),
    "ragged.csv": text("1,2,3\n4,5\n6,7,8\n"),
    "words.csv": text("a,b\n1,x\n2,y\n"),
    "nan.npy": array((3, 2, math.nan)),
    "inf.npy": array((5, 1, -math.inf)),
    "flat.npy": lambda path: np.save(path, np.arange(5.0)),
    "letters.npy": lambda path: np.save(path, np.array([["a", "b"], ["c", "d"]])),
    "rows.txt": text("1 2\n"),
    "unlabelled.npy": array(),
    "labels.py": text("from pvae.generative.vae import VAE\n\n\nclass Program(VAE):\n    uses_labels = True\n"),
    "taken": text("mine"),
    "broken-images": images,
    "empty-folder": lambda path: path.mkdir(),
    "notes": lambda path: (path.mkdir(), (path / "notes.txt").write_text("mine")),
}
# Runs with something wrong about them, made of a good one.
RUNS = {
    "run": lambda path, other: None,
    "cut-run": lambda path, other: os.truncate(path / checkpoints.FILE, 1000),
    "bare-run": lambda path, other: (path / checkpoints.FILE).unlink(),
    "foreign-run": lambda path, other: shutil.copy(other / checkpoints.FILE, path),
    "garbled-run": lambda path, other: (path / "recipe.toml").write_text('data = "digits'),
    "strange-run": lambda path, other: edit(path, "latent =", "latnet ="),
    "moved-run": lambda path, other: edit(path, "seed = 0", "seed = 1"),
    "worded-run": lambda path, other: edit(path, "seed = 0", 'seed = "a"'),
    "old-run": lambda path, other: (path / "results.json").write_text('{"schema": 0}'),
    "compared-run": lambda path, other: edit(path, "[guide]", '[vary]\nprior = ["StandardNormal"]\n\n[guide]'),
    "half-run": lambda path, other: (path / "results.json").write_text('{"schema": 1, '),
}


def edit(path, old, new):
    before = (path / "recipe.toml").read_text()
    assert old in before
    (path / "recipe.toml").write_text(before.replace(old, new))


# id: (command, words of the line[, mark])
MISTAKES = {
    "no command": ("", "no command given"),
    "command": ("comapre", "comapre compare"),
    "flag": (f"{FIT} --epohcs 3", "--epohcs --epochs"),
    "flag of all": ("--verison", "--verison --version"),
    "flag of another command": (f"{FIT} --rows 3", "--rows"),
    "argument": ("fit digits", "digits"),
    "no run": ("evaluate", "run"),
    "word for a number": (f"{FIT} --batch-size many", "--batch-size integer"),
    "data": (f"{FIT} --data digit", "digit 'digits'?"),
    "guide": (f"{FIT} --guide Amortised", "'Amortised' 'Amortized'?"),
    "guides": (f"{COMPARE} --guides Amortized,PerDatapont", "'PerDatapont' 'PerDatapoint'?"),
    "guides twice": (f"{COMPARE} --guides Amortized,Amortized", "guide=Amortized,Amortized different"),
    "no guides": (f"{COMPARE} --guides ''", "guide=VALUE,"),
    "likelihood": (f"{FIT} --likelihood Bernouli", "likelihood 'Bernouli' 'Bernoulli'?"),
    "prior": (f"{FIT} --prior StandartNormal", "prior 'StandartNormal' 'StandardNormal'?"),
    "family": (f"{FIT} --family DiagonlNormal", "family 'DiagonlNormal' 'DiagonalNormal'?"),
    "network": (f"{FIT} --network MPL", "network 'MPL' 'MLP'?"),
    "binarization": (f"{FIT} --binarize treshold", "'treshold' 'threshold'?"),
    "device": (f"{FIT} --device cud", "device 'cud' 'cuda'?"),
    "cuda": (
        f"{FIT} --device cuda",
        "--device cuda",
        pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device"),
    ),
    "missing file": (f"{FIT} --data missing.npy", "missing.npy no such file"),
    "file format": (f"{FIT} --data rows.txt", "rows.txt '.txt' .csv"),
    "folder as data": (f"{FIT} --data ./empty-folder", "empty-folder .npy"),
    "truncated file": (f"{FIT} --data cut.npy", "cut.npy readable"),
    "text for an array": (f"{FIT} --data words.npy", "words.npy readable"),
    "pickled file": (f"{FIT} --data pickled.npy", "pickled.npy never"),
    "empty file": (f"{FIT} --data empty.npy", "empty.npy empty"),
    "empty csv": (f"{FIT} --data empty.csv", "empty.csv empty"),
    "csv of a header": (f"{FIT} --data header.csv", "header.csv"),
    "ragged csv": (f"{FIT} --data ragged.csv", "ragged.csv 4,5"),
    "csv of words": (f"{FIT} --data words.csv", "words.csv 'b' numeric"),
    "nan": (f"{FIT} --data nan.npy --likelihood Gaussian", "nan.npy row 3 column 2 nan"),
    "infinity": (f"{FIT} --data inf.npy --likelihood Gaussian", "inf.npy row 5 column 1 -inf"),
    "flat array": (f"{FIT} --data flat.npy", "flat.npy (5,)"),
    "letters": (f"{FIT} --data letters.npy", "letters.npy numbers"),
    "broken images": (f"{FIT} --data mnist --data-dir broken-images", "mnist broken-images --data-dir"),
    "grey digits": (f"{FIT} --binarize none", "row 0 column 2 0.1875 --likelihood --binarize"),
    "grey digits compared": (f"{COMPARE} --binarize none", "row 0 column 2 0.1875 --likelihood --binarize"),
    "reals for bits": (f"{FIT} --data good.npy", "row 0 column 0 'x' Bernoulli --likelihood"),
    "reals to binarize": (f"{FIT} --data good.npy --binarize threshold", "good.npy row --binarize"),
    "batch size": (f"{FIT} --batch-size 0", "--batch-size 0 least 1"),
    "epochs": (f"{FIT} --epochs -1", "--epochs -1 least 0"),
    "learning rate": (f"{FIT} --learning-rate 0", "--learning-rate positive"),
    "engine": (f"{FIT} --engine trased", "engine 'trased' traced"),
    "precision": (f"{COMPARE} --precision bf61", "precision 'bf61' bf16"),
    "precision of another device": (f"{FIT} --device cpu --precision tf32", "--precision tf32 CUDA cpu float32"),
    "learning rate nan": (f"{FIT} --learning-rate nan", "--learning-rate nan"),
    "test size": (f"{FIT} --test-size 5000", "--test-size 5000 1797"),
    "test size of all but a crumb": (f"{FIT} --test-size 0.9999", "--test-size 0.9999 1797"),
    "test size negative": (f"{FIT} --test-size -1", "--test-size -1"),
    "test size broken": (f"{FIT} --test-size 10.5", "--test-size 10.5"),
    "test size nan": (f"{FIT} --test-size nan", "--test-size nan"),
    "no test rows": (f"{FIT} --test-size 0", "--test-size 0"),
    "validation size": (f"{FIT} --validation-size 5000", "--validation-size 5000 1438"),
    "validation size infinite": (f"{FIT} --validation-size inf", "--validation-size inf"),
    "axis": (f"{COMPARE} --vary latnt=2,3", "--vary 'latnt' 'latent'?"),
    "axis without values": (f"{COMPARE} --vary latent", "--vary latent=VALUE,VALUE"),
    "axis of another type": (f"{COMPARE} --vary latent=2,many", "--vary latent 'many' whole number"),
    "axis of one name": (f"{COMPARE} --vary latent=2,2", "--vary latent=2,2 different"),
    "axis twice": (f"{COMPARE} --vary latent=2,3 --vary latent=4", "--vary twice"),
    "axis out of range": (f"{COMPARE} --vary batch_size=2,0", "--batch-size 0 least 1"),
    "axis of an unknown prior": (f"{COMPARE} --vary prior=VampPriar", "prior 'VampPriar' 'VampPrior'?"),
    "seeds": (f"{COMPARE} --seeds 0", "--seeds 0 least 1"),
    "jobs": (f"{COMPARE} --jobs 0", "--jobs 0 least 1"),
    "argument of an objective": (f"{FIT} --objective 'IWAE(k=3)'", "IWAE 'k' 'K'?"),
    "arguments that can't be read": (f"{FIT} --objective 'IWAE(20)'", "'IWAE(20)' Name(argument=value"),
    "objective of no draws": (f"{FIT} --objective 'IWAE(K=0)'", "IWAE K 0 least 1"),
    "objective of another type": (f"{FIT} --objective 'IWAE(K=2.5)'", "objective IWAE K 2.5 whole number"),
    "no closed form": (f"{FIT} --objective AnalyticKL --prior GaussianMixture", "KL 'z' closed form --objective"),
    "a prior that needs an encoder": (
        f"{FIT} --prior VampPrior --guide PerDatapoint",
        "VampPrior encoder PerDatapoint",
    ),
    "no recipe": ("fit none.toml --out new", "no recipe none.toml"),
    "recipe of no kind": ("compare words.csv --out new", "words.csv read line 1"),
    "own file that is missing": (f"{FIT} --prior none.py:Prior", "no Python file none.py"),
    "own file of another format": (f"{FIT} --prior words.csv:Prior", "no Python file words.csv"),
    "labels where there are none": (f"{FIT} --data unlabelled.npy --program labels.py:Program", "unlabelled labels"),
    "latent": (f"{FIT} --latent 0", "--latent 0 least 1"),
    "hidden": (f"{FIT} --hidden 0", "--hidden '0' least 1"),
    "hidden words": (f"{FIT} --hidden abc", "--hidden 'abc' numbers"),
    "hidden empty": (f"{FIT} --hidden ''", "--hidden"),
    "seed": (f"{FIT} --seed 1{'0' * 30}", "--seed"),
    "large seed": (f"{FIT} --seed 1{'0' * 15}", "--seed"),
    "patience alone": (f"{FIT} --patience 3", "--patience --validation-size"),
    "patience": (f"{FIT} --patience 0 --validation-size 9", "--patience 0 least 1"),
    "local steps": (f"{FIT} --guide PerDatapoint --local-steps 0", "PerDatapoint steps 0 positive"),
    "local steps compared": (f"{COMPARE} --local-steps 0", "PerDatapoint steps 0 positive"),
    "semi steps": (f"{COMPARE} --semi-steps 0", "SemiAmortized steps 0 positive"),
    "local rate": (f"{COMPARE} --local-learning-rate nan", "PerDatapoint nan positive"),
    "local rate infinite": (f"fit --guide PerDatapoint {SMALL} --local-learning-rate inf --out new", "local inf"),
    "rows": (f"{COMPARE} --rows 0", "--rows 0 least 2"),
    "samples": (f"{COMPARE} --samples 1", "--samples 1 least 2"),
    "refine steps": (f"{COMPARE} --refine-steps 0", "--refine-steps 0 least 1"),
    "rows of a run": ("evaluate run --rows 0", "--rows 0 least 2"),
    "jobs of an evaluation": ("evaluate run --jobs 2", "--jobs"),
    "temperatures": ("evaluate run --ais --temperatures 0", "--temperatures 0 least 1"),
    "chains": ("evaluate run --chains -1", "--chains -1 least 1"),
    "schedule": ("evaluate run --schedule lin", "schedule 'lin' 'linear'?"),
    "start": ("evaluate run --start guid", "start 'guid' 'guide'?"),
    "budget": ("evaluate run --budget thoro", "--budget 'thoro' 'thorough'?"),
    "families": ("evaluate run --families DiagonalNormal,FullRankNorml", "'FullRankNorml' 'FullRankNormal'?"),
    "families of a comparison": (f"{COMPARE} --families FlowFamly", "'FlowFamly' 'FlowFamily'?"),
    "no families": ("evaluate run --families ''", "family ''"),
    "argument of a family": ("evaluate run --families 'LowRankNormal(rnk=1)'", "LowRankNormal 'rnk' 'rank'?"),
    "a family without a density": ("evaluate run --families Delta", "--families Delta point mass ELBO"),
    "out is a file": (f"fit {SMALL} --out taken", "--out taken file"),
    "out below a file": (f"fit {SMALL} --out taken/new", "taken/new folder"),
    "compare below a file": (f"{COMPARE} --out taken/new", "taken/new folder"),
    "out of others": (f"fit {SMALL} --out notes", "--out notes"),
    "overwriting others": (f"fit {SMALL} --out notes --overwrite", "--out notes"),
    "out is a run": (f"fit {SMALL} --out run", "--out run --overwrite --resume"),
    "compare into a run": (f"{COMPARE} --out run", "--out run --overwrite --resume"),
    "overwriting in vain": (f"fit {SMALL} --out run --overwrite --binarize none", "row 0 column 2 0.1875"),
    "resume with other words": (f"fit {SMALL} --latent 3 --out run --resume", "--resume run latent 2 3"),
    "resume with another rate": (
        f"fit {SMALL} --learning-rate 1 --out run --resume",
        "--resume run learning_rate 0.002 1.0",
    ),
    "resume with another guide": (f"fit {SMALL} --guide PerDatapoint --out run --resume", "guide Amortized Per"),
    "resume of another verb": (f"fit {SMALL} --out compared-run --resume", "--resume compared-run compare's fit's"),
    "resume of another verb, compared": (f"{COMPARE} --out run --resume", "--resume run fit's compare's folder"),
    "resume and overwrite": (f"fit {SMALL} --out run --resume --overwrite", "--overwrite --resume exclude"),
    "resume of nothing": (f"fit {SMALL} --out new --resume", "new recipe.toml"),
    "resume of an empty folder": (f"fit {SMALL} --out empty-folder --resume", "empty-folder recipe.toml"),
    "compare on an empty folder": (f"{COMPARE} --out empty-folder --resume", "empty-folder recipe.toml"),
    "resume of a truncated run": (f"fit {SMALL} --out cut-run --resume", "cut-run/checkpoint.safetensors truncated"),
    "resume of another model": (f"fit {SMALL} --out foreign-run --resume", "foreign-run/checkpoint.safetensors model"),
    "resume of a garbled run": (f"fit {SMALL} --out garbled-run --resume", "garbled-run/recipe.toml"),
    "evaluate nothing": ("evaluate new", "new recipe.toml"),
    "evaluate a file": ("evaluate taken", "taken"),
    "evaluate no run": ("evaluate empty-folder", "empty-folder recipe.toml"),
    "evaluate untrained": ("evaluate bare-run", "bare-run checkpoint.safetensors"),
    "evaluate truncated": ("evaluate cut-run", "cut-run/checkpoint.safetensors truncated"),
    "evaluate another model": ("evaluate foreign-run", "foreign-run/checkpoint.safetensors (16, 3) (16, 2)"),
    "evaluate garbled": ("evaluate garbled-run", "garbled-run/recipe.toml"),
    "evaluate strange": ("evaluate strange-run", "strange-run/recipe.toml 'latnet' 'latent'?"),
    "evaluate other rows": ("evaluate moved-run", "moved-run rows digits-threshold"),
    "evaluate worded": ("evaluate worded-run", "worded-run seed"),
    "diagnose nothing": ("diagnose new", "new recipe.toml"),
    "diagnose a file": ("diagnose taken", "taken"),
    "diagnose untrained": ("diagnose bare-run", "bare-run checkpoint.safetensors"),
    "diagnose truncated": ("diagnose cut-run", "cut-run/checkpoint.safetensors truncated"),
    "diagnose another model": ("diagnose foreign-run", "foreign-run/checkpoint.safetensors (16, 3) (16, 2)"),
    "diagnose other rows": ("diagnose moved-run", "moved-run rows digits-threshold"),
    "diagnose with a budget": ("diagnose run --budget qick", "--budget 'qick' 'quick'?"),
    "diagnose a variant": ("diagnose run --only Amortised", "--only Amortised variant 'Amortized'?"),
    "diagnose on a device": ("diagnose run --device cud", "device 'cud' 'cuda'?"),
    "report nothing": ("report new", "new/results.json evaluate"),
    "report a file": ("report taken", "taken"),
    "report no run": ("report empty-folder", "empty-folder/results.json evaluate"),
    "report untold": ("report run", "run/results.json evaluate"),
    "report of another version": ("report old-run", "old-run/results.json version evaluate"),
    "report half": ("report half-run", "half-run/results.json evaluate"),
}


def prepare(line, kept):
    """Make the files and folders that a command line names."""
    named = {re.split("[/:]", word.removeprefix("./"))[0] for word in shlex.split(line)}
    for name in named & FILES.keys():
        FILES[name](Path(name))
    for name in named & RUNS.keys():
        shutil.copytree(kept(f"fit {SMALL}"), name)
        RUNS[name](Path(name), kept(f"fit {SMALL} --latent 3"))


@pytest.mark.parametrize(
    ("line", "words"), [pytest.param(*case[:2], marks=case[2:], id=name) for name, case in MISTAKES.items()]
)
def test_a_mistake_gives_one_line_and_leaves_no_trace(pvae, kept, line, words):
    prepare(line, kept)
    before = snapshot()
    status, out, err = pvae(line)
    assert status == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert err.endswith("\n")
    assert [word for word in words.split() if word not in err] == []
    assert snapshot() == before
    assert "Traceback" not in out


def test_with_debug_the_traceback_comes_through(pvae, kept):
    for line in ("fit --data digit", "evaluate new"):
        assert pvae(line).status == 2
        with pytest.raises(UserError):
            main(["--debug", *line.split()])
    assert pvae("--debug list").status == 0
    assert pvae("evaluate new").status == 2


# Evaluating and diagnosing: what the flags ask for, what is kept, how it goes on.


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({}, (0, 16, "sigmoid", "prior")),
        ({"ais": True}, (500, 16, "sigmoid", "prior")),
        ({"temperatures": 7}, (7, 16, "sigmoid", "prior")),
        ({"chains": 3}, (500, 3, "sigmoid", "prior")),
        ({"schedule": "linear"}, (500, 16, "linear", "prior")),
        ({"start": "guide", "temperatures": 7}, (7, 16, "sigmoid", "guide")),
    ],
)
def test_every_flag_of_annealing_anneals(given, found):
    own = options.BudgetOptions(**given).run_options(Path()).budget
    assert (own.temperatures, own.chains, own.schedule, own.start) == found


def test_a_budget_is_one_word_and_a_flag_goes_before_it():
    for word, (rows, own) in BUDGETS.items():
        job = options.BudgetOptions(word).run_options(Path())
        assert (job.rows, job.budget) == (rows, own)
        job = options.BudgetOptions(word, rows=7, samples=30).run_options(Path())
        assert (job.rows, job.budget.K, job.budget.steps) == (7, 30, own.steps)


def test_the_help_says_what_a_budget_holds(pvae):
    words = " ".join(pvae("evaluate --help").out.replace("│", " ").split())
    (rows, quick), (more, standard), (most, thorough) = BUDGETS.values()
    assert f"quick ({rows} rows of each split, K = {quick.K}, {quick.steps} steps)" in words
    assert f"standard ({more}, {standard.K}, {standard.steps})" in words
    assert f"thorough ({most}, {thorough.K}, {thorough.steps})" in words
    job = options.BudgetOptions(ais=True).run_options(Path()).budget
    assert f"(default {job.temperatures})" in words
    assert f"(default {job.chains})" in words


def test_the_help_says_how_a_diagnosis_grows(pvae):
    words = " ".join(pvae("diagnose --help").out.replace("│", " ").split())
    quick, standard, thorough = (sum(plan.passes().values()) for plan in battery.DIAGNOSIS_BUDGETS.values())
    stated = [int(times) for times in re.findall(r"about (\d+) times", words)]
    assert stated == [7, 80]
    for times, cost in zip(stated, (standard, thorough), strict=True):
        assert times / 1.3 < cost / quick < times * 1.3


@pytest.fixture
def quickly(monkeypatch):
    """Let a diagnosis at any budget take a second, and the page, which is looked at elsewhere, none."""
    monkeypatch.setattr(html_report, "write_report", lambda folder, results=None: folder / "report.html")
    monkeypatch.setattr(ais, "SETTLE", 4)
    monkeypatch.setattr(ais, "MIN_TRANSITIONS", 8)
    plan = battery.DiagnosisBudget(
        rows=12, draws=30, steps=3, annealed=3, temperatures=4, chains=2, simulated=20, references=2, reference_draws=60
    )
    for word in battery.DIAGNOSIS_BUDGETS:
        monkeypatch.setitem(battery.DIAGNOSIS_BUDGETS, word, plan)
        monkeypatch.setitem(BUDGETS, word, (20, Budget(30, 5)))


def test_families_are_split_at_commas_outside_brackets(pvae, kept, quickly):
    shutil.copytree(kept(f"fit {SMALL}"), "run")
    done = pvae("evaluate run --rows 4 --families 'LowRankNormal(rank=1, ),FullRankNormal' --temperatures 2 --chains 1")
    assert done.status == 0
    (row,) = alone("run")["rows"]
    assert {"ais", "family_gain[LowRankNormal(rank=1, )]", "family_gain[FullRankNormal]"} <= row["test"].keys()


def test_a_diagnosis_evaluates_what_was_not_and_makes_broken_parts_again(pvae, kept, quickly):
    shutil.copytree(kept(f"fit {SMALL}"), "run")
    done = pvae("diagnose run")
    assert done.status == 0
    assert "evaluating on up to 20 training and test rows, K = 30" in done.out
    for text in ("Diagnosis of Amortized", "How far may Amortized be trusted?", "the page: run/report.html"):
        assert text in done.out
    assert {"results.json", "diagnosis.json"} <= set(snapshot("run"))
    before = json.loads(Path("run/diagnosis.json").read_text())["variants"]
    parts = Path("run/diagnosis/Amortized")
    os.truncate(parts / "health.safetensors", 100)
    (parts / "weights-best.safetensors").write_text("garbage")
    (parts / "rows.safetensors").unlink()
    again = pvae("diagnose run --budget quick --only Amortized,Amortized")
    assert again.status == 0
    assert "evaluating" not in again.out
    assert "the last evaluation: 20 test rows, K = 30; pvae evaluate run --budget quick" in again.out
    assert again.out.count("Diagnosis of ") == 1
    after = json.loads(Path("run/diagnosis.json").read_text())["variants"]
    assert [own["figures"] for own in after] == [own["figures"] for own in before]


def test_only_the_variants_asked_for_are_looked_at_and_shown(pvae, kept, quickly):
    shutil.copytree(
        kept(f"compare --epochs 1 {TINY} {FEW} --family Delta --vary 'objective=ELBO,ELBO(K=2, warm_up=0.5)'"), "run"
    )
    wanted = "ELBO(K=2, warm_up=0.5)"
    for name, other in (("ELBO", wanted), (wanted, "ELBO")):
        done = pvae(f"diagnose run --only '{name}'")
        assert done.status == 0
        assert f"Diagnosis of {name} ─" in done.out
        assert f"Diagnosis of {other} ─" not in done.out


@pytest.mark.parametrize(
    ("line", "module", "name"), [("diagnose", battery, "sandwich"), ("evaluate", compare, "evaluate")]
)
def test_ctrl_c_says_that_the_same_command_goes_on_and_it_does(pvae, kept, quickly, monkeypatch, line, module, name):
    shutil.copytree(kept(f"fit {SMALL}"), "run")
    with monkeypatch.context() as patched:
        patched.setattr(module, name, lambda *args, **kwargs: signal.raise_signal(signal.SIGINT))
        done = pvae(f"{line} run")
    assert done.status == 128 + signal.SIGINT
    assert done.err.splitlines()[-1] == "error: stopped; what is finished is kept in run; the same command goes on"
    assert pvae(f"{line} run").status == 0


def test_ctrl_c_while_a_comparison_is_evaluated_asks_for_resume(pvae, monkeypatch):
    monkeypatch.setattr(compare, "evaluate", lambda *args, **kwargs: signal.raise_signal(signal.SIGINT))
    done = pvae(f"{COMPARE} --guides Amortized --out run")
    assert done.status == 128 + signal.SIGINT
    assert done.err.splitlines()[-1].endswith("kept in run; the same command with --resume goes on")


def test_ctrl_c_anywhere_else_says_that_it_stopped(pvae, monkeypatch):
    monkeypatch.setattr(recipe, "resolve", lambda own: signal.raise_signal(signal.SIGINT))
    done = pvae("show")
    assert (done.status, done.err) == (128 + signal.SIGINT, "error: stopped\n")


# Divergence. A batch of all rows makes one step an epoch, so that the first is still good.

DIVERGING = f"fit --epochs 3 {TINY} --batch-size 5000 --learning-rate 1e30 --out run"


def test_divergence_names_epoch_and_site_and_keeps_the_last_good_checkpoint(pvae, monkeypatch):
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0)
    status, _, err = pvae(DIVERGING)
    assert status == 2
    line = err.splitlines()[-1]
    assert line.startswith("error: training diverged in epoch 2: the log-density of site '")
    assert "lower --learning-rate; the last good checkpoint is kept in run" in line
    assert err.count("error: ") == 1
    assert set(snapshot("run")) == set(FITTED)
    tensors, header = checkpoints.read(Path("run"))
    assert header["epoch"] == 1
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    own = recipe.read_recipe(Path("run"))
    assert len(run_folder.load_fit(Path("run"), recipe.load_recipe_data(own)).fit.history) == 1


def test_divergence_without_a_checkpoint_promises_none(pvae):
    status, _, err = pvae(DIVERGING.replace("5000", "100"))
    assert status == 2
    assert "diverged in epoch 1" in err
    assert not Path("run", checkpoints.FILE).exists()
    assert "checkpoint is kept" not in err


def test_a_folders_name_is_shown_as_it_is(pvae, kept):
    shutil.copytree(kept(f"fit {SMALL}"), "a[b]c")
    assert "the page: a[b]c/report.html" in pvae(f"evaluate 'a[b]c' {FEW}").out
