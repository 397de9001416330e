"""Restore rows: impute missing entries and remove noise, by draws from each row's posterior."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

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
from pvae.inference.posterior import likelihood_at, refit_params
from pvae.inference.refinement import CHECK_DRAWS
from pvae.runtime.pyro_params import Program
from pvae.samplers.log_joint import LogJoint
from pvae.samplers.posterior_draws import METHODS, NONE, PosteriorDraws, resample
from pvae.samplers.row_posterior import ACCURACIES, HELD, draw_rows
from pvae.stats import Estimate, column_means, mean_se

# Seeds of the search for variational parameters and of a first run of the program: apart from those of the draws.
SEARCH, LOOK = 40_000_000, 50_000_000

# What is held together: rows times draws times levels of an entry, if these are finitely many; entries near a cache.
ENUMERATED, CACHED = 100_000, 4_000_000

# The least draws of a row: the checks of fewer fail so often that the dearer methods they lead to take longer.
QUICK = ACCURACIES["quick"]
LEAST_DRAWS = QUICK.K
COMPLETE = -1  # the method of rows that need no draws


@dataclass(frozen=True)
class _Restored:
    x: Tensor
    sd: Tensor
    ess: Tensor
    method: Tensor

    @property
    def reliable(self) -> Tensor:
        """Whether the checks of a method passed, [B]; those of a point mass never do, and complete rows need none."""
        return self.method != NONE

    def counts(self) -> dict[str, int]:
        """Return how many rows took each method of `posterior`."""
        return {name: n for number, name in enumerate(METHODS) if (n := int((self.method == number).sum()))}


@dataclass(frozen=True)
class Imputation(_Restored):
    r"""Imputed rows; C are the columns that the program observes.

    Attributes:
        x: observed entries as they were, :math:`E[x_{mis}|x_{obs}]` elsewhere, [B, C].
        sd: standard deviation of :math:`p(x_{mis}|x_{obs})`, entry by entry, [B, C]; 0 for observed entries.
        draws: multiple imputations: missing entries drawn jointly from :math:`p(x_{mis}|x_{obs})`, [S, B, C].
        ess: effective sample size of each row's posterior draws, [B]; NaN for complete rows.
        method: number of the method that gave them, see `posterior`, [B]; -1 for complete rows.
    """

    draws: Tensor

    def summary(self) -> dict[str, Estimate]:
        """Return mean and standard error of ``sd`` over imputed entries, of the others over rows that have any."""
        there = self.method != COMPLETE
        of_rows = {"ess": mean_se(self.ess[there]), "reliable": mean_se(self.reliable[there])}
        return {"sd": mean_se(self.sd[self.sd > 0])} | of_rows


@dataclass(frozen=True)
class Denoising(_Restored):
    """Denoised rows of the columns C that the program observes: E[x|y] and the standard deviation of p(x|y), entry by
    entry, x and sd [B, C]; effective sample size and method of each row's posterior draws, [B], as of `Imputation`.
    """

    def summary(self) -> dict[str, Estimate]:
        """Return mean and standard error of ``sd`` over entries, of ``ess`` and ``reliable`` over rows."""
        return {"sd": mean_se(self.sd), "ess": mean_se(self.ess), "reliable": mean_se(self.reliable)}


def impute(
    model: Program,
    guide: Guide,
    x: Values,
    index: Tensor | None = None,
    *,
    observed: Values | None = None,
    means: Values | None = None,
    K: int = LEAST_DRAWS,
    draws: int = 5,
    steps: int = 100,
    seed: int = 0,
    progress: Progress = silent,
) -> Imputation:
    r"""Impute missing entries from the observed ones, with multiple imputations.

    To estimate :math:`p(x_{mis}|x_{obs}) = \int p(x_{mis}|z)\, p(z|x_{obs})\, dz`, q(z) is fitted to the observed
    entries, and from it on `posterior` draws from p(z|x_obs) by the cheapest method whose checks pass for a row. Means,
    variances and draws are those of :math:`\sum_k v_k\, p(x_{mis}|z_k)`, with the draws' weights v.

    Arguments:
        model, guide, x, index, seed, progress: as for `encode`; NaN marks missing entries, and complete rows are
            skipped. A point mass takes one draw, whose spread is p(x|z)'s alone.
        K: posterior draws of each row, of which a fifth must be effective; at least 500 are drawn.
        observed: which entries are observed, [B, C], if NaN does not say it.
        means: of the columns, [C], in the place of missing entries for an encoder that was trained on complete rows;
            those of the rows given unless given.
        draws: S, multiple imputations of each row.
        steps: the most refinement steps of a row's q; far fewer send more rows to dearer methods.

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
    results["method"] = torch.full((len(values),), COMPLETE)
    if len(incomplete):
        part = every.at(incomplete)
        candidates = part.with_nan if _encodes_nan(guide, part.with_nan[:1]) else part.rows

        def compute(rows: RowBatch) -> dict[str, Tensor]:
            values, there, start = part.values[rows.place], part.observed[rows.place], candidates[rows.place]
            mixture = part.draw_mixture(mask_missing(model), guide, rows, start, K, steps)
            mean, sd = mixture.moments(lambda fn, _: entry_moments(fn))
            drawn = torch.where(there, values, mixture.draw(draws)).transpose(0, 1)
            mean, sd = torch.where(there, values, mean), sd.masked_fill(there, 0)
            return {"x": mean, "sd": sd, "draws": drawn} | mixture.reliability

        for name, imputed in part.map_batches(model, guide, compute, K, seed, progress).items():
            results[name][incomplete.cpu()] = imputed.to(results[name])
    results["draws"] = results["draws"].transpose(0, 1)
    return Imputation(**results)


