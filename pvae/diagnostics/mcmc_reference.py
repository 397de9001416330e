"""The posterior against a reference: q's means, spreads and intervals held against long HMC chains, row by row."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pvae.errors import UserError, check_range
from pvae.inference.guides import Guide
from pvae.inference.latents import LatentSites
from pvae.runtime.pyro_params import Program, local_param_store
from pvae.runtime.torch_state import no_validation, seeded
from pvae.samplers import hmc
from pvae.samplers.ais import AISEstimate, anneal
from pvae.samplers.hmc import Chains
from pvae.samplers.log_joint import LogJoint
from pvae.stats import Estimate, chain_ess, holm, mean_se, r_hat

# What makes chains sound. Vehtari et al. (2021), arXiv:1903.08008, ask for R-hat below 1.01 and an ESS of 400 or more;
# trajectories that diverge leave parts of the posterior out (Betancourt 2017, arXiv:1701.02434).
R_HAT, ESS, DIVERGENT = 1.01, 400.0, 0.01
# Annealed particles for each chain that starts, and draws of q.
PARTICLES, DRAWS = 4, 4000
# Refinement draws from streams of small seeds: chains and draws must share no noise with it.
STREAM = 2_000_003


@dataclass(frozen=True)
class MCMCReference:
    """The posterior by chains and by q, of B rows, in the D real coordinates u behind the latents; float64.

    Attributes:
        mean, sd: of the chains, [B, D].
        guide_mean, guide_sd: of draws of q, [B, D].
        mean_se: Monte Carlo error of guide_mean - mean, chains' and draws' together, [B, D].
        sd_se: the same of log(guide_sd / sd), [B, D].
        coverage_50, coverage_90: share of the chains' draws in q's central intervals, [B, D].
        r_hat, ess: of the chains, [B, D].
        acceptance, divergent: of the chains' trajectories, [B].
        sound: the row's chains agree, are long enough and seldom diverge, [B]; no figure uses rows that are not.
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
        """(guide_mean - mean) / sd, [B, D]."""
        return (self.guide_mean - self.mean) / self.sd

    @property
    def sd_ratio(self) -> Tensor:
        """guide_sd / sd, [B, D]."""
        return self.guide_sd / self.sd

    def p_values(self) -> Tensor:
        r"""p-values [2, D] of q's means, then standard deviations, being the chains' in all sound rows.

        By dimension, :math:`\sum_i (\text{difference}_i / \text{its Monte Carlo error}_i)^2` is chi-square: rows are
        independent, dimensions need not be.
        """
        means = (self.guide_mean - self.mean) / self.mean_se
        off = torch.stack([means, self.sd_ratio.log() / self.sd_se])[:, self.sound] ** 2
        return torch.special.gammaincc(torch.full_like(off[:, 0], off.shape[1] / 2), off.sum(1) / 2)

    def summary(self) -> dict[str, Estimate]:
        """What the verdict looks at; the share of ``sound`` rows alone if it is below one half.

        ``mean_error``: root mean square in posterior standard deviations, Monte Carlo error taken off; ``sd_ratio``:
        geometric mean; ``coverage_50``, ``coverage_90``; ``reference_p``: the smallest of the 2 D p-values, adjusted.
        """
        found = {"sound": mean_se(self.sound.double())}
        if found["sound"].mean < 0.5:
            return found
        log_ratio = mean_se(self.sd_ratio[self.sound].log().mean(-1))
        ratio = math.exp(log_ratio.mean)
        return found | {
            "mean_error": self._mean_error(),
            "sd_ratio": Estimate(ratio, ratio * log_ratio.se),
            "coverage_50": mean_se(self.coverage_50[self.sound].mean(-1)),
            "coverage_90": mean_se(self.coverage_90[self.sound].mean(-1)),
            "reference_p": Estimate(holm(self.p_values().flatten()).min().item(), math.nan),
        }

    def _mean_error(self) -> Estimate:
        own = self.mean_error**2 - (self.mean_se / self.sd) ** 2
        square = mean_se(own[self.sound].mean(-1))
        root = max(square.mean, 0.0) ** 0.5
        # The delta method, but for errors that are zero within noise.
        return Estimate(root, square.se / (2 * max(root, square.se**0.5) or math.nan))


