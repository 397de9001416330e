"""Grids: axes in words, cells of one split, resumed and in processes to the same bits, judged in comparable groups."""

import contextlib
import io
import itertools
import json
import math
import multiprocessing
import shutil
import signal
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from pvae.diagnostics.evaluation import Budget
from pvae.errors import UserError
from pvae.experiments import arviz_export, compare, sweep
from pvae.experiments.compare import RunOptions
from pvae.experiments.run import open_variants
from pvae.recipes import recipe
from pvae.recipes.recipe import Recipe
from pvae.recipes.registry import KINDS
from pvae.training import checkpoints, loop

pytestmark = pytest.mark.filterwarnings("ignore:constrained_layout not applied")

FEW = "--rows 5 --samples 5 --refine-steps 5"
BITS = (np.random.default_rng(0).random((40, 6)) < 0.5).astype("float32")
COUNTS = np.random.default_rng(1).poisson(3.0, (40, 6)).astype("float32")


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    """Where a test stands: with rows in files."""
    monkeypatch.chdir(tmp_path)
    np.save("bits.npy", BITS)
    np.save("counts.npy", COUNTS)


def small(**changes):
    return Recipe(**{"data": "bits.npy", "latent": 2, "epochs": 1, "network": {"type": "MLP", "hidden": [4]}} | changes)


def ran(folder, vary, *, jobs=1, resume=False, **changes):
    """Results of a comparison by the Python API."""
    job = RunOptions(Path(folder), device="cpu", rows=5, budget=Budget(5, 5), jobs=jobs)
    return compare.compare(small(**changes), job, vary=vary, resume=resume)


def trained(folder):
    """The bytes of each variant's checkpoint."""
    return {str(path.parent.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob(checkpoints.FILE)}


def same_tensors(one, other):
    """Whether two runs' checkpoints hold the same bits, whatever time they took."""
    pairs = [(checkpoints.read(one / name)[0], checkpoints.read(other / name)[0]) for name in trained(other)]
    equal = all(a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a) for a, b in pairs)
    return trained(one).keys() == trained(other).keys() and equal


# Axes and cells


@pytest.mark.parametrize(
    ("words", "name", "values"),
    [
        ("latent=2,8", "latent", [2, 8]),
        ("learning-rate=1e-3, 0.01", "learning_rate", [0.001, 0.01]),
        ("binarize=threshold,dynamic", "binarize", ["threshold", "dynamic"]),
        ("objective=ELBO,IWAE(K=5, warm_up=2.0)", "objective", ["ELBO", "IWAE(K=5, warm_up=2.0)"]),
        ("network=MLP(hidden=[8, 4]),ResidualMLP", "network", ["MLP(hidden=[8, 4])", "ResidualMLP"]),
        ("prior=StandardNormal,my.py:Own(a=1)", "prior", ["StandardNormal", "my.py:Own(a=1)"]),
    ],
)
def test_an_axis_is_a_name_and_values(words, name, values):
    assert sweep.parse_axis(words) == (name, values)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("latnt=2", "vary=latnt=2: unknown key 'latnt'; did you mean 'latent'?"),
        ("latent", "write latent=VALUE,VALUE,... with different values"),
        ("latent=", "write latent=VALUE"),
        ("latent=2,,3", "write latent=VALUE"),
        ("latent=2,2", "with different values"),
        ("latent=2,many", "latent is 'many', but it takes a whole number"),
        ("seed=1.5", "seed is 1.5, but it takes a whole number"),
    ],
)
def test_a_mistaken_axis_is_refused(words, said):
    with pytest.raises(UserError) as error:
        sweep.parse_axis(words)
    assert said in str(error.value)


def test_cells_are_the_product_of_the_axes_the_last_fastest():
    axes = {"prior": ["StandardNormal", "StudentT(df=3.0)"], "latent": [2, 3]}
    found = sweep.sweep_points(small(), axes)
    assert [cell.name for cell in found] == [
        "StandardNormal / latent 2",
        "StandardNormal / latent 3",
        "StudentT(df=3.0) / latent 2",
        "StudentT(df=3.0) / latent 3",
    ]
    assert [(cell.recipe.name("prior"), cell.recipe.latent) for cell in found] == [
        *itertools.product(["StandardNormal", "StudentT(df=3.0)"], [2, 3])
    ]
    assert [cell.folder_name for cell in found] == [Path(cell.folder_name).name for cell in found]
    assert all(cell.recipe == recipe.resolve(cell.recipe) for cell in found)
    assert len({cell.folder_name for cell in found}) == 4


