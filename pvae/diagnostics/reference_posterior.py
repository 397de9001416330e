"""Reference posterior: means, standard deviations and intervals of q against draws that passed checks of their own."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pvae.errors import UserError, check_range
from pvae.inference.batching import inference_mode
from pvae.inference.guides import Guide
from pvae.inference.latents import LatentSites
from pvae.inference.posterior import importance_draws
from pvae.runtime.pyro_params import Program
from pvae.runtime.torch_state import seeded
from pvae.samplers import hmc
from pvae.samplers.ais import AISEstimate, anneal
from pvae.samplers.hmc import Chains
from pvae.samplers.log_joint import LogJoint
from pvae.samplers.posterior_draws import PosteriorDraws, pool_chains
from pvae.stats import Estimate, holm, mean_se

PARTICLES, DRAWS, WEIGHED = 4, 4000, 1000  # annealed particles for each chain; draws of q, and its weighted draws
STREAM = 2_000_003  # offset of seeds: refinement uses small ones, and must share no noise with chains and draws
# Error of a row's weighted means and log standard deviations, in posterior standard deviations (RMS over dimensions),
# and of its evidence, in nats, beyond which its weighted estimates are off.
OFF = 0.25


@dataclass(frozen=True)
class ReferencePosterior:
    """Posterior of B rows by reference draws and by q, in the D unconstrained coordinates of the latents; float64.

    Attributes:
        mean, sd, guide_mean, guide_sd: of the reference, and of draws of q, [B, D].
        mean_se: Monte Carlo error of guide_mean - mean, of both together, [B, D].
        sd_se: Monte Carlo error of log(guide_sd / sd), [B, D].
        coverage_50, coverage_90: share of the posterior in q's central intervals, by reference draws, [B, D].
        weighted_mean, weighted_sd: by 1000 importance-weighted draws of q, [B, D].
        evidence_error: log p(x) by these weights minus the reference's, [B] nats; NaN where that has none.
        ess: effective number of reference draws, [B].
        reliable: the checks of the row's reference draws passed, [B]; summaries use these rows alone.
        method: number in ``samplers.METHODS`` of the method that gave them, [B].
    """

    mean: Tensor
    sd: Tensor
    guide_mean: Tensor
    guide_sd: Tensor
    mean_se: Tensor
    sd_se: Tensor
    coverage_50: Tensor
    coverage_90: Tensor
    weighted_mean: Tensor
    weighted_sd: Tensor
    evidence_error: Tensor
    ess: Tensor
    reliable: Tensor
    method: Tensor

    @property
    def mean_error(self) -> Tensor:
        """Error of posterior means in posterior standard deviations, (guide_mean - mean) / sd, [B, D]."""
        return (self.guide_mean - self.mean) / self.sd

    @property
    def sd_ratio(self) -> Tensor:
        """Ratio of standard deviations, guide_sd / sd, [B, D]."""
        return self.guide_sd / self.sd

    @property
    def weighted_off(self) -> Tensor:
        """Whether a row's weighted estimates are off by more than a quarter: of an sd, of its log, or of a nat, [B]."""
        mean = ((self.weighted_mean - self.mean) / self.sd).square().mean(-1).sqrt()
        spread = (self.weighted_sd / self.sd).log().square().mean(-1).sqrt()
        return ~((mean <= OFF) & (spread <= OFF)) | (self.evidence_error.abs() > OFF)

    def p_values(self) -> Tensor:
        r"""Return p-values [2, D] that q's means, and its standard deviations, equal the reference's in reliable rows.

        In a dimension, :math:`\sum_i (\text{difference}_i / \text{its Monte Carlo error}_i)^2` over rows is chi-square.
        """
        means = (self.guide_mean - self.mean) / self.mean_se
        off = torch.stack([means, self.sd_ratio.log() / self.sd_se])[:, self.reliable] ** 2
        return torch.special.gammaincc(torch.tensor(off.shape[1] / 2, dtype=off.dtype), off.sum(1) / 2)

    def summary(self) -> dict[str, Estimate]:
        """Return the quantities of section "Reference posterior"; the share of reliable rows alone if below one half.

        Monte Carlo error is subtracted from ``mean_error``; ``sd_ratio`` is a geometric mean.
        """
        rows, share = self.reliable, mean_se(self.reliable.double())
        if share.mean < 0.5:
            return {"reliable": share}
        log_ratio = mean_se(self.sd_ratio[rows].log().mean(-1))
        ratio = math.exp(log_ratio.mean)
        square = mean_se((self.mean_error**2 - (self.mean_se / self.sd) ** 2)[rows].mean(-1))
        root = max(square.mean, 0.0) ** 0.5
        return {
            "reliable": share,
            # The delta method, unless the error is zero within noise.
            "mean_error": Estimate(root, square.se / (2 * max(root, square.se**0.5) or math.nan)),
            "sd_ratio": Estimate(ratio, ratio * log_ratio.se),
            "coverage_50": mean_se(self.coverage_50[rows].mean(-1)),
            "coverage_90": mean_se(self.coverage_90[rows].mean(-1)),
            "reference_p": Estimate(holm(self.p_values().flatten()).min().item(), math.nan),
            "weighted_off": mean_se(self.weighted_off[rows].double()),
        }


