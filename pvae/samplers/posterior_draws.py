"""Draws of rows' posteriors: weighted, with the method that gave each row's, and its checks; pooled chains."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pvae.runtime.torch_state import seeded
from pvae.samplers.hmc import Chains
from pvae.stats import chain_ess, r_hat

# From the cheapest to the dearest; the last is for rows whose checks all failed.
METHODS = ("guide", "importance sampling", "Gaussian fit", "mixture", "HMC", "none")
SECONDS = ("annealed particles", *METHODS[1:-1])
GUIDE, IMPORTANCE, GAUSSIAN, MIXTURE, CHAINS, NONE = range(len(METHODS))

# Limits of convergence (Vehtari et al. 2021, arXiv:1903.08008; Betancourt 2017, arXiv:1701.02434).
R_HAT, DIVERGENT = 1.01, 0.01


@dataclass(frozen=True, repr=False)
class PosteriorDraws:
    r"""K draws of each row's latents, with normalized importance weights, and how they came about.

    Attributes:
        u: draws in unconstrained coordinates, [K, B, D].
        log_weights: of the draws, Pareto-smoothed; they add up to one in each row, [K, B].
        log_evidence: log p(x) by the weights, a lower bound in expectation, [B] nats.
        method: number of the method in ``METHODS`` that gave the row's draws, [B].
        ess, k_hat: effective sample size and Pareto k-hat, [B]; k-hat is NaN for chains.
        seconds: of the annealed particles and of each method, for all rows.
    """

    u: Tensor
    log_weights: Tensor
    log_evidence: Tensor
    method: Tensor
    ess: Tensor
    k_hat: Tensor
    seconds: dict[str, float]

    @property
    def reliable(self) -> Tensor:
        """Whether the checks of a method passed, [B]."""
        return self.method != NONE

    @property
    def moments(self) -> tuple[Tensor, Tensor]:
        """Weighted mean and standard deviation of the draws, [B, D] each."""
        weights = self.log_weights.exp().unsqueeze(-1)
        mean = (weights * self.u).sum(0)
        return mean, (weights * (self.u - mean) ** 2).sum(0).sqrt()

    def counts(self) -> dict[str, int]:
        """Return how many rows took each method."""
        return {name: n for number, name in enumerate(METHODS) if (n := int((self.method == number).sum()))}

    def __repr__(self) -> str:
        spent = {name: round(seconds, 2) for name, seconds in self.seconds.items()}
        return f"Posterior of {len(self.ess)} rows, {len(self.u)} draws: rows {self.counts()}, seconds {spent}"

    def to_frame(self) -> Any:
        """Return a DataFrame: method, ess, k_hat, reliable, log_evidence, mean and sd of each latent, by row."""
        from pandas import DataFrame

        columns: dict[str, Any] = {"method": [METHODS[number] for number in self.method.tolist()]}
        columns |= {name: getattr(self, name).tolist() for name in ("ess", "k_hat", "reliable", "log_evidence")}
        for name, moment in zip(("mean", "sd"), self.moments, strict=True):
            columns |= {f"{name}{d}": column.tolist() for d, column in enumerate(moment.unbind(-1))}
        return DataFrame(columns)

    def resample(self, count: int, *, seed: int = 0) -> Tensor:
        """Return equally weighted draws u [count, B, D], by systematic resampling."""
        with seeded(seed):
            return resample(self.u, self.log_weights, count)


def pool_chains(chains: Chains, K: int | None = None, *, least_ess: float = 400) -> PosteriorDraws:
    """Return the draws of HMC chains together, thinned to K, of method "HMC" where chains converged, "none" elsewhere.

    They have converged where R-hat is at most 1.01, the effective sample size at least ``least_ess``, in every
    dimension, and at most 1% of the trajectories diverge. Chains give no evidence: it is NaN.

    Source of R-hat, ESS and their limits: Vehtari, Gelman, Simpson, Carpenter, Buerkner (2021), arXiv:1903.08008.
    """
    draws = chains.draws.double()
    every = draws.flatten(0, 1)
    ess, agree = chain_ess(draws).amin(-1).to(every), (r_hat(draws) <= R_HAT).all(-1).to(every.device)
    sound = agree & (ess >= least_ess) & (chains.divergence_rate <= DIVERGENT)
    thin = torch.linspace(0, len(every) - 1, K or len(every), dtype=torch.double, device=every.device).round().long()
    unknown, equal = torch.full_like(ess, torch.nan), every.new_full((len(thin), len(ess)), -math.log(len(thin)))
    method = torch.where(sound, CHAINS, NONE)
    return PosteriorDraws(every[thin], equal, unknown, method, ess.clamp(max=len(thin)), unknown, {})


def resample(u: Tensor, log_weights: Tensor, count: int) -> Tensor:
    """Draw equally weighted draws [count, B, D] from weighted ones u [K, B, D], by systematic resampling."""
    ends, K = log_weights.exp().cumsum(0), len(u)
    shares = (ends.new_empty(1, ends.shape[1]).uniform_() + torch.arange(count, device=u.device).unsqueeze(-1)) / count
    which = torch.searchsorted(ends.mT.contiguous(), shares.mT.contiguous()).clamp(max=K - 1).mT
    return u.gather(0, which.unsqueeze(-1).expand(-1, -1, u.shape[-1]))
