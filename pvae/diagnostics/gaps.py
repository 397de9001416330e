"""Of given rows: the best q_params of a posterior family, the evidence from there, and what other families would buy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pvae.errors import AllChainsDiverged
from pvae.inference.families import DiagonalNormal, Family
from pvae.inference.guides import Guide
from pvae.inference.importance import iter_log_weights
from pvae.inference.latents import LatentSites
from pvae.inference.refinement import (
    REFINE_DRAWS,
    LocalELBO,
    NaturalAscent,
    RowAdam,
    UpdateRule,
    default_update_rule,
    fixed_guide,
    maximize_local_elbo,
)
from pvae.inference.streaming import RunningMoments, StreamingWeights
from pvae.runtime.pyro_params import Program
from pvae.runtime.torch_state import no_validation, seeded
from pvae.samplers.ais import anneal
from pvae.samplers.gaussian_vi import fit_gaussian
from pvae.samplers.log_joint import LogJoint

# Which of a batch's random streams reports bounds, chooses between candidates, anneals, fits another family, and
# shapes correlated normals.
REPORT, CHOOSE, ANNEAL, OTHER, SHAPE = 2, 3, 4, 5, 6


class PosteriorBatch(NamedTuple):
    """Datapoints that are evaluated together: their fixed posterior, its parameters where it has any, their noise."""

    x: Tensor
    index: Tensor | None  # type: ignore[assignment]
    q: Program
    q_params: Tensor
    seed: int


class Annealing(NamedTuple):
    """How evidence is annealed, see `anneal`; ``start`` is "prior" or "guide"."""

    temperatures: int
    chains: int
    schedule: str
    start: str


@dataclass(frozen=True)
class FamilyGain:
    """The best ELBO that a family reaches for each row, and what it gains on another family's best, [B] nats each.

    Both are under noise that is as common to the two as their draws allow; ``gain_se`` is the gain's own Monte Carlo
    error.
    """

    elbo: Tensor
    gain: Tensor
    gain_se: Tensor


def paired_moments(
    model: Program, programs: Sequence[Program], rows: PosteriorBatch, K: int, which: int = REPORT
) -> tuple[list[StreamingWeights], list[RunningMoments]]:
    """Tallies of guides under common noise, and the moments of what each one's log-weights gain on the first's."""
    tallies = [StreamingWeights(K, tail=which == REPORT) for _ in programs]
    gains = [RunningMoments() for _ in programs]
    with seeded(rows.seed + which), torch.no_grad():
        for chunk in iter_log_weights(model, programs, rows.x, rows.index, K):
            for w, tally, gain in zip(chunk, tallies, gains, strict=True):
                tally.add(w)
                gain.add(w.log_w.double() - chunk[0].log_w.double())
    return tallies, gains


def find_best_params(model: Program, guide: Guide, rows: PosteriorBatch, K: int, steps: int) -> tuple[Tensor, Tensor]:
    """The best q_params of the guide's family that different searches find, [B, P], and what they may have left, [B].

    Searches start at the guide's q_params and, by another rule, at the family's initial one; for correlated normals also at
    the best correlated one, see `fit_gaussian`, or at the best independent ones. The best of all
    starts and ends but the initial one counts.
    """
    family = guide.family
    fresh = family.initial().to(rows.q_params).expand_as(rows.q_params)
    starts: list[tuple[Tensor, UpdateRule]] = [(rows.q_params, default_update_rule(family)), (fresh, RowAdam())]
    known = [rows.q_params]
    if _correlated(family):
        normals = _diagonal(model, guide.sites, rows, K, steps)
        known.append(_near(model, family, guide.sites, rows, K, normals))
        starts.append((known[-1], _gentle(family)))
    return _searched(model, family, guide.sites, rows, K, steps, starts, known)


def anneal_evidence(
    model: Program, guide: Guide, q_params: Tensor, rows: PosteriorBatch, plan: Annealing
) -> dict[str, Tensor]:
    """Evidence of the rows by annealed importance sampling, from the prior or from q = family(q_params), [B] each."""
    try:
        found = anneal(
            LogJoint(model, rows.x, rows.index, guide.sites),
            *((guide.family, q_params) if plan.start == "guide" else ()),
            chains=plan.chains,
            temperatures=plan.temperatures,
            schedule=plan.schedule,
            seed=rows.seed + ANNEAL,
        )
    except AllChainsDiverged:  # these rows may be few; where all rows of the data are such, evaluation says so
        return dict.fromkeys(("ais", "ais_se", "ais_acceptance"), torch.full_like(rows.q_params[:, 0], torch.nan))
    return {"ais": found.evidence, "ais_se": found.evidence_se, "ais_acceptance": found.acceptance}


def family_gain(
    model: Program,
    guide: Guide,
    q_params: Tensor,
    rows: PosteriorBatch,
    make: Callable[[int], Family],
    K: int,
    steps: int,
) -> FamilyGain:
    """The best that another family reaches, decoder frozen, and its gain on the best q_params [B, P] of the guide's own.

    Arguments:
        make: the number of dimensions to a fresh family. Parameters that its rows share are fitted to the rows at hand.
        K, steps: draws of the comparison, and the most steps of a search.
    """
    with seeded(rows.seed + OTHER):
        family = make(guide.sites.dim).to(rows.q_params)
    plain = type(guide.family) is DiagonalNormal
    normals = q_params.chunk(2, -1) if plain else _diagonal(model, guide.sites, rows, K, steps)
    start = _near(model, family, guide.sites, rows, K, normals)
    if any(p.requires_grad for p in family.parameters()):
        start = _fitted_together(model, family, guide.sites, start, rows, steps)
    searches: list[tuple[Tensor, UpdateRule]] = [(start, _gentle(family))]
    found, _ = _searched(model, family, guide.sites, rows, K, steps, searches, [start])
    tallies, gains = paired_moments(model, [guide.at(q_params), fixed_guide(family, found, guide.sites)], rows, K)
    dtype = rows.q_params.dtype
    return FamilyGain(tallies[1].elbo, gains[1].mean.to(dtype), gains[1].se.to(dtype))


def _near(
    model: Program, family: Family, sites: LatentSites, rows: PosteriorBatch, K: int, normals: Sequence[Tensor]
) -> Tensor:
    """The better q_params [B, P] for each row: around these independent normals, or near the best correlated one."""
    around = family.around(*normals).to(rows.q_params)
    if not _shapes(family):
        return around
    target = LogJoint(model, rows.x, rows.index, sites)
    shaped = family.shaped(*fit_gaussian(target, *normals, seed=rows.seed + SHAPE)).to(rows.q_params)
    return _chosen(model, family, sites, rows, K, [around, shaped])


def _correlated(family: Family) -> bool:
    return type(family) is not DiagonalNormal and type(family).around is not Family.around and not family.point_mass


def _shapes(family: Family) -> bool:
    return type(family).shaped is not Family.shaped


def _gentle(family: Family) -> UpdateRule:
    """Near an optimum of many entries a step is mostly noise: half as long, it loses a quarter as much to it."""
    rule = default_update_rule(family)
    if isinstance(rule, NaturalAscent):
        return NaturalAscent(rule.natural, rule.learning_rate / 2)
    return RowAdam(0.005 if _shapes(family) else 0.02)


def _searched(
    model: Program,
    family: Family,
    sites: LatentSites,
    rows: PosteriorBatch,
    K: int,
    steps: int,
    starts: Sequence[tuple[Tensor, UpdateRule]],
    known: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:
    """The best of the searches' ends and of the q_params that are known, [B, P], and the least that a search may leave."""
    bound = LocalELBO(model, family, sites)
    with no_validation():  # a row of many entries that its steps throw out has its best look before that
        found = [
            maximize_local_elbo(bound, start, rows.x, rows.index, steps=steps, rule=rule, seed=rows.seed)
            for start, rule in starts
        ]
    left = torch.stack([f.gap for f in found]).amin(0)
    return _chosen(model, family, sites, rows, K, [*known, *(f.q_params for f in found)]), left