def test_seeds_repeat_a_variant_on_the_same_rows():
    found = sweep.sweep_points(small(), {"prior": ["StandardNormal", "StudentT"], "seed": [4, 5]})
    assert [cell.name for cell in found] == ["StandardNormal"] * 2 + ["StudentT"] * 2
    assert [cell.folder_name for cell in found] == [
        f"{name},seed={seed}" for name in ("StandardNormal", "StudentT") for seed in (4, 5)
    ]
    assert [(cell.recipe.seed, cell.recipe.split_seed) for cell in found] == [(4, 4), (5, 4)] * 2
    shelf = sweep.DatasetCache()
    assert len({id(shelf[cell.recipe]) for cell in found}) == 1
    assert {c.recipe.split_seed for c in sweep.sweep_points(small(split_seed=7), {"seed": [4, 5]})} == {7}
    assert {c.recipe.split_seed for c in sweep.sweep_points(small(), {"split_seed": [1, 2], "seed": [4, 5]})} == {1, 2}


def test_a_grid_of_seeds_alone_is_named_after_its_guide():
    assert [c.name for c in sweep.sweep_points(small(guide="PerDatapoint"), {"seed": [0, 1]})] == ["PerDatapoint"] * 2


def test_two_variants_of_one_name_are_refused():
    with pytest.raises(UserError, match="two variants have the same name"):
        sweep.sweep_points(small(), {"prior": ["StandardNormal", {"type": "StandardNormal"}]})


# Training


GRID = {"prior": ["StandardNormal", "StudentT"], "seed": [0, 1]}
NAMES = {f"{name},seed={seed}" for name in GRID["prior"] for seed in (0, 1)}


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """The folder of a grid's run, in whose folder the data are."""
    place = tmp_path_factory.mktemp("kept")
    np.save(place / "bits.npy", BITS)
    ran(place / "run", GRID, data=str(place / "bits.npy"))
    return place / "run"


def again(kept, folder, **options):
    return ran(folder, GRID, data=str(kept.parent / "bits.npy"), **options)


def untimed(value):
    """Results without seconds."""
    if isinstance(value, dict):
        return {k: untimed(v) for k, v in value.items() if "seconds" not in k and k != "verdicts"}
    return [untimed(item) for item in value] if isinstance(value, list) else value


def read(folder):
    return json.loads((Path(folder) / "results.json").read_text())


def test_resuming_a_whole_grid_trains_nothing(kept, monkeypatch):
    shutil.copytree(kept, "run")
    before = trained("run")
    assert before.keys() == NAMES

    def step(self, *arguments):
        raise AssertionError("a step of training")

    monkeypatch.setattr(loop.FusedAdam, "__call__", step)
    again(kept, "run", resume=True)
    assert trained("run") == before
    assert untimed(read("run")) == untimed(read(kept))


def test_resuming_goes_on_with_the_cells_that_are_left(kept):
    shutil.copytree(kept, "run")
    shutil.rmtree("run/StudentT,seed=0")
    (Path("run/StudentT,seed=1") / checkpoints.FILE).unlink()
    steps = []
    with pytest.MonkeyPatch.context() as patched:
        own = loop.FusedAdam.__call__
        patched.setattr(loop.FusedAdam, "__call__", lambda self, *a: (steps.append(1), own(self, *a))[1])
        again(kept, "run", resume=True)
    assert len(steps) == 2  # one batch an epoch
    assert same_tensors(Path("run"), kept)
    assert untimed(read("run")) == untimed(read(kept))


def test_an_interrupted_grid_goes_on_to_the_same_end(kept, pvae):
    data = kept.parent / "bits.npy"
    line = (
        f"compare --data {data} --epochs 1 --hidden 4 --latent 2 {FEW} --vary prior=StandardNormal,StudentT --seeds 2"
    )
    with pytest.MonkeyPatch.context() as patched:
        own, calls = loop.FusedAdam.__call__, itertools.count(1)

        def step(self, *arguments):
            if next(calls) == 2:
                signal.raise_signal(signal.SIGINT)
            own(self, *arguments)

        patched.setattr(loop.FusedAdam, "__call__", step)
        done = pvae(f"{line} --out run")
    assert done.status == 128 + signal.SIGINT
    assert "saved in run/StandardNormal,seed=1; the same command with --resume goes on" in done.err
    assert pvae(f"{line} --out run --resume").status == 0
    assert same_tensors(Path("run"), kept)


