"""The page and its sentences: self-contained, escaped, complete, and said only where the numbers bear it out."""

import base64
import io
import json
import re
import shutil
import warnings
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import matplotlib.image
import numpy as np
import pytest
import torch

from pvae.diagnostics.evaluation import Budget, Evaluation, RefinementCurve
from pvae.errors import UserError
from pvae.experiments.compare import INFERENCE_METHODS, RunOptions, compare
from pvae.experiments.conclusions import EvaluatedVariant, SameDecoder, draw_conclusions
from pvae.recipes.recipe import Recipe
from pvae.reporting import html_report
from pvae.reporting.style import image_shape
from pvae.reporting.tables import comparison_tables
from pvae.runtime.files import read_json
from pvae.stats import Estimate, number

pytestmark = pytest.mark.filterwarnings("ignore:constrained_layout not applied")

HOSTILE = "<script>alert(1)</script>\"'><img src=http://x onerror=alert(1)>&amp;{{ 1 }}"
IMAGES = (np.random.default_rng(0).random((40, 3, 4)) < 0.5).astype("float32")
VECTORS = np.random.default_rng(1).normal(size=(40, 7)).astype("float32")

# id: (rows, changes of the recipe, sources, figures)
ALWAYS = {"curves", "maps", "reconstructions", "prior"}
RUNS = {
    "images": (IMAGES, {}, INFERENCE_METHODS, ALWAYS | {"gaps", "refinement", "scatter"}),
    "vectors": (VECTORS, {"likelihood": "Gaussian"}, ("PerDatapoint",), ALWAYS | {"gaps"}),
    "point mass": (VECTORS, {"likelihood": "Gaussian", "family": "Delta"}, INFERENCE_METHODS[:2], ALWAYS),
    "untrained": (IMAGES, {"epochs": 0}, ("SemiAmortized",), ALWAYS | {"gaps"}),
    "validated": (IMAGES, {"validation_size": 5, "patience": 1}, ("SemiAmortized",), ALWAYS | {"gaps"}),
}


def compared(folder, name):
    """A run folder with results, its data in a file of a hostile name."""
    rows, changes, sources, _ = RUNS[name]
    path = folder / "<b onclick='x'>&\".npy"
    np.save(path, rows)
    small = {"epochs": 2, "latent": 2, "network": {"type": "MLP", "hidden": [4]}}
    compare(
        Recipe(str(path), **small | changes),
        RunOptions(folder / "run", device="cpu", rows=6, budget=Budget(6, 4)),
        vary={"guide": sources},
    )
    return folder / "run"


