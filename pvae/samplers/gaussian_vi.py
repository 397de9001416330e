"""The best correlated normal of each row, from how the log-density's gradient changes across it."""

from __future__ import annotations

import torch
from torch import Tensor

from pvae.inference.importance import ROWS_PER_PASS
from pvae.runtime.torch_state import halve_on_oom, seeded
from pvae.samplers.hmc import Density, init

# Least precision, in units of that of the normal at hand, to which a round may go: its scales grow tenfold at most.
MIN_DRAWS = 0.01
# The smallest scale over the largest below which a covariance is no longer a matrix to factorize.
MIN_SCALE = 1e-5


@torch.no_grad()
def fit_gaussian(
    density: Density, mean: Tensor, log_scale: Tensor, *, rounds: int = 10, sets: int = 2, seed: int = 0
) -> tuple[Tensor, Tensor]:
    r"""Mean [B, D] and covariance [B, D, D] of the normal q nearest to a density, in KL(q, p), by fixed-point rounds.

    .. math:: \Sigma^{-1} \leftarrow -E_q[\nabla^2 \log p(u)], \quad
              \mu \leftarrow \mu + \Sigma \, E_q[\nabla \log p(u)]

    The expected second derivative is the slope of the gradient's linear regression on the draws, which is exact where
    log p is quadratic and holds where the gradient jumps. Draws are orthogonal in sets of D, and come in pairs
    :math:`\mu \pm L \epsilon`. From the third round on steps become smaller, which averages the rounds' estimates.

    Arguments:
        density: u [C, B, D] to log p [C, B], with gradients.
        mean, log_scale: of the independent normals to start from, best the nearest ones, [B, D].
        rounds: the number of rounds; each takes 2 D ``sets`` gradients of every row.
        sets: of D orthogonal directions. At least 64 pairs are drawn.
        seed: of the draws; the random stream outside is left alone.

    Where log p is not quadratic, n pairs give a precision that is off by a share of the order of 1 / n, by 1 / n for a
    Laplace density. Both are in double precision. A row whose gradients are not finite stays where it is; one that
    shrinks to nothing in some direction is given back as it came.

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
    first = mean, root = mean.double(), log_scale.double().exp().diag_embed()
    with seeded(seed):
        for number in range(rounds):
            noise = _noise(mean, sets)
            height, slope = _regressed(density, mean, root, noise, log_scale.dtype)
            weight = min(1.0, 2 / max(number, 1))  # an average of all rounds, the later ones counting more
            values, vectors = torch.linalg.eigh(-(slope + slope.mT) / 2)
            scales = torch.lerp(torch.ones_like(values), values, weight).clamp(min=MIN_DRAWS).rsqrt().unsqueeze(-2)
            root = root @ (vectors * scales)
            # In the new root's units the gradient is (V s)^T height, and Sigma is the identity.
            move = ((vectors * scales).mT @ height.unsqueeze(-1)).squeeze(-1)
            mean = mean + weight * (root @ move.unsqueeze(-1)).squeeze(-1)
    scales = torch.linalg.svdvals(root)
    fine = scales[:, -1] > MIN_SCALE * scales[:, 0]
    mean, root = mean.where(fine[:, None], first[0]), root.where(fine[:, None, None], first[1])
    return mean, root @ root.mT


def _noise(like: Tensor, sets: int) -> Tensor:
    """Standard normal draws [2 S D, D] in pairs of either sign, orthogonal in sets of D."""
    dim = like.shape[-1]
    sets = max(sets, -(-64 // dim))
    directions, _ = torch.linalg.qr(torch.randn(sets, dim, dim, dtype=like.dtype, device=like.device))
    lengths = torch.randn(sets, dim, dim, dtype=like.dtype, device=like.device).norm(dim=-1, keepdim=True)
    noise = (directions.mT * lengths).flatten(0, 1)
    return torch.stack([noise, -noise], 1).flatten(0, 1)


def _regressed(
    density: Density, mean: Tensor, root: Tensor, noise: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Mean [B, D] and slope [B, D, D] of the gradient in the noise of mean + root noise; 0 and -I where not finite."""
    inverse = torch.linalg.pinv(noise)

    def part(draws: slice) -> tuple[Tensor, Tensor]:
        u = mean + torch.einsum("bde,ke->kbd", root, noise[draws])
        gradient = torch.einsum("bde,kbd->kbe", root, init(density, u.to(dtype)).gradient.double())
        return gradient.sum(0) / len(noise), torch.einsum("dk,kbe->bde", inverse[:, draws], gradient)

    height, slope = torch.zeros_like(mean), torch.zeros_like(root)
    for one, other in halve_on_oom(part, len(noise), max(1, ROWS_PER_PASS // len(mean)), "draws for each row"):
        height, slope = height + one, slope + other
    fine = (slope.isfinite().all(-1) & height.isfinite()).all(-1)
    eye = torch.eye(mean.shape[-1], dtype=slope.dtype, device=slope.device)
    return height.where(fine[:, None], 0), slope.where(fine[:, None, None], -eye)
