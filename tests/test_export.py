"""The export: every number under its name and dimensions, the same after a save and a load, whole or refused."""

import json
import os

import numpy as np
import pytest
import torch
import xarray as xr

from pvae import export
from pvae.errors import UserError
from pvae.export import Draws, load, save, tree
from pvae.weights import LogWeights

K, B, C, S, D, TRAIN = 4, 3, 5, 6, 2, 7
VARIANTS = ("Amortized", "PerDatapoint")
ATTRIBUTES = {"seed": 3, "rate": 0.5, "note": 'é "quoted"', "recipe": {"latent": 2, "patience": None}, "none": None}
LAYOUT = {
    "posterior": {"z": ("chain", "draw", "variant", "row", "z_dim")},
    "posterior_predictive": {"x": ("chain", "draw", "variant", "row", "value")},
    "prior_predictive": {"x": ("chain", "draw", "variant", "value")},
    "log_likelihood": {"x": ("chain", "draw", "variant", "row")},
    "sample_stats": {"log_weight": ("chain", "draw", "variant", "row")},
    "observed_data": {"x": ("row", "value")},
    "constant_data": {"label": ("row",)},
    "train": {"elbo": ("variant", "row")},
    "test": {"elbo": ("variant", "row"), "evidence": ("variant", "row")},
}
SIZES = {"chain": 1, "draw": K, "variant": 2, "row": B, "z_dim": D, "value": C}


@pytest.fixture
def drawn():
    """Random draws of two variants, the second without evidence; rows; labels."""
    random = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=random)

    def draws():
        weights = LogWeights(normal(K, B), normal(K, B), normal(K, B), {"z": normal(K, B, D)})
        values = {"train": {"elbo": normal(TRAIN)}, "test": {"elbo": normal(B), "evidence": normal(B)}}
        return Draws(weights, normal(B, C), normal(S, C), values)

    variants = {name: draws() for name in VARIANTS}
    del variants["PerDatapoint"].values["test"]["evidence"]
    return variants, normal(B, C), torch.tensor([2, 0, 1])


@pytest.fixture
def found(drawn):
    return tree(*drawn, ATTRIBUTES)


def test_groups_dimensions_and_coordinates_are_those_of_the_layout(found):
    assert {name: {v: a.dims for v, a in group.data_vars.items()} for name, group in found.children.items()} == LAYOUT
    for name, group in found.children.items():
        own = {"posterior_predictive": {"draw": 1}, "prior_predictive": {"draw": S}, "train": {"row": TRAIN}}
        assert dict(group.sizes) == {dim: (SIZES | own.get(name, {}))[dim] for dim in group.sizes}
        for dim in group.coords:
            expected = list(VARIANTS) if dim == "variant" else list(range(group.sizes[dim]))
            assert group[dim].to_numpy().tolist() == expected
        assert set(group.dims) == set(group.coords)


def test_every_number_stands_where_its_names_say(drawn, found):
    variants, x, labels = drawn
    for name, draws in variants.items():
        weights, here = draws.weights, {"variant": name}
        exact = {
            "posterior/z": weights.latents["z"][None],
            "posterior_predictive/x": draws.reconstruction[None, None],
            "prior_predictive/x": draws.prior_samples[None],
            "log_likelihood/x": weights.log_lik[None],
            "sample_stats/log_weight": (weights.log_lik + weights.log_prior - weights.log_q)[None],
            "train/elbo": draws.values["train"]["elbo"],
            "test/elbo": draws.values["test"]["elbo"],
        }
        for path, values in exact.items():
            np.testing.assert_array_equal(found[path].sel(here), values)
    np.testing.assert_array_equal(found["observed_data/x"], x)
    np.testing.assert_array_equal(found["constant_data/label"], labels)


def test_what_a_variant_does_not_have_is_nan(drawn, found):
    evidence = found["test/evidence"]
    np.testing.assert_array_equal(
        evidence.sel(variant="Amortized").astype("float32"), drawn[0]["Amortized"].values["test"]["evidence"]
    )
    assert evidence.sel(variant="PerDatapoint").isnull().all()


def test_attributes_are_numbers_text_or_json(found):
    assert {name: found.attrs[name] for name in ("seed", "rate", "note")} == {
        name: ATTRIBUTES[name] for name in ("seed", "rate", "note")
    }
    assert {name: json.loads(found.attrs[name]) for name in ("recipe", "none")} == {
        name: ATTRIBUTES[name] for name in ("recipe", "none")
    }
    assert found["train"].attrs["units"] == found["test"].attrs["units"] == "nats"


def test_without_labels_there_is_no_constant_data(drawn):
    variants, x, _ = drawn
    assert set(tree(variants, x, None, {}).children) == LAYOUT.keys() - {"constant_data"}


def test_a_tree_comes_back_as_it_was_saved(found, tmp_path):
    save(found, tmp_path)
    assert load(tmp_path).identical(found)
    with xr.open_datatree(tmp_path / export.FILE) as opened:
        assert opened.identical(found)
    assert [path.name for path in tmp_path.iterdir()] == [export.FILE]


def test_equal_runs_have_equal_files(drawn, tmp_path):
    saved = []
    for _ in range(2):
        save(tree(*drawn, ATTRIBUTES), tmp_path)
        saved.append((tmp_path / export.FILE).read_bytes())
    assert saved[0] == saved[1]


def test_a_loaded_tree_lets_go_of_its_file(found, tmp_path):
    save(found, tmp_path)
    loaded = load(tmp_path)
    (tmp_path / export.FILE).unlink()
    assert loaded.identical(found)


@pytest.mark.parametrize("keep", [None, 0.0, 0.001, 0.1, 0.5, 0.99])
def test_a_missing_or_truncated_file_is_refused_in_one_line(found, tmp_path, keep):
    path = tmp_path / export.FILE
    if keep is not None:
        save(found, tmp_path)
        os.truncate(path, int(keep * path.stat().st_size))
    with pytest.raises(UserError) as error:
        load(tmp_path)
    message = str(error.value)
    assert export.FILE in message
    assert f"pvae evaluate {tmp_path} writes it" in message
    assert ("has no" in message) == (keep is None)
    assert "\n" not in message


@pytest.mark.parametrize("content", [b"", b"no netCDF\n" * 100, b"\x89HDF\r\n\x1a\n" + bytes(1000)])
def test_a_file_of_another_kind_is_refused(tmp_path, content):
    (tmp_path / export.FILE).write_bytes(content)
    with pytest.raises(UserError, match="can't be read"):
        load(tmp_path)


def test_a_save_that_fails_leaves_the_old_file(found, tmp_path, monkeypatch):
    save(found, tmp_path)
    before = (tmp_path / export.FILE).read_bytes()

    def full(self, path, **options):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(xr.DataTree, "to_netcdf", full)
    with pytest.raises(UserError, match="No space left on device"):
        save(found, tmp_path)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [(export.FILE, before)]
