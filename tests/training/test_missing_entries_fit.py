"""Training on rows with missing entries: what is there is all that counts, from the file to the page."""

import numpy as np
import pytest
import torch
from cases import COLUMNS, LATENT, LIKELIHOODS
from oracles import LinearGaussian

from pvae.data.dataset import Dataset
from pvae.data.loading import load_data
from pvae.diagnostics.predictive_checks import STATISTICS, run_predictive_checks
from pvae.errors import UserError
from pvae.generative.effect_handlers import mask_missing
from pvae.generative.networks import MLP, ImputeMeans
from pvae.generative.priors import StandardNormal, VampPrior
from pvae.generative.vae import VAE
from pvae.inference.families import DiagonalNormal
from pvae.inference.guides import Amortized, PerDatapoint
from pvae.inference.importance import log_weights
from pvae.inference.refinement import fixed_guide
from pvae.recipes.build import build_model
from pvae.recipes.recipe import Recipe, resolve
from pvae.runtime.torch_state import seeded
from pvae.samplers.log_joint import simulate_joint
from pvae.training.loop import fit
from pvae.training.objectives import ELBO, IWAE, AnalyticKL, DReG, StickingTheLanding
from pvae.training.support_check import check_support

GUIDES = ("Amortized", "PerDatapoint", "SemiAmortized")
OBJECTIVES = {
    "ELBO": ELBO,
    "ELBO(K=3)": lambda: ELBO(K=3),
    "AnalyticKL": AnalyticKL,
    "IWAE": IWAE,
    "DReG": DReG,
    "StickingTheLanding": StickingTheLanding,
}


def holed(x, share=0.5, seed=0):
    """The rows with a share of their entries NaN, at random; each column keeps its first."""
    hidden = torch.rand(x.shape, generator=torch.Generator().manual_seed(seed)) < share
    hidden[0] = False
    return x.masked_fill(hidden, torch.nan)


def dataset(train, test=None):
    """Rows whose entries may be missing."""
    test = train[:4] if test is None else test
    return Dataset("rows", train, train[:0], test, tuple(train.shape[1:]), means=train.nanmean(0))


def rows(likelihood, count=24):
    uniform = torch.rand(count, COLUMNS, generator=torch.Generator().manual_seed(1)) * 0.98 + 0.01
    if not likelihood.support.is_discrete:
        return uniform
    return (uniform > 0.5).float() if str(likelihood.support) == "Boolean()" else (4 * uniform).floor()


def program(likelihood):
    with seeded(0):
        decoder = MLP(LATENT, likelihood.params_per_value * COLUMNS, hidden=[4], decodes=True)
        return VAE(decoder, likelihood, StandardNormal(LATENT))


def amortized(means):
    with seeded(0):
        family = DiagonalNormal(LATENT)
        return Amortized(ImputeMeans(MLP(COLUMNS, family.num_params, hidden=[4]), means), family)


@pytest.fixture(params=LIKELIHOODS)
def likelihood(request):
    return LIKELIHOODS[request.param]()


# Closed forms


class Partly:
    """A linear Gaussian program whose rows lack half of their entries, and its ELBO in closed form."""

    def __init__(self, count=40):
        self.oracle = LinearGaussian(2, COLUMNS)
        self.x = holed(self.oracle.sample(count))
        self.there = ~self.x.isnan()

    def best(self):
        """The best diagonal q_params [B, 4] for the entries that are there: the posterior's mean, 1 / L_ii."""
        inside = self.oracle.weight * self.there.double().unsqueeze(-1)
        precision = torch.eye(2).double() + inside.mT @ inside / self.oracle.scale**2
        residual = torch.where(self.there, self.x.double() - self.oracle.bias, 0).unsqueeze(-1)
        mean = torch.linalg.solve(precision, inside.mT @ residual / self.oracle.scale**2).squeeze(-1)
        return torch.cat([mean, -precision.diagonal(dim1=1, dim2=2).log() / 2], -1)

    def elbo(self, q_params):
        """The ELBO [B] of the entries that are there, of diagonal Gaussians q_params [B, 4]."""
        mu, log_sigma = q_params.double().chunk(2, -1)
        variance, scale = (2 * log_sigma).exp(), self.oracle.scale
        residual = self.x.double().nan_to_num() - mu @ self.oracle.weight.T - self.oracle.bias
        spread = residual**2 + variance @ (self.oracle.weight**2).T
        fits = -(2 * torch.pi * scale**2).log() / 2 - spread / (2 * scale**2)
        return (fits * self.there).sum(-1) - (variance + mu**2 - 1 - 2 * log_sigma).sum(-1) / 2


