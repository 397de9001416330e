"""Flows: what zuko may not change for others, one latent dimension, tails, and the cost of a score."""

import subprocess
import sys

import pytest
import torch

from pvae.distributions.flows import spline
from pvae.generative.priors import FlowPrior
from pvae.inference.families import FlowFamily


@pytest.mark.parametrize("module", ["priors", "families"])
def test_importing_does_not_import_zuko_and_using_it_leaves_validation_alone(module):
    code = (
        "import sys, torch\n"
        f"import pvae; pvae.{module}\n"
        "assert 'zuko' not in sys.modules\n"
        "for wanted in (True, False):\n"
        "    torch.distributions.Distribution.set_default_validate_args(wanted)\n"
        "    pvae.priors.FlowPrior(2)().sample()\n"
        "    assert 'zuko' in sys.modules\n"
        "    assert torch.distributions.Distribution._validate_args is wanted\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("kind", ["coupling", "autoregressive"])
@pytest.mark.usefixtures("double")
def test_one_dimension_has_mass_one_after_it_was_bent(kind):
    torch.manual_seed(0)
    prior = FlowPrior(1, kind=kind, transforms=2, hidden=[8])
    family = FlowFamily(1, hidden=[8])
    with torch.no_grad():
        for parameter in (*prior.parameters(), *family.parameters()):
            parameter += 0.5 * torch.randn_like(parameter)
    line = torch.linspace(-60, 60, 1_000_001)[:, None]
    for made in (prior(), family(torch.randn(family.num_params))):
        assert made.log_prob(line).exp().sum().item() * 120e-6 == pytest.approx(1, abs=1e-5)


@pytest.mark.usefixtures("double")
def test_starts_near_the_normal():
    for made in (FlowPrior(3)(), FlowFamily(3)(FlowFamily(3).initial_params())):
        z = torch.randn(1000, 3)
        normal = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(-1)
        assert (made.log_prob(z) - normal).abs().mean() < 0.2


@pytest.mark.parametrize(("kind", "calls"), [("coupling", 1), ("autoregressive", 4)])
def test_a_score_takes_one_pass_through_each_network_and_a_draw_these_many(kind, calls):
    layers = spline(4, kind=kind, transforms=3, hidden=[8], bins=4)
    seen = []
    for layer in layers.transforms:
        layer.hyper.register_forward_hook(lambda *_: seen.append(1))
    transform = layers()
    transform.call_and_ladj(torch.randn(5, 4))
    assert len(seen) == 3
    transform.inv(torch.randn(5, 4))
    assert len(seen) == 3 + 3 * calls


@pytest.mark.usefixtures("double")
def test_drawing_inverts_scoring_far_out_too():
    torch.manual_seed(0)
    transform = FlowPrior(3, transforms=2).transform()
    noise = 4 * torch.randn(1000, 3)
    torch.testing.assert_close(transform(transform.inv(noise)), noise)