def _chosen(
    model: Program, family: Family, sites: LatentSites, rows: PosteriorBatch, K: int, candidates: Sequence[Tensor]
) -> Tensor:
    """The best of several q_params for each row, [B, P]."""
    # Chosen on draws that the reported bounds do not use, so that the choice does not flatter them.
    tallies, _ = paired_moments(
        model, [fixed_guide(family, q_params, sites) for q_params in candidates], rows, K, CHOOSE
    )
    best = torch.stack([tally.elbo.nan_to_num(-torch.inf) for tally in tallies]).argmax(0)
    return torch.stack(list(candidates))[best, torch.arange(len(best), device=best.device)]


def _diagonal(model: Program, sites: LatentSites, rows: PosteriorBatch, K: int, steps: int) -> tuple[Tensor, ...]:
    """Mean and log scale [B, D] of the best independent normals."""
    family = DiagonalNormal(sites.dim)
    fresh = family.initial().to(rows.q_params).expand(len(rows.x), -1)
    starts: list[tuple[Tensor, UpdateRule]] = [(fresh, RowAdam()), (fresh, default_update_rule(family))]
    q_params, _ = _searched(model, family, sites, rows, K, steps, starts, [])
    return q_params.chunk(2, -1)


def _fitted_together(
    model: Program,
    family: Family,
    sites: LatentSites,
    start: Tensor,
    rows: PosteriorBatch,
    steps: int,
    learning_rate: float = 0.01,
) -> Tensor:
    """q_params [B, P] after so many steps of Adam on it and on the parameters that the rows share, which are moved too."""
    q_params, bound = nn.Parameter(start.clone()), LocalELBO(model, family, sites)
    shared = [p for p in family.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam([q_params, *shared], lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
    with seeded(rows.seed + OTHER), torch.enable_grad():
        for _ in range(steps):
            loss = -bound(q_params, rows.x, rows.index, REFINE_DRAWS).sum()
            gradients = torch.autograd.grad(loss, [q_params, *shared])
            for parameter, gradient in zip([q_params, *shared], gradients, strict=True):
                parameter.grad = gradient
            optimizer.step()
            schedule.step()
    family.requires_grad_(False)
    return q_params.detach()
