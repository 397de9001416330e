"""Restored rows: against conditional Gaussians and quadrature, what is there to the bit, and what can't be restored."""

from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import COLUMNS, LATENT, LIKELIHOODS
from oracles import SOURCES, LinearGaussian
from torch import nn

from pvae.applications import restoration
from pvae.applications.restoration import COMPLETE, denoise, impute
from pvae.errors import Incompatible, UserError
from pvae.generative.effect_handlers import mask_missing
from pvae.generative.likelihoods import Bernoulli, Categorical, Gaussian, StudentT
from pvae.generative.networks import MLP, ImputeMeans
from pvae.generative.noise import FlipNoise, GaussianNoise
from pvae.generative.priors import StandardNormal
from pvae.generative.vae import VAE
from pvae.inference.families import Delta, DiagonalNormal, FullRankNormal
from pvae.inference.guides import Amortized
from pvae.runtime.torch_state import seeded
from pvae.samplers.posterior_draws import METHODS

D, M, B = 2, 6, 40
INDEX = torch.arange(6)


def amortized(family, columns=M):
    """A guide that was never fitted: its q_params is no more than a start."""
    with seeded(0):
        return Amortized(nn.Linear(columns, family.num_params), family)


def gaps(rows=B, columns=M):
    """Which entries are there: none of the first row, all of the last."""
    there = torch.rand(rows, columns, generator=torch.Generator().manual_seed(4)) < 0.5
    there[0], there[-1] = False, True
    return there


def tolerance(restored, sd):
    """Five standard errors of weighted means of values with deviations sd [B, C], and what draws without weights leave.

    A guide's draws go without weights where 95% of them are effective: by Cauchy and Schwarz a mean then errs by at
    most sqrt(1 / 0.95 - 1) deviations.
    """
    unweighted = restored.method == METHODS.index("guide")
    return (5 / restored.ess.double().sqrt() + 0.23 * unweighted)[:, None] * sd


class Conditional:
    """p(x | some entries of y) of a linear Gaussian, row by row, with y = x + noise."""

    def __init__(self, oracle, y, there, noise=0.0):
        covariance = oracle.weight @ oracle.weight.T + oracle.scale**2 * torch.eye(len(oracle.weight))
        means, covariances, self.of_codes = [], [], []
        for row, seen in zip(y.double(), there, strict=True):
            known = covariance[seen][:, seen] + noise**2 * torch.eye(int(seen.sum()))
            gain = covariance[:, seen] @ torch.linalg.inv(known)
            means.append(oracle.bias + gain @ (row - oracle.bias)[seen])
            covariances.append(covariance - gain @ covariance[seen])
            # The part that codes tell: the variance of E[x|y, z], by which a weighed mean errs.
            inside = oracle.weight[seen].T @ oracle.weight[seen] / (oracle.scale**2 + noise**2)
            self.of_codes.append(
                (oracle.weight @ torch.linalg.inv(torch.eye(len(inside)) + inside) @ oracle.weight.T).diag()
            )
        self.mean, self.covariance = torch.stack(means), torch.stack(covariances)
        self.sd, self.of_codes = self.covariance.diagonal(dim1=1, dim2=2).sqrt(), torch.stack(self.of_codes)


@pytest.fixture(scope="module")
def oracle():
    return LinearGaussian(D, M)


@pytest.mark.parametrize("family", [FullRankNormal, DiagonalNormal])
def test_missing_entries_have_the_mean_and_variance_of_the_conditional_gaussian(oracle, family):
    x, there = oracle.sample(B), gaps()
    found = impute(oracle.model, amortized(family(D)), x.where(there, torch.nan), K=2000)
    exact, away = Conditional(oracle, x, there), ~there
    allowed = tolerance(found, exact.of_codes.sqrt())
    assert found.ess[:-1].min() > 200
    assert found.ess[-1].isnan()
    assert ((found.x - exact.mean)[away].abs() < allowed[away]).all()
    spread = (found.sd - exact.sd)[away].abs() / exact.sd[away]
    assert (spread < 5 * (2 / found.ess[:-1].min().item()) ** 0.5 / 2).all()
    assert (found.sd[there] == 0).all()
    unconditional = (oracle.bias - exact.mean)[away].abs()
    assert (unconditional > allowed[away]).double().mean() > 0.5  # this can fail


