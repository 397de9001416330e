"""Maximization of a function for many rows at once, by BFGS."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def maximize(f: Callable[[Tensor], Tensor], start: Tensor, steps: int = 60) -> Tensor:
    """Maximize f, [N, P] to [N], for each row by BFGS with halved steps; parameters should be of order one."""

    def graded(p: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            p = p.detach().requires_grad_()
            values = f(p)
            (gradient,) = torch.autograd.grad(values.sum(), p)
        return values.detach().nan_to_num(nan=-torch.inf), gradient.nan_to_num()

    eye = torch.eye(start.shape[1], dtype=start.dtype).expand(len(start), -1, -1)
    p, inverse = start, 0.2 * eye
    value, gradient = graded(p)
    for _ in range(steps):
        move = (inverse @ gradient.unsqueeze(-1)).squeeze(-1)
        slope = (move * gradient).sum(-1)
        move = torch.where((slope > 0).unsqueeze(-1), move, 0.2 * gradient)
        move = move / move.norm(dim=-1, keepdim=True).clamp(min=1.0)
        size = _line(f, p, value, move, (move * gradient).sum(-1))
        p_next = p + size.unsqueeze(-1) * move
        value, g_next = graded(p_next)
        inverse = _bfgs(inverse, p_next - p, gradient - g_next, eye)
        p, gradient = p_next, g_next
        if gradient.abs().amax() < 1e-7:
            break
    return p


@torch.no_grad()
def _line(f: Callable[[Tensor], Tensor], p: Tensor, value: Tensor, move: Tensor, slope: Tensor) -> Tensor:
    """Halve each row's step until it rises enough; 0 if it never does."""
    size, done = torch.where(slope > 1e-10, 1.0, 0.0).to(value), slope <= 1e-10
    for _ in range(12):
        done = done | (f(p + size.unsqueeze(-1) * move) >= value + 1e-4 * size * slope - 1e-13 * value.abs())
        if done.all():
            break
        size = torch.where(done, size, size / 2)
    return torch.where(done, size, 0.0)


def _bfgs(inverse: Tensor, s: Tensor, y: Tensor, eye: Tensor) -> Tensor:
    """Update the inverse Hessians [N, P, P] where the curvature along the step is positive."""
    curvature = (s * y).sum(-1)[:, None, None]
    ok = curvature > 1e-14
    rho = torch.where(ok, 1 / curvature.where(ok, 1.0), 0.0)
    left = eye - rho * s.unsqueeze(-1) * y.unsqueeze(-2)
    return torch.where(ok, left @ inverse @ left.mT + rho * s.unsqueeze(-1) * s.unsqueeze(-2), inverse)
