"""Laws of objectives, on a linear-Gaussian model whose ELBO, evidence and posterior are known. SE: standard errors."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from oracles import LinearGaussian
from pyro import poutine
from pyro.infer import SVI, TraceMeanField_ELBO
from torch import nn
from torch.distributions import constraints

from pvae.errors import Incompatible, UserError
from pvae.generative.likelihoods import Bernoulli
from pvae.generative.networks import MLP
from pvae.generative.priors import StandardNormal
from pvae.generative.vae import VAE
from pvae.inference.families import Delta, DiagonalNormal, FullRankNormal, MixtureOfNormals
from pvae.inference.guides import Amortized, Guide, PerDatapoint
from pvae.inference.importance import log_weights
from pvae.inference.latents import LatentSite, LatentSites
from pvae.inference.refinement import fixed_guide
from pvae.runtime.pyro_params import LocalModule
from pvae.training import objectives
from pvae.training.loop import fit
from pvae.training.objectives import ELBO, IWAE, AnalyticKL, DReG, NonFiniteLoss, Renyi, StickingTheLanding
from pvae.training.optimizer import FusedAdam

DIM, COLUMNS, ROWS, COPIES = 2, 4, 3, 4000

KINDS = {name: getattr(objectives, name) for name in objectives.__all__}
every = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


class Fixed(Guide):
    """A guide whose q_params [B, P] is its parameter; COPIES of each row share one."""

    def __init__(self, q_params, family):
        super().__init__(family)
        self.q_params = nn.Parameter(q_params.clone())

    def params(self, x, index=None):
        return self.q_params.repeat(len(x) // len(self.q_params), 1)


@pytest.fixture(autouse=True)
def setting(double):
    torch.manual_seed(0)


@pytest.fixture
def oracle():
    return LinearGaussian(DIM, COLUMNS, scale=0.7, conditioning=2.0).double()


def off(oracle, x):
    """A guide somewhat off the best diagonal one."""
    return Fixed(oracle.best(x) + 0.3, DiagonalNormal(DIM))


def bound(objective, oracle, guide, x, copies=COPIES):
    """The objective of each copy of each row, [copies, B]."""
    with torch.no_grad():
        w = objective.tempered(objective.draw(oracle.model, guide, x.repeat(copies, 1), None))
        return objective.bound(w).view(copies, -1)


def gradients(objective, oracle, guide, x, parameter, repeats=200, copies=40):
    """Gradients of the bound's mean, one for each repeat, [repeats, size]."""
    found = []
    for _ in range(repeats):
        loss = objective.differentiable_loss(oracle.model, guide, x.repeat(copies, 1)) / copies
        found.append(-torch.autograd.grad(loss, parameter)[0].flatten())
    return torch.stack(found)


def mean_se(values):
    return values.mean(0), values.std(0) / math.sqrt(len(values))


def agree(values, expected):
    """The mean of the rows is what is expected, within 5 SE, and the SE is small enough to tell."""
    mean, se = mean_se(values)
    assert ((mean - expected).abs() <= 5 * se + 1e-12).all(), (mean, expected, se)
    assert (se <= 0.1 * expected.abs().max()).all()


# Values


def test_bounds_rise_with_k_to_the_evidence(oracle):
    x = oracle.sample(ROWS)
    guide = off(oracle, x)
    found = [mean_se(bound(o, oracle, guide, x)) for o in (ELBO(), IWAE(K=5), IWAE(K=50))]
    exact = [oracle.elbo(guide.q_params, x), None, None, oracle.evidence(x)]
    assert ((found[0][0] - exact[0]).abs() <= 5 * found[0][1]).all()
    for (low, se), (high, other) in zip(found, [*found[1:], (exact[3], torch.zeros(ROWS))], strict=True):
        assert (low <= high + 4 * (se**2 + other**2).sqrt()).all()
    assert (found[1][0] - found[0][0] > 10 * found[0][1]).all()  # the law would see bounds in the wrong order


