"""Laws of every component. A mean of N draws may stray 5 standard errors, SE = sd / sqrt(N), from what it estimates."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import COLUMNS, FAMILIES, LATENT, LIKELIHOODS, NETWORKS, PRIORS
from scipy import stats
from torch import Tensor
from torch.distributions import biject_to, constraints

from pvae.distributions import univariate
from pvae.errors import UserError
from pvae.generative import likelihoods, networks, priors
from pvae.inference import families

N = 40_000
POINT = {name: make for name, make in FAMILIES.items() if make().point_mass}
SMOOTH = {name: make for name, make in FAMILIES.items() if not make().point_mass}
NATURAL = {name: make for name, make in FAMILIES.items() if make().has_natural_gradient}


def each(*tables):
    """Run a law on every case of some tables."""
    return pytest.mark.parametrize("make", [pytest.param(m, id=n) for table in tables for n, m in table.items()])


@pytest.fixture(autouse=True)
def seeded(double):
    torch.manual_seed(0)


def given(component, *batch):
    """What the component is called with: random inputs, eta or q_params of a batch shape; nothing for a prior."""
    match component:
        case priors.Prior():
            return ()
        case likelihoods.Likelihood():
            size = COLUMNS * component.params_per_value
        case families.Family():
            size = component.num_params
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
    assert {type(make()) for make in cases.values()} == {getattr(module, name) for name in module.__all__}


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
def test_mean_is_the_mean_of_draws(make):
    likelihood = make()
    for eta in torch.randn(4, COLUMNS * likelihood.params_per_value):
        p = likelihood(eta)
        draws = p.sample((N,))
        assert p.mean.shape == (COLUMNS,)
        assert ((draws.mean(0) - p.mean).abs() <= 5 * se(draws)).all()


@each(LIKELIHOODS)
def test_distribution_refuses_what_is_outside_its_likelihoods_support(make):
    likelihood = make()
    p = likelihood(*given(likelihood))
    for value in (-1, -0.004, 0, 0.25, 1, 1.004, 1.5, 2, 255, 256, math.nan):
        x = torch.full((COLUMNS,), float(value))
        inside = likelihood.support.check(x).all()
        assert p.support.check(x) == inside
        if inside:
            assert p.log_prob(x).isfinite()
        else:
            with pytest.raises(ValueError, match="support"):
                p.log_prob(x)


@pytest.mark.parametrize(
    ("likelihood", "accepted", "refused"),
    [
        (likelihoods.Bernoulli(), [0, 1], [-1, 0.5, 2]),
        (likelihoods.ContinuousBernoulli(), [0, 0.5, 1], [-0.01, 1.5, 255]),
        (likelihoods.Gaussian(), [-1e6, 0, 0.5], [math.nan]),
        (likelihoods.StudentT(), [-1e6, 0, 0.5], [math.nan]),
        (likelihoods.Laplace(), [-1e6, 0, 0.5], [math.nan]),
        (likelihoods.Beta(), [0, 0.5, 1], [-0.01, 1.01, 255]),
        (likelihoods.Beta(margin=0.5), [-0.4, 1.4], [-0.6, 1.6]),
        (likelihoods.DiscretizedLogistic(), [0, 1, 255], [-1, 0.5, 256]),
        (likelihoods.DiscretizedLogistic(levels=8), [0, 7], [8]),
        (likelihoods.Categorical(), [0, 1, 255], [-1, 0.5, 256]),
        (likelihoods.Categorical(levels=4), [0, 3], [4]),
        (likelihoods.Poisson(), [0, 1, 1e7], [-1, 0.5]),
        (likelihoods.NegativeBinomial(), [0, 1, 1e7], [-1, 0.5]),
        (likelihoods.ZeroInflatedNegativeBinomial(), [0, 1, 1e7], [-1, 0.5]),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, likelihoods.Likelihood) else "",
)
def test_support_is_the_stated_one(likelihood, accepted, refused):
    assert likelihood.support.check(torch.tensor(accepted)).all()
    assert not likelihood.support.check(torch.tensor(refused)).any()


@each(LIKELIHOODS)
def test_plates_expand_and_masks_hide(make):
    likelihood = make()
    (eta,) = given(likelihood, 4)
    with pyro.plate("samples", 50, dim=-2), pyro.plate("data", 4, dim=-1):
        x = pyro.sample("x", likelihood(eta))
    p, wide = likelihood(eta), likelihood(eta).expand([50, 4])
    assert x.shape == (50, 4, COLUMNS)
    assert (x.std(0) > 0).any(-1).all()
    torch.testing.assert_close(wide.log_prob(x), p.log_prob(x))
    torch.testing.assert_close(wide.mean, p.mean.expand(50, 4, COLUMNS))
    assert wide.expand([2, 50, 4]).sample().shape == (2, 50, 4, COLUMNS)
    assert wide.mean.shape == (50, 4, COLUMNS)
    seen = torch.tensor([True, False, True, False])
    assert p.mask(seen).log_prob(x).equal(p.log_prob(x).where(seen, 0))


@each(LIKELIHOODS)
@pytest.mark.parametrize("output", [-80.0, 80.0])
def test_extreme_outputs_in_float32_draw_finite_values_around_a_finite_mean(make, output):
    likelihood = make().float()
    for sign in (1, -1):  # every parameter at the same end, and neighbours at opposite ends
        eta = output * sign ** torch.arange(COLUMNS * likelihood.params_per_value)
        p = likelihood(eta.float())
        draws = p.sample((1000,))
        assert draws.dtype == p.mean.dtype == torch.float32
        assert p.mean.isfinite().all()
        assert likelihood.support.check(draws).all()
        assert draws.isfinite().all()
        assert p.log_prob(draws).isfinite().all()


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


@each(LIKELIHOODS)
def test_first_and_second_derivatives_are_finite_differences(make):
    likelihood = make()
    (eta,) = given(likelihood, 2)
    x = likelihood(eta).sample()

    def log_p(eta):
        return likelihood(eta).log_prob(x)

    assert torch.autograd.gradcheck(log_p, eta, atol=1e-4)
    assert torch.autograd.gradgradcheck(log_p, eta, atol=1e-4)


def test_continuous_bernoulli_is_exact_through_zero_and_in_its_tails():
    size = torch.cat([torch.logspace(-9, 2.8, 60), torch.tensor([0.499999, 0.500001])])
    eta = torch.cat([-size, size])[:, None].requires_grad_()
    expected = 0.25 * eta - (torch.expm1(eta) / eta).log()
    p = likelihoods.ContinuousBernoulli()(eta)
    log_p = p.log_prob(torch.full_like(eta, 0.25))
    torch.testing.assert_close(log_p, expected[:, 0])
    (slope,) = torch.autograd.grad(log_p.sum(), eta)
    torch.testing.assert_close(slope, 0.25 - p.mean)
    flat = likelihoods.ContinuousBernoulli()(torch.zeros(3, requires_grad=True))
    assert flat.log_prob(torch.tensor([0, 0.3, 1])) == 0
    assert flat.mean.equal(torch.full((3,), 0.5))
    steep = likelihoods.ContinuousBernoulli()(torch.tensor([80.0, -80], dtype=torch.float32))
    assert steep.log_prob(torch.tensor([1.0, 0])).item() == pytest.approx(2 * math.log(80), rel=1e-6)
    torch.testing.assert_close(steep.mean.double(), torch.tensor([1 - 1 / 80, 1 / 80]), rtol=1e-5, atol=0)


def test_bernoulli_in_few_passes_is_pyros_with_both_its_derivatives():
    x = torch.tensor([0, 1, 0.3])[:, None]
    eta = torch.tensor([0, 1e-8, 1, -1, 25, -25, 90, -90, 1e4, -1e4]).repeat(3, 1).requires_grad_()

    def looks(kind):
        """Log-density, its slope and its curvature; the slope by the pass that keeps no steps too."""
        log_p = kind(logits=eta, validate_args=False).log_prob(x)
        (quick,) = torch.autograd.grad(log_p.sum(), eta, retain_graph=True)
        (slope,) = torch.autograd.grad(log_p.sum(), eta, create_graph=True)
        return log_p, quick, slope, *torch.autograd.grad(slope.sum(), eta)

    for found, expected in zip(looks(univariate.Bernoulli), looks(dist.Bernoulli), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    inputs = torch.randn(2, 3, 4).requires_grad_(), torch.rand(3, 1).requires_grad_()

    def score(eta, x):
        return univariate.Bernoulli(logits=eta, validate_args=False).log_prob(x)

    assert torch.autograd.gradcheck(score, inputs)
    assert torch.autograd.gradgradcheck(score, inputs)


@pytest.mark.parametrize(
    ("likelihood", "expected"),
    [
        (likelihoods.Poisson, lambda x, m: stats.poisson(m.exp()).logpmf(x)),
        (likelihoods.NegativeBinomial, lambda x, m, r: stats.nbinom(r.exp(), 1 / (1 + (m - r).exp())).logpmf(x)),
    ],
)
def test_large_counts_in_float32_keep_their_digits(likelihood, expected):
    counts = torch.tensor([[0.0], [1], [1000], [999_999], [1_000_000], [9_999_999]])
    outputs = torch.tensor([-1, 5, 13.8, 13.9]).repeat(likelihood.params_per_value, 1).float()
    for parameters in torch.cartesian_prod(*outputs).view(-1, likelihood.params_per_value):
        eta = parameters.expand(len(counts), -1).clone().requires_grad_()
        log_p = likelihood()(eta).log_prob(counts.float())
        wide = eta.detach().double().requires_grad_()
        in_double = likelihood()(wide).log_prob(counts)
        torch.testing.assert_close(log_p.double(), in_double, rtol=1e-6, atol=0)
        torch.testing.assert_close(
            *(torch.autograd.grad(v.sum(), e)[0].double() for v, e in ((log_p, eta), (in_double, wide))),
            rtol=1e-6,
            atol=0,
        )
        by_scipy = torch.as_tensor(expected(counts, *wide.detach().split(1, -1)))[:, 0]
        torch.testing.assert_close(in_double.detach(), by_scipy, rtol=1e-8, atol=0)


@pytest.mark.parametrize("output", [15.0, 18.5, 22.0])
def test_counts_of_large_rates_have_the_mean_and_variance_of_a_poisson(output):
    p = likelihoods.Poisson()(torch.full((COLUMNS,), output))
    draws = p.sample((N,))
    assert ((draws.mean(0) - p.mean).abs() <= 5 * se(draws)).all()
    assert ((draws.var(0) / p.mean - 1).abs() <= 5 * math.sqrt(2 / N)).all()


def test_student_without_a_mean_shows_its_location():
    eta = torch.randn(4, COLUMNS)
    assert likelihoods.StudentT(df=1.0)(eta).mean.equal(eta)


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
    # d E_q[h] / d q_params = E[d h(z(q_params)) / d q_params] = E[h d log q / d q_params] for h = sum of sin(z_d - 1)
    family = make()
    (q_params,) = given(family)
    rows = q_params.detach().expand(N, -1).clone().requires_grad_()
    pathwise = torch.autograd.grad((family(rows).rsample() - 1).sin().sum(), rows)[0]
    draws, score = scores(family, q_params)
    by_score = (draws - 1).sin().sum(-1, keepdim=True) * score
    tolerance = 5 * (se(pathwise) ** 2 + se(by_score) ** 2).sqrt()
    assert ((pathwise.mean(0) - by_score.mean(0)).abs() <= tolerance).all()
    assert (pathwise.mean(0).abs() > 0).all()


def curvature(first, q_params, direction):
    """The second derivative along a direction, from a first one [N, P] that kept its graph: [N]."""
    return torch.autograd.grad((first * direction).sum(), q_params)[0] @ direction


@each(SMOOTH)
def test_second_pathwise_derivative_is_the_score_functions(make):
    # d2 E_q[h] = E[h (s s' + ds)] with s the score, along some direction; h as above
    family = make()
    rows = (given(family)[0].detach() / 2).expand(N, -1).clone().requires_grad_()
    direction = torch.randn(family.num_params) / family.num_params**0.5
    h = (family(rows).rsample() - 1).sin().sum(-1)
    pathwise = curvature(torch.autograd.grad(h.sum(), rows, create_graph=True)[0], rows, direction)
    q = family(rows)
    draws = q.sample()
    (score,) = torch.autograd.grad(q.log_prob(draws).sum(), rows, create_graph=True)
    bend = (score @ direction).detach() ** 2 + curvature(score, rows, direction)
    by_score = (draws - 1).sin().sum(-1) * bend
    tolerance = 5 * (se(pathwise) ** 2 + se(by_score) ** 2).sqrt()
    assert (pathwise.mean() - by_score.mean()).abs() <= tolerance
    assert tolerance < 0.3


@each({name: make for name, make in FAMILIES.items() if name != "MixtureOfNormals"})
def test_second_derivatives_are_differences_of_first_ones_under_the_same_noise(make):
    family = make()
    (q_params,) = given(family, 4)
    direction = torch.randn(4, family.num_params)

    def slope(q_params):
        torch.manual_seed(1)
        return torch.autograd.grad((family(q_params).rsample((5,)) - 1).sin().sum(), q_params, create_graph=True)[0]

    (exact,) = torch.autograd.grad((slope(q_params) * direction).sum(), q_params)
    step = 1e-6
    difference = (slope(q_params + step * direction) - slope(q_params - step * direction)) / (2 * step)
    torch.testing.assert_close(exact, difference, rtol=1e-5, atol=1e-7)


@each(FAMILIES)
@pytest.mark.parametrize("output", [-80.0, 80.0])
def test_extreme_parameters_in_float32_give_finite_values_and_gradients(make, output):
    family = make().float()
    q_params = torch.full((4, family.num_params), output, dtype=torch.float32, requires_grad=True)
    draws = family(q_params).rsample((5,))
    values = draws.tanh().sum() + (0 if family.point_mass else family(q_params).log_prob(draws.detach()).sum())
    assert values.isfinite()
    assert torch.autograd.grad(values, q_params)[0].isfinite().all()


@each(PRIORS)
def test_draws_of_another_are_scored_row_by_row_under_plates(make):
    prior, z = make(), torch.randn(4, 6, LATENT).requires_grad_()

    def model():
        with pyro.plate("samples", 4, dim=-2), pyro.plate("data", 6, dim=-1):
            pyro.sample("z", prior(), obs=z)

    site = pyro.poutine.trace(model).get_trace().nodes["z"]
    log_p = site["fn"].log_prob(site["value"])
    torch.testing.assert_close(log_p, torch.stack([torch.stack([prior().log_prob(one) for one in row]) for row in z]))
    (by_z,) = torch.autograd.grad(log_p.sum(), z)
    assert (by_z.isfinite() & (by_z != 0)).all()


@each(PRIORS, SMOOTH)
def test_each_place_under_plates_has_a_draw_of_its_own(make):
    component = make()
    made = component(*(q_params.detach().expand(6, -1) for q_params in given(component)))
    with pyro.plate("samples", 4, dim=-2), pyro.plate("data", 6, dim=-1):
        draws = pyro.sample("z", made)
    assert draws.shape == (4, 6, LATENT)
    assert len(draws.flatten(0, 1).unique(dim=0)) == 24


@each(FAMILIES)
def test_every_entry_of_the_initial_params_receives_a_gradient(make):
    # not by symmetry, that is: some bound with correlated latents moves every entry
    family = make()
    q_params = family.initial_params().expand(200, -1).clone().requires_grad_()
    draws = family(q_params).rsample()
    log_q = 0.0 if family.point_mass else family(q_params).log_prob(draws).sum()
    slope = torch.autograd.grad(-((draws.sum(-1) - 1) ** 2).sum() - log_q, q_params)[0].mean(0)
    assert (slope.abs() > 1e-6).all()


@each(NATURAL)
def test_natural_gradient_times_the_fisher_information_is_the_gradient(make):
    # F n = E[s (s . n)] = g with s the score, n = natural_gradient(q_params, g)
    family = make()
    q_params, gradient = given(family, 2)[0].detach() / 2, torch.randn(2, family.num_params)
    for row, wanted, natural in zip(q_params, gradient, family.natural_gradient(q_params, gradient), strict=True):
        _, score = scores(family, row)
        found = score * (score @ natural)[:, None]
        assert ((found.mean(0) - wanted).abs() <= 5 * se(found)).all()
        assert se(found).max() < 0.1 * wanted.abs().max()


@each(FAMILIES)
def test_natural_gradient_has_the_shape_of_the_parameters(make):
    family = make()
    q_params = given(family, 2, 4)[0]
    assert family.natural_gradient(q_params, torch.ones_like(q_params)).shape == q_params.shape


@each(FAMILIES)
def test_initial_params_are_one_finite_row(make):
    family = make()
    initial = family.initial_params()
    assert initial.shape == (family.num_params,)
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
    q_params = torch.randn(4, LATENT)
    assert families.Delta(LATENT)(q_params).sample().equal(q_params)


def learned(component, **values):
    """A component with these values in its parameters."""
    with torch.no_grad():
        for name, value in values.items():
            getattr(component, name).copy_(torch.tensor(value))
    return component


def normal(x, mean, sd):
    return -(((x - mean) / sd) ** 2) / 2 - math.log(sd * math.sqrt(2 * math.pi))


def raised(output, least):
    return least + math.log2(1 + 2**output)


def logistic_bin(k, mean, scale, top=8):
    reached = stats.logistic(mean, scale).cdf
    return math.log((1 if k == top else reached(k + 0.5)) - (0 if k == 0 else reached(k - 0.5)))


def negative_binomial(x, log_mean, log_r):
    return stats.nbinom(math.exp(log_r), 1 / (1 + math.exp(log_mean - log_r))).logpmf(x)


@pytest.mark.parametrize(
    ("made", "value", "expected"),
    [
        (lambda: likelihoods.Bernoulli()(torch.tensor([math.log(3), 0])), [1.0, 0], math.log(3 / 4) + math.log(1 / 2)),
        (
            lambda: likelihoods.Gaussian(scale=0.5)(torch.tensor([1.0, 2])),
            [1.5, 0],
            normal(1.5, 1, 0.5) + normal(0, 2, 0.5),
        ),
        (
            lambda: likelihoods.Gaussian(scale=0.5, spread="decoder")(torch.tensor([1.0, 2, -1, 3])),
            [1.5, 0],
            normal(1.5, 1, 0.5 * raised(-1, 0.001)) + normal(0, 2, 0.5 * raised(3, 0.001)),
        ),
        (
            lambda: likelihoods.ContinuousBernoulli()(torch.tensor([2.0, -1])),
            [0.25, 1],
            math.log(2 * math.exp(0.5) / (math.exp(2) - 1)) + math.log(math.exp(-1) / (1 - math.exp(-1))),
        ),
        (
            lambda: likelihoods.StudentT(df=3, scale=0.5)(torch.tensor([1.0, 2])),
            [1.5, -20],
            stats.t(3, [1, 2], 0.5).logpdf([1.5, -20]).sum(),
        ),
        (
            lambda: likelihoods.Laplace(scale=0.5)(torch.tensor([1.0, 2])),
            [1.5, -20],
            stats.laplace([1, 2], 0.5).logpdf([1.5, -20]).sum(),
        ),
        (
            lambda: likelihoods.Beta(margin=0.1)(torch.tensor([0.0, 1, 2, -1])),
            [0, 0.7],
            stats.beta([raised(0, 0.1), raised(1, 0.1)], [raised(2, 0.1), raised(-1, 0.1)], -0.1, 1.2)
            .logpdf([0, 0.7])
            .sum(),
        ),
        (
            lambda: likelihoods.DiscretizedLogistic(levels=9)(torch.tensor([0.5, 0, 0.25, -2, 1, 0])),
            [0, 5, 8],
            logistic_bin(0, 6, 4 * raised(-2, 0.001))
            + logistic_bin(5, 4, 4 * raised(1, 0.001))
            + logistic_bin(8, 5, 4 * raised(0, 0.001)),
        ),
        (
            lambda: likelihoods.DiscretizedLogistic(levels=9, components=2)(
                torch.tensor([0, math.log(3), 0.5, 0, -2, 1])  # C = 2 of each; D = 1
            ),
            [5],
            math.log(
                0.25 * math.exp(logistic_bin(5, 6, 4 * raised(-2, 0.001)))
                + 0.75 * math.exp(logistic_bin(5, 4, 4 * raised(1, 0.001)))
            ),
        ),
        (
            lambda: likelihoods.Categorical(levels=3)(torch.tensor([0, 5, math.log(2), 6, 0, 7.0])),
            [1, 2],
            math.log(2 / 4) + 7 - math.log(math.exp(5) + math.exp(6) + math.exp(7)),
        ),
        (
            lambda: likelihoods.Poisson()(torch.tensor([1.0, -2])),
            [4, 0],
            stats.poisson([math.exp(1), math.exp(-2)]).logpmf([4, 0]).sum(),
        ),
        (
            lambda: likelihoods.NegativeBinomial()(torch.tensor([1.0, -2, 0.5, 3])),
            [4, 0],
            negative_binomial(4, 1, 0.5) + negative_binomial(0, -2, 3),
        ),
        (
            lambda: likelihoods.ZeroInflatedNegativeBinomial()(torch.tensor([1.0, -2, 0.5, 3, math.log(3), 0])),
            [4, 0],
            math.log(1 / 4) + negative_binomial(4, 1, 0.5) + math.log((1 + math.exp(negative_binomial(0, -2, 3))) / 2),
        ),
        (lambda: priors.StandardNormal(2)(), [1.5, -2], normal(1.5, 0, 1) + normal(-2, 0, 1)),
        (
            lambda: families.DiagonalNormal(2)(torch.tensor([1, 2, math.log(3), math.log(0.5)])),
            [1.5, 0],
            normal(1.5, 1, 3) + normal(0, 2, 0.5),
        ),
        (
            lambda: learned(priors.DiagonalNormal(2), mean=[1, 2], log_scale=[math.log(3), math.log(0.5)])(),
            [1.5, 0],
            normal(1.5, 1, 3) + normal(0, 2, 0.5),
        ),
        (lambda: priors.Laplace(2, scale=0.5)(), [1.5, -2], stats.laplace(0, 0.5).logpdf([1.5, -2]).sum()),
        (lambda: priors.StudentT(2)(), [1.5, -20], stats.t(4).logpdf([1.5, -20]).sum()),
        (
            lambda: learned(
                priors.GaussianMixture(2, components=2),
                logits=[0, math.log(3)],
                means=[[1, 0], [0, 2]],
                log_scales=[[0, 0], [0, math.log(2)]],
            )(),
            [1.5, 1],
            math.log(
                0.25 * math.exp(normal(1.5, 1, 1) + normal(1, 0, 1))
                + 0.75 * math.exp(normal(1.5, 0, 1) + normal(1, 2, 2))
            ),
        ),
        (
            lambda: families.LowRankNormal(2, rank=1)(torch.tensor([1, 2, math.log(3), math.log(0.5), 0.4, -2])),
            [1.5, 0],
            # diag(3, 1/2)^2 + w w' with w = (3 * 0.4, -2 / 2)
            stats.multivariate_normal([1, 2], [[9 + 1.44, -1.2], [-1.2, 0.25 + 1]]).logpdf([1.5, 0]),
        ),
        (
            lambda: families.FullRankNormal(2)(torch.tensor([1, 2, math.log(3), math.log(0.5), 0.4])),
            [1.5, 0],
            # L = [[3, 0], [0.4, 1/2]]
            stats.multivariate_normal([1, 2], [[9, 1.2], [1.2, 0.41]]).logpdf([1.5, 0]),
        ),
        (
            lambda: families.MixtureOfNormals(2, components=2)(
                torch.tensor([0, math.log(3), 1, 0, 0, 2, 0, 0, 0, math.log(2)])
            ),
            [1.5, 1],
            math.log(
                0.25 * math.exp(normal(1.5, 1, 1) + normal(1, 0, 1))
                + 0.75 * math.exp(normal(1.5, 0, 1) + normal(1, 2, 2))
            ),
        ),
    ],
    ids=[
        "Bernoulli",
        "Gaussian",
        "Gaussian(decoder)",
        "ContinuousBernoulli",
        "StudentT",
        "Laplace",
        "Beta",
        "DiscretizedLogistic",
        "DiscretizedLogistic(mixture)",
        "Categorical",
        "Poisson",
        "NegativeBinomial",
        "ZeroInflatedNegativeBinomial",
        "StandardNormal",
        "DiagonalNormal",
        "DiagonalNormal prior",
        "Laplace prior",
        "StudentT prior",
        "GaussianMixture",
        "LowRankNormal",
        "FullRankNormal",
        "MixtureOfNormals",
    ],
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
        (lambda: priors.Laplace(2, scale=0.0), "Laplace: scale is 0.0, but it must be positive"),
        (lambda: priors.StudentT(2, df=math.inf), "StudentT: df is inf"),
        (lambda: priors.GaussianMixture(2, components=0), "components is 0"),
        (lambda: priors.FlowPrior(2, kind="planar"), "kind is 'planar', but it must be 'coupling' or 'autoregressive'"),
        (lambda: priors.FlowPrior(2, bins=1), "bins is 1"),
        (lambda: families.LowRankNormal(2, rank=0), "rank is 0"),
        (lambda: families.MixtureOfNormals(2, components=0), "components is 0"),
        (lambda: families.FlowFamily(2, context=0), "context is 0"),
        (lambda: families.FlowFamily(2, transforms=0), "transforms is 0"),
        (lambda: likelihoods.Gaussian(spread="Shared"), "unknown spread 'Shared'; did you mean 'shared'?"),
        (lambda: likelihoods.Laplace(scale=0.0), "Laplace: scale is 0.0"),
        (lambda: likelihoods.StudentT(df=0.0), "StudentT: df is 0.0, but it must be positive"),
        (lambda: likelihoods.Beta(margin=0.0), "Beta: margin is 0.0, but it must be positive"),
        (lambda: likelihoods.Categorical(levels=1), "Categorical: levels is 1, but it must be at least 2"),
        (lambda: likelihoods.DiscretizedLogistic(levels=1), "levels is 1"),
        (lambda: likelihoods.DiscretizedLogistic(components=0), "components is 0, but it must be at least 1"),
        (lambda: networks.MLP(COLUMNS, LATENT, activation="relu"), "did you mean 'ReLU'?"),
        (lambda: networks.MLP(COLUMNS, LATENT, activation="Linear"), "unknown activation 'Linear'"),
    ],
)
def test_bad_option_is_named(build, words):
    with pytest.raises(UserError) as error:
        build()
    assert words in str(error.value)