def test_the_gradient_of_training_is_that_of_the_elbo_of_what_is_there():
    # 200 estimates of 40 rows with 8 draws each; of their mean, the standard error comes from their spread.
    case, family = Partly(), DiagonalNormal(2)
    case.oracle.requires_grad_(True)
    parameters = [*case.oracle.decoder.parameters(), case.oracle.likelihood.log_scale]
    q_params = (case.best().detach().float() + 0.2).requires_grad_()
    exact = torch.autograd.grad(-case.elbo(q_params).sum(), [*parameters, q_params])
    model, found = mask_missing(case.oracle.model), []
    with seeded(1):
        for _ in range(200):
            loss = ELBO(K=8).differentiable_loss(model, fixed_guide(family, q_params), case.x)
            found.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, [*parameters, q_params])]))
    mean, se = torch.stack(found).mean(0), torch.stack(found).std(0) / len(found) ** 0.5
    whole = torch.cat([g.flatten() for g in exact])
    assert ((mean - whole).abs() <= 5 * se + 1e-4 * whole.abs()).all()
    as_zeros = torch.autograd.grad(-case.oracle.elbo(q_params, case.x.nan_to_num()).sum(), q_params)[0].flatten()
    assert (
        (mean - whole)[-q_params.numel() :].abs() < 0.1 * (as_zeros - whole[-q_params.numel() :]).abs()
    ).float().mean() > 0.5


def test_rows_of_parameters_climb_to_the_best_lam_of_what_is_there():
    case, family = Partly(), DiagonalNormal(2)
    model = mask_missing(case.oracle.model)
    guide = PerDatapoint(len(case.x), family, model=model, local_learning_rate=0.05)
    fit(model, guide, case.x, epochs=50, batch_size=40, engine="traced")
    lost = case.elbo(case.best()) - case.elbo(guide.table)
    assert (lost > -1e-6).all()
    assert lost.mean() < 0.03  # nats; rates fall to 0.02, which single draws' noise holds that far from the optimum
    assert (case.elbo(case.best()) - case.elbo(case.oracle.best(case.x.nan_to_num()))).mean() > 0.2


# Values in the place of what is missing


def test_a_decoder_output_of_a_missing_entry_has_no_gradient(likelihood):
    vae, x, seen = program(likelihood), holed(rows(likelihood)), []
    vae.decoder.register_forward_hook(lambda module, given, eta: eta.retain_grad() or seen.append(eta))
    with seeded(2):
        ELBO(K=3).loss_and_grads(mask_missing(vae.model), amortized(x.nanmean(0)), x)
    (eta,) = seen
    slope = eta.grad.unflatten(-1, (likelihood.params_per_value, COLUMNS)).abs().sum(-2)
    missing = x.isnan().expand(3, -1, -1)
    assert (slope[missing] == 0).all()
    assert (slope[~missing] > 0).any()


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
@pytest.mark.parametrize("kind", ["Bernoulli", "Gaussian", "Categorical"])
def test_no_value_in_the_place_of_a_missing_entry_changes_a_loss_or_a_gradient(kind, objective):
    vae, x = program(LIKELIHOODS[kind]()), holed(rows(LIKELIHOODS[kind]()))
    there, family, found = ~x.isnan(), DiagonalNormal(LATENT), []
    for value, mask in ((torch.nan, None), (torch.nan, there), (0.0, there), (7.0, there)):
        q_params = torch.linspace(-1, 1, len(x) * family.num_params).view(len(x), -1).requires_grad_()
        with seeded(3):
            loss = objective().differentiable_loss(
                mask_missing(vae.model, mask), fixed_guide(family, q_params), torch.where(there, x, value)
            )
        found.append((loss.detach(), *torch.autograd.grad(loss, [q_params, *vae.parameters()])))
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))
    assert all(values.isfinite().all() for values in found[0])


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_an_encoder_sees_missing_entries_as_the_values_they_are_filled_with(objective):
    vae, x = program(LIKELIHOODS["Gaussian"]()), holed(rows(LIKELIHOODS["Gaussian"]()))
    guide, there, found = amortized(x.nanmean(0)), ~x.isnan(), []
    for own, mask in ((x, None), (torch.where(there, x, x.nanmean(0)), there)):
        guide.zero_grad()
        with seeded(3):
            loss = objective().loss_and_grads(mask_missing(vae.model, mask), guide, own)
        found.append((torch.tensor(loss), *(p.grad for p in guide.parameters())))
    assert all(map(torch.equal, *found))