def test_processes_give_the_same_numbers(kept):
    again(kept, "run", jobs=2)
    assert same_tensors(Path("run"), kept)
    assert untimed(read("run")) == untimed(read(kept))


def test_a_mistake_in_a_process_is_one_line(pvae):
    line = f"compare --data bits.npy --epochs 2 --hidden 4 --latent 2 {FEW} --guide Amortized --jobs 2 --out run"
    done = pvae(f"{line} --vary learning_rate=1e30,1e35")
    assert done.status == 2
    assert done.err.splitlines()[-1].startswith("error: training diverged in epoch ")
    assert done.err.count("error: ") == 1


def test_a_signal_ends_all_processes_and_the_cells_that_wait(pvae):
    line = "compare --data bits.npy --epochs 10000000 --latent 2 --guide Amortized --jobs 2 --out run"
    timer = threading.Timer(3.0, signal.pthread_kill, [threading.main_thread().ident, signal.SIGINT])
    timer.start()
    done = pvae(f"{line} --vary learning_rate=0.1,0.2,0.3")
    timer.cancel()
    assert done.status == 128 + signal.SIGINT
    assert done.err.splitlines()[-1] == "error: stopped by SIGINT; the same command with --resume goes on"
    assert not multiprocessing.active_children()
    assert [path.name for path in Path("run/learning_rate_0.3").iterdir()] == ["recipe.toml"]


# Results of several seeds


def test_the_mean_over_seeds_is_that_of_the_seeds_means_and_its_error_is_over_rows_too(kept):
    (group,) = read(kept)["groups"]
    assert [row["seeds"] for row in group["rows"]] == [[0, 1]] * 2
    for row in group["rows"]:
        assert row["seconds"] == pytest.approx(sum(row["seconds_by_seed"]) / 2)
        for quantity in (*row["train"].values(), *row["test"].values()):
            one, other = quantity["by_seed"]
            assert quantity["mean"] == pytest.approx((one + other) / 2, abs=1e-6)
            assert quantity["se"] >= abs(one - other) / 2 - 1e-6  # s / sqrt(2), of the seeds alone
    for seed in (0, 1):
        job = RunOptions(
            Path(shutil.copytree(kept / f"StudentT,seed={seed}", f"run-{seed}")), rows=5, budget=Budget(5, 5)
        )
        (row,) = compare.evaluate_variants(open_variants(job.folder), job)["groups"][0]["rows"]
        elbo = group["rows"][1]["test"]["elbo"]
        assert row["test"]["elbo"]["mean"] == pytest.approx(elbo["by_seed"][seed], abs=1e-6)
    assert "over 2 seeds" in " ".join(group["verdicts"])


# What does not go together, and what can't be compared

PAIRS = "--vary prior=StandardNormal,VampPrior --vary guide=Amortized,PerDatapoint"
TINY = f"--data bits.npy --epochs 1 --hidden 4 --latent 2 --out run {FEW}"
REASON = "prior VampPrior needs an encoder, and guide PerDatapoint has none; use --guide Amortized"


def test_a_pair_that_does_not_go_together_is_left_out_with_its_reason(pvae):
    done = pvae(f"compare {TINY} {PAIRS}")
    assert done.status == 0
    assert f"VampPrior / PerDatapoint is left out: {REASON}" in done.out
    found = read("run")
    assert found["left_out"] == {"VampPrior / PerDatapoint": REASON}
    (group,) = found["groups"]
    names = ["StandardNormal / Amortized", "StandardNormal / PerDatapoint", "VampPrior / Amortized"]
    assert [row["name"] for row in group["rows"]] == names
    page = " ".join(Path("run/report.html").read_text().split())
    assert f"VampPrior / PerDatapoint ({REASON})" in page
    assert not Path("run/VampPrior_PerDatapoint").exists()


