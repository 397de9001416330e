"""Data with missing entries or selected labels: from the file to the report, and errors."""

import numpy as np
import pytest
import torch

from pvae.data.loading import load_data
from pvae.errors import UserError
from pvae.experiments.arviz_export import load_idata as exported
from pvae.recipes.recipe import Recipe, load_recipe_data, resolve
from pvae.runtime.files import read_json

X = np.linspace(0, 1, 60, dtype=np.float32).reshape(12, 5)
HOLES = np.where(np.random.default_rng(0).random(X.shape) < 0.3, np.nan, X)
EMPTY = np.where(np.arange(5) == 2, np.nan, X)
INFINITE = np.where(X[3, 1] == X, np.inf, HOLES)
WHOLE = """
import pyro, pyro.distributions as dist, torch
from torch.distributions import constraints
from pvae.runtime.pyro_params import LocalModule, local_method
class Whole(LocalModule):
    support = constraints.real
    def __init__(self, *, columns: int):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(2, columns))
    @local_method
    def model(self, x, index=None):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.MultivariateNormal(z @ self.weight, torch.eye(x.shape[1])), obs=x)
"""

# id: (arrays of the file, flags, words of the message)
WRONG = {
    "NaN": ({"x": HOLES}, "", "row 0, column 1 is nan; remove or fill such values, or set --missing"),
    "infinity": ({"x": INFINITE}, "--missing", "row 3, column 1 is inf; remove or fill such values ("),
    "column without a value": ({"x": EMPTY}, "--missing", "column 2 has no value in any of the 10 training rows"),
    "pixel without a value": ({"x": EMPTY.reshape(12, 5, 1)}, "--missing", "column 2, 0 has no value"),
    "outside [0, 1]": ({"x": 2 * HOLES}, "--missing --binarize threshold", "threshold takes values from 0 to 1"),
    "no count": ({"x": HOLES}, "--missing --binarize levels", "levels takes whole numbers from 0"),
    "a density of whole rows": ({"x": HOLES}, "--missing --program {folder}/whole.py:Whole", "scores whole rows"),
    "no labels": ({"x": X}, "--only 1", "--only takes labels, and not all rows have one"),
    "some labels": ({"x_train": X, "y_train": np.arange(12), "x_test": X}, "--only 1", "not all rows have one"),
    "unknown label": (
        {"x": X, "y": np.arange(12) % 3},
        "--only 1,7",
        "--only 7: no row has such a label; give some",
    ),
    "labels without test rows": ({"x": X, "y": np.arange(12)}, "--only 11", "leaves no t"),
    "no number": ({"x": X, "y": np.arange(12)}, "--only one", "--only is 'one', but it must be whole numbers"),
}


@pytest.mark.parametrize(("arrays", "flags", "words"), WRONG.values(), ids=WRONG)
def test_wrong_uses_are_refused_in_one_line(pvae, tmp_path, arrays, flags, words):
    np.savez(tmp_path / "rows.npz", **arrays)
    (tmp_path / "whole.py").write_text(WHOLE)
    likelihood = "" if "--program" in flags else "--likelihood Gaussian "
    command = f"fit --data {tmp_path}/rows.npz {likelihood}--epochs 1 --out {tmp_path}/run "
    done = pvae(command + flags.format(folder=tmp_path))
    assert done.status == 2, done
    assert words in done.err
    assert done.err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_rows_on_disk_have_no_labels_to_select(tmp_path):
    np.save(tmp_path / "rows.npy", X)
    with pytest.raises(UserError, match=r"only takes labels, and a \.npy file has none"):
        load_data(str(tmp_path / "rows.npy"), only=[1], stream=True)


def test_an_empty_choice_of_labels_is_refused():
    with pytest.raises(UserError, match=r"only=\[\]: no row has such a label; give some of 0, 1, 2, 3, 4, 5"):
        load_data("digits", only=[])


