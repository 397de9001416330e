"""Simulation-based calibration (SBC) and TARP: is the posterior unbiased, and do its intervals cover?"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pvae.errors import UserError, check_range
from pvae.inference.batching import ROWS, inference_mode
from pvae.inference.guides import Guide
from pvae.runtime.pyro_params import Program
from pvae.samplers.log_joint import simulate_joint
from pvae.stats import Estimate, holm, mean_se, uniform_p

STREAM = 1_000_003  # offset of seeds: refinement uses small ones, and must share no noise with latents and draws


@dataclass(frozen=True)
class Calibration:
    """Ranks of the true latents of N simulated rows under q, in the D unconstrained coordinates u of the latents.

    Attributes:
        ranks: share of L draws of q below the true u, randomized so that it is exactly uniform on (0, 1) if q is the
            posterior, [N, D].
        tarp: share of draws nearer to a reference point than the true u, likewise uniform, [N].
        z_score: (mean of q - true u) / standard deviation of q, [N, D], corrected for the noise of these two; mean 0
            and variance 1 if q is the posterior.
        contraction: posterior contraction, 1 - variance of q / variance of the prior, [N, D].
        draws: L.
    """

    ranks: Tensor
    tarp: Tensor
    z_score: Tensor
    contraction: Tensor
    draws: Tensor

    def p_values(self) -> Tensor:
        """Return the Holm-adjusted p-value that each dimension's ranks are uniform, [D]."""
        return holm(uniform_p(self.ranks))

    def summary(self) -> dict[str, Estimate]:
        """Return the quantities of section "Calibration"; p-values and distances have no standard error."""
        z, tarp, off = self.z_score.double(), self.tarp.unsqueeze(-1), (self.ranks - 0.5).abs()
        square = mean_se((z**2).mean(-1))
        return {
            "sbc_p": Estimate(self.p_values().min().item(), math.nan),
            "sbc_distance": Estimate(ecdf_distance(self.ranks).max().item(), math.nan),
            "tarp_p": Estimate(uniform_p(tarp).item(), math.nan),
            "tarp_distance": Estimate(ecdf_distance(tarp).item(), math.nan),
            "sbc_coverage_50": mean_se((off < 0.25).double().mean(-1)),
            "sbc_coverage_90": mean_se((off < 0.45).double().mean(-1)),
            "z_mean": mean_se(z[:, z.mean(0).abs().argmax()]),
            "z_sd": Estimate(square.mean**0.5, square.se / (2 * square.mean**0.5)),
            "contraction": mean_se(self.contraction.mean(-1)),
        }


def ecdf_distance(u: Tensor) -> Tensor:
    r"""Compute each column's Kolmogorov-Smirnov distance from uniform, :math:`\sup_t |F_N(t) - t|`, [D] of u [N, D].

    >>> ecdf_distance(torch.tensor([[0.25], [0.75]]))
    tensor([0.2500], dtype=torch.float64)
    """
    ordered, N = u.double().sort(0).values, len(u)
    steps = torch.arange(N + 1, dtype=torch.double, device=u.device).unsqueeze(-1) / N
    return torch.maximum(steps[1:] - ordered, ordered - steps[:-1]).amax(0)


def ecdf_band(N: int, D: int = 1, level: float = 0.95) -> float:
    """Return half the width of a band that holds all ECDFs of D uniform columns of N numbers, at ``level`` or more.

    >>> round(ecdf_band(500), 4)
    0.0604
    """
    from scipy.stats import kstwo

    return float(kstwo.ppf(1 - (1 - level) / D, N))