def test_draws_of_missing_entries_are_joint(oracle):
    there = torch.tensor([[True, True, True, False, False, False], [False] * M])
    x, S = oracle.sample(2), 8000
    found = impute(oracle.model, amortized(FullRankNormal(D)), x, observed=there, K=2000, draws=S)
    exact = Conditional(oracle, x, there)
    for row in range(2):
        away = ~there[row]
        drawn, covariance = found.draws[:, row, away].double(), exact.covariance[row][away][:, away]
        # S draws of K weighed codes, of which ess count.
        n = 1 / (1 / S + 1 / found.ess[row].item())
        variances = covariance.diag()
        assert ((drawn.mean(0) - exact.mean[row, away]).abs() < 5 * (variances / n).sqrt()).all()
        error = (variances[:, None] * variances + covariance**2).div(n).sqrt()
        assert ((drawn.T.cov() - covariance).abs() < 5 * error).all()
    assert (covariance - covariance.diag().diag()).abs().max() > 5 * error.max()


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("scale", [0.3, 1.0])
def test_noise_is_taken_away_as_the_conditional_gaussian_has_it(oracle, scale, missing):
    x = oracle.sample(B)
    with seeded(5):
        y = GaussianNoise(scale=scale).add_to(x)
    there = gaps() if missing else torch.ones_like(x, dtype=torch.bool)
    guide, noise = amortized(FullRankNormal(D)), GaussianNoise(scale=scale)
    found = denoise(oracle.model, guide, y.where(there, torch.nan), noise, K=2000)
    exact = Conditional(oracle, y, there, scale)
    allowed = tolerance(found, exact.of_codes.sqrt())
    assert ((found.x - exact.mean).abs() < allowed).all()
    assert ((found.sd / exact.sd - 1).abs() < 5 * (2 / found.ess.min().item()) ** 0.5 / 2).all()
    other = denoise(oracle.model, guide, y.where(there, torch.nan), GaussianNoise(scale=2 * scale), K=2000)
    assert ((other.x - exact.mean).abs() > allowed).double().mean() > 0.3


def bits():
    """Binary rows of one latent, of which integrals are sums over a line; p(x = 1|z) [G, M] and p(z) there, [G]."""
    with seeded(1):
        vae = VAE(nn.Linear(1, M), Bernoulli(), StandardNormal(1)).requires_grad_(False).eval()
    vae.decoder.weight.mul_(3)
    line = torch.linspace(-8, 8, 2001)[:, None]
    return vae, vae.decoder(line).sigmoid().double(), dist.Normal(0.0, 1.0).log_prob(line[:, 0]).double()


NOISES = {
    "flips": (FlipNoise(rate=0.2), lambda y, k: torch.where(y == k, 0.8, 0.2)),
    "gaussian": (GaussianNoise(scale=0.7), lambda y, k: dist.Normal(float(k), 0.7).log_prob(y).exp()),
}


@pytest.mark.parametrize("name", NOISES)
def test_bits_behind_noise_by_quadrature(name):
    (noise, channel), (vae, one, prior) = NOISES[name], bits()
    with seeded(2):
        y = noise.add_to((torch.rand(B, M) < 0.5).float())
    found = denoise(vae.model, amortized(DiagonalNormal(1)), y, noise, K=4000)
    ones, zeros = one[:, None] * channel(y, 1), (1 - one[:, None]) * channel(y, 0)
    weights = ((ones + zeros).log().sum(-1) + prior[:, None]).softmax(0)[..., None]
    each = ones / (ones + zeros)
    mean = (weights * each).sum(0)
    sd = (weights * (each - mean) ** 2).sum(0).sqrt()
    assert ((found.x - mean).abs() < tolerance(found, sd) + 1e-4).all()
    assert torch.allclose(found.sd**2, found.x * (1 - found.x), atol=1e-4)


def test_missing_bits_by_quadrature():
    vae, one, prior = bits()
    x, there = (torch.rand(B, M, generator=torch.Generator().manual_seed(1)) < 0.5).float(), gaps()
    found = impute(vae.model, amortized(DiagonalNormal(1)), x, observed=there, K=4000)
    scores = torch.where(x == 1, one[:, None], 1 - one[:, None]).log().where(there, 0).sum(-1)
    weights = (scores + prior[:, None]).softmax(0)[..., None]
    mean = (weights * one[:, None]).sum(0)
    sd = (weights * (one[:, None] - mean) ** 2).sum(0).sqrt()
    assert ((found.x - mean).abs() < tolerance(found, sd) + 1e-4)[~there].all()


