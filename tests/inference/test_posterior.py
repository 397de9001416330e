"""Rows through programs in batches: any batches, one seed, little memory; weighed draws against the exact posterior."""

import math

import numpy as np
import pytest
import torch
from cases import FAMILIES
from oracles import SOURCES, LinearGaussian
from torch import nn

from pvae.applications.anomalies import REFERENCE, detect_anomalies
from pvae.applications.coding import augment, decode, encode, interpolate, sample
from pvae.applications.latent_map import map_latents
from pvae.applications.restoration import LOOK, SEARCH
from pvae.errors import UserError
from pvae.inference import batching, posterior
from pvae.inference.batching import as_rows, draw_chunks, map_batches, tile_rows
from pvae.inference.families import Delta, DiagonalNormal, FlowFamily
from pvae.inference.guides import Amortized
from pvae.inference.posterior import (
    WeightedDraws,
    importance_draws,
    likelihood_at,
    posterior_moments,
    refit_params,
    with_fixed_params,
)
from pvae.inference.refinement import LocalELBO, RowAdam, refine
from pvae.runtime import torch_state
from pvae.runtime.torch_state import no_validation
from pvae.stats import mean_se

ROWS = 23


class Best(nn.Module):
    """An encoder to the best q_params of every row."""

    def __init__(self, oracle):
        super().__init__()
        self.best = oracle.best

    def forward(self, x):
        return self.best(x)


@pytest.fixture
def oracle(double):
    return LinearGaussian()


@pytest.fixture
def guide(oracle):
    return Amortized(Best(oracle), DiagonalNormal(2))


def starts(rows):
    """Of each row, where its batch begins, and a draw of its batch's stream."""
    return {"start": torch.full((len(rows.x),), rows.place.start), "draw": torch.rand(len(rows.x))}


# Batches


@pytest.mark.parametrize("size", [1, 4, 23, 100])
def test_every_row_passes_once_in_its_order(oracle, size):
    x, index, done = oracle.sample(ROWS), torch.randperm(ROWS), []
    found = map_batches(
        oracle.model,
        None,
        lambda rows: {"x": rows.x, "index": rows.index},
        x,
        index,
        batch_size=size,
        progress=done.append,
    )
    assert found["x"].equal(x)
    assert found["index"].equal(index)
    assert sum(done) == ROWS
    assert max(done) == min(size, ROWS)


def test_batches_have_streams_of_their_own(oracle):
    x = oracle.sample(ROWS)
    found = map_batches(oracle.model, None, starts, x, batch_size=5, seed=1)
    assert found["start"].unique().tolist() == [0, 5, 10, 15, 20]
    assert len(found["draw"].unique()) == ROWS
    assert map_batches(oracle.model, None, starts, x, batch_size=5, seed=1)["draw"].equal(found["draw"])
    assert map_batches(oracle.model, None, starts, x[:10], batch_size=5, seed=1)["draw"].equal(found["draw"][:10])
    assert not map_batches(oracle.model, None, starts, x, batch_size=5, seed=2)["draw"].equal(found["draw"])


@pytest.mark.parametrize("size", [1, 7])
def test_what_is_not_drawn_does_not_depend_on_batches_or_neighbours(oracle, guide, size, monkeypatch):
    x = oracle.sample(ROWS)
    order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(0))

    def found(rows):
        codes = encode(oracle.model, guide, rows, K=2)
        made = decode(oracle.model, guide, codes.mean)
        return [codes.mean, codes.sd, codes.error, made, augment(oracle.model, guide, rows, spread=0.0).x]

    whole, shuffled = found(x), found(x[order])
    monkeypatch.setitem(map_batches.__kwdefaults__, "batch_size", size)
    for one, other, small in zip(whole, shuffled, found(x), strict=True):
        torch.testing.assert_close(other, one[order])
        torch.testing.assert_close(small, one)


def test_exact_rates_do_not_depend_on_batches_though_draws_do(double, monkeypatch):
    oracle = LinearGaussian(conditioning=1.0)
    guide, x = Amortized(Best(oracle), DiagonalNormal(2)), oracle.sample(ROWS)
    one = encode(oracle.model, guide, x, K=3)
    monkeypatch.setitem(map_batches.__kwdefaults__, "batch_size", 4)
    other = encode(oracle.model, guide, x, K=3)
    # Under the exact posterior rate and distortion add up to -log p(x), whatever is drawn.
    torch.testing.assert_close(*(each.rate * math.log(2) + each.distortion for each in (one, other)))
    assert not other.rate[4:].equal(one.rate[4:])
    assert sample(oracle.model, x, seed=1)[4:].equal(sample(oracle.model, x, seed=1)[4:])


