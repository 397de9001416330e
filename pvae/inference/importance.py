"""The waist: the only place that scores traces. Everything that is evaluated is a function of its log-weights."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import kl_divergence

from pvae.errors import Incompatible, UserError
from pvae.runtime.pyro_params import Program
from pvae.runtime.torch_state import RandomState, halve_on_oom
from pvae.runtime.tracing import AutoTraced

Site = dict[str, Any]
Through = Callable[[Tensor, int], Tensor]

# Passes from which on it is worth while to record one.
MIN_CALLS_TO_TRACE = 100

# Datapoints times samples in one pass through the program: large enough for the matrix products to rule,
# small enough to stay near the cache.
ROWS_PER_PASS = 4096


@dataclass(frozen=True)
class LogWeights:
    """Log-densities in nats of K draws of the latents from the guide, for each of B datapoints.

    Attributes:
        log_lik: log p(x|z), [K, B].
        log_prior: log p(z), [K, B].
        log_q: log q(z|x), [K, B].
        latents: the draws by site, [K, B, ...], a site's plates inside "data" before B; empty unless asked for.
        scale: rows in the data for each row in the batch, where the program's plate "data" subsamples; else 1.
        point_mass: the guide's draws have no density of their own.
    """

    log_lik: Tensor
    log_prior: Tensor
    log_q: Tensor
    latents: dict[str, Tensor] = field(default_factory=dict)
    scale: float = 1.0
    point_mass: bool = False

    @property
    def log_w(self) -> Tensor:
        """log p(x, z) - log q(z|x), [K, B]."""
        return self.log_lik + self.log_prior - self.log_q


def log_weights(
    model: Program,
    guide: Program,
    x: Tensor,
    index: Tensor | None = None,
    K: int = 1,
    *,
    max_plate_nesting: int = 1,
    keep_latents: bool = False,
) -> LogWeights:
    r"""Draw z from the guide K times and score :math:`\log p(x|z), \log p(z), \log q(z|x)` for every datapoint.

    Arguments:
        model, guide: Pyro programs of one signature ``(x, index)``, all latents under the plate "data" at dim -1.
        x: data, [B, ...].
        index: which datapoints these are, [B]; None for data the guide has not seen.
        K: number of draws for each datapoint.
        max_plate_nesting: number of nested plates in the program, "data" included.
        keep_latents: return the draws as well; memory then grows with K.

    Returns:
        Log-densities without the scales of plates and ``poutine.scale``, masks kept. Draws are made in chunks, so
        that without gradients memory is what one chunk takes and three numbers for each draw.

    Raises:
        UserError: K below 1, or a program that is not of this form; the message names the site.
    """
    parts = [
        w
        for (w,) in iter_log_weights(
            model, [guide], x, index, K, max_plate_nesting=max_plate_nesting, keep_latents=keep_latents
        )
    ]
    if len(parts) == 1:
        return parts[0]
    log_lik, log_prior, log_q = (
        torch.cat(p) for p in zip(*((p.log_lik, p.log_prior, p.log_q) for p in parts), strict=True)
    )
    latents = {name: torch.cat([p.latents[name] for p in parts]) for name in parts[0].latents}
    return LogWeights(log_lik, log_prior, log_q, latents, parts[0].scale, parts[0].point_mass)


def iter_log_weights(
    model: Program,
    guides: Sequence[Program],
    x: Tensor,
    index: Tensor | None = None,
    K: int = 1,
    *,
    max_plate_nesting: int = 1,
    keep_latents: bool = False,
) -> Iterator[tuple[LogWeights, ...]]:
    """The K draws of `log_weights` chunk by chunk, in memory that K does not change.

    Arguments:
        guides: one or several; each sees the same random numbers, so that two of one family are compared without
            their noise. The next chunk goes on where the first guide's stream ended.

    Returns:
        The guides' log-weights [k, B] of one chunk after the other, k adding up to K. Where the device has no memory
        for a chunk it is halved, and so are those that follow.

    Raises:
        UserError: as `log_weights`.
        torch.OutOfMemoryError: not even one draw for each of these rows fits.
    """
    if K < 1:
        raise UserError(f"K is {K}, but at least 1 draw is needed")

    size = max(1, ROWS_PER_PASS // max(1, len(x)))
    options: dict[str, Any] = {"max_plate_nesting": max_plate_nesting, "keep_latents": keep_latents}
    sources: list[Callable[[int], LogWeights]]
    sources = [functools.partial(score_draws, model, guide, x, index, **options) for guide in guides]
    if size * MIN_CALLS_TO_TRACE <= K and not (keep_latents or torch.is_grad_enabled()):
        sources = [_Draws(each) for each in sources]

    def chunk(part: slice) -> tuple[LogWeights, ...]:
        before, found = RandomState(), list[LogWeights]()
        after = before
        for source in sources:
            before.restore()
            own = source(part.stop - part.start)
            after = after if found else RandomState()
            found.append(own)
        after.restore()
        return tuple(found)

    yield from halve_on_oom(chunk, K, size, "draws for each row")


class _Draws:
    """Chunks of a guide's draws for the same rows, recorded because there are many and they need no gradient."""

    def __init__(self, draw: Callable[[int], LogWeights]) -> None:
        self.draw = draw
        self.by_size: dict[int, AutoTraced] = {}

    def __call__(self, K: int) -> LogWeights:
        repeated = self.by_size.setdefault(K, AutoTraced(functools.partial(self._parts, K)))
        log_lik, log_prior, log_q = repeated()
        return replace(self.last, log_lik=log_lik, log_prior=log_prior, log_q=log_q)

    def _parts(self, K: int) -> tuple[Tensor, ...]:
        self.last = self.draw(K)  # which has what replays do not change
        return self.last.log_lik, self.last.log_prior, self.last.log_q


