"""Comparisons from Python: the same run as the command's, as frames, figures and text, and mistakes in one line."""

import gc
import math

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from pvae.diagnostics.evaluation import Budget
from pvae.errors import UserError
from pvae.experiments.compare import INFERENCE_METHODS
from pvae.recipes.recipe import Recipe
from pvae.reporting.arviz_figures import plot_latents, plot_predictive, plot_ranks
from pvae.reporting.comparison import Comparison, compare
from pvae.runtime.files import read_json
from pvae.samplers.hmc import Chains

pytestmark = pytest.mark.filterwarnings(
    "ignore:constrained_layout not applied", "ignore:.*SquareRootScale|.*argument looks like"
)

IMAGES = (np.random.default_rng(0).random((40, 3, 4)) < 0.5).astype("float32")
SMALL = {"epochs": 2, "latent": 2, "network": {"type": "MLP", "hidden": [4]}}
FAST = {"rows": 6, "budget": Budget(6, 4)}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "rows.npy"
    np.save(path, IMAGES)
    return path


@pytest.fixture(scope="module")
def compared(data):
    """The three inference methods on the data, in a temporary folder."""
    return compare(data, **FAST, **SMALL)


def test_three_inference_methods_are_compared_in_a_folder_that_goes_with_the_object(data):
    comparison = compare(data, vary={"guide": ["Amortized"]}, **FAST, **SMALL)
    folder = comparison.folder
    assert (folder / "Amortized" / "checkpoint.safetensors").is_file()
    assert comparison.idata["posterior"].sizes["variant"] == 1
    del comparison
    gc.collect()
    assert not folder.exists()


def test_results_are_those_of_the_folder(compared):
    assert compared.results == read_json(compared.folder / "results.json", "")
    again = Comparison.from_folder(str(compared.folder))
    assert again.results == compared.results
    assert again.conclusions == compared.conclusions == compared.results["groups"][0]["verdicts"]
    assert [row["name"] for row in compared.results["groups"][0]["rows"]] == list(INFERENCE_METHODS)


def test_the_frame_has_every_quantity_of_every_variant_and_split(compared):
    frame = compared.to_frame()
    (group,) = compared.results["groups"]
    assert set(frame["split"]) == {"train", "test"}
    assert set(frame["group"]) == {1}
    lines = frame.set_index(["variant", "split", "quantity"])
    for row in group["rows"]:
        for split in ("train", "test"):
            for key, value in row[split].items():
                mean = math.nan if value["mean"] is None else value["mean"]
                assert lines.loc[(row["name"], split, key), "mean"] == pytest.approx(mean, nan_ok=True)
                assert lines.loc[(row["name"], split, key), "K"] == 6
    (line,) = frame.query("variant == 'Amortized' and split == 'test' and quantity == 'elbo'").to_dict("records")
    assert (line["label"], line["unit"]) == ("ELBO", "nats")
    wide = frame.query("split == 'test'").pivot(index="variant", columns="quantity", values="mean")
    assert wide.loc["Amortized", "variety"] == group["rows"][0]["latent_space"]["variety"]["mean"]


def test_figures_are_those_of_the_page(compared):
    figures = compared.figures()
    assert all(isinstance(figure, Figure) for figure in figures.values())
    assert figures.keys() == {"curves", "reconstructions", "prior", "maps", "gaps", "refinement", "scatter"}
    page = compared.write_report()
    assert page == compared.folder / "report.html"
    assert page.read_text().count("<figure>") == len(figures)


def test_text_and_html_say_what_the_results_say(compared):
    text, html = str(compared), compared._repr_html_()
    for words in ("ELBO", "amortization gap", *INFERENCE_METHODS, "Conclusions"):
        assert words in text
    assert "<table>" in html
    assert "<abbr title=" in html
    assert all(name in html for name in INFERENCE_METHODS)


def test_variants_that_can_not_be_compared_are_groups(data):
    axes = {"likelihood": ["Bernoulli", "Gaussian"], "guide": ["Amortized"]}
    comparison = compare(data, vary=axes, **FAST, **SMALL)
    assert set(comparison.to_frame()["group"]) == {1, 2}
    assert {"curves", "curves-2"} <= comparison.figures().keys()
    assert "rows-none, density" in str(comparison)


def test_recipes_come_as_objects_and_as_files_and_keys_take_their_place(data, tmp_path):
    lines = [f"data = '{data}'", "epochs = 5", "latent = 2", "[vary]", "guide = ['Amortized', 'PerDatapoint']"]
    (tmp_path / "mine.toml").write_text("\n".join(lines))
    for recipe in (Recipe(str(data), epochs=5, latent=2), tmp_path / "mine.toml", str(tmp_path / "mine.toml")):
        comparison = compare(recipe, guide="Amortized", epochs=1, out=tmp_path / "run", overwrite=True, **FAST)
        (row,) = comparison.results["groups"][0]["rows"]
        assert (row["name"], row["epochs"], row["latent"]) == ("Amortized", 1, 2)
        assert (tmp_path / "run" / "results.json").is_file()


MISTAKES = {
    "data": (["digit"], {}, "unknown data 'digit'"),
    "key": ([], {"epohcs": 3}, "unknown key 'epohcs'; did you mean 'epochs'?"),
    "type": ([], {"epochs": "many"}, "epochs is 'many', but it takes"),
    "range": ([], {"latent": 0}, "latent is 0, but it must be at least 1"),
    "budget": ([], {"budget": "qick"}, "budget is 'qick'; did you mean 'quick'?"),
    "rows": ([], {"rows": 1}, "rows is 1, but it must be at least 2"),
    "axis": ([], {"vary": {"latnet": [1]}}, "vary: unknown key 'latnet'"),
    "no list": ([], {"vary": {"prior": "VampPrior"}}, "vary: prior is 'VampPrior', but it must be a list of values"),
    "twice": ([], {"vary": {"latent": [1, 2]}, "latent": 2}, "latent is both fixed and varied; give one of them"),
    "device": ([], {"device": "cud"}, "unknown device 'cud'"),
    "recipe": (["none.toml"], {}, "no recipe none.toml"),
}


@pytest.mark.parametrize(("args", "options", "said"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_names_the_parameter(args, options, said):
    with pytest.raises(UserError) as error:
        compare(*args, **options)
    assert said in str(error.value)
    assert "--" not in str(error.value)


def test_a_folder_without_results_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"results\.json is missing"):
        Comparison.from_folder(tmp_path)


def test_arviz_draws_latents_ranks_and_predictions(compared):
    one = torch.ones(3)
    chains = Chains(torch.randn(4, 30, 3, 2), one, one, torch.ones(3, 2), one)
    for figure in (plot_latents(compared.idata), plot_ranks(chains, row=1), plot_predictive(compared.idata, rows=4)):
        assert isinstance(figure, Figure)
        assert figure.axes
