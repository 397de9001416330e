"""VampPrior: the mixture of the guide's own posteriors at its pseudo-inputs."""

import pytest
import torch
from torch import nn

from pvae.errors import UserError
from pvae.generative.priors import VampPrior
from pvae.inference import families

ROWS = torch.rand(40, 6, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def posterior(family, calls=None):
    encoder = nn.Linear(6, family.num_params)

    def q(u):
        if calls is not None:
            calls.append(u)
        return family(encoder(u))

    return encoder, q


@pytest.mark.parametrize(
    "kind", ["DiagonalNormal", "LowRankNormal", "FullRankNormal", "MixtureOfNormals", "FlowFamily"]
)
def test_density_is_the_mean_of_the_posteriors_at_the_pseudo_inputs(kind):
    calls = []
    encoder, q = posterior(getattr(families, kind)(2), calls)
    prior = VampPrior(2, pseudo_inputs=7, posterior=q, data=ROWS)
    z = torch.randn(5, 2)
    p = prior()
    assert len(calls) == 1
    one_by_one = torch.stack([q(u).log_prob(z).exp() for u in prior.inputs()]).mean(0).log()
    torch.testing.assert_close(p.log_prob(z), one_by_one)
    p.log_prob(z).sum().backward()
    assert encoder.weight.grad.abs().sum() > 0
    assert prior.rows.grad.abs().sum() > 0
    assert p.expand([4]).sample((3,)).shape == (3, 4, 2)


def test_the_encoder_stays_the_guides():
    guide = nn.Sequential(nn.Linear(6, 4), families.DiagonalNormal(2))
    prior = VampPrior(2, pseudo_inputs=7, posterior=guide, data=ROWS)
    assert [name for name, _ in prior.named_parameters()] == ["rows"]
    assert list(prior.state_dict()) == ["rows", "unit"]
    assert prior().sample().shape == (2,)


@pytest.mark.parametrize(("pseudo_inputs", "data"), [(7, ROWS), (100, ROWS), (3, ROWS[:1]), (7, ROWS.round())])
def test_pseudo_inputs_start_at_rows_of_the_data_each_with_noise_of_its_own(pseudo_inputs, data):
    _, q = posterior(families.DiagonalNormal(2))
    inputs = VampPrior(2, pseudo_inputs=pseudo_inputs, posterior=q, data=data).inputs()
    assert inputs.shape == (pseudo_inputs, 6)
    assert (torch.cdist(inputs, data.clamp(0.05, 0.95)).min(1).values < 0.1).all()
    assert len(inputs.unique(dim=0)) == pseudo_inputs


def test_pseudo_inputs_leave_the_unit_interval_only_with_the_data():
    _, q = posterior(families.DiagonalNormal(2))
    inside, outside = (VampPrior(2, pseudo_inputs=7, posterior=q, data=rows) for rows in (ROWS, 10 * ROWS - 5))
    with torch.no_grad():
        for prior in (inside, outside):
            prior.rows += 100
    assert (inside.inputs() <= 1).all()
    assert (outside.inputs() > 90).all()


def test_no_rows_and_point_masses_are_refused():
    _, q = posterior(families.Delta(2))
    with pytest.raises(UserError, match="rows is 0"):
        VampPrior(2, posterior=q, data=ROWS[:0])
    with pytest.raises(UserError, match="take a family other than Delta"):
        VampPrior(2, posterior=q, data=ROWS)()
