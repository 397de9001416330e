"""Missing entries: observed entries alone are scored, whatever value the missing ones hold."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import COLUMNS, LATENT, LIKELIHOODS
from oracles import LinearGaussian
from pyro import poutine
from torch import nn
from torch.distributions import kl_divergence

from pvae.distributions.masked_likelihood import entry_log_prob
from pvae.distributions.univariate import Categorical
from pvae.errors import Incompatible, UserError
from pvae.generative.effect_handlers import MaskMissing, mask_missing
from pvae.generative.networks import MLP
from pvae.generative.priors import StandardNormal
from pvae.generative.vae import VAE
from pvae.inference.families import DiagonalNormal, FullRankNormal
from pvae.inference.importance import log_weights
from pvae.inference.refinement import LocalELBO, default_update_rule, fixed_guide, maximize_local_elbo
from pvae.runtime.pyro_params import module_of
from pvae.runtime.torch_state import seeded

B, K = 6, 4


def program(likelihood):
    with seeded(0):
        decoder = MLP(LATENT, likelihood.params_per_value * COLUMNS, hidden=[4], decodes=True)
        return VAE(decoder, likelihood, StandardNormal(LATENT))


def rows(likelihood, count=B):
    uniform = torch.rand(count, COLUMNS, generator=torch.Generator().manual_seed(1)) * 0.98 + 0.01
    if not likelihood.support.is_discrete:
        return uniform
    return (uniform > 0.5).float() if str(likelihood.support) == "Boolean()" else (4 * uniform).floor()


def some(count=B, columns=COLUMNS):
    """Which entries are there: some of every row but the first, which has none, and the last, which has all."""
    mask = torch.rand(count, columns, generator=torch.Generator().manual_seed(2)) < 0.5
    mask[0], mask[-1] = False, True
    return mask


def posterior(count=B):
    q_params = torch.linspace(-1, 1, count * 2 * LATENT).view(count, -1)
    return fixed_guide(DiagonalNormal(LATENT), q_params)


def by_hand(eta, likelihood, x, mask):
    """The sum over the entries that are there of log p(x_d|z), each a likelihood of one column, [K, B]."""
    outputs = eta.unflatten(-1, (likelihood.params_per_value, COLUMNS))
    single = [likelihood(outputs[..., d]).log_prob(x[:, d : d + 1]) for d in range(COLUMNS)]
    return (torch.stack(single, -1) * mask).sum(-1)


@pytest.fixture(params=LIKELIHOODS)
def likelihood(request):
    return LIKELIHOODS[request.param]()


def test_observed_entries_alone_are_scored(likelihood):
    vae, x, mask = program(likelihood), rows(likelihood), some()
    with seeded(3):
        found = log_weights(mask_missing(vae.model, mask), posterior(), x, K=K, keep_latents=True)
    with seeded(3):
        full = log_weights(vae.model, posterior(), x, K=K)
    exact = by_hand(vae.decoder(found.latents["z"]), likelihood, x, mask)
    assert torch.allclose(found.log_lik, exact, atol=1e-4)
    assert torch.equal(found.log_prior, full.log_prior)
    assert torch.equal(found.log_q, full.log_q)
    assert (found.log_lik[:, 0] == 0).all()
    assert torch.allclose(found.log_lik[:, -1], full.log_lik[:, -1], atol=1e-4)
    assert ((found.log_lik - full.log_lik)[:, 1:-1].abs() > 1e-3).any()


def test_the_value_of_a_missing_entry_changes_no_score_and_no_gradient(likelihood):
    vae, x, mask = program(likelihood), rows(likelihood), some()

    def scored(x, mask):
        vae.zero_grad()
        with seeded(3):
            found = log_weights(mask_missing(vae.model, mask), posterior(), x, K=K).log_lik
        found.sum().backward()
        return found.detach(), [p.grad for p in vae.parameters()]

    exact, gradients = scored(x, mask)
    assert any((g != 0).any() for g in gradients)
    for filled, own in ((torch.where(mask, x, torch.nan), mask), (torch.where(mask, x, -77.5), mask)):
        values, others = scored(filled, own)
        assert torch.equal(values, exact)
        assert all(map(torch.equal, gradients, others))
    values, others = scored(torch.where(mask, x, torch.nan), None)  # NaN says for itself that an entry is missing
    assert torch.equal(values, exact)
    assert all(map(torch.equal, gradients, others))


def test_without_a_mask_a_nan_poisons_the_row():
    vae, x = program(LIKELIHOODS["Gaussian"]()), torch.full((B, COLUMNS), torch.nan)
    with pyro.validation_enabled(False):
        assert log_weights(vae.model, posterior(), x).log_lik.isnan().all()


def test_entries_add_up_to_the_density_of_the_row(likelihood):
    fn, x = program(likelihood).likelihood, rows(likelihood)
    p = fn(torch.linspace(-1, 1, B * likelihood.params_per_value * COLUMNS).view(B, -1))
    assert entry_log_prob(p, x).shape == (B, COLUMNS)
    assert torch.allclose(entry_log_prob(p, x).sum(-1), p.log_prob(x), atol=1e-4)
    assert entry_log_prob(p, x.expand(K, B, -1)).shape == (K, B, COLUMNS)


def test_a_program_that_misses_nothing_scores_as_itself_to_the_bit(likelihood):
    vae, x, found = program(likelihood), rows(likelihood), []
    for model in (
        vae.model,
        mask_missing(vae.model),
        mask_missing(vae.model, torch.ones(B, COLUMNS, dtype=torch.bool)),
    ):
        vae.zero_grad()
        with seeded(3):
            log_lik = log_weights(model, posterior(), x, K=K).log_lik
        log_lik.sum().backward()
        found.append((log_lik.detach(), *(p.grad for p in vae.parameters())))
    assert all(map(torch.equal, found[0], found[1]))
    assert all(map(torch.equal, found[0], found[2]))
    assert module_of(mask_missing(vae.model)) is vae


def test_draws_and_means_are_of_all_entries(likelihood):
    vae, x = program(likelihood), rows(likelihood)
    fn = poutine.trace(mask_missing(vae.model, some())).get_trace(x).nodes["x"]["fn"]
    assert fn.sample().shape == fn.mean.shape == x.shape
    assert fn.support.is_discrete == likelihood.support.is_discrete
    assert fn.expand((K, B)).sample().shape == (K, B, COLUMNS)


class Partly:
    """Rows of a linear Gaussian with missing entries, and what is exactly so of those that are there."""

    def __init__(self, count=40):
        self.oracle = LinearGaussian(2, COLUMNS)
        self.x, self.mask = self.oracle.sample(count), some(count)
        inside = self.oracle.weight * self.mask.double().unsqueeze(-1)
        covariance = torch.linalg.inv(torch.eye(2).double() + inside.mT @ inside / self.oracle.scale**2)
        residual = torch.where(self.mask, self.x.double() - self.oracle.bias, 0).unsqueeze(-1)
        mean = covariance @ inside.mT @ residual / self.oracle.scale**2
        self.posterior = dist.MultivariateNormal(mean.squeeze(-1), covariance)

    def guide(self, x, index=None):
        mean, root = (part.float() for part in (self.posterior.loc, self.posterior.scale_tril))
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.MultivariateNormal(mean, scale_tril=root))

    def evidence(self):
        """log p(x_obs), from the covariance of the entries that are there."""
        oracle, found = self.oracle, []
        covariance = oracle.weight @ oracle.weight.T + oracle.scale**2 * torch.eye(COLUMNS)
        for row, there in zip(self.x.double(), self.mask, strict=True):
            some = dist.MultivariateNormal(oracle.bias[there], covariance[there][:, there])
            found.append(some.log_prob(row[there]) if there.any() else torch.zeros(()).double())
        return torch.stack(found)


def test_under_the_exact_posterior_of_observed_entries_every_weight_is_their_evidence():
    case = Partly()
    w = log_weights(mask_missing(case.oracle.model, case.mask), case.guide, case.x, K=10).log_w
    assert (w - case.evidence()).abs().max() < 2e-4  # float32
    full = log_weights(case.oracle.model, case.guide, case.x, K=10).log_w
    assert (full - case.evidence()).abs().max() > 1


@pytest.mark.parametrize("nan", [True, False])
def test_refinement_finds_the_posterior_of_the_observed_entries(nan):
    case, family = Partly(), FullRankNormal(2)
    program = mask_missing(case.oracle.model, None if nan else case.mask)
    x = torch.where(case.mask, case.x, torch.nan if nan else 0.0)
    bound = LocalELBO(program, family)
    found = maximize_local_elbo(
        bound, torch.zeros(len(x), family.num_params), x, steps=200, rule=default_update_rule(family)
    ).q_params
    q = dist.MultivariateNormal(family(found).mean.double(), scale_tril=family(found).scale_tril.double())
    lost = kl_divergence(q, case.posterior)
    assert lost.mean() < 0.02, lost  # nats; 5 numbers a row, each left with the noise of 8 draws a step
    unmasked = dist.MultivariateNormal(case.oracle.mean(case.x), case.oracle.covariance)
    assert kl_divergence(unmasked, case.posterior).mean() > 0.2


def test_other_supports_are_filled_with_a_possible_value():
    mask, x = torch.tensor([[True, False]]), torch.tensor([[2.0, torch.nan]])
    for fn in (dist.Gamma, dist.LogNormal):
        scale = torch.ones(1, 2, requires_grad=True)
        with MaskMissing(mask), poutine.trace() as seen:
            pyro.sample("x", fn(torch.ones(1, 2), scale).to_event(1), obs=x)
        log_p = seen.trace.nodes["x"]["fn"].log_prob(x)
        log_p.sum().backward()
        assert torch.allclose(log_p, fn(1.0, 1.0).log_prob(torch.tensor(2.0)))
        assert scale.grad[0, 1] == 0
        assert scale.grad[0, 0] != 0


def test_a_site_that_scores_whole_rows_is_refused_by_name():
    class Whole(nn.Module):
        def forward(self, x, index=None):
            with pyro.plate("data", len(x), dim=-1):
                z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                pyro.sample("pixels", dist.MultivariateNormal(z, torch.eye(2)), obs=x)

    x = torch.tensor([[1.0, torch.nan]])
    with pytest.raises(Incompatible, match="'pixels' are missing, but its MultivariateNormal scores whole rows"):
        mask_missing(Whole())(x)
    mask_missing(Whole())(torch.ones(1, 2))  # nothing is missing, nothing is refused
    with pytest.raises(Incompatible, match="scores whole rows"):
        entry_log_prob(dist.MultivariateNormal(torch.zeros(2), torch.eye(2)), torch.zeros(2))


def test_masks_that_do_not_fit_are_mistakes_of_the_user():
    vae, x = program(LIKELIHOODS["Gaussian"]()), torch.zeros(B, COLUMNS)
    with pytest.raises(UserError, match=r"mask is of shape \(4, 5\), but observed site 'x' has \(6, 5\)"):
        mask_missing(vae.model, some(4))(x)
    with pytest.raises(UserError, match="must be bool"):
        mask_missing(vae.model, torch.ones(B, COLUMNS))
    assert isinstance(LIKELIHOODS["Categorical"]()(torch.zeros(4 * COLUMNS)), Categorical)
