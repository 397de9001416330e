"""Evaluation against closed forms: bounds, evidence and gaps of linear Gaussians, datapoint by datapoint."""

from itertools import pairwise
from typing import NamedTuple

import pyro
import pyro.distributions as dist
import pytest
import torch
from oracles import LinearGaussian
from torch import Tensor, nn

from pvae.applications.coding import reconstruct, sample
from pvae.diagnostics import evaluation
from pvae.diagnostics.diagnosis import diagnose
from pvae.diagnostics.evaluation import Budget, Evaluation, bounds, evaluate, refinement_curve
from pvae.diagnostics.gaps import FamilySearch
from pvae.errors import UserError
from pvae.inference.families import Delta, DiagonalNormal, FullRankNormal
from pvae.inference.guides import Amortized, Guide, PerDatapoint
from pvae.runtime import pyro_params, torch_state
from pvae.runtime.result_cache import ResultCache
from pvae.stats import mean_se

B, LATENT, COLUMNS = 200, 2, 5
BUDGET = Budget(K=1000, steps=200)
# What the search for the best q_params may leave at this budget, nats per row.
LEFT = 0.01

# id: what is added to the best q_params = (mu, log sigma)
ASIDE = {
    "best": [0.0, 0.0, 0.0, 0.0],
    "shifted": [0.4, -0.3, 0.0, 0.0],
    "widened": [0.0, 0.0, 0.5, 0.5],
    "narrowed": [0.1, 0.0, -0.4, -0.4],
    "far off": [1.0, -1.0, 0.7, -0.7],
}


class Beside(nn.Module):
    """An encoder that misses the best q_params of every row by the same step."""

    def __init__(self, oracle, aside):
        super().__init__()
        self.best, self.aside = oracle.best, torch.as_tensor(aside)

    def forward(self, x):
        return self.best(x) + self.aside


class Case(NamedTuple):
    """Evaluated rows, and what is exactly so of them."""

    oracle: LinearGaussian
    guide: Amortized
    x: Tensor
    found: dict[str, Tensor]

    @property
    def exact(self):
        evidence, elbo = self.oracle.evidence(self.x), self.oracle.elbo(self.guide.params(self.x), self.x)
        best = self.oracle.elbo(self.oracle.best(self.x), self.x)
        return {
            "elbo": elbo,
            "evidence": evidence,
            "best_elbo": best,
            "approximation_gap": evidence - best,
            "amortization_gap": best - elbo,
            "inference_gap": evidence - elbo,
        }


def amortized(oracle, aside="shifted"):
    return Amortized(Beside(oracle, ASIDE[aside]), DiagonalNormal(LATENT))


@pytest.fixture
def oracle():
    return LinearGaussian(LATENT, COLUMNS)


@pytest.fixture(scope="module", params=ASIDE)
def case(request):
    oracle = LinearGaussian(LATENT, COLUMNS)
    guide, x = amortized(oracle, request.param), oracle.sample(B)
    found = evaluate(oracle.model, guide, x, budget=BUDGET).values
    return Case(oracle, guide, x, {name: values.double() for name, values in found.items()})


# Closed forms. A mean over rows is held against the exact one row by row, so that its standard error is that of the
# Monte Carlo noise alone: 0.0005 to 0.006 nats for 200 rows of 1000 draws.


@pytest.mark.parametrize(
    ("name", "least", "most"),
    [
        ("elbo", 0, 0),
        ("evidence", -0.001, 0),  # IWAE-1000 lies below by about var(w) / 2000
        ("best_elbo", -LEFT, 0),
        ("approximation_gap", -0.001, LEFT),
        ("amortization_gap", -LEFT, 0),
        ("inference_gap", -0.001, 0),
    ],
)
def test_quantities_match_their_closed_forms(case, name, least, most):
    off = mean_se(case.found[name] - case.exact[name])
    assert least - 4 * off.se <= off.mean <= most + 4 * off.se


@pytest.mark.parametrize("case", [name for name in ASIDE if name != "best"], indirect=True)
def test_the_noise_of_a_rows_amortization_gap_is_what_it_says(case):
    off = (case.found["amortization_gap"] - case.exact["amortization_gap"]) / case.found["amortization_gap_se"]
    assert off.std().item() == pytest.approx(1, abs=0.25)  # standard error 0.05
    assert off.abs().max() < 5


def test_amortization_gaps_are_not_negative_beyond_their_noise(case):
    beyond = case.found["amortization_gap"] < -3 * case.found["amortization_gap_se"]
    assert beyond.double().mean() <= 0.01