def compare_with_reference(
    model: Program, guide: Guide, x: Tensor, index: Tensor | None = None, *, draws: PosteriorDraws, seed: int = 0
) -> ReferencePosterior:
    """Compare a guide's posteriors with reference draws for the same rows x [B, ...].

    Arguments:
        draws: see `pvae.posterior`, best with no guide, so that they owe it nothing; or chains by `run_long_chains`,
            pooled by `pool_chains`. Of the guide's sites, in their order.
        seed: of q's draws; the random stream outside is left alone.

    Raises:
        UserError: a point-mass family.
    """
    _refuse_point_mass(guide)
    with inference_mode(model, guide, seed=seed + STREAM + 3):
        q_params = guide.params(x, index).detach()
        q_draws = guide.family(q_params).sample((DRAWS,)).double().cpu()
        weighted = importance_draws(model, guide, q_params, x, index, WEIGHED)
    u, weights = draws.u.double().cpu(), draws.log_weights.double().cpu().exp()
    (mean, sd), guide_sd, ess = (m.double().cpu() for m in draws.moments), q_draws.std(0), draws.ess.cpu().unsqueeze(-1)
    weighted_mean = weighted.mean(weighted.z)
    return ReferencePosterior(
        mean=mean,
        sd=sd,
        guide_mean=q_draws.mean(0),
        guide_sd=guide_sd,
        mean_se=(sd**2 / ess + guide_sd**2 / DRAWS).sqrt(),
        sd_se=(_log_sd_variance(u, weights) / ess + _log_sd_variance(q_draws) / DRAWS).sqrt(),
        coverage_50=_coverage(u, weights, q_draws, 0.5),
        coverage_90=_coverage(u, weights, q_draws, 0.9),
        weighted_mean=weighted_mean.double().cpu(),
        weighted_sd=weighted.mean((weighted.z - weighted_mean) ** 2).sqrt().double().cpu(),
        evidence_error=(weighted.log_evidence.double().cpu() - draws.log_evidence.cpu()),
        ess=ess.squeeze(-1),
        reliable=draws.reliable.cpu(),
        method=draws.method.cpu(),
    )


def compare_with_mcmc(
    model: Program, guide: Guide, x: Tensor, index: Tensor | None = None, *, seed: int = 0, **options: Any
) -> ReferencePosterior:
    """Compare a guide with long HMC chains: `run_long_chains` with these options, then `compare_with_reference`.

    >>> import pvae
    >>> vae = pvae.VAE(torch.nn.Linear(2, 5), pvae.likelihoods.Bernoulli(), pvae.priors.StandardNormal(2))
    >>> guide = pvae.Amortized(torch.nn.Linear(5, 4), pvae.families.DiagonalNormal(2))
    >>> compare_with_mcmc(vae.model, guide, torch.zeros(3, 5), draws=20, warm_up=20, temperatures=5).sd_ratio.shape
    torch.Size([3, 2])
    """
    _refuse_point_mass(guide)
    chains = run_long_chains(model, x, index, guide.sites, seed=seed, **options)
    return compare_with_reference(model, guide, x, index, draws=pool_chains(chains), seed=seed)


