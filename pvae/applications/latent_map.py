"""Latent maps: the codes of rows on a plane, and the decoded rows of a grid of the plane or of sliders."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pvae.errors import UserError, check_range, nearest
from pvae.inference.batching import Progress, Values, as_rows, inference_mode, map_batches, silent
from pvae.inference.families import Family
from pvae.inference.guides import Guide
from pvae.inference.posterior import common_draws, decode_latents, encode_rows, posterior_means, prior_predictive
from pvae.runtime.pyro_params import Program
from pvae.samplers.log_joint import unconstrain

PROJECTIONS = ("auto", "plane", "pca", "tsne")
# Values that a grid of decoded rows may hold, so that a page with it stays below 2 MB.
VALUES = 1_400_000


@dataclass(frozen=True)
class LatentMap:
    """Codes of B rows on a plane, in units of the unconstrained latents (t-SNE has units of its own).

    Attributes:
        how: ``plane``, the latents themselves; ``pca``, the codes' first two principal components; or ``tsne``, which
            has no inverse: the fields below the codes are then None, and those of the grid empty.
        codes: means of q(z|x), [B, 2].
        spread: covariances of q(z|x), [B, 2, 2].
        prior: draws from the prior, [S, 2].
        share: of the codes' variance along each axis, [2].
        grid_x, grid_y: coordinates of the grid's columns and rows, [G] each.
        grid: means of p(x|z), ``grid[i, j]`` at (grid_x[j], grid_y[i]), [G, G, C].
    """

    how: str
    codes: Tensor
    spread: Tensor | None
    prior: Tensor | None
    share: Tensor | None
    grid_x: Tensor
    grid_y: Tensor
    grid: Tensor


@dataclass(frozen=True)
class Sliders:
    """Decoded rows along the codes' d principal components, at all combinations of G positions.

    Attributes:
        positions: in standard deviations of the codes from their mean, [G]; the middle one is 0.
        scale: standard deviation of the codes along each component, [d].
        share: of the codes' variance along each, [d].
        grid: means of p(x|z), [G, ..., G, C] with one axis for each component.
    """

    positions: Tensor
    scale: Tensor
    share: Tensor
    grid: Tensor


def map_latents(
    model: Program,
    guide: Guide,
    x: Values,
    index: Tensor | None = None,
    *,
    projection: str = "auto",
    size: int = 20,
    perplexity: float = 30.0,
    seed: int = 0,
    progress: Progress = silent,
) -> LatentMap:
    """Map the codes of rows on a plane (latent space itself, PCA or t-SNE) and decode a grid of it.

    Arguments:
        model, guide, x, index, seed, progress: as for `encode`. What a program is given beside its latents, such as a
            label's columns, the grid takes from the first row.
        projection: ``plane`` for two latent dimensions; ``pca`` or ``tsne`` for more; ``auto`` is plane or pca.
        size: G, columns and rows of the grid, at least 2; fewer if rows are so wide that a page could not hold it.
        perplexity: of t-SNE, about the number of neighbours that each code keeps.

    Raises:
        UserError: an unknown projection, one that does not go with the number of dimensions or rows, or a grid of
            fewer than 2 points.

    See also: `make_sliders`, for more than two dimensions; `encode`.
    Source of t-SNE: van der Maaten and Hinton (2008), *Visualizing Data using t-SNE*, JMLR 9.
    """
    rows, D = as_rows(x, model), guide.sites.dim
    how = _choose_projection(projection, D)
    check_range("latent_map", least=2, size=size)
    q_params, codes, _ = encode_rows(model, guide, rows, index, seed=seed, progress=progress)
    codes = codes.float()
    if how == "tsne":
        return LatentMap(how, _embed_by_tsne(codes, perplexity, seed), None, None, None, *torch.zeros(3, 0))
    centre, axes, share = _principal_components(codes, 2) if how == "pca" else _latent_plane(codes)
    with inference_mode(model, seed=seed):
        draws = prior_predictive(model, rows[torch.arange(500) % len(rows)]).latents
        prior = (unconstrain(guide.sites, draws).cpu().float() - centre) @ axes
    points = (codes - centre) @ axes
    grid_x, grid_y = _grid_lines(points, prior, min(size, math.isqrt(VALUES // rows.shape[1])))
    z = torch.cartesian_prod(grid_y, grid_x).flip(1) @ axes.T + centre
    grid = decode_latents(model, guide, z, rows[:1], progress=progress).flatten(1)
    spread = map_batches(
        model, guide, lambda part: {"V": _covariance(guide.family, part.x, axes.to(part.x))}, q_params, seed=seed
    )["V"]
    return LatentMap(how, points, spread, prior, share, grid_x, grid_y, grid.unflatten(0, (len(grid_y), len(grid_x))))


def make_sliders(
    model: Program,
    guide: Guide,
    x: Values,
    index: Tensor | None = None,
    *,
    positions: int = 9,
    directions: int = 3,
    seed: int = 0,
    progress: Progress = silent,
) -> Sliders:
    """Decode the codes' mean and points up to 2.5 standard deviations from it along their principal components.

    Arguments:
        model, guide, x, index, seed, progress: as for `map_latents`.
        positions: G, an odd number, of each slider; if all combinations are too many for a page, first fewer positions
            are taken, down to 5, then fewer directions.
        directions: d, the most sliders; no more than latent dimensions.

    Raises:
        UserError: an even number of positions, no direction, or fewer than 2 rows.

    See also: `map_latents`.
    """
    check_range("sliders", directions=directions)
    if positions < 3 or positions % 2 == 0:
        raise UserError(f"sliders: positions is {positions}, but it must be an odd number from 3 on")
    rows = as_rows(x, model)
    codes = posterior_means(model, guide, rows, index, seed=seed, progress=progress).float()
    positions, count = _affordable(rows.shape[1], positions, min(directions, codes.shape[1]))
    centre, axes, share = _principal_components(codes, count)
    scale = ((codes - centre) @ axes).std(0)
    places = torch.linspace(-2.5, 2.5, positions)
    steps = torch.cartesian_prod(*[places] * count).view(-1, count)
    z = centre + (steps * scale) @ axes.T
    grid = decode_latents(model, guide, z, rows[:1], progress=progress).flatten(1)
    return Sliders(places, scale, share, grid.unflatten(0, (positions,) * count))


def _choose_projection(word: str, D: int) -> str:
    if word not in PROJECTIONS:
        raise UserError(f"unknown projection '{word}'{nearest(word, PROJECTIONS)}")
    if D == 1:
        raise UserError("the latents have 1 dimension, a line and no plane: sliders or interpolate show it")
    if word == "plane" and D != 2:
        raise UserError(f"projection 'plane' is for 2 latent dimensions, and here are {D}: take 'pca' or 'tsne'")
    return word if word != "auto" else "plane" if D == 2 else "pca"


def _affordable(columns: int, positions: int, directions: int) -> tuple[int, int]:
    """Return positions and directions whose grid a page can hold: at least one direction, if need be of 3 positions."""
    for count in range(directions, 0, -1):
        for places in range(positions, min(positions, 5) - 1, -2):
            if places**count * columns <= VALUES:
                return places, count
    return 3, 1


def _latent_plane(codes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the plane of two latent dimensions in the form of `_principal_components`."""
    variance = codes.var(0, unbiased=False)
    share = variance / variance.sum().clamp(min=torch.finfo(variance.dtype).tiny)
    return torch.zeros(2), torch.eye(2), share


