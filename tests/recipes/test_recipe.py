"""Recipes: filled in once, written and read back the same, and built from one start whatever the guide."""

import dataclasses
import json
import tomllib
from dataclasses import replace

import numpy as np
import pytest
import torch

from pvae.data.dataset import Dataset
from pvae.errors import Incompatible, UserError
from pvae.experiments.run import open_variants
from pvae.generative.networks import Standardize
from pvae.recipes import registry
from pvae.recipes.build import build_model, fit_recipe
from pvae.recipes.preflight import check_recipe
from pvae.recipes.recipe import (
    Recipe,
    load_recipe_data,
    read_recipe,
    read_recipe_file,
    record_expected,
    resolve,
    to_toml,
    write_recipe,
)
from pvae.recipes.registry import KINDS, as_table, find_class, make
from pvae.runtime.torch_state import seeded

COLUMNS, ROWS = 6, 10

RECIPES = {
    "plain": Recipe(),
    "images": Recipe("mnist", binarize="dynamic", guide="SemiAmortized"),
    "file": Recipe("rows.csv", likelihood="Gaussian", guide="PerDatapoint", test_size=7, latent=3),
    "tables": Recipe(
        likelihood={"type": "Gaussian", "scale": 0.3},
        network={"type": "MLP", "hidden": (8, 4), "activation": "ELU"},
        guide={"type": "SemiAmortized", "unroll": False, "learning_rate": 1e-17},
    ),
    "numbers": Recipe(
        'a "name"\\é.npy', validation_size=0.25, epochs=0, batch_size=3, learning_rate=0.1, patience=2, seed=5
    ),
}
each = pytest.mark.parametrize("own", RECIPES.values(), ids=RECIPES)


def rows(binary=True):
    with seeded(0):
        x = torch.bernoulli(torch.full((ROWS, COLUMNS), 0.5)) if binary else torch.randn(ROWS, COLUMNS)
    return Dataset("rows", x, x[:0], x[:4], (COLUMNS,))


def built(**changes):
    """Program and guide of a small recipe."""
    small = {"latent": 2, "network": {"type": "MLP", "hidden": [8, 4]}}
    own = resolve(Recipe(**small | changes))
    return build_model(own, rows(own.name("likelihood") == "Bernoulli"))


# Filling in


@each
def test_resolving_leaves_nothing_open(own):
    full = resolve(own)
    open_still = [f.name for f in dataclasses.fields(full) if getattr(full, f.name) is None]
    assert set(open_still) <= {"test_size", "only", "patience"}
    for kind in KINDS:
        component = getattr(full, kind)
        takes = set(registry._arguments(find_class(kind, component["type"]))) - set(registry.SUPPLIED[kind])
        assert set(component) == {"type", *takes}


@each
def test_resolving_twice_is_resolving_once(own):
    assert resolve(resolve(own)) == resolve(own)


@each
def test_resolving_keeps_what_was_said(own):
    full = resolve(own)
    for name, value in vars(own).items():
        if name in KINDS:
            said = {k: list(v) if isinstance(v, tuple) else v for k, v in as_table(value).items()}
            assert getattr(full, name) == getattr(full, name) | said
        elif value is not None:
            assert getattr(full, name) == value


def test_a_file_is_named_from_the_root_so_that_a_run_finds_it_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.csv").touch()
    assert resolve(Recipe("rows.csv")).data == str(tmp_path / "rows.csv")


@pytest.mark.parametrize(
    ("data", "likelihood", "said", "found"),
    [
        ("digits", "Bernoulli", None, "threshold"),
        ("mnist", "Bernoulli", None, "threshold"),
        ("digits", "Gaussian", None, "none"),
        ("mnist", {"type": "Gaussian", "scale": 0.1}, None, "none"),
        ("rows.npy", "Bernoulli", None, "none"),
        ("rows.npy", "Gaussian", None, "none"),
        ("digits", "Bernoulli", "none", "none"),
        ("digits", "Bernoulli", "dynamic", "dynamic"),
        ("rows.npy", "Bernoulli", "threshold", "threshold"),
    ],
)
def test_binarization_follows_data_and_likelihood_unless_said(data, likelihood, said, found):
    assert resolve(Recipe(data, binarize=said, likelihood=likelihood)).binarize == found


