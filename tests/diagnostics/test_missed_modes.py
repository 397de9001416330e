"""A posterior that misses a mode is not trusted, whatever its own draws say; an exact one beside it is."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pvae.diagnostics import DiagnosisBudget, diagnose, evaluate
from pvae.diagnostics.trust import TRUST, UNKNOWN
from pvae.inference.families import DiagonalNormal
from pvae.inference.guides import Guide

BUDGET = DiagnosisBudget(
    rows=60,
    draws=300,
    steps=40,
    annealed=10,
    temperatures=60,
    chains=8,
    simulated=200,
    references=20,
    reference_draws=1000,
)
SCALE, NOISE = 3.0, 0.5


class Folded(nn.Module):
    """Latents z ~ N(0, 9 I_2); x1 is |z1| with weight ``mass`` on its own sign, and x2 is z2, both with noise 0.5.

    The likelihood of x1 is a mixture: N(z1, 0.5) of weight 1 - mass and N(-z1, 0.5) of weight mass: z1 has modes
    at about x1 and -x1 whose posterior weights are the mixture's.
    """

    def __init__(self, mass):
        super().__init__()
        self.mass = mass

    def forward(self, x, index=None):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, SCALE).expand([2]).to_event(1))
            means = torch.stack([z, z * torch.tensor([-1.0, 1.0])], -2)
            weights = torch.tensor([1 - self.mass, self.mass]).expand(means.shape[:-1])
            parts = dist.Normal(means, NOISE).to_event(1)
            pyro.sample("x", dist.MixtureSameFamily(dist.Categorical(weights), parts), obs=x)


VARIANCE = 1 / (1 / SCALE**2 + 1 / NOISE**2)


class OneMode(Guide):
    """The heavier mode, exactly."""

    def __init__(self):
        super().__init__(DiagonalNormal(2))

    def params(self, x, index=None):
        mean = x / NOISE**2 * VARIANCE
        return torch.cat([mean, torch.full_like(mean, math.log(VARIANCE) / 2)], -1)


def program(mass):
    """A program and rows from it whose modes are well apart: |x1| from 3 to 5, of either sign."""
    model = Folded(mass)
    random = torch.Generator().manual_seed(0)
    x = 3 + 2 * torch.rand(60, 2, generator=random)
    return model, x


@pytest.mark.parametrize("mass", [0.5, 0.2, 0.05])
def test_the_gap_of_a_missed_mode_is_seen_without_annealing(mass):
    # Exact: -log of the weight of the mode that q holds; the other mode is 12 standard deviations away.
    model, x = program(mass)
    evaluation = evaluate(model, OneMode(), x, budget="quick")
    assert evaluation.values["evidence_reliable"].mean() > 0.9
    gap = evaluation.summary()["inference_gap"]
    assert gap.mean == pytest.approx(-math.log(1 - mass), abs=5 * gap.se + 0.005)  # standard error about 0.003


@pytest.fixture(scope="module", params=[0.5, 0.05])
def diagnosis(request):
    model, x = program(request.param)
    return request.param, diagnose(model, OneMode(), x, budget=BUDGET)


def test_no_use_but_the_bound_trusts_it(diagnosis):
    mass, found = diagnosis
    levels = {use: verdict.level for use, verdict in found.verdicts.items()}
    assert levels["posterior"] not in (TRUST, UNKNOWN)
    assert levels["proposal"] not in (TRUST, UNKNOWN)
    assert found.figures["inference_gap"].mean == pytest.approx(-math.log(1 - mass), abs=0.03)  # standard error 0.005


def test_its_sd_and_mean_are_judged_by_rows_with_both_modes(diagnosis):
    # With the other mode at -m the exact variance is V + 4 pi (1 - pi) m^2 and the exact mean is off by 2 pi m.
    mass, found = diagnosis
    _, x = program(mass)
    m = x[: BUDGET.references, 0] / NOISE**2 * VARIANCE
    sd = (VARIANCE + 4 * mass * (1 - mass) * m**2).sqrt()
    ratio = (VARIANCE**0.5 / sd).log().mean().div(2).exp().item()  # the other dimension is exact
    error = ((2 * mass * m / sd).square().mean() / 2).sqrt().item()
    assert found.figures["reliable"].mean >= 0.75
    assert found.figures["sd_ratio"].mean == pytest.approx(ratio, rel=0.05)
    assert found.figures["mean_error"].mean == pytest.approx(error, abs=0.04)


def test_true_latents_show_the_mass_that_is_missed(diagnosis):
    # Of 200 simulated rows a share has its true z1 in the other mode, well apart in most.
    mass, found = diagnosis
    share = found.figures["missed_mass"].mean
    assert share == pytest.approx(0.8 * mass, abs=0.2 * mass + 4 * (mass * (1 - mass) / 200) ** 0.5)
    assert share > 0.02