def fitted(likelihood):
    with seeded(0):
        decoder = MLP(LATENT, likelihood.params_per_value * COLUMNS, hidden=[4], decodes=True)
        return VAE(decoder, likelihood, StandardNormal(LATENT)), amortized(DiagonalNormal(LATENT), COLUMNS)


def drawn(vae, count=5):
    """Rows of the program's own."""
    with seeded(3), torch.no_grad():
        return vae.likelihood(vae.decoder(torch.randn(count, LATENT))).sample()


@pytest.fixture(params=LIKELIHOODS)
def likelihood(request):
    return LIKELIHOODS[request.param]()


def test_what_is_there_stays_to_the_bit_and_draws_are_possible(likelihood):
    vae, guide = fitted(likelihood)
    x, there = drawn(vae), gaps(5, COLUMNS)
    outside = torch.get_rng_state()
    found = impute(vae.model, guide, x, observed=there, K=10, steps=3, draws=2)
    assert torch.equal(torch.get_rng_state(), outside)
    assert torch.equal(found.x[there], x[there])
    assert torch.equal(found.draws[:, there], x[there].expand(2, -1))
    assert found.x.isfinite().all()
    assert (found.sd[~there] > 0).all()
    assert likelihood.support.check(found.draws).all()
    assert found.ess[-1].isnan()
    assert found.method[-1] == COMPLETE
    assert found.reliable.all()
    blank = impute(vae.model, guide, x.where(there, torch.nan), K=10, steps=3, draws=2)
    assert torch.equal(blank.draws, found.draws)
    assert torch.equal(blank.x, found.x)


def test_next_to_no_noise_leaves_the_row_as_it_is(likelihood):
    vae, guide = fitted(likelihood)
    x = drawn(vae)
    outside = torch.get_rng_state()
    found = denoise(vae.model, guide, x, GaussianNoise(scale=1e-4), K=10, steps=3)
    assert torch.equal(torch.get_rng_state(), outside)
    assert torch.allclose(found.x, x, atol=1e-3)
    assert (found.sd < 0.01).all()


def test_strong_noise_leaves_rows_within_the_support_and_another_seed_gives_others(likelihood):
    vae, guide = fitted(likelihood)
    with seeded(6):
        y = GaussianNoise(scale=1.0).add_to(drawn(vae))
    one, other = (denoise(vae.model, guide, y, GaussianNoise(scale=1.0), K=10, steps=3, seed=s) for s in (0, 1))
    assert not torch.equal(one.x, other.x)
    inside = likelihood.support
    low, high = getattr(inside, "lower_bound", -torch.inf), getattr(inside, "upper_bound", torch.inf)
    assert (one.x >= low).all()
    assert (one.x <= high).all()


@pytest.mark.parametrize("values", [2, 40])
def test_rows_times_draws_times_levels_are_bounded(values, monkeypatch):
    """Of a likelihood whose values are summed over, however many draws are asked for."""
    monkeypatch.setattr(restoration, "ENUMERATED", 20_000)
    with seeded(0):
        likelihood = Bernoulli() if values == 2 else Categorical(levels=values)
        decoder = nn.Linear(LATENT, COLUMNS * likelihood.params_per_value)
    vae, seen, own = VAE(decoder, likelihood, StandardNormal(LATENT)), [], decoder.forward
    monkeypatch.setattr(decoder, "forward", lambda z: seen.append(len(z)) or own(z))
    x = torch.ones(9, COLUMNS)
    denoise(vae.model, amortized(DiagonalNormal(LATENT), COLUMNS), x, GaussianNoise(scale=0.5), K=900, steps=2)
    assert max(seen) * values <= 20_000
    assert max(seen) * values > 20_000 / 4  # and not in far smaller pieces


class Elsewhere:
    """An index that can be used once it has been brought to the rows' device."""

    def __init__(self, index):
        self.index = index

    def to(self, device):
        return self.index.to(device)


def test_an_index_on_another_device_is_brought_to_the_rows(oracle):
    x, guide, options = oracle.sample(6), SOURCES["PerDatapoint"](oracle.model, D, M, 6), {"K": 3, "steps": 2}
    holes = x.where(gaps(6), torch.nan)
    for use, rows in ((impute, holes), (partial(denoise, noise=GaussianNoise(scale=0.5)), x)):
        one, other = (use(oracle.model, guide, rows, index=at, **options) for at in (INDEX, Elsewhere(INDEX)))
        assert one.x.equal(other.x)


