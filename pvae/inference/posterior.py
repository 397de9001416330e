"""Operations on the approximate posterior: moments, predictive draws, importance weights, and refitting to rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from pyro import poutine
from torch import Tensor

from pvae.inference.batching import Progress, RowBatch, Values, as_rows, draw_chunks, map_batches, silent, tile_rows
from pvae.inference.families import Delta, Family
from pvae.inference.guides import FrozenGuide, Guide
from pvae.inference.importance import log_weights, random_sites
from pvae.inference.latents import LatentSites, find_observed
from pvae.inference.refinement import LocalELBO, default_update_rule, fixed_guide, maximize_local_elbo
from pvae.runtime.pyro_params import Program
from pvae.runtime.torch_state import seeded

START_DRAWS = 50  # by which a start is chosen

MOMENT_DRAWS, MOMENTS_SEED = 500, 10**18  # of the draws, the same for every row, for moments that a family lacks


class WeightedDraws(NamedTuple):
    r"""K draws of each row's latents as one real vector, z [K, B, D], and their normalized log-weights, [K, B].

    The weights of a row add up to one; those of a point mass are all the same. ``log_evidence`` [B] is
    :math:`\log \frac1K \sum_k p(x, z_k) / q(z_k)` in nats (IWAE-K), empty for a point mass.
    """

    z: Tensor
    log_weights: Tensor
    log_evidence: Tensor = torch.empty(0)

    def mean(self, values: Tensor) -> Tensor:
        """Return the weighted mean over draws of values [K, B, ...], [B, ...]."""
        weights = self.log_weights.exp()
        return (weights.view(*weights.shape, *(1,) * (values.dim() - 2)) * values).sum(0)

    @property
    def ess(self) -> Tensor:
        r"""Effective sample size (ESS) of the draws, :math:`1 / \sum_k v_k^2`, [B]."""
        return (2 * self.log_weights).logsumexp(0).neg().exp()


class EncodedRows(NamedTuple):
    """Variational parameters q_params [N, P] of rows, and the mean and standard deviation of q(z|x), [N, D] each."""

    q_params: Tensor
    mean: Tensor
    sd: Tensor


class PredictiveDraw(NamedTuple):
    """One draw of every row's latents, by site, and the observed site there: p(x|z) and the value observed."""

    latents: dict[str, Tensor]
    likelihood: Any
    observed: Tensor


def with_fixed_params(guide: Program, x: Tensor, index: Tensor | None = None) -> Program:
    """Return a guide whose q_params for these rows are computed once; other programs as they are."""
    return guide.with_params(guide.params(x, index).detach()) if isinstance(guide, Guide) else guide


def freeze(
    model: Program,
    guide: Guide,
    x: Values,
    index: Tensor | None = None,
    *,
    seed: int = 0,
    seed_of: Callable[[int], int] | None = None,
    progress: Progress = silent,
) -> FrozenGuide:
    """Compute the variational parameters of rows once, and return a guide that looks them up.

    Arguments:
        model, guide: a fitted program and its guide.
        x, index: rows [N, C], and which training datapoints they are; None for new rows.
        seed, seed_of, progress: as of `map_batches`; a guide that refines draws noise.
    """

    def compute(rows: RowBatch) -> dict[str, Tensor]:
        return {"q_params": guide.params(rows.x, rows.index)}

    rows = as_rows(x, model)
    values = map_batches(model, guide, compute, rows, index, seed=seed, seed_of=seed_of, progress=progress)
    return FrozenGuide(guide, values["q_params"].to(rows.device), rows, index)


def encode_rows(
    model: Program, guide: Guide, x: Values, index: Tensor | None = None, *, seed: int = 0, progress: Progress = silent
) -> EncodedRows:
    """Compute q_params and `posterior_moments` for rows in batches, on the CPU; arguments as of `map_batches`."""

    def compute(rows: RowBatch) -> dict[str, Tensor]:
        q_params = guide.params(rows.x, rows.index)
        return EncodedRows(q_params, *posterior_moments(guide.family, q_params))._asdict()

    return EncodedRows(**map_batches(model, guide, compute, x, index, seed=seed, progress=progress))


def posterior_means(model: Program, guide: Guide, x: Values, index: Tensor | None = None, **options: Any) -> Tensor:
    """Compute the means of q(z|x) for rows in batches, [N, D] on the CPU; arguments as of `encode_rows`."""
    return encode_rows(model, guide, x, index, **options).mean


def posterior_moments(family: Family, q_params: Tensor) -> tuple[Tensor, Tensor]:
    """Compute mean and standard deviation [B, D] of q(z; q_params), by `common_draws` if the family states none."""
    q, mean, sd = family(q_params), None, None
    with suppress(NotImplementedError):
        mean = q.mean
        sd = q.stddev
    if mean is None or sd is None:
        z = common_draws(family, q_params)
        mean, sd = z.mean(0) if mean is None else mean, z.std(0)
    return mean, sd


def common_draws(family: Family, q_params: Tensor) -> Tensor:
    """Draw from q(z; q_params) under common random numbers, the same for every row and at every call, [S, B, D]."""
    return _draw_each(family, q_params, MOMENT_DRAWS, [MOMENTS_SEED] * len(q_params))


def likelihood_at(model: Program, sites: LatentSites, z: Tensor, x: Tensor, index: Tensor | None = None) -> Any:
    """Return p(x|z), of batch shape [N], at unconstrained latents z [N, D] of rows x [N, C], which may hold labels."""
    return posterior_predictive(model, fixed_guide(Delta(sites.dim), z, sites), x, index).likelihood