class Page(HTMLParser):
    """A page's tags, its attributes' values, and its text."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.values, self.text = [], [], ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, *(name for name, _ in attrs)))
        self.values += attrs

    def handle_data(self, data):
        self.text += data


def words(text):
    return " ".join(text.split())


@pytest.fixture(scope="module", params=RUNS)
def page(request, tmp_path_factory):
    """Name of a run, its results, its page."""
    folder = compared(tmp_path_factory.mktemp("run"), request.param)
    assert html_report.write_report(folder) == folder / "report.html"
    return request.param, read_json(folder / "results.json", ""), Page((folder / "report.html").read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return compared(tmp_path_factory.mktemp("run"), "vectors")


# The page


def addresses(page):
    return [value for name, value in page.values if name == "src"]


def decoded(address):
    kind, payload = re.fullmatch(r"data:image/(png|svg\+xml);base64,([A-Za-z0-9+/=]+)", address).groups()
    return kind, base64.b64decode(payload)


def test_the_page_fetches_nothing(page):
    _, _, found = page
    assert {tag for tag, *_ in found.tags} & {"script", "link", "iframe", "object", "embed", "base", "form"} == set()
    assert {name for name, _ in found.values} <= {"lang", "charset", "name", "content", "class", "src", "alt", "title"}
    assert all(re.match("data:image/", address) for address in addresses(found))
    assert not re.search(r"https?://|@import|url\(", found.text)
    for kind, picture in map(decoded, addresses(found)):
        if kind != "png":
            nodes = ElementTree.fromstring(picture).iter()
            links = [value for node in nodes for name, value in node.attrib.items() if name.endswith("href")]
            assert all(re.match("#|data:", link) for link in links)


def test_every_figure_is_there_and_shows_something(page):
    name, results, found = page
    (group,) = results["groups"]
    assert ("refinement" in group) == ("same_decoder" in group) == ("refinement" in RUNS[name][3])
    assert len(addresses(found)) == len(RUNS[name][3]) == sum(tag == ("figcaption",) for tag in found.tags)
    for kind, picture in map(decoded, addresses(found)):
        if kind == "png":
            assert matplotlib.image.imread(io.BytesIO(picture))[..., :3].std() > 0.01
        else:
            assert sum(node.tag.endswith("path") for node in ElementTree.fromstring(picture).iter()) > 20


def test_the_page_says_all_that_the_results_say(page):
    _, results, found = page
    text = words(found.text)
    (group,) = results["groups"]
    for sentence in group["verdicts"]:
        assert words(sentence) in text
    for table in comparison_tables(group).values():
        assert table.title in text
        for line in (table.header, *table.rows):
            assert all(words(cell) in text for cell in line)
    for said in (group["data"]["summary"], group["data"]["name"], group["data"]["digest"]):
        assert words(said) in text
    assert "nan" not in text.split()
    assert "None" not in text.split()


def infected(value, text):
    """Results with a text at the end of every text in them, and as a name and value of all that is listed by name."""
    if isinstance(value, str):
        return value + text
    if isinstance(value, list):
        return [infected(item, text) for item in value]
    if isinstance(value, dict):
        listed = {text: text} if "type" in value or "torch" in value or "steps" in value else {}
        return {name: infected(item, text) for name, item in value.items()} | listed
    return value


def test_text_never_becomes_markup(page):
    _, results, _ = page
    plain, hostile = (Page(html_report.render(infected(results, text), [{}])) for text in ("plain", HOSTILE))
    assert hostile.tags == plain.tags
    assert hostile.values == plain.values
    assert hostile.text.count(HOSTILE) == plain.text.count("plain") > 20


def test_a_page_written_twice_is_the_same(folder):
    one, two = (html_report.write_report(folder).read_bytes() for _ in range(2))
    assert one == two


def test_rows_that_are_no_images_have_room(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        html_report.write_report(folder)


def test_a_single_epoch_has_a_curve(tmp_path):
    np.save(tmp_path / "rows.npy", IMAGES)
    recipe = Recipe(str(tmp_path / "rows.npy"), epochs=1, latent=2)
    compare(recipe, RunOptions(tmp_path / "run", rows=6, budget=Budget(6, 4)), vary={"guide": ["Amortized"]})
    html_report.write_report(tmp_path / "run")


def test_a_single_test_row_has_a_page(tmp_path):
    np.save(tmp_path / "rows.npy", IMAGES)
    recipe = Recipe(str(tmp_path / "rows.npy"), epochs=2, latent=2, test_size=1)
    compare(recipe, RunOptions(tmp_path / "run", rows=6, budget=Budget(6, 4)), vary={"guide": ["Amortized"]})
    assert "±" not in Page(html_report.write_report(tmp_path / "run").read_text()).text.split("test rows")[0]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "results.json is missing: pvae evaluate {} writes it"),
        ("", "results.json can't be read"),
        ('{"schema": 1, ', "results.json can't be read"),
        ("\x00\xff", "results.json can't be read"),
        ("[]", "results.json is of another version; pvae evaluate {} writes it anew"),
        ("{}", "results.json is of another version"),
        ('{"schema": 1}', "results.json is of another version"),
        ('{"schema": "2"}', "results.json is of another version"),
        ('{"schema": 2}', "results.json lacks 'groups'"),
        ('{"schema": 2, "groups": [{"rows": []}]}', "results.json lacks 'data'"),
        ('{"schema": 2, "groups": 3}', "results.json lacks"),
    ],
)
def test_results_that_cannot_be_shown_are_refused_and_the_old_page_stays(folder, tmp_path, content, said):
    run = Path(shutil.copytree(folder, tmp_path / "run"))
    (run / "report.html").write_text("old")
    (run / "results.json").unlink()
    if content is not None:
        (run / "results.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError) as error:
        html_report.write_report(run)
    assert said.format(run) in str(error.value)
    assert "\n" not in str(error.value)
    assert (run / "report.html").read_text() == "old"


def test_results_without_their_draws_are_refused(folder, tmp_path):
    run = Path(shutil.copytree(folder, tmp_path / "run"))
    (run / "idata.nc").unlink()
    with pytest.raises(UserError, match=r"has no idata\.nc; pvae evaluate"):
        html_report.write_report(run)


def test_results_are_strict_json(page):
    _, results, _ = page
    assert json.loads(json.dumps(results, allow_nan=False)) == results


@pytest.mark.parametrize(("shape", "drawn"), [((8, 8), (8, 8)), ((3, 4), (3, 4)), ((7,), (1, 7)), ((2, 3, 4), (1, 24))])
def test_a_row_is_drawn_as_its_image_or_as_a_strip(shape, drawn):
    assert image_shape(shape) == drawn


# Numbers and tables


@pytest.mark.parametrize(
    ("mean", "se", "text"),
    [
        (-16.8912, 0.0312, "-16.89 ± 0.03"),
        (-16.8912, 0.29, "-16.89 ± 0.29"),
        (-16.8912, 0.3, "-16.9 ± 0.3"),
        (-16.8912, 12.34, "-16.9 ± 12.3"),
        (1.23456, 0.01, "1.23 ± 0.01"),
        (1.23456, 0.0042, "1.235 ± 0.004"),
        (0.0, 0.0, "0"),
        (-0.0004, 0.001, "0.000 ± 0.001"),
        pytest.param(-0.004, 0.02, "0.00 ± 0.02"),
        pytest.param(-0.04, 0.5, "0.0 ± 0.5"),
    ],
)
def test_a_number_has_the_digits_that_its_error_bears_out(mean, se, text):
    assert number(Estimate(mean, se)) == text


def test_tables_name_their_draws_and_mark_what_is_missing():
    def row(name, **quantities):
        known = {name: {"mean": mean, "se": 0.1, "K": 7} for name, mean in quantities.items()}
        cost = {"parameters": {"global": 1234567, "local": 0}, "epochs": 4, "seconds": 2.0, "evaluation_seconds": 0.5}
        return {"name": name, "seeds": [0], "test": known, "train": known} | cost

    rows = [row("A", elbo=-2.0, iwae=-1.0), row("B", elbo=None, log_joint=-3.0)]
    test, train, cost = comparison_tables({"rows": rows}).values()
    assert test.header == train.header == ["variant", "log p(x, z)", "ELBO", "IWAE-7"]
    assert test.rows == [["A", "–", "-2.00 ± 0.10", "-1.00 ± 0.10"], ["B", "-3.00 ± 0.10", "–", "–"]]
    assert cost.rows[0][1:] == ["1,234,567", "0", "4", "2.0", "0.5", "0.5"]


# Sentences. The 100 rows of `around` have their mean and the standard error 0.02 exactly.

UNIT = torch.linspace(-1, 1, 100).double()
UNIT = UNIT / UNIT.std()


def around(mean, sign=1):
    return mean + sign * 0.2 * UNIT


def judged(guide="Amortized", *, sign=1, split=None, **means):
    """A variant with these means of its quantities, on one split or on both."""
    usual = {
        "elbo": -10.3,
        "evidence": -10.0,
        "inference_gap": 0.3,
        "approximation_gap": 0.1,
        "amortization_gap": 0.2,
        "optimization_gap": 0.001,
    }

    def values(here):
        mine = usual | means if split in (None, here) else usual
        return Evaluation({name: around(mean, sign) for name, mean in mine.items()}, 100, 1.0)

    return EvaluatedVariant(guide, 2.0, values("train"), values("test"), inference=guide)


def point_mass(guide="Amortized"):
    found = Evaluation({"log_joint": around(-5.0), "reconstruction": around(-4.0)}, 100, 1.0)
    return EvaluatedVariant(guide, 2.0, found, found, inference=guide)


def said(*own, same=(), curve=None, **options):
    return draw_conclusions(list(own), list(same), curve, **options)


PER_ROW = judged("PerDatapoint")
# id: (words, arguments with which they are said, arguments with which they are not)
RULES = {
    "negative amortization gap": (
        "The amortization gap of Amortized on test rows is negative beyond its error, -0.10 ± 0.02",
        [judged(split="test", amortization_gap=-0.1)],
        [judged(split="test", amortization_gap=-0.04)],
    ),
    "negative approximation gap": (
        "The approximation gap of SemiAmortized on train rows is negative beyond its error, -0.10 ± 0.02",
        [judged("SemiAmortized", split="train", approximation_gap=-0.1)],
        [judged("SemiAmortized", split="test", approximation_gap=-0.1)],
    ),
    "positive gap": ("is negative beyond its error", [judged(amortization_gap=-0.1)], [judged(amortization_gap=0.1)]),
    "gap within its error": (
        "is negative beyond its error",
        [judged(amortization_gap=-0.1)],
        [judged(amortization_gap=-0.04)],
    ),
    "search at work": (
        "The search for the best variational parameters of Amortized on test rows had not converged",
        [judged(split="test", optimization_gap=0.04)],
        [judged(split="test", optimization_gap=0.02)],
    ),
    "no clear difference": (
        "0.06 ± 0.04 above Amortized (no clear difference)",
        [judged(), judged("PerDatapoint", sign=-1, evidence=-9.94)],
        [judged(), judged("PerDatapoint", sign=-1, evidence=-9.8)],
    ),
    "ranking": (
        "PerDatapoint gives the best test evidence, -9.80 ± 0.02 nats, 0.20 ± 0.04 above Amortized. Training took",
        [judged(), judged("PerDatapoint", sign=-1, evidence=-9.8)],
        [judged("PerDatapoint", sign=-1, evidence=-9.8)],
    ),
    "point mass": (
        "Amortized uses a point mass: its objective is log p(x, z) at one point, which bounds no evidence",
        [point_mass()],
        [judged()],
    ),
    "point mass in no ranking": ("Each with its own decoder", [judged(), PER_ROW], [judged(), point_mass("Other")]),
    "dynamic": (
        "Under dynamic binarization PerDatapoint fits a row",
        [judged(), PER_ROW, {"dynamic": True}],
        [judged(), PER_ROW],
    ),
    "dynamic, no rows of their own": (
        "Under dynamic binarization",
        [PER_ROW, {"dynamic": True}],
        [judged(), {"dynamic": True}],
    ),
    "amortized": (
        "On test rows the amortized ELBO is 0.30 ± 0.02 nats below the evidence: 0.20 ± 0.02 from amortization",
        [judged()],
        [PER_ROW],
    ),
    "amortized on both": ("On train rows the amortized ELBO is", [judged()], [judged("SemiAmortized")]),
    "rows": (
        "the rows of PerDatapoint are 0.20 ± 0.02 nats below the best ELBO of their family (amortization gap)",
        [PER_ROW],
        [judged()],
    ),
    "same decoder": (
        "test ELBO relative to its own encoder, nats: PerDatapoint +0.25 ± 0.04, SemiAmortized -0.25 ± 0.04.",
        [
            judged(),
            {
                "same": [
                    SameDecoder("Amortized", around(-10.0), 1e-6),
                    SameDecoder("PerDatapoint", around(-9.75, -1), 1e-3),
                    SameDecoder("SemiAmortized", around(-10.25, -1), 1e-5),
                ]
            },
        ],
        [judged(), {"same": [SameDecoder("Amortized", around(-10.0), 1e-6)]}],
    ),
    "refinement": (
        "by 0.10 ± 0.04 nats after 1, 0.30 ± 0.04 nats after 20; a step takes 30 microseconds per row.",
        [
            judged(),
            {
                "curve": RefinementCurve(
                    (0, 1, 2, 20), torch.stack([around(-10), around(-9.9, -1), around(-9.8), around(-9.7, -1)]), 3e-5
                )
            },
        ],
        [judged()],
    ),
}


@pytest.mark.parametrize(("text", "fires", "silent"), RULES.values(), ids=RULES)
def test_a_sentence_is_said_where_it_holds_and_only_there(text, fires, silent):
    for arguments, expected in ((fires, True), (silent, False)):
        options = {name: value for a in arguments if isinstance(a, dict) for name, value in a.items()}
        sentences = said(*(a for a in arguments if isinstance(a, EvaluatedVariant)), **options)
        assert any(text in sentence for sentence in sentences) == expected, sentences


def test_nothing_is_said_of_nothing():
    assert said() == []


def test_the_most_important_sentence_comes_first():
    faulty = judged(amortization_gap=-0.1)
    sentences = said(faulty, PER_ROW)
    assert sentences[0].startswith("Each with its own decoder")
    assert "is negative beyond its error" in sentences[-1]
    assert all(sentence.endswith(".") and "\n" not in sentence for sentence in sentences)


def test_a_latent_map_that_version_0_1_wrote_is_shown(tmp_path):
    line, codes = np.linspace(-1, 1, 3), np.zeros((5, 2))
    arrays = {"codes": codes, "spread": np.tile(np.eye(2), (5, 1, 1)), "prior": codes, "share": np.array([0.6, 0.4])}
    np.savez(tmp_path / "map.npz", **arrays, across=line, up=line, grid=np.zeros((3, 3, 4)), how=np.array("plane"))
    use = {"verb": "map", "arrays": tmp_path / "map.npz", "shape": [2, 2]}
    (block,) = html_report._blocks(use)
    assert 'class="widget latent-map"' in block
