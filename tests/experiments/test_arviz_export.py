"""The export: every number under its name and dimensions, the same after a save and a load, whole or refused."""

import json
import os
import warnings
from dataclasses import asdict, replace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from oracles import LinearGaussian
from torch import nn

from pvae.diagnostics.evaluation import Budget
from pvae.errors import UserError
from pvae.experiments import arviz_export
from pvae.experiments.arviz_export import (
    Draws,
    draw_for_export,
    load_idata,
    save_idata,
    summarize_latents,
    to_datatree,
)
from pvae.experiments.compare import RunOptions, compare
from pvae.experiments.run import open_run
from pvae.inference.families import DiagonalNormal, FullRankNormal
from pvae.inference.guides import Amortized
from pvae.inference.importance import LogWeights
from pvae.inference.latents import find_latent_sites
from pvae.recipes.recipe import Recipe, read_recipe

K, M, B, C, S, P, D, TRAIN = 4, 3, 3, 5, 6, 2, 2, 7
VARIANTS = ("Amortized", "PerDatapoint")
ATTRIBUTES = {"seed": 3, "rate": 0.5, "note": 'é "quoted"', "recipe": {"latent": 2, "patience": None}, "none": None}
LAYOUT = {
    "posterior": {"z": ("chain", "draw", "variant", "row", "z_dim")},
    "posterior_predictive": {"x": ("chain", "draw", "variant", "row", "value")},
    "prior_predictive": {"x": ("chain", "draw", "variant", "value")},
    "log_likelihood": {"x": ("chain", "draw", "variant", "row")},
    "sample_stats": {
        "log_weight": ("chain", "draw", "variant", "row"),
        "elbo": ("variant", "row"),
        "k_hat": ("variant", "row"),
    },
    "prior": {"z": ("chain", "draw", "variant", "z_dim")},
    "means": {"x": ("variant", "row", "value"), "prior_x": ("variant", "draw", "value")},
    "observed_data": {"x": ("row", "value")},
    "constant_data": {"label": ("row",)},
    "train": {"elbo": ("variant", "row")},
    "test": {"elbo": ("variant", "row"), "k_hat": ("variant", "row"), "evidence": ("variant", "row")},
}
SIZES = {"chain": 1, "draw": K, "variant": 2, "row": B, "z_dim": D, "value": C}


@pytest.fixture
def by_hand():
    """Random draws of two variants, the second without evidence; rows; labels."""
    random = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=random)

    def draws():
        weights = LogWeights(normal(K, B), normal(K, B), normal(K, B), {"z": normal(K, B, D)})
        values = {
            "train": {"elbo": normal(TRAIN)},
            "test": {"elbo": normal(B), "k_hat": normal(B), "evidence": normal(B)},
        }
        whole = torch.randint(2, (M, B, C), generator=random).float()
        return Draws(weights, whole, normal(B, C), {"z": normal(S, D)}, normal(S, C), normal(P, C), values)

    variants = {name: draws() for name in VARIANTS}
    del variants["PerDatapoint"].values["test"]["evidence"]
    return variants, normal(B, C), torch.tensor([2, 0, 1])


@pytest.fixture
def found(by_hand):
    return to_datatree(*by_hand, ATTRIBUTES)


def test_groups_dimensions_and_coordinates_are_those_of_the_layout(found):
    assert {name: {v: a.dims for v, a in group.data_vars.items()} for name, group in found.children.items()} == LAYOUT
    for name, group in found.children.items():
        draws = {"posterior_predictive": M, "prior": S, "prior_predictive": S, "means": P}
        own = {group: {"draw": count} for group, count in draws.items()} | {"train": {"row": TRAIN}}
        assert dict(group.sizes) == {dim: (SIZES | own.get(name, {}))[dim] for dim in group.sizes}
        for dim in group.coords:
            expected = list(VARIANTS) if dim == "variant" else list(range(group.sizes[dim]))
            assert group[dim].to_numpy().tolist() == expected
        assert set(group.dims) == set(group.coords)