# Writing and reading


@each
@pytest.mark.parametrize("how", [resolve, lambda own: replace(own, network="MLP")], ids=["resolved", "as it is"])
def test_a_recipe_comes_back_as_it_was_written(own, how, tmp_path):
    write_recipe(how(own), tmp_path)
    assert read_recipe(tmp_path) == how(own)
    assert "None" not in (tmp_path / "recipe.toml").read_text(encoding="utf-8")


def test_a_recipe_may_leave_out_what_has_a_default(tmp_path):
    (tmp_path / "recipe.toml").write_text("seed = 3\n")
    assert read_recipe(tmp_path) == Recipe(seed=3)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "is not a run: it has no recipe.toml"),
        (b"latnet = 3", "unknown key 'latnet'; did you mean 'latent'?"),
        (b"nonsense = 3", "unknown key 'nonsense'"),
        (b"data = [", "can't be read"),
        (b"data = 'a'\ndata = 'b'", "can't be read"),
        (b"data = '\xff'", "can't be read"),
        *(
            pytest.param(words.encode(), words.split()[0], id=words)
            for words in ("seed = 'a'", "latent = 2.5", "epochs = 'two'", "data = 3", "guide = 3", "test_size = 'a'")
        ),
    ],
)
def test_a_broken_recipe_is_named_in_one_line(content, words, tmp_path):
    if content is not None:
        (tmp_path / "recipe.toml").write_bytes(content)
    with pytest.raises(UserError) as error:
        read_recipe(tmp_path)
    assert words in str(error.value)
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_recipe_is_plain_toml(tmp_path):
    write_recipe(resolve(RECIPES["tables"]), tmp_path)
    keys = tomllib.loads((tmp_path / "recipe.toml").read_text())
    assert keys["network"] == {"type": "MLP", "hidden": [8, 4], "activation": "ELU"}
    assert keys["guide"]["unroll"] is False


# Building


def same(one, other):
    tensors = one.state_dict(), other.state_dict()
    return tensors[0].keys() == tensors[1].keys() and all(torch.equal(t, tensors[1][n]) for n, t in tensors[0].items())


@pytest.mark.parametrize("likelihood", ["Bernoulli", "Gaussian"])
def test_recipes_that_differ_in_the_guide_alone_start_from_the_same_bits(likelihood):
    first = built(likelihood=likelihood)
    torch.manual_seed(99)  # the stream outside has no say
    others = {guide: built(likelihood=likelihood, guide=guide) for guide in ("PerDatapoint", "SemiAmortized")}
    assert all(same(first.program, other.program) for other in others.values())
    assert same(first.guide.encoder, others["SemiAmortized"].guide.encoder)
    assert not same(first.program, built(likelihood=likelihood, seed=1).program)
    assert not same(first.guide.encoder, built(likelihood=likelihood, seed=1).guide.encoder)


def test_building_leaves_the_stream_outside_alone():
    before = torch.get_rng_state()
    built()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("family", "per_latent"), [("DiagonalNormal", 2), ("Delta", 1)])
def test_sizes_follow_from_the_data_and_the_decoder_mirrors_the_encoder(family, per_latent):
    fit = built(family=family, latent=3)
    vae, guide = fit.program, fit.guide
    sizes = [[tuple(p.shape) for p in net.parameters() if p.dim() == 2] for net in (guide.encoder, vae.decoder)]
    assert sizes == [[(8, COLUMNS), (4, 8), (3 * per_latent, 4)], [(4, 3), (8, 4), (COLUMNS, 8)]]
    assert built(family=family, guide="PerDatapoint").guide.table.shape == (ROWS, 2 * per_latent)


def test_arguments_reach_their_components():
    fit = built(
        likelihood={"type": "Gaussian", "scale": 0.25},
        guide={"type": "SemiAmortized", "steps": 3, "draws": 2, "unroll": False},
    )
    vae, guide = fit.program, fit.guide
    assert vae.likelihood.log_scale.exp().item() == pytest.approx(0.25)
    assert (guide.steps, guide.draws, guide.unroll) == (3, 2, False)


