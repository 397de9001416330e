"""MCMC reference: means, standard deviations and intervals of a posterior against long HMC chains, row by row."""

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
from pvae.runtime.pyro_params import Program
from pvae.runtime.torch_state import seeded
from pvae.samplers import hmc
from pvae.samplers.ais import AISEstimate, anneal
from pvae.samplers.hmc import Chains
from pvae.samplers.log_joint import LogJoint
from pvae.stats import Estimate, chain_ess, holm, mean_se, r_hat

# Limits of convergence: R-hat below 1.01 and an ESS of 400 or more (Vehtari et al. 2021, arXiv:1903.08008); divergent
# trajectories leave parts of the posterior out (Betancourt 2017, arXiv:1701.02434).
R_HAT, ESS, DIVERGENT = 1.01, 400.0, 0.01
# Annealed particles for each chain, and draws of q.
PARTICLES, DRAWS = 4, 4000
# Seeds of chains and draws are offset by this: refinement uses small seeds, and must share no noise with them.
STREAM = 2_000_003


@dataclass(frozen=True)
class MCMCReference:
    """Posterior of B rows by MCMC and by q, in the D unconstrained coordinates of the latents; float64.

    Attributes:
        mean, sd: of the chains, [B, D].
        guide_mean, guide_sd: of draws of q, [B, D].
        mean_se: Monte Carlo error of guide_mean - mean, of chains and draws together, [B, D].
        sd_se: Monte Carlo error of log(guide_sd / sd), [B, D].
        coverage_50, coverage_90: share of the chains' draws in q's central intervals, [B, D].
        r_hat, ess: of the chains, [B, D].
        acceptance, divergent: acceptance rate and share of divergent trajectories of the chains, [B].
        sound: the row's chains have converged: they agree, are long enough and seldom diverge, [B]. Summaries use
            these rows alone.
        chains, draws: C, and T of each chain.
    """

    mean: Tensor
    sd: Tensor
    guide_mean: Tensor
    guide_sd: Tensor
    mean_se: Tensor
    sd_se: Tensor
    coverage_50: Tensor
    coverage_90: Tensor
    r_hat: Tensor
    ess: Tensor
    acceptance: Tensor
    divergent: Tensor
    sound: Tensor
    chains: Tensor
    draws: Tensor

    @property
    def mean_error(self) -> Tensor:
        """Error of posterior means in posterior standard deviations, (guide_mean - mean) / sd, [B, D]."""
        return (self.guide_mean - self.mean) / self.sd

    @property
    def sd_ratio(self) -> Tensor:
        """Ratio of standard deviations, guide_sd / sd, [B, D]."""
        return self.guide_sd / self.sd

    def p_values(self) -> Tensor:
        r"""Return p-values [2, D] that q's means, and its standard deviations, equal the chains' in all converged rows.

        By dimension, :math:`\sum_i (\text{difference}_i / \text{its Monte Carlo error}_i)^2` is chi-square: rows are
        independent, dimensions need not be.
        """
        means = (self.guide_mean - self.mean) / self.mean_se
        off = torch.stack([means, self.sd_ratio.log() / self.sd_se])[:, self.sound] ** 2
        return torch.special.gammaincc(torch.full_like(off[:, 0], off.shape[1] / 2), off.sum(1) / 2)

    def summary(self) -> dict[str, Estimate]:
        """Return the quantities of section "MCMC reference"; the share of converged rows alone if it is below one half.

        Monte Carlo error is subtracted from ``mean_error``; ``sd_ratio`` is a geometric mean.
        """
        converged = mean_se(self.sound.double())
        if converged.mean < 0.5:
            return {"sound": converged}
        log_ratio = mean_se(self.sd_ratio[self.sound].log().mean(-1))
        ratio = math.exp(log_ratio.mean)
        return {
            "sound": converged,
            "mean_error": self._mean_error(),
            "sd_ratio": Estimate(ratio, ratio * log_ratio.se),
            "coverage_50": mean_se(self.coverage_50[self.sound].mean(-1)),
            "coverage_90": mean_se(self.coverage_90[self.sound].mean(-1)),
            "reference_p": Estimate(holm(self.p_values().flatten()).min().item(), math.nan),
        }

    def _mean_error(self) -> Estimate:
        squares = self.mean_error**2 - (self.mean_se / self.sd) ** 2
        square = mean_se(squares[self.sound].mean(-1))
        root = max(square.mean, 0.0) ** 0.5
        # The delta method, unless the error is zero within noise.
        return Estimate(root, square.se / (2 * max(root, square.se**0.5) or math.nan))