@pytest.mark.parametrize("case", ["best"], indirect=True)
def test_the_best_variational_parameters_have_no_amortization_gap(case):
    # Common noise: the standard error of a row is about 0.001 nats, where that of each bound is 0.02.
    assert case.found["amortization_gap"].abs().max() < 0.02
    assert case.found["amortization_gap_se"].mean() < 0.003


def test_the_whole_gap_is_the_sum_of_its_causes(case):
    found = case.found
    parts = found["approximation_gap"] + found["amortization_gap"]
    torch.testing.assert_close(found["inference_gap"], parts, atol=1e-5, rtol=0)
    torch.testing.assert_close(found["approximation_gap"], found["evidence"] - found["best_elbo"])
    torch.testing.assert_close(found["inference_gap"], found["evidence"] - found["elbo"], atol=1e-5, rtol=0)
    torch.testing.assert_close(found["elbo"], found["reconstruction"] - found["kl"], atol=1e-4, rtol=0)
    assert (found["iwae"] >= found["elbo"]).all()


def test_kl_matches_its_closed_form(case):
    mu, log_sigma = case.guide.params(case.x).double().chunk(2, -1)
    exact = ((2 * log_sigma).exp() + mu**2 - 1 - 2 * log_sigma).sum(-1) / 2
    off = mean_se(case.found["kl"] - exact)  # standard error about 0.003 nats
    assert abs(off.mean) < 4 * off.se


def test_the_exact_posterior_loses_nothing(oracle):
    x = oracle.sample(20)
    found = bounds(oracle.model, oracle.posterior, x, K=7).values
    for name in ("elbo", "iwae"):
        torch.testing.assert_close(found[name].double(), oracle.evidence(x), atol=1e-4, rtol=0)


def test_bounds_are_those_of_evaluate(oracle):
    x, guide = oracle.sample(20), amortized(oracle)
    found, alone = evaluate(oracle.model, guide, x, budget=Budget(50, 5)), bounds(oracle.model, guide, x, K=50)
    assert alone.values.keys() == {"elbo", "elbo_se", "iwae", "iwae_se", "kl", "reconstruction", "ess", "k_hat"}
    assert all(torch.equal(values, found.values[name]) for name, values in alone.values.items())
    assert alone.K == found.K == 50


# Seeds and chunks


def equal(one, other):
    return one.values.keys() == other.values.keys() and all(
        torch.equal(values, other.values[name]) for name, values in one.values.items()
    )


@pytest.mark.parametrize("training", [True, False])
def test_a_seed_fixes_an_evaluation_and_the_stream_outside_goes_on(oracle, training):
    x, found = oracle.sample(10), []
    guide = PerDatapoint(10, DiagonalNormal(LATENT), model=oracle.model)
    for stream in (1, 2):
        torch.manual_seed(stream)
        before = torch.get_rng_state()
        guide.train(training)
        for index in (None, torch.arange(10)):
            found.append(evaluate(oracle.model, guide, x, index, budget=Budget(20, 20), seed=3))
        refinement_curve(oracle.model, guide, x)
        reconstruct(oracle.model, guide, x)
        sample(oracle.model, x)
        assert torch.equal(torch.get_rng_state(), before)
    assert equal(found[0], found[2])
    assert equal(found[1], found[3])
    assert not equal(found[0], evaluate(oracle.model, guide, x, budget=Budget(20, 20), seed=4))
    assert not pyro.get_param_store().keys()


def test_chunks_change_nothing_beyond_noise(oracle, monkeypatch):
    x, guide, budget = oracle.sample(60), amortized(oracle), Budget(400, 50)
    whole = evaluate(oracle.model, guide, x, budget=budget).values
    monkeypatch.setattr(evaluation, "ROWS", 25)
    parts = evaluate(oracle.model, guide, x, budget=budget).values
    assert all(values.shape == (60,) for values in parts.values())
    for name in ("elbo", "iwae", "best_elbo", "evidence", "amortization_gap", "approximation_gap"):
        off = mean_se((whole[name] - parts[name])[25:])  # standard error 0.002 to 0.008 nats
        assert 0 < abs(off.mean) < 4 * off.se, name


def test_equal_rows_in_two_chunks_have_noise_of_their_own(oracle, monkeypatch):
    monkeypatch.setattr(evaluation, "ROWS", 5)
    x = oracle.sample(5).repeat(3, 1)
    one, two, three = evaluate(oracle.model, amortized(oracle), x, budget=Budget(20, 5)).values["elbo"].split(5)
    assert (one != two).all()
    assert (two != three).all()
    assert (one != three).all()