@every
def test_every_bound_is_tight_at_the_exact_posterior(kind, oracle):
    x = oracle.sample(ROWS)
    guide = Fixed(exact(oracle, x), FullRankNormal(DIM))
    values = bound(kind(K=3), oracle, guide, x, copies=400)
    if kind is AnalyticKL:  # the likelihood alone is sampled
        mean, se = mean_se(values)
        assert ((mean - oracle.evidence(x)).abs() <= 5 * se).all()
    else:
        torch.testing.assert_close(values, oracle.evidence(x).expand_as(values))


def exact(oracle, x):
    """q_params of FullRankNormal at the exact posterior, [B, P]."""
    root = torch.linalg.cholesky(oracle.covariance)
    lower = root[*torch.tril_indices(DIM, DIM, -1)]
    q_params = torch.cat([oracle.mean(x), root.diag().log().expand(len(x), -1), lower.expand(len(x), -1)], 1)
    q = FullRankNormal(DIM)(q_params)
    torch.testing.assert_close(q.covariance_matrix[0], oracle.covariance)
    return q_params


def test_k_draws_average_the_elbo_and_exponents_interpolate(oracle):
    x = oracle.sample(ROWS)
    guide = off(oracle, x)
    same = {}
    for name, objective in {
        "iwae": IWAE(K=7),
        "zero": Renyi(alpha=0.0, K=7),
        "one": Renyi(alpha=1 - 1e-7, K=7),
    }.items():
        torch.manual_seed(3)
        same[name] = bound(objective, oracle, guide, x, copies=5)
    torch.manual_seed(3)
    elbo = bound(ELBO(K=7), oracle, guide, x, copies=5)
    torch.testing.assert_close(same["zero"], same["iwae"])
    torch.testing.assert_close(same["one"], elbo, rtol=1e-4, atol=1e-4)
    half = bound(Renyi(alpha=0.5, K=7), oracle, guide, x).mean()
    assert bound(ELBO(K=7), oracle, guide, x).mean() < half < bound(IWAE(K=7), oracle, guide, x).mean()


def test_analytic_kl_is_pyros_and_less_noisy(oracle):
    x = oracle.sample(ROWS)
    guide = off(oracle, x)
    values = []
    for objective in (AnalyticKL(), TraceMeanField_ELBO()):
        torch.manual_seed(5)
        values.append(objective.loss(oracle.model, guide, x))
    assert values[0] == pytest.approx(values[1])
    mean, se = mean_se(bound(AnalyticKL(), oracle, guide, x))
    assert ((mean - oracle.elbo(guide.q_params, x)).abs() <= 5 * se).all()


def test_analytic_kl_knows_correlated_normals_and_refuses_mixtures(oracle):
    x = oracle.sample(ROWS)
    correlated = Fixed(exact(oracle, x), FullRankNormal(DIM))
    assert math.isfinite(AnalyticKL().loss(oracle.model, correlated, x))
    mixture = MixtureOfNormals(DIM)
    with pytest.raises(Incompatible, match="no closed form for"):
        AnalyticKL().loss(oracle.model, Fixed(mixture.initial_params().expand(ROWS, -1), mixture), x)


# Gradients