def test_nothing_missing_is_not_looked_at(oracle):
    x, counted = oracle.sample(3), []
    found = impute(oracle.model, amortized(DiagonalNormal(D)), x, draws=4, progress=counted.append)
    assert torch.equal(found.x, x)
    assert torch.equal(found.draws, x.expand(4, 3, M))
    assert not found.sd.any()
    assert found.ess.isnan().all()
    assert found.reliable.all()
    assert not found.counts()
    assert not counted
    impute(oracle.model, amortized(DiagonalNormal(D)), x.where(gaps(3), torch.nan), K=2, progress=counted.append)
    assert sum(counted) == 2  # the third row has everything


def best_diagonal(oracle, family):
    """The guide whose encoder gives each whole row the best independent normals."""
    guide, to_mean = Amortized(nn.Linear(oracle.bias.numel(), family.num_params), family), oracle.mean
    origin, D = torch.zeros(1, oracle.bias.numel()), family.dim
    with torch.no_grad():
        guide.encoder.weight.zero_()
        guide.encoder.weight[:D] = (to_mean(torch.eye(oracle.bias.numel())) - to_mean(origin)).T
        guide.encoder.bias[:] = torch.cat([to_mean(origin)[0], -oracle.precision.diag().log() / 2])
    return guide


def test_spreads_are_right_where_the_family_cannot_hold_the_posterior():
    """Five columns of three latents on ridges, half missing, independent normals: against the conditional Gaussian."""
    oracle = LinearGaussian(3, 5, scale=0.1, conditioning=10.0, seed=3)
    there, family = torch.rand(300, 5, generator=torch.Generator().manual_seed(1)) < 0.5, DiagonalNormal(3)
    x, away = oracle.sample(300), ~there
    restored = impute(oracle.model, best_diagonal(oracle, family), x, observed=there)
    exact = Conditional(oracle, x, there)
    ratio = (restored.sd / exact.sd)[away]
    assert 0.95 < ratio.median() < 1.05
    assert ratio.quantile(0.05) > 0.8
    assert restored.reliable.all()
    for missing in range(1, 5):
        entries = away & (away.sum(1, keepdim=True) == missing)
        covered, expected = (
            ((x - mean) / sd)[entries].abs() < 1.96 for mean, sd in ((restored.x, restored.sd), (exact.mean, exact.sd))
        )
        share = expected.double().mean()
        se = (share * (1 - share) / entries.sum()).sqrt()
        assert abs(covered.double().mean() - share) < 2 * se + 1e-9
    # The best independent normals themselves leave too little: this can fail.
    narrow = [oracle.weight[seen].T @ oracle.weight[seen] / oracle.scale**2 + torch.eye(3) for seen in there]
    variance = torch.stack([(oracle.weight**2) @ (1 / p.diag()) + oracle.scale**2 for p in narrow])
    assert (variance.sqrt() / exact.sd)[away].quantile(0.05) < 0.5


class Folded(nn.Module):
    """|z| and z: the first leaves two modes of the second."""

    def forward(self, z):
        return torch.cat([z.abs(), z], -1)


def test_both_modes_are_imputed():
    vae = VAE(Folded(), Gaussian(scale=0.1), StandardNormal(1))
    guide = amortized(DiagonalNormal(1), 2)
    nn.init.zeros_(guide.encoder.weight)
    guide.encoder.bias.data = torch.tensor([1.0, -2.3])  # sits on the upper mode
    x = torch.tensor([[0.7, torch.nan], [1.5, torch.nan]])
    restored = impute(vae.model, guide, x, draws=400)
    line = torch.linspace(-4, 4, 4001).double()
    log_p = -((x[:, :1].double() - line.abs()) ** 2) / 0.02 - line**2 / 2
    second = (log_p.softmax(1) * line**2).sum(1)
    # The sign of a mode, from ess draws or from 400 of them.
    assert (restored.x[:, 1].abs() < 5 * (second / restored.ess).sqrt()).all()
    assert ((restored.sd[:, 1] / (second + 0.01).sqrt() - 1).abs() < 0.02).all()
    assert ((restored.draws[..., 1] > 0).double().mean(0) - 0.5).abs().max() < 5 * 0.5 / 400**0.5
    assert restored.reliable.all()


