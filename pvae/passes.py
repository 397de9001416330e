"""Rows through a fitted program: in batches, from one seed; codes to data, and data to weighed codes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from pyro import poutine
from torch import Tensor

from pvae.errors import UserError
from pvae.families import Delta, Family
from pvae.guides import Guide, PerDatapoint, ascent, given, local_bound, local_optimum
from pvae.runtime import in_pieces, module_of, own_parameters, seeded, unchecked
from pvae.sites import Sites, observed
from pvae.weights import ROWS_PER_PASS, Program, log_weights

__all__ = [
    "Codes",
    "Rows",
    "Values",
    "by_rows",
    "chunks",
    "common_draws",
    "decoded",
    "fixed",
    "moments",
    "refitted",
    "repeated",
    "rows_of",
    "weighed",
]

# Datapoints that pass through the program together, and draws by which a start is chosen.
ROWS, LOOK_DRAWS = 250, 50

# Streams of noise: of a batch's draws, clear of all that searches and diagnostics take from small seeds and constants,
# and of the draws by which moments are found, the same for every row and seed; and the number of these.
STREAM, MOMENTS, MOMENT_DRAWS = 10**12, 10**18, 500

Values = Tensor | np.ndarray


class Rows(NamedTuple):
    """Some of the rows x [B, C], which training datapoints they are, index [B] or None, and where they stand."""

    x: Tensor
    index: Tensor | None  # type: ignore[assignment]
    place: slice


class Codes(NamedTuple):
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


def rows_of(values: Values, model: Program) -> Tensor:
    """Rows [N, C] as a tensor of the type and on the device of the program's parameters.

    Raises:
        UserError: they are no table of numbers, or there are none.
    """
    try:
        found = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"the rows are no table of numbers ({error})") from None
    if found.dim() < 2:
        raise UserError(f"the rows have shape {tuple(found.shape)}, but a table [rows, columns] is needed")
    if not len(found):
        raise UserError("no rows are given; at least one is needed")
    like = next(iter(module_of(model).parameters()), torch.empty(0))
    return found.to(device=like.device, dtype=like.dtype)


def by_rows(
    model: Program,
    guide: Program | None,
    compute: Callable[[Rows], dict[str, Tensor]],
    x: Values,
    index: Tensor | None = None,
    *,
    seed: int = 0,
    size: int = ROWS,
    progress: Callable[[int], None] = lambda rows: None,
) -> dict[str, Tensor]:
    """Apply a function to batches of rows, without gradients, and lay what it gives end to end, on the CPU.

    Arguments:
        model, guide: the programs that the function uses; both are put into evaluation mode.
        compute: a batch to named tensors [B, ...].
        x, index: rows [N, C], and which training datapoints they are, on any device; None for new ones.
        seed: of all draws; the stream outside is left alone. Each batch has a stream of its own.
        size: rows of a batch, at most.
        progress: called with the number of rows done.

    Raises:
        UserError: no rows, or rows that are no table of numbers.
    """
    rows = rows_of(x, model)
    index = None if index is None else index.to(rows.device)
    for program in (model, guide):
        if program is not None:
            module_of(program).eval()

    def computed(part: slice) -> dict[str, Tensor]:
        with seeded(seed + STREAM + 1_000_003 * part.start):
            found = compute(Rows(rows[part], None if index is None else index[part], part))
        progress(part.stop - part.start)
        return {name: values.cpu() for name, values in found.items()}

    with torch.no_grad(), unchecked(), own_parameters():
        parts = list(in_pieces(computed, len(rows), size, "rows"))
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def fixed(guide: Program, x: Tensor, index: Tensor | None) -> Program:
    """The guide with its lam found once, which may take a search."""
    return guide.at(guide.params(x, index).detach()) if isinstance(guide, Guide) else guide


def moments(family: Family, lam: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of q(z; lam) for rows lam [B, P], [B, D] each.

    Where the family does not state both, the missing one is that of draws. Their noise is one for all rows, so that
    a row has the same code whatever asks for it, and whatever rows stand beside it.
    """
    q = family(lam)
    mean, sd = (_stated(q, name) for name in ("mean", "stddev"))
    if mean is None or sd is None:
        z = common_draws(family, lam)
        mean, sd = z.mean(0) if mean is None else mean, z.std(0) if sd is None else sd
    return mean, sd


