"""Laws of every component. A mean of N draws may stray 5 standard errors, SE = sd / sqrt(N), from what it estimates."""

import math

import pyro.distributions as dist
import pytest
import torch
from cases import COLUMNS, FAMILIES, LATENT, LIKELIHOODS, NETWORKS, PRIORS
from torch import Tensor
from torch.distributions import biject_to, constraints

from pvae import families, likelihoods, networks, priors
from pvae.errors import UserError

N = 40_000
POINT = {name: make for name, make in FAMILIES.items() if make().point_mass}
SMOOTH = {name: make for name, make in FAMILIES.items() if not make().point_mass}
NATURAL = {name: make for name, make in FAMILIES.items() if type(make()).natural is not families.Family.natural}


def each(*tables):
    """Run a law on every case of some tables."""
    return pytest.mark.parametrize("make", [pytest.param(m, id=n) for table in tables for n, m in table.items()])


@pytest.fixture(autouse=True)
def seeded(double):
    torch.manual_seed(0)


def given(component, *batch):
    """What the component is called with: random inputs, eta or lam of a batch shape; nothing for a prior."""
    match component:
        case priors.Prior():
            return ()
        case likelihoods.Likelihood():
            size = COLUMNS * component.params_per_value
        case families.Family():
            size = component.size
        case _:
            size = COLUMNS
    return (torch.randn(*batch, size).requires_grad_(),)


def outcome(component, *inputs, seed=0):
    """What a component makes of its inputs: a network's values, or a draw and its log-density, [..., event + 1]."""
    torch.manual_seed(seed)
    made = component(*inputs)
    if isinstance(made, Tensor):
        return made
    draw = made.sample()
    return torch.cat([draw, made.log_prob(draw)[..., None]], -1)


def se(values):
    return values.std(0) / math.sqrt(len(values))


def scores(component, theta):
    """N draws x and their scores d log p(x) / d theta, [N, P]."""
    rows = theta.detach().expand(N, -1).clone().requires_grad_()
    made = component(rows)
    draws = made.sample()
    return draws, torch.autograd.grad(made.log_prob(draws).sum(), rows)[0]


