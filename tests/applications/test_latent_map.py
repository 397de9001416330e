"""Latent maps: places, ellipses, grids against closed forms; pictures and pages that fetch nothing and escape all."""

import base64
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from cases import COLUMNS, FAMILIES, LATENT
from oracles import LinearGaussian
from sklearn.decomposition import PCA
from torch import nn

import pvae.applications.latent_map as latent_map_module
from pvae.applications.latent_map import make_sliders, map_latents
from pvae.errors import UserError
from pvae.generative.likelihoods import Gaussian
from pvae.generative.priors import StandardNormal
from pvae.generative.vae import VAE
from pvae.inference import posterior
from pvae.inference.families import Delta, DiagonalNormal, FullRankNormal
from pvae.inference.guides import Amortized
from pvae.reporting.latent_map_widget import draw_latent_map, draw_latent_maps, render_page, render_widget
from pvae.reporting.style import CLASS_COLOURS, GREY, class_names
from pvae.runtime.pyro_params import LocalModule
from pvae.runtime.torch_state import seeded

pytestmark = pytest.mark.filterwarnings("ignore:constrained_layout not applied")

HOSTILE = "</script><script>alert(1)</script>\"'<img src=http://x>&amp;{{ 1 }}"


class Best(nn.Module):
    """The oracle's exact posterior, or its best diagonal, as q_params."""

    def __init__(self, oracle, full=False):
        super().__init__()
        self.oracle, self.full = oracle, full

    def forward(self, x):
        if not self.full:
            return self.oracle.best(x)
        root = torch.linalg.cholesky(self.oracle.covariance).to(x)
        rows, columns = torch.tril_indices(len(root), len(root), -1)
        q_params = torch.cat([root.diag().log(), root[rows, columns]])
        return torch.cat([self.oracle.mean(x).to(x), q_params.expand(len(x), -1)], -1)


def exact(oracle):
    return Amortized(Best(oracle, full=True), FullRankNormal(oracle.weight.shape[1]))


def fitted(dim, rows=60):
    oracle = LinearGaussian(dim, 6, conditioning=4.0)
    return oracle, oracle.sample(rows)


def expected(oracle, z):
    return (z.double() @ oracle.weight.T + oracle.bias).float()


@pytest.mark.parametrize("full", [True, False])
def test_the_plane_is_the_latents_own(full):
    oracle, x = fitted(2)
    guide = exact(oracle) if full else Amortized(Best(oracle), DiagonalNormal(2))
    found = map_latents(oracle.model, guide, x, size=7)
    covariance = oracle.covariance if full else oracle.precision.diag().reciprocal().diag()
    assert found.how == "plane"
    torch.testing.assert_close(found.codes, oracle.mean(x).float())
    torch.testing.assert_close(found.spread, covariance.float().expand(60, 2, 2))
    for i, j in ((0, 0), (0, 6), (6, 0), (3, 5)):
        there = torch.stack([found.grid_x[j], found.grid_y[i]])
        torch.testing.assert_close(found.grid[i, j], expected(oracle, there))
    low, high = torch.stack([found.grid_x[0], found.grid_y[0]]), torch.stack([found.grid_x[-1], found.grid_y[-1]])
    assert (found.codes > low).all()
    assert (found.codes < high).all()
    inside = ((found.prior > low) & (found.prior < high)).double().mean(0)
    assert (inside > 0.97).all()


