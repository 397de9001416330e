"""Gaps in many dimensions, annealed evidence, and what other families would buy: against closed forms."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from oracles import Curved, LinearGaussian
from torch import nn

from pvae.diagnostics import evaluation, gaps
from pvae.diagnostics.evaluation import Budget, evaluate, family_gains
from pvae.errors import UserError
from pvae.inference.families import DiagonalNormal, Family, FlowFamily, FullRankNormal
from pvae.inference.guides import Amortized
from pvae.inference.latents import find_latent_sites
from pvae.samplers.gaussian_vi import fit_gaussian
from pvae.stats import mean_se

LEFT = 0.01
PROPOSALS = "importance sampling, by each row's first proposal that passes"


class Beside(nn.Module):
    """An encoder that misses the best q_params of every row by the same number in all entries."""

    def __init__(self, oracle, aside=0.3):
        super().__init__()
        self.best, self.aside = oracle.best, aside

    def forward(self, x):
        return self.best(x) + self.aside


def amortized(oracle):
    return Amortized(Beside(oracle), DiagonalNormal(oracle.weight.shape[1]))


@pytest.fixture
def oracle():
    return LinearGaussian(2, 5)


@pytest.mark.parametrize(("dim", "left"), [(2, 0.001), (10, 0.001), (50, 0.003)])
@pytest.mark.parametrize("conditioning", [1.0, 100.0])
def test_gaps_match_their_closed_forms_in_any_dimension(dim, left, conditioning):
    oracle = LinearGaussian(dim, dim + 3, conditioning=conditioning)
    x, guide = oracle.sample(30), Amortized(Beside(oracle, 0.3), DiagonalNormal(dim))
    found = evaluate(oracle.model, guide, x, budget=Budget(1000, 300)).values
    best, own = oracle.elbo(oracle.best(x), x), oracle.elbo(guide.params(x), x)
    # Standard errors 1e-8 to 0.05 nats, beside a rounding of 1e-5 in float32.
    for name, exact, least, most in (
        ("approximation_gap", oracle.gap, -0.01, left),
        ("amortization_gap", best - own, -left, 0),
        ("evidence", oracle.evidence(x), -0.01, 0),
    ):
        off = mean_se(found[name].double() - exact)
        assert least - 4 * off.se - 1e-5 <= off.mean <= most + 4 * off.se + 1e-5, name
    assert (found["best_elbo"] <= oracle.evidence(x) + 5 * found["elbo_se"]).all()


# Evidence by annealing


@pytest.mark.parametrize("start", ["prior", "guide"])
def test_annealed_evidence_is_the_exact_one(start):
    oracle = LinearGaussian(2, 5, conditioning=100.0)
    x = oracle.sample(60)
    budget = Budget(2, 20, temperatures=100, chains=8, start=start)
    found = evaluate(oracle.model, amortized(oracle), x, budget=budget)
    off = mean_se(found.values["ais"] - oracle.evidence(x))  # standard error 0.01 nats
    assert -0.02 - 4 * off.se < off.mean < 4 * off.se
    assert 0.5 < found.values["ais_acceptance"].mean() < 0.85
    # Two draws of IWAE are far below: the evidence is the annealed one, and says so.
    of = {"prior": "the prior", "guide": "the best q of the family"}[start]
    assert found.estimator == f"AIS over 100 temperatures of 8 chains from {of}"
    assert torch.equal(found.values["evidence"], found.values["ais"])
    both = found.values["approximation_gap"] + found.values["best_elbo"]
    torch.testing.assert_close(both, found.values["ais"])


def test_the_higher_bound_is_the_evidence(oracle):
    x = oracle.sample(20)
    found = evaluate(oracle.model, amortized(oracle), x, budget=Budget(1000, 50, temperatures=2, chains=2))
    assert found.values["ais"].nanmean() < found.values["best_iwae"].mean() - 0.1
    assert found.estimator == PROPOSALS
    off = (found.values["evidence"] - oracle.evidence(x)).abs()
    assert off.max() < 0.25  # 4 errors of weights with 200 effective draws, the least; most have more


def test_rows_that_annealing_lost_have_their_other_bound(oracle, monkeypatch):
    def lost(model, guide, q_params, rows, budget):
        ais = oracle.evidence(rows.x).to(rows.x) + 1
        ais[:3] = torch.nan
        return {"ais": ais}

    monkeypatch.setattr(evaluation, "_anneal", lost)
    found = evaluate(oracle.model, amortized(oracle), oracle.sample(20), budget=Budget(100, 5, temperatures=9))
    assert torch.equal(found.values["evidence"][3:], found.values["ais"][3:])
    assert (found.values["evidence"][:3] - oracle.evidence(oracle.sample(20))[:3]).abs().max() < 0.2
    of_lost = f"but {PROPOSALS} for 3 rows where every chain diverged"
    assert found.estimator == f"AIS over 9 temperatures of 16 chains from the prior, {of_lost}"


# Other families

MAKERS = {"FullRankNormal": FullRankNormal, "FlowFamily": lambda dim: FlowFamily(dim, hidden=[16])}


@pytest.mark.parametrize(("conditioning", "left"), [pytest.param(1.0, 0.005, marks=pytest.mark.slow), (100.0, 0.01)])
def test_another_family_buys_what_the_closed_form_says(conditioning, left):
    # Correlated normals hold the posterior: they win the whole approximation gap, 0 and 0.27 nats.
    oracle = LinearGaussian(2, 5, conditioning=conditioning)
    x, guide = oracle.sample(40), amortized(oracle)
    found = evaluate(oracle.model, guide, x, budget=Budget(1000, 200, families=MAKERS))
    for name in MAKERS:
        gain = mean_se(found.family_gains[name].gain - oracle.gap)  # standard error 0.001 to 0.003
        assert -left - 4 * gain.se < gain.mean < LEFT + 4 * gain.se, name  # 1e-5: rounding
        off = mean_se(found.family_gains[name].elbo - oracle.evidence(x))
        assert -left - 4 * off.se < off.mean < 4 * off.se + 1e-5, name


def test_family_gains_are_those_of_evaluate(oracle):
    x, guide, budget = oracle.sample(10), amortized(oracle), Budget(100, 20)
    alone = family_gains(oracle.model, guide, x, families=MAKERS, budget=budget)
    found = evaluate(oracle.model, guide, x, budget=Budget(100, 20, families=MAKERS))
    assert alone.keys() == found.family_gains.keys() == MAKERS.keys()
    for name, gain in alone.items():
        assert torch.equal(gain.elbo, found.family_gains[name].elbo)
        assert torch.equal(gain.gain, found.family_gains[name].gain)
        assert torch.equal(gain.gain, found.named_values()[f"family_gain[{name}]"])
    assert {"best_elbo[FlowFamily]", "family_gain[FlowFamily]"} <= found.summary().keys()
    assert "family_gain[FullRankNormal]" in found.intervals()


@pytest.mark.parametrize("dim", [10, 50])
@pytest.mark.parametrize("conditioning", [1.0, 100.0])
def test_full_rank_wins_the_whole_gap_in_many_dimensions(dim, conditioning):
    # Gaps of 0, 0.63 and 2.6 nats. The exact posterior's weights are constant: its bound has no error of its own.
    oracle = LinearGaussian(dim, dim + 3, conditioning=conditioning)
    x, guide = oracle.sample(20), Amortized(Beside(oracle, 0.0), DiagonalNormal(dim))
    found = family_gains(oracle.model, guide, x, families={"F": FullRankNormal}, budget=Budget(1000, 50))["F"]
    assert (oracle.evidence(x) - found.elbo).mean() < 0.02
    gain = mean_se(found.gain - oracle.gap)  # standard error 0.001 to 0.02
    assert abs(gain.mean) < max(4 * gain.se, 1e-5)


class Unshaped(FullRankNormal):
    """Correlated normals whose search starts at independent ones."""

    params_from_gaussian = Family.params_from_gaussian


def test_a_search_in_many_dimensions_loses_without_its_start():
    oracle = LinearGaussian(50, 53, conditioning=100.0)
    x, guide = oracle.sample(10), Amortized(Beside(oracle, 0.0), DiagonalNormal(50))
    found = family_gains(oracle.model, guide, x, families={"F": Unshaped}, budget=Budget(500, 50))["F"]
    assert 0.5 < found.gain.mean() < oracle.gap - 0.3  # nor does it diverge: 2.2 of 2.6 nats


def test_the_start_does_no_harm_where_posteriors_are_bent():
    torch.manual_seed(0)
    oracle = Curved()
    x, guide = oracle.sample(20), Amortized(nn.Linear(8, 4), DiagonalNormal(2))
    families = {"shaped": FullRankNormal, "unshaped": Unshaped}
    found = family_gains(oracle.model, guide, x, families=families, budget=Budget(1000, 200))
    more = mean_se(found["shaped"].elbo - found["unshaped"].elbo)  # standard error 0.002, under common noise
    assert more.mean > -4 * more.se


def test_a_full_rank_guide_finds_its_best_posterior():
    torch.manual_seed(0)
    oracle = LinearGaussian(20, 23, conditioning=100.0)
    x, left = oracle.sample(10), {}
    for family in (FullRankNormal(20), Unshaped(20)):
        guide = Amortized(nn.Linear(23, family.num_params), family)
        found = evaluate(oracle.model, guide, x, budget=Budget(500, 50)).values
        left[type(family)] = (oracle.evidence(x) - found["best_elbo"]).mean()
    assert left[FullRankNormal] < 0.002
    assert left[Unshaped] > 0.01


class Two(nn.Module):
    """Latents s and z of which log s and z are normal given x, whose evidence is known."""

    mix = torch.tensor([[1.0, 0.5, 0.2], [0.3, 1.0, 0.8], [0.9, 0.1, 1.0]])

    def model(self, x, index=None):
        with pyro.plate("data", len(x), dim=-1):
            s = pyro.sample("s", dist.LogNormal(torch.zeros(len(x)), 1.0))
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1))
            eta = torch.cat([s.log().unsqueeze(-1), z], -1) @ self.mix
            pyro.sample("x", dist.Normal(eta, 0.5).to_event(1), obs=x)

    def evidence(self, x):
        return dist.MultivariateNormal(torch.zeros(3), self.mix.T @ self.mix + torch.eye(3) / 4).log_prob(x)


def test_full_rank_holds_the_posterior_of_several_latents():
    torch.manual_seed(0)
    program, x = Two(), torch.randn(10, 3)
    guide = Amortized(nn.Linear(3, 6), DiagonalNormal(3), sites=find_latent_sites(program.model, x))
    found = family_gains(program.model, guide, x, families={"F": FullRankNormal}, budget=Budget(500, 100))["F"]
    torch.testing.assert_close(found.elbo, program.evidence(x), atol=1e-3, rtol=0)
    assert found.gain.mean() > 0.3


def test_rows_whose_curvature_is_lost_keep_the_start_at_independent_normals(oracle, monkeypatch):
    x, families, budget = oracle.sample(5), {"F": FullRankNormal, "U": Unshaped}, Budget(200, 20)
    monkeypatch.setattr(
        gaps, "fit_gaussian", lambda target, *normals, **options: fit_gaussian(lost, *normals, **options)
    )
    found = family_gains(oracle.model, amortized(oracle), x, families=families, budget=budget)
    torch.testing.assert_close(found["F"].elbo, found["U"].elbo)


def lost(u):
    return u.sum(-1) * torch.nan


def test_a_batch_whose_chains_all_diverge_does_not_end_the_rest(oracle, monkeypatch):
    monkeypatch.setattr(evaluation, "ROWS", 4)
    x, budget = oracle.sample(8), Budget(30, 3, temperatures=4, chains=4)
    x[4:] = torch.nan
    found = evaluate(oracle.model, amortized(oracle), x, budget=budget).values["ais"]
    assert found.isnan().tolist() == 4 * [False] + 4 * [True]
    with pytest.raises(UserError, match="HMC diverges everywhere"):
        evaluate(oracle.model, amortized(oracle), x[4:], budget=budget)
