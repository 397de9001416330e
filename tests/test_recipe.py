"""Recipes: filled in once, written and read back the same, and built from one start whatever the guide."""

import dataclasses
import tomllib
from dataclasses import replace

import pytest
import torch

from pvae import components
from pvae.components import KINDS, find, make, table
from pvae.data import Dataset
from pvae.errors import UserError
from pvae.recipe import Recipe, build, read, resolve, write
from pvae.runtime import seeded

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
    return build(own, rows(own.name("likelihood") == "Bernoulli"))


# Filling in


@each
def test_resolving_leaves_nothing_open(own):
    full = resolve(own)
    open_still = [f.name for f in dataclasses.fields(full) if getattr(full, f.name) is None]
    assert set(open_still) <= {"test_size", "patience"}
    for kind in KINDS:
        component = getattr(full, kind)
        takes = set(components._arguments(find(kind, component["type"]))) - set(components.SUPPLIED[kind])
        assert set(component) == {"type", *takes}


@each
def test_resolving_twice_is_resolving_once(own):
    assert resolve(resolve(own)) == resolve(own)


@each
def test_resolving_keeps_what_was_said(own):
    full = resolve(own)
    for name, value in vars(own).items():
        if name in KINDS:
            said = {k: list(v) if isinstance(v, tuple) else v for k, v in table(value).items()}
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
    write(how(own), tmp_path)
    assert read(tmp_path) == how(own)
    assert "None" not in (tmp_path / "recipe.toml").read_text(encoding="utf-8")


def test_a_recipe_may_leave_out_what_has_a_default(tmp_path):
    (tmp_path / "recipe.toml").write_text("seed = 3\n")
    assert read(tmp_path) == Recipe(seed=3)


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
        read(tmp_path)
    assert words in str(error.value)
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_recipe_is_plain_toml(tmp_path):
    write(resolve(RECIPES["tables"]), tmp_path)
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
    vae, guide, _ = built(family=family, latent=3)
    sizes = [[tuple(p.shape) for p in net.parameters() if p.dim() == 2] for net in (guide.encoder, vae.decoder)]
    assert sizes == [[(8, COLUMNS), (4, 8), (3 * per_latent, 4)], [(4, 3), (8, 4), (COLUMNS, 8)]]
    assert built(family=family, guide="PerDatapoint").guide.table.shape == (ROWS, 2 * per_latent)


def test_arguments_reach_their_components():
    vae, guide, _ = built(
        likelihood={"type": "Gaussian", "scale": 0.25},
        guide={"type": "SemiAmortized", "steps": 3, "draws": 2, "unroll": False},
    )
    assert vae.likelihood.log_scale.exp().item() == pytest.approx(0.25)
    assert (guide.steps, guide.draws, guide.unroll) == (3, 2, False)


@pytest.mark.parametrize("kind", KINDS)
def test_an_unknown_component_is_answered_with_the_nearest(kind):
    name = KINDS[kind].__all__[0]
    for call in (find, make):
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
        ({"latent": 0}, "--latent is 0"),
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