@pytest.mark.parametrize(
    "objective",
    [ELBO(), ELBO(K=4), AnalyticKL(), StickingTheLanding(), Renyi(alpha=1 - 1e-9)],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("of", ["guide", "model"])
def test_mean_gradient_is_that_of_the_exact_elbo(objective, of, oracle):
    x = oracle.sample(ROWS)
    guide = off(oracle, x)
    oracle.decoder.weight.requires_grad_()
    parameter = guide.q_params if of == "guide" else oracle.decoder.weight
    (expected,) = torch.autograd.grad(oracle.elbo(guide.q_params, x).sum(), parameter)
    agree(gradients(objective, oracle, guide, x, parameter), expected.flatten())


@pytest.mark.parametrize("beta", [1.0, 0.4])
@pytest.mark.parametrize("of", ["guide", "model"])
def test_dreg_is_iwae_in_mean_and_less_noisy_for_the_guide(beta, of, oracle):
    x = oracle.sample(ROWS)
    guide = off(oracle, x)
    oracle.decoder.weight.requires_grad_()
    parameter = guide.q_params if of == "guide" else oracle.decoder.weight
    one, other = (
        gradients(kind(K=16, kl_weight=beta), oracle, guide, x, parameter, repeats=300, copies=120)
        for kind in (IWAE, DReG)
    )
    (a, se), (b, other_se) = mean_se(one), mean_se(other)
    assert ((a - b).abs() <= 5 * (se**2 + other_se**2).sqrt()).all()
    assert (se < 0.1 * a.abs().max()).all()
    if of == "guide" and beta == 1:
        assert other_se.mean() < 0.5 * se.mean()


def test_dreg_keeps_its_signal_at_large_k(oracle):
    x = oracle.sample(ROWS)
    guide = off(oracle, x)
    ratios = {}
    for kind in (IWAE, DReG):
        for K in (4, 64):
            mean, se = mean_se(gradients(kind(K=K), oracle, guide, x, guide.q_params, repeats=100, copies=10))
            ratios[kind, K] = (mean.norm() / se.norm()).item()
    assert ratios[DReG, 64] > 2 * ratios[IWAE, 64]
    assert ratios[DReG, 64] > ratios[DReG, 4]


@pytest.mark.parametrize("kind", [StickingTheLanding, DReG])
def test_path_gradient_is_zero_at_the_exact_posterior(kind, oracle):
    x = oracle.sample(ROWS)
    guide = Fixed(exact(oracle, x), FullRankNormal(DIM))
    landed = gradients(kind(K=3), oracle, guide, x, guide.q_params, repeats=3, copies=2)
    torch.testing.assert_close(landed, torch.zeros_like(landed), atol=1e-10, rtol=0)
    others = gradients(ELBO(K=3), oracle, guide, x, guide.q_params, repeats=3, copies=2)
    assert others.abs().max() > 0.1


@pytest.mark.parametrize("objective", [StickingTheLanding(K=2), DReG(K=1), ELBO()])
def test_a_path_gradient_of_scalar_latents_stays_in_its_row(objective):
    # ELBO = -(m^2 + s^2) / 2 + log s - ((x - m)^2 + s^2) / 2 + constant, for z ~ N(0, 1), x ~ N(z, 1), q = N(m, s^2).
    x, copies = torch.tensor([[0.5], [-2.0], [1.0]]), 4000
    mean = nn.Parameter(torch.tensor([0.3, 0.1, -0.4]))

    def model(x, index=None):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])

    def guide(x, index=None):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(mean.repeat(copies), 0.6))

    found = []
    for _ in range(30):
        loss = objective.differentiable_loss(model, guide, x.repeat(copies, 1)) / copies
        found.append(-torch.autograd.grad(loss, mean)[0])
    agree(torch.stack(found), (x[:, 0] - 2 * mean).detach())


@pytest.mark.parametrize("objective", [ELBO(K=2), IWAE(), Renyi(alpha=0.3), AnalyticKL(), IWAE(kl_weight=0.3)])
def test_gradient_is_the_values_own_under_fixed_noise(objective, oracle):
    x = oracle.sample(ROWS)
    guide = off(oracle, x)

    def value(q_params):
        torch.manual_seed(1)
        return objective.differentiable_loss(oracle.model, fixed_guide(DiagonalNormal(DIM), q_params), x)

    assert torch.autograd.gradcheck(value, (guide.q_params,))


# Weights


def kl(q_params):
    mean, log_scale = q_params.chunk(2, -1)
    return ((2 * log_scale).exp() + mean**2 - 1 - 2 * log_scale).sum(-1) / 2


@pytest.mark.parametrize("kind", [ELBO, AnalyticKL, StickingTheLanding])
@pytest.mark.parametrize("beta", [0.0, 0.5, 3.0])
def test_kl_weight_weighs_the_kl_alone(kind, beta, oracle):
    x = oracle.sample(ROWS)
    guide = off(oracle, x)
    mean, se = mean_se(bound(kind(kl_weight=beta), oracle, guide, x))
    expected = oracle.elbo(guide.q_params, x) + (1 - beta) * kl(guide.q_params)
    assert ((mean - expected).abs() <= 5 * se).all()
    (slope,) = torch.autograd.grad(expected.sum(), guide.q_params)
    agree(gradients(kind(kl_weight=beta), oracle, guide, x, guide.q_params), slope.flatten())