def _stated(q: Any, name: str) -> Tensor | None:
    try:
        return getattr(q, name)
    except NotImplementedError:
        return None


def common_draws(family: Family, lam: Tensor) -> Tensor:
    """Draws from q(z; lam) under noise that is the same for every row and at every call, [S, B, D]."""
    found = []
    with seeded(MOMENTS):
        for row in lam.split(1):
            torch.manual_seed(MOMENTS)
            found.append(family(row).sample(torch.Size([MOMENT_DRAWS])))
    return torch.cat(found, 1)


def decoded(model: Program, sites: Sites, z: Tensor, x: Tensor, index: Tensor | None = None) -> Any:
    """p(x|z) at z [N, D], the real vector behind the latents; its batch shape is [N].

    Arguments:
        x: rows [N, C] from which the program takes what it is given beside its latents, such as a label's columns.
    """
    latents = poutine.trace(given(Delta(sites.dim), z, sites)).get_trace(x, index)
    return observed(poutine.replay(model, trace=latents), x, index)["fn"]


def weighed(
    model: Program,
    guide: Guide,
    lam: Tensor,
    x: Tensor,
    index: Tensor | None = None,
    K: int = 100,
    together: int | None = None,
) -> Codes:
    r"""Draws from q(z; lam) weighed towards the posterior, :math:`v_k \propto p(x, z_k) / q(z_k)`.

    Arguments:
        model: the program whose posterior is meant, as it scores these rows.
        guide: whose family and sites are used.
        lam: [B, P].
        x, index: rows [B, C] and which training datapoints they are.
        K: draws for each row.
        together: the most draws of all rows that pass through the program together, if fewer than usual.
    """
    q = guide.family(lam)
    z = q.sample(torch.Size([1 if guide.family.point_mass else K]))
    if guide.family.point_mass:
        return Codes(z, z.new_zeros(z.shape[:2]))
    joint = []
    for part in chunks(len(z), len(x), together):
        codes = z[part].flatten(0, 1)
        where, which = repeated(x, index, part)
        joint.append(log_weights(model, given(Delta(guide.sites.dim), codes, guide.sites), where, which).log_w)
    return Codes(z, (torch.cat(joint, 1).view(z.shape[:2]) - q.log_prob(z)).log_softmax(0))


def chunks(K: int, B: int, together: int | None = None) -> Iterator[slice]:
    """K draws of B rows in parts of so many draws in all, at the most, that pass through a program together."""
    size = max(1, (together or ROWS_PER_PASS) // B)
    return (slice(start, min(start + size, K)) for start in range(0, K, size))


def repeated(x: Tensor, index: Tensor | None, part: slice) -> tuple[Tensor, Tensor | None]:
    """Rows and their index once for each draw of a part."""
    times = part.stop - part.start
    return x.repeat(times, *(1,) * (x.dim() - 1)), None if index is None else index.repeat(times)


def refitted(
    model: Program,
    guide: Guide,
    x: Tensor,
    index: Tensor | None = None,
    *,
    offers: Sequence[Tensor] = (),
    steps: int = 100,
    seed: int = 0,
) -> Tensor:
    """The best lam [B, P] of the guide's family for rows that a program scores in another way than the guide knows.

    Arguments:
        model: the program whose ELBO the rows climb.
        guide: whose family and sites are used.
        x, index: rows [B, C] and which training datapoints they are.
        offers: rows as the guide may see them, [B, C] each. A row starts from the best of the guide's lam for these and
            of the family's initial one; rows of parameters, which see no data, offer nothing.
        steps: the most steps of a row.
        seed: of the noise; the random stream outside is left alone.
    """
    bound = local_bound(model, guide.family, guide.sites)

    def look(lam: Tensor) -> Tensor:
        with seeded(seed):
            return bound(lam, x, index, LOOK_DRAWS).nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)

    best = guide.family.initial().to(x).expand(len(x), -1)
    value = look(best)
    for rows in offers if not isinstance(guide, PerDatapoint) else ():
        with seeded(seed + 2):  # a guide that refines draws
            lam = guide.params(rows).detach()
        offered = look(lam)
        better = offered > value
        best, value = torch.where(better.unsqueeze(-1), lam, best), torch.where(better, offered, value)
    return local_optimum(bound, best, x, index, steps=steps, rule=ascent(guide.family), seed=seed).lam