class Rough(nn.Module):
    """A wave of some two hundred crests, in which no method meets them all, beside the latent itself."""

    def forward(self, z):
        return torch.cat([(300 * z).sin(), z], -1)


def test_rows_on_which_every_method_fails_are_named():
    vae = VAE(Rough(), Gaussian(scale=0.01), StandardNormal(1))
    x = torch.tensor([[0.5, torch.nan], [torch.nan, torch.nan], [0.5, 0.2]])
    restored = impute(vae.model, amortized(DiagonalNormal(1), 2), x)
    assert restored.reliable.tolist() == [False, True, True]
    assert restored.method.tolist()[0] == METHODS.index("none")
    assert restored.method.tolist()[2] == COMPLETE
    assert restored.counts()["none"] == 1
    assert restored.summary()["reliable"].mean == 0.5


def test_an_encoder_that_knows_nothing_and_hardly_any_search_leave_the_exact_error(oracle):
    x, there = oracle.sample(100), gaps(100)
    restored = impute(oracle.model, amortized(DiagonalNormal(D)), x, observed=there, steps=1)
    by_means, exact = oracle.bias.float().expand_as(x), Conditional(oracle, x, there).mean
    error, largest, least = ((values - x)[~there].square().mean() for values in (restored.x, by_means, exact))
    assert error < 1.02 * least
    assert largest > 1.05 * least


@pytest.mark.parametrize("source", SOURCES)
def test_any_source_of_lam_and_a_program_trained_with_gaps(oracle, source):
    x, there = oracle.sample(10), gaps(10)
    guide = SOURCES[source](oracle.model, D, M, 10)
    rows, index = x.where(there, torch.nan), torch.arange(10)
    exact = Conditional(oracle, x, there).mean.where(~there, x)
    for program in (oracle.model, mask_missing(oracle.model)):
        found = impute(program, guide, rows, index, K=500)
        assert (found.x - exact).abs().max() < 0.5
        assert (found.x - exact).square().mean() < 0.01
    assert denoise(mask_missing(oracle.model), guide, x, GaussianNoise(), index, K=5, steps=2).x.isfinite().all()