@pytest.mark.parametrize("command", ["compare --guide PerDatapoint", "compare --guides PerDatapoint"])
def test_a_pair_that_does_not_go_together_is_a_mistake_alone(pvae, command):
    done = pvae(f"{command} {TINY} --prior VampPrior")
    assert (done.status, done.err) == (2, f"error: {REASON}\n")
    assert not Path("run").exists()


@pytest.mark.parametrize(
    ("data", "axes", "groups", "reason"),
    [
        (
            "counts.npy",
            {"likelihood": ["Gaussian", "Poisson", "Laplace"]},
            [["Gaussian", "Laplace"], ["Poisson"]],
            {"nats of density", "nats of mass"},
        ),
        (
            "bits.npy",
            {"binarize": ["none", "dynamic"]},
            [["binarize none"], ["binarize dynamic"]],
            {"bits-none", "bits-dynamic"},
        ),
    ],
    ids=["base measure", "binarization"],
)
def test_nats_that_cannot_be_compared_stand_in_groups(data, axes, groups, reason, capsys, pvae):
    axes = " ".join(f"--vary {name}={','.join(values)}" for name, values in axes.items())
    done = pvae(f"compare {TINY.replace('bits.npy', data)} {axes}")
    assert done.status == 0, done.err
    found = read("run")
    assert [[row["name"] for row in group["rows"]] for group in found["groups"]] == groups
    page = " ".join(Path("run/report.html").read_text().split())
    assert "The variants form 2 groups: nats of different data, of different binarizations" in page
    assert all(words in page for words in reason)
    for number, names in enumerate(groups, 1):
        assert arviz_export.load_idata(Path("run"), number)["posterior"].variant.to_numpy().tolist() == names
        words = " ".join(found["groups"][number - 1]["verdicts"])
        assert not any(name in words for other in groups if other != names for name in other)


def test_variants_of_different_latents_are_exported_together():
    found = ran("run", {"latent": [2, 3]})
    assert [row["latent"] for row in found["groups"][0]["rows"]] == [2, 3]
    z = arviz_export.load_idata(Path("run"))["posterior/z"]
    missing = z.isnull().any(("chain", "draw", "row"))
    assert missing.sel(variant="latent 2").to_numpy().tolist() == [False, False, True]
    assert not missing.sel(variant="latent 3").any()


# Flags and recipes


def test_flags_add_axes_to_a_recipes_own(pvae):
    Path("my.toml").write_text(
        'data = "bits.npy"\nlatent = 2\nepochs = 1\n[network]\ntype = "MLP"\nhidden = [4]\n'
        '[vary]\nprior = ["StandardNormal", "StudentT"]\nguide = ["PerDatapoint"]\n'
    )
    done = pvae(f"compare my.toml --guide Amortized --latent 3 --out run {FEW}")
    assert done.status == 0, done.err
    (group,) = read("run")["groups"]
    assert [row["name"] for row in group["rows"]] == ["StandardNormal", "StudentT"]
    assert {row["latent"] for row in group["rows"]} == {3}
    assert recipe.read_recipe_file(Path("run/recipe.toml")).vary == {
        "prior": ["StandardNormal", "StudentT"],
        "guide": ["Amortized"],
    }


def test_a_warm_up_that_never_ends_is_warned_of(pvae):
    done = pvae("fit --data bits.npy --epochs 2 --latent 2 --objective 'ELBO(warm_up=5)'")
    said = "the KL weight rises over 5 epochs, but training has 2: it never reaches its full value"
    assert (done.status, f"warning: {said}" in done.err) == (0, True)
    done = pvae(f"compare {TINY} --vary 'objective=ELBO,ELBO(warm_up=5.0)' --epochs 2")
    assert (done.status, f"warning: ELBO_warm_up=5.0: {said}" in done.out) == (0, True)
    done = pvae("fit --data bits.npy --epochs 5 --latent 2 --objective 'ELBO(warm_up=5)' --overwrite")
    assert (done.status, "warning" in done.err) == (0, False)