# Training


def built(guide, x, missing, **changes):
    data = dataset(x) if missing else Dataset("rows", x, x[:0], x[:4], tuple(x.shape[1:]))
    small = {"latent": 2, "network": {"type": "MLP", "hidden": [8]}, "guide": guide, "missing": missing}
    own = resolve(Recipe(**small | changes))
    return build_model(own, data), data


@pytest.mark.parametrize("likelihood", ["Bernoulli", "Gaussian"])
@pytest.mark.parametrize("guide", GUIDES)
def test_on_complete_rows_training_is_the_same_to_the_bit(guide, likelihood):
    x, found = rows(LIKELIHOODS[likelihood]()), []
    x = x if likelihood == "Bernoulli" else 4 * x - 1  # in standard units
    for missing in (False, True):
        own, data = built(guide, x, missing, likelihood=likelihood)
        report = fit(own.program.model, own.guide, data, epochs=3, batch_size=8, objective=own.objective)
        numbers = [p for m in (own.program, own.guide) for p in m.parameters()]
        found.append((report.history[-1]["objective"], *numbers, getattr(own.guide, "table", torch.zeros(1))))
    assert found[0][0] == found[1][0]
    assert all(map(torch.equal, found[0][1:], found[1][1:]))


@pytest.mark.parametrize("guide", GUIDES)
def test_a_replayed_step_is_the_programs_own_to_the_bit(guide):
    x, found = holed(rows(LIKELIHOODS["Gaussian"]())), []
    for engine in ("pyro", "traced"):
        own, data = built(guide, x, True, likelihood="Gaussian")
        report = fit(own.program.model, own.guide, data, epochs=2, batch_size=8, engine=engine)
        assert report.engine == engine
        numbers = [p for m in (own.program, own.guide) for p in m.parameters()]
        found.append((*numbers, getattr(own.guide, "table", torch.zeros(1))))
    assert all(map(torch.equal, *found))


def test_every_likelihood_takes_finite_steps_and_can_be_traced(likelihood):
    x = holed(rows(likelihood))
    vae, guide = program(likelihood), amortized(x.nanmean(0))
    before = [p.clone() for p in vae.decoder.parameters()]
    data = dataset(x)
    check_support(mask_missing(vae.model), data)
    report = fit(mask_missing(vae.model), guide, data, epochs=1, batch_size=12, engine="traced")
    assert report.engine == "traced"
    assert all(p.isfinite().all() for p in (*vae.parameters(), *guide.parameters()))
    assert not any(map(torch.equal, before, vae.decoder.parameters()))


def test_what_starts_from_rows_sees_them_filled():
    x = holed(4 * rows(LIKELIHOODS["Gaussian"]()) - 1)
    own, _ = built("Amortized", x, True, likelihood="Gaussian", prior={"type": "VampPrior", "pseudo_inputs": 5})
    filled, inner = own.guide.encoder, own.guide.encoder.network
    seen = (torch.where(x.isnan(), filled.values, x) - inner.mean) / inner.scale
    assert seen[x.isnan()].abs().max() < 1e-6  # missing entries are 0 to the network
    assert torch.allclose(seen.mean(0), torch.zeros(COLUMNS), atol=1e-6)
    assert torch.allclose(seen.std(0, correction=0), torch.ones(COLUMNS), atol=1e-5)
    assert isinstance(own.program.prior, VampPrior)
    assert own.program.prior.inputs().isfinite().all()