def test_the_plane_of_many_dimensions_is_that_of_principal_components():
    oracle, x = fitted(5, rows=200)
    found, known = map_latents(oracle.model, exact(oracle), x, size=5), PCA(2)
    places = known.fit_transform(oracle.mean(x).numpy())
    signs = np.sign((places * found.codes.numpy()).sum(0))
    assert found.how == "pca"
    np.testing.assert_allclose(found.codes, places * signs, atol=1e-4)
    np.testing.assert_allclose(found.share, known.explained_variance_ratio_, atol=1e-5)
    ways = torch.as_tensor(known.components_.T * signs)
    torch.testing.assert_close(found.spread[0], (ways.T @ oracle.covariance @ ways).float(), atol=1e-5, rtol=1e-4)
    there = torch.as_tensor(known.mean_) + ways @ torch.stack([found.grid_x[1], found.grid_y[3]]).double()
    torch.testing.assert_close(found.grid[3, 1], expected(oracle, there), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_has_a_map(name):
    with seeded(0):
        family = FAMILIES[name]()
        model = VAE(nn.Linear(LATENT, COLUMNS), Gaussian(), StandardNormal(LATENT)).model
        guide = Amortized(nn.Linear(COLUMNS, family.num_params), family)
        x = torch.randn(20, COLUMNS)
        q, z = family(guide.params(x)), None
        z = q.sample((4000,))
    found = map_latents(model, guide, x, size=3)
    centre = found.codes.mean(0)
    torch.testing.assert_close(found.spread, found.spread.mT)
    # The trace of a projection is no more than the whole's; of 200 draws it has an error of a tenth, twice that of 2 d.
    assert (found.spread.diagonal(dim1=1, dim2=2).sum(1) <= 1.5 * z.var(0).sum(-1).detach() + 1e-6).all()
    assert (found.spread.abs() < 1e-9).all() == family.point_mass
    torch.testing.assert_close(centre, torch.zeros(2), atol=1e-4, rtol=0)


def test_a_covariance_by_draws_is_the_covariance(monkeypatch):
    monkeypatch.setattr(posterior, "MOMENT_DRAWS", 4000)
    q = FAMILIES["MixtureOfNormals"]()
    with seeded(0):
        q_params = torch.randn(3, q.num_params)
        ways = torch.linalg.qr(torch.randn(LATENT, 2))[0]
        found, sample = latent_map_module._covariance(q, q_params, ways), q(q_params).sample((40_000,)) @ ways
    own = torch.stack([torch.cov(sample[:, b].T) for b in range(3)])
    assert ((found - own).abs() < 5 * (2 / 4000) ** 0.5 * own.diagonal(dim1=1, dim2=2).amax(1).view(3, 1, 1)).all()


def test_neighbours_stay_neighbours_by_tsne():
    oracle, x = fitted(4)
    x = torch.cat([x[:30], x[30:] + 100])
    found = map_latents(oracle.model, exact(oracle), x, projection="tsne", perplexity=8)
    near = torch.cdist(found.codes, found.codes).fill_diagonal_(torch.inf).argmin(1)
    assert ((near >= 30) == (torch.arange(60) >= 30)).all()
    assert (found.spread, found.prior, found.share, found.grid.numel()) == (None, None, None, 0)


def test_sliders_go_along_the_principal_directions():
    oracle, x = fitted(5, rows=200)
    found, known = make_sliders(oracle.model, exact(oracle), x, positions=5), PCA(3)
    known.fit(oracle.mean(x).numpy())
    assert found.grid.shape == (5, 5, 5, 6)
    np.testing.assert_allclose(found.scale, known.explained_variance_**0.5, rtol=1e-4)
    np.testing.assert_allclose(found.share, known.explained_variance_ratio_, rtol=1e-4)
    centre = torch.as_tensor(known.mean_)
    torch.testing.assert_close(found.grid[2, 2, 2], expected(oracle, centre), atol=1e-5, rtol=1e-4)
    step = 2.5 * found.scale[1] * torch.as_tensor(known.components_[1])
    ends = [expected(oracle, centre + sign * step) for sign in (-1, 1)]
    ends = ends if (found.grid[2, 0, 2] - ends[0]).abs().max() < 1e-2 else ends[::-1]  # directions have two ways
    torch.testing.assert_close(found.grid[2, [0, -1], 2], torch.stack(ends), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("columns", "dim", "wanted"),
    [
        (784, 5, (9, 3)),
        (784, 1, (9, 1)),
        (3072, 5, (7, 3)),
        (12_288, 5, (9, 2)),
        (200_000, 5, (7, 1)),
        (10**6, 5, (3, 1)),
    ],
)
def test_a_grid_of_sliders_is_what_a_page_can_hold(columns, dim, wanted):
    assert latent_map_module._affordable(columns, 9, min(3, dim)) == wanted


def test_a_program_that_is_given_labels_decodes_those_of_the_first_row():
    class Labelled(LocalModule):
        def __init__(self):
            super().__init__()
            self.inner = VAE(nn.Identity(), Gaussian(), StandardNormal(2))

        def forward(self, x, index=None):
            import pyro
            import pyro.distributions as dist

            with pyro.plate("data", len(x), dim=-1):
                z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(z + 10 * x[:, 2:], 1.0).to_event(1), obs=x[:, :2])

    x = torch.cat([torch.zeros(6, 2), torch.arange(12.0).view(6, 2)], 1)
    guide = Amortized(nn.Linear(4, 2), Delta(2))
    found = map_latents(Labelled(), guide, x, size=2)
    torch.testing.assert_close(
        found.grid[0, 1], torch.stack([found.grid_x[1], found.grid_y[0]]) + torch.tensor([0.0, 10])
    )