def test_progress_counts_every_row(oracle, monkeypatch):
    monkeypatch.setattr(evaluation, "ROWS", 4)
    done = []
    evaluate(oracle.model, amortized(oracle), oracle.sample(10), budget=Budget(2, 1), progress=done.append)
    assert done == [4, 4, 2]


def test_a_summary_averages_over_rows():
    values = {"elbo": torch.tensor([1.0, 3.0]), "amortization_gap_se": torch.ones(2)}
    assert Evaluation(values, 5, 0.0).summary() == {"elbo": (2.0, 1.0)}


def test_more_draws_tighten_iwae_and_leave_the_elbo(oracle):
    x, guide = oracle.sample(B), amortized(oracle, "far off")
    few, many = (bounds(oracle.model, guide, x, K=K).values for K in (5, 500))
    gain, same = mean_se(many["iwae"] - few["iwae"]), mean_se(many["elbo"] - few["elbo"])
    assert gain.mean > 4 * gain.se  # 0.7 nats at a standard error of 0.08
    assert abs(same.mean) < 4 * same.se


# Signs


def test_a_negative_gap_is_reported_as_it_is(monkeypatch):
    oracle = LinearGaussian(LATENT, COLUMNS)
    monkeypatch.setattr(
        FamilySearch, "from_guide", lambda search: (search.rows.q_params + 1, torch.zeros(len(search.rows.x)))
    )
    found = evaluate(oracle.model, amortized(oracle, "best"), oracle.sample(20), budget=Budget(50, 1))
    assert (found.values["amortization_gap"] < -0.5).all()
    low, high = found.intervals()["amortization_gap"]
    assert low < found.summary()["amortization_gap"].mean < high < 0


# Importance weights


class Scaled(Guide):
    """The exact posterior with its standard deviations times a factor."""

    def __init__(self, oracle, factor):
        super().__init__(FullRankNormal(len(oracle.covariance)))
        self.oracle, self.factor = oracle, factor

    def params(self, x, index=None):
        root = torch.linalg.cholesky(self.oracle.covariance) * self.factor
        rest = torch.cat([root.diag().log(), root[tuple(self.family.below)]])
        return torch.cat([self.oracle.mean(x), rest.expand(len(x), -1)], -1).to(x.dtype)


@pytest.mark.parametrize("factor", [0.5, 0.33])
def test_k_hat_of_a_narrowed_gaussian_has_its_closed_form(factor):
    # In two dimensions the weights of a posterior narrowed by s have exactly a Pareto tail of k = 1 - s^2. The fit's
    # prior counts as 10 of 300 draws with k = 0.5. Standard error over rows 0.009 (measured).
    oracle, K, tail = LinearGaussian(2, 5), 10_000, 300
    found = bounds(oracle.model, Scaled(oracle, factor), oracle.sample(100), K=K).values["k_hat"]
    off = mean_se(found - (tail * (1 - factor**2) + 5) / (tail + 10))
    assert abs(off.mean) < 4 * off.se
    assert off.se < 0.012


def test_k_hat_is_small_for_the_exact_and_for_a_widened_guide(oracle):
    x = oracle.sample(100)
    for factor in (1.0, 1.5):
        assert bounds(oracle.model, Scaled(oracle, factor), x, K=1000).values["k_hat"].max() < 0.5


def test_ess_has_its_closed_form(oracle):
    # Each direction of a posterior widened by s: (E w)^2 / E w^2 = sqrt(2 s^2 - 1) / s^2.
    s, K = 1.5, 2000
    found = bounds(oracle.model, Scaled(oracle, s), oracle.sample(100), K=K).values["ess"] / K
    off = mean_se(found - (2 * s**2 - 1) / s**4)  # standard error 0.0007
    assert abs(off.mean) < 4 * off.se + 1 / K


@pytest.mark.parametrize("name", ["elbo", "iwae"])
def test_the_noise_of_a_rows_bound_is_what_it_says(oracle, name):
    x = oracle.sample(1).repeat(400, 1)
    found = bounds(oracle.model, Scaled(oracle, 1.3), x, K=500).values
    ratio = found[f"{name}_se"].mean() / found[name].std()
    assert ratio.item() == pytest.approx(1, abs=4 / (2 * 399) ** 0.5)  # 4 standard errors