def test_values_outside_the_support_are_refused_where_they_are_there():
    x = holed(rows(LIKELIHOODS["Bernoulli"]()))
    model = mask_missing(program(LIKELIHOODS["Bernoulli"]()).model)
    check_support(model, dataset(x))
    x[0, 2] = 0.5
    with pytest.raises(UserError, match=r"train row 0, column 2 is 0.5, outside the support of site 'x' \(Bernoulli"):
        check_support(model, dataset(x))


def test_a_model_of_half_missing_digits_imputes_better_than_the_columns_means():
    digits = load_data("digits", binarize="threshold")
    train = holed(digits.train)
    data = Dataset("digits", train, train[:0], digits.test, (8, 8), "threshold", means=train.nanmean(0))
    own = build_model(resolve(Recipe(missing=True, seed=1)), data)
    fit(own.program.model, own.guide, data, epochs=20, learning_rate=2e-3, objective=own.objective, engine="traced")
    test = holed(digits.test, seed=5)
    hidden = test.isnan()
    with seeded(0), torch.no_grad():
        w = log_weights(own.program.model, own.guide, test, K=50, keep_latents=True)
        means = own.program.likelihood(own.program.decoder(w.latents["z"])).mean
    forecast = (w.log_w.softmax(0).unsqueeze(-1) * means).sum(0)
    of_means, own_error = (((guess - digits.test) ** 2 * hidden).sum(1) for guess in (data.means, forecast))
    gain = of_means - own_error
    assert gain.mean() > 5 * gain.std() / len(gain) ** 0.5


# Diagnosis


def test_simulated_rows_miss_what_the_rows_miss():
    x = holed(rows(LIKELIHOODS["Gaussian"]()))
    found = simulate_joint(mask_missing(program(LIKELIHOODS["Gaussian"]()).model), x)
    assert found.x.isnan().equal(x.isnan())
    assert not (found.x == x).any()


def test_replicates_miss_what_the_data_miss():
    # One column lies 3 above the others and is mostly missing: replicates that had it would have another mean.
    oracle = LinearGaussian(2, COLUMNS)
    with torch.no_grad():
        oracle.decoder.bias[0] += 3
    x = oracle.sample(200)
    x[:180, 0] = torch.nan
    model, family = mask_missing(oracle.model), DiagonalNormal(2)
    guide = PerDatapoint(200, family, model=model)
    found = run_predictive_checks(model, guide, x, replicates=100, hidden=0.3, K=50, steps=50)
    names = list(STATISTICS)
    assert found.observed[names.index("mean")].item() == pytest.approx(x.nanmean().item(), abs=1e-5)
    assert found.observed[names.index("largest value")] == x[~x.isnan()].max()
    assert 0.01 < found.statistics_p[names.index("mean")] < 0.99
    assert ((found.pixel_p > 0.005) & (found.pixel_p < 0.995)).all()
    spread = found.replicated[:, names.index("mean")].std()
    assert oracle.bias.mean() - x.nanmean() > 10 * spread  # what whole replicates would show
    assert found.imputation.isfinite().all()


def test_a_row_without_any_entry_has_nothing_to_impute():
    oracle, family = LinearGaussian(2, COLUMNS), DiagonalNormal(2)
    x = holed(oracle.sample(30))
    x[3] = torch.nan
    model = mask_missing(oracle.model)
    guide = PerDatapoint(30, family, model=model)
    found = run_predictive_checks(model, guide, x, replicates=20, K=50, steps=50)
    assert found.imputation.isnan().equal(x.isnan().all(1))
    assert all(np.isfinite(value.mean) for value in found.summary().values())
