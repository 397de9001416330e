"""Rows through a fitted program: in batches, from one seed; codes to data, and data to weighed codes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from pyro import poutine
from torch import Tensor

from pvae.inference.batching import LOOK_DRAWS, MOMENT_DRAWS, MOMENTS, draw_chunks, tile_rows
from pvae.inference.families import Delta, Family
from pvae.inference.guides import Guide, PerDatapoint
from pvae.inference.importance import log_weights
from pvae.inference.latents import LatentSites, observed_site
from pvae.inference.refinement import LocalELBO, default_update_rule, fixed_guide, maximize_local_elbo
from pvae.runtime.pyro_params import Program
from pvae.runtime.torch_state import seeded


class WeightedDraws(NamedTuple):
    """K draws of each row's latents as one real vector, z [K, B, D], and the logarithms of their weights, [K, B].

    The weights of a row add up to one; those of a point mass are all the same.
    """

    z: Tensor
    log_weights: Tensor

    def mean(self, values: Tensor) -> Tensor:
        """The weighed mean over draws of values [K, B, ...], [B, ...]."""
        weights = self.log_weights.exp()
        return (weights.view(*weights.shape, *(1,) * (values.dim() - 2)) * values).sum(0)

    @property
    def ess(self) -> Tensor:
        r"""Effective number of draws, :math:`1 / \sum_k v_k^2`, [B]."""
        return (2 * self.log_weights).logsumexp(0).neg().exp()


def freeze(guide: Program, x: Tensor, index: Tensor | None) -> Program:
    """The guide with its q_params found once, which may take a search."""
    return guide.at(guide.params(x, index).detach()) if isinstance(guide, Guide) else guide


def posterior_moments(family: Family, q_params: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of q(z; q_params) for rows q_params [B, P], [B, D] each.

    Where the family does not state both, the missing one is that of draws. Their noise is one for all rows, so that
    a row has the same code whatever asks for it, and whatever rows stand beside it.
    """
    q = family(q_params)
    mean, sd = (_stated(q, name) for name in ("mean", "stddev"))
    if mean is None or sd is None:
        z = common_draws(family, q_params)
        mean, sd = z.mean(0) if mean is None else mean, z.std(0) if sd is None else sd
    return mean, sd


def _stated(q: Any, name: str) -> Tensor | None:
    try:
        return getattr(q, name)
    except NotImplementedError:
        return None


def common_draws(family: Family, q_params: Tensor) -> Tensor:
    """Draws from q(z; q_params) under noise that is the same for every row and at every call, [S, B, D]."""
    found = []
    with seeded(MOMENTS):
        for row in q_params.split(1):
            torch.manual_seed(MOMENTS)
            found.append(family(row).sample(torch.Size([MOMENT_DRAWS])))
    return torch.cat(found, 1)


def likelihood_at(model: Program, sites: LatentSites, z: Tensor, x: Tensor, index: Tensor | None = None) -> Any:
    """p(x|z) at z [N, D], the real vector behind the latents; its batch shape is [N].

    Arguments:
        x: rows [N, C] from which the program takes what it is given beside its latents, such as a label's columns.
    """
    latents = poutine.trace(fixed_guide(Delta(sites.dim), z, sites)).get_trace(x, index)
    return observed_site(poutine.replay(model, trace=latents), x, index)["fn"]


def importance_draws(
    model: Program,
    guide: Guide,
    q_params: Tensor,
    x: Tensor,
    index: Tensor | None = None,
    K: int = 100,
    together: int | None = None,
) -> WeightedDraws:
    r"""Draws from q(z; q_params) weighed towards the posterior, :math:`v_k \propto p(x, z_k) / q(z_k)`.

    Arguments:
        model: the program whose posterior is meant, as it scores these rows.
        guide: whose family and sites are used.
        q_params: [B, P].
        x, index: rows [B, C] and which training datapoints they are.
        K: draws for each row.
        together: the most draws of all rows that pass through the program together, if fewer than usual.
    """
    q = guide.family(q_params)
    z = q.sample(torch.Size([1 if guide.family.point_mass else K]))
    if guide.family.point_mass:
        return WeightedDraws(z, z.new_zeros(z.shape[:2]))
    joint = []
    for part in draw_chunks(len(z), len(x), together):
        codes = z[part].flatten(0, 1)
        where, which = tile_rows(x, index, part)
        joint.append(log_weights(model, fixed_guide(Delta(guide.sites.dim), codes, guide.sites), where, which).log_w)
    return WeightedDraws(z, (torch.cat(joint, 1).view(z.shape[:2]) - q.log_prob(z)).log_softmax(0))


def refit(
    model: Program,
    guide: Guide,
    x: Tensor,
    index: Tensor | None = None,
    *,
    offers: Sequence[Tensor] = (),
    steps: int = 100,
    seed: int = 0,
) -> Tensor:
    """The best q_params [B, P] of the guide's family for rows that a program scores in another way than the guide knows.

    Arguments:
        model: the program whose ELBO the rows climb.
        guide: whose family and sites are used.
        x, index: rows [B, C] and which training datapoints they are.
        offers: rows as the guide may see them, [B, C] each. A row starts from the best of the guide's q_params for these and
            of the family's initial one; rows of parameters, which see no data, offer nothing.
        steps: the most steps of a row.
        seed: of the noise; the random stream outside is left alone.
    """
    bound = LocalELBO(model, guide.family, guide.sites)

    def look(q_params: Tensor) -> Tensor:
        with seeded(seed):
            return bound(q_params, x, index, LOOK_DRAWS).nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)

    best = guide.family.initial().to(x).expand(len(x), -1)
    value = look(best)
    for rows in offers if not isinstance(guide, PerDatapoint) else ():
        with seeded(seed + 2):  # a guide that refines draws
            q_params = guide.params(rows).detach()
        offered = look(q_params)
        better = offered > value
        best, value = torch.where(better.unsqueeze(-1), q_params, best), torch.where(better, offered, value)
    return maximize_local_elbo(
        bound, best, x, index, steps=steps, rule=default_update_rule(guide.family), seed=seed
    ).q_params