@pytest.mark.parametrize(
    ("dim", "rows", "options", "said"),
    [
        (5, 9, {"projection": "plane"}, "'plane' is for 2 latent dimensions, and here are 5: take 'pca' or 'tsne'"),
        (1, 9, {}, "the latents have 1 dimension, a line and no plane: sliders or interpolate show it"),
        (2, 9, {"projection": "pcs"}, "unknown projection 'pcs'; did you mean 'pca'?"),
        (5, 9, {"projection": "tsne"}, "needs more than 30 rows, and here are 9; give more rows (or in Python a"),
        (5, 9, {"projection": "tsne", "perplexity": 0}, "latent_map: perplexity is 0, but it must be positive"),
        (5, 2, {}, "2 rows have no 2 principal components; give at least 3"),
        (2, 9, {"size": 1}, "latent_map: size is 1, but it must be at least 2"),
    ],
)
def test_a_map_that_can_not_be_is_refused(dim, rows, options, said):
    oracle, x = fitted(dim, rows)
    with pytest.raises(UserError) as error:
        map_latents(oracle.model, exact(oracle), x, **options)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"positions": 4}, "positions is 4, but it must be an odd number from 3 on"),
        ({"directions": 0}, "directions is 0"),
    ],
)
def test_sliders_that_can_not_be_are_refused(options, said):
    oracle, x = fitted(2)
    with pytest.raises(UserError, match=said):
        make_sliders(oracle.model, exact(oracle), x, **options)


# Pictures and pages