@pytest.mark.parametrize(
    ("module", "cases"),
    [(likelihoods, LIKELIHOODS), (priors, PRIORS), (families, FAMILIES), (networks, NETWORKS)],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_every_component_is_a_case(module, cases):
    assert sorted(cases) == sorted(module.__all__)
    assert all(type(make()) is getattr(module, name) for name, make in cases.items())


@each(LIKELIHOODS, FAMILIES)
@pytest.mark.parametrize("batch", [(), (4,), (2, 4)], ids=str)
def test_batch_shape_is_the_parameters_and_event_shape_one_row(make, batch):
    component = make()
    made = component(*given(component, *batch))
    event = (COLUMNS,) if isinstance(component, likelihoods.Likelihood) else (LATENT,)
    assert (made.batch_shape, made.event_shape) == (batch, event)
    for lead in ((), (7,), (6, 7)):
        draws = made.sample(lead)
        assert draws.shape == lead + batch + event
        assert made.log_prob(draws).shape == lead + batch


@each(PRIORS)
@pytest.mark.parametrize("lead", [(), (7,), (6, 7)], ids=str)
def test_prior_has_no_batch_and_one_latent_event(make, lead):
    prior = make()
    assert (prior().batch_shape, prior().event_shape, prior.dim) == ((), (LATENT,), LATENT)
    draws = prior().sample(lead)
    assert draws.shape == (*lead, LATENT)
    assert prior().log_prob(draws).shape == lead


@each(NETWORKS)
@pytest.mark.parametrize("batch", [(), (4,), (2, 4)], ids=str)
def test_network_keeps_leading_dimensions(make, batch):
    assert make()(torch.randn(*batch, COLUMNS)).shape == (*batch, LATENT)


@each(LIKELIHOODS, FAMILIES, NETWORKS)
def test_a_row_does_not_feel_its_neighbours(make):
    component = make()
    (rows,) = given(component, 4)
    made, alone = component(rows), component(rows[2])
    if not isinstance(made, Tensor):
        draws = made.sample()
        made, alone = made.log_prob(draws), alone.log_prob(draws[2])
    torch.testing.assert_close(made[2], alone)


@each(LIKELIHOODS, PRIORS, FAMILIES, NETWORKS)
def test_every_parameter_receives_a_finite_gradient(make):
    component = make()
    inputs = given(component, 4)
    made = component(*inputs)
    if isinstance(made, Tensor):
        loss = made.sin().sum()
    else:
        draw = made.rsample() if made.has_rsample else made.sample()
        loss = draw.sin().sum() + made.log_prob(draw).sum()
    learned = [*inputs, *component.parameters()]
    if learned:
        loss.backward()
    assert [tensor.shape for tensor in learned if tensor.grad is None or not tensor.grad.isfinite().all()] == []


@each(LIKELIHOODS, PRIORS, FAMILIES, NETWORKS)
def test_state_dict_carries_all_that_was_learned(make):
    old, new = make(), make()
    inputs = given(old, 4)
    with torch.no_grad():
        for parameter in old.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    if list(old.parameters()):
        assert not outcome(old, *inputs).equal(outcome(new, *inputs))
    new.load_state_dict(old.state_dict())
    assert outcome(old, *inputs).equal(outcome(new, *inputs))


@each(LIKELIHOODS, PRIORS, FAMILIES, NETWORKS)
def test_every_tensor_moves_with_its_module(make):
    component = make().float()
    inputs = [tensor.detach().float() for tensor in given(component, 4)]
    assert outcome(component, *inputs).dtype == torch.float32


def entries(support):
    """Values that one entry of x may take and their quadrature weights: 1 for masses, dx for densities."""
    if support.is_discrete:
        values = torch.arange(-4096.0, 4096.0)
        values = values[support.check(values)]
        return values, torch.ones_like(values)
    line = torch.linspace(-20, 20, 40_001)
    real = line.sinh() if support is constraints.real else 2 * line  # sinh reaches into heavy tails
    step = (line.cosh() if support is constraints.real else 2.0) * (line[1] - line[0])
    to_support = biject_to(support)
    values = to_support(real)
    return values, step * to_support.log_abs_det_jacobian(real, values).exp()


@each(LIKELIHOODS)
def test_one_entry_has_mass_one_and_draws_follow_it(make):
    # Kolmogorov's distance of N draws exceeds 2.5 / sqrt(N) with probability 7e-6.
    likelihood = make()
    values, weights = entries(likelihood.support)
    for eta in torch.randn(4, likelihood.params_per_value):
        p = likelihood(eta)
        mass = (weights * p.log_prob(values[:, None]).exp()).detach()
        assert mass.sum().item() == pytest.approx(1, abs=1e-6)
        draws = p.sample((N,)).flatten().sort().values
        below = torch.searchsorted(draws, values, right=True) / N
        expected = mass.cumsum(0) - (0 if likelihood.support.is_discrete else mass / 2)
        assert (below - expected).abs().max() < 2.5 / math.sqrt(N)


@each(LIKELIHOODS)
def test_draws_lie_in_the_support_and_masses_are_on_discrete_ones(make):
    likelihood = make()
    draws = likelihood(*given(likelihood, 4)).sample((1000,))
    assert likelihood.support.check(draws).all()
    assert likelihood.base_measure == ("mass" if likelihood.support.is_discrete else "density")


@each(LIKELIHOODS)
@pytest.mark.parametrize("output", [-80.0, 80.0])
def test_extreme_outputs_in_float32_give_what_float64_gives(make, output):
    likelihood = make()
    values = torch.tensor([-1, 0, 0.25, 1, 255])
    values = values[likelihood.support.check(values)]
    log_p, slopes = [], []
    for dtype in (torch.float32, torch.float64):
        eta = torch.full((len(values), likelihood.params_per_value), output, dtype=dtype, requires_grad=True)
        log_p += [likelihood.to(dtype)(eta).log_prob(values[:, None].to(dtype))]
        slopes += torch.autograd.grad(log_p[-1].sum(), eta)
    assert log_p[0].dtype == torch.float32
    for narrow, wide in (log_p, slopes):
        assert narrow.isfinite().all()
        torch.testing.assert_close(narrow.double(), wide, rtol=1e-4, atol=1e-4)


@each(LIKELIHOODS, SMOOTH)
def test_expected_score_is_zero(make):
    component = make()
    _, score = scores(component, *given(component))
    assert (score.mean(0).abs() <= 5 * se(score)).all()
    assert (se(score) > 0).all()


@each(PRIORS, SMOOTH)
def test_density_has_mass_one_and_draws_follow_it(make):
    # E_q[h] = E_r[h q / r] for h = 1, tanh u_i, tanh u_i tanh u_j; r is a Student t fitted to the draws.
    component = make()
    q = component(*(tensor.detach() for tensor in given(component)))
    draws = q.sample((N,))
    mean, spread = draws.mean(0), torch.linalg.cholesky(draws.T.cov())
    r = dist.MultivariateStudentT(5.0, mean, spread)
    proposals = r.sample((N,))
    weights = (q.log_prob(proposals) - r.log_prob(proposals)).exp().detach()

    def tests(z):
        h = torch.cat([torch.ones(N, 1), ((z - mean) / draws.std(0)).tanh()], 1)
        return (h[:, :, None] * h[:, None, :]).flatten(1)

    weighted, plain = weights[:, None] * tests(proposals), tests(draws)
    tolerance = 5 * (se(weighted) ** 2 + se(plain) ** 2).sqrt()
    assert ((weighted.mean(0) - plain.mean(0)).abs() <= tolerance).all()
    assert tolerance.max() < 0.1


@each(SMOOTH)
def test_pathwise_gradient_is_the_score_functions(make):
    # d E_q[h] / d lam = E[d h(z(lam)) / d lam] = E[h d log q / d lam] for h = sum of sin(z_d - 1)
    family = make()
    (lam,) = given(family)
    rows = lam.detach().expand(N, -1).clone().requires_grad_()
    pathwise = torch.autograd.grad((family(rows).rsample() - 1).sin().sum(), rows)[0]
    draws, score = scores(family, lam)
    by_score = (draws - 1).sin().sum(-1, keepdim=True) * score
    tolerance = 5 * (se(pathwise) ** 2 + se(by_score) ** 2).sqrt()
    assert ((pathwise.mean(0) - by_score.mean(0)).abs() <= tolerance).all()
    assert (pathwise.mean(0).abs() > 0).all()


@each(NATURAL)
def test_natural_gradient_times_the_fisher_information_is_the_gradient(make):
    # F n = E[s (s . n)] = g with s the score, n = natural(lam, g)
    family = make()
    lam, gradient = given(family, 2)[0].detach() / 2, torch.randn(2, family.size)
    for row, wanted, natural in zip(lam, gradient, family.natural(lam, gradient), strict=True):
        _, score = scores(family, row)
        found = score * (score @ natural)[:, None]
        assert ((found.mean(0) - wanted).abs() <= 5 * se(found)).all()
        assert se(found).max() < 0.1 * wanted.abs().max()


@each(FAMILIES)
def test_natural_gradient_has_the_shape_of_lam(make):
    family = make()
    lam = given(family, 2, 4)[0]
    assert family.natural(lam, torch.ones_like(lam)).shape == lam.shape


@each(FAMILIES)
def test_initial_lam_is_one_finite_row(make):
    family = make()
    initial = family.initial()
    assert initial.shape == (family.size,)
    assert initial.isfinite().all()
    assert family(initial).sample().isfinite().all()


@each(FAMILIES)
def test_draws_coincide_under_a_point_mass_only(make):
    family = make()
    draws = family(*given(family, 4)).sample((8,))
    assert (draws == draws[0]).all().item() == family.point_mass


@each(POINT)
def test_point_mass_has_all_mass_where_it_draws(make):
    family = make()
    q = family(*given(family, 4))
    assert q.log_prob(q.sample()).eq(0).all()
    assert q.log_prob(q.sample() + 1e-6).eq(-math.inf).all()


def test_delta_draws_its_parameters():
    lam = torch.randn(4, LATENT)
    assert families.Delta(LATENT)(lam).sample().equal(lam)


def normal(x, mean, sd):
    return -(((x - mean) / sd) ** 2) / 2 - math.log(sd * math.sqrt(2 * math.pi))


@pytest.mark.parametrize(
    ("made", "value", "expected"),
    [
        (lambda: likelihoods.Bernoulli()(torch.tensor([math.log(3), 0])), [1.0, 0], math.log(3 / 4) + math.log(1 / 2)),
        (
            lambda: likelihoods.Gaussian(scale=0.5)(torch.tensor([1.0, 2])),
            [1.5, 0],
            normal(1.5, 1, 0.5) + normal(0, 2, 0.5),
        ),
        (lambda: priors.StandardNormal(2)(), [1.5, -2], normal(1.5, 0, 1) + normal(-2, 0, 1)),
        (
            lambda: families.DiagonalNormal(2)(torch.tensor([1, 2, math.log(3), math.log(0.5)])),
            [1.5, 0],
            normal(1.5, 1, 3) + normal(0, 2, 0.5),
        ),
    ],
    ids=["Bernoulli", "Gaussian", "StandardNormal", "DiagonalNormal"],
)
def test_density_is_the_stated_formula(made, value, expected):
    assert made().log_prob(torch.tensor(value)).item() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: likelihoods.Gaussian(scale=0.0), "scale is 0.0, but it must be positive"),
        (lambda: likelihoods.Gaussian(scale=-1.0), "scale is -1.0"),
        (lambda: likelihoods.Gaussian(scale=math.nan), "scale is nan"),
        (lambda: likelihoods.Gaussian(scale=math.inf), "scale is inf"),
        (lambda: networks.MLP(COLUMNS, LATENT, activation="relu"), "did you mean 'ReLU'?"),
        (lambda: networks.MLP(COLUMNS, LATENT, activation="Linear"), "unknown activation 'Linear'"),
    ],
)
def test_bad_option_is_named(build, words):
    with pytest.raises(UserError) as error:
        build()
    assert words in str(error.value)