@pytest.mark.parametrize("kind", KINDS)
def test_an_unknown_component_is_answered_with_the_nearest(kind):
    name = KINDS[kind].__all__[0]
    for call in (find_class, make):
        with pytest.raises(UserError, match=f"unknown {kind} '{name[:-1]}'; did you mean '{name}'"):
            call(kind, name[:-1])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"guide": "Amortised"}, "unknown guide 'Amortised'; did you mean 'Amortized'?"),
        ({"guide": {"type": "amortized"}}, "unknown guide 'amortized'; did you mean 'Amortized'?"),
        ({"guide": {"type": "SemiAmortized", "stepps": 3}}, "guide SemiAmortized takes no argument 'stepps'; did you"),
        ({"guide": {"type": "SemiAmortized", "steps": 0}}, "SemiAmortized: steps is 0, but it must be positive"),
        ({"guide": {"type": "SemiAmortized", "steps": "five"}}, "guide SemiAmortized: "),
        ({"guide": {"type": "PerDatapoint", "num_data": 3}}, "takes no argument 'num_data'"),
        ({"guide": {"type": "Amortized", "encoder": 3}}, "takes no argument 'encoder'"),
        ({"family": {"type": "Delta", "dim": 3}}, "family Delta takes no argument 'dim'"),
        (
            {"likelihood": {"type": "Gaussian", "sclae": 1.0}},
            "Gaussian takes no argument 'sclae'; did you mean 'scale'",
        ),
        ({"likelihood": {"type": "Gaussian", "scale": -1}}, "Gaussian: scale is -1, but it must be positive"),
        ({"likelihood": {"type": "Gaussian", "scale": "1"}}, "likelihood Gaussian: "),
        ({"network": {"type": "MLP", "hiden": [4]}}, "network MLP takes no argument 'hiden'; did you mean 'hidden'"),
        ({"network": {"type": "MLP", "activation": "Relu"}}, "unknown activation 'Relu'; did you mean 'ReLU'?"),
        ({"network": {"type": "MLP", "hidden": ["a"]}}, "network MLP: "),
        ({"latent": 0}, "latent is 0, but it must be at least 1"),
        pytest.param({"network": {"type": "MLP", "hidden": 4}}, "network MLP"),
        pytest.param({"network": {"type": "MLP", "hidden": [-1]}}, "MLP: hidden"),
        pytest.param({"network": {"type": "MLP", "hidden": [0]}}, "MLP: hidden"),
        pytest.param({"network": {"type": "MLP", "activation": 3}}, "activation"),
        pytest.param({"guide": {"steps": 3}}, "guide"),
        pytest.param({"guide": {"type": "SemiAmortized", "steps": 2.5}}, "steps"),
        pytest.param({"guide": {"type": "SemiAmortized", "unroll": "no"}}, "unroll"),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_a_component_that_does_not_go_is_refused_by_name(changes, words):
    with pytest.raises(UserError) as error:
        built(**changes)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


# Recipe files


def opened(tmp_path, text, *changes, **options):
    path = tmp_path / "my.toml"
    path.write_text(text)
    return read_recipe_file(path, *changes, **options)


def test_a_recipe_file_gives_recipe_axes_and_expected_numbers(tmp_path):
    text = (
        'seed = 3\nobjective = "IWAE(K=5)"\n[vary]\nlatent = [2, 8]\nprior = ["StandardNormal", {type = "StudentT"}]\n'
    )
    found = opened(tmp_path, f"{text}[expected]\nelbo = -3.5\n")
    assert found.recipe == Recipe(seed=3, objective="IWAE(K=5)")
    assert found.vary == {"latent": [2, 8], "prior": ["StandardNormal", {"type": "StudentT"}]}
    assert found.expected == {"elbo": -3.5}


def test_changes_take_the_place_of_a_files_keys(tmp_path):
    found = opened(tmp_path, 'seed = 3\nlatent = 4\nprior = "StudentT"', {"seed": 5, "prior": "Laplace"})
    assert found.recipe == Recipe(seed=5, latent=4, prior="Laplace")