@pytest.mark.parametrize(
    "flags",
    [
        "",
        "--data bits.npy --prior 'StudentT(df=3)' --objective 'IWAE(K=5)' --patience 2 --validation-size 0.2",
        "--guide SemiAmortized --semi-steps 3 --no-unroll --family FullRankNormal --likelihood Gaussian",
        "--network Conv --latent 3 --learning-rate 1e-17 --binarize dynamic",
    ],
)
def test_what_show_writes_is_read_back_as_the_same_recipe(pvae, flags):
    done = pvae(f"show {flags}")
    assert done.status == 0, done.err
    Path("shown.toml").write_text(done.out)
    found = recipe.read_recipe_file(Path("shown.toml"))
    assert recipe.resolve(found.recipe) == found.recipe
    assert pvae("show shown.toml").out == done.out
    assert all(isinstance(getattr(found.recipe, kind), dict) for kind in KINDS)


def test_show_keeps_a_recipes_axes(pvae):
    Path("my.toml").write_text('latent = 2\n[vary]\nprior = ["StandardNormal", {type = "StudentT", df = 3.0}]\n')
    Path("shown.toml").write_text(pvae("show my.toml --seed 3").out)
    found = recipe.read_recipe_file(Path("shown.toml"))
    assert found.vary == {"prior": ["StandardNormal", {"type": "StudentT", "df": 3.0}]}
    assert found.recipe == recipe.resolve(Recipe(latent=2, seed=3))


# Checks

UNUSED = """
import torch
from torch import nn

from pvae.generative.vae import VAE


class Program(VAE):
    def __init__(self, decoder, likelihood, prior):
        super().__init__(decoder, likelihood, prior)
        self.spare = nn.Parameter(torch.zeros(3))
"""


@pytest.mark.parametrize(
    "flags", ["", "--guide PerDatapoint", "--guide SemiAmortized", "--objective 'IWAE(K=2, warm_up=9.0)'"]
)
def test_a_sound_recipe_passes_its_check_and_leaves_no_trace(pvae, flags, tmp_path):
    before = sorted(tmp_path.iterdir())
    done = pvae(f"check --data bits.npy --latent 2 {flags}")
    assert (done.status, done.err) == (0, "")
    lines = done.out.splitlines()
    assert lines[0].startswith("bits-none: 32 training + 8 test rows of 6 values")
    assert lines[1] == "latents: z [2]; q has 4 parameters for each row"
    loss = float(lines[2].removeprefix("two steps: loss ").removesuffix(" nats per row"))
    assert math.isfinite(loss)
    assert lines[3].startswith("a gradient in every parameter: model ")
    assert sorted(tmp_path.iterdir()) == before


def test_a_parameter_that_nothing_uses_fails_the_check(pvae):
    Path("mine.py").write_text(UNUSED)
    done = pvae("check --data bits.npy --latent 2 --program mine.py:Program")
    assert done.status == 2
    assert done.err == "error: no finite gradient reaches model.spare; is the parameter used in the program?\n"


def test_a_check_of_a_grid_tells_of_every_cell(pvae):
    axes = 'prior = ["VampPrior", "StudentT"]\nguide = ["Amortized", "PerDatapoint"]\n'
    Path("my.toml").write_text(f'data = "bits.npy"\nlatent = 2\n[vary]\n{axes}')
    done = pvae("check my.toml")
    assert done.status == 0, done.err
    assert f"VampPrior / PerDatapoint is left out: {REASON}" in done.out
    for name in ("VampPrior / Amortized", "StudentT / Amortized", "StudentT / PerDatapoint"):
        assert f"{name}: a gradient in every parameter" in done.out


LATENTS = """
import pyro
import pyro.distributions as dist
import torch
from torch import nn

from pvae.runtime.pyro_params import LocalModule, local_method


class Rates(LocalModule):
    def __init__(self, columns):
        super().__init__()
        self.log_rate = nn.Parameter(torch.zeros(columns))

    @local_method
    def model(self, x, index=None):
        with pyro.plate("data", len(x), dim=-1):
            size = pyro.sample("size", dist.Gamma(2.0, 1.0))
            share = pyro.sample("share", dist.Dirichlet(torch.ones(3)))
            rate = size.unsqueeze(-1) * self.log_rate.exp() * share.repeat_interleave(2, -1)
            pyro.sample("x", dist.Poisson(rate).to_event(1), obs=x)


class Kinds(LocalModule):
    @local_method
    def model(self, x, index=None):
        with pyro.plate("data", len(x), dim=-1):
            kind = pyro.sample("kind", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Poisson(1 + kind.unsqueeze(-1).expand_as(x)).to_event(1), obs=x)
"""