def _principal_components(codes: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the codes' mean [D], principal components [D, count] of largest entry positive, and shares of variance."""
    from sklearn.decomposition import PCA

    if len(codes) <= count:
        raise UserError(f"{len(codes)} rows have no {count} principal components; give at least {count + 1}")
    with np.errstate(invalid="ignore"):  # shares of codes without variance are 0 / 0
        pca = PCA(count, svd_solver="full").fit(codes.double().numpy())
    mean, axes, share = map(torch.as_tensor, (pca.mean_, pca.components_.T, pca.explained_variance_ratio_))
    return mean.float(), axes.float(), share.nan_to_num(0.0).float()


def _grid_lines(codes: Tensor, prior: Tensor, size: int) -> list[Tensor]:
    """Return grid lines in x and y that cover all codes, with a margin, and the prior except its tails."""
    low = torch.minimum(codes.amin(0), prior.quantile(0.01, 0))
    high = torch.maximum(codes.amax(0), prior.quantile(0.99, 0))
    margin = 0.03 * (high - low)
    return [torch.linspace(a, b, max(size, 2)) for a, b in zip(low - margin, high + margin, strict=True)]


def _covariance(family: Family, q_params: Tensor, axes: Tensor) -> Tensor:
    """W'VW of the covariances V of q(z; q_params) and axes W [D, d], from draws if q does not state them."""
    q = family(q_params)
    if isinstance(q, torch.distributions.MultivariateNormal | torch.distributions.LowRankMultivariateNormal):
        return axes.T @ q.covariance_matrix @ axes
    if isinstance(q, torch.distributions.Independent):
        return axes.T @ (q.variance.unsqueeze(-1) * axes)
    z = common_draws(family, q_params) @ axes
    z = z - z.mean(0)
    return torch.einsum("sbi,sbj->bij", z, z) / (len(z) - 1)


def _embed_by_tsne(codes: Tensor, perplexity: float, seed: int) -> Tensor:
    from sklearn.manifold import TSNE

    check_range("latent_map", perplexity=perplexity)
    if perplexity >= len(codes):
        need = f"t-SNE at perplexity {perplexity:g} needs more than {perplexity:g} rows, and here are {len(codes)}"
        raise UserError(f"{need}; give more rows (or in Python a smaller perplexity)")
    places = TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(codes.double().numpy())
    return torch.as_tensor(places).float()
