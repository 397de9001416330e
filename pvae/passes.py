"""Rows through a fitted program: in batches, from one seed; codes to data, and data to weighed codes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from pyro import poutine
from torch import Tensor

from pvae.errors import UserError
from pvae.families import Delta
from pvae.guides import Guide, given
from pvae.runtime import in_pieces, module_of, own_parameters, seeded, unchecked
from pvae.sites import Sites, observed
from pvae.weights import Program, log_weights

__all__ = ["Codes", "Rows", "Values", "by_rows", "decoded", "fixed", "rows_of", "weighed"]

# Datapoints that pass through the program together.
ROWS = 250

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


def rows_of(values: Values, model: Program) -> Tensor:
    """Rows [N, C] as a tensor of the type and on the device of the program's parameters.

    Raises:
        UserError: they are no table of numbers.
    """
    try:
        found = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"the rows are no table of numbers ({error})") from None
    if found.dim() < 2:
        raise UserError(f"the rows have shape {tuple(found.shape)}, but a table [rows, columns] is needed")
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
    progress: Callable[[int], None] = lambda rows: None,
) -> dict[str, Tensor]:
    """Apply a function to batches of rows, without gradients, and lay what it gives end to end, on the CPU.

    Arguments:
        model, guide: the programs that the function uses; both are put into evaluation mode.
        compute: a batch to named tensors [B, ...].
        x, index: rows [N, C], and which training datapoints they are; None for new ones.
        seed: of all draws; the stream outside is left alone. Each batch has a stream of its own.
        progress: called with the number of rows done.

    Raises:
        UserError: no rows, or rows that are no table of numbers.
    """
    rows = rows_of(x, model)
    if not len(rows):
        raise UserError("no rows are given; at least one is needed")
    for program in (model, guide):
        if program is not None:
            module_of(program).eval()

    def computed(part: slice) -> dict[str, Tensor]:
        with seeded(seed + 1_000_003 * part.start):
            found = compute(Rows(rows[part], None if index is None else index[part], part))
        progress(part.stop - part.start)
        return {name: values.cpu() for name, values in found.items()}

    with torch.no_grad(), unchecked(), own_parameters():
        parts = list(in_pieces(computed, len(rows), ROWS, "rows"))
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def fixed(guide: Program, x: Tensor, index: Tensor | None) -> Program:
    """The guide with its lam found once, which may take a search."""
    return guide.at(guide.params(x, index).detach()) if isinstance(guide, Guide) else guide


def decoded(model: Program, sites: Sites, z: Tensor, x: Tensor, index: Tensor | None = None) -> Any:
    """p(x|z) at z [N, D], the real vector behind the latents; its batch shape is [N].

    Arguments:
        x: rows [N, C] from which the program takes what it is given beside its latents, such as a label's columns.
    """
    latents = poutine.trace(given(Delta(sites.dim), z, sites)).get_trace(x, index)
    return observed(poutine.replay(model, trace=latents), x, index)["fn"]


def weighed(model: Program, guide: Guide, lam: Tensor, x: Tensor, index: Tensor | None = None, K: int = 100) -> Codes:
    r"""Draws from q(z; lam) weighed towards the posterior, :math:`v_k \propto p(x, z_k) / q(z_k)`.

    Arguments:
        model: the program whose posterior is meant, as it scores these rows.
        guide: whose family and sites are used.
        lam: [B, P].
        x, index: rows [B, C] and which training datapoints they are.
        K: draws for each row.
    """
    q = guide.family(lam)
    z = q.sample(torch.Size([1 if guide.family.point_mass else K]))
    if guide.family.point_mass:
        return Codes(z, z.new_zeros(z.shape[:2]))
    flat, where = z.flatten(0, 1), x.repeat(len(z), *(1,) * (x.dim() - 1))
    which = None if index is None else index.repeat(len(z))
    joint = log_weights(model, given(Delta(guide.sites.dim), flat, guide.sites), where, which).log_w
    return Codes(z, (joint.view(z.shape[:2]) - q.log_prob(z)).log_softmax(0))