def elbo(
    model: Program,
    guide: Program,
    x: Tensor,
    index: Tensor | None = None,
    K: int = 1,
    kl_weight: float | Tensor = 1.0,
) -> Tensor:
    r"""Evidence lower bound of each datapoint, :math:`\frac1K \sum_k \log w_k`, [B] in nats, with gradients.

    With a KL weight beta other than 1 it is :math:`E_q[\log p(x|z)] - \beta\, KL(q \| p)`, for training alone.
    """
    w = log_weights(model, guide, x, index, K)
    return (w.log_lik + kl_weight * (w.log_prior - w.log_q)).mean(0)


def score_draws(
    model: Program,
    guide: Program,
    x: Tensor,
    index: Tensor | None = None,
    K: int = 1,
    *,
    max_plate_nesting: int = 1,
    keep_latents: bool = False,
    through: Through | None = None,
    learning: bool = False,
    path: bool = False,
    analytic: bool = False,
) -> LogWeights:
    r"""Like `log_weights`, in one pass, with what the gradients of an objective need.

    Arguments:
        through: (value, event dimensions) to the latent that the model is to see in the value's place.
        learning: refuse latents whose draws pass no gradient.
        path: gradients of log_q reach the guide's parameters through the draws alone, not through q's density.
        analytic: log_prior is :math:`-KL(q \| p)` in closed form and log_q is 0.
    """
    dim, shape = -1 - max_plate_nesting, (K, len(x))
    scored, drawn = _sites(model, guide, x, index, K, dim, through)
    if learning or path:
        _check_gradients(drawn, path)
    if analytic and [name for name in drawn if name in scored] != [name for name in scored if name in drawn]:
        raise Incompatible("the guide draws its latents in another order than the model: there is no KL in closed form")
    log_lik, log_prior, log_q = (x.new_zeros(shape) for _ in range(3))
    for name, site in scored.items():
        if site["is_observed"]:
            log_lik = log_lik + _rows(name, site, _density(site), shape, dim)
        else:
            log_p = -_kl(name, drawn[name], site) if analytic else _density(site)
            log_prior = log_prior + _rows(name, site, log_p, shape, dim)
    for name, site in drawn.items():
        if not analytic:
            log_q = log_q + _rows(name, site, _path_density(site) if path else _density(site), shape, dim)
        elif name not in scored:
            raise Incompatible(f"the guide draws '{name}' jointly for all latents: there is no KL in closed form")
    latents = {
        name: _own_dims(site) if K > 1 else _own_dims(site).unsqueeze(0)
        for name, site in scored.items()
        if keep_latents and not site["is_observed"]
    }
    point_mass = all(isinstance(site["fn"], pyro.distributions.Delta) for site in drawn.values())
    return LogWeights(log_lik, log_prior, log_q, latents, _subsampling(scored), point_mass)


def _sites(
    model: Program, guide: Program, x: Tensor, index: Tensor | None, K: int, dim: int, through: Through | None
) -> tuple[dict[str, Site], dict[str, Site]]:
    """The model's sites at the guide's draws, and the guide's own."""
    # A single draw goes without the samples' plate: a guide that refines inside its own trace draws this way.
    with pyro.plate("samples", K, dim=dim) if K > 1 else nullcontext():
        guide_trace = poutine.trace(guide).get_trace(x, index)
        drawn = {name: dict(site) for name, site in random_sites(guide_trace)}
        if through:
            for name, site in drawn.items():
                guide_trace.nodes[name]["value"] = through(site["value"], site["fn"].event_dim)
        model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(x, index)
    scored = dict(random_sites(model_trace))
    _check_match(scored, drawn)
    return scored, drawn


def random_sites(trace: Any) -> Iterator[tuple[str, Site]]:
    """The sites of a trace that are drawn or observed."""
    for name, site in trace.nodes.items():
        if site["type"] == "sample" and not site_is_subsample(site) and not site["infer"].get("_deterministic"):
            yield name, site


