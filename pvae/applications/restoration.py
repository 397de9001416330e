"""Restore rows: impute missing entries and remove noise, by importance-weighted posterior draws of a fitted program."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pvae.distributions.masked_likelihood import MaskedDistribution
from pvae.distributions.noise_convolution import Channel, Moments, clamp_to_support, entry_moments, num_levels
from pvae.distributions.supports import base_constraint
from pvae.errors import Incompatible, UserError, check_range, refuse_first
from pvae.generative.effect_handlers import mask_missing, with_noise
from pvae.inference import batching
from pvae.inference.batching import Progress, RowBatch, Values, as_rows, draw_chunks, inference_mode, silent, tile_rows
from pvae.inference.guides import Guide
from pvae.inference.importance import ROWS_PER_PASS
from pvae.inference.latents import observed_site
from pvae.inference.posterior import WeightedDraws, importance_draws, likelihood_at, refit_params
from pvae.inference.refinement import CHECK_DRAWS
from pvae.runtime.pyro_params import Program
from pvae.stats import Estimate, column_means, mean_se

# Seeds of the search for variational parameters and of a first run of the program: apart from those of the draws.
SEARCH, LOOK = 40_000_000, 50_000_000

# Rows times draws times levels of an entry that are held together, for entries with finitely many levels.
ENUMERATED = 100_000


@dataclass(frozen=True)
class Imputation:
    r"""Imputed rows; C are the columns that the program observes.

    Attributes:
        x: observed entries as they were, :math:`E[x_{mis}|x_{obs}]` elsewhere, [B, C].
        sd: standard deviation of :math:`p(x_{mis}|x_{obs})`, entry by entry, [B, C]; 0 for observed entries.
        draws: multiple imputations: missing entries drawn jointly from :math:`p(x_{mis}|x_{obs})`, [S, B, C].
        ess: effective sample size of the K importance draws for each row, [B]; NaN for complete rows.
    """

    x: Tensor
    sd: Tensor
    draws: Tensor
    ess: Tensor

    def summary(self) -> dict[str, Estimate]:
        """Return mean and standard error of ``sd`` over imputed entries and of ``ess`` over rows that have any."""
        return {"sd": mean_se(self.sd[self.sd > 0]), "ess": mean_se(self.ess[~self.ess.isnan()])}


@dataclass(frozen=True)
class Denoising:
    """Denoised rows of the columns C that the program observes: E[x|y] and the standard deviation of p(x|y), entry by
    entry, x and sd [B, C], and the effective sample size of the K importance draws for each row, ess [B].
    """

    x: Tensor
    sd: Tensor
    ess: Tensor

    def summary(self) -> dict[str, Estimate]:
        """Return mean and standard error of ``sd`` over entries and of ``ess`` over rows."""
        return {"sd": mean_se(self.sd), "ess": mean_se(self.ess)}


def impute(
    model: Program,
    guide: Guide,
    x: Values,
    index: Tensor | None = None,
    *,
    observed: Values | None = None,
    means: Values | None = None,
    K: int = 100,
    draws: int = 5,
    steps: int = 100,
    seed: int = 0,
    progress: Progress = silent,
) -> Imputation:
    r"""Impute missing entries from the observed ones, with multiple imputations.

    To estimate :math:`p(x_{mis}|x_{obs}) = \int p(x_{mis}|z)\, p(z|x_{obs})\, dz`, q(z) is fitted to the observed
    entries, K draws of it get importance weights :math:`v_k \propto p(x_{obs}, z_k) / q(z_k)`, and means, variances
    and draws are those of :math:`\sum_k v_k\, p(x_{mis}|z_k)`.

    Arguments:
        model, guide, x, index, K, seed, progress: as for `encode`; NaN marks missing entries, and complete rows are
            skipped. A point mass takes one draw, whose spread is p(x|z)'s alone.
        observed: which entries are observed, [B, C], if NaN does not say it.
        means: of the columns, [C], in the place of missing entries for an encoder that was trained on complete rows;
            those of the rows given unless given.
        draws: S, multiple imputations of each row.
        steps: the most refinement steps of a row's q.

    Raises:
        UserError: counts below 1, a mask or means of another shape, a label that is missing, or an observed value
            outside the support.
        Incompatible: the program scores whole rows, or observes something else than the rows' columns.

    See also: `denoise`, which imputes missing entries of noisy rows too.
    Source: Mattei and Frellsen (2019), *MIWAE: Deep Generative Modelling and Imputation of Incomplete Data Sets*,
    arXiv:1812.02633.
    """
    check_range("impute", K=K, draws=draws, steps=steps)
    every = _observe("impute", model, guide, x, index, observed, means)
    every.check_values(every.fn.support)
    incomplete = (~every.observed).flatten(1).any(1).nonzero().squeeze(1)
    values = every.values.cpu()
    results = {"x": values.clone(), "sd": torch.zeros_like(values), "draws": torch.stack(draws * [values], 1)}
    results["ess"] = values.new_full((len(values),), torch.nan)
    if len(incomplete):
        part = every.at(incomplete)
        with_nan = torch.where(part.mask, part.rows, torch.nan)
        candidates = with_nan if _encodes_nan(guide, with_nan[:1]) else part.rows

        def compute(rows: RowBatch) -> dict[str, Tensor]:
            values, there, start = part.values[rows.place], part.observed[rows.place], candidates[rows.place]
            mixture = part.fit_mixture(mask_missing(model, there), guide, rows, start, K, steps, seed)
            mean, sd = mixture.moments(lambda fn, _: entry_moments(fn))
            drawn = torch.where(there, values, mixture.draw(draws)).transpose(0, 1)
            mean, sd = torch.where(there, values, mean), sd.masked_fill(there, 0)
            return {"x": mean, "sd": sd, "draws": drawn, "ess": mixture.codes.ess}

        for name, imputed in part.map_batches(model, guide, compute, seed, progress).items():
            results[name][incomplete.cpu()] = imputed
    return Imputation(results["x"], results["sd"], results["draws"].transpose(0, 1), results["ess"])


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
    progress: Progress = silent,
) -> Denoising:
    r"""Denoise rows: compute the posterior mean of clean rows, :math:`E[x|y] = \int E[x|y, z]\, p(z|y)\, dz`.

    q(z) is fitted to the noisy rows under :math:`p(y|z) = \int p(y|x)\, p(x|z)\, dx`, and K draws of it get importance
    weights :math:`v_k \propto p(y, z_k) / q(z_k)`. Entries of y that are NaN are missing: they are imputed.

    Arguments:
        model, guide, y, index, K, steps, seed, progress: as for `impute`; the program was fitted to clean rows.
        noise: p(y|x), as `GaussianNoise` and `FlipNoise`, or a function from x to a distribution of as many entries.

    Raises:
        UserError: counts below 1, or values that the noise can't have left.
        Incompatible: as for `impute`, or the noise does not take such values, or p(x|z) has no finite variance.

    See also: `impute`; `reconstruct`, which does not know the noise.
    """
    check_range("denoise", K=K, steps=steps)
    every = _observe("denoise", model, guide, y, index)
    noisy = with_noise(model, noise, every.site)
    every.check_variance()
    with inference_mode(seed=LOOK):
        fn = observed_site(noisy, every.rows[:1], None if every.index is None else every.index[:1])["fn"]
    every.check_values(fn.support)

    def compute(rows: RowBatch) -> dict[str, Tensor]:
        seen, there = every.values[rows.place], every.observed[rows.place]
        program = noisy if there.all() else mask_missing(noisy, there)
        fn, candidates = observed_site(model, rows.x, rows.index)["fn"], rows.x.clone()
        candidates[:, : seen.shape[1]] = clamp_to_support(fn, seen.round() if fn.support.is_discrete else seen)
        mixture = every.fit_mixture(program, guide, rows, candidates, K, steps, seed)

        def clean_moments(fn: Any, part: slice) -> Moments:
            """Mean and variance of p(x|y, z) for observed entries, of p(x|z) for missing ones."""
            y, is_observed = (tile_rows(t, None, part)[0] for t in (seen, there))
            pairs = zip(fn.base_dist.clean_moments(y), entry_moments(fn.base_dist.clean), strict=True)
            return Moments(*(torch.where(is_observed, *pair) for pair in pairs))

        mean, sd = mixture.moments(clean_moments)
        return {"x": mean, "sd": sd, "ess": mixture.codes.ess}

    return Denoising(**every.map_batches(model, guide, compute, seed, progress))


class _ObservedRows(NamedTuple):
    """Rows [B, C'] with means in the place of missing entries, their mask and indices; values and mask of the columns
    [B, C] at the observed site, its name, and p(x|z) of a few rows.
    """

    rows: Tensor
    mask: Tensor
    index: Tensor | None  # type: ignore[assignment]
    values: Tensor
    observed: Tensor
    site: str
    fn: Any

    def at(self, which: Tensor) -> _ObservedRows:
        return _ObservedRows._make(field[which] if isinstance(field, Tensor) else field for field in self)

    def map_batches(
        self, model: Program, guide: Guide, compute: Callable[[RowBatch], Any], seed: int, progress: Progress
    ) -> dict[str, Tensor]:
        size = max(1, min(batching.ROWS, ENUMERATED // (CHECK_DRAWS * max(1, num_levels(self.fn)))))
        options: dict[str, Any] = {"seed": seed, "batch_size": size, "progress": progress}
        return batching.map_batches(model, guide, compute, self.rows, self.index, **options)

    def fit_mixture(
        self, program: Program, guide: Guide, rows: RowBatch, candidates: Tensor, K: int, steps: int, seed: int
    ) -> _Mixture:
        """Refit q to a batch as a program scores it, starting from candidates; draw codes with importance weights."""
        x, index, seed = rows.x, rows.index, seed + SEARCH + rows.place.start
        max_batch = max(1, min(ROWS_PER_PASS, ENUMERATED // max(1, num_levels(self.fn))))
        q_params = refit_params(program, guide, x, index, candidates=[candidates], steps=steps, seed=seed)
        codes = importance_draws(program, guide, q_params, x, index, K, max_batch)

        def likelihood(z: Tensor, draws: slice) -> Any:
            return _unmasked(likelihood_at(program, guide.sites, z.flatten(0, 1), *tile_rows(x, index, draws)))

        return _Mixture(codes, likelihood, max_batch)

    def check_values(self, support: Any) -> None:
        inner = base_constraint(support)
        outside = self.observed & ~(inner.check(self.values) & self.values.isfinite())
        refuse_first(outside, self.values, f", which is no value of site '{self.site}' ({inner})")

    def check_variance(self) -> None:
        with contextlib.suppress(NotImplementedError):
            if entry_moments(self.fn).variance.isfinite().all():
                return
        kind = type(getattr(self.fn, "base_dist", self.fn)).__name__
        problem = f"denoise: site '{self.site}' is {kind}, which has no finite variance here"
        raise Incompatible(f"{problem}; fit another likelihood, such as Gaussian, or StudentT of df above 2")


def _observe(
    who: str, model: Program, guide: Guide, x: Values, index: Tensor | None, observed: Any = None, means: Any = None
) -> _ObservedRows:
    """Return rows with means in the place of missing entries, and what the program observes of them."""
    if not isinstance(guide, Guide):
        raise UserError(f"{who} needs a guide with a family, such as Amortized, but {type(guide).__name__} has none")
    values = as_rows(x, model)
    mask = ~values.isnan() & _as_mask(values, observed)
    rows = torch.where(mask, values, column_means(values, mask) if means is None else _as_means(values, means))
    index = None if index is None else index.to(rows.device)
    with inference_mode(model, guide, seed=LOOK):
        site = observed_site(model, rows[:3], None if index is None else index[:3])
    columns = site["value"].shape[1]
    if not torch.equal(site["value"], rows[:3, :columns]):
        raise Incompatible(f"{who}: observed site '{site['name']}' is not of the rows' own columns, but made of them")
    if not mask[:, columns:].all():
        row, column = (~mask[:, columns:]).nonzero()[0][:2].tolist()
        where = f"row {row}, column {column + columns}"
        raise UserError(f"{where} is missing, but the program is given it beside its latents")
    return _ObservedRows(rows, mask, index, rows[:, :columns], mask[:, :columns], site["name"], _unmasked(site["fn"]))


def _as_mask(x: Tensor, observed: Values | None) -> Tensor:
    mask = torch.ones_like(x, dtype=torch.bool) if observed is None else torch.as_tensor(observed)
    if mask.dtype != torch.bool or mask.shape != x.shape:
        need = f"it must be bool, True for observed entries, of the rows' shape {tuple(x.shape)}"
        raise UserError(f"the mask is {mask.dtype} of shape {tuple(mask.shape)}; {need}")
    return mask.to(x.device)


def _as_means(x: Tensor, means: Values) -> Tensor:
    values = torch.as_tensor(means).to(x)
    if values.shape != x.shape[1:]:
        raise UserError(f"the means have shape {tuple(values.shape)}, but the rows' columns {tuple(x.shape[1:])}")
    return values.nan_to_num()


def _unmasked(fn: Any) -> Any:
    return _unmasked(fn.fn) if isinstance(fn, MaskedDistribution) else fn


def _encodes_nan(guide: Guide, rows: Tensor) -> bool:
    """Return whether the guide has an encoder that was made for rows with missing entries."""
    encoder = getattr(guide, "encoder", None)
    with torch.no_grad():
        return encoder is not None and bool(encoder(rows).isfinite().all())


class _Mixture(NamedTuple):
    r"""Mixture :math:`\sum_k v_k\, p(x|z_k)` over importance draws of each row's code."""

    codes: WeightedDraws
    likelihood: Callable[[Tensor, slice], Any]  # p(x|z) at a slice of the draws
    max_batch: int

    def moments(self, moments_of: Callable[[Any, slice], Moments]) -> tuple[Tensor, Tensor]:
        """Compute mean and standard deviation, [B, C], from the moments of p(x|z_k) for slices of the draws."""
        mean = square = centre = torch.zeros(())
        for part in draw_chunks(len(self.codes.z), self.codes.z.shape[1], self.max_batch):
            chunk = WeightedDraws(self.codes.z[part], self.codes.log_weights[part])
            moments = moments_of(self.likelihood(chunk.z, part), part)
            first, second = (moment.unflatten(0, chunk.z.shape[:2]) for moment in moments)
            centre = first[0] if part.start == 0 else centre  # squares around 0 lose the digits of a mean far from it
            mean = mean + chunk.mean(first - centre)
            square = square + chunk.mean(second + (first - centre) ** 2)
        return centre + mean, (square - mean**2).clamp(min=0).sqrt()

    def draw(self, count: int) -> Tensor:
        which = torch.multinomial(self.codes.log_weights.exp().mT, count, replacement=True).mT
        z = self.codes.z.gather(0, which.unsqueeze(-1).expand(-1, -1, self.codes.z.shape[-1]))
        parts = draw_chunks(*z.shape[:2])
        return torch.cat([self.likelihood(z[part], part).sample().unflatten(0, z[part].shape[:2]) for part in parts])