def compare_with_mcmc(
    model: Program, guide: Guide, x: Tensor, index: Tensor | None = None, *, seed: int = 0, **options: Any
) -> MCMCReference:
    """Hold a guide's q against the posterior of rows x [B, ...] as long HMC chains find it.

    `run_long_chains` with these options, then `compare_with_chains`, which can hold several guides against the same
    chains.

    >>> from pvae.inference.families import DiagonalNormal
    >>> from pvae.generative.vae import VAE
    >>> from pvae.inference.guides import Amortized
    >>> from pvae.generative.likelihoods import Bernoulli
    >>> from pvae.generative.priors import StandardNormal
    >>> vae = VAE(torch.nn.Linear(2, 5), Bernoulli(), StandardNormal(2))
    >>> guide = Amortized(torch.nn.Linear(5, 4), DiagonalNormal(2))
    >>> compare_with_mcmc(vae.model, guide, torch.zeros(3, 5), draws=20, warm_up=20, temperatures=5).sd_ratio.shape
    torch.Size([3, 2])
    """
    _check(guide)
    found = run_long_chains(model, x, index, guide.sites, seed=seed, **options)
    return compare_with_chains(found, guide, x, index, seed=seed)


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
    """HMC chains of the posteriors of rows x [B, ...], started where annealing from the prior finds the mass.

    Four annealed particles run for each chain. The chains start at as many different ones, drawn by their weights:
    modes without mass are left out, but chains in several modes that have some stay apart, and R-hat sees them.

    Arguments:
        model: a Pyro program.
        x, index: rows, and which training datapoints they are.
        sites: the latents, found unless they are given.
        chains, draws, warm_up, num_integration_steps: see `sample`. Of chains that are well, R-hat is still about
            1 + chains / ESS, with the ESS of squares, 0.2 to 0.4 of all draws: 1000 of each chain are just enough.
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
        begin = _drawn(particles, chains)
    return hmc.sample(
        target,
        begin,
        draws=draws,
        warm_up=warm_up,
        num_integration_steps=num_integration_steps,
        scale=particles.position.std(0).clamp(min=1e-6),
        seed=seed + STREAM + 2,
        progress=lambda share: progress(first + (1 - first) * share),
    )


def _drawn(particles: AISEstimate, chains: int) -> Tensor:
    """Different particles of each row drawn by their weights, [C, B, D]: the largest log-weights under Gumbel noise.

    Source: Kool, van Hoof, Welling (2019), *Stochastic Beams and Where to Find Them*, arXiv:1903.06059.
    """
    log_w = particles.log_w.nan_to_num(nan=-torch.inf)
    noise = -torch.empty_like(log_w).exponential_().log()
    best = (log_w + noise).topk(chains, 0).indices.unsqueeze(-1)
    return particles.position.gather(0, best.expand(-1, -1, particles.position.shape[-1]))


def compare_with_chains(
    chains: Chains, guide: Guide, x: Tensor, index: Tensor | None = None, *, seed: int = 0
) -> MCMCReference:
    """Hold a guide's q against chains of the posteriors of the same rows.

    Arguments:
        chains: see `run_long_chains`; of the guide's own sites, in their order.
        guide: the source of q.
        x, index: the rows.
        seed: of q's draws; the random stream outside is left alone.

    Raises:
        UserError: a point-mass family.

    Source: R-hat, ESS and their limits: Vehtari, Gelman, Simpson, Carpenter, Buerkner (2021), *Rank-Normalization,
    Folding, and Localization*, arXiv:1903.08008.
    """
    _check(guide)
    guide.eval()
    with torch.no_grad(), no_validation(), local_param_store(), seeded(seed + STREAM + 3):
        own = guide.family(guide.params(x, index).detach()).sample((DRAWS,)).double().cpu()
    draws = chains.draws.double().cpu()
    pooled = draws.flatten(0, 1)
    mean, sd, guide_mean, guide_sd = pooled.mean(0), pooled.std(0), own.mean(0), own.std(0)
    ess, agreement = chain_ess(draws), r_hat(draws)
    squares = chain_ess((draws - mean) ** 2)
    divergent = chains.divergence_rate.double().cpu()
    return MCMCReference(
        mean,
        sd,
        guide_mean,
        guide_sd,
        (sd**2 / ess + guide_sd**2 / DRAWS).sqrt(),
        (_log_sd_variance(pooled, squares) + _log_sd_variance(own, DRAWS)).sqrt(),
        _inside(pooled, own, 0.5),
        _inside(pooled, own, 0.9),
        agreement,
        ess,
        chains.acceptance_rate.double().cpu(),
        divergent,
        ((agreement <= R_HAT) & (ess >= ESS)).all(-1) & (divergent <= DIVERGENT),
        torch.tensor(draws.shape[0]),
        torch.tensor(draws.shape[1]),
    )


def _check(guide: Guide) -> None:
    if guide.family.point_mass:
        raise UserError(
            f"{type(guide.family).__name__} is a point mass: it has no spread to hold against a posterior's"
        )


def _log_sd_variance(draws: Tensor, count: Tensor | int) -> Tensor:
    """Variance of the log of the standard deviation of draws [S, B, D] of which ``count`` are independent, [B, D]."""
    square = (draws - draws.mean(0)) ** 2
    return (square.std(0) / square.mean(0) / 2) ** 2 / count


def _inside(draws: Tensor, own: Tensor, level: float) -> Tensor:
    """Share of draws [S, B, D] in the central intervals of q's own draws, [B, D]."""
    ordered, outside = own.sort(0).values, round(len(own) * (1 - level) / 2)
    return ((draws > ordered[outside]) & (draws < ordered[-1 - outside])).double().mean(0)