def test_a_program_of_bounded_latents_is_compared_by_all_sources(pvae):
    Path("mine.py").write_text(LATENTS)
    with contextlib.redirect_stderr(io.StringIO()):
        done = pvae(f"compare {TINY.replace('bits', 'counts')} --program mine.py:Rates")
    assert done.status == 0, done.err
    (group,) = read("run")["groups"]
    assert (group["data"]["base_measure"], {row["latent"] for row in group["rows"]}) == ("mass", {3})
    drawn = arviz_export.load_idata(Path("run"))["posterior"]
    assert (drawn["size"].to_numpy() > 0).all()
    assert torch.as_tensor(drawn["share"].to_numpy()).sum(-1).allclose(torch.ones(()))
    done = pvae("check --data counts.npy --program mine.py:Kinds")
    assert (done.status, done.err.count("\n")) == (2, 1)
    assert "latent 'kind' is discrete" in done.err


# What is said rather than ignored


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--vary prior=StandardNormal,Laplace --prior StudentT", "--prior fixes what --vary prior varies"),
        ("--vary network=MLP,ResidualMLP --hidden 7", "--hidden fixes what --vary network varies"),
        ("--vary seed=5,6 --seeds 2", "--seeds and an axis of seeds exclude each other"),
        ("--vary patience=None,3", "write patience=VALUE,VALUE"),
    ],
)
def test_flags_that_contradict_an_axis_are_refused(line, words, pvae):
    done = pvae(f"compare --data bits.npy --epochs 1 {line}")
    assert done.status == 2
    assert words in done.err
    assert not Path("runs").exists()


def test_flags_of_guides_reach_an_axis_that_is_checked(pvae):
    Path("my.toml").write_text('data = "bits.npy"\nlatent = 2\n[vary]\nguide = ["Amortized", "PerDatapoint"]\n')
    done = pvae("check my.toml --local-steps 0")
    assert (done.status, "local_steps is 0" in done.err) == (2, True)


def test_a_recipe_with_free_bits_and_a_learned_prior_is_sound(pvae):
    done = pvae("check --data bits.npy --latent 2 --prior GaussianMixture --objective 'ELBO(free_bits=8.0)'")
    assert (done.status, done.err) == (0, "")


def test_an_unfinished_grid_is_evaluated_as_far_as_it_goes_and_says_so(pvae):
    assert pvae(f"compare {TINY} --vary prior=StandardNormal,Laplace,StudentT --out run").status == 0
    Path("run/Laplace/checkpoint.safetensors").unlink()
    recipe_file = Path("run/StudentT/recipe.toml")
    recipe_file.write_text(recipe_file.read_text().replace("epochs = 1\n", "epochs = 7\n"))
    done = pvae(f"evaluate run {FEW.replace('--epochs 1', '')}")
    assert done.status == 0, done.err
    assert "warning: Laplace is not trained and stays out" in done.out
    assert "warning: StudentT has had 1 of its 7 epochs" in done.out
    assert [row["name"] for row in read("run")["groups"][0]["rows"]] == ["StandardNormal", "StudentT"]


def test_reasons_for_what_was_left_out_survive_an_evaluation(pvae):
    assert pvae(f"compare {TINY} {PAIRS} --out run").status == 0
    before = read("run")["left_out"]
    assert pvae(f"evaluate run {FEW.replace('--epochs 1', '')}").status == 0
    assert read("run")["left_out"] == before != {}


def test_each_variant_of_a_source_stands_on_the_same_decoder(pvae):
    guides = "guide=Amortized,SemiAmortized(steps=1),SemiAmortized(steps=2)"
    done = pvae(f"compare {TINY} --vary '{guides}' --out run")
    assert done.status == 0, done.err
    rows = read("run")["groups"][0]["same_decoder"]["rows"]
    assert [row["guide"] for row in rows] == [
        "Amortized",
        "SemiAmortized(steps=1)",
        "SemiAmortized(steps=2)",
        "PerDatapoint",
    ]


@pytest.mark.parametrize(
    ("word", "words"), [("Ful", "unknown family 'Ful'"), ("Delta", "Delta is a point mass, which has no ELBO")]
)
def test_families_are_refused_before_anything_is_trained(word, words, tmp_path):
    with pytest.raises(UserError, match=words):
        RunOptions(tmp_path, families=[word])
