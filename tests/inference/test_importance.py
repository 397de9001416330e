"""The waist: log-weights against closed forms, hand computation, and programs that have none."""

from contextlib import nullcontext

import pyro
import pyro.distributions as dist
import pytest
import torch
from oracles import LinearGaussian
from pyro import poutine
from torch.distributions import Gamma, LogNormal, Normal

from pvae.errors import UserError
from pvae.inference import importance
from pvae.inference.families import DiagonalNormal
from pvae.inference.importance import iter_log_weights, log_weights
from pvae.inference.refinement import fixed_guide
from pvae.runtime import torch_state
from pvae.runtime.torch_state import seeded
from pvae.stats import log_mean_exp


@pytest.fixture
def oracle():
    return LinearGaussian(2, 5, scale=0.7)


def diagonal(oracle, x, *, widen=0.0):
    """The best diagonal guide, its standard deviations times exp(widen), and its q_params."""
    q_params = oracle.best(x) + widen * torch.tensor([0.0, 1.0]).repeat_interleave(2)
    return fixed_guide(DiagonalNormal(2), q_params), q_params


def test_weights_under_the_exact_posterior_are_the_evidence(oracle):
    x = oracle.sample(50)
    torch.manual_seed(0)
    log_w = log_weights(oracle.model, oracle.posterior, x, K=20).log_w
    torch.testing.assert_close(log_w.double(), oracle.evidence(x).expand(20, -1), atol=1e-4, rtol=0)


def test_mean_weight_is_the_elbo_for_every_datapoint(oracle):
    x, K = oracle.sample(20), 4000
    guide, q_params = diagonal(oracle, x, widen=0.2)
    torch.manual_seed(1)
    log_w = log_weights(oracle.model, guide, x, K=K).log_w.double()
    # Standard error of each mean: s / sqrt(K), about 0.015 nats.
    assert ((log_w.mean(0) - oracle.elbo(q_params, x)).abs() < 5 * log_w.std(0) / K**0.5).all()