def test_every_number_stands_where_its_names_say(by_hand, found):
    variants, x, labels = by_hand
    for name, draws in variants.items():
        weights, here = draws.weights, {"variant": name}
        exact = {
            "posterior/z": weights.latents["z"][None],
            "posterior_predictive/x": draws.x[None],
            "prior/z": draws.prior["z"][None],
            "prior_predictive/x": draws.prior_x[None],
            "means/x": draws.x_mean,
            "means/prior_x": draws.prior_mean,
            "log_likelihood/x": weights.log_lik[None],
            "sample_stats/log_weight": (weights.log_lik + weights.log_prior - weights.log_q)[None],
            "sample_stats/elbo": draws.values["test"]["elbo"],
            "sample_stats/k_hat": draws.values["test"]["k_hat"],
            "train/elbo": draws.values["train"]["elbo"],
            "test/elbo": draws.values["test"]["elbo"],
        }
        for path, values in exact.items():
            np.testing.assert_array_equal(found[path].sel(here), values)
    np.testing.assert_array_equal(found["observed_data/x"], x)
    np.testing.assert_array_equal(found["constant_data/label"], labels)


def test_what_a_variant_does_not_have_is_nan(by_hand, found):
    evidence = found["test/evidence"]
    np.testing.assert_array_equal(
        evidence.sel(variant="Amortized").astype("float32"), by_hand[0]["Amortized"].values["test"]["evidence"]
    )
    assert evidence.sel(variant="PerDatapoint").isnull().all()


def test_attributes_are_numbers_text_or_json(found):
    assert {name: found.attrs[name] for name in ("seed", "rate", "note")} == {
        name: ATTRIBUTES[name] for name in ("seed", "rate", "note")
    }
    assert {name: json.loads(found.attrs[name]) for name in ("recipe", "none")} == {
        name: ATTRIBUTES[name] for name in ("recipe", "none")
    }
    assert found["train/elbo"].attrs["units"] == found["test/evidence"].attrs["units"] == "nats"
    assert found["sample_stats/k_hat"].attrs["units"] == found["test/k_hat"].attrs["units"] == "1"


def test_without_labels_there_is_no_constant_data(by_hand):
    variants, x, _ = by_hand
    assert set(to_datatree(variants, x, None, {}).children) == LAYOUT.keys() - {"constant_data"}


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([0, 1], "int8"),
        ([0, 255], "int16"),
        ([-40000, 3], "int32"),
        ([0.5, 1], "float32"),
        ([1e12], "float32"),
        ([1, np.nan], "float32"),
        ([], "int8"),
    ],
)
def test_whole_numbers_are_kept_small_and_others_as_they_are(values, kind):
    array = np.array(values, dtype="float32")
    compact = arviz_export._compact(array)
    assert compact.dtype == kind
    np.testing.assert_array_equal(compact, array)


def test_columns_that_the_program_is_given_stand_apart_from_those_it_draws(by_hand):
    variants, x, labels = by_hand
    given = torch.eye(B)
    found = to_datatree(variants, torch.cat([x, given], 1), labels, {})
    np.testing.assert_array_equal(found["observed_data/x"], x)
    np.testing.assert_array_equal(found["constant_data/given"], given)


def test_draws_of_x_are_cut_to_first_rows_where_they_would_not_fit(by_hand, monkeypatch):
    variants, _, _ = by_hand
    x = torch.rand(40, C)
    many = {name: replace(own, x=torch.rand(M, 40, C), x_mean=x) for name, own in variants.items()}
    monkeypatch.setattr(arviz_export, "BYTES", {"f": 30 * M * 2 * C * 4})
    found = to_datatree(many, x, None, {})["posterior_predictive"]
    assert found.sizes["row"] == 30
    assert found.attrs["rows"] == "the first 30 of 40"
    np.testing.assert_array_equal(found["x"].sel(variant="Amortized")[0], many["Amortized"].x[:, :30])
    monkeypatch.setattr(arviz_export, "BYTES", {"f": 1})
    assert (
        to_datatree(many, x, None, {})["posterior_predictive"].sizes["row"] == arviz_export.X_DRAWS
    )  # those that are pictured


def test_a_file_of_binarized_images_takes_some_megabytes(by_hand, tmp_path):
    """Three variants, 300 rows of 784 values, 20 draws; 0.1 nats of entropy for each pixel, as under a good fit."""
    variants, _, _ = by_hand
    odds = torch.randn(300, 784, generator=torch.Generator().manual_seed(1)) * 6 - 9
    x = torch.rand(arviz_export.X_DRAWS, 300, 784, generator=torch.Generator().manual_seed(2)) < odds.sigmoid()
    prior = {"prior_x": x[0, : arviz_export.PRIOR_DRAWS].float(), "prior_mean": odds[: arviz_export.PICTURES].sigmoid()}
    one = replace(variants["Amortized"], x=x.float(), x_mean=odds.sigmoid(), values={}, **prior)
    latents = {"z": torch.randn(arviz_export.MOST, 300, 20)}
    three = dict.fromkeys("abc", replace(one, weights=replace(one.weights, latents=latents), prior={}))
    found = to_datatree(three, x[0].float(), None, {})
    assert found["posterior_predictive"].sizes["row"] == 300
    save_idata(found, tmp_path)
    assert (tmp_path / arviz_export.FILE).stat().st_size < 16e6


