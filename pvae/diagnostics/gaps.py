"""Search for each row's best variational parameters in a family, and what other families gain on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pvae.inference import refinement
from pvae.inference.families import DiagonalNormal, Family, LowRankNormal
from pvae.inference.importance import iter_log_weights
from pvae.inference.latents import LatentSites
from pvae.inference.posterior import posterior_moments
from pvae.inference.refinement import LocalELBO, NaturalAscent, RowAdam, UpdateRule, default_update_rule, fixed_guide
from pvae.inference.streaming import RunningMoments, StreamingWeights
from pvae.runtime.pyro_params import Program
from pvae.runtime.torch_state import no_validation, seeded
from pvae.samplers.gaussian_vi import fit_gaussian, newton_decrement
from pvae.samplers.log_joint import LogJoint

# A batch's random streams: reported bounds, choice of candidates, annealing, other families, Gaussian fits, evidence.
REPORT, CHOOSE, ANNEAL, OTHER, SHAPE, EVIDENCE = 2, 3, 4, 5, 6, 7

# Particles, the heaviest ones, from which normals are fitted, and the scale there in standard deviations of them all.
FROM_PARTICLES, START_SCALE = 1, 0.1


class PosteriorBatch(NamedTuple):
    """Batch of rows under a fixed posterior q with variational parameters q_params [B, P]; the seed of its noise."""

    x: Tensor
    index: Tensor | None  # type: ignore[assignment]
    q: Program
    q_params: Tensor
    seed: int


@dataclass(frozen=True)
class FamilyGain:
    """Best ELBO of a family, its gain on the best in the guide's family, and the gain's Monte Carlo error, [B] nats."""

    elbo: Tensor
    gain: Tensor
    gain_se: Tensor


def paired_moments(
    model: Program, guides: Sequence[Program], rows: PosteriorBatch, K: int, stream: int = REPORT
) -> tuple[list[StreamingWeights], list[RunningMoments]]:
    """Compute the weights of guides under common noise, and the moments of each one's log-weights minus the first's."""
    weights = [StreamingWeights(K, tail=stream == REPORT) for _ in guides]
    gains = [RunningMoments() for _ in guides]
    with seeded(rows.seed + stream), torch.no_grad():
        for chunk in iter_log_weights(model, guides, rows.x, rows.index, K):
            for draws, total, gain in zip(chunk, weights, gains, strict=True):
                total.add(draws)
                gain.add(draws.log_w.double() - chunk[0].log_w.double())
    return weights, gains


@dataclass(frozen=True)
class FamilySearch:
    """Multi-start search for a batch's best q_params in a family, the model frozen; K draws compare candidates.

    ``particles`` [C, B, D], the heaviest first, are annealed from the prior: they lead to modes that the guide misses.
    """

    model: Program
    family: Family
    sites: LatentSites
    rows: PosteriorBatch
    K: int
    steps: int
    particles: Tensor | None = None

    def from_guide(self) -> tuple[Tensor, Tensor]:
        """Search the guide's family; return the best q_params [B, P] and the optimization gap [B] in nats.

        For families of normals the search is by fixed-point rounds, see `fit_gaussian`, from the guide's moments, from
        the family's initial ones and from particles, and ends with gradient steps from the best; see `newton_decrement`
        for its gap. For others, and where steps are few, it is by gradient steps from the guide's q_params and from the
        initial ones. The best of starts and ends counts.
        """
        if self.family.has_gaussian_start or type(self.family) is DiagonalNormal:
            return self._climb([self.rows.q_params, *self._fits()])
        starts = [(self.rows.q_params, default_update_rule(self.family)), (self._initial(), RowAdam())]
        candidates = [self.rows.q_params]
        if self.family.has_diagonal_start and not self.family.point_mass:
            candidates.append(self._near_gaussian(self._best_diagonal()))
            starts.append((candidates[-1], self._short_steps()))
        return self._maximize(starts, candidates)

    def _fits(self) -> Iterator[Tensor]:
        """Yield q_params [B, P] of normals fitted from the guide's moments, the initial ones, and each particle."""
        starts = [posterior_moments(self.family, q_params) for q_params in (self.rows.q_params, self._initial())]
        if self.particles is not None:
            spread = START_SCALE * self.particles.std(0).clamp(min=1e-6)
            starts += [(u, spread) for u in self.particles[:FROM_PARTICLES]]
        mean, sd = (torch.cat(values).to(self.rows.q_params).nan_to_num() for values in zip(*starts, strict=True))
        size, diagonal = len(self.rows.x), type(self.family) is DiagonalNormal
        target = self._target().rows(torch.arange(size, device=mean.device).repeat(len(starts)))
        fitted = fit_gaussian(target, mean, sd.log(), diagonal=diagonal, seed=self.rows.seed + SHAPE)
        for mean, covariance in zip(*(values.split(size) for values in fitted), strict=True):
            if diagonal:
                log_scale = covariance.diagonal(dim1=-2, dim2=-1).log() / 2
                yield self.family.params_from_diagonal(mean, log_scale).to(self.rows.q_params)
            else:
                yield self.family.params_from_gaussian(mean, covariance).to(self.rows.q_params)

    def _climb(self, candidates: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Make gradient steps from the best candidate; return the best q_params, and what the search may have left."""
        best = self._select(candidates)
        q_params, gap = self._maximize([(best, self._short_steps())], candidates)
        if isinstance(self.family, LowRankNormal):  # its optimum's curvature is not that of all normals
            return q_params, gap
        diagonal, q = type(self.family) is DiagonalNormal, self.family(q_params)
        root: Tensor = q.stddev.diag_embed() if diagonal else q.scale_tril
        left = newton_decrement(self._target(), q.mean, root, diagonal=diagonal, seed=self.rows.seed + SHAPE)
        return q_params, torch.fmax(gap, left.to(gap))

    def _target(self) -> LogJoint:
        return LogJoint(self.model, self.rows.x, self.rows.index, self.sites)

    def from_gaussian(self, diagonal: Sequence[Tensor]) -> Tensor:
        """Search from near the best diagonal Gaussians, given as mean and log scale [B, D]; return q_params [B, P]."""
        start = self._near_gaussian(diagonal)
        if any(p.requires_grad for p in self.family.parameters()):  # shared by the rows, such as a flow's
            start = self._fit_shared(start)
        return self._maximize([(start, self._short_steps())], [start])[0]

    def gain_of(self, make: Callable[[int], Family], q_params: Tensor) -> FamilyGain:
        """Compute what another family, made for the number of dimensions, gains on the best q_params [B, P]."""
        with seeded(self.rows.seed + OTHER):
            other = replace(self, family=make(self.sites.dim).to(q_params))
        diagonal = q_params.chunk(2, -1) if type(self.family) is DiagonalNormal else self._best_diagonal()
        guides = [self._guide(q_params), other._guide(other.from_gaussian(diagonal))]
        (_, weights), (_, gain) = paired_moments(self.model, guides, self.rows, self.K)
        return FamilyGain(weights.elbo, gain.mean.to(q_params.dtype), gain.se.to(q_params.dtype))

    def _guide(self, q_params: Tensor) -> Program:
        return fixed_guide(self.family, q_params, self.sites)

    def _initial(self) -> Tensor:
        return self.family.initial_params().to(self.rows.q_params).expand(len(self.rows.x), -1)

    def _short_steps(self) -> UpdateRule:
        """Steps half as long: near an optimum of many entries a step is mostly noise, and loses a quarter as much."""
        rule = default_update_rule(self.family)
        if isinstance(rule, NaturalAscent):
            return NaturalAscent(rule.natural_gradient, rule.learning_rate / 2)
        return RowAdam(0.005 if self.family.has_gaussian_start else 0.02)

    def _best_diagonal(self) -> tuple[Tensor, ...]:
        """Return mean and log scale [B, D] of the best diagonal Gaussian."""
        search = replace(self, family=DiagonalNormal(self.sites.dim))
        start = search._initial()
        return search._maximize([(start, RowAdam()), (start, default_update_rule(search.family))], [])[0].chunk(2, -1)

    def _near_gaussian(self, diagonal: Sequence[Tensor]) -> Tensor:
        """Return q_params [B, P] near these diagonal Gaussians or, for rows where it is better, near the best one."""
        around = self.family.params_from_diagonal(*diagonal).to(self.rows.q_params)
        if not self.family.has_gaussian_start:
            return around
        gaussian = fit_gaussian(self._target(), *diagonal, seed=self.rows.seed + SHAPE)
        return self._select([around, self.family.params_from_gaussian(*gaussian).to(self.rows.q_params)])

    def _maximize(
        self, starts: Sequence[tuple[Tensor, UpdateRule]], candidates: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Search from each start; return the best q_params of ends and candidates, and the least optimization gap."""
        rows, local_elbo = (
            self.rows,
            LocalELBO(self.model, self.family, self.sites, path_gradient=not self.family.point_mass),
        )
        search = partial(refinement.maximize_local_elbo, local_elbo, steps=self.steps, seed=rows.seed)
        with no_validation():  # a row that its steps throw out keeps the best q_params from before that
            ends = [search(start, rows.x, rows.index, rule=rule) for start, rule in starts]
        gaps, values = (torch.stack([getattr(end, name) for end in ends]) for name in ("optimization_gap", "value"))
        gap = gaps.gather(0, values.nan_to_num(nan=-torch.inf).argmax(0, keepdim=True)).squeeze(0)
        return self._select([*candidates, *(end.q_params for end in ends)]), gap

    def _select(self, candidates: Sequence[Tensor]) -> Tensor:
        """Return the best of several q_params [B, P] for each row, by draws that no reported bound uses."""
        guides = [self._guide(q_params) for q_params in candidates]
        weights, _ = paired_moments(self.model, guides, self.rows, self.K, CHOOSE)
        best = torch.stack([w.elbo.nan_to_num(-torch.inf) for w in weights]).argmax(0)
        return torch.stack(list(candidates))[best, torch.arange(len(best), device=best.device)]

    def _fit_shared(self, start: Tensor) -> Tensor:
        """Fit q_params [B, P] and, in place, the family's shared parameters by Adam; freeze the latter."""
        q_params = nn.Parameter(start.clone())
        params = [q_params, *(p for p in self.family.parameters() if p.requires_grad)]
        optimizer = torch.optim.Adam(params, lr=0.01)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(self.steps, 1))
        local_elbo = LocalELBO(self.model, self.family, self.sites)
        with seeded(self.rows.seed + OTHER), torch.enable_grad():
            for _ in range(self.steps):
                loss = -local_elbo(q_params, self.rows.x, self.rows.index, refinement.REFINE_DRAWS).sum()
                for parameter, gradient in zip(params, torch.autograd.grad(loss, params), strict=True):
                    parameter.grad = gradient
                optimizer.step()
                schedule.step()
        self.family.requires_grad_(False)
        return q_params.detach()