def test_an_encoder_made_for_gaps_sees_them_and_another_sees_means(oracle):
    class Seeing(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.seen = inner, []

        def forward(self, x):
            self.seen.append(x)
            return self.inner(x)

    x, there, means = oracle.sample(5), gaps(5), torch.arange(float(M))
    family = DiagonalNormal(D)
    plain, made = Seeing(nn.Linear(M, family.num_params)), Seeing(ImputeMeans(nn.Linear(M, family.num_params), means))
    for encoder, filling in ((plain, means), (made, torch.nan)):
        impute(oracle.model, Amortized(encoder, family), x, observed=there, means=means, K=2, steps=1)
        away = encoder.seen[-1][~there[:-1]]
        expected = torch.where(there, x, filling)[:-1][~there[:-1]]
        assert torch.equal(away.nan_to_num(-99), expected.nan_to_num(-99))


def test_a_point_mass_takes_one_draw(oracle):
    x, there = oracle.sample(5), gaps(5)
    guide = amortized(Delta(D))
    found = impute(oracle.model, guide, x, observed=there)
    assert torch.allclose(found.ess[:-1], torch.ones(4))
    assert torch.allclose(found.sd[~there], oracle.scale.float())
    assert found.reliable.tolist() == 4 * [False] + [True]  # nothing checks a point mass
    assert denoise(oracle.model, guide, x, GaussianNoise(scale=0.1)).ess.eq(1).all()


class Labelled(nn.Module):
    """Columns 0 to M - 1 are observed, the last two tell their mean."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(D, M) / 2)

    def model(self, x, index=None):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", StandardNormal(D)())
            shift = 10 * x[:, M:].argmax(1, keepdim=True)
            pyro.sample("x", Gaussian(spread="fixed")(z @ self.weight + shift), obs=x[:, :M])


def test_columns_that_the_program_is_given_are_used_and_never_missing():
    program = Labelled()
    guide = amortized(DiagonalNormal(D), M + 2)
    x = torch.cat([torch.zeros(2, M), torch.eye(2)], 1)
    x[1, :M] += 10
    blank = x.clone()
    blank[:, 0] = torch.nan
    found = impute(program.model, guide, blank)
    assert found.x.shape == (2, M)
    assert (found.x[:, 0] - x[:, 0]).abs().max() < 1
    assert (denoise(program.model, guide, x, GaussianNoise()).x - x[:, :M]).abs().max() < 1
    blank[1, M + 1] = torch.nan
    with pytest.raises(UserError, match="row 1, column 7 is missing, but the program is given it"):
        impute(program.model, guide, blank)


def whole(x, index=None):
    with pyro.plate("data", len(x), dim=-1):
        z = pyro.sample("z", StandardNormal(D)())
        pyro.sample("x", dist.MultivariateNormal(z @ torch.ones(D, M), torch.eye(M)), obs=x)


class Holder(nn.Module):
    def __init__(self, program):
        super().__init__()
        self.program = program

    def forward(self, x, index=None):
        return self.program(x, index)


def scaled(x, index=None):
    with pyro.plate("data", len(x), dim=-1):
        z = pyro.sample("z", StandardNormal(D)())
        pyro.sample("x", dist.Normal(z @ torch.ones(D, M), 1.0).to_event(1), obs=x / 2)


def binary():
    return VAE(nn.Linear(D, M), Bernoulli(), StandardNormal(D)).model


def heavy():
    return VAE(nn.Linear(D, M), StudentT(df=2.0), StandardNormal(D)).model


X = torch.ones(2, M)
GAP = X.clone().index_fill(1, torch.tensor([3]), torch.nan)
GUIDE = amortized(DiagonalNormal(D))
HALF, NOISE = torch.full((2, M), 0.5), GaussianNoise()

WRONG = {
    "K": (lambda: impute(binary(), GUIDE, GAP, K=0), UserError, "impute: K is 0"),
    "draws": (lambda: impute(binary(), GUIDE, GAP, draws=0), UserError, "impute: draws is 0"),
    "steps": (lambda: denoise(binary(), GUIDE, X, NOISE, steps=0), UserError, "denoise: steps is 0"),
    "guide": (lambda: impute(binary(), Holder(whole), GAP), UserError, "needs a guide with a family.*Holder has none"),
    "mask's type": (
        lambda: impute(binary(), GUIDE, X, observed=X),
        UserError,
        "the mask is torch.float32.*must be bool",
    ),
    "mask's shape": (
        lambda: impute(binary(), GUIDE, X, observed=torch.ones(3, M, dtype=torch.bool)),
        UserError,
        r"of shape \(3, 6\).* of the rows' shape \(2, 6\)",
    ),
    "means": (lambda: impute(binary(), GUIDE, GAP, means=torch.zeros(2)), UserError, r"means have shape \(2,\)"),
    "no rows": (lambda: denoise(binary(), GUIDE, X[:0], NOISE), UserError, "no rows are given"),
    "no rows to impute": (lambda: impute(binary(), GUIDE, X[:0]), UserError, "no rows are given"),
    "no table": (lambda: impute(binary(), GUIDE, X[0]), UserError, r"shape \(6,\), but a table"),
    "support": (lambda: impute(binary(), GUIDE, HALF), UserError, "row 0, column 0 is 0.5, which is no value of"),
    "noisy support": (lambda: denoise(binary(), GUIDE, HALF, FlipNoise()), UserError, "is 0.5, which is no value of"),
    "infinite": (lambda: denoise(binary(), GUIDE, X / 0, NOISE), UserError, "row 0, column 0 is inf"),
    "whole rows": (lambda: impute(Holder(whole), GUIDE, GAP), Incompatible, "scores whole rows"),
    "whole noisy rows": (lambda: denoise(Holder(whole), GUIDE, X, NOISE), Incompatible, "scores whole rows"),
    "other values": (lambda: impute(Holder(scaled), GUIDE, GAP), Incompatible, "not of the rows' own columns"),
    "no variance": (
        lambda: denoise(heavy(), GUIDE, X, NOISE),
        Incompatible,
        "'x' is StudentT, which has no finite var",
    ),
    "no bits": (
        lambda: denoise(VAE(nn.Linear(D, M), Gaussian(), StandardNormal(D)).model, GUIDE, X, FlipNoise()),
        Incompatible,
        "FlipNoise takes binary values",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_mistakes_are_told(name):
    call, kind, line = WRONG[name]
    with pytest.raises(kind, match=line):
        call()