# What is drawn from a fit


def exact(model, rows=1000):
    """A guide that is the exact posterior of a LinearGaussian, and rows drawn from the program."""
    with torch.no_grad():
        M, D = model.weight.shape
        family = FullRankNormal(D)
        guide = Amortized(nn.Linear(M, family.num_params), family)
        lower = torch.linalg.cholesky(model.covariance)
        below = torch.tril_indices(D, D, -1)
        guide.encoder.weight.zero_()
        guide.encoder.weight[:D] = (model.covariance @ model.weight.T / model.scale**2).float()
        guide.encoder.bias[:D] = -guide.encoder.weight[:D] @ model.bias.float()
        guide.encoder.bias[D:] = torch.cat([lower.diag().log(), lower[below[0], below[1]]]).float()
        torch.manual_seed(3)
        return guide, (torch.randn(rows, D) @ model.weight.T.float() + model.bias.float()) + model.scale.float() * (
            torch.randn(rows, M)
        )


def standardized(found, mean, variance):
    """Mean square of (mean of the draws - mean) / error, by rows' first column: 1 give or take sqrt(2 / rows)."""
    return float((((found.mean(0) - mean) ** 2) / (variance / len(found)))[:, 0].mean())


def test_draws_of_x_follow_the_posterior_predictive_distribution_of_their_row():
    model = LinearGaussian()
    guide, x = exact(model)
    found = draw_for_export(model.model, guide, x).x
    assert found.shape == (arviz_export.X_DRAWS, 1000, 5)
    mean = model.mean(x) @ model.weight.T + model.bias
    variance = (model.weight @ model.covariance @ model.weight.T).diag() + model.scale**2
    assert abs(standardized(found, mean, variance) - 1) < 5 * 0.045
    assert standardized(found.roll(1, 1), mean, variance) > 2  # another row's draws


def test_draws_of_x_from_the_prior_stand_beside_their_latents():
    model = LinearGaussian()
    guide, x = exact(model, 50)
    found = draw_for_export(model.model, guide, x)
    z = found.prior["z"].double()
    assert z.shape == (arviz_export.PRIOR_DRAWS, 2)
    assert (z.mean(0).abs() < 5 / len(z) ** 0.5).all()

    def mean_square(latents):
        return float((((found.prior_x - latents @ model.weight.T - model.bias) / model.scale) ** 2).mean())

    assert abs(mean_square(z) - 1) < 5 * (2 / 1000) ** 0.5
    assert mean_square(z.roll(1, 0)) > 1.5


def two_sites(x, index=None):
    with pyro.plate("data", len(x), dim=-1):
        s = pyro.sample("s", dist.LogNormal(0.0, 0.5))
        w = pyro.sample("w", dist.Normal(torch.zeros(2, 3), 1.0).to_event(2))
        pyro.sample("x", dist.Normal(w.sum(-1).repeat_interleave(2, -1), s.unsqueeze(-1)).to_event(1), obs=x)


def test_a_program_of_several_sites_has_each_under_its_name():
    x = torch.randn(30, 4)
    family = DiagonalNormal(7)
    found = draw_for_export(
        two_sites, Amortized(nn.Linear(4, family.num_params), family, sites=find_latent_sites(two_sites, x)), x
    )
    made = to_datatree({"one": found}, x, None, {})
    row = ("chain", "draw", "variant", "row")
    assert {n: v.dims for n, v in made["posterior"].data_vars.items()} == {"s": row, "w": (*row, "w_dim", "w_dim1")}
    assert made["prior"].sizes == {"chain": 1, "draw": arviz_export.PRIOR_DRAWS, "variant": 1, "w_dim": 2, "w_dim1": 3}
    assert (made["prior/s"] > 0).all()