class Tags(HTMLParser):
    """A page's tags, its attributes' values, the text of its scripts' data, and its other text."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.values, self.data, self.text, self.inside = [], [], [], "", ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.values += attrs
        self.inside = "data" if ("type", "application/json") in attrs else tag

    def handle_endtag(self, tag):
        self.inside = ""

    def handle_data(self, data):
        self.data += [data] if self.inside == "data" else []
        self.text += "" if self.inside in ("data", "script") else data


@pytest.fixture(scope="module")
def maps():
    """Maps of every kind and sliders, of rows of 6 values."""
    (flat, x), (deep, many) = fitted(2), fitted(5)
    return {
        "plane": map_latents(flat.model, exact(flat), x, size=4),
        "pca": map_latents(deep.model, exact(deep), many, size=4),
        "tsne": map_latents(deep.model, exact(deep), many, projection="tsne", perplexity=5),
        "sliders": make_sliders(deep.model, exact(deep), many, positions=3),
    }


KINDS = ("plane", "pca", "tsne", "sliders")
LABELS = ["a", "b", "c"] * 20


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(2, 3), ()], ids=["pictures", "strips"])
def test_a_page_has_what_its_script_needs_and_fetches_nothing(maps, kind, shape):
    html = render_page("A <title>", [("One", render_widget(maps[kind], LABELS, shape))])
    found, (data,) = Tags(html), [json.loads(text) for text in Tags(html).data]
    sources = [value for name, value in found.values if name in ("src", "href")]
    assert not set(found.tags) & {"link", "iframe", "object", "embed", "base", "form"}
    assert all(source.startswith(("data:image/png;base64,", "data:image/svg+xml;base64,")) for source in sources)
    assert not re.search(r"https?://|@import|url\(|fetch\(|XMLHttp|import\(", html)
    assert len(sources) == 1
    assert "A <title>" in found.text
    if kind == "tsne":
        assert data["grid"] == ""
        return
    values = np.frombuffer(base64.b64decode(data["grid"]), np.uint8).astype(float) / 255
    whole = (data["low"] + values * (data["high"] - data["low"])).reshape(-1, data["columns"])
    np.testing.assert_allclose(whole, maps[kind].grid.reshape(-1, 6), atol=(data["high"] - data["low"]) / 500)
    assert (data["height"], data["width"]) == (shape or (1, 6))


def test_names_never_become_markup(maps):
    plain, hostile = (
        Tags(render_page(text, [(text, render_widget(maps["plane"], [text, "b", "c"] * 20, (2, 3)))]))
        for text in ("a", HOSTILE)
    )
    assert hostile.tags == plain.tags
    assert HOSTILE in hostile.text
    assert json.loads(hostile.data[0])["legend"][0][0] == HOSTILE


def test_codes_have_the_colour_of_their_class_and_their_ellipse(maps):
    html = str(render_widget(maps["plane"], LABELS))
    data = json.loads(Tags(html).data[0])
    assert [name for name, _ in data["legend"]] == ["a", "b", "c"]
    assert [kind for *_, kind in data["codes"]] == [0, 1, 2] * 20
    long, short, turn = data["ellipses"][0]
    way = np.array([np.cos(turn), np.sin(turn)])
    across = np.array([-way[1], way[0]])
    own = long**2 * np.outer(way, way) + short**2 * np.outer(across, across)
    np.testing.assert_allclose(own, maps["plane"].spread[0], atol=1e-4)


def test_a_map_without_labels_or_with_too_many_has_one_colour(maps):
    for labels in (None, list(range(60))):
        data = json.loads(Tags(str(render_widget(maps["plane"], labels))).data[0])
        assert (data["legend"], {kind for *_, kind in data["codes"]}) == ([], {0})
    assert class_names(np.arange(60)) == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_shows_codes_and_grid(maps, kind):
    figure = draw_latent_map(maps[kind], LABELS, (2, 3))
    assert sum(axis.axison for axis in figure.axes) == {"tsne": 1, "sliders": 3}.get(kind, 2)
    figure.canvas.draw()
    if kind in ("plane", "pca"):
        (image,) = figure.axes[1].images
        sheet = image.get_array()
        # The upper left picture is what lies at the plane's upper left.
        np.testing.assert_allclose(sheet[:2, :3], maps[kind].grid[-1, 0].view(2, 3), atol=1e-6)


@pytest.mark.parametrize("dim", [1, 2, 6])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_maps_stand_side_by_side(dim, count):
    rng = np.random.default_rng(0)
    figure = draw_latent_maps(
        {f"{HOSTILE} {n}": (rng.normal(size=(30, dim)), rng.normal(size=(20, dim))) for n in range(count)}, [0, 1] * 15
    )
    figure.canvas.draw()
    shown = [axis for axis in figure.axes if axis.axison]
    assert len(shown) == count
    # Alone or not, a panel and the page's picture are as wide.
    assert figure.get_figwidth() == 9.6
    assert all(axis.get_position().width < 0.5 for axis in shown)


def test_ellipses_have_their_class_colour_and_both_rings_a_name(maps):
    from matplotlib.colors import to_hex
    from matplotlib.patches import Ellipse

    for labels, colours in ((LABELS, set(CLASS_COLOURS[:3])), (None, {GREY})):
        axis = draw_latent_map(maps["plane"], labels).axes[0]
        drawn = [patch for patch in axis.patches if isinstance(patch, Ellipse)]
        assert {to_hex(patch.get_edgecolor()).upper() for patch in drawn} == colours
        assert len(drawn) == 30
        words = [text.get_text() for text in axis.get_legend().get_texts()]
        assert {"q(z|x), 1 sd", "1, 2, 3 sd of the prior"} <= set(words)


@pytest.mark.parametrize(
    ("labels", "shape", "said"),
    [
        (["a"], (2, 3), "1 labels are given for a map of 60 rows; give one for each row"),
        (None, (2, 4), "shape (2, 4) has 8 values, but the rows have 6 columns"),
    ],
)
def test_what_does_not_go_with_a_map_is_refused(maps, labels, shape, said):
    for show in (render_widget, draw_latent_map):
        with pytest.raises(UserError) as error:
            show(maps["plane"], labels, shape)
        assert said in str(error.value)
