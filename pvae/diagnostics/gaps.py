"""Search for each row's best variational parameters in a family, and what other families gain on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pvae.inference.families import DiagonalNormal, Family
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
from pvae.samplers.gaussian_vi import fit_gaussian
from pvae.samplers.log_joint import LogJoint

# A batch's random streams: reported bounds, choice among candidates, annealing, other families, Gaussian fits.
REPORT, CHOOSE, ANNEAL, OTHER, SHAPE = 2, 3, 4, 5, 6


class PosteriorBatch(NamedTuple):
    """Batch of rows under a fixed posterior q with variational parameters q_params [B, P]; the seed of its noise."""

    x: Tensor
    index: Tensor | None  # type: ignore[assignment]
    q: Program
    q_params: Tensor
    seed: int


@dataclass(frozen=True)
class FamilyGain:
    """Best ELBO of a variational family for each row, and its gain on another family's best, [B] nats each.

    Attributes:
        elbo: the best ELBO in the family.
        gain: its difference from the best ELBO in the guide's family, under noise as common as their draws allow.
        gain_se: Monte Carlo error of the gain.
    """

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
    """Multi-start search for the best variational parameters of a batch of rows, the model frozen.

    Arguments:
        model: the Pyro program.
        family: the variational family that is searched.
        sites: the latents it is over.
        rows: the batch, whose q_params belong to the guide.
        K: draws by which candidates are compared.
        steps: the most refinement steps of a search.
    """

    model: Program
    family: Family
    sites: LatentSites
    rows: PosteriorBatch
    K: int
    steps: int

    def from_guide(self) -> tuple[Tensor, Tensor]:
        """Search the guide's family; return the best q_params [B, P] and the optimization gap [B] in nats.

        Searches start at the guide's q_params and, by another rule, at the family's initial ones. A correlated family
        is also searched from near the best Gaussian, see `fit_gaussian`. The best of all starts, without the initial
        one, and of all ends counts.
        """
        starts = [(self.rows.q_params, default_update_rule(self.family)), (self._initial(), RowAdam())]
        candidates = [self.rows.q_params]
        if self._correlated:
            candidates.append(self._near_gaussian(self._best_diagonal()))
            starts.append((candidates[-1], self._short_steps()))
        return self._maximize(starts, candidates)

    def from_gaussian(self, diagonal: Sequence[Tensor]) -> Tensor:
        """Search from near the best diagonal Gaussians, given as mean and log scale [B, D]; return q_params [B, P].

        Parameters that the family's rows share, such as a flow's, are fitted first, together with the rows' own.
        """
        start = self._near_gaussian(diagonal)
        if any(p.requires_grad for p in self.family.parameters()):
            start = self._fit_shared(start)
        return self._maximize([(start, self._short_steps())], [start])[0]

    def gain_of(self, make: Callable[[int], Family], q_params: Tensor) -> FamilyGain:
        """Compute what another family gains on the best q_params [B, P] of this one.

        Arguments:
            make: maps the number of dimensions to a fresh family.
        """
        with seeded(self.rows.seed + OTHER):
            other = replace(self, family=make(self.sites.dim).to(q_params))
        diagonal = q_params.chunk(2, -1) if type(self.family) is DiagonalNormal else self._best_diagonal()
        guides = [self._guide(q_params), other._guide(other.from_gaussian(diagonal))]
        (_, weights), (_, gain) = paired_moments(self.model, guides, self.rows, self.K)
        return FamilyGain(weights.elbo, gain.mean.to(q_params.dtype), gain.se.to(q_params.dtype))

    def _guide(self, q_params: Tensor) -> Program:
        return fixed_guide(self.family, q_params, self.sites)

    @property
    def _local_elbo(self) -> LocalELBO:
        return LocalELBO(self.model, self.family, self.sites)

    @property
    def _correlated(self) -> bool:
        around = self.family.has_diagonal_start
        return around and not self.family.point_mass and type(self.family) is not DiagonalNormal

    @property
    def _takes_covariance(self) -> bool:
        return self.family.has_gaussian_start

    def _initial(self) -> Tensor:
        return self.family.initial_params().to(self.rows.q_params).expand(len(self.rows.x), -1)

    def _short_steps(self) -> UpdateRule:
        """Steps half as long: near an optimum of many entries a step is mostly noise, and loses a quarter as much."""
        rule = default_update_rule(self.family)
        if isinstance(rule, NaturalAscent):
            return NaturalAscent(rule.natural_gradient, rule.learning_rate / 2)
        return RowAdam(0.005 if self._takes_covariance else 0.02)

    def _best_diagonal(self) -> tuple[Tensor, ...]:
        """Mean and log scale [B, D] of the best diagonal Gaussian."""
        search = replace(self, family=DiagonalNormal(self.sites.dim))
        start = search._initial()
        return search._maximize([(start, RowAdam()), (start, default_update_rule(search.family))], [])[0].chunk(2, -1)

    def _near_gaussian(self, diagonal: Sequence[Tensor]) -> Tensor:
        """q_params [B, P] near these diagonal Gaussians or, where that is better for a row, near the best Gaussian."""
        around = self.family.params_from_diagonal(*diagonal).to(self.rows.q_params)
        if not self._takes_covariance:
            return around
        target = LogJoint(self.model, self.rows.x, self.rows.index, self.sites)
        gaussian = fit_gaussian(target, *diagonal, seed=self.rows.seed + SHAPE)
        return self._select([around, self.family.params_from_gaussian(*gaussian).to(self.rows.q_params)])

    def _maximize(
        self, starts: Sequence[tuple[Tensor, UpdateRule]], candidates: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Search from each start; return the best q_params of ends and candidates, and the least optimization gap."""
        with no_validation():  # a row that its steps throw out keeps the best q_params from before that
            ends = [
                maximize_local_elbo(
                    self._local_elbo,
                    start,
                    self.rows.x,
                    self.rows.index,
                    steps=self.steps,
                    rule=rule,
                    seed=self.rows.seed,
                )
                for start, rule in starts
            ]
        gap = torch.stack([end.optimization_gap for end in ends]).amin(0)
        return self._select([*candidates, *(end.q_params for end in ends)]), gap

    def _select(self, candidates: Sequence[Tensor]) -> Tensor:
        """The best of several q_params [B, P] for each row, by draws that no reported bound uses."""
        guides = [self._guide(q_params) for q_params in candidates]
        weights, _ = paired_moments(self.model, guides, self.rows, self.K, CHOOSE)
        best = torch.stack([w.elbo.nan_to_num(-torch.inf) for w in weights]).argmax(0)
        return torch.stack(list(candidates))[best, torch.arange(len(best), device=best.device)]

    def _fit_shared(self, start: Tensor, learning_rate: float = 0.01) -> Tensor:
        """Fit q_params [B, P] and, in place, the family's shared parameters by Adam; freeze the latter."""
        q_params = nn.Parameter(start.clone())
        params = [q_params, *(p for p in self.family.parameters() if p.requires_grad)]
        optimizer = torch.optim.Adam(params, lr=learning_rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(self.steps, 1))
        with seeded(self.rows.seed + OTHER), torch.enable_grad():
            for _ in range(self.steps):
                loss = -self._local_elbo(q_params, self.rows.x, self.rows.index, REFINE_DRAWS).sum()
                for parameter, gradient in zip(params, torch.autograd.grad(loss, params), strict=True):
                    parameter.grad = gradient
                optimizer.step()
                schedule.step()
        self.family.requires_grad_(False)
        return q_params.detach()