def denoise(
    model: Program,
    guide: Guide,
    y: Values,
    noise: Channel,
    index: Tensor | None = None,
    *,
    K: int = LEAST_DRAWS,
    steps: int = 100,
    seed: int = 0,
    progress: Progress = silent,
) -> Denoising:
    r"""Denoise rows: compute the posterior mean of clean rows, :math:`E[x|y] = \int E[x|y, z]\, p(z|y)\, dz`.

    q(z) is fitted to the noisy rows under :math:`p(y|z) = \int p(y|x)\, p(x|z)\, dx`, and from it on `posterior` draws
    from p(z|y) by the cheapest method whose checks pass for a row. Entries of y that are NaN are missing and imputed.

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
        program = noisy if there.all() else mask_missing(noisy)
        fn, candidates = observed_site(model, rows.x, rows.index)["fn"], rows.x.clone()
        candidates[:, : seen.shape[1]] = clamp_to_support(fn, seen.round() if fn.support.is_discrete else seen)
        mixture = every.draw_mixture(program, guide, rows, candidates, K, steps)

        def clean_moments(fn: Any, part: slice) -> Moments:
            """Mean and variance of p(x|y, z) for observed entries, of p(x|z) for missing ones."""
            y, is_observed = (tile_rows(t, None, part)[0] for t in (seen, there))
            pairs = zip(fn.base_dist.clean_moments(y), entry_moments(fn.base_dist.clean), strict=True)
            return Moments(*(torch.where(is_observed, *pair) for pair in pairs))

        mean, sd = mixture.moments(clean_moments)
        return {"x": mean, "sd": sd} | mixture.reliability

    return Denoising(**every.map_batches(model, guide, compute, K, seed, progress))


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

    @property
    def with_nan(self) -> Tensor:
        """Rows with NaN for missing entries."""
        return torch.where(self.mask, self.rows, torch.nan)

    @property
    def max_batch(self) -> int:
        """The most draws of all rows that are held together."""
        return max(1, min(ENUMERATED // max(1, num_levels(self.fn)), CACHED // self.values.shape[1]))

    def map_batches(
        self, model: Program, guide: Guide, compute: Callable[[RowBatch], Any], K: int, seed: int, progress: Progress
    ) -> dict[str, Tensor]:
        draws = max(K, LEAST_DRAWS) * guide.sites.dim
        size = max(1, min(batching.ROWS, HELD // draws, self.max_batch // QUICK.most_chains))
        options: dict[str, Any] = {"seed": seed, "batch_size": size, "progress": progress}
        return batching.map_batches(model, guide, compute, self.rows, self.index, **options)

    def draw_mixture(
        self, program: Program, guide: Guide, rows: RowBatch, candidates: Tensor, K: int, steps: int
    ) -> _Mixture:
        """Refit q to a batch as a program scores it, starting from candidates; draw each row's codes from it on."""
        x, index, family, sites = self.with_nan[rows.place], rows.index, guide.family, guide.sites
        target = _JointInPasses(program, x, index, sites, max_batch=min(ROWS_PER_PASS, self.max_batch))
        q_params = self._refit(target, guide, candidates, steps, rows.seed + SEARCH)
        if family.point_mass:
            draws = _point_mass(family(q_params).sample(torch.Size([1])))
        else:
            K = max(K, LEAST_DRAWS)
            accuracy = QUICK._replace(K=K, ess=K // 5)
            draws = _scorable(draw_rows(target, (family, q_params), accuracy, seed=rows.seed))

        def likelihood(u: Tensor, part: slice) -> Any:
            return _unmasked(likelihood_at(program, sites, u.flatten(0, 1).to(x), *tile_rows(x, index, part)))

        return _Mixture(draws, likelihood, target.max_batch)

    def _refit(self, target: LogJoint, guide: Guide, candidates: Tensor, steps: int, seed: int) -> Tensor:
        params = []
        for place in torch.arange(len(candidates)).split(max(1, self.max_batch // CHECK_DRAWS)):
            part, start = target.rows(place), candidates[place]
            options: dict[str, Any] = {"candidates": [start], "steps": steps, "seed": seed + int(place[0])}
            params.append(refit_params(part.model, guide, part.x, part.index, **options))
        return torch.cat(params)

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


@dataclass(frozen=True)
class _JointInPasses(LogJoint):
    """Log joint density of which at most ``max_batch`` draws of all rows are computed together, gradients too."""

    max_batch: int = ROWS_PER_PASS

    def rows(self, part: slice | Tensor) -> _JointInPasses:
        return replace(self, x=self.x[part], index=None if self.index is None else self.index[part])

    def log_lik_and_prior(self, u: Tensor) -> tuple[Tensor, Tensor]:
        parts = list(draw_chunks(len(u), u.shape[1], self.max_batch))
        score = super().log_lik_and_prior
        if len(parts) == 1:
            return score(u)
        values = [checkpoint(score, u[part], use_reentrant=False) for part in parts]
        log_lik, log_prior = (torch.cat(value) for value in zip(*values, strict=True))
        return log_lik, log_prior

    def prior(self, chains: int) -> Tensor:
        parts = draw_chunks(chains, len(self.x), self.max_batch)
        return torch.cat([super(_JointInPasses, self).prior(part.stop - part.start) for part in parts])


def _point_mass(u: Tensor) -> PosteriorDraws:
    """Return a point mass as one draw of each row, u [1, B, D], which no check has passed."""
    B = u.shape[1]
    none, unknown = torch.full((B,), NONE, device=u.device), u.new_full((B,), torch.nan)
    return PosteriorDraws(u, u.new_zeros(1, B), unknown, none, u.new_ones(B), unknown, {})


def _scorable(draws: PosteriorDraws) -> PosteriorDraws:
    """Replace draws without weight, at which p(x|z) may be NaN, by their row's heaviest."""
    heaviest = draws.log_weights.argmax(0).view(1, -1, 1).expand_as(draws.u[:1])
    return replace(draws, u=draws.u.where(draws.log_weights.isfinite().unsqueeze(-1), draws.u.gather(0, heaviest)))


class _Mixture(NamedTuple):
    r"""Mixture :math:`\sum_k v_k\, p(x|z_k)` over weighted draws from each row's posterior."""

    codes: PosteriorDraws
    likelihood: Callable[[Tensor, slice], Any]  # p(x|z) at unconstrained codes of a slice of the draws
    max_batch: int

    @property
    def reliability(self) -> dict[str, Tensor]:
        return {"ess": self.codes.ess.to(torch.get_default_dtype()), "method": self.codes.method}

    def moments(self, moments_of: Callable[[Any, slice], Moments]) -> tuple[Tensor, Tensor]:
        """Compute mean and standard deviation, [B, C], from the moments of p(x|z_k) for slices of the draws."""
        mean = square = centre = torch.zeros(())
        for part in draw_chunks(len(self.codes.u), self.codes.u.shape[1], self.max_batch):
            moments = moments_of(self.likelihood(self.codes.u[part], part), part)
            first, second = (moment.unflatten(0, self.codes.u[part].shape[:2]) for moment in moments)
            weighted = partial(torch.einsum, "kb,kb...->b...", self.codes.log_weights[part].exp().to(first))
            centre = first[0] if part.start == 0 else centre  # squares around 0 lose the digits of a mean far from it
            mean = mean + weighted(first - centre)
            square = square + weighted(second + (first - centre) ** 2)
        return centre + mean, (square - mean**2).clamp(min=0).sqrt()

    def draw(self, count: int) -> Tensor:
        u = resample(self.codes.u, self.codes.log_weights, count)
        order = torch.rand(u.shape[:2], device=u.device).argsort(0)  # for draws come sorted by their number
        u = u.gather(0, order.unsqueeze(-1).expand_as(u))
        parts = draw_chunks(*u.shape[:2])
        return torch.cat([self.likelihood(u[part], part).sample().unflatten(0, u[part].shape[:2]) for part in parts])
