"""The truth of a kind and a guide: exact errors of each use, and whether they are within the limits of trust."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pvae.inference.families import DiagonalNormal, FullRankNormal
from pvae.inference.guides import Guide
from pvae.runtime.torch_state import seeded

from .blocks import Normals
from .guides import ExactFamily, make_guide, unpack
from .kinds import Kind

USES = ("posterior", "proposal", "bound", "model")
# By figure: the limits between which the use is trustworthy.
LIMITS = {
    "posterior": {
        "mean_error": (0.0, 0.5),
        "sd_ratio": (0.7, 1.4),
        "coverage_90": (0.8, 0.97),
        "sbc_distance": (0.0, 0.1),
    },
    "bound": {"inference_gap": (-math.inf, 1.0)},
    "proposal": {"weights_fail": (0.0, 0.1)},
    "model": {"misspecified": (0.0, 0.5)},
}
FAILS = 0.25  # posterior sds of a row's weighted means, log sds, and nats of its evidence
PROPOSALS = {"rows": 100, "K": 1000, "repeats": 10}


@dataclass(frozen=True)
class Truth:
    """Exact figures of a guide over the population of rows, whether each use is within limits, and by what margin.

    Attributes:
        figures: mean_error (RMS, posterior sds), sd_ratio (geometric mean), coverage_90 (posterior mass in q's central
            90% intervals), sbc_distance (largest KS distance of true latents' ranks from uniform), inference_gap
            (nats), weights_fail (share of rows in which 1000 weighted draws miss by a quarter), misspecified (0 or 1).
    """

    figures: dict[str, float]
    trustworthy: dict[str, bool] = field(init=False)
    margins: dict[str, float] = field(init=False)

    def __post_init__(self) -> None:
        inside = {
            use: all(self._margin(name, *limits) >= 0 for name, limits in of.items()) for use, of in LIMITS.items()
        }
        margins = {use: min(self._margin(name, *limits) for name, limits in of.items()) for use, of in LIMITS.items()}
        object.__setattr__(self, "trustworthy", inside)
        object.__setattr__(self, "margins", margins)

    def _margin(self, name: str, low: float, high: float) -> float:
        """Return how far a figure is inside its limits as a share of the limit; negative outside."""
        value = self.figures[name]
        value = math.inf if math.isnan(value) else value
        below = (value - low) / low if low > 0 and math.isfinite(low) else math.inf
        return min((high - value) / high, below)


@torch.no_grad()
def truth(kind: Kind, guide: Guide, *, rows: int = 2000, seed: int = 12345) -> Truth:
    """Compute the truth of a guide; Monte Carlo noise of shares and distances is about half over the root of rows."""
    with seeded(seed):
        x = kind.rows(rows, seed)
        mean, sd = kind.moments(x)
        q_mean, q_sd = _moments(guide, x)
        inside = (_ranks(guide, kind.sample(x, 1)[0], x) - 0.5).abs() < 0.45
        u, simulated = kind.simulate(rows, seed + 1)
        figures = {
            "mean_error": ((q_mean - mean) / sd).square().mean().sqrt(),
            "sd_ratio": (q_sd / sd).log().mean().exp(),
            "coverage_90": inside.double().mean(),
            "sbc_distance": _distance(_ranks(guide, u.double(), simulated)),
            "inference_gap": _gap(kind, guide, x),
            "weights_fail": _weights_fail(kind, guide, x[: PROPOSALS["rows"]]),
            "misspecified": torch.tensor(float(kind.distort is not None)),
        }
    return Truth({name: value.item() for name, value in figures.items()})


def refined_truth(kind: Kind, guide: Guide, **options: int) -> Truth:
    """Compute the truth of the best member of the guide's family."""
    names = {DiagonalNormal: "best diagonal", FullRankNormal: "best full-rank", ExactFamily: "exact"}
    return truth(kind, make_guide(kind, names[type(guide.family)]), **options)


def _normals(guide: Guide, x: Tensor) -> Normals | None:
    return None if isinstance(guide.family, ExactFamily) else unpack(guide.family, guide.params(x))


def _exact(guide: Guide) -> Kind:
    assert isinstance(guide.family, ExactFamily)
    return guide.family.kind


def _moments(guide: Guide, x: Tensor) -> tuple[Tensor, Tensor]:
    q = _normals(guide, x)
    return (q.mean, q.sd) if q else _exact(guide).moments(x)


def _ranks(guide: Guide, u: Tensor, x: Tensor, draws: int = 300) -> Tensor:
    """Return ranks of u [B, D] in q's marginals: by its distribution function if q is Gaussian, else by draws."""
    q = _normals(guide, x)
    if q:
        return torch.special.ndtr((u - q.mean) / q.sd)
    below = (_exact(guide).sample(x, draws) < u).double().sum(0)
    return (below + torch.rand_like(below)) / (draws + 1)


def _distance(ranks: Tensor) -> Tensor:
    ordered, N = ranks.sort(0).values, len(ranks)
    steps = torch.arange(N + 1, dtype=torch.double).unsqueeze(-1) / N
    return torch.maximum(steps[1:] - ordered, ordered - steps[:-1]).amax()


def _gap(kind: Kind, guide: Guide, x: Tensor) -> Tensor:
    q = _normals(guide, x)
    return (kind.evidence(x) - kind.elbo(q, x)).mean() if q else torch.zeros(())


def _weights_fail(kind: Kind, guide: Guide, x: Tensor) -> Tensor:
    """Return the share of rows whose means, log sds or evidence by self-normalized weights miss by a quarter (RMS)."""
    evidence, (mean, sd) = kind.evidence(x), kind.moments(x)
    q, squares = _normals(guide, x), []
    for _ in range(PROPOSALS["repeats"]):
        u = _draw(kind, q, x, PROPOSALS["K"])
        log_q = kind.log_joint(u, x) - evidence if q is None else _log_prob(q, u)
        log_w = kind.log_joint(u, x) - log_q
        weights = log_w.softmax(0).unsqueeze(-1)
        weighted = (weights * u).sum(0)
        log_ratio = (weights * (u - weighted).square()).sum(0).sqrt().log() - sd.log()
        off = log_w.logsumexp(0) - math.log(PROPOSALS["K"]) - evidence
        squares.append(
            torch.stack([((weighted - mean) / sd).square().mean(-1), log_ratio.square().mean(-1), off.square()])
        )
    errors = torch.stack(squares).mean(0).sqrt()
    return (~(errors <= FAILS)).any(0).double().mean()


def _draw(kind: Kind, q: Normals | None, x: Tensor, S: int) -> Tensor:
    if q is None:
        return kind.sample(x, S)
    noise = torch.randn(S, *q.mean.shape, dtype=torch.double)
    return q.mean + torch.einsum("bij,sbj->sbi", q.root, noise)


def _log_prob(q: Normals, u: Tensor) -> Tensor:
    e = torch.linalg.solve_triangular(q.root, (u - q.mean).permute(1, 2, 0), upper=False).permute(2, 0, 1)
    log_diagonal = q.root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return -e.square().sum(-1) / 2 - q.mean.shape[-1] / 2 * math.log(2 * math.pi) - log_diagonal