def decode_latents(
    model: Program,
    guide: Guide,
    z: Values,
    given: Values | None = None,
    *,
    draw: bool = False,
    seed: int = 0,
    progress: Progress = silent,
) -> Tensor:
    """Compute the mean of p(x|z), or with ``draw`` one draw, at unconstrained latents z [N, D] in batches, [N, ...].

    Arguments:
        given: rows [N, C], or one row [1, C] for all, from which the program takes what it is given beside its latents.
    """

    def compute(rows: RowBatch) -> dict[str, Tensor]:
        x = rows.x[:, :1]
        if given is not None:
            x = torch.as_tensor(given).to(rows.x)
            x = x.expand(len(z), *x.shape[1:])[rows.place]
        fn = likelihood_at(model, guide.sites, rows.x, x)
        return {"x": fn.sample() if draw else fn.mean}

    return map_batches(model, guide, compute, z, seed=seed, progress=progress)["x"]


def prior_predictive(model: Program, x: Tensor) -> PredictiveDraw:
    """Draw latents from the prior for as many rows as x [B, ...], from which the program takes all else it is given."""
    return _predictive(poutine.trace(model).get_trace(x, x.new_zeros(len(x), dtype=torch.long)), x)


def posterior_predictive(model: Program, guide: Program, x: Tensor, index: Tensor | None = None) -> PredictiveDraw:
    """Draw latents of rows x [B, ...] from the guide; for several draws see `with_fixed_params`."""
    guide_trace = poutine.trace(guide).get_trace(x, index)
    return _predictive(poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(x, index), x)


def _predictive(trace: Any, x: Tensor) -> PredictiveDraw:
    site = find_observed(trace, x)
    latents = {name: site["value"] for name, site in random_sites(trace) if not site["is_observed"]}
    return PredictiveDraw(latents, site["fn"], site["value"])


def importance_draws(
    model: Program,
    guide: Guide,
    q_params: Tensor,
    x: Tensor,
    index: Tensor | None = None,
    K: int = 100,
    max_batch: int | None = None,
    *,
    seeds: Sequence[int] | None = None,
) -> WeightedDraws:
    r"""Draw from q(z; q_params) with importance weights towards the posterior, :math:`v_k \propto p(x, z_k) / q(z_k)`.

    Arguments:
        model: the program whose posterior is meant, as it scores these rows.
        guide: gives family and sites; its q_params [B, P] are given apart.
        x, index: rows [B, C] and which training datapoints they are.
        K: draws for each row.
        max_batch: the most draws of all rows that pass through the program together, if fewer than usual.
        seeds: of each row's draws, B of them, so that no row's draws depend on the rows beside it.
    """
    family, K = guide.family, 1 if guide.family.point_mass else K
    q = family(q_params)
    z = q.sample(torch.Size([K])) if seeds is None else _draw_each(family, q_params, K, seeds)
    if family.point_mass:
        return WeightedDraws(z, z.new_zeros(z.shape[:2]))
    log_joint = []
    for draws in draw_chunks(K, len(x), max_batch):
        at_draws = fixed_guide(Delta(guide.sites.dim), z[draws].flatten(0, 1), guide.sites)
        log_joint.append(log_weights(model, at_draws, *tile_rows(x, index, draws)).log_w)
    log_w = torch.cat(log_joint, 1).view(z.shape[:2]) - q.log_prob(z)
    return WeightedDraws(z, log_w.log_softmax(0), log_w.logsumexp(0) - math.log(K))


def _draw_each(family: Family, q_params: Tensor, K: int, seeds: Sequence[int]) -> Tensor:
    """Draw from each row's q with a seed of its own, [K, B, D]."""
    draws = []
    with seeded(0):
        for row, seed in zip(q_params.split(1), seeds, strict=True):
            torch.manual_seed(seed)
            draws.append(family(row).sample(torch.Size([K])))
    return torch.cat(draws, 1)


def refit_params(
    model: Program,
    guide: Guide,
    x: Tensor,
    index: Tensor | None = None,
    *,
    candidates: Sequence[Tensor] = (),
    steps: int = 100,
    seed: int = 0,
) -> Tensor:
    """Maximize each row's ELBO over q_params [B, P], for rows that a program scores otherwise than the guide knows.

    Arguments:
        candidates: rows [B, C] each to encode, if the guide does. A row starts from the best of the guide's q_params
            for these and of the family's initial one.
        steps: the most steps of a row.
    """
    local_elbo = LocalELBO(model, guide.family, guide.sites)

    @seeded(seed)
    def value_of(q_params: Tensor) -> Tensor:
        elbo = local_elbo(q_params, x, index, START_DRAWS)
        return elbo.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)

    best = guide.family.initial_params().to(x).expand(len(x), -1)
    value = value_of(best)
    for rows in candidates if guide.encodes else ():
        with seeded(seed + 2):  # a guide that refines draws
            q_params = guide.params(rows).detach()
        candidate = value_of(q_params)
        better = candidate > value
        best, value = torch.where(better.unsqueeze(-1), q_params, best), torch.where(better, candidate, value)
    rule = default_update_rule(guide.family)
    return maximize_local_elbo(local_elbo, best, x, index, steps=steps, rule=rule, seed=seed).q_params