def test_too_few_draws_have_no_k_hat(oracle):
    assert "k_hat" not in bounds(oracle.model, amortized(oracle), oracle.sample(3), K=29).values


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"K": 0}, "K is 0"),
        ({"steps": -1}, "steps is -1"),
        ({"temperatures": -1}, "temperatures is -1"),
        ({"chains": 0}, "chains is 0"),
        ({"schedule": "sigmoids"}, "unknown schedule 'sigmoids'"),
        ({"start": "posterior"}, "unknown start 'posterior'"),
    ],
)
def test_a_budget_that_buys_nothing_is_refused(wrong, message):
    with pytest.raises(UserError, match=message):
        Budget(**wrong)


# Parts that are kept


def test_an_evaluation_goes_on_where_it_stopped(oracle, monkeypatch, tmp_path):
    monkeypatch.setattr(evaluation, "ROWS", 4)
    x, guide, budget = oracle.sample(10), amortized(oracle), Budget(30, 2)
    whole, done = evaluate(oracle.model, guide, x, budget=budget), []

    def stop(rows):
        done.append(rows)
        if len(done) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(oracle.model, guide, x, budget=budget, cache=ResultCache(tmp_path, {}), prefix="test", progress=stop)
    names = ["test-000000-000004", "test-000004-000008"]
    assert sorted(path.stem for path in tmp_path.iterdir()) == names
    searched = []
    search = FamilySearch.from_guide
    monkeypatch.setattr(FamilySearch, "from_guide", lambda own: searched.append(len(own.rows.x)) or search(own))
    again = evaluate(oracle.model, guide, x, budget=budget, cache=ResultCache(tmp_path, {}), prefix="test")
    assert searched == [2]
    assert equal(whole, again)


def test_rows_that_do_not_fit_are_halved(oracle, capsys):
    torch_state.warn_once.cache_clear()
    x, guide, sizes = oracle.sample(100), amortized(oracle), []

    class Small(nn.Module):
        def forward(self, x, index=None):
            sizes.append(len(x))
            if len(x) > 30:
                raise torch.OutOfMemoryError("CUDA out of memory")
            oracle.model(x, index)

    found = bounds(Small(), guide, x, K=400).values
    assert found["elbo"].shape == (100,)
    off = mean_se(found["elbo"] - oracle.elbo(guide.params(x), x))  # standard error 0.006 nats
    assert abs(off.mean) < 4 * off.se
    said = capsys.readouterr().err.splitlines()
    assert said == ["the device is out of memory: going on with 25 instead of 250 rows at a time"]
    torch_state.warn_once.cache_clear()


# Refinement


@pytest.fixture(scope="module")
def curve():
    oracle = LinearGaussian(LATENT, COLUMNS)
    x, guide = oracle.sample(B), amortized(oracle, "far off")
    return oracle, x, guide, refinement_curve(oracle.model, guide, x)


def test_a_refinement_curve_starts_at_the_guides_elbo(curve):
    oracle, x, guide, found = curve
    assert found.steps == (0, 1, 2, 5, 10, 20, 50, 100)
    assert found.elbo.shape == (8, B)
    off = mean_se(found.elbo[0] - oracle.elbo(guide.params(x), x))  # standard error 0.02 nats
    assert abs(off.mean) < 4 * off.se


def test_a_refinement_curve_rises_to_the_best(curve):
    oracle, x, guide, found = curve
    assert all(after.mean() > before.mean() for before, after in pairwise(found.elbo))
    best = oracle.elbo(oracle.best(x), x)
    missing = mean_se(best - oracle.elbo(guide.params(x), x) - (found.elbo[-1] - found.elbo[0]))
    # Standard error 0.02 nats; 8 draws for each gradient leave some 0.02 nats of the 2.6 that there are to win.
    assert -4 * missing.se < missing.mean < 0.04 + 4 * missing.se
    assert found.seconds_per_step > 0


def test_a_refinement_curve_has_the_steps_that_were_asked_for(oracle):
    x, guide = oracle.sample(6), amortized(oracle)
    found = refinement_curve(oracle.model, guide, x, steps=(1, 5))
    assert (found.steps, found.elbo.shape) == ((0, 1, 5), (3, 6))
    assert torch.equal(found.elbo, refinement_curve(oracle.model, guide, x, steps=(1, 5)).elbo)


# A point mass


def test_a_point_mass_has_its_joint_density_and_no_gaps(oracle):
    x, family = oracle.sample(B), Delta(LATENT)
    guide = Amortized(nn.Linear(COLUMNS, LATENT), family)
    found = evaluate(oracle.model, guide, x, budget=Budget(3, 5)).values
    assert found.keys() == {"log_joint", "reconstruction"}
    z = guide.params(x)
    likelihood = (
        dist.Normal(z @ oracle.decoder.weight.T + oracle.decoder.bias, oracle.scale.float()).log_prob(x).sum(-1)
    )
    torch.testing.assert_close(found["reconstruction"], likelihood)
    torch.testing.assert_close(found["log_joint"], likelihood + dist.Normal(0.0, 1.0).log_prob(z).sum(-1))


