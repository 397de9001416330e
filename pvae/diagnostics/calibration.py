"""Calibration by simulation: on rows whose true latents are known, a posterior must neither lean nor boast."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pvae.errors import UserError, check_range
from pvae.inference.guides import Guide
from pvae.runtime.pyro_params import Program, local_param_store
from pvae.runtime.torch_state import no_validation, seeded
from pvae.samplers.log_joint import simulate_joint
from pvae.stats import Estimate, holm, mean_se, uniform_p

# Rows whose q is asked for together.
ROWS = 250
# Refinement draws from streams of small seeds: latents and draws must share no noise with it.
STREAM = 1_000_003


@dataclass(frozen=True)
class Calibration:
    """Where the true latents of N simulated rows stand under q, in the D real coordinates u behind the latents.

    Attributes:
        ranks: share of L draws of q below the true u, with a uniform number added so that it is exactly uniform on
            (0, 1) if q is the posterior, [N, D].
        tarp: share of draws nearer to a reference point than the true u, likewise uniform, [N].
        z_score: (mean of q - true u) / standard deviation of q, [N, D], corrected for the noise of these two; mean 0
            and variance 1 if q is the posterior.
        contraction: 1 - variance of q / variance of the prior, [N, D]: what the row told of u.
        draws: L.
    """

    ranks: Tensor
    tarp: Tensor
    z_score: Tensor
    contraction: Tensor
    draws: Tensor

    def p_values(self) -> Tensor:
        """p-value of each dimension's ranks for being uniform, adjusted for being D of them, [D]."""
        return holm(uniform_p(self.ranks))

    def summary(self) -> dict[str, Estimate]:
        """What the verdict looks at.

        ``sbc_p``, ``sbc_distance``: the smallest adjusted p-value of the ranks, the largest distance of their ECDF from
        the uniform one; ``tarp_p``, ``tarp_distance`` likewise; ``sbc_coverage_50``, ``sbc_coverage_90``: share of true
        latents in q's central intervals; ``z_mean`` of the dimension farthest off, ``z_sd``: root mean square of
        z-scores; ``contraction``: its mean. p-values and distances have no standard error.
        """
        z = self.z_score.double()
        return {
            "sbc_p": _plain(self.p_values().min()),
            "sbc_distance": _plain(ecdf_distance(self.ranks).max()),
            "tarp_p": _plain(uniform_p(self.tarp.unsqueeze(-1))[0]),
            "tarp_distance": _plain(ecdf_distance(self.tarp.unsqueeze(-1))[0]),
            "sbc_coverage_50": self._coverage(0.5),
            "sbc_coverage_90": self._coverage(0.9),
            "z_mean": mean_se(z[:, z.mean(0).abs().argmax()]),
            "z_sd": _root(mean_se((z**2).mean(-1))),
            "contraction": mean_se(self.contraction.mean(-1)),
        }

    def _coverage(self, level: float) -> Estimate:
        return mean_se(((self.ranks - 0.5).abs() < level / 2).double().mean(-1))


def _plain(value: Tensor) -> Estimate:
    return Estimate(value.item(), math.nan)


def _root(square: Estimate) -> Estimate:
    return Estimate(square.mean**0.5, square.se / (2 * square.mean**0.5))


def ecdf_distance(u: Tensor) -> Tensor:
    r"""Largest distance of the ECDF of each column of u [N, D] from the uniform one, :math:`\sup_t |F_N(t) - t|`, [D].

    >>> ecdf_distance(torch.tensor([[0.25], [0.75]]))
    tensor([0.2500], dtype=torch.float64)
    """
    ordered, N = u.double().sort(0).values, len(u)
    steps = torch.arange(N + 1, dtype=torch.double, device=u.device).unsqueeze(-1) / N
    return torch.maximum(steps[1:] - ordered, ordered - steps[:-1]).amax(0)