def calibrate(
    model: Program,
    guide: Guide,
    like: Tensor,
    *,
    rows: int = 500,
    draws: int = 100,
    seed: int = 0,
    progress: Callable[[float], None] = lambda share: None,
) -> Calibration:
    r"""Simulate latents and rows from the model, and rank the true latents among draws of the guide (SBC and TARP).

    With :math:`u^* \sim p(u), x^* \sim p(x|u^*)`, u* is a draw from p(u|x*), and its rank among draws of q(u|x*) is
    uniform if q is the posterior. The rows are new to the guide: `PerDatapoint` fits them. TARP ranks distances from
    one more draw of q, in its standard deviations: all dimensions at once, and so weak against a bias in few of many.

    Arguments:
        model, guide: a Pyro program and its approximate posterior.
        like: rows [B, ...], for the shape of a row and for what the model is given beside its latents.
        rows: N, simulated rows.
        draws: L, for each row; as many again give q's means and standard deviations.
        seed: of all noise; the random stream outside is left alone.
        progress: called with the share of the rows done.

    Raises:
        UserError: rows below 1, draws below 2, a point-mass family, or a model whose draws make no rows.

    See also: `compare_with_mcmc`, on real rows.

    Source: Talts, Betancourt, Simpson, Vehtari, Gelman (2018), *Validating Bayesian Inference Algorithms with
    Simulation-Based Calibration*, arXiv:1804.06788; Lemos, Coogan, Hezaveh, Perreault-Levasseur (2023), *Sampling-Based
    Accuracy Testing of Posterior Estimators for General Inference*, arXiv:2302.03026; z-score and contraction: Schad,
    Betancourt, Vasishth (2021), *Toward a Principled Bayesian Workflow in Cognitive Science*, arXiv:1904.12765.

    >>> import pvae
    >>> vae = pvae.VAE(torch.nn.Linear(2, 5), pvae.likelihoods.Bernoulli(), pvae.priors.StandardNormal(2))
    >>> guide = pvae.Amortized(torch.nn.Linear(5, 4), pvae.families.DiagonalNormal(2))
    >>> calibrate(vae.model, guide, torch.zeros(3, 5), rows=20).ranks.shape
    torch.Size([20, 2])
    """
    check_range(least=1, rows=rows)
    if draws < 2:
        raise UserError(f"draws is {draws}, but calibration needs at least 2 to estimate the standard deviation of q")
    if guide.family.point_mass:
        raise UserError(f"{type(guide.family).__name__} is a point mass: calibration needs a family with a density")
    like = like[torch.arange(rows, device=like.device) % len(like)]
    u, x = simulate_joint(model, like, guide.sites, seed=seed + STREAM)
    batches = []
    with inference_mode(guide, seed=seed + STREAM + 1):
        for batch in zip(u.split(ROWS), x.split(ROWS), strict=True):
            batches.append(_rank(guide, *batch, draws))
            progress(min(1.0, len(batches) * ROWS / rows))
    ranks, tarp, mean, sd = (torch.cat(values).cpu() for values in zip(*batches, strict=True))
    u = u.cpu()
    # The mean and standard deviation of L draws are noisy themselves, which makes (mean - u) / sd wider by this.
    wider = ((1 + 1 / draws) * (draws - 1) / (draws - 3)) ** 0.5 if draws > 3 else 1.0
    return Calibration(ranks, tarp, (mean - u) / sd / wider, 1 - sd**2 / u.var(0), torch.tensor(draws))


def _rank(guide: Guide, u: Tensor, x: Tensor, draws: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return ranks [N, D] and TARP's ranks [N] of the true latents u [N, D] of rows x; mean and sd of q, [N, D]."""
    q = guide.family(guide.params(x).detach())
    z, others, point = q.sample((draws,)), q.sample((draws,)), q.sample()
    sd = others.std(0)
    distance, true_distance = (((values - point) / sd).norm(dim=-1) for values in (z, u))
    return _randomized_rank(z < u), _randomized_rank(distance < true_distance), others.mean(0), sd


def _randomized_rank(below: Tensor) -> Tensor:
    """Return (rank + U) / (L + 1) of below [L, ...], with U uniform: uniform if all L + 1 ranks are equally likely."""
    rank = below.double().sum(0)
    return (rank + torch.rand_like(rank)) / (len(below) + 1)
