"""Restoring rows: missing entries, and rows seen through noise, told by their posterior under a fitted program."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pvae.distributions.masked import MaskedDistribution
from pvae.distributions.noisy import Channel, Moments, clamp_to_support, entry_moments, num_levels
from pvae.distributions.supports import base_constraint
from pvae.errors import Incompatible, UserError, check_range
from pvae.generative.handlers import mask_missing, with_noise
from pvae.inference.batching import ROWS, RowBatch, Values, as_rows, draw_chunks, map_batches, tile_rows
from pvae.inference.guides import Guide
from pvae.inference.importance import ROWS_PER_PASS
from pvae.inference.latents import observed_site
from pvae.inference.posterior import WeightedDraws, importance_draws, likelihood_at, refit_params
from pvae.inference.refinement import CHECK_DRAWS
from pvae.runtime.pyro_params import Program, local_param_store, module_of
from pvae.runtime.torch_state import no_validation, seeded

# The search for q_params and the draws that it is judged by share no noise, nor does the look at the program.
SEARCH, LOOK = 40_000_000, 50_000_000

# Rows times draws times values of an entry that are held together, where the values are summed over.
ENUMERATED = 100_000

Progress = Callable[[int], None]


def _silent(rows: int) -> None:
    """No progress is shown."""


@dataclass(frozen=True)
class Imputation:
    r"""Rows whose missing entries are filled in; C are the columns that the program observes.

    Attributes:
        x: what is there as it was, :math:`E[x_{mis}|x_{obs}]` elsewhere, [B, C].
        sd: standard deviation of :math:`p(x_{mis}|x_{obs})`, entry by entry, [B, C]; 0 where x is there.
        draws: rows of which what is missing is drawn from :math:`p(x_{mis}|x_{obs})`, jointly, [S, B, C].
        ess: effective number of the K draws behind each row, [B]; NaN where nothing is missing.
    """

    x: Tensor
    sd: Tensor
    draws: Tensor
    ess: Tensor


@dataclass(frozen=True)
class Denoising:
    """Rows without their noise; C are the columns that the program observes.

    Attributes:
        x: E[x|y], [B, C].
        sd: standard deviation of p(x|y), entry by entry, [B, C].
        ess: effective number of the K draws behind each row, [B].
    """

    x: Tensor
    sd: Tensor
    ess: Tensor


def impute(
    model: Program,
    guide: Guide,
    x: Values,
    index: Tensor | None = None,
    *,
    there: Values | None = None,
    means: Values | None = None,
    K: int = 100,
    draws: int = 5,
    steps: int = 100,
    seed: int = 0,
    progress: Progress = _silent,
) -> Imputation:
    r"""Missing entries from those that are there, under :math:`p(x_{mis}|x_{obs}) = \int p(x_{mis}|z)\, p(z|x_{obs})`.

    q(z) is fitted to the entries that are there, K draws of it are weighed by :math:`v_k \propto p(x_{obs}, z_k) /
    q(z_k)`, and means, variances and draws are those of :math:`\sum_k v_k\, p(x_{mis}|z_k)`.

    Arguments:
        model, guide: a fitted program and its guide. A point mass takes one draw, whose spread is p(x|z)'s alone.
        x, index: rows [B, C], NaN where an entry is missing, and which training datapoints they are.
        there: which entries are there, [B, C], if NaN does not say it.
        means: of the columns, [C], with which rows are filled for an encoder that was trained on whole ones; those of
            the rows given unless told.
        K: draws for each row.
        draws: S, rows drawn for each row.
        steps: the most steps in search of a row's q.
        seed: of all draws.
        progress: called with the number of rows done; rows that miss nothing are not looked at.

    Raises:
        UserError: counts below 1, a mask or means of another shape, a label that is missing, or a value that is there
            and outside the support.
        Incompatible: the program scores whole rows, or observes something else than the rows' columns.

    Source: Mattei and Frellsen (2019), *MIWAE: Deep Generative Modelling and Imputation of Incomplete Data Sets*,
    arXiv:1812.02633.
    """
    check_range("impute", K=K, draws=draws, steps=steps)
    seen = _seen("impute", model, guide, x, index, there, means)
    _check_values(seen, seen.fn.support)
    todo = (~seen.there).flatten(1).any(1).nonzero().squeeze(1)
    gaps = _sees_gaps(guide, torch.where(seen.mask, seen.rows, torch.nan)[todo[:1]])

    def compute(rows: RowBatch) -> dict[str, Tensor]:
        own = todo[rows.place]
        offer = torch.where(seen.mask[own], rows.x, torch.nan) if gaps else rows.x
        there, value = seen.there[own], seen.value[own]
        codes = _codes(mask_missing(model, there), guide, rows, offer, K, steps, seed, seen.together)
        mean, sd = _mixed(model, guide, codes, rows, lambda fn, part: entry_moments(_plain(fn)), seen.together)
        drawn = torch.where(there, value, _drawn(model, guide, codes, rows, draws)).transpose(0, 1)
        return {"x": torch.where(there, value, mean), "sd": sd.masked_fill(there, 0), "draws": drawn, "ess": codes.ess}

    whole = seen.value.cpu()
    made = {"x": whole.clone(), "sd": torch.zeros_like(whole), "draws": torch.stack(draws * [whole], 1)}
    made["ess"] = whole.new_full((len(whole),), torch.nan)
    if len(todo):
        which = None if seen.which is None else seen.which[todo]
        found = map_batches(model, guide, compute, seen.rows[todo], which, seed=seed, batch_size=seen.size, progress=progress)
        for name, values in found.items():
            made[name][todo.cpu()] = values
    return Imputation(made["x"], made["sd"], made["draws"].transpose(0, 1), made["ess"])


def denoise(
    model: Program,
    guide: Guide,
    y: Values,
    noise: Channel,
    index: Tensor | None = None,
    *,
    K: int = 100,
    steps: int = 100,
    seed: int = 0,
    progress: Progress = _silent,
) -> Denoising:
    r"""Rows without their noise, :math:`E[x|y] = \int E[x|y, z]\, p(z|y)\, dz`.

    q(z) is fitted to the noisy rows under :math:`p(y|z) = \int p(y|x)\, p(x|z)\, dx`, and K draws of it are weighed by
    :math:`v_k \propto p(y, z_k) / q(z_k)`. Entries of y that are NaN are missing: they are imputed.

    Arguments:
        model, guide: a program that was fitted to clean rows, and its guide.
        y, index: noisy rows [B, C], and which training datapoints they are; None for new ones.
        noise: p(y|x), as `GaussianNoise` and `FlipNoise`, or a function from x
            to a distribution of as many entries.
        K: draws for each row.
        steps: the most steps in search of a row's q.
        seed: of all draws.
        progress: called with the number of rows done.

    Raises:
        UserError: counts below 1, or values that the noise can't have left.
        Incompatible: the program scores whole rows or observes something else than the rows' columns, the noise does not
            take its values, or p(x|z) has no finite variance.
    """
    check_range("denoise", K=K, steps=steps)
    seen = _seen("denoise", model, guide, y, index)
    through = with_noise(model, noise, seen.name)
    _check_variance(seen)
    with local_param_store(), no_validation(), torch.no_grad(), seeded(LOOK):
        _check_values(
            seen, observed_site(through, seen.rows[:1], None if seen.which is None else seen.which[:1])["fn"].support
        )

    def compute(rows: RowBatch) -> dict[str, Tensor]:
        there, value = seen.there[rows.place], seen.value[rows.place]
        program = through if there.all() else mask_missing(through, there)
        fn, offer = observed_site(model, rows.x, rows.index)["fn"], rows.x.clone()
        offer[:, : value.shape[1]] = clamp_to_support(fn, value.round() if fn.support.is_discrete else value)
        codes = _codes(program, guide, rows, offer, K, steps, seed, seen.together)

        def clean(fn: Any, part: slice) -> Moments:
            y, p = tile_rows(value, None, part)[0], _plain(fn).base_dist
            known = tile_rows(there, None, part)[0]
            told, prior = p.clean_moments(y), entry_moments(p.clean)
            return Moments(*(torch.where(known, one, other) for one, other in zip(told, prior, strict=True)))

        mean, sd = _mixed(program, guide, codes, rows, clean, seen.together)
        return {"x": mean, "sd": sd, "ess": codes.ess}

    found = map_batches(model, guide, compute, seen.rows, index, seed=seed, batch_size=seen.size, progress=progress)
    return Denoising(**found)


class _Seen(NamedTuple):
    """Rows as a program observes them.

    Attributes:
        rows, mask: [B, C'] all that the program is given, with means in the place of what is missing; what is there.
        which: training datapoints they are, [B], or None.
        value, there: the same of the columns that it observes, [B, C].
        name, fn: of the observed site, and p(x|z) of some rows at draws of the prior.
    """

    rows: Tensor
    mask: Tensor
    which: Tensor | None
    value: Tensor
    there: Tensor
    name: str
    fn: Any

    @property
    def size(self) -> int:
        """Rows of a batch: fewer where all values that an entry may have are looked at."""
        return max(1, min(ROWS, ENUMERATED // (CHECK_DRAWS * max(1, num_levels(self.fn)))))

    @property
    def together(self) -> int:
        """Draws of all rows that pass through the program together."""
        return max(1, min(ROWS_PER_PASS, ENUMERATED // max(1, num_levels(self.fn))))


def _seen(
    who: str,
    model: Program,
    guide: Guide,
    x: Values,
    index: Tensor | None,
    there: Values | None = None,
    means: Values | None = None,
) -> _Seen:
    if not isinstance(guide, Guide):
        raise UserError(f"{who} needs a guide with a family, such as Amortized, but {type(guide).__name__} has none")
    given = as_rows(x, model)
    mask = ~given.isnan() & _mask(given, there)
    rows = torch.where(mask, given, _means(given, mask, means))
    for program in (model, guide):
        module_of(program).eval()
    which = None if index is None else index.to(rows.device)
    few = rows[:3], None if which is None else which[:3]
    with local_param_store(), no_validation(), torch.no_grad(), seeded(LOOK):
        site = observed_site(model, *few)
    columns = site["value"].shape[1]
    if not torch.equal(site["value"], few[0][:, :columns]):
        raise Incompatible(f"{who}: observed site '{site['name']}' is not of the rows' own columns, but made of them")
    if not mask[:, columns:].all():
        row, column = (~mask[:, columns:]).nonzero()[0][:2].tolist()
        raise UserError(
            f"row {row}, column {column + columns} is missing, but the program is given it beside its latents"
        )
    return _Seen(rows, mask, which, rows[:, :columns], mask[:, :columns], site["name"], _plain(site["fn"]))


def _mask(x: Tensor, there: Values | None) -> Tensor:
    if there is None:
        return torch.ones_like(x, dtype=torch.bool)
    mask = torch.as_tensor(there)
    if mask.dtype != torch.bool or mask.shape != x.shape:
        raise UserError(
            f"the mask is {mask.dtype} of shape {tuple(mask.shape)}; it must be bool, True where a value is there, "
            f"of the rows' shape {tuple(x.shape)}"
        )
    return mask.to(x.device)


def _means(x: Tensor, there: Tensor, means: Values | None) -> Tensor:
    """The columns' means, over the rows that have them unless they are given; 0 for a column that no row has."""
    if means is None:
        return torch.where(there, x, 0).sum(0) / there.sum(0).clamp(min=1)
    found = torch.as_tensor(means).to(x)
    if found.shape != x.shape[1:]:
        raise UserError(f"the means have shape {tuple(found.shape)}, but the rows' columns {tuple(x.shape[1:])}")
    return found.nan_to_num()


def _check_values(seen: _Seen, support: Any) -> None:
    """Refuse values that are there and outside a support."""
    outside = seen.there & ~(base_constraint(support).check(seen.value) & seen.value.isfinite())
    if outside.any():
        row, *column = outside.nonzero()[0].tolist()
        raise UserError(
            f"row {row}, column {', '.join(map(str, column))} is {seen.value[(row, *column)].item():g}, which is no "
            f"value of site '{seen.name}' ({base_constraint(support)}; {int(outside.sum())} such values)"
        )


def _check_variance(seen: _Seen) -> None:
    try:
        finite = bool(entry_moments(seen.fn).variance.isfinite().all())
    except NotImplementedError:
        finite = False
    if not finite:
        kind = type(getattr(seen.fn, "base_dist", seen.fn)).__name__
        raise Incompatible(
            f"denoise: site '{seen.name}' is {kind}, which has no finite variance here; fit another likelihood, "
            "such as Gaussian, or StudentT of df above 2"
        )


def _plain(fn: Any) -> Any:
    """p(x|z) of all entries."""
    return _plain(fn.fn) if isinstance(fn, MaskedDistribution) else fn


def _sees_gaps(guide: Guide, rows: Tensor) -> bool:
    """Whether the guide has an encoder that was made for rows with missing entries."""
    encoder = getattr(guide, "encoder", None)
    if encoder is None or not len(rows):
        return False
    with torch.no_grad():
        return bool(encoder(rows).isfinite().all())


def _codes(
    program: Program, guide: Guide, rows: RowBatch, offer: Tensor, K: int, steps: int, seed: int, together: int
) -> WeightedDraws:
    """Weighed draws from the best q that is found for rows as a program scores them."""
    own = seed + SEARCH + rows.place.start
    q_params = refit_params(program, guide, rows.x, rows.index, candidates=[offer], steps=steps, seed=own)
    return importance_draws(program, guide, q_params, rows.x, rows.index, K, together)


def _mixed(
    program: Program,
    guide: Guide,
    codes: WeightedDraws,
    rows: RowBatch,
    of: Callable[[Any, slice], Moments],
    together: int,
) -> tuple[Tensor, Tensor]:
    r"""Mean and standard deviation of :math:`\sum_k v_k\, p_k`, whose moments are those ``of`` p(x|z_k), [B, C]."""
    mean = square = centre = torch.zeros(())
    for part in draw_chunks(len(codes.z), len(rows.x), together):
        own = WeightedDraws(codes.z[part], codes.log_weights[part])
        fn = likelihood_at(program, guide.sites, own.z.flatten(0, 1), *tile_rows(rows.x, rows.index, part))
        first, second = (values.unflatten(0, own.z.shape[:2]) for values in of(fn, part))
        centre = first[0] if part.start == 0 else centre  # squares around 0 lose the digits of a mean far from it
        mean = mean + own.mean(first - centre)
        square = square + own.mean(second + (first - centre) ** 2)
    return centre + mean, (square - mean**2).clamp(min=0).sqrt()


def _drawn(model: Program, guide: Guide, codes: WeightedDraws, rows: RowBatch, draws: int) -> Tensor:
    r"""Rows drawn from :math:`\sum_k v_k\, p(x|z_k)`, [S, B, C]."""
    which = torch.multinomial(codes.log_weights.exp().mT, draws, replacement=True).mT
    z = codes.z.gather(0, which.unsqueeze(-1).expand(-1, -1, codes.z.shape[-1]))
    found = []
    for part in draw_chunks(draws, len(rows.x)):
        fn = likelihood_at(model, guide.sites, z[part].flatten(0, 1), *tile_rows(rows.x, rows.index, part))
        found.append(_plain(fn).sample().unflatten(0, z[part].shape[:2]))
    return torch.cat(found)