@pytest.mark.parametrize("seed", [0, 7])
def test_batches_share_no_noise_with_what_small_seeds_and_constants_draw(oracle, seed):
    """Searches inside guides draw from 0 and 1; uses from their seed; references and searches add constants to it."""
    own = map_batches(
        oracle.model, None, lambda rows: {"draw": torch.randn(len(rows.x), 4)}, oracle.sample(6), seed=seed
    )
    constants = (0, *range(100), 10_000, REFERENCE, SEARCH, LOOK, 1_000_003, 2_000_003, posterior.MOMENTS_SEED)
    others = {each + offset for each in constants for offset in (0, seed)} | {batching.STREAM + REFERENCE + seed}
    for other in others:
        with torch_state.seeded(other):
            assert not torch.randn(6, 4).equal(own["draw"]), other
    with torch_state.seeded(seed + batching.STREAM):
        assert torch.randn(6, 4).equal(own["draw"])  # this can fail


def test_the_lam_that_a_search_finds_is_judged_by_other_draws(oracle, guide):
    """A single draw is searched to its end and then judged: under the same draw its bound is far above the ELBO."""
    x, bound = oracle.sample(200), LocalELBO(oracle.model, guide.family)

    def judged(stream):
        def searched(q_params):
            with torch_state.seeded(stream):
                return bound(q_params, x)

        with torch.enable_grad():
            q_params = refine(searched, guide.params(x).detach(), 10, rule=RowAdam(0.1)).q_params.detach()
        own = map_batches(oracle.model, None, lambda rows: {"bound": bound(q_params, rows.x)}, x)["bound"]
        return mean_se(own - oracle.elbo(q_params, x))

    found, alike = judged(0), judged(batching.STREAM)
    assert abs(found.mean) < 4.5 * found.se
    assert alike.mean > 20 * alike.se  # this can fail


def test_an_index_goes_where_the_rows_are(oracle):
    index, found = torch.arange(ROWS), []
    model = nn.Linear(1, 1, device="meta")  # no CPU, and here on every machine

    def compute(rows):
        found.append((rows.x.device.type, rows.index.device.type))
        return {"nothing": torch.zeros(len(rows.x))}

    map_batches(model, None, compute, torch.zeros(ROWS, 5), index)
    assert found == [("meta", "meta")]


def test_programs_are_used_as_evaluated_and_without_gradients(oracle):
    network = nn.Sequential(nn.Linear(5, 5), nn.Dropout(0.9))
    guide = Amortized(network, Delta(5)).train()
    x = oracle.sample(3)
    found = map_batches(oracle.model, guide, lambda rows: {"z": guide.params(rows.x)}, x)["z"]
    assert found.equal(network[0](x))  # nothing is dropped
    assert not found.requires_grad
    assert not network.training


def test_no_rows_and_no_table_are_refused(oracle):
    for rows, words in (
        (torch.zeros(0, 5), "no rows are given; at least one is needed"),
        (torch.zeros(5), r"the rows have shape \(5,\), but a table"),
        (np.array([["a", "b"]]), "the rows are no table of numbers"),
        ([[1.0], [1.0, 2.0]], "the rows are no table of numbers"),
    ):
        with pytest.raises(UserError, match=words):
            map_batches(oracle.model, None, starts, rows)


def test_rows_take_the_programs_type(oracle):
    assert as_rows(np.ones((2, 5), dtype="int32"), oracle.model).dtype == torch.float64
    assert as_rows(torch.ones(2, 5), oracle.float().model).dtype == torch.float32
    assert as_rows([[1, 2]], oracle.model).shape == (1, 2)


# Memory


def test_batches_are_halved_where_memory_is_short_and_nothing_else_changes(oracle, capsys):
    torch_state.warn_once.cache_clear()
    x, sizes, done = oracle.sample(ROWS), [], []

    def greedy(rows):
        sizes.append(len(rows.x))
        torch.rand(7)  # a stream that is moved before memory runs out
        if len(rows.x) > 6:
            raise torch.OutOfMemoryError
        return {"x": rows.x, "draw": torch.rand(len(rows.x))}

    found = map_batches(oracle.model, None, greedy, x, batch_size=ROWS, seed=3, progress=done.append)
    assert sizes == [23, 11, 5, 5, 5, 5, 3]
    assert found["x"].equal(x)
    assert found["draw"].equal(map_batches(oracle.model, None, greedy, x, batch_size=5, seed=3)["draw"])
    assert done == [5, 5, 5, 5, 3]
    assert capsys.readouterr().err.splitlines() == [
        "the device is out of memory: going on with 5 instead of 23 rows at a time"
    ]