# Rows of their own


def test_training_rows_of_a_table_are_its_rows_and_new_rows_are_fitted(oracle):
    x, family = oracle.sample(B), DiagonalNormal(LATENT)
    guide = PerDatapoint(B, family, model=oracle.model)
    guide.table.copy_(oracle.best(x) + torch.tensor(ASIDE["far off"]))
    table = guide.table.clone()
    order = torch.randperm(B, generator=torch.Generator().manual_seed(0))[:50]
    exact = oracle.elbo(guide.table[order], x[order])
    found = evaluate(oracle.model, guide, x[order], order, budget=Budget(400, 50)).values
    off = mean_se(found["elbo"] - exact)  # standard error about 0.02 nats
    assert abs(off.mean) < 4 * off.se
    assert found["amortization_gap"].min() > 1
    fresh = evaluate(oracle.model, guide, x[order], budget=Budget(400, 50)).values
    assert fresh["amortization_gap"].abs().mean() < 0.05
    assert torch.equal(guide.table, table)


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_trains_nothing(training):
    oracle = LinearGaussian(LATENT, COLUMNS).requires_grad_()
    x, guide = oracle.sample(5), Amortized(nn.Linear(COLUMNS, 2 * LATENT), DiagonalNormal(LATENT)).train(training)
    before = [p.clone() for module in (oracle, guide) for p in module.parameters()]
    found = evaluate(oracle.model, guide, x, budget=Budget(5, 5))
    refinement_curve(oracle.model, guide, x, steps=(1, 2))
    after = [p for module in (oracle, guide) for p in module.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(p.grad is None for p in after)
    assert not any(values.requires_grad for values in found.values.values())


# Pictures


def test_a_reconstruction_is_the_decoders_mean_at_a_draw_of_z(oracle):
    x = oracle.sample(7)
    certain = amortized(oracle, "best")
    certain.encoder.aside = torch.tensor([0.0, 0.0, -2000.0, -2000.0])  # log scales near -30
    found = reconstruct(oracle.model, certain, x)
    assert found.shape == x.shape
    torch.testing.assert_close(found.double(), oracle.mean(x) @ oracle.weight.T + oracle.bias, atol=1e-5, rtol=0)
    uncertain = [reconstruct(oracle.model, amortized(oracle), x, seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(uncertain[0], uncertain[1])
    assert (uncertain[0] != uncertain[2]).all()


def test_samples_have_the_priors_mean_and_covariance(oracle):
    N = 20_000
    found = sample(oracle.model, torch.zeros(N, COLUMNS)).double()
    assert found.shape == (N, COLUMNS)
    exact = oracle.weight @ oracle.weight.T
    # Standard errors sqrt(S_ii / N) of a mean and sqrt((S_ii S_jj + S_ij^2) / N) of a covariance.
    assert ((found.mean(0) - oracle.bias).abs() < 5 * (exact.diag() / N).sqrt()).all()
    spread = (exact.diag()[:, None] * exact.diag() + exact**2).div(N).sqrt()
    assert ((found.T.cov() - exact).abs() < 5 * spread).all()


def test_a_program_without_a_picture_is_refused(oracle):
    class Flat(pyro_params.LocalModule):
        def forward(self, x, index=None):
            with pyro.plate("data", len(x), dim=-1):
                pyro.sample("x", dist.Normal(0.0, 1.0), obs=x[:, 0])

    with pytest.raises(UserError, match="observes no site of the data's shape"):
        sample(Flat(), oracle.sample(3))


@pytest.mark.parametrize("guide", [lambda x, index=None: None, nn.Linear(1, 1)])
def test_a_guide_without_a_family_is_refused(oracle, guide):
    for judge in (evaluate, diagnose):
        with pytest.raises(UserError, match="needs a guide with a posterior family, such as Amortized, not"):
            judge(oracle.model, guide, oracle.sample(3))


def test_a_budget_is_known_by_its_word(oracle):
    x, guide = oracle.sample(3), amortized(oracle)
    by_word, by_number = (evaluate(oracle.model, guide, x, budget=b) for b in ("quick", Budget(K=200, steps=100)))
    assert torch.equal(by_word.values["evidence"], by_number.values["evidence"])
    with pytest.raises(UserError, match="budget is 'quik'; did you mean 'quick'"):
        evaluate(oracle.model, guide, x, budget="quik")
