"""The recipes in models/: each is sound in every cell of its grid, short, and told at its head."""

import re
import shutil
import tomllib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pvae.data import sources
from pvae.experiments import sweep
from pvae.recipes import recipe, registry
from pvae.recipes.preflight import check_recipe, recipe_warnings, try_recipe

MODELS = Path(__file__).parents[1] / "models"
PATHS = sorted(MODELS.glob("*.toml"))
TABLES = ("versions", "machine", "date")  # of [expected], besides the variants

each = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)


@pytest.fixture(scope="module")
def pictures():
    """Random pictures in MNIST's form, enough for every split."""
    rng = np.random.default_rng(0)
    rows = {f"x_{part}": rng.random((N, 28, 28), np.float32).round(2) for part, N in (("train", 10_400), ("test", 40))}
    return rows | {f"y_{part}": rng.integers(10, size=N) for part, N in (("train", 10_400), ("test", 40))}


@pytest.fixture
def few(pictures, monkeypatch):
    """A function from a recipe to a few hundred rows of its data; pictures are random ones in the place of MNIST's."""
    monkeypatch.setattr(sources, "_read_torchvision", lambda name, folder: dict(pictures))
    shelf = sweep.DatasetCache()

    def rows(own):
        whole = shelf[own]
        return replace(whole, train=whole.train[:300], validation=whole.validation[:50], test=whole.test[:50])

    return rows


def opened(path):
    return recipe.read_recipe_file(path, trust=True)


def variants(path):
    file = opened(path)
    return sweep.sweep_points(file.recipe, file.vary)


@each
def test_every_variant_takes_two_steps_with_a_gradient_in_every_parameter(path, few):
    for cell in variants(path):
        data = few(cell.recipe)
        lines = list(try_recipe(check_recipe(cell.recipe, data), data))
        assert lines[-1].startswith("a gradient in every parameter")
        assert list(recipe_warnings(cell.recipe)) == []


@each
def test_every_key_says_something(path):
    # A key that an axis overrides, or that the program does not take, would be read in vain.
    keys = tomllib.loads(path.read_text(encoding="utf-8"))
    vary = keys.get("vary", {})
    assert not set(keys) & set(vary)
    for name in {*keys, *vary} & {"likelihood", "prior"}:
        assert registry.accepts_argument("program", opened(path).recipe.program, name)
    assert "patience" not in keys or "validation_size" in keys


@each
def test_files_of_programs_stand_beside_the_recipe_and_are_named_from_there(path):
    keys = tomllib.loads(path.read_text(encoding="utf-8"))
    for value in [keys.get("program", "VAE"), *keys.get("vary", {}).get("program", [])]:
        file = registry.source_file(value)
        assert file is None or (MODELS / file).is_file()
        assert file is None or "--trust" in path.read_text(encoding="utf-8")


@each
def test_head_tells_what_the_recipe_is_for_and_how_to_run_it(path):
    text = path.read_text(encoding="utf-8")
    head = re.match(r"(?:#.*\n)+", text)
    assert head
    assert re.search(rf"pvae (compare|fit) models/{re.escape(path.name)}", head[0])
    assert len(text.partition("\n[expected]")[0].splitlines()) <= 50
    assert max(map(len, text.splitlines())) <= 120


@each
def test_numbers_that_others_published_stand_in_comments_and_own_ones_in_expected(path):
    file = opened(path)
    names = {cell.name for cell in variants(path)}
    assert not file.expected or set(file.expected) == names | set(TABLES)
    for line in path.read_text(encoding="utf-8").splitlines():
        assert "ublished" not in line or line.startswith("#")


def test_what_a_run_finds_is_recorded_in_its_recipe_and_nothing_else_of_it_changes(tmp_path, pvae):
    path = Path(shutil.copy(MODELS / "beta-vae.toml", tmp_path))
    before = path.read_text(encoding="utf-8")
    line = f"compare {path} --record --epochs 1 --rows 5 --samples 5 --refine-steps 5"
    for folder in ("once", "again"):
        assert pvae(f"{line} --out {tmp_path / folder}").status == 0
    own, _, expected = path.read_text(encoding="utf-8").partition("\n[expected]")
    assert own.rstrip() == before.partition("\n[expected]")[0].rstrip()
    assert "\n[expected]" not in expected
    file, kept = opened(path), opened(MODELS / "beta-vae.toml")
    assert (file.recipe, file.vary) == (kept.recipe, kept.vary)
    assert set(file.expected) == {cell.name for cell in variants(path)} | set(TABLES)
    assert {"elbo", "iwae", "evidence", "reconstruction", "seconds", "rows", "K"} == set(file.expected["ELBO"])


def test_recording_needs_a_recipe(pvae):
    done = pvae("compare --record")
    assert (done.status, done.err) == (2, "error: --record needs a recipe file to write to\n")