def test_iwae_converges_to_the_evidence_from_below(oracle):
    x, K = oracle.sample(20), 2**15
    guide, q_params = diagonal(oracle, x, widen=0.3)
    with torch.no_grad(), seeded(2):
        log_w = log_weights(oracle.model, guide, x, K=K).log_w.double()
    w = (log_w - oracle.evidence(x)).exp()
    second, third = ((w - 1) ** 2).mean().item(), ((w - 1) ** 3).mean().item()
    shortfalls = {1: (oracle.evidence(x) - oracle.elbo(q_params, x)).mean().item()}
    # Beyond k = 1 by the delta method, to the second order in 1 / k.
    shortfalls |= {k: second / (2 * k) + (0.75 * second**2 - third / 3) / k**2 for k in (8, 32, 128)}
    assert list(shortfalls.values()) == sorted(shortfalls.values(), reverse=True)
    assert min(shortfalls.values()) > 0
    for k, shortfall in shortfalls.items():
        found = (oracle.evidence(x) - log_mean_exp(log_w.view(k, K // k, 20))).mean(-1)
        # Standard error of the mean over groups: 0.0014 nats at k = 1, 0.0007 beyond.
        assert abs(found.mean().item() - shortfall) < 5 * found.std().item() / len(found) ** 0.5


def test_no_pass_is_larger_than_a_chunk(oracle):
    x, K, rows = oracle.sample(100), 1_000, []
    guide, q_params = diagonal(oracle, x)

    def spy(x, index=None):
        trace = poutine.trace(oracle.model).get_trace(x, index)
        rows.append(trace.nodes["z"]["value"].shape[:-1].numel())

    with torch.no_grad(), seeded(3):
        found = log_weights(spy, guide, x, K=K)
    assert found.log_lik.shape == found.log_prior.shape == found.log_q.shape == found.log_w.shape == (K, 100)
    assert max(rows) <= importance.ROWS_PER_PASS
    assert sum(rows) == K * 100
    assert found.latents == {}
    log_w = found.log_w.double()
    # Standard errors: s / sqrt(K), about 0.006 nats.
    assert ((log_w.mean(0) - oracle.elbo(q_params, x)).abs() < 5 * log_w.std(0) / K**0.5).all()


def test_chunks_change_nothing_in_distribution(oracle, monkeypatch):
    x, K = oracle.sample(10), 4000
    guide, _ = diagonal(oracle, x)
    with seeded(4):
        whole = log_weights(oracle.model, guide, x, K=K, keep_latents=True)
    monkeypatch.setattr(importance, "ROWS_PER_PASS", 70)
    with seeded(5):
        parts = log_weights(oracle.model, guide, x, K=K, keep_latents=True)
    assert parts.latents["z"].shape == whole.latents["z"].shape == (K, 10, 2)
    assert len(parts.log_q.unique(dim=0)) == K  # no chunk draws what another drew
    for one, other in ((whole.log_w, parts.log_w), (whole.log_lik, parts.log_lik), (whole.log_q, parts.log_q)):
        for a, b in ((one, other), ((one - one.mean(0)) ** 2, (other - other.mean(0)) ** 2)):
            # Standard error of a difference of two independent means.
            assert ((a.mean(0) - b.mean(0)).abs() < 5 * ((a.var(0) + b.var(0)) / K).sqrt()).all()


@pytest.mark.parametrize("K", [1, 2, 5])
def test_kept_draws_are_those_that_were_scored(oracle, K, monkeypatch):
    monkeypatch.setattr(importance, "ROWS_PER_PASS", 40)
    x = oracle.sample(20)
    guide, q_params = diagonal(oracle, x)
    found = log_weights(oracle.model, guide, x, K=K, keep_latents=True)
    z = found.latents["z"]
    mu, log_sigma = q_params.chunk(2, -1)
    assert z.shape == (K, 20, 2)
    torch.testing.assert_close(found.log_prior, Normal(0.0, 1.0).log_prob(z).sum(-1))
    torch.testing.assert_close(found.log_q, Normal(mu, log_sigma.exp()).log_prob(z).sum(-1))
    torch.testing.assert_close(found.log_lik, oracle.likelihood(oracle.decoder(z)).log_prob(x))


@pytest.mark.parametrize("K", [1, 3])
def test_scales_leave_the_weights_alone(oracle, K):
    x = oracle.sample(20)
    guide, _ = diagonal(oracle, x)

    def subsampled(x, index=None):
        with pyro.plate("data", 1000, subsample=torch.arange(len(x)), dim=-1):
            with poutine.scale(scale=0.1):
                z = pyro.sample("z", oracle.prior())
            pyro.sample("x", oracle.likelihood(oracle.decoder(z)), obs=x)

    with seeded(6):
        plain = log_weights(oracle.model, guide, x, K=K)
    for model, q in ((subsampled, guide), (poutine.scale(oracle.model, 3.0), poutine.scale(guide, 7.0))):
        with seeded(6):
            scaled = log_weights(model, q, x, K=K)
        for name in ("log_lik", "log_prior", "log_q"):
            assert torch.equal(getattr(scaled, name), getattr(plain, name))


@pytest.mark.parametrize("K", [1, 3])
def test_masks_take_sites_out_of_the_weights(oracle, K):
    x, mask = oracle.sample(20), torch.arange(20) % 3 > 0
    guide, _ = diagonal(oracle, x)
    with seeded(7):
        plain = log_weights(oracle.model, guide, x, K=K)
    with seeded(7):
        masked = log_weights(poutine.mask(oracle.model, mask), guide, x, K=K)
    assert torch.equal(masked.log_lik, plain.log_lik * mask)
    assert torch.equal(masked.log_prior, plain.log_prior * mask)
    assert torch.equal(masked.log_q, plain.log_q)


def robust(x, index=None):
    """Two latents, one of them positive, two observed sites, and values that are no random sites."""
    with pyro.plate("data", len(x), dim=-1):
        rate = pyro.sample("rate", dist.Gamma(3.0, 2.0))
        z = pyro.sample("z", dist.Normal(0.0, rate.rsqrt()))
        mean = pyro.deterministic("mean", 2 * z)
        pyro.sample("x", dist.Normal(mean, rate.rsqrt()), obs=x[:, 0])
        pyro.sample("y", dist.Poisson(rate), obs=x[:, 1])


def robust_guide(x, index=None):
    with pyro.plate("data", len(x), dim=-1):
        rate = pyro.sample("rate", dist.LogNormal(0.1 * x[:, 1], 0.5))
        pyro.deterministic("aside", rate + 1)
        pyro.sample("z", dist.Normal(x[:, 0] / (1 + rate), 0.8))


@pytest.mark.parametrize("K", [1, 5])
def test_several_sites_sum_to_the_densities_by_hand(K):
    x = torch.tensor([[0.3, 2.0], [-1.2, 0.0], [2.5, 4.0], [0.0, 1.0]])
    torch.manual_seed(8)
    found = log_weights(robust, robust_guide, x, K=K, keep_latents=True)
    assert found.latents.keys() == {"rate", "z"}
    rate, z = found.latents["rate"], found.latents["z"]
    sd = rate.rsqrt()
    torch.testing.assert_close(
        found.log_lik, Normal(2 * z, sd).log_prob(x[:, 0]) + torch.distributions.Poisson(rate).log_prob(x[:, 1])
    )
    torch.testing.assert_close(
        found.log_prior, Gamma(torch.tensor(3.0), 2.0).log_prob(rate) + Normal(0.0, sd).log_prob(z)
    )
    torch.testing.assert_close(
        found.log_q, LogNormal(0.1 * x[:, 1], 0.5).log_prob(rate) + Normal(x[:, 0] / (1 + rate), 0.8).log_prob(z)
    )


def views(x, index=None):
    """A latent for each row, and one for each of its values in a plate of their own."""
    with pyro.plate("data", len(x), dim=-1):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("views", x.shape[1], dim=-2):
            u = pyro.sample("u", dist.Normal(z, 0.5))
            pyro.sample("x", dist.Normal(u, 0.3), obs=x.T)
            pyro.sample("y", dist.Normal(torch.zeros(x.T.shape), 2.0), obs=x.T**2)


def views_guide(x, index=None):
    with pyro.plate("data", len(x), dim=-1):
        pyro.sample("z", dist.Normal(x.mean(-1), 0.4))
        with pyro.plate("views", x.shape[1], dim=-2):
            pyro.sample("u", dist.Normal(x.T, 0.3))


@pytest.mark.parametrize(("K", "count"), [(1, 4), (3, 4), (4, 4), (5, 3), (2, 1)])
def test_inner_plates_are_summed_for_each_draw_and_row(K, count):
    x = torch.randn(count, 3, generator=torch.Generator().manual_seed(9))
    found = log_weights(views, views_guide, x, K=K, max_plate_nesting=2, keep_latents=True)
    z, u = found.latents["z"], found.latents["u"]
    assert z.shape == (K, count)
    assert u.shape == (K, 3, count)
    likelihood = Normal(u, 0.3).log_prob(x.T) + Normal(0.0, 2.0).log_prob(x.T**2)
    torch.testing.assert_close(found.log_lik, likelihood.sum(1))
    inner = Normal(z.unsqueeze(1), 0.5).log_prob(u).sum(1)
    torch.testing.assert_close(found.log_prior, Normal(0.0, 1.0).log_prob(z) + inner)
    log_q = Normal(x.mean(-1), 0.4).log_prob(z) + Normal(x.T, 0.3).log_prob(u).sum(1)
    torch.testing.assert_close(found.log_q, log_q)


def test_kept_draws_have_one_shape_whatever_the_nesting_and_the_chunks(monkeypatch):
    monkeypatch.setattr(importance, "ROWS_PER_PASS", 16)
    found = log_weights(views, views_guide, torch.zeros(4, 3), K=5, max_plate_nesting=2, keep_latents=True)
    assert found.latents["z"].shape == (5, 4)
    assert found.latents["u"].shape == (5, 3, 4)


def test_gradients_of_the_bound_are_those_of_the_closed_form(oracle):
    x, K = oracle.sample(10), 2000
    oracle.decoder.requires_grad_()
    q_params = (oracle.best(x).detach() + 0.3).requires_grad_()
    exact = torch.autograd.grad(oracle.elbo(q_params, x).sum(), [q_params, oracle.decoder.bias])
    torch.manual_seed(10)
    log_w = log_weights(oracle.model, fixed_guide(DiagonalNormal(2), q_params), x, K=K).log_w
    batches = log_w.view(20, -1, 10).mean(1).sum(-1)
    gradients = [torch.autograd.grad(b, [q_params, oracle.decoder.bias], retain_graph=True) for b in batches]
    found = [torch.stack(g) for g in zip(*gradients, strict=True)]
    for one, by_batch in zip(exact, found, strict=True):
        # Standard error over 20 independent batches of draws; 5 of them with 19 degrees of freedom for 45 entries.
        assert ((by_batch.mean(0) - one).abs() < 5 * by_batch.std(0) / 20**0.5).all()


def program(*sites, dim=-1, plate="data"):
    """Named sites N(0, 1): those that end in '!' are observed, those that begin with '-' stand outside the plate."""

    def run(x, index=None):
        data = pyro.plate(plate, len(x), dim=dim)
        for name in sites:
            with nullcontext() if name.startswith("-") else data:
                pyro.sample(name.strip("-!"), dist.Normal(0.0, 1.0), obs=x[:, 0] if name.endswith("!") else None)

    return run


@pytest.mark.parametrize("K", [1, 2])
@pytest.mark.parametrize(
    ("model", "guide", "message"),
    [
        (program("-w", "x!"), program("-w"), "latent 'w' stands outside"),
        (program("z", "-x!"), program("z"), "observed site 'x' stands outside"),
        (program("z", "x!", plate="rows"), program("z", plate="rows"), "latent 'z' stands outside"),
        (program("z", "x!", dim=-2), program("z", dim=-2), "latent 'z' stands outside"),
        (program("z", "u", "x!"), program("z"), "the model draws 'u', but the guide has no such site"),
        (program("z", "x!"), program("z", "u"), "the guide draws 'u', but the model has no such site"),
    ],
)
def test_programs_without_weights_are_refused_in_one_line(model, guide, message, K):
    with pytest.raises(UserError) as error:
        log_weights(model, guide, torch.zeros(3, 2), K=K, max_plate_nesting=2)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("K", [0, -1])
def test_no_draw_is_refused(oracle, K):
    with pytest.raises(UserError, match=f"K is {K}, but at least 1 draw"):
        log_weights(oracle.model, oracle.posterior, oracle.sample(3), K=K)


def test_a_stream_is_the_log_weights_in_chunks(oracle, monkeypatch):
    monkeypatch.setattr(importance, "ROWS_PER_PASS", 70)
    x = oracle.sample(10)
    guide, _ = diagonal(oracle, x)
    with seeded(11):
        whole = log_weights(oracle.model, guide, x, K=20)
    with seeded(11):
        parts = [w for (w,) in iter_log_weights(oracle.model, [guide], x, K=20)]
    assert [len(part.log_q) for part in parts] == [7, 7, 6]
    for name in ("log_lik", "log_prior", "log_q"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))


def test_guides_of_one_stream_see_the_same_noise(oracle, monkeypatch):
    monkeypatch.setattr(importance, "ROWS_PER_PASS", 70)
    x = oracle.sample(10)
    (one, q_params), (two, wide) = diagonal(oracle, x), diagonal(oracle, x, widen=0.4)
    with seeded(12):
        both = list(iter_log_weights(oracle.model, [one, two], x, K=20, keep_latents=True))
    with seeded(12):
        alone = list(iter_log_weights(oracle.model, [one], x, K=20, keep_latents=True))
    for (a, b), (c,) in zip(both, alone, strict=True):
        assert torch.equal(a.latents["z"], c.latents["z"])  # company changes nothing
        noise = [(w.latents["z"] - own[:, :2]) / own[:, 2:].exp() for w, own in ((a, q_params), (b, wide))]
        torch.testing.assert_close(*noise, atol=1e-5, rtol=1e-5)


class Small:
    """A device on which a program's pass over more than so many rows fails for want of memory."""

    def __init__(self, program, most):
        self.program, self.most, self.passes = program, most, []

    def __call__(self, x, index=None):
        z = poutine.trace(self.program).get_trace(x, index).nodes["z"]["value"]
        self.passes.append(z.shape[:-1].numel())
        if self.passes[-1] > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.fixture
def silent():
    torch_state.warn_once.cache_clear()
    yield
    torch_state.warn_once.cache_clear()


def test_a_pass_that_is_too_large_is_halved_and_told_once(oracle, silent, capsys):
    x, K = oracle.sample(10), 4000
    guide, q_params = diagonal(oracle, x)
    small = Small(oracle.model, 300)
    for seed in (13, 14):
        with torch.no_grad(), seeded(seed):
            log_w = log_weights(small, guide, x, K=K).log_w.double()
        assert log_w.shape == (K, 10)
        assert len(log_w.unique(dim=0)) == K
        assert ((log_w.mean(0) - oracle.elbo(q_params, x)).abs() < 5 * log_w.std(0) / K**0.5).all()
    # 409 draws of 10 rows, then 204, 102, 51 and 25
    assert [size for size in small.passes if size > 300][:4] == [4090, 2040, 1020, 510]
    line = "the device is out of memory: going on with 25 instead of 409 draws for each row at a time\n"
    assert capsys.readouterr().err == line


def test_memory_enough_is_not_talked_of(oracle, silent, capsys):
    x = oracle.sample(10)
    log_weights(Small(oracle.model, 4090), diagonal(oracle, x)[0], x, K=1000)
    assert capsys.readouterr().err == ""


def test_a_single_draw_that_does_not_fit_is_an_error(oracle, silent):
    x = oracle.sample(10)
    with pytest.raises(torch.OutOfMemoryError):
        log_weights(Small(oracle.model, 9), diagonal(oracle, x)[0], x, K=8)


def test_what_a_failed_pass_drew_is_drawn_again():
    def compute(part):
        drawn = torch.rand(4)[part]
        if len(drawn) > 1:
            raise torch.OutOfMemoryError
        return drawn

    with seeded(15):
        halved = list(torch_state.halve_on_oom(compute, 2, 2, "numbers"))
    with seeded(15):
        expected = [torch.rand(4)[:1], torch.rand(4)[1:2]]
    assert all(torch.equal(a, b) for a, b in zip(halved, expected, strict=True))
