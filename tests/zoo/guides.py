"""Guides of a kind that are right, or wrong in a known way; each gives q_params for any rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor, nn

import pvae
from pvae.inference.families import DiagonalNormal, Family, FullRankNormal
from pvae.inference.guides import Amortized, Guide
from pvae.runtime.torch_state import seeded

from .blocks import Normals
from .kinds import Kind

GUIDES = (
    "exact",
    "best diagonal",
    "best full-rank",
    "trained",
    "narrowed",
    "widened",
    "shifted widest",
    "shifted narrowest",
    "one mode",
    "exploding",
)
EXPLODES = 0.1  # share of rows whose encoder explodes


class ExactPosterior(dist.TorchDistribution):
    """The posterior of a kind given rows x [B, M] as a distribution over u [D]; draws have no gradient in x."""

    has_rsample = True
    arg_constraints: ClassVar[dict[str, Any]] = {}
    support = dist.constraints.real_vector

    def __init__(self, kind: Kind, x: Tensor) -> None:
        self.kind, self.x = kind, x
        super().__init__(x.shape[:-1], torch.Size([kind.dim]), validate_args=False)

    def expand(self, batch_shape: Sequence[int], _instance: object = None) -> ExactPosterior:
        return ExactPosterior(self.kind, self.x.expand(*batch_shape, -1))

    @torch.no_grad()
    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        rows = self.x.reshape(-1, self.x.shape[-1])
        batches = self.x.shape[:-2].numel()  # repeats of the same rows, such as a plate of draws
        B, S = len(rows) // batches, torch.Size(sample_shape).numel()
        u = self.kind.sample(rows[:B], S * batches)
        return u.view(*sample_shape, *self.x.shape[:-1], self.kind.dim).to(self.x.dtype)

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        return self.sample(sample_shape) + 0 * self.x.sum(-1, keepdim=True)

    def log_prob(self, value: Tensor) -> Tensor:
        x = self.x.reshape(-1, self.x.shape[-1])[-self.x.shape[-2] :].detach()
        log_p = self.kind.log_joint(value, x) - self.kind.evidence(x)
        return log_p.to(value.dtype)

    @property
    def mean(self) -> Tensor:
        return self._moments(0)

    @property
    def variance(self) -> Tensor:
        return self._moments(1) ** 2

    @property
    def stddev(self) -> Tensor:
        return self._moments(1)

    def _moments(self, which: int) -> Tensor:
        flat = self.kind.moments(self.x.detach().reshape(-1, self.x.shape[-1]))[which]
        return flat.view(*self.x.shape[:-1], -1).to(self.x.dtype)


class ExactFamily(Family):
    """Exact posteriors: the variational parameters of a row are the row itself."""

    kind: Kind

    def __init__(self, kind: Kind) -> None:
        super().__init__(kind.dim)
        # Not by plain assignment, which would make the model part of the guide.
        object.__setattr__(self, "kind", kind)
        self.num_params = kind.columns

    def forward(self, q_params: Tensor) -> ExactPosterior:
        return ExactPosterior(self.kind, q_params)


class Exact(Guide):
    """The exact posterior of any row."""

    def __init__(self, kind: Kind) -> None:
        super().__init__(ExactFamily(kind), kind.sites)

    def params(self, x: Tensor, index: Tensor | None = None) -> Tensor:
        return x


class Known(Guide):
    """Gaussians that are a given function of the rows."""

    def __init__(self, kind: Kind, family: Family, normals: Callable[[Tensor], Normals]) -> None:
        super().__init__(family, kind.sites)
        self.normals = normals

    @torch.no_grad()
    def params(self, x: Tensor, index: Tensor | None = None) -> Tensor:
        q = self.normals(x)
        return pack(self.family, q).to(x.dtype)


def pack(family: Family, q: Normals) -> Tensor:
    """Return q_params of Gaussians, diagonal or of full rank."""
    log_diagonal = q.root.diagonal(dim1=-2, dim2=-1).log()
    below = [q.root[:, family.below[0], family.below[1]]] if isinstance(family, FullRankNormal) else []
    return torch.cat([q.mean, log_diagonal, *below], -1)


def unpack(family: Family, q_params: Tensor) -> Normals:
    """Return the Gaussians [B, D] of q_params of a diagonal or full-rank normal, in float64."""
    q = family(q_params.detach().double())
    root = q.scale_tril if isinstance(family, FullRankNormal) else q.stddev.diag_embed()
    return Normals(q.mean, root)


def _shifted(kind: Kind, which: int) -> Callable[[Tensor], Normals]:
    """Return the best full-rank normal moved by 2 posterior sds along the widest (-1) or narrowest (0) direction."""

    def normals(x: Tensor) -> Normals:
        q = kind.best(False, x)
        variances, directions = torch.linalg.eigh(kind.covariance(x)[1])
        direction = directions[..., which]
        # The sign of an eigenvector is arbitrary.
        sign = direction.gather(-1, direction.abs().argmax(-1, keepdim=True)).sign()
        return Normals(q.mean + 2 * variances[:, which, None].sqrt() * sign * direction, q.root)

    return normals


def _scaled(kind: Kind, factor: float) -> Callable[[Tensor], Normals]:
    def normals(x: Tensor) -> Normals:
        q = kind.best(False, x)
        return Normals(q.mean, factor * q.root)

    return normals


def _explode(kind: Kind) -> Callable[[Tensor], Normals]:
    """Return the best diagonal normal, moved by 5 of its sds in the rows of the largest counts."""
    threshold = kind.simulate(2000, seed=99)[1].sum(-1).quantile(1 - EXPLODES)

    def normals(x: Tensor) -> Normals:
        q = kind.best(True, x)
        return Normals(q.mean + 5 * q.sd * (x.sum(-1, keepdim=True) > threshold), q.root)

    return normals


def _trained(kind: Kind, seed: int) -> Guide:
    family = DiagonalNormal(kind.dim)
    with seeded(seed):
        encoder = nn.Sequential(nn.Linear(kind.columns, 32), nn.Tanh(), nn.Linear(32, family.num_params))
    guide = Amortized(encoder, family, sites=kind.sites)
    pvae.fit(kind.model, guide, kind.rows(1024, seed=1000 + seed), epochs=40, learning_rate=5e-3, seed=seed)
    return guide.eval()


def applies(kind: Kind, name: str) -> bool:
    """Return whether a kind has such a guide."""
    return {"one mode": kind.multimodal, "exploding": kind.name == "counts"}.get(name, True)


def make_guide(kind: Kind, name: str, seed: int = 0) -> Guide:
    """Return a guide of a kind by its name in ``GUIDES``.

    The exact posterior; the best of a family; an encoder trained for 320 steps; the best full-rank normal with halved
    or doubled sds, or moved by two posterior sds along a direction; the moments of the largest mode alone.
    """
    if name == "exact":
        return Exact(kind).eval()
    if name == "trained":
        return _trained(kind, seed)
    diagonal = name in ("best diagonal", "exploding")
    family = DiagonalNormal(kind.dim) if diagonal else FullRankNormal(kind.dim)
    normals: dict[str, Callable[[], Callable[[Tensor], Normals]]] = {
        "best diagonal": lambda: lambda x: kind.best(True, x),
        "best full-rank": lambda: lambda x: kind.best(False, x),
        "narrowed": lambda: _scaled(kind, 0.5),
        "widened": lambda: _scaled(kind, 2.0),
        "shifted widest": lambda: _shifted(kind, -1),
        "shifted narrowest": lambda: _shifted(kind, 0),
        "one mode": lambda: kind.one_mode,
        "exploding": lambda: _explode(kind),
    }
    return Known(kind, family, normals[name]()).eval()