@pytest.mark.parametrize("own", RECIPES.values(), ids=RECIPES)
def test_the_words_of_a_recipe_are_read_back_as_the_same_recipe(own, tmp_path):
    axes = {"latent": [2, 3], "guide": ["Amortized", {"type": "SemiAmortized", "steps": 3}]}
    found = opened(tmp_path, to_toml(resolve(own), axes))
    assert (found.recipe, found.vary) == (resolve(own), axes)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("seed = 3\nlatnet = 3", "unknown key 'latnet'; did you mean 'latent'?"),
        ("seed = 3\n\nlatent = = 2", "can't be read: Invalid value (at line 3, column 10)"),
        ("latent = 2.5", "latent is 2.5, but it takes a whole number"),
        ("latent = -2", "latent is -2, but it must be at least 1"),
        ("seed = 3000000000", f"seed is 3000000000, but it must be below {2**31}"),
        ("learning_rate = nan", "learning_rate is nan, but it must be positive"),
        ("vary = 3", "vary must be a table whose keys have lists of values"),
        ("[vary]\nlatent = 3", "vary must be a table whose keys have lists of values"),
        ("[vary]\nlatent = []", "vary must be a table whose keys have lists of values"),
        ("[vary]\nlatnet = [3]", "unknown key 'latnet'; did you mean 'latent'?"),
        ("[vary]\nlatent = [2, 'a']", "vary.latent is 'a', but it takes a whole number"),
        ("[vary]\nprior = [3]", "vary.prior is 3, but it takes text or a table"),
    ],
)
def test_a_mistake_in_a_recipe_file_is_named_with_the_file(text, said, tmp_path):
    with pytest.raises(UserError) as error:
        opened(tmp_path, text)
    assert said in str(error.value)
    assert str(tmp_path / "my.toml") in str(error.value)
    assert "\n" not in str(error.value)


def test_a_recipe_file_that_is_missing_is_named(tmp_path):
    with pytest.raises(UserError, match=r"there is no recipe .*none\.toml"):
        read_recipe_file(tmp_path / "none.toml")


def test_files_are_looked_for_beside_the_recipe_first(tmp_path, monkeypatch):
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path)
    for name in ("rows.csv", "there/rows.csv", "mine.py", "there/mine.py", "far.py"):
        (tmp_path / name).touch()
    text = 'data = "rows.csv"\nprior = "mine.py:P(df=3.0)"\nfamily = "far.py:F"\n[vary]\nguide = ["mine.py:G"]\n'
    found = opened(tmp_path / "there", text, trust=True)
    assert found.recipe.data == str(tmp_path / "there/rows.csv")
    assert found.recipe.prior == {"type": f"{tmp_path / 'there/mine.py'}:P", "df": 3.0}
    assert found.recipe.family == "far.py:F"
    assert found.vary["guide"] == [{"type": f"{tmp_path / 'there/mine.py'}:G"}]


def test_arguments_that_were_named_otherwise_before_are_read_as_their_new_names(tmp_path):
    new = resolve(Recipe(guide="PerDatapoint(num_steps_new_data=7)"))
    old = to_toml(new, {"guide": ["PerDatapoint(new_steps=7)"]}).replace("num_steps_new_data = 7", "new_steps = 7")
    file = opened(tmp_path, old)
    assert "\nnew_steps = 7" in old
    assert file.recipe == new
    assert registry.with_new_words(registry.with_old_words(new.guide)) == new.guide
    assert registry.with_old_words(new.guide)["new_steps"] == 7
    assert resolve(replace(new, guide=file.vary["guide"][0])) == new


@pytest.mark.parametrize("guide", ["Amortized", "PerDatapoint", "SemiAmortized(steps=2)"])
def test_a_checked_model_trains_to_the_same_bits_as_a_built_one(guide):
    own = resolve(Recipe(guide=guide, latent=2, network="MLP(hidden=[4])", epochs=2, batch_size=4))
    data = rows()
    checked, fresh = check_recipe(own, data), build_model(own, data)
    assert same(checked.program, fresh.program)
    assert same(checked.guide, fresh.guide)
    first, again = fit_recipe(checked, data, check_data=False), fit_recipe(fresh, data)
    assert [row["objective"] for row in first.fit.history] == [row["objective"] for row in again.fit.history]
    assert same(first.guide, again.guide)