def test_a_comparison_is_trained_judged_and_reported(pvae, tmp_path):
    digits = load_data("digits")
    whole = torch.cat([digits.train, digits.test])[:300].numpy().reshape(-1, 8, 8)
    hidden = np.random.default_rng(0).random(whole.shape) < 0.3
    np.savez(tmp_path / "rows.npz", x=np.where(hidden, np.nan, whole), y=np.arange(300) % 3)
    told = f"--data {tmp_path}/rows.npz --binarize threshold --missing --only 0,2 --latent 2 --hidden 16 --epochs 2"
    budget = "--rows 12 --samples 40 --refine-steps 10"
    done = pvae(f"compare {told} --guides PerDatapoint --out {tmp_path}/run {budget}")
    assert done.status == 0, done.err
    assert "rows-threshold-missing-only-0,2: " in done.out
    assert "of the entries missing" in done.out
    (group,) = read_json(tmp_path / "run" / "results.json", "")["groups"]
    for row in group["rows"]:
        assert -40 < row["test"]["evidence"]["mean"] < -5  # of about 45 binary entries: at most 31 nats by coins
    x = exported(tmp_path / "run")["observed_data"]["x"].to_numpy()
    assert 0.2 < np.isnan(x).mean() < 0.4
    assert (tmp_path / "run" / "report.html").stat().st_size > 10_000


# Data


@pytest.mark.parametrize("binarize", ["none", "threshold", "dynamic", "levels"])
@pytest.mark.parametrize("stream", [False, True])
def test_observed_entries_equal_those_of_the_complete_rows(tmp_path, binarize, stream):
    x = np.rint(9 * X) if binarize == "levels" else X
    np.save(tmp_path / "whole.npy", x)
    np.save(tmp_path / "holes.npy", np.where(np.isnan(HOLES), np.nan, x).astype(np.float64))
    options = {"binarize": binarize, "test_size": 3, "validation_size": 2}
    whole, found = (load_data(str(tmp_path / f"{n}.npy"), missing=n == "holes", **options) for n in ("whole", "holes"))
    if stream:
        resident, found = found, load_data(str(tmp_path / "holes.npy"), missing=True, stream=True, **options)
        assert (found.digest, found.summary().split(",")[:3]) == (resident.digest, resident.summary().split(",")[:3])
        assert found.means.equal(resident.means)
    index = torch.arange(len(whole.train))
    parts = [(data.validation, data.test, data.fixed_train(5).x, data.train[:]) for data in (whole, found)]
    drawn = []
    for data in (whole, found):
        torch.manual_seed(0)
        drawn.append(data.rows(index))
    for complete, own in zip((*parts[0], drawn[0]), (*parts[1], drawn[1]), strict=True):
        assert own.isnan().any()
        assert own[~own.isnan()].equal(complete[~own.isnan()])
    assert found.missing
    assert not whole.missing
    assert torch.allclose(found.means, found.train[:].nanmean(0))
    share = found.train[:].isnan().float().mean().item()
    assert f"{share:.1%} of the entries missing" in found.summary()
    assert found.identity == f"holes-{binarize}-missing"


def test_an_empty_cell_is_missing(tmp_path):
    (tmp_path / "rows.csv").write_text("a,b,label\n1,2,0\n,3,1\n4,,0\n5,6,1\n7,8,0\n")
    data = load_data(str(tmp_path / "rows.csv"), missing=True, test_size=1)
    assert torch.cat([data.train, data.test]).isnan().sum() == 2


@pytest.mark.parametrize("binarize", ["threshold", "dynamic"])
def test_class_models_hold_out_the_same_rows(binarize):
    options = {"binarize": binarize, "validation_size": 100, "seed": 3}
    whole = load_data("digits", **options)
    for part in ("train", "validation", "test"):
        labels = getattr(whole, f"{part}_labels")
        for only in ([3], [0, 7]):
            own = load_data("digits", only=only, **options)
            mine = torch.isin(labels, torch.tensor(only))
            assert getattr(own, part).equal(getattr(whole, part)[mine])
            assert getattr(own, f"{part}_labels").equal(labels[mine])
    assert load_data("digits", binarize=binarize, only=[7, 0]).identity == f"digits-{binarize}-only-0,7"
    assert load_data("digits", only=range(10), **options).digest == whole.digest


def test_selected_labels_are_sorted():
    own = [resolve(Recipe(only=only)) for only in ([7, 0, 7], None)]
    assert own[0].only == [0, 7]
    assert [len(load_recipe_data(each).train) for each in own] == [
        int((load_data("digits").train_labels % 7 == 0).sum()),
        1438,
    ]