def _check_match(scored: dict[str, Site], drawn: dict[str, Site]) -> None:
    for name, site in drawn.items():
        if name not in scored and not site["infer"].get("is_auxiliary"):
            raise UserError(f"the guide draws '{name}', but the model has no such site")
    for name, site in scored.items():
        if name not in drawn and not site["is_observed"]:
            raise UserError(f"the model draws '{name}', but the guide has no such site")


def _subsampling(sites: dict[str, Site]) -> float:
    """Rows of the data over rows of the batch, as the plate "data" states them; what ``poutine.scale`` adds is left."""
    frames = [f for site in sites.values() for f in site["cond_indep_stack"] if f.name == "data"]
    return frames[0].full_size / frames[0].size if frames and frames[0].full_size else 1.0


def _density(site: Site) -> Tensor:
    return site["fn"].log_prob(site["value"])


def _check_gradients(drawn: dict[str, Site], path: bool) -> None:
    for name, site in drawn.items():
        if not site["fn"].has_rsample:
            raise Incompatible(
                f"latent '{name}' is not reparametrized: only ELBO(), without weights, has a gradient for it"
            )
    several = [name for name, site in drawn.items() if not isinstance(site["fn"], pyro.distributions.Delta)]
    if path and len(several) > 1:
        raise Incompatible(
            f"the guide draws {', '.join(several)} one by one: a path gradient needs them drawn jointly, as ours do"
        )


def _path_density(site: Site) -> Tensor:
    """log q of a draw, whose gradient is the score at the draw times the draw's own."""
    fn, value = site["fn"], site["value"]
    log_q = fn.log_prob(value)
    if not (torch.is_grad_enabled() and value.requires_grad) or isinstance(fn, pyro.distributions.Delta):
        return log_q
    leaf = value.detach().requires_grad_()
    (score,) = torch.autograd.grad(fn.log_prob(leaf).sum(), leaf)
    moved = (value - value.detach()) * score
    return log_q.detach() + moved.reshape((*log_q.shape, -1)).sum(-1)


def _kl(name: str, q: Site, p: Site) -> Tensor:
    """KL(q || p) of a latent in closed form."""
    for prior in (p["fn"], _as_multivariate(p["fn"])):
        with suppress(NotImplementedError):
            return kl_divergence(q["fn"], prior)
    kinds = " and ".join(type(getattr(site["fn"], "base_dist", site["fn"])).__name__ for site in (q, p))
    raise Incompatible(f"KL(q || p) of '{name}' has no closed form for {kinds}; use --objective ELBO, which samples it")


def _as_multivariate(fn: Any) -> Any:
    """A diagonal Gaussian as a multivariate one, for which PyTorch knows more closed forms."""
    base = getattr(fn, "base_dist", fn)
    if isinstance(base, torch.distributions.Normal) and fn.event_dim == 1:
        return pyro.distributions.MultivariateNormal(base.loc, scale_tril=base.scale.diag_embed())
    return fn


def _rows(name: str, site: Site, log_p: Tensor, shape: tuple[int, int], samples_dim: int) -> Tensor:
    """Unscaled log-density of a site, summed over plates inside "data", [K, B]."""
    data = [frame for frame in site["cond_indep_stack"] if frame.name == "data"]
    if not data or data[0].dim != -1:
        kind = "observed site" if site["is_observed"] else "latent"
        raise UserError(
            f"{kind} '{name}' stands outside pyro.plate(\"data\", len(x), dim=-1); "
            "every site must belong to one datapoint for weights per datapoint to exist"
        )
    if data[0].size not in (-1, shape[1]):
        raise UserError(f"site '{name}' has a plate \"data\" of {data[0].size}, but the batch has {shape[1]} rows")
    log_p = scale_and_mask(log_p, mask=site["mask"])
    if log_p.dim() > -samples_dim:
        raise UserError(
            f"site '{name}' has batch shape {tuple(log_p.shape)}, more plates than expected; set max_plate_nesting"
        )
    if log_p.dim() == -samples_dim and samples_dim < -2:
        log_p = log_p.sum(tuple(range(samples_dim + 1, -1)))
    elif log_p.dim() > 1 and shape[0] == 1:
        log_p = log_p.sum(tuple(range(log_p.dim() - 1)))
    if log_p.shape[-1:] not in ((shape[1],), (1,), ()):
        raise UserError(f"site '{name}' has {log_p.shape[-1]} rows, but the batch has {shape[1]}")
    return log_p.expand(shape)


def _own_dims(site: Site) -> Tensor:
    """A draw without the dimensions of plates that the site does not stand in."""
    value, event = site["value"], site["fn"].event_dim
    own = {frame.dim for frame in site["cond_indep_stack"]}
    others = [dim - event for dim in range(event - value.dim(), 0) if dim not in own]
    return value.squeeze(tuple(others)) if others else value