def compare_with_mcmc(
    model: Program, guide: Guide, x: Tensor, index: Tensor | None = None, *, seed: int = 0, **options: Any
) -> MCMCReference:
    """Compare a guide with long HMC chains of the posteriors of rows x [B, ...].

    `run_long_chains` with these options, then `compare_with_chains`, which can compare several guides with the same
    chains.

    >>> import pvae
    >>> vae = pvae.VAE(torch.nn.Linear(2, 5), pvae.likelihoods.Bernoulli(), pvae.priors.StandardNormal(2))
    >>> guide = pvae.Amortized(torch.nn.Linear(5, 4), pvae.families.DiagonalNormal(2))
    >>> compare_with_mcmc(vae.model, guide, torch.zeros(3, 5), draws=20, warm_up=20, temperatures=5).sd_ratio.shape
    torch.Size([3, 2])
    """
    _refuse_point_mass(guide)
    chains = run_long_chains(model, x, index, guide.sites, seed=seed, **options)
    return compare_with_chains(chains, guide, x, index, seed=seed)


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
        model: a Pyro program.
        x, index: rows, and which training datapoints they are.
        sites: the latents; those of the model unless given.
        chains, draws, warm_up, num_integration_steps: see `sample`. The R-hat of converged chains is still
            about 1 + chains / ESS, with the ESS of squares, 0.2 to 0.4 of all draws: 1000 of each are just enough.
        temperatures: see `anneal`.
        seed: of all noise; the random stream outside is left alone.
        progress: called with the share of the work done.

    Raises:
        UserError: a count below 1, or HMC that diverges everywhere.
    """
    check_range(least=1, chains=chains, draws=draws, warm_up=warm_up, num_integration_steps=num_integration_steps)
    target = LogJoint(model, x, index, sites)
    # Five leapfrog steps a temperature and a quarter more for the pilot, in shares of all.
    annealing, sampling = 6.25 * PARTICLES * temperatures, num_integration_steps * (draws + warm_up)
    first = annealing / (annealing + sampling)
    particles = anneal(
        target,
        chains=PARTICLES * chains,
        temperatures=temperatures,
        seed=seed + STREAM,
        progress=lambda share: progress(first * share),
    )
    with seeded(seed + STREAM + 1):
        init = _draw_particles(particles, chains)
    return hmc.sample(
        target,
        init,
        draws=draws,
        warm_up=warm_up,
        num_integration_steps=num_integration_steps,
        scale=particles.position.std(0).clamp(min=1e-6),
        seed=seed + STREAM + 2,
        progress=lambda share: progress(first + (1 - first) * share),
    )


def _draw_particles(particles: AISEstimate, chains: int) -> Tensor:
    """Draw different particles of each row by their weights, [C, B, D]: the largest log-weights under Gumbel noise.

    Source: Kool, van Hoof, Welling (2019), *Stochastic Beams and Where to Find Them*, arXiv:1903.06059.
    """
    log_w = particles.log_w.nan_to_num(nan=-torch.inf)
    noise = -torch.empty_like(log_w).exponential_().log()
    best = (log_w + noise).topk(chains, 0).indices.unsqueeze(-1)
    return particles.position.gather(0, best.expand(-1, -1, particles.position.shape[-1]))


def compare_with_chains(
    chains: Chains, guide: Guide, x: Tensor, index: Tensor | None = None, *, seed: int = 0
) -> MCMCReference:
    """Compare a guide's posteriors with chains for the same rows.

    Arguments:
        chains: see `run_long_chains`; of the guide's sites, in their order.
        guide: the approximate posterior.
        x, index: the rows.
        seed: of q's draws; the random stream outside is left alone.

    Raises:
        UserError: a point-mass family.

    Source: R-hat, ESS and their limits: Vehtari, Gelman, Simpson, Carpenter, Buerkner (2021), *Rank-Normalization,
    Folding, and Localization*, arXiv:1903.08008.
    """
    _refuse_point_mass(guide)
    with inference_mode(guide, seed=seed + STREAM + 3):
        q_draws = guide.family(guide.params(x, index).detach()).sample((DRAWS,)).double().cpu()
    draws = chains.draws.double().cpu()
    pooled = draws.flatten(0, 1)
    mean, sd, guide_mean, guide_sd = pooled.mean(0), pooled.std(0), q_draws.mean(0), q_draws.std(0)
    ess, agreement = chain_ess(draws), r_hat(draws)
    squares = chain_ess((draws - mean) ** 2)
    divergent = chains.divergence_rate.double().cpu()
    return MCMCReference(
        mean,
        sd,
        guide_mean,
        guide_sd,
        (sd**2 / ess + guide_sd**2 / DRAWS).sqrt(),
        (_log_sd_variance(pooled, squares) + _log_sd_variance(q_draws, DRAWS)).sqrt(),
        _coverage(pooled, q_draws, 0.5),
        _coverage(pooled, q_draws, 0.9),
        agreement,
        ess,
        chains.acceptance_rate.double().cpu(),
        divergent,
        ((agreement <= R_HAT) & (ess >= ESS)).all(-1) & (divergent <= DIVERGENT),
        torch.tensor(draws.shape[0]),
        torch.tensor(draws.shape[1]),
    )


def _refuse_point_mass(guide: Guide) -> None:
    if guide.family.point_mass:
        raise UserError(f"{type(guide.family).__name__} is a point mass: the comparison needs a family with a density")


def _log_sd_variance(draws: Tensor, count: Tensor | int) -> Tensor:
    """Variance of the log of the standard deviation of draws [S, B, D] of which ``count`` are independent, [B, D]."""
    square = (draws - draws.mean(0)) ** 2
    return (square.std(0) / square.mean(0) / 2) ** 2 / count


def _coverage(draws: Tensor, q_draws: Tensor, level: float) -> Tensor:
    """Share of draws [S, B, D] in the central intervals of q's draws, [B, D]."""
    ordered, outside = q_draws.sort(0).values, round(len(q_draws) * (1 - level) / 2)
    return ((draws > ordered[outside]) & (draws < ordered[-1 - outside])).double().mean(0)