def run_long_chains(
    model: Program,
    x: Tensor,
    index: Tensor | None = None,
    sites: LatentSites | None = None,
    *,
    chains: int = 8,
    draws: int = 1500,
    warm_up: int = 300,
    temperatures: int = 100,
    num_integration_steps: int = 5,
    seed: int = 0,
    progress: Callable[[float], None] = lambda share: None,
) -> Chains:
    """Run HMC chains of the posteriors of rows x [B, ...], started where annealing from the prior ends.

    Four particles are annealed for each chain. The chains start at different ones, drawn by their weights: modes
    without mass are left out, but chains in several modes with mass stay apart, and R-hat shows it.

    Arguments:
        model, sites: a Pyro program, and its latents, which are found unless given.
        x, index: rows, and which training datapoints they are; None for new rows.
        chains, draws, warm_up, num_integration_steps: see `sample`. The R-hat of converged chains is still
            about 1 + chains / ESS, with the ESS of squares, 0.2 to 0.4 of all draws: 1000 of each are just enough.
        temperatures: see `anneal`.
        seed: of all noise; the random stream outside is left alone.
        progress: called with the share of the work done.

    Raises:
        UserError: a count below 1, or HMC that diverges everywhere.
    """
    counts: Any = {"draws": draws, "warm_up": warm_up, "num_integration_steps": num_integration_steps}
    check_range(least=1, chains=chains, **counts)
    target, seed = LogJoint(model, x, index, sites), seed + STREAM
    # Five leapfrog steps a temperature and a quarter more for the pilot, in shares of all.
    annealing, sampling = 6.25 * PARTICLES * temperatures, num_integration_steps * (draws + warm_up)
    first = annealing / (annealing + sampling)
    particles = anneal(
        target, chains=PARTICLES * chains, temperatures=temperatures, seed=seed, progress=lambda s: progress(first * s)
    )
    with seeded(seed + 1):
        init = _draw_particles(particles, chains)
    options: Any = {"seed": seed + 2, "progress": lambda share: progress(first + (1 - first) * share)}
    return hmc.sample(target, init, scale=particles.position.std(0).clamp(min=1e-6), **counts, **options)


def _draw_particles(particles: AISEstimate, chains: int) -> Tensor:
    """Draw different particles of each row by their weights, [C, B, D]: the largest log-weights under Gumbel noise.

    Source: Kool, van Hoof, Welling (2019), *Stochastic Beams and Where to Find Them*, arXiv:1903.06059.
    """
    log_w = particles.log_w.nan_to_num(nan=-torch.inf)
    best = (log_w - torch.empty_like(log_w).exponential_().log()).topk(chains, 0).indices.unsqueeze(-1)
    return particles.position.gather(0, best.expand(-1, -1, particles.position.shape[-1]))


def _refuse_point_mass(guide: Guide) -> None:
    if guide.family.point_mass:
        raise UserError(f"{type(guide.family).__name__} is a point mass: the comparison needs a family with a density")


def _log_sd_variance(draws: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return the variance of log sd for one draw of [S, B, D], weighted by [S, B], [B, D]."""
    shares = torch.full_like(draws[..., :1], 1 / len(draws)) if weights is None else weights.unsqueeze(-1)
    square = (draws - (shares * draws).sum(0)) ** 2
    variance = (shares * square).sum(0)
    return (shares * (square - variance) ** 2).sum(0) / variance**2 / 4


def _coverage(draws: Tensor, weights: Tensor, q_draws: Tensor, level: float) -> Tensor:
    """Return the weight of draws [S, B, D] in the central intervals of q's draws, [B, D]."""
    ordered, outside = q_draws.sort(0).values, round(len(q_draws) * (1 - level) / 2)
    inside = (draws > ordered[outside]) & (draws < ordered[-1 - outside])
    return (weights.unsqueeze(-1) * inside).sum(0)
