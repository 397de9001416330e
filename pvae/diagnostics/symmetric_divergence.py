"""Symmetric divergence over simulations: q against true latents, which are exact posterior draws of simulated rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pvae.errors import UserError, check_range
from pvae.inference.batching import ROWS, inference_mode
from pvae.inference.guides import Guide
from pvae.inference.posterior import posterior_moments
from pvae.runtime.pyro_params import Program
from pvae.samplers.log_joint import LogJoint, simulate_joint
from pvae.stats import Estimate, log_mean_exp, mean_se

STREAM = 4_000_037  # offset of seeds: refinement uses small ones, and must share no noise with latents and draws
# A true latent is missed where the posterior's density exceeds q's by this many nats, this many sds of q from its mean.
DENSER, FARTHER = 9.2, 5.0


@dataclass(frozen=True)
class SymmetricDivergence:
    r"""Posterior error of q over N simulated rows, [N] each.

    Attributes:
        divergence: :math:`\log \frac{p(x, u^*)}{q(u^*|x)} - \frac1K \sum_k \log \frac{p(x, u_k)}{q(u_k|x)}`, with the
            true latents u* and draws u_k of q; its mean is KL(q || p) + KL(p || q) in nats.
        width: upper minus lower bound of log p(x) by K draws, :math:`\log \frac{\sum_k w_k + w^*}{K + 1} - \log \frac1K
            \sum_k w_k`: what the importance-weighted bound of q may fall short, in nats.
        missed: whether q misses the true latents: the posterior is over 10,000 times as dense there as q, and some
            latent is more than 5 standard deviations of q from its mean.
    """

    divergence: Tensor
    width: Tensor
    missed: Tensor

    def summary(self) -> dict[str, Estimate]:
        """Return ``symmetric_divergence``, ``iwae_width`` and ``missed_mass``, whose error allows for one row more."""
        share, N = mean_se(self.missed.double()).mean, len(self.missed)
        above = (share * N + 1) / (N + 2)
        return {
            "symmetric_divergence": mean_se(self.divergence),
            "iwae_width": mean_se(self.width),
            "missed_mass": Estimate(share, (above * (1 - above) / N) ** 0.5),
        }


def measure_symmetric_divergence(
    model: Program, guide: Guide, like: Tensor, *, rows: int = 500, draws: int = 200, seed: int = 0
) -> SymmetricDivergence:
    r"""Measure the symmetric divergence of q from the posterior over rows simulated from the model.

    .. math:: E_{p(u, x)} \log \frac{p(x, u)}{q(u|x)} - E_{p(x)} E_{q(u|x)} \log \frac{p(x, u)}{q(u|x)}
              = E_{p(x)} [ KL(q \| p) + KL(p \| q) ]

    No evidence is needed, and modes that q misses count, since true latents lie in them as often as they should.

    Arguments:
        model, guide: a Pyro program and its approximate posterior.
        like: rows [B, ...], for the shape of a row and for what the model is given beside its latents.
        rows: N, simulated rows.
        draws: K, of q for each row.
        seed: of all noise; the random stream outside is left alone.

    Raises:
        UserError: a number below 1, a point-mass family, or a model whose draws make no rows.

    See also: `calibrate`, by ranks of the same kind of latents.

    Source: Domke (2021), *An Easy to Interpret Diagnostic for Approximate Inference: Symmetric Divergence Over
    Simulations*, arXiv:2103.01030; the upper bound of log p(x), by an exact draw among K others: Sobolev, Vetrov
    (2019), *Importance Weighted Hierarchical Variational Inference*, arXiv:1905.03290.

    >>> import pvae
    >>> vae = pvae.VAE(torch.nn.Linear(2, 5), pvae.likelihoods.Bernoulli(), pvae.priors.StandardNormal(2))
    >>> guide = pvae.Amortized(torch.nn.Linear(5, 4), pvae.families.DiagonalNormal(2))
    >>> measure_symmetric_divergence(vae.model, guide, torch.zeros(3, 5), rows=20).divergence.shape
    torch.Size([20])
    """
    check_range(least=1, rows=rows, draws=draws)
    if guide.family.point_mass:
        raise UserError(f"{type(guide.family).__name__} is a point mass: the divergence needs a family with a density")
    like = like[torch.arange(rows, device=like.device) % len(like)]
    u, x = simulate_joint(model, like, guide.sites, seed=seed + STREAM)
    with inference_mode(model, guide, seed=seed + STREAM + 1):
        parts = zip(u.split(ROWS), x.split(ROWS), strict=True)
        batches = zip(*(_compare(model, guide, *part, draws) for part in parts), strict=True)
        return SymmetricDivergence(*(torch.cat(values).cpu() for values in batches))


def _compare(model: Program, guide: Guide, u: Tensor, x: Tensor, draws: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return divergence, width of the bracket and whether true latents u [N, D] are missed, [N] each."""
    target, q_params = LogJoint(model, x, None, guide.sites), guide.params(x).detach()
    q, (mean, sd) = guide.family(q_params), posterior_moments(guide.family, q_params)
    log_w, log_w_true = (target(z) - q.log_prob(z) for z in (q.sample(torch.Size([draws])), u.unsqueeze(0)))
    lower = log_mean_exp(log_w)
    missed = (log_w_true[0] - lower > DENSER) & (((u - mean) / sd).abs() > FARTHER).any(-1)
    return log_w_true[0] - log_w.mean(0), log_mean_exp(torch.cat([log_w, log_w_true])) - lower, missed