def test_drawing_leaves_the_random_stream_alone_and_is_fixed_by_its_seed():
    model = LinearGaussian()
    guide, x = exact(model, 10)
    torch.manual_seed(0)
    first = draw_for_export(model.model, guide, x, seed=1)
    after = torch.rand(1)
    torch.manual_seed(0)
    assert after == torch.rand(1)
    assert first.x.equal(draw_for_export(model.model, guide, x, seed=1).x)
    assert not first.x.equal(draw_for_export(model.model, guide, x, seed=2).x)


def test_a_summary_of_latents_has_the_posteriors_moments():
    model, rows, draws = LinearGaussian(), 20, 4000
    guide, x = exact(model, rows)
    summary = summarize_latents(model.model, guide, x, K=draws, round_to="none")
    assert summary.index.tolist() == [f"z[{row}, {i}]" for row in range(rows) for i in range(2)]
    sd = model.covariance.diag().sqrt().expand(rows, 2)
    error = (torch.tensor(summary["mean"].to_numpy(float)).view(rows, 2) - model.mean(x)) / sd * draws**0.5
    assert error.abs().max() < 5
    np.testing.assert_allclose(summary["sd"].to_numpy(float), sd.flatten(), rtol=5 / (2 * draws) ** 0.5)


# A run's file, and ArviZ on it


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A small comparison of two latent sizes on labelled data."""
    folder = tmp_path_factory.mktemp("run")
    random = np.random.default_rng(0)
    np.savez(folder / "data.npz", x=(random.random((60, 6)) < 0.4).astype("float32"), y=np.arange(60) % 3)
    own = Recipe(str(folder / "data.npz"), epochs=1, network={"type": "MLP", "hidden": [4]}, guide="Amortized", seed=4)
    job = RunOptions(folder / "run", device="cpu", rows=8, budget=Budget(K=20, steps=3))
    compare(own, job, vary={"latent": [2, 3]})
    return folder / "run"


def test_a_runs_file_says_what_made_it(run):
    found = load_idata(run)
    parts = {name: json.loads(found.attrs[name]) for name in ("recipe", "variants", "versions", "estimators", "shape")}
    names = found["posterior"]["variant"].to_numpy().tolist()
    assert list(parts["variants"]) == names
    whole = [parts["recipe"] | own for own in parts["variants"].values()]
    assert whole == [
        json.loads(json.dumps(asdict(read_recipe(run / place))))
        for place in sorted(path.parent.name for path in run.glob("*/recipe.toml"))
    ]
    assert [own["latent"] for own in parts["variants"].values()] == [2, 3]
    assert {"pvae-pyro", "torch", "pyro-ppl"} < set(parts["versions"])
    assert parts["estimators"]["evidence"].startswith("importance sampling, by each row's first proposal")
    assert (found.attrs["seed"], found.attrs["binarize"], found.attrs["base_measure"]) == (4, "none", "mass")


def test_an_opened_run_summarizes_its_latents(run):
    opened = open_run(run, device="cpu")
    whole, few = (
        opened.summarize_latents(K=10),
        opened.summarize_latents(opened.data.test[:2], K=10, kind="diagnostics"),
    )
    assert whole.index.tolist() == [f"z[{row}, {i}]" for row in range(len(opened.data.test)) for i in range(2)]
    assert set(few.index) == set(whole.index[:4])
    assert "mean" in whole
    assert "mean" not in few


def test_latents_that_a_variant_lacks_are_nan_in_posterior_and_prior(run):
    found = load_idata(run)
    for group in ("posterior", "prior"):
        small, large = (found[group]["z"].isel(variant=i) for i in (0, 1))
        assert small.isel(z_dim=2).isnull().all()
        assert small.isel(z_dim=[0, 1]).notnull().all()
        assert large.notnull().all()


def test_labels_are_those_of_the_rows(run):
    found = load_idata(run)
    assert found["constant_data"]["label"].dims == ("row",)
    assert found["constant_data"].sizes == {"row": 8}
    assert set(found["constant_data/label"].to_numpy()) <= {0, 1, 2}


def test_arviz_takes_a_runs_file(run):
    import arviz_base
    import arviz_stats

    one = load_idata(run).isel(variant=1)
    assert arviz_base.extract(one, group="posterior").sizes == {"row": 8, "z_dim": 3, "sample": arviz_export.MOST}
    summary = arviz_stats.summary(one.sel(row=0), round_to="none")
    mean = one["posterior/z"].sel(row=0).mean(("chain", "draw"))
    np.testing.assert_allclose(summary["mean"].to_numpy(float), mean, rtol=1e-6)  # means of single precision


def test_a_point_mass_has_a_file_too(run, tmp_path):
    own = Recipe(str(run.parent / "data.npz"), epochs=1, latent=2, family="Delta")
    compare(own, RunOptions(tmp_path / "run", rows=5, budget=Budget(K=5, steps=1)), vary={"guide": ["Amortized"]})
    found = load_idata(tmp_path / "run")
    assert (found["posterior/z"].std("draw") < 1e-6).all()
    assert set(found["sample_stats"].data_vars) & {"elbo"} == set()
    assert "log_joint" in found["test"]


def loo_of(scale):
    """Rows of ArviZ's loo on exact posterior draws, their k-hat, and the exact evidence."""
    import arviz_stats

    model = LinearGaussian(scale=scale)
    guide, x = exact(model, 200)
    made = to_datatree({"one": draw_for_export(model.model, guide, x)}, x, None, {}).isel(variant=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = arviz_stats.loo(made, pointwise=True)
    return found.elpd_i.to_numpy(), found.pareto_k.to_numpy(), model.evidence(x).numpy()


def test_loo_misses_the_evidence_though_the_posterior_is_exact():
    """By 1.60 nats, with an error over 200 rows of 0.05; k-hat is above 0.7 in 0.58 of them, with an error of 0.035."""
    elpd, k, evidence = loo_of(0.2)
    off = elpd - evidence
    assert off.mean() > 5 * off.std() / len(off) ** 0.5
    assert off.mean() > 1
    assert np.mean(k > 0.7) > 0.4


def test_loo_meets_the_evidence_where_a_row_says_little_of_its_latents():
    """The mean difference over 200 rows has an error of 0.003 nats."""
    elpd, k, evidence = loo_of(3.0)
    off = elpd - evidence
    assert abs(off.mean()) < 5 * off.std() / len(off) ** 0.5
    assert np.mean(k > 0.7) < 0.1


# Saving and loading


def test_a_tree_comes_back_as_it_was_saved(found, tmp_path):
    save_idata(found, tmp_path)
    assert load_idata(tmp_path).identical(found)
    with xr.open_datatree(tmp_path / arviz_export.FILE) as opened:
        assert opened.identical(found)
    assert [path.name for path in tmp_path.iterdir()] == [arviz_export.FILE]


def test_equal_runs_have_equal_files(by_hand, tmp_path):
    saved = []
    for _ in range(2):
        save_idata(to_datatree(*by_hand, ATTRIBUTES), tmp_path)
        saved.append((tmp_path / arviz_export.FILE).read_bytes())
    assert saved[0] == saved[1]


def test_a_loaded_tree_lets_go_of_its_file(found, tmp_path):
    found["constant_data/prior"] = found["constant_data/label"]  # named as a group is
    save_idata(found, tmp_path)
    loaded = load_idata(tmp_path)
    (tmp_path / arviz_export.FILE).unlink()
    assert loaded.identical(found)


@pytest.mark.parametrize("keep", [None, 0.0, 0.001, 0.1, 0.5, 0.99])
def test_a_missing_or_truncated_file_is_refused_in_one_line(found, tmp_path, keep):
    path = tmp_path / arviz_export.FILE
    if keep is not None:
        save_idata(found, tmp_path)
        os.truncate(path, int(keep * path.stat().st_size))
    with pytest.raises(UserError) as error:
        load_idata(tmp_path)
    message = str(error.value)
    assert arviz_export.FILE in message
    assert f"pvae evaluate {tmp_path} writes it" in message
    assert ("has no" in message) == (keep is None)
    assert "\n" not in message


@pytest.mark.parametrize("content", [b"", b"no netCDF\n" * 100, b"\x89HDF\r\n\x1a\n" + bytes(1000)])
def test_a_file_of_another_kind_is_refused(tmp_path, content):
    (tmp_path / arviz_export.FILE).write_bytes(content)
    with pytest.raises(UserError, match="can't be read"):
        load_idata(tmp_path)


def test_a_save_that_fails_leaves_the_old_file(found, tmp_path, monkeypatch):
    save_idata(found, tmp_path)
    before = (tmp_path / arviz_export.FILE).read_bytes()

    def full(self, path, **options):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(xr.DataTree, "to_netcdf", full)
    with pytest.raises(UserError, match="No space left on device"):
        save_idata(found, tmp_path)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [(arviz_export.FILE, before)]