@every
def test_weight_of_one_changes_no_bit_and_evaluation_never_sees_another(kind, oracle):
    x = oracle.sample(ROWS)
    guide = off(oracle, x)
    found = []
    for objective in (kind(K=2), kind(K=2, kl_weight=1.0, warm_up=5.0)):
        objective.weight = objective.weight_at(5.0)
        torch.manual_seed(2)
        found.append(objective.loss(oracle.model, guide, x))
    assert found[0] == pytest.approx(found[1], rel=1e-12)
    vae, seen = train_with(kind(kl_weight=0.0)), []
    for weight in (0.0, 1.0):
        vae[1].kl_weight = weight
        torch.manual_seed(2)
        seen.append(log_weights(vae[0].model, vae[1].eval(), binary()).log_w)
    assert seen[0].equal(seen[1])


def binary(rows=12):
    return torch.bernoulli(torch.full((rows, COLUMNS), 0.5), generator=torch.Generator().manual_seed(1))


def train_with(objective, source=Amortized, epochs=1, family=DiagonalNormal):
    vae = VAE(MLP(DIM, COLUMNS, hidden=[4]), Bernoulli(), StandardNormal(DIM))
    q = family(DIM)
    if source is PerDatapoint:
        guide = PerDatapoint(12, q, model=vae.model)
    else:
        guide = Amortized(MLP(COLUMNS, q.num_params, hidden=[4]), q)
    report = fit(vae.model, guide, binary(), epochs=epochs, batch_size=5, objective=objective)
    assert all(math.isfinite(row["objective"]) for row in report.history)
    return vae, guide


def test_warm_up_is_linear_and_cycles():
    objective = ELBO(kl_weight=2.0, warm_up=4.0)
    assert [objective.weight_at(epoch) for epoch in (0, 1, 4, 9)] == [0.0, 0.5, 2.0, 2.0]
    cyclical = IWAE(warm_up=2.0, cycle=4.0)
    assert [cyclical.weight_at(epoch) for epoch in (0, 1, 3, 4, 5, 6)] == [0.0, 0.5, 1.0, 0.0, 0.5, 1.0]


def test_training_moves_the_warm_up_and_the_rows_own_bound():
    objective, seen = ELBO(warm_up=2.0), []
    original = objective.loss_and_grads
    objective.loss_and_grads = lambda *args: (seen.append(round(objective.weight, 6)), original(*args))[1]
    _, guide = train_with(objective, PerDatapoint, epochs=3)
    assert seen == [0.0, 0.208333, 0.416667, 0.5, 0.708333, 0.916667, 1.0, 1.0, 1.0]
    assert guide.kl_weight == 1.0
    _, guide = train_with(ELBO(kl_weight=0.3), PerDatapoint)
    assert guide.kl_weight == 0.3
    assert not guide.training  # it is left ready to evaluate, at a KL weight of 1


@every
def test_free_bits_cost_nothing_below_and_nothing_else_above(kind, oracle):
    x = oracle.sample(200)
    guide = off(oracle, x)
    level = kl(guide.q_params).mean().item()

    def found(free_bits):
        torch.manual_seed(4)
        loss = kind(K=2, free_bits=free_bits).differentiable_loss(oracle.model, guide, x)
        return loss, torch.autograd.grad(loss, guide.q_params)[0]

    plain, few, many, more = found(0.0), found(0.01 * level), found(50 * level), found(60 * level)
    assert few[0].item() == pytest.approx(plain[0].item())
    torch.testing.assert_close(few[1], plain[1])
    assert (more[0] - many[0]).item() == pytest.approx(10 * level * len(x))  # a constant penalty
    torch.testing.assert_close(more[1], many[1])
    assert not torch.allclose(many[1], plain[1])