# Components in words


@pytest.mark.parametrize(
    ("word", "component"),
    [
        ("DReG", {"type": "DReG"}),
        ("IWAE(K=20)", {"type": "IWAE", "K": 20}),
        ("MLP(hidden=[8, 4], activation='ELU')", {"type": "MLP", "hidden": [8, 4], "activation": "ELU"}),
        ("StudentT(df=3.5)", {"type": "StudentT", "df": 3.5}),
        ("SemiAmortized(unroll=False, steps=2)", {"type": "SemiAmortized", "unroll": False, "steps": 2}),
    ],
)
def test_a_word_and_its_table_are_one_component(word, component):
    assert registry.parse_component(word) == as_table(word) == component
    assert registry.label(component) == registry.label(word) == word
    assert registry.split_words(f"{word}, {word},A") == [word, word, "A"]


def test_a_label_leaves_out_defaults_and_folders():
    assert Recipe(objective={"type": "IWAE", "K": 20, "kl_weight": 1.0}).name("objective") == "IWAE(K=20)"
    assert resolve(Recipe()).name("objective") == "ELBO"
    assert registry.label("/home/of/mine.py:Prior(df=2)") == "Prior(df=2)"


@pytest.mark.parametrize("word", ["IWAE(20)", "IWAE(K=20", "IWAE(K=x)", "IWAE(K=)", "IWAE(K=2)+1", "IWAE(K=1)(K=2)"])
def test_a_word_that_cannot_be_read_is_refused(word):
    with pytest.raises(UserError, match=r"can't be read; write a name, or Name\(argument=value, \.\.\.\)"):
        registry.parse_component(word)


# Own code. Importing the file leaves a mark, so that a test sees whether it has run.

OWN = """
from pathlib import Path

from torch import nn

from pvae import families, likelihoods, objectives, priors
from pvae.generative import vae as generative
from pvae.inference import guides

Path(__file__).with_name("mark").touch()


class Coins(likelihoods.Bernoulli):
    pass


class Wide(priors.StudentT):
    def __init__(self, dim, *, df: float = 9.0):
        super().__init__(dim, df=df)


class Posterior(families.DiagonalNormal):
    pass


class Line(nn.Linear):
    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs)


class Program(generative.VAE):
    pass


class Source(guides.Amortized):
    pass


class Bound(objectives.IWAE):
    def __init__(self, *, K: int = 3):
        super().__init__(K=K)


class Needy(priors.StandardNormal):
    def __init__(self, dim, *, width: float):
        super().__init__(dim)
"""
CLASSES = {
    "program": "Program",
    "likelihood": "Coins",
    "prior": "Wide",
    "family": "Posterior",
    "network": "Line",
    "guide": "Source",
    "objective": "Bound",
}


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A folder with own code in mine.py and rows of bits, where the test stands."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(OWN)
    np.save("bits.npy", rows().train)
    return tmp_path


def test_own_code_can_be_of_every_kind():
    assert CLASSES.keys() == KINDS.keys()


FEW = "--rows 3 --samples 3 --refine-steps 2"
SMALL = "--data bits.npy --epochs 1 --latent 2 --test-size 3 --out run"


