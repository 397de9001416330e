"""The kinds of posteriors: each a small Pyro program with random instances, assembled from independent blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pvae.inference.latents import find_latent_sites
from pvae.samplers import simulate_joint

from .blocks import Hard, Likelihood, Linear, Normals, gaussian

Block = Hard | Linear
CACHED = 64  # batches of rows whose best Gaussians are remembered


class Kind(nn.Module):
    """Pyro program of independent blocks of latents and columns, whose posterior is the product of theirs.

    Arguments:
        name: of the kind.
        blocks: of latents and columns, in this order.
        likelihood: of a column given its location and scale.
        distort: maps rows drawn from the model to the data's, which then do not come from the model.

    Rows x [B, M] and latents u [..., B, D] are float64 in closed forms, unconstrained, and in the order of the sites.
    """

    def __init__(
        self,
        name: str,
        blocks: list[Block],
        likelihood: Likelihood = gaussian,
        distort: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.name, self.blocks, self.likelihood, self.distort = name, blocks, likelihood, distort
        self.dim, self.columns = sum(b.dim for b in blocks), sum(b.columns for b in blocks)
        scales = [[b.scale] * b.columns if isinstance(b, Linear) else b.scales for b in blocks]
        self.scales = torch.tensor([scale for block in scales for scale in block]).double()
        self.multimodal = any(b.split is not None for b in blocks)
        self.sites = find_latent_sites(self.model, torch.ones(3, self.columns))
        self._cache: dict[tuple[bool, bytes], Normals] = {}

    def model(self, x: Tensor, index: Tensor | None = None) -> None:
        """Draw z and x of every row."""
        with pyro.plate("data", len(x), dim=-1):
            places = torch.cat([block.program(f"z{i}") for i, block in enumerate(self.blocks)], -1)
            pyro.sample("x", self.likelihood(places, self.scales.to(places.dtype)).to_event(1), obs=x)

    def simulate(self, N: int, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Draw u [N, D] and rows [N, M] from the model."""
        u, x = simulate_joint(self.model, torch.zeros(N, self.columns), self.sites, seed=seed)
        return u, x

    def rows(self, N: int, seed: int = 0) -> Tensor:
        """Draw rows of data [N, M]: from the model, unless it is misspecified."""
        x = self.simulate(N, seed)[1]
        return self.distort(x) if self.distort else x

    def _parts(self, x: Tensor) -> list[tuple[Block, Tensor]]:
        columns = x.double().split([block.columns for block in self.blocks], -1)
        return list(zip(self.blocks, columns, strict=True))

    def _joined(self, mean: list[Tensor], matrix: list[Tensor]) -> tuple[Tensor, Tensor]:
        whole = mean[0].new_zeros(len(mean[0]), self.dim, self.dim)
        start = 0
        for part in matrix:
            stop = start + part.shape[-1]
            whole[:, start:stop, start:stop] = part
            start = stop
        return torch.cat(mean, -1), whole

    def log_joint(self, u: Tensor, x: Tensor) -> Tensor:
        """log p(x, u), [..., B] nats, at u [..., B, D]."""
        parts = u.double().split([block.dim for block in self.blocks], -1)
        return sum((b.log_joint(v, c) for v, (b, c) in zip(parts, self._parts(x), strict=True)), torch.zeros(()))

    def evidence(self, x: Tensor) -> Tensor:
        """log p(x), [B] nats."""
        return sum((block.evidence(c) for block, c in self._parts(x)), torch.zeros(()))

    def covariance(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Posterior mean [B, D] and covariance [B, D, D]."""
        return self._joined(*map(list, zip(*(block.moments(c) for block, c in self._parts(x)), strict=True)))

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Posterior means and standard deviations, [B, D] each."""
        mean, covariance = self.covariance(x)
        return mean, covariance.diagonal(dim1=-2, dim2=-1).sqrt()

    def sample(self, x: Tensor, S: int) -> Tensor:
        """Exact posterior draws [S, B, D], by the random stream outside."""
        return torch.cat([block.sample(c, S) for block, c in self._parts(x)], -1)

    def elbo(self, q: Normals, x: Tensor) -> Tensor:
        """ELBO of Gaussians, [B] nats."""
        value, start, covariance = q.entropy, 0, q.covariance
        for block, c in self._parts(x):
            own = slice(start, start + block.dim)
            value = value + block.expected(q.mean[:, own], covariance[:, own, own], c)
            start += block.dim
        return value

    def best(self, diagonal: bool, x: Tensor) -> Normals:
        """Gaussians, diagonal or of full rank, of the largest ELBO; those of independent blocks are independent."""
        key = (diagonal, x.double().numpy().tobytes())
        if key not in self._cache:
            if len(self._cache) >= CACHED:
                self._cache.clear()
            with torch.no_grad():
                pairs = [block.best(diagonal, c) for block, c in self._parts(x)]
            self._cache[key] = Normals(*self._joined(*map(list, zip(*pairs, strict=True))))
        return self._cache[key]

    def one_mode(self, x: Tensor) -> Normals:
        """Gaussians of the moments of each block's largest mode."""
        mean, covariance = self._joined(*map(list, zip(*(block.side(c) for block, c in self._parts(x)), strict=True)))
        return Normals(mean, torch.linalg.cholesky(covariance))


def normal(mean: float = 0.0, sd: float = 1.0) -> Any:
    return dist.Normal(mean, sd, validate_args=False)


def column(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Return the location of a single column, [..., 1]."""
    return lambda t: f(t).unsqueeze(-1)


def mixture(means: list[float], sd: float, weights: list[float]) -> Any:
    parts = dist.Normal(torch.tensor(means).double(), torch.tensor(sd).double(), validate_args=False)
    return SmallMixture(dist.Categorical(torch.tensor(weights).double()), parts, validate_args=False)


class SmallMixture(dist.MixtureSameFamily):
    """Mixture that draws in the default type, for parameters in float64."""

    support = dist.constraints.real

    def sample(self, sample_shape: Any = ()) -> Tensor:
        return super().sample(sample_shape).to(torch.get_default_dtype())

    def log_prob(self, value: Tensor) -> Tensor:
        return super().log_prob(value).to(value.dtype)


def linear(random: torch.Generator, dim: int, condition: float, lowest: float = 2.0, columns: int = 0) -> Linear:
    """Return a block whose posterior has precisions from lowest to lowest times condition in random directions."""
    columns, scale = columns or dim, 0.5
    left, _ = torch.linalg.qr(torch.randn(columns, dim, generator=random, dtype=torch.double))
    right, _ = torch.linalg.qr(torch.randn(dim, dim, generator=random, dtype=torch.double))
    precision = lowest * condition ** torch.linspace(0, 1, dim, dtype=torch.double)
    return Linear(left * (scale * (precision - 1).sqrt()) @ right, scale)


def _linear(dim: int) -> Callable[..., Kind]:
    def make(name: str, seed: int, random: torch.Generator) -> Kind:
        return Kind(name, [linear(random, dim, 10.0 ** (seed % 5))])

    return make


def _beside(hard: Callable[[Callable[[float, float], float]], Hard]) -> Callable[..., Kind]:
    """Return the maker of kinds of a hard block beside two well-behaved latents."""

    def make(name: str, seed: int, random: torch.Generator) -> Kind:
        return Kind(name, [hard(_uniform(random)), linear(random, 2, 3.0)])

    return make


def _uniform(random: torch.Generator) -> Callable[[float, float], float]:
    return lambda low, high: low + (high - low) * torch.rand((), generator=random).item()


def _second(weight: float) -> Callable[..., Kind]:
    """Return the maker of two modes: t and -t explain a row alike, and the prior gives one side this weight."""

    def hard(between: Callable[[float, float], float]) -> Hard:
        prior = mixture([-3.0, 3.0], 0.5, [1 - weight, weight])
        return Hard(prior, locate=column(lambda t: t**2 / 6), scale=between(0.3, 0.7), split=0.0)

    return _beside(hard)


def _several(count: int, block: Callable[[Callable[[float, float], float]], Hard]) -> Callable[..., Kind]:
    """Return the maker of kinds of several independent hard blocks with a likelihood of their own."""

    def make(name: str, seed: int, random: torch.Generator) -> Kind:
        blocks: list[Block] = [block(_uniform(random)) for _ in range(count)]
        assert isinstance(blocks[0], Hard)
        return Kind(name, blocks, blocks[0].likelihood)

    return make


def poisson(rate: Tensor, scale: Any) -> Any:
    return dist.Poisson(rate, validate_args=False)


def poisson_log(log_rate: Tensor, scale: Any) -> Any:
    return dist.Poisson(log_rate.exp(), validate_args=False)


def bernoulli(probability: Tensor, scale: Any) -> Any:
    return dist.Bernoulli(probability, validate_args=False)


def student(location: Tensor, scale: Any) -> Any:
    return dist.StudentT(3.0, location, scale, validate_args=False)


def _absolute(t: Tensor) -> Tensor:
    """|t| with its kink softened within 0.05, where quadrature would be exact to 1e-5 only."""
    return (t**2 + 0.0025).sqrt()


def _ridge(name: str, seed: int, random: torch.Generator) -> Kind:
    scale = [0.03, 0.1, 0.3][seed % 3]
    return Kind(name, [Linear(torch.ones(1, 2).double(), scale)])


def _collapse(name: str, seed: int, random: torch.Generator) -> Kind:
    blind = Linear(torch.zeros(1, 2).double(), 1.0)
    return Kind(name, [linear(random, 2, 10.0), blind])


def _well_behaved(name: str, seed: int, random: torch.Generator) -> Kind:
    return Kind(name, [linear(random, 3, 2.0, lowest=4.0, columns=8)])


def _misspecified(maker: Callable[..., Kind], distort: Callable[[Tensor], Tensor]) -> Callable[..., Kind]:
    def make(name: str, seed: int, random: torch.Generator) -> Kind:
        kind = maker(name, seed, random)
        kind.distort = distort
        return kind

    return make


def _counts(between: Callable[[float, float], float]) -> Hard:
    slope = torch.tensor([between(0.5, 1.5), between(0.5, 1.5), -between(0.5, 1.5)])
    return Hard(normal(), poisson_log, lambda t: 1.0 + t.unsqueeze(-1) * slope.to(t.dtype))


KINDS: dict[str, Callable[..., Kind]] = {
    "well-behaved": _well_behaved,
    **{f"linear, D = {dim}": _linear(dim) for dim in (2, 6, 12, 50)},
    "ridge": _ridge,
    "two equal modes": _second(0.5),
    **{f"second mode of {100 * weight:.0f}%": _second(weight) for weight in (0.2, 0.05, 0.01)},
    "banana": _beside(
        lambda between: Hard(normal(), spread=torch.ones_like, bend=_parabola(between(0.7, 1.5)), w_scale=0.3)
    ),
    "funnel": _beside(
        lambda between: Hard(normal(0.0, between(1.0, 1.5)), spread=lambda t: (t / 2).exp(), w_scale=0.3)
    ),
    "heavy tails": _several(
        2,
        lambda between: Hard(
            dist.StudentT(3.0, validate_args=False),
            student,
            column(lambda t: t),
            scale=between(0.7, 2.0),
            sinh=True,
            reach=7,
        ),
    ),
    "Gamma-Poisson": _several(
        3,
        lambda between: Hard(
            dist.Gamma(between(0.6, 2.0), between(0.3, 1.0), validate_args=False),
            poisson,
            column(lambda t: t),
            reach=60,
        ),
    ),
    "Beta-Bernoulli": _several(
        2,
        lambda between: Hard(
            dist.Beta(between(0.6, 2.0), between(0.6, 2.0), validate_args=False),
            bernoulli,
            lambda t: t.unsqueeze(-1).expand(*t.shape, 6),
            reach=60,
        ),
    ),
    "truncated": _beside(
        lambda between: Hard(
            dist.HalfNormal(between(0.7, 1.5), validate_args=False),
            locate=column(lambda t: t),
            scale=between(0.5, 1.0),
            reach=50,
        )
    ),
    "x = z^2": _beside(lambda between: Hard(normal(), locate=column(torch.square), scale=between(0.3, 0.6), split=0.0)),
    "x = |z|": _beside(
        lambda between: Hard(normal(), locate=column(_absolute), scale=between(0.2, 0.4), split=0.0, search_nodes=301)
    ),
    "label switching": _beside(
        lambda between: Hard(
            normal(),
            locate=column(torch.square),
            scale=between(0.3, 0.6),
            spread=torch.ones_like,
            w_scale=0.5,
            turned=True,
            split=0.0,
        )
    ),
    "collapse": _collapse,
    "mixture prior": _beside(
        lambda between: Hard(
            mixture([-2.0, 0.0, 2.0], 0.4, [0.3, 0.4, 0.3]), locate=column(lambda t: t), scale=between(0.4, 0.9)
        )
    ),
    "nearly deterministic": _beside(
        lambda between: Hard(
            normal(), locate=column(lambda t: t + 0.4 * (2 * t).sin()), scale=between(0.01, 0.03), reach=6
        )
    ),
    "counts": _several(2, _counts),
    "misspecified scale": _misspecified(_linear(6), lambda x: 2 * x),
    "misspecified shape": _misspecified(_well_behaved, lambda x: x + 0.5 * (x**2 - x.square().mean(0))),
}


def _parabola(bend: float) -> Callable[[Tensor], Tensor]:
    return lambda t: bend * (t**2 - 1)


def make_kind(name: str, seed: int = 0) -> Kind:
    """Return an instance of a kind."""
    return KINDS[name](name, seed, torch.Generator().manual_seed(seed + 7919 * (1 + list(KINDS).index(name))))
