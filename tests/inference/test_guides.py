"""Guides: three inference methods, each with its own memory, all within reach of the best diagonal Gaussian."""

import copy
import math
import pickle

import pyro
import pytest
import torch
from cases import COLUMNS, FAMILIES, LATENT
from joblib import Parallel, delayed
from oracles import SOURCES, LinearGaussian
from pyro.infer import SVI, Trace_ELBO
from torch import nn
from torch.distributions import constraints

from pvae.errors import UserError
from pvae.generative.effect_handlers import mask_missing
from pvae.generative.likelihoods import Bernoulli
from pvae.generative.networks import MLP
from pvae.generative.priors import StandardNormal
from pvae.generative.vae import VAE
from pvae.inference.families import Delta, DiagonalNormal
from pvae.inference.guides import Amortized, FrozenGuide, PerDatapoint, SemiAmortized
from pvae.inference.importance import log_weights
from pvae.inference.latents import LatentSite, LatentSites
from pvae.inference.posterior import freeze
from pvae.inference.refinement import LocalELBO, fixed_guide, maximize_local_elbo, refine
from pvae.runtime.torch_state import seeded
from pvae.training.loop import fit
from pvae.training.optimizer import FusedAdam

FAMILY = DiagonalNormal(2)
every_source = pytest.mark.parametrize("source", SOURCES)


@pytest.fixture
def oracle():
    return LinearGaussian(2, 5)


def shortfall(oracle, q_params, x):
    """Nats by which q_params misses the best diagonal Gaussian, [B]."""
    return oracle.elbo(oracle.best(x), x) - oracle.elbo(q_params, x)


def svi(model, guide, learning_rate=0.01):
    return SVI(model.model, guide, FusedAdam(model, guide, learning_rate=learning_rate), Trace_ELBO())


@every_source
def test_fit_reaches_the_best_diagonal(oracle, source):
    x, index = oracle.sample(200), torch.arange(200)
    torch.manual_seed(0)
    guide = SOURCES[source](oracle.model, 2, 5, 200)
    fit(oracle.model, guide, x, epochs=200, batch_size=100, learning_rate=0.02)
    with torch.no_grad(), seeded(1):
        missing = shortfall(oracle, guide.params(x, index), x)
    assert missing.min() > -1e-6
    assert missing.mean() < 0.02


@every_source
def test_pyros_own_svi_trains(source):
    oracle = LinearGaussian(2, 5).requires_grad_()
    x, index = oracle.sample(50), torch.arange(50)
    torch.manual_seed(0)
    guide = SOURCES[source](oracle.model, 2, 5, 50)
    loop, before = svi(oracle, guide), oracle.decoder.weight.detach().clone()

    def missing():
        with torch.no_grad(), seeded(1):
            guide.eval()
            q_params = guide.params(x, index)
            guide.train()
        return shortfall(oracle, q_params, x).mean().item()

    start = missing()
    for _ in range(60):
        loop.step(x, index)
    assert missing() < 0.5 * start
    assert (oracle.decoder.weight - before).abs().min() > 1e-4


@every_source
def test_a_guide_shows_its_plate_and_its_latent_alone(oracle, source):
    guide = SOURCES[source](oracle.model, 2, 5, 20)
    x = oracle.sample(6)
    trace = pyro.poutine.trace(guide).get_trace(x, torch.arange(6))
    shown = [name for name, site in trace.nodes.items() if site["type"] == "sample"]
    assert shown == ["data", "z"]
    assert trace.nodes["z"]["value"].shape == (6, 2)
    assert log_weights(oracle.model, guide, x, torch.arange(6), 7).log_w.shape == (7, 6)


@every_source
def test_two_models_of_one_shape_train_as_if_alone(source):
    def pair(seed):
        torch.manual_seed(seed)
        vae = VAE(MLP(2, 5, hidden=[4]), Bernoulli(), StandardNormal(2))
        return vae, SOURCES[source](vae.model, 2, 5, 8)

    def step(loop, seed):
        with seeded(seed):
            loop.step(torch.bernoulli(torch.full((8, 5), 0.3)), torch.arange(8))

    def state(modules):
        return [tensor for module in modules for tensor in module.state_dict().values()]

    alone = []
    for seed in (0, 1):
        modules = pair(seed)
        loop = svi(*modules)
        for _ in range(3):
            step(loop, seed)
        alone.append(state(modules))
    together = [pair(seed) for seed in (0, 1)]
    loops = [svi(*modules) for modules in together]
    for _ in range(3):
        for seed, loop in enumerate(loops):
            step(loop, seed)
    for modules, expected in zip(together, alone, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(state(modules), expected, strict=True))
    assert not torch.equal(alone[0][0], alone[1][0])
    assert not pyro.get_param_store().keys()


