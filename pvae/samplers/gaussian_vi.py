"""Gaussian variational approximation (full covariance) of each row's density, by fixed-point iteration."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from pvae.inference.importance import ROWS_PER_PASS
from pvae.runtime.torch_state import halve_on_oom, seeded
from pvae.samplers.hmc import Density, init

# Least precision after a round, in units of the precision before: scales grow tenfold at most.
MIN_PRECISION = 0.01
# Least curvature in the root's units by which a Newton step is divided, and the farthest such step.
MIN_CURVATURE, FARTHEST = 1e-5, 200.0
# Least ratio of the smallest scale to the largest: covariances below can't be factorized.
MIN_SCALE = 1e-5


@torch.no_grad()
def fit_gaussian(
    density: Density,
    mean: Tensor,
    log_scale: Tensor,
    *,
    diagonal: bool = False,
    rounds: int = 10,
    sets: int = 2,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    r"""Return mean [B, D] and covariance [B, D, D] of the normal q that minimizes KL(q || p), by fixed-point rounds.

    .. math:: \Sigma^{-1} \leftarrow -E_q[\nabla^2 \log p(u)], \quad
              \mu \leftarrow \mu + \Sigma \, E_q[\nabla \log p(u)]

    The expected Hessian is the slope of a linear regression of the gradient on the draws: exact for quadratic log p,
    and valid where the gradient jumps. Draws are orthogonal in sets of D, in antithetic pairs
    :math:`\mu \pm L \epsilon`. From the third round on the steps shrink, which averages the rounds' estimates.

    Arguments:
        density: u [C, B, D] to log p [C, B], with gradients.
        mean, log_scale: of the initial independent normals, best the mean-field optimum, [B, D].
        diagonal: fit independent normals: their precisions are the expected Hessian's diagonal, while the mean moves
            by all of it, so that directions in which the dimensions depend on each other take no more rounds.
        rounds: number of rounds; each takes 2 D ``sets`` gradients of every row.
        sets: sets of D orthogonal directions in a round; at least 64 pairs are drawn.
        seed: of the draws; the random stream outside is left alone.

    Results are in double precision. For other than quadratic log p, n pairs give a precision with a relative error of
    order 1 / n. A row with a gradient that is not finite stays as it is in that round; a row that collapses in some
    direction is returned as it came.

    Source: Opper, Archambeau (2009), *The Variational Gaussian Approximation Revisited*, Neural Computation 21;
    Salimans, Knowles (2013), *Fixed-Form Variational Posterior Approximation through Stochastic Linear Regression*,
    arXiv:1206.6679.

    >>> precision = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
    >>> log_p = lambda u: -(u @ precision * u).sum(-1) / 2
    >>> mean, covariance = fit_gaussian(log_p, torch.ones(1, 2), torch.zeros(1, 2), rounds=1)
    >>> torch.allclose(mean, torch.zeros(1, 2).double(), atol=1e-5)
    True
    >>> torch.allclose(covariance[0] @ precision.double(), torch.eye(2).double(), atol=1e-5)
    True
    """
    initial = mean, root = mean.double(), log_scale.double().exp().diag_embed()
    with seeded(seed):
        for number in range(rounds):
            noise = _orthogonal_noise(mean, sets)
            intercept, slope = _regress_gradient(density, mean, root, noise, log_scale.dtype)
            weight = min(1.0, 2 / max(number, 1))  # an average of all rounds, the later ones counting more
            if diagonal:
                step = weight * _newton_step(intercept, slope)
                mean = mean + (root @ step.unsqueeze(-1)).squeeze(-1)
                precision = -slope.diagonal(dim1=-2, dim2=-1)
                scales = torch.lerp(torch.ones_like(mean), precision, weight).clamp(min=MIN_PRECISION).rsqrt()
                root = root * scales.unsqueeze(-2)
                continue
            values, vectors = torch.linalg.eigh(-(slope + slope.mT) / 2)
            scales = torch.lerp(torch.ones_like(values), values, weight).clamp(min=MIN_PRECISION).rsqrt().unsqueeze(-2)
            root = root @ (vectors * scales)
            # In the new root's units the gradient is (V s)^T intercept, and Sigma is the identity.
            step = ((vectors * scales).mT @ intercept.unsqueeze(-1)).squeeze(-1)
            mean = mean + weight * (root @ step.unsqueeze(-1)).squeeze(-1)
    scales = torch.linalg.svdvals(root)
    regular = (scales[:, -1] > MIN_SCALE * scales[:, 0]) & mean.isfinite().all(-1)
    mean, root = mean.where(regular[:, None], initial[0]), root.where(regular[:, None, None], initial[1])
    return mean, root @ root.mT


@torch.no_grad()
def newton_decrement(
    density: Density, mean: Tensor, root: Tensor, *, diagonal: bool = False, sets: int = 4, seed: int = 0
) -> Tensor:
    r"""Estimate how far the ELBO of normals is below its maximum, by its gradient and curvature, [B] nats.

    .. math:: \frac12 g^T P^{-1} g + \frac14 \| I - P \|_F^2, \qquad g = R^T E_q[\nabla \log p], \quad
              P = -R^T E_q[\nabla^2 \log p] R

    Arguments:
        density: u [C, B, D] to log p [C, B], with gradients.
        mean, root: of q = N(mean, R R^T), [B, D] and [B, D, D].
        diagonal: only independent normals compete: P's diagonal alone enters the second term.
        sets, seed: as of `fit_gaussian`. The draws' noise makes the estimate larger.

    Source: Boyd, Vandenberghe (2004), *Convex Optimization*, section 9.5.
    """
    dtype, mean, root = mean.dtype, mean.double(), root.double()
    with seeded(seed):
        intercept, slope = _regress_gradient(density, mean, root, _orthogonal_noise(mean, sets), dtype)
    by_mean = (_newton_step(intercept, slope) * intercept).sum(-1) / 2
    excess = slope + torch.eye(slope.shape[-1], dtype=slope.dtype, device=slope.device)
    if diagonal:
        return by_mean + excess.diagonal(dim1=-2, dim2=-1).square().sum(-1) / 4
    return by_mean + ((excess + excess.mT) / 2).square().sum((-2, -1)) / 4


def _newton_step(intercept: Tensor, slope: Tensor) -> Tensor:
    """Return the step [B, D] uphill in the root's units, the curvature's sign ignored where it is not concave."""
    values, vectors = torch.linalg.eigh(-(slope + slope.mT) / 2)
    step = (vectors.mT @ intercept.unsqueeze(-1)).squeeze(-1) / values.abs().clamp(min=MIN_CURVATURE)
    return (vectors @ step.unsqueeze(-1)).squeeze(-1).clamp(-FARTHEST, FARTHEST)


def _orthogonal_noise(like: Tensor, sets: int) -> Tensor:
    """Draw standard normal noise [2 S D, D] in antithetic pairs, orthogonal in sets of D."""
    dim = like.shape[-1]
    normal = partial(torch.randn, max(sets, -(-64 // dim)), dim, dim, dtype=like.dtype, device=like.device)
    directions, lengths = torch.linalg.qr(normal()).Q, normal().norm(dim=-1, keepdim=True)
    noise = (directions.mT * lengths).flatten(0, 1)
    return torch.stack([noise, -noise], 1).flatten(0, 1)


def _regress_gradient(
    density: Density, mean: Tensor, root: Tensor, noise: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Regress the gradient at mean + root noise on the noise: intercept [B, D] and slope [B, D, D]; 0, -I if broken."""
    inverse = torch.linalg.pinv(noise)

    def regress(draws: slice) -> tuple[Tensor, Tensor]:
        u = mean + torch.einsum("bde,ke->kbd", root, noise[draws])
        gradient = torch.einsum("bde,kbd->kbe", root, init(density, u.to(dtype)).gradient.double())
        return gradient.sum(0) / len(noise), torch.einsum("dk,kbe->bde", inverse[:, draws], gradient)

    intercept, slope = torch.zeros_like(mean), torch.zeros_like(root)
    for terms in halve_on_oom(regress, len(noise), max(1, ROWS_PER_PASS // len(mean)), "draws for each row"):
        intercept, slope = intercept + terms[0], slope + terms[1]
    finite = (slope.isfinite().all(-1) & intercept.isfinite()).all(-1)
    eye = torch.eye(mean.shape[-1], dtype=slope.dtype, device=slope.device)
    return intercept.where(finite[:, None], 0), slope.where(finite[:, None, None], -eye)