def test_an_error_that_comes_once_costs_one_halving(oracle, guide, monkeypatch):
    x, whole = oracle.sample(ROWS), encode(oracle.model, guide, oracle.sample(ROWS), K=2).mean
    params, failed = guide.params, []

    def once(rows, index=None):
        failed.append(len(rows))
        if len(failed) == 1:
            raise torch.OutOfMemoryError
        return params(rows, index)

    monkeypatch.setattr(guide, "params", once)
    torch.testing.assert_close(encode(oracle.model, guide, x, K=2).mean, whole)
    assert failed == [23, 11, 11, 1]


def test_a_row_that_is_too_much_alone_is_an_error(oracle):
    def always(rows):
        raise torch.OutOfMemoryError("too much")

    with pytest.raises(torch.OutOfMemoryError, match="too much"):
        map_batches(oracle.model, None, always, oracle.sample(3))


# Codes to data, and weighed draws


def test_chunks_cover_all_draws_and_repeat_rows_as_often(monkeypatch):
    monkeypatch.setattr(batching, "ROWS_PER_PASS", 20)
    assert [(part.start, part.stop) for part in draw_chunks(7, 10)] == [(0, 2), (2, 4), (4, 6), (6, 7)]
    assert [(part.start, part.stop) for part in draw_chunks(2, 100)] == [(0, 1), (1, 2)]
    assert [(part.start, part.stop) for part in draw_chunks(3, 2, max_batch=4)] == [(0, 2), (2, 3)]
    x, index = torch.arange(6.0).view(3, 2), torch.arange(3)
    rows, which = tile_rows(x, index, slice(1, 3))
    assert rows.equal(torch.cat([x, x]))
    assert which.equal(torch.cat([index, index]))
    assert tile_rows(x, None, slice(0, 1))[1] is None


def test_a_fixed_guide_finds_its_lam_once(oracle, guide):
    x, calls = oracle.sample(3), []
    guide.encoder.best = lambda x: calls.append(1) or oracle.best(x)
    program = with_fixed_params(guide, x, None)
    for _ in range(3):
        program(x)
    assert len(calls) == 1
    assert with_fixed_params(oracle.posterior, x, None) == oracle.posterior


@pytest.mark.parametrize("name", FAMILIES)
def test_moments_are_those_of_draws_and_a_rows_own(name):
    family = FAMILIES[name]()
    with torch_state.seeded(0), torch.no_grad():
        q_params = torch.randn(6, family.num_params) / 2
        z = family(q_params).sample((20_000,))
        torch.manual_seed(5)
        undisturbed = torch.rand(1)
        torch.manual_seed(5)
        mean, sd = posterior_moments(family, q_params)
        assert torch.rand(1).equal(undisturbed)
        error = z.std(0) * (1 / posterior.MOMENT_DRAWS + 1 / len(z)) ** 0.5
        assert ((mean - z.mean(0)).abs() <= 5 * error + 1e-6).all()
        # Four times a normal's error, for tails heavier than its.
        assert ((sd - z.std(0)).abs() <= 4 * 5 * error / 2**0.5 + 1e-6).all()
        for one, other in zip(posterior_moments(family, q_params[[4, 1]]), (mean, sd), strict=True):
            torch.testing.assert_close(one, other[[4, 1]])


def test_a_row_has_one_code_whatever_asks_and_whatever_stands_beside_it(oracle):
    family = FlowFamily(2, hidden=[4], bins=4, context=2)
    guide, x = Amortized(nn.Linear(5, family.num_params), family), oracle.sample(12)
    codes = encode(oracle.model, guide, x).mean
    mapped = map_latents(oracle.model, guide, x, size=2, seed=1).codes
    torch.testing.assert_close(mapped, codes)
    torch.testing.assert_close(encode(oracle.model, guide, x[5:7], K=1, seed=1).mean, codes[5:7])
    torch.testing.assert_close(interpolate(oracle.model, guide, x[3:5], seed=2).z[[0, -1]], codes[3:5])
    apart = detect_anomalies(
        oracle.model, guide, x[:4], reference=x[2:], scores=["neighbours"], false_alarm=0.3, K=1, seed=3
    )
    fifth = torch.cdist(codes[:4], codes[2:]).sort().values[:, 4]
    torch.testing.assert_close(apart.scores["neighbours"], fifth)


def test_data_are_decoded_at_the_codes_given(oracle, guide):
    z = torch.randn(6, 2)
    fn = likelihood_at(oracle.model, guide.sites, z, torch.zeros(6, 5))
    torch.testing.assert_close(fn.mean, z @ oracle.weight.T + oracle.bias)
    torch.testing.assert_close(fn.stddev, oracle.scale.expand(6, 5))