# As Pyro runs them


@every
def test_plate_scale_and_poutine_scale_leave_the_bound_alone(kind, oracle):
    """Pyro scales log-densities before they are exponentiated; the bound of a row must not know of it."""
    x, total = oracle.sample(ROWS), 30
    guide = Fixed(oracle.best(x) + 0.3, DiagonalNormal(DIM))

    def subsampled(x, index=None):
        with pyro.plate("data", total, subsample_size=len(x), subsample=torch.arange(len(x)), dim=-1):
            z = pyro.sample("z", oracle.prior())
            pyro.sample("x", oracle.likelihood(oracle.decoder(z)), obs=x)

    def guided(x, index=None):
        with pyro.plate("data", total, subsample_size=len(x), subsample=torch.arange(len(x)), dim=-1):
            pyro.sample("z", guide.family(guide.params(x)))

    losses = []
    for model, q in (
        (oracle.model, guide),
        (poutine.scale(oracle.model, 0.1), poutine.scale(guide, 0.1)),
        (subsampled, guided),
    ):
        torch.manual_seed(6)
        losses.append(kind(K=3).loss(model, q, x))
    assert losses[1] == pytest.approx(losses[0])
    assert losses[2] == pytest.approx(losses[0] * total / ROWS)


@every
@pytest.mark.parametrize("source", [Amortized, PerDatapoint])
def test_runs_in_pyros_svi(kind, source):
    vae, guide = train_with(kind(), source)
    vae.train(), guide.train()
    x, index = binary(), torch.arange(12)
    objective = kind(K=8)
    loop = SVI(vae.model, guide, FusedAdam(vae, guide, learning_rate=0.01), objective)
    losses = [loop.step(x, index) for _ in range(75)]
    assert sum(losses[-20:]) < sum(losses[:20])


@every
@pytest.mark.parametrize("family", [DiagonalNormal, Delta, FullRankNormal, MixtureOfNormals])
def test_every_family_goes_with_every_objective_or_is_refused(kind, family):
    if kind is AnalyticKL and family is MixtureOfNormals:
        with pytest.raises(Incompatible):
            train_with(kind(), family=family)
        return
    vae, guide = train_with(kind(K=2), family=family)
    vae.train(), guide.train()
    kind(K=2).loss_and_grads(vae.model, guide, binary(), torch.arange(12))
    assert all(p.grad is not None and p.grad.isfinite().all() for m in (vae, guide) for p in m.parameters())


@pytest.mark.parametrize("kind", [IWAE, DReG, Renyi])
def test_a_point_mass_has_one_bound_whatever_k(kind):
    vae, guide = train_with(kind(), family=Delta)
    found = []
    for objective in (ELBO(), kind(K=4)):
        vae.zero_grad(), guide.zero_grad()
        objective.loss_and_grads(vae.model, guide.train(), binary())
        found.append([p.grad.clone() for p in guide.parameters()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_elbo_still_takes_latents_that_are_not_reparametrized():
    def model(x, index=None):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Normal(z, 0.1), obs=x[:, 0])

    class Discrete(LocalModule):
        def __init__(self):
            super().__init__()
            self.logits = nn.Linear(1, 1)

        def forward(self, x, index=None):
            with pyro.plate("data", len(x), dim=-1):
                pyro.sample("z", dist.Bernoulli(logits=self.logits(x)[:, 0]))

    guide, x = Discrete(), torch.ones(20, 1)
    loop = SVI(model, guide, FusedAdam(guide, learning_rate=0.1), ELBO())
    for _ in range(60):
        loop.step(x)
    assert guide.logits(x).min() > 2
    for objective in (StickingTheLanding(), IWAE(), ELBO(K=2), ELBO(warm_up=1.0)):
        with pytest.raises(UserError, match="'z' is not reparametrized"):
            objective.loss_and_grads(model, guide, x)
    assert math.isfinite(IWAE().loss(model, guide, x))  # a value needs no gradient


@every
def test_a_density_that_is_not_finite_stops_before_a_gradient(kind, oracle):
    x = oracle.sample(ROWS)
    guide = off(oracle, x)
    x[0, 0] = math.nan
    with pyro.validation_enabled(False), pytest.raises(NonFiniteLoss, match="not finite"):
        kind(K=2).loss_and_grads(oracle.model, guide, x)
    assert guide.q_params.grad is None


@every
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"K": 0}, "K is 0, but it must be at least 1"),
        ({"kl_weight": -1.0}, "kl_weight is -1.0, but it must be at least 0"),
        ({"warm_up": math.inf}, "warm_up is inf"),
        ({"cycle": -2.0}, "cycle is -2.0"),
        ({"free_bits": math.nan}, "free_bits is nan"),
    ],
    ids=str,
)
def test_bad_option_is_named(kind, options, words):
    with pytest.raises(UserError) as error:
        kind(**options)
    assert f"{kind.__name__}: {words}" in str(error.value)


