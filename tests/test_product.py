"""The product space is whole: all components train together, or docs/product-space.md says why not."""

import itertools
from pathlib import Path

import pytest
import torch
from pyro.infer import SVI

from pvae.data.dataset import Dataset
from pvae.errors import Incompatible
from pvae.generative import likelihoods, networks, priors
from pvae.inference import families, guides
from pvae.inference.guides import PerDatapoint
from pvae.recipes.build import build_model
from pvae.recipes.recipe import Recipe, resolve
from pvae.runtime.torch_state import no_validation, seeded
from pvae.training import objectives
from pvae.training.optimizer import FusedAdam

ROWS, COLUMNS, LATENT = 8, 4, 2
TABLE = Path(__file__).parents[1] / "docs" / "product-space.md"

# Small, so that all can be tried.
SMALL = {
    "GaussianMixture": {"components": 3},
    "VampPrior": {"pseudo_inputs": 4},
    "FlowPrior": {"transforms": 1, "hidden": [8], "bins": 4},
    "MixtureOfNormals": {"components": 2},
    "FlowFamily": {"transforms": 1, "hidden": [8], "bins": 4, "context": 2},
    "SemiAmortized": {"steps": 2, "draws": 2},
    "PerDatapoint": {"local_steps": 2},
    "DiscretizedLogistic": {"levels": 9},
    "Categorical": {"levels": 9},
    "MLP": {"hidden": [6]},
    "ResidualMLP": {"width": 6},
    "Conv": {"channels": [3], "hidden": [5]},
}


def small(name):
    return {"type": name, **SMALL.get(name, {})}


def data_for(likelihood):
    """Rows that a likelihood scores."""
    support, generator = likelihood.support, torch.Generator().manual_seed(0)
    uniform = torch.rand(ROWS, COLUMNS, generator=generator)
    rows = (
        (uniform > 0.5).float()
        if str(support) == "Boolean()"
        else (8 * uniform).floor()
        if support.is_discrete
        else uniform
    )
    assert support.check(rows).all()
    return Dataset("small", rows, rows[:0], rows, (2, 2))


def train(changes, steps=2):
    """Losses of some steps of what these components build, and the parameters that got no finite gradient."""
    own = resolve(
        Recipe(data="x.csv", latent=LATENT, **{k: small(v) for k, v in ({"network": "MLP"} | changes).items()})
    )
    built = build_model(own, data_for(getattr(likelihoods, changes.get("likelihood", "Bernoulli"))()))
    program, guide, objective = built.program, built.guide, built.objective
    data = data_for(program.likelihood)
    losses, index = [], torch.arange(ROWS)

    class Watched(FusedAdam):
        def __call__(self, *args, **kwargs):
            modules = {"model": program, "guide": guide}
            named = [(f"{k}.{n}", p) for k, m in modules.items() for n, p in m.named_parameters() if p.requires_grad]
            missing.update(n for n, p in named if p.grad is None or not p.grad.isfinite().all())
            if isinstance(guide, PerDatapoint):
                q_params = guide._visit.q_params
                missing.update(["rows"] if q_params.grad is None or not q_params.grad.isfinite().all() else [])
            super().__call__(*args, **kwargs)

    missing = set()
    with seeded(0), no_validation():
        loop = SVI(program.model, guide.train(), Watched(program, guide, learning_rate=1e-3), objective)
        losses = [loop.step(data.train, index) for _ in range(steps)]
    return torch.tensor(losses), missing


def lines(header):
    """Cells of the rows of the table in the docs that begins with a header."""
    part = TABLE.read_text().split(f"| {header} |")[1].split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in (f"{header} |{part[0]}", *part[2:])]


def reason_for(changes):
    """Why the docs say that these components do not go together, or None."""
    names = {"guide": "Amortized", "family": "DiagonalNormal", "prior": "StandardNormal"} | changes
    for this, that, reason in lines("this")[1:]:
        if {this, that} <= set(names.values()):
            return reason
    (_, *columns), *rows = lines("q of")
    closed = {(row[0], prior): word for row in rows for prior, word in zip(columns, row[1:], strict=True)}
    assert set(closed) == set(itertools.product(families.__all__, priors.__all__))
    if names.get("objective") == "AnalyticKL" and closed[names["family"], names["prior"]] == "no":
        return "has no closed form"
    return None


def check(changes):
    """The components train, or are refused for the reason that the table gives."""
    reason = reason_for(changes)
    if reason:
        with pytest.raises(Incompatible) as error:
            train(changes)
        assert reason in str(error.value)
        return False
    losses, missing = train(changes)
    assert losses.isfinite().all()
    assert missing == set()
    return True


@pytest.mark.parametrize("prior", priors.__all__)
@pytest.mark.parametrize("likelihood", likelihoods.__all__)
def test_all_families_and_guides_train_under(likelihood, prior):
    trained = [
        check({"likelihood": likelihood, "prior": prior, "family": family, "guide": guide})
        for family, guide in itertools.product(families.__all__, guides.__all__)
    ]
    assert sum(trained) == (18 if prior != "VampPrior" else 10)


@pytest.mark.parametrize("objective", objectives.__all__)
@pytest.mark.parametrize("guide", guides.__all__)
def test_all_families_and_priors_train_by(objective, guide):
    trained = [
        check({"objective": objective, "guide": guide, "family": family, "prior": prior})
        for family, prior in itertools.product(families.__all__, priors.__all__)
    ]
    assert sum(trained) >= 6


@pytest.mark.parametrize("network", networks.__all__)
@pytest.mark.parametrize("likelihood", likelihoods.__all__)
def test_all_networks_fit_every_likelihood(network, likelihood):
    assert check({"network": network, "likelihood": likelihood})


def test_the_watch_sees_a_parameter_without_gradient(monkeypatch):
    class Idle(priors.StandardNormal):
        def __init__(self, dim):
            super().__init__(dim)
            self.idle = torch.nn.Parameter(torch.zeros(1))

    monkeypatch.setattr(priors, "StandardNormal", Idle)
    assert train({"prior": "StandardNormal"})[1] == {"model.prior.idle"}
