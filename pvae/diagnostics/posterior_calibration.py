"""Posterior SBC: is q calibrated for rows like one that was observed, rather than for typical rows of the prior?"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pvae.diagnostics.calibration import ecdf_distance
from pvae.errors import UserError, check_range
from pvae.inference.batching import as_rows, inference_mode
from pvae.inference.guides import Guide
from pvae.inference.posterior import decode_latents
from pvae.runtime.pyro_params import Program
from pvae.samplers.log_joint import LogJoint
from pvae.samplers.posterior_draws import PosteriorDraws
from pvae.samplers.row_posterior import posterior
from pvae.stats import Estimate, effective_sample_size, holm, mean_se, uniform_p

STREAM = 5_000_011  # offset of seeds, clear of those of searches, calibration and references


@dataclass(frozen=True)
class PosteriorCalibration:
    """Ranks of posterior draws of B observed rows, each among q's draws updated by a row simulated from it.

    Attributes:
        ranks: uniform on (0, 1) in each row and dimension if q is the posterior of the observed row, [B, N, D].
        ess: effective number of q's updated draws, [B, N].
    """

    ranks: Tensor
    ess: Tensor

    def p_values(self) -> Tensor:
        """Return the Holm-adjusted p-values that ranks are uniform, [B, D]."""
        B, _, D = self.ranks.shape
        return holm(uniform_p(self.ranks.transpose(0, 1).flatten(1))).view(B, D)

    def summary(self) -> dict[str, Estimate]:
        """Return the smallest p-value, the largest distance of ranks from uniform, and the mean ESS."""
        distance = ecdf_distance(self.ranks.transpose(0, 1).flatten(1)).max().item()
        return {
            "posterior_sbc_p": Estimate(self.p_values().min().item(), math.nan),
            "posterior_sbc_distance": Estimate(distance, math.nan),
            "posterior_sbc_ess": mean_se(self.ess.mean(1)),
        }


def calibrate_posterior(
    model: Program,
    guide: Guide,
    x: Tensor,
    index: Tensor | None = None,
    *,
    simulated: int = 200,
    draws: int = 500,
    reference: PosteriorDraws | None = None,
    seed: int = 0,
) -> PosteriorCalibration:
    r"""Calibrate q at observed rows: simulation-based calibration with the posterior in the place of the prior.

    .. math:: u^* \sim p(u|x), \quad x' \sim p(x'|u^*), \quad
              \mathrm{rank} = \sum_k \bar w_k 1[u_k < u^*], \quad u_k \sim q(u|x), \quad w_k = p(x'|u_k)

    If q(u|x) is the posterior of x, the weighted draws are those of p(u|x, x'), of which u* is one more. A row far
    from the prior's typical data is judged by its own kind, where `calibrate` averages over rows of the prior.

    Arguments:
        model, guide: a Pyro program and its approximate posterior.
        x, index: observed rows [B, ...], few, and which training datapoints they are; None for new rows.
        simulated: N, rows x' for each observed one.
        draws: K, of q for each of them.
        reference: draws of p(u|x), see `pvae.posterior`; made unless given, without the guide's help.
        seed: of all noise; the random stream outside is left alone.

    Raises:
        UserError: a number below 1, a point-mass family, or a row whose posterior draws failed their checks.

    See also: `calibrate`; `compare_with_reference`, against the same draws directly.

    Source: Saeilynoja, Schmitt, Buerkner, Vehtari (2025), *Posterior SBC: Simulation-Based Calibration Checking
    Conditional on Data*, arXiv:2502.03279; here q is updated by importance weights instead of being fitted anew.
    """
    check_range(least=1, simulated=simulated, draws=draws)
    if guide.family.point_mass:
        raise UserError(f"{type(guide.family).__name__} is a point mass: calibration needs a family with a density")
    x = as_rows(x, model)
    reference = reference or posterior(model, None, x, index, accuracy="high", seed=seed + STREAM)
    if not reference.reliable.all():
        row = int((~reference.reliable).nonzero()[0])
        raise UserError(
            f"row {row}: its posterior draws failed their checks, so that nothing can be calibrated by them"
        )
    true = reference.resample(simulated, seed=seed + STREAM + 1).transpose(0, 1).to(x)  # [B, N, D]
    with inference_mode(model, guide, seed=seed + STREAM + 2):
        q_params = guide.params(x, index).detach()
        parts = [_rank(model, guide, *row, draws) for row in zip(x, q_params, true, strict=True)]
    ranks, ess = (torch.stack(values).cpu() for values in zip(*parts, strict=True))
    return PosteriorCalibration(ranks, ess)


def _rank(model: Program, guide: Guide, x: Tensor, q_params: Tensor, true: Tensor, draws: int) -> tuple[Tensor, Tensor]:
    """Return ranks [N, D] of true latents [N, D] among q's draws updated by rows simulated from them, and ESS [N]."""
    seed = int(torch.randint(2**31, ()))
    simulated = decode_latents(model, guide, true, x.unsqueeze(0), draw=True, seed=seed).to(x)
    rows = x.expand(len(true), *x.shape).clone()  # entries that are given, such as labels, stay
    rows[:, : simulated.shape[1]] = simulated
    u = guide.family(q_params).sample(torch.Size([draws, len(true)]))
    log_w = LogJoint(model, rows, None, guide.sites).log_lik_and_prior(u)[0]
    below = (log_w.softmax(0).unsqueeze(-1) * (u < true)).sum(0).double()
    return below, effective_sample_size(log_w)