def test_refinement_wins_on_the_network_it_starts_from(oracle):
    x = oracle.sample(100)
    torch.manual_seed(0)
    plain = Amortized(nn.Linear(5, 4), FAMILY)
    refined = SemiAmortized(plain.encoder, FAMILY, 20, model=oracle.model, draws=16)
    with torch.no_grad():
        before, after = (shortfall(oracle, guide.params(x), x) for guide in (plain, refined))
    assert (after < before).float().mean() > 0.95
    assert after.mean() < 0.1 * before.mean()


def test_without_unrolling_gradients_pass_straight_through():
    oracle = LinearGaussian(2, 5).requires_grad_()
    x = oracle.sample(6)
    torch.manual_seed(0)
    encoder, bound = nn.Linear(5, 4), LocalELBO(oracle.model, FAMILY)
    own = [*encoder.parameters(), *oracle.parameters()]

    def gradients(unroll):
        guide = SemiAmortized(encoder, FAMILY, 3, model=oracle.model, draws=2, unroll=unroll)
        with seeded(1):
            return torch.autograd.grad(log_weights(oracle.model, guide, x).log_w.sum(), own), guide.rule

    straight, rule = gradients(unroll=False)
    with seeded(1):
        start = encoder(x)
        q_params = refine(lambda q_params: bound(q_params, x, None, 2), start, 3, rule=rule).q_params.requires_grad_()
        value = log_weights(oracle.model, fixed_guide(FAMILY, q_params), x).log_w.sum()
    by_params, *by_decoder = torch.autograd.grad(value, [q_params, *oracle.parameters()])
    expected = [*torch.autograd.grad(start, list(encoder.parameters()), by_params), *by_decoder]
    for one, other in zip(straight, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    unrolled, _ = gradients(unroll=True)
    assert all((one - other).abs().max() > 1e-3 for one, other in zip(straight, unrolled, strict=True))


MEMORY = ("table", "first", "second", "row_steps")


def test_rows_outside_the_batch_keep_their_bits():
    oracle = LinearGaussian(2, 5).requires_grad_()
    x, visits = oracle.sample(10), torch.zeros(10, dtype=torch.int32)
    torch.manual_seed(0)
    guide = PerDatapoint(10, FAMILY, model=oracle.model, local_steps=4)
    loop = svi(oracle, guide)
    for index in map(torch.tensor, ([0, 1, 2], [2, 7], [9, 0, 2, 4], [2])):
        before = {name: getattr(guide, name).clone() for name in MEMORY}
        loop.step(x[index], index)
        visits[index] += 1
        inside = torch.isin(torch.arange(10), index)
        for name in MEMORY:
            changed = (getattr(guide, name) != before[name]).view(10, -1)
            assert torch.equal(changed.all(-1), inside), name
            assert torch.equal(changed.any(-1), inside), name
    assert torch.equal(guide.row_steps, 4 * visits)
    assert (guide.table[visits == 0] == FAMILY.initial_params()).all()


def test_a_row_does_not_know_with_whom_it_was_visited(oracle):
    family, x = Delta(2), oracle.sample(8)  # no draws: the bound has no noise
    bound = LocalELBO(oracle.model, family)

    def visited(*batches):
        guide = PerDatapoint(8, family, model=oracle.model, local_steps=4)
        for index in map(torch.tensor, batches):
            (-bound(guide.params(x[index], index), x[index])).sum().backward()
            guide.step_local_params()
        return guide

    one = visited([0, 1], [0, 2, 3], [1, 4], [0, 1])
    other = visited([5, 0], [0], [6, 7, 1, 0], [1, 2])
    for name in MEMORY:
        torch.testing.assert_close(getattr(one, name)[0], getattr(other, name)[0], atol=1e-6, rtol=1e-6)
    # The steps at a visit and the joint one after them are steps of one refinement.
    whole = refine(lambda q_params: bound(q_params, x[:1]), family.initial_params().expand(1, -1), 12, rule=one.rule)
    torch.testing.assert_close(one.table[:1], whole.q_params, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(one.second[:1], whole.state.exp_avg_sq, atol=1e-6, rtol=1e-6)
    assert one.row_steps.tolist() == [12, 12, 4, 4, 4, 0, 0, 0]


def test_rows_stand_still_without_training(oracle):
    x, index = oracle.sample(4), torch.tensor([3, 1, 0, 2])
    guide = PerDatapoint(4, FAMILY, model=oracle.model)
    guide.table.copy_(torch.arange(16.0).view(4, 4))
    with torch.no_grad():
        assert torch.equal(guide.params(x, index), guide.table[index])
    guide.eval()
    assert torch.equal(guide.params(x, index), guide.table[index])
    guide.step_local_params()
    assert torch.equal(guide.table, torch.arange(16.0).view(4, 4))
    assert not guide.row_steps.any()


@pytest.mark.parametrize("training", [True, False])
def test_new_rows_are_fitted_and_leave_no_trace(oracle, training):
    x = oracle.sample(50, seed=1)
    guide = PerDatapoint(10, FAMILY, model=oracle.model).train(training)
    before = {name: getattr(guide, name).clone() for name in MEMORY}
    stream = torch.get_rng_state()
    q_params = guide.params(x)
    assert torch.equal(torch.get_rng_state(), stream)
    assert all(torch.equal(getattr(guide, name), before[name]) for name in MEMORY)
    assert shortfall(oracle, q_params, x).mean() < 0.02
    assert torch.equal(q_params, guide.params(x))
    guide.step_local_params()
    assert all(torch.equal(getattr(guide, name), before[name]) for name in MEMORY)


def test_gap_of_a_local_optimum_covers_what_is_left(oracle):
    x, bound = oracle.sample(50, seed=2), LocalELBO(oracle.model, FAMILY)
    gaps, left = [], []
    for steps in (20, 50, 200):
        found = maximize_local_elbo(bound, FAMILY.initial_params().expand(50, -1), x, steps=steps, tolerance=0.0)
        gaps.append(found.optimization_gap.mean().item())
        left.append(shortfall(oracle, found.q_params, x).mean().item())
    assert gaps == sorted(gaps, reverse=True)
    assert left == sorted(left, reverse=True)
    assert all(gap > rest for gap, rest in zip(gaps[:2], left[:2], strict=True))
    assert left[-1] < 0.02


@pytest.mark.parametrize("wrong", [0, -1, math.nan, math.inf])
@pytest.mark.parametrize("name", ["steps", "draws", "learning_rate"])
def test_semi_amortized_refuses_what_is_not_positive(oracle, name, wrong):
    with pytest.raises(UserError, match=f"SemiAmortized: {name} is {wrong}, but it must be positive"):
        SemiAmortized(nn.Linear(5, 4), FAMILY, model=oracle.model, **{name: wrong})


@pytest.mark.parametrize("wrong", [0, -1, math.nan, math.inf])
@pytest.mark.parametrize("name", ["num_data", "local_steps", "local_learning_rate", "num_steps_new_data"])
def test_per_datapoint_refuses_what_is_not_positive(name, wrong):
    with pytest.raises(UserError, match=f"PerDatapoint: {name} is {wrong}, but it must be positive"):
        PerDatapoint(**{"num_data": 5, "family": FAMILY, name: wrong})


def test_per_datapoint_needs_a_bound_only_for_steps_of_its_own(oracle):
    x, index = oracle.sample(3), torch.arange(3)
    for call in (
        lambda: PerDatapoint(3, FAMILY).params(x, index),
        lambda: PerDatapoint(3, FAMILY, local_steps=1).params(x),
    ):
        with pytest.raises(UserError, match="PerDatapoint needs model="):
            call()
    assert PerDatapoint(3, FAMILY, local_steps=1).params(x, index).requires_grad


METHODS = {
    "Amortized": lambda model, family: Amortized(MLP(COLUMNS, family.num_params, hidden=[4]), family),
    "SemiAmortized": lambda model, family: SemiAmortized(
        MLP(COLUMNS, family.num_params, hidden=[4]), family, steps=2, model=model
    ),
    "PerDatapoint": lambda model, family: PerDatapoint(6, family, model=model, num_steps_new_data=5),
}


def fitted_pair(method, family, training, missing=False):
    """A small VAE's program and its guide, trained for a moment on the rows that are returned too."""
    torch.manual_seed(0)
    vae = VAE(MLP(LATENT, COLUMNS, hidden=[4]), Bernoulli(), StandardNormal(LATENT))
    if missing:
        vae.model = mask_missing(vae.model)
    guide = METHODS[method](vae.model, FAMILIES[family]())
    x, index = torch.bernoulli(torch.full((6, COLUMNS), 0.4)), torch.arange(6)
    if training == "svi":
        loop = SVI(vae.model, guide, FusedAdam(vae, guide), Trace_ELBO())
        for _ in range(2):
            loop.step(x, index)
    elif training == "visit":  # an interrupted step
        Trace_ELBO().differentiable_loss(vae.model, guide, x, index).backward()
    elif training == "fit":
        fit(vae.model, guide, x, epochs=1, batch_size=3)
    return vae, guide, x


def new_params(guide, x):
    with torch.no_grad(), seeded(1):
        return guide.eval().params(x)


@pytest.mark.parametrize(
    ("family", "training"),
    [*((name, "svi") for name in FAMILIES), *(("LowRankNormal", t) for t in ("none", "visit", "fit"))],
)
@pytest.mark.parametrize("method", METHODS)
def test_guides_pickle_and_copy_with_their_model_and_without_rows(method, family, training):
    vae, guide, x = fitted_pair(method, family, training)
    for other in (pickle.loads(pickle.dumps(guide)), copy.deepcopy(guide)):
        torch.testing.assert_close(new_params(other, x), new_params(guide, x))
        if method != "Amortized":
            model = other.local_elbo.model.__self__
            assert model is not vae
            assert all(torch.equal(*pair) for pair in zip(model.parameters(), vae.parameters(), strict=True))
    together = pickle.loads(pickle.dumps([getattr(guide, "encoder", None), guide, vae.decoder, vae]))
    assert method == "Amortized" or together[1].local_elbo.model.__self__ is together[3]
    assert together[0] is getattr(together[1], "encoder", None)
    assert x.numpy().tobytes() not in pickle.dumps(guide)


@pytest.mark.parametrize("method", METHODS)
def test_a_copied_pair_trains_on_as_the_first_one_does(method):
    vae, guide, x = fitted_pair(method, "DiagonalNormal", "svi")
    pairs = [(vae, guide), pickle.loads(pickle.dumps((vae, guide))), copy.deepcopy((vae, guide))]
    for model, own in pairs:
        with seeded(2):
            svi(model, own).step(x, torch.arange(6))
    for model, own in pairs[1:]:
        for one, other in zip(
            [*vae.parameters(), *guide.buffers()], [*model.parameters(), *own.buffers()], strict=True
        ):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("method", ["SemiAmortized", "PerDatapoint"])
def test_a_guide_that_scores_observed_entries_pickles_alone(method):
    _, guide, x = fitted_pair(method, "DiagonalNormal", "svi", missing=True)
    x[0, 0] = torch.nan if method == "PerDatapoint" else x[0, 0]
    for other in (pickle.loads(pickle.dumps(guide)), copy.deepcopy(guide)):
        torch.testing.assert_close(new_params(other, x), new_params(guide, x))


def test_guides_go_through_joblib():
    pairs = [fitted_pair(method, "DiagonalNormal", "svi") for method in METHODS]
    remote = Parallel(n_jobs=2)(delayed(new_params)(guide, x) for _, guide, x in pairs)
    for params, (_, guide, x) in zip(remote, pairs, strict=True):
        torch.testing.assert_close(params, new_params(guide, x))


@every_source
def test_a_frozen_guide_looks_its_rows_up(oracle, source, monkeypatch):
    torch.manual_seed(0)
    x, guide = oracle.sample(20), SOURCES[source](oracle.model, 2, 5, 20)
    x[7] = x[3]  # rows that are alike have each its own q_params in a slice
    frozen = freeze(oracle.model, guide, x, seed=1)
    assert isinstance(frozen, FrozenGuide)
    assert frozen.encodes == guide.encodes
    other = guide.params(x + 1).shape, guide.params(x, torch.arange(20)).detach()
    monkeypatch.setattr(guide, "params", lambda x, index=None: pytest.fail("asked anew"))
    assert torch.equal(frozen.params(x), frozen.q_params)
    assert torch.equal(frozen.params(x[5:9]), frozen.q_params[5:9])
    order = torch.tensor([4, 2, 19, 2])
    assert torch.equal(frozen.params(x[order]), frozen.q_params[order])
    monkeypatch.undo()
    assert frozen.params(x + 1).shape == other[0]  # rows that it does not know
    with torch.no_grad():
        assert frozen.params(x, torch.arange(20)).shape == other[1].shape


def test_a_frozen_guide_knows_training_rows_by_their_index(oracle):
    x, index = oracle.sample(10), torch.arange(10)
    guide = PerDatapoint(10, FAMILY, model=oracle.model).eval()
    guide.table.copy_(torch.arange(40.0).view(10, 4))
    frozen = freeze(oracle.model, guide, x, index)
    guide.table.zero_()
    assert torch.equal(frozen.params(x[3:5], index[3:5]), torch.arange(12.0, 20.0).view(2, 4))
    assert not frozen.params(x[3:5], torch.tensor([4, 3])).any()


def test_a_guide_over_several_sites_pickles():
    support = constraints.positive
    sites = LatentSites((LatentSite("z", (2,), constraints.real_vector), LatentSite("s", (), support)))
    guide = Amortized(nn.Linear(5, 6), DiagonalNormal(3), sites=sites)
    single = Amortized(nn.Linear(5, 4), DiagonalNormal(2))
    for one in (guide, single):
        other = pickle.loads(pickle.dumps(one))
        assert other.sites == one.sites
        draws = []
        for program in (one, other):
            with seeded(0):
                trace = pyro.poutine.trace(program).get_trace(torch.ones(4, 5))
            draws.append({name: site["value"] for name, site in trace.nodes.items() if site["type"] == "sample"})
        assert draws[0].keys() == draws[1].keys()
        assert all(torch.equal(draws[0][name], draws[1][name]) for name in ("z",))