def test_renyi_has_no_order_one():
    with pytest.raises(UserError, match="alpha is 1"):
        Renyi(alpha=1.0)


class Ladder(LocalModule):
    """A guide that draws z1 and then z2 given z1, for a model that draws them the other way round."""

    def __init__(self):
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(0.5))

    def model(self, x, index=None):
        with pyro.plate("data", len(x), dim=-1):
            above = pyro.sample("z2", dist.Normal(0.0, 1.0))
            z = pyro.sample("z1", dist.Normal(above, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])

    def forward(self, x, index=None):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z1", dist.Normal(x[:, 0], 1.0))
            pyro.sample("z2", dist.Normal(self.slope * z, 1.0))


@pytest.mark.parametrize(
    ("objective", "words"),
    [
        (AnalyticKL(), "in another order than the model"),
        (DReG(), "z1, z2 one by one"),
        (StickingTheLanding(), "jointly"),
    ],
)
def test_chains_of_draws_that_would_bias_an_estimator_are_refused(objective, words):
    ladder = Ladder()
    with pytest.raises(Incompatible, match=words):
        objective.loss_and_grads(ladder.model, ladder, torch.ones(3, 1))
    assert math.isfinite(IWAE().loss_and_grads(ladder.model, ladder, torch.ones(3, 1)))


@every
def test_modules_that_are_not_pyros_are_trained(kind):
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.mean = nn.Parameter(torch.zeros(()))

        def model(self, x, index=None):
            with pyro.plate("data", len(x), dim=-1):
                z = pyro.sample("z", dist.Normal(self.mean, 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])

        def forward(self, x, index=None):
            with pyro.plate("data", len(x), dim=-1):
                pyro.sample("z", dist.Normal(self.mean, 0.7))

    model, guide = Plain(), Plain()
    fit(model.model, guide, 3 + torch.zeros(20, 1), epochs=60, learning_rate=0.1, objective=kind())
    assert model.mean > 0.5
    assert guide.mean > 0.5


def test_dreg_leaves_a_point_mass_over_a_bounded_latent_its_gradient():
    sites = LatentSites((LatentSite("s", (), constraints.positive),))

    def model(x, index=None):
        with pyro.plate("data", len(x), dim=-1):
            s = pyro.sample("s", dist.Gamma(2.0, 1.0))
            pyro.sample("x", dist.Poisson(s), obs=x[:, 0])

    found = []
    for objective in (ELBO(), DReG(K=5), IWAE(K=5)):
        q_params = torch.full((3, 1), 0.2, requires_grad=True)
        loss = objective.differentiable_loss(
            model, fixed_guide(Delta(1), q_params, sites), torch.tensor([[1.0], [2.0], [5.0]])
        )
        found.append(torch.autograd.grad(loss, q_params)[0])
    torch.testing.assert_close(found[1], found[0])
    torch.testing.assert_close(found[2], found[0])


def test_a_cycle_leaves_room_for_its_warm_up():
    with pytest.raises(UserError, match=r"cycle is 5.0, but it must be longer than the warm-up of 10.0 epochs"):
        IWAE(warm_up=10.0, cycle=5.0)
