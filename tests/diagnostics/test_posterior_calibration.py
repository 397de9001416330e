"""Posterior SBC: silent on exact posteriors of observed rows, and loud where a guide is wrong at these rows alone."""

import pytest
import torch
from oracles import LinearGaussian
from posteriors import Exact

from pvae.diagnostics.calibration import calibrate
from pvae.diagnostics.posterior_calibration import calibrate_posterior
from pvae.errors import UserError
from pvae.inference.families import Delta
from pvae.inference.guides import Amortized


@pytest.fixture(scope="module")
def oracle():
    return LinearGaussian(2, 5, scale=1.0)  # rows say little, so that q's draws survive a second one


def figures(oracle, guide, x, **options):
    return calibrate_posterior(oracle.model, guide, x, simulated=300, **options).summary()


def test_the_exact_posterior_is_calibrated_at_every_row(oracle):
    found = figures(oracle, Exact(oracle), oracle.sample(4))
    assert found["posterior_sbc_p"].mean > 0.01
    assert found["posterior_sbc_distance"].mean < 0.12  # of 8 columns of 300, 99% are below 0.116
    assert found["posterior_sbc_ess"].mean > 200


@pytest.mark.parametrize("miss", [(0.5, 0.0), (2.0, 0.0), (1.0, 0.7)], ids=["narrowed", "widened", "shifted"])
def test_a_wrong_posterior_is_not(oracle, miss):
    assert figures(oracle, Exact(oracle, *miss), oracle.sample(2))["posterior_sbc_p"].mean < 1e-3


class WrongFarOut(Exact):
    """Exact for rows near the middle of the data, and narrow for rows far out."""

    def params(self, x, index=None):
        q_params = super().params(x, index).clone()
        far = (x - self.oracle.bias.to(x)).norm(dim=1) > 6
        q_params[far, 2:4] -= 1.0
        return q_params


def test_a_row_far_from_typical_data_is_judged_by_its_own_kind(oracle):
    guide, far = WrongFarOut(oracle), oracle.bias.float().unsqueeze(0) + 4
    typical = calibrate(oracle.model, guide, oracle.sample(10), rows=300).summary()
    assert typical["sbc_p"].mean > 0.01
    assert figures(oracle, guide, far)["posterior_sbc_p"].mean < 1e-3
    assert figures(oracle, Exact(oracle), far)["posterior_sbc_p"].mean > 0.01


def test_a_seed_fixes_all_and_the_stream_outside_goes_on(oracle):
    before, x = torch.get_rng_state(), oracle.sample(1)
    one, same = (calibrate_posterior(oracle.model, Exact(oracle), x, simulated=20, seed=3) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one.ranks, same.ranks)


def test_what_cannot_be_calibrated_is_refused(oracle):
    with pytest.raises(UserError, match="Delta is a point mass"):
        calibrate_posterior(oracle.model, Amortized(torch.nn.Linear(5, 2), Delta(2)), oracle.sample(1))
    with pytest.raises(UserError, match="row 0: its posterior draws failed"):
        calibrate_posterior(oracle.model, Exact(oracle), torch.full((1, 5), torch.inf))