@pytest.mark.parametrize("kind", KINDS)
def test_own_code_runs_where_it_is_named_and_in_a_run_only_with_trust(mine, pvae, kind, monkeypatch):
    done = pvae(f"fit {SMALL} --{kind} mine.py:{CLASSES[kind]}")
    assert done.status == 0, done.err
    (mine / "mark").unlink()
    registry._run.cache_clear()  # as in a new process
    (mine / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    done = pvae(f"evaluate ../run {FEW}")
    assert (done.status, done.err.count("\n")) == (2, 1)
    assert f"{kind} is code in {mine / 'mine.py'}, which runs only if you give --trust" in done.err
    assert not (mine / "mark").exists()
    (found,) = open_variants(mine / "run", trust=True)
    assert found.fits[0].recipe.name(kind) == CLASSES[kind]
    assert (mine / "mark").exists()


def test_own_code_of_a_comparison_is_found_from_anywhere(mine, pvae, monkeypatch):
    line = f"compare {SMALL} {FEW} --vary 'prior=StandardNormal,mine.py:Wide(df=5.0)' --guide mine.py:Source"
    done = pvae(line)
    assert done.status == 0, done.err
    (mine / "mark").unlink()
    registry._run.cache_clear()  # as in a new process
    (mine / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    done = pvae(f"evaluate ../run {FEW}")
    assert (done.status, "--trust" in done.err, (mine / "mark").exists()) == (2, True, False)
    done = pvae(f"evaluate ../run {FEW} --trust")
    assert done.status == 0, done.err
    rows = json.loads((mine / "run/results.json").read_text())["groups"][0]["rows"]
    assert [row["name"] for row in rows] == ["StandardNormal", "Wide(df=5.0)"]
    assert {row["guide"] for row in rows} == {"Source"}


@pytest.mark.parametrize(
    ("text", "trusted", "flags"),
    [
        ('prior = "mine.py:Wide"', False, ""),
        ('prior = {type = "mine.py:Wide", df = 3.0}', False, ""),
        ('[vary]\nprior = ["StandardNormal", "mine.py:Wide"]', False, ""),
        ('prior = "mine.py:Wide"', True, "--trust"),
        ('prior = "mine.py:Wide"', True, "--prior mine.py:Wide"),
        ('prior = "mine.py:Wide"', True, "--prior StudentT"),
        ('prior = "mine.py:Wide"\nfamily = "mine.py:Posterior"', True, "--prior mine.py:Wide"),
        ('prior = "mine.py:Wide"', False, "--family DiagonalNormal"),
    ],
)
def test_code_that_a_recipe_names_runs_only_if_trusted_or_named(mine, pvae, text, trusted, flags):
    (mine / "my.toml").write_text(f'data = "bits.npy"\n{text}\n')
    done = pvae(f"show my.toml {flags}")
    assert done.status == (0 if trusted else 2)
    assert ("--trust" in done.err) != trusted
    assert (mine / "mark").exists() == (trusted and flags != "--prior StudentT")


@pytest.mark.parametrize(
    ("kind", "name", "said"),
    [
        ("prior", "none.py:Wide", "there is no Python file none.py"),
        ("prior", "bits.npy:Wide", "there is no Python file bits.npy"),
        ("prior", "mine.py:Wyde", "mine.py has no class 'Wyde'; did you mean 'Wide'?"),
        ("prior", "mine.py:Path", "mine.py has no class 'Path'"),
        ("prior", "mine.py:Coins", "mine.py:Coins is no prior: it must be a Prior"),
        (
            "program",
            "mine.py:Line",
            "mine.py:Line is no program: it must be an nn.Module with a method model(x, index)",
        ),
        ("objective", "mine.py:Wide", "mine.py:Wide is no objective: it must be a Objective"),
        ("prior", "mine.py:Needy", "prior Needy needs width: write Needy(width=...)"),
        ("prior", "mine.py:Wide(df='a')", "prior Wide: df is 'a', but it takes a number"),
        ("prior", "mine.py:Wide(df=-1.0)", "StudentT: df is -1.0, but it must be positive"),
        ("prior", "mine.py:Wide(dim=3)", "prior Wide takes no argument 'dim'"),
        ("prior", "mine.py:Wide(fd=3)", "prior Wide takes no argument 'fd'; did you mean 'df'?"),
        ("prior", "broken.py:Wide", "broken.py: the file fails with ZeroDivisionError: division by zero"),
        ("prior", "syntax.py:Wide", "syntax.py: the file fails with SyntaxError"),
    ],
)
def test_own_code_that_does_not_go_is_refused_in_one_line(mine, kind, name, said):
    (mine / "broken.py").write_text("1 / 0\n")
    (mine / "syntax.py").write_text("class Wide(\n")
    with pytest.raises(UserError) as error:
        build_model(resolve(Recipe(latent=2, **{kind: name})), rows())
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("factor", "standardized"), [(1.0, False), (16.0, True)])
def test_an_encoder_sees_intensities_as_they_are_and_other_units_standardized(factor, standardized):
    own = resolve(Recipe(likelihood="Gaussian", binarize="none", network={"type": "MLP", "hidden": [4]}))
    data = load_recipe_data(own)
    scaled = replace(data, train=factor * data.train, test=factor * data.test)
    guide = build_model(own, scaled).guide
    assert isinstance(guide.encoder, Standardize) == standardized
    if standardized:
        names = guide.state_dict()
        assert {"encoder.mean", "encoder.scale"} <= set(names)


def test_recording_leaves_tables_after_the_recorded_one_alone(tmp_path):
    path = tmp_path / "my.toml"
    path.write_text(
        'latent = 3\n\n[expected.old]\nelbo = 1\n\n[vary]\nprior = ["Laplace"]\n\n[network]\ntype = "MLP"\n'
    )
    for value in (2, 3):
        record_expected(path, {"new": {"elbo": value}})
    file = read_recipe_file(path)
    assert (file.recipe.latent, file.recipe.network) == (3, {"type": "MLP"})
    assert (file.vary, file.expected) == ({"prior": ["Laplace"]}, {"new": {"elbo": 3}})


def test_a_table_without_type_is_named(tmp_path):
    (tmp_path / "my.toml").write_text("[likelihood]\nscale = 2.0\n")
    with pytest.raises(UserError, match="likelihood has no type; write type = "):
        read_recipe_file(tmp_path / "my.toml")


def test_arguments_that_may_be_none_are_left_out_of_the_file(tmp_path):
    (tmp_path / "own.py").write_text(
        "from pvae.generative.likelihoods import Gaussian\n"
        "class Mine(Gaussian):\n"
        "    def __init__(self, *, width: float | None = None) -> None:\n"
        "        super().__init__(scale=width or 1.0)\n"
    )
    own = resolve(Recipe(likelihood=f"{tmp_path / 'own.py'}:Mine"))
    write_recipe(own, tmp_path)
    assert read_recipe(tmp_path, trust=True) == own


def test_vamp_prior_is_refused_where_z_is_not_the_only_latent(tmp_path):
    (tmp_path / "own.py").write_text(
        "import pyro, pyro.distributions as dist\n"
        "from pvae.runtime.pyro_params import LocalModule, local_method\n"
        "class Two(LocalModule):\n"
        "    def __init__(self, *, prior, likelihood, decoder) -> None:\n"
        "        super().__init__()\n"
        "        self.prior, self.likelihood, self.decoder = prior, likelihood, decoder\n"
        "    @local_method\n"
        "    def model(self, x, index=None):\n"
        "        with pyro.plate('data', len(x), dim=-1):\n"
        "            s = pyro.sample('s', dist.LogNormal(0.0, 1.0))\n"
        "            z = pyro.sample('z', self.prior())\n"
        "            pyro.sample('x', self.likelihood(s[..., None] * self.decoder(z)), obs=x)\n"
    )
    own = resolve(Recipe(program=f"{tmp_path / 'own.py'}:Two", prior="VampPrior(pseudo_inputs=3)", latent=2))
    with pytest.raises(Incompatible, match="needs z to be the program's only latent"):
        build_model(own, load_recipe_data(own))
    build_model(replace(own, prior="StandardNormal"), load_recipe_data(own))


def test_a_users_file_runs_once_until_it_changes(tmp_path):
    path = tmp_path / "own.py"
    path.write_text("from pvae.generative.priors import StandardNormal\nclass Mine(StandardNormal): pass\n")
    word = f"{path}:Mine"
    first = find_class("prior", word)
    assert find_class("prior", word) is first
    path.write_text("from pvae.generative.priors import StandardNormal\nclass Mine(StandardNormal):\n    new = True\n")
    assert find_class("prior", word).new
