"""The batch loop: rows pass in any batches, from one seed, in little memory; and its inference mode."""

import math

import numpy as np
import pyro
import pytest
import torch
from oracles import LinearGaussian
from torch import nn

from pvae.applications.anomalies import REFERENCE
from pvae.applications.coding import augment, decode, encode, sample
from pvae.applications.restoration import LOOK, SEARCH
from pvae.errors import UserError
from pvae.inference import batching, posterior
from pvae.inference.batching import as_rows, draw_chunks, inference_mode, map_batches, tile_rows
from pvae.inference.families import Delta, DiagonalNormal
from pvae.inference.guides import Amortized
from pvae.inference.refinement import LocalELBO, RowAdam, refine
from pvae.runtime import torch_state
from pvae.runtime.result_cache import ResultCache
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


def test_the_params_that_a_search_finds_is_judged_by_other_draws(oracle, guide):
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


def test_batches_are_kept_and_read_again_with_their_seeds(oracle, tmp_path):
    x, seeds, calls = oracle.sample(ROWS), [], []

    def compute(rows):
        seeds.append(rows.seed)
        calls.append(rows.place)
        return {"draw": torch.rand(len(rows.x)), "seconds": torch.tensor(1.5)}

    def mapped(folder):
        cache, done = ResultCache(folder, {"K": 1}), []
        options = {"batch_size": 10, "seed_of": lambda start: 7 + start, "progress": done.append}
        values = map_batches(oracle.model, None, compute, x, cache=cache, prefix="test-0", **options)
        assert done == [10, 10, 3]
        return values

    first, again = mapped(tmp_path), mapped(tmp_path)
    assert seeds == [7, 17, 27]
    assert [path.stem for path in sorted(tmp_path.iterdir())] == [
        "test-0-000000-000010",
        "test-0-000010-000020",
        "test-0-000020-000023",
    ]
    for name in ("draw", "seconds"):
        assert torch.equal(first[name], again[name])
        assert torch.equal(first[name], mapped(None)[name])
    assert first["seconds"].tolist() == [1.5] * 3
    with torch_state.seeded(17):
        assert torch.equal(first["draw"][10:20], torch.rand(10))


def test_inference_mode_leaves_the_streams_and_the_store_outside_alone(oracle, guide):
    pyro.param("outside", torch.ones(1))
    parameter, stream = pyro.get_param_store()["outside"], torch.get_rng_state()
    guide.train()
    with inference_mode(oracle.model, guide, None, seed=3):
        assert not torch.is_grad_enabled()
        assert not pyro.get_param_store().keys()
        pyro.param("inside", torch.zeros(1))
        draw = torch.rand(2)
    assert torch.equal(torch.get_rng_state(), stream)
    assert not guide.training
    assert list(pyro.get_param_store().keys()) == ["outside"]
    assert parameter.unconstrained() is parameter
    with inference_mode(), torch_state.seeded(3):
        assert torch.equal(torch.rand(2), draw)
    with inference_mode():
        torch.rand(1)
    assert not torch.equal(torch.get_rng_state(), stream)
    pyro.clear_param_store()
