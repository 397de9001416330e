"""The work of a comparison: nothing is built, checked, hashed or searched twice."""

from collections import Counter

import pytest

from pvae.data.dataset import SPLITS, Dataset
from pvae.diagnostics.evaluation import Budget
from pvae.experiments import compare, results, sweep
from pvae.inference import guides
from pvae.recipes import preflight
from pvae.recipes.recipe import Recipe
from pvae.training import loop

ROWS = 6


@pytest.fixture
def work(monkeypatch, tmp_path):
    """How often each piece of work was done in a comparison of the three inference methods."""
    done = Counter()

    def count(owner, name, key=lambda *args, **kwargs: True):
        function = getattr(owner, name)

        def counted(*args, **kwargs):
            done[name] += bool(key(*args, **kwargs))
            return function(*args, **kwargs)

        monkeypatch.setattr(owner, name, counted)

    for module in (preflight, sweep):
        count(module, "build_model")
    for module in (preflight, loop):
        count(module, "check_support", key=lambda *args, splits=SPLITS, **kwargs: splits)
    count(Dataset, "_split_digest", key=lambda data, part: part == "train")
    count(Dataset, "iter_chunks", key=lambda data, part: part == "train")
    count(compare, "base_measure")
    count(results, "draw_conclusions")
    # A row of PerDatapoint is searched where it is new, that is without an index.
    count(guides.PerDatapoint, "params", key=lambda guide, x, index=None: index is None)
    recipe = Recipe(data="digits", epochs=1, latent=2, network={"type": "MLP", "hidden": [8]})
    options = compare.RunOptions(tmp_path / "run", device="cpu", rows=ROWS, budget=Budget(K=5, steps=2))
    compare.compare(recipe, options)
    return done


def test_each_piece_of_work_is_done_once(work):
    assert work == {
        "build_model": 3,  # one for each variant
        "check_support": 1,  # one data set, one likelihood
        "_split_digest": 1,
        "iter_chunks": 3,  # passes over the training rows: support, digest and summary
        "base_measure": 3,  # of each variant, which puts it into a group
        "draw_conclusions": 1,
        "params": 2,  # the test rows: on PerDatapoint's own decoder, and on the amortized one
    }