def ecdf_band(N: int, D: int = 1, level: float = 0.95) -> float:
    """Half the width of a band that holds the ECDFs of D uniform columns of N numbers at once, at this level at least.

    An ECDF leaves it exactly where its adjusted p-value, see `p_values`, is below 1 - level.

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
    r"""Draw latents and rows from the model, ask the guide for q of these rows, and see where the latents stand in it.

    :math:`u^* \sim p(u), x^* \sim p(x|u^*)`: then u* is a draw from p(u|x*), and its rank among draws of q(u|x*) is
    uniform if q is the posterior. The rows are new to the guide: one that has a table fits them as it does new data, so
    that each source of q_params is judged by itself. TARP's reference point is one more draw of q, and its distances are in
    standard deviations of q; both depend on x* alone, so that its ranks, too, are exactly uniform. It sees all
    dimensions at once, but a q that is off in its means alone only if it is so in many; ranks see that in one.

    Arguments:
        model: a Pyro program.
        guide: the source of q.
        like: data, for the shape of a row and what the model does not draw of it.
        rows: N.
        draws: L, for each row; as many again give q's means and standard deviations.
        seed: of all noise; the random stream outside is left alone.
        progress: called with the share of the rows done.

    Raises:
        UserError: rows below 1, draws below 2, a point-mass family, or a model whose draws make no rows.

    Source: Talts, Betancourt, Simpson, Vehtari, Gelman (2018), *Validating Bayesian Inference Algorithms with
    Simulation-Based Calibration*, arXiv:1804.06788; Lemos, Coogan, Hezaveh, Perreault-Levasseur (2023), *Sampling-Based
    Accuracy Testing of Posterior Estimators for General Inference*, arXiv:2302.03026; z-score and contraction: Schad,
    Betancourt, Vasishth (2021), *Toward a Principled Bayesian Workflow in Cognitive Science*, arXiv:1904.12765.

    >>> from pvae.inference.families import DiagonalNormal
    >>> from pvae.generative.vae import VAE
    >>> from pvae.inference.guides import Amortized
    >>> from pvae.generative.likelihoods import Bernoulli
    >>> from pvae.generative.priors import StandardNormal
    >>> vae = VAE(torch.nn.Linear(2, 5), Bernoulli(), StandardNormal(2))
    >>> guide = Amortized(torch.nn.Linear(5, 4), DiagonalNormal(2))
    >>> calibrate(vae.model, guide, torch.zeros(3, 5), rows=20).ranks.shape
    torch.Size([20, 2])
    """
    check_range(least=1, rows=rows)
    if draws < 2:
        raise UserError(f"draws is {draws}, but calibration needs at least 2 to know how wide q is")
    if guide.family.point_mass:
        raise UserError(f"{type(guide.family).__name__} is a point mass: latents have no rank among its draws")
    like = like[torch.arange(rows, device=like.device) % len(like)]
    u, x = simulate_joint(model, like, guide.sites, seed=seed + STREAM)
    parts = []
    guide.eval()
    with torch.no_grad(), no_validation(), local_param_store(), seeded(seed + STREAM + 1):
        for begin in range(0, rows, ROWS):
            part = slice(begin, begin + ROWS)
            parts.append(_placed(u[part], guide, x[part], draws))
            progress(min(1.0, (begin + ROWS) / rows))
    ranks, tarp, mean, sd = (torch.cat(values).cpu() for values in zip(*parts, strict=True))
    u = u.cpu()
    # The mean and standard deviation of L draws are noisy themselves, which makes (mean - u) / sd wider by this.
    wider = ((1 + 1 / draws) * (draws - 1) / (draws - 3)) ** 0.5 if draws > 3 else 1.0
    return Calibration(ranks, tarp, (mean - u) / sd / wider, 1 - sd**2 / u.var(0), torch.tensor(draws))


def _placed(u: Tensor, guide: Guide, x: Tensor, draws: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of rows x with true latents u [N, D]: ranks [N, D], TARP's [N], mean and standard deviation of q [N, D]."""
    q = guide.family(guide.params(x).detach())
    own, apart, point = q.sample((draws,)), q.sample((draws,)), q.sample()
    sd = apart.std(0)
    away, nearest = (((values - point) / sd).norm(dim=-1) for values in (own, u))
    return _share(own < u), _share(away < nearest), apart.mean(0), sd


def _share(below: Tensor) -> Tensor:
    """(rank + U) / (L + 1) of below [L, ...], with U uniform: uniform itself if all L + 1 orders are as likely."""
    rank = below.double().sum(0)
    return (rank + torch.rand_like(rank)) / (len(below) + 1)
