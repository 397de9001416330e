"""Latent maps: the codes of rows on a plane, and what every place of the plane decodes to."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pvae.errors import UserError, check_range, nearest
from pvae.inference.batching import RowBatch, Values, as_rows, map_batches
from pvae.inference.families import Family
from pvae.inference.guides import Guide
from pvae.inference.posterior import common_draws, likelihood_at, posterior_moments
from pvae.runtime.pyro_params import Program, local_param_store
from pvae.runtime.torch_state import no_validation, seeded
from pvae.samplers.log_joint import LogJoint

PROJECTIONS = ("auto", "plane", "pca", "tsne")
# Values that a grid of decoded rows may hold, so that a page with it stays below 2 MB.
VALUES = 1_400_000
# Half a slider's range in standard deviations of the codes; share of the prior left outside a grid on each side.
REACH, TAIL = 2.5, 0.01
# Draws of the prior.
PRIOR = 500

Progress = Callable[[int], None]


def _silent(rows: int) -> None:
    """No progress is shown."""


@dataclass(frozen=True)
class LatentMap:
    """Codes of B rows on a plane, in the units of u, the real vector behind the latents, but by t-SNE.

    Attributes:
        how: ``plane``, the latents themselves; ``pca``, the plane along the codes' principal directions; or ``tsne``.
        codes: where the means of q(z|x) lie, [B, 2].
        spread: covariances of q(z|x) in the plane, [B, 2, 2]; none by t-SNE.
        prior: draws from the prior, [S, 2]; none by t-SNE.
        share: of the codes' variance along each axis, [2]; none by t-SNE.
        across, up: where the grid's columns and rows lie, [G] each; empty by t-SNE, which has no way back.
        grid: means of p(x|z) there, ``grid[i, j]`` at (across[j], up[i]), [G, G, C].
    """

    how: str
    codes: Tensor
    spread: Tensor | None
    prior: Tensor | None
    share: Tensor | None
    across: Tensor
    up: Tensor
    grid: Tensor


@dataclass(frozen=True)
class Sliders:
    """What the latents decode to along the codes' principal directions, all combinations of G positions.

    Attributes:
        positions: in standard deviations of the codes from their mean, [G]; the middle one is 0.
        scale: standard deviation of the codes along each direction, [d].
        share: of the codes' variance along each, [d].
        grid: means of p(x|z), [G, ..., G, C] with one axis for each direction.
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
    progress: Progress = _silent,
) -> LatentMap:
    """Lay the codes of rows on a plane and decode a grid of it.

    Arguments:
        model, guide: a fitted program and its guide.
        x, index: rows [B, C], and which training datapoints they are; None for new ones. What a program is given beside
            its latents, such as a label's columns, the grid takes from the first row.
        projection: ``plane`` for two latent dimensions; ``pca`` or ``tsne`` for more; ``auto`` is plane or pca.
        size: G, columns and rows of the grid, at least 2; fewer where rows are so wide that a page could not hold it.
        perplexity: of t-SNE, about the number of neighbours that each code shall keep.
        seed: of all noise.
        progress: called with the number of rows done, those of the grid included.

    Raises:
        UserError: an unknown projection, one that does not go with the number of dimensions or rows, or a grid of
            fewer than 2 points.

    Source of t-SNE: van der Maaten and Hinton (2008), *Visualizing Data using t-SNE*, JMLR 9.
    """
    rows, D = as_rows(x, model), guide.sites.dim
    how = _projection(projection, D)
    if size < 2:
        raise UserError(f"latent_map: size is {size}, but a grid needs at least 2 columns")
    q_params, codes = _codes(model, guide, rows, index, seed, progress)
    if how == "tsne":
        empty = torch.zeros(0)
        return LatentMap(how, _neighbours(codes, perplexity, seed), None, None, None, empty, empty, empty)
    centre, ways, share = _directions(codes, 2) if how == "pca" else (torch.zeros(D), torch.eye(2), _variance(codes))
    places, prior = (codes - centre) @ ways, (_prior(model, guide, rows, seed) - centre) @ ways
    across, up = _extent(places, prior, min(size, math.isqrt(VALUES // rows.shape[1])))
    points = torch.cartesian_prod(up, across).flip(1) @ ways.T + centre
    grid = _decoded(model, guide, points, rows[:1], progress)
    spread = _spread(model, guide, q_params, ways, seed)
    return LatentMap(how, places, spread, prior, share, across, up, grid.unflatten(0, (len(up), len(across))))


def make_sliders(
    model: Program,
    guide: Guide,
    x: Values,
    index: Tensor | None = None,
    *,
    positions: int = 9,
    directions: int = 3,
    seed: int = 0,
    progress: Progress = _silent,
) -> Sliders:
    """Decode the codes' mean and what lies up to 2.5 standard deviations from it along their principal directions.

    Arguments:
        model, guide, x, index: as for `map_latents`.
        positions: G, an odd number, of each slider; where all combinations are too many for a page, first fewer
            positions are taken, down to 5, then fewer directions.
        directions: d, the most sliders; no more than latent dimensions.
        seed: of all noise.
        progress: called with the number of rows done, those of the grid included.

    Raises:
        UserError: an even number of positions, no direction, or fewer than 2 rows.
    """
    check_range("sliders", directions=directions)
    if positions < 3 or positions % 2 == 0:
        raise UserError(f"sliders: positions is {positions}, but it must be an odd number from 3 on")
    rows = as_rows(x, model)
    _, codes = _codes(model, guide, rows, index, seed, progress)
    positions, count = _affordable(rows.shape[1], positions, min(directions, codes.shape[1]))
    centre, ways, share = _directions(codes, count)
    scale = ((codes - centre) @ ways).std(0)
    at = torch.linspace(-REACH, REACH, positions)
    steps = torch.cartesian_prod(*[at] * count).view(-1, count)
    grid = _decoded(model, guide, centre + (steps * scale) @ ways.T, rows[:1], progress)
    return Sliders(at, scale, share, grid.unflatten(0, (positions,) * count))


def _projection(word: str, D: int) -> str:
    """The projection that a word stands for with D latent dimensions."""
    if word not in PROJECTIONS:
        raise UserError(f"unknown projection '{word}'{nearest(word, PROJECTIONS)}")
    if D == 1:
        raise UserError("the latents have 1 dimension, a line and no plane: sliders or interpolate show it")
    if word == "plane" and D != 2:
        raise UserError(f"projection 'plane' is for 2 latent dimensions, and here are {D}: take 'pca' or 'tsne'")
    return {"auto": "plane" if D == 2 else "pca"}.get(word, word)


def _affordable(columns: int, positions: int, directions: int) -> tuple[int, int]:
    """Positions and directions whose grid a page can hold: at least one direction, if need be of 3 positions."""
    for count in range(directions, 0, -1):
        for places in range(positions, min(positions, 5) - 1, -2):
            if places**count * columns <= VALUES:
                return places, count
    return 3, 1


def _codes(
    model: Program, guide: Guide, rows: Tensor, index: Tensor | None, seed: int, progress: Progress
) -> tuple[Tensor, Tensor]:
    """q_params [B, P] and the means of q(z|x), [B, D]."""

    def compute(part: RowBatch) -> dict[str, Tensor]:
        q_params = guide.params(part.x, part.index).detach()
        return {"q_params": q_params, "mean": posterior_moments(guide.family, q_params)[0]}

    found = map_batches(model, guide, compute, rows, index, seed=seed, progress=progress)
    return found["q_params"], found["mean"].float()


def _directions(codes: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The codes' mean [D], their first principal directions as columns [D, count], and the variance's share of each.

    A direction's largest entry is positive.
    """
    if len(codes) <= count:
        raise UserError(f"{len(codes)} rows have no {count} principal directions; give at least {count + 1}")
    centre = codes.mean(0)
    _, values, ways = torch.linalg.svd((codes - centre).double(), full_matrices=False)
    ways = ways[:count].T
    ways = ways * ways.gather(0, ways.abs().argmax(0, keepdim=True)).sign()
    share = values.square() / values.square().sum().clamp(min=torch.finfo(values.dtype).tiny)
    return centre, ways.float(), share[:count].float()


def _variance(codes: Tensor) -> Tensor:
    """The share of the codes' variance along each axis; nothing is known of one row's."""
    variance = codes.var(0, unbiased=False)
    return variance / variance.sum().clamp(min=torch.finfo(variance.dtype).tiny)


def _prior(model: Program, guide: Guide, rows: Tensor, seed: int) -> Tensor:
    """Draws of u from the prior, [S, D]."""
    like = rows[torch.arange(PRIOR) % len(rows)]
    which = torch.zeros(PRIOR, dtype=torch.long, device=rows.device)
    with torch.no_grad(), no_validation(), local_param_store(), seeded(seed):
        return LogJoint(model, like, which, guide.sites).prior(1)[0].cpu().float()


def _extent(codes: Tensor, prior: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Grid lines [size] each way that cover all codes, with a margin, and the prior but for its tails."""
    low = torch.minimum(codes.amin(0), prior.quantile(TAIL, 0))
    high = torch.maximum(codes.amax(0), prior.quantile(1 - TAIL, 0))
    margin = 0.03 * (high - low)
    across, up = (torch.linspace(a, b, max(size, 2)) for a, b in zip(low - margin, high + margin, strict=True))
    return across, up


def _decoded(model: Program, guide: Guide, points: Tensor, beside: Tensor, progress: Progress) -> Tensor:
    """Means of p(x|z) at points z [S, D] with what one row gives beside the latents, [S, C]."""

    def compute(part: RowBatch) -> dict[str, Tensor]:
        given = beside.expand(len(part.x), *beside.shape[1:])
        return {"x": likelihood_at(model, guide.sites, part.x, given).mean.flatten(1)}

    return map_batches(model, guide, compute, points, progress=progress)["x"]


def _spread(model: Program, guide: Guide, q_params: Tensor, ways: Tensor, seed: int) -> Tensor:
    """Covariances of q in the plane, [B, 2, 2]."""

    def compute(part: RowBatch) -> dict[str, Tensor]:
        return {"spread": _covariance(guide.family, part.x, ways.to(part.x))}

    return map_batches(model, guide, compute, q_params, seed=seed)["spread"]


def _covariance(family: Family, q_params: Tensor, ways: Tensor) -> Tensor:
    """W'VW of the covariances V of q(z; q_params) and directions W [D, d], by draws where q does not state them."""
    q = family(q_params)
    if isinstance(q, torch.distributions.MultivariateNormal | torch.distributions.LowRankMultivariateNormal):
        return ways.T @ q.covariance_matrix @ ways
    if isinstance(q, torch.distributions.Independent):
        return ways.T @ (q.variance.unsqueeze(-1) * ways)
    z = common_draws(family, q_params) @ ways
    z = z - z.mean(0)
    return torch.einsum("sbi,sbj->bij", z, z) / (len(z) - 1)


def _neighbours(codes: Tensor, perplexity: float, seed: int) -> Tensor:
    """The codes laid out by t-SNE, [B, 2]."""
    from sklearn.manifold import TSNE

    check_range("latent_map", perplexity=perplexity)
    if perplexity >= len(codes):
        raise UserError(
            f"t-SNE at perplexity {perplexity:g} needs more than {perplexity:g} rows, and here are {len(codes)}; give "
            "more rows (or in Python a smaller perplexity)"
        )
    made = TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(codes.double().numpy())
    return torch.as_tensor(made).float()