def test_weighed_draws_are_of_the_exact_posterior(oracle, guide):
    x, K = oracle.sample(ROWS), 4000
    wide = guide.params(x) + torch.tensor([0.2, -0.2, 0.3, 0.3])  # a q that misses the posterior
    torch.manual_seed(0)
    with torch.no_grad():
        codes = importance_draws(oracle.model, guide, wide, x, K=K)
    torch.testing.assert_close(codes.log_weights.logsumexp(0), torch.zeros(ROWS))
    sd = oracle.covariance.diag().sqrt()
    found = (codes.mean(codes.z) - oracle.mean(x)) / sd * codes.ess.sqrt().unsqueeze(-1)
    # About normal, with a variance near 1 where weights are close to even; 46 of them.
    assert found.abs().max() < 6
    assert 0.4 < found.square().mean() < 2.5
    second = codes.mean((codes.z - oracle.mean(x)).square())
    assert ((second / sd**2 - 1).abs() < 6 * (2 / codes.ess).sqrt().unsqueeze(-1)).all()
    unweighed = (codes.z.mean(0) - oracle.mean(x)) / sd * math.sqrt(K)
    assert unweighed.square().mean() > 50  # the check sees draws that are not weighed


def test_draws_of_the_exact_posterior_weigh_alike_and_a_point_mass_has_one(double):
    oracle = LinearGaussian(conditioning=1.0)
    guide, x = Amortized(Best(oracle), DiagonalNormal(2)), oracle.sample(5)
    with torch.no_grad():
        codes = importance_draws(oracle.model, guide, guide.params(x), x, K=50)
        point = importance_draws(oracle.model, Amortized(oracle.mean, Delta(2)), oracle.mean(x), x, K=50)
    torch.testing.assert_close(codes.ess, torch.full((5,), 50.0))
    assert point.z.shape == (1, 5, 2)
    assert point.log_weights.equal(torch.zeros(1, 5))
    torch.testing.assert_close(point.mean(point.z), oracle.mean(x))


def test_weighing_in_pieces_is_weighing(oracle, guide, monkeypatch):
    x = oracle.sample(5)

    def found():
        torch.manual_seed(0)
        with torch.no_grad():
            return importance_draws(oracle.model, guide, guide.params(x), x, K=20)

    whole = found()
    monkeypatch.setattr(batching, "ROWS_PER_PASS", 15)
    torch.testing.assert_close(found(), whole)


def test_means_are_weighed_over_any_values():
    codes = WeightedDraws(torch.zeros(2, 1, 1), torch.tensor([[0.25], [0.75]]).log())
    torch.testing.assert_close(codes.mean(torch.tensor([[[[0.0, 4.0]]], [[[4.0, 0.0]]]])), torch.tensor([[[3.0, 1.0]]]))
    torch.testing.assert_close(codes.ess, torch.tensor([1.6]))


# The best q_params


@pytest.mark.parametrize("name", SOURCES)
def test_rows_are_refitted_to_their_best_lam_whatever_the_guide_knows(oracle, name):
    x, guide = oracle.sample(6), SOURCES[name](oracle.model, 2, 5, 6)
    torch.manual_seed(5)
    undisturbed = torch.rand(1)
    torch.manual_seed(5)
    q_params = refit_params(oracle.model, guide, x, candidates=[x], steps=200)
    assert torch.rand(1).equal(undisturbed)
    lost = oracle.elbo(oracle.best(x), x) - oracle.elbo(q_params.detach(), x)
    assert lost.min() > -1e-9  # the closed form's best is best
    assert lost.mean() < 0.05  # steps of 8 draws come no nearer
    assert (oracle.elbo(oracle.best(x), x) - oracle.elbo(guide.family.initial_params().expand(6, -1), x)).mean() > 0.5


def test_a_row_starts_from_the_best_offer_and_never_from_nan(oracle, guide):
    x = oracle.sample(4)
    worse, missing = x + 10, torch.full_like(x, math.nan)
    with no_validation():
        q_params = refit_params(oracle.model, guide, x, candidates=[worse, x, missing], steps=0)
        torch.testing.assert_close(q_params, guide.params(x))
        q_params = refit_params(oracle.model, guide, x, candidates=[missing], steps=0)
    assert q_params.equal(guide.family.initial_params().expand(4, -1))


def test_an_offer_takes_the_place_of_a_start_that_is_nan(oracle, guide, monkeypatch):
    def bound(model, family, sites):
        exact = LocalELBO(model, family, sites)
        return lambda q_params, *rest: exact(q_params, *rest).where(
            (q_params != family.initial_params()).any(1), torch.nan
        )

    x = oracle.sample(4)
    monkeypatch.setattr(posterior, "LocalELBO", bound)
    with no_validation():
        torch.testing.assert_close(refit_params(oracle.model, guide, x, candidates=[x], steps=0), guide.params(x))
