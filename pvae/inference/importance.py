"""Importance weights: the only place that scores traces; every bound is a function of the log-weights it returns."""

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

from pvae.errors import Incompatible, UserError, param
from pvae.runtime.pyro_params import Program
from pvae.runtime.torch_state import RandomState, halve_on_oom
from pvae.runtime.tracing import AutoTraced

Site = dict[str, Any]
Hook = Callable[[Tensor, int], Tensor]

MIN_CALLS_TO_TRACE = 100  # chunks of draws from which on tracing one pays

# Datapoints times samples in one pass: large enough for matrix products to dominate, small enough for the cache.
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
        point_mass: the guide's draws have no density.
    """

    log_lik: Tensor
    log_prior: Tensor
    log_q: Tensor
    latents: dict[str, Tensor] = field(default_factory=dict)
    scale: float = 1.0
    point_mass: bool = False

    @property
    def log_w(self) -> Tensor:
        """Log importance weights, log p(x, z) - log q(z|x), [K, B]."""
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
        Log-densities without the scales of plates and ``poutine.scale``, masks kept. Draws are scored in chunks, so
        that without gradients memory is what one chunk takes and three numbers for each draw.

    Raises:
        UserError: K below 1, or a program that is not of this form; the message names the site.
    """
    options: dict[str, Any] = {"max_plate_nesting": max_plate_nesting, "keep_latents": keep_latents}
    chunks = [w for (w,) in iter_log_weights(model, [guide], x, index, K, **options)]
    if len(chunks) == 1:
        return chunks[0]
    names = ("log_lik", "log_prior", "log_q")
    log_lik, log_prior, log_q = (torch.cat([getattr(w, name) for w in chunks]) for name in names)
    latents = {name: torch.cat([w.latents[name] for w in chunks]) for name in chunks[0].latents}
    return replace(chunks[0], log_lik=log_lik, log_prior=log_prior, log_q=log_q, latents=latents)


def iter_log_weights(
    model: Program, guides: Sequence[Program], x: Tensor, index: Tensor | None = None, K: int = 1, **options: Any
) -> Iterator[tuple[LogWeights, ...]]:
    """Yield the guides' log-weights [k, B] of chunks of the K draws of `log_weights`, in memory that K does not change.

    Guides draw under common random numbers, so that those of one family are compared without their noise. The random
    stream goes on where the first guide's draws end.
    """
    if K < 1:
        raise UserError(f"K is {K}, but at least 1 draw is needed")
    size = max(1, ROWS_PER_PASS // max(1, len(x)))
    traces = size * MIN_CALLS_TO_TRACE <= K and not (options.get("keep_latents") or torch.is_grad_enabled())
    scores = [functools.partial(score_draws, model, guide, x, index, **options) for guide in guides]
    sources: list[Callable[[int], LogWeights]] = [_TracedDraws(score) if traces else score for score in scores]

    def score_chunk(draws: slice) -> tuple[LogWeights, ...]:
        count, start = draws.stop - draws.start, RandomState()
        chunk, end = [sources[0](count)], RandomState()
        for source in sources[1:]:
            start.restore()
            chunk.append(source(count))
        end.restore()
        return tuple(chunk)

    yield from halve_on_oom(score_chunk, K, size, "draws for each row")


class _TracedDraws:
    """Draws of one guide for the same rows, traced because they are many and need no gradient."""

    def __init__(self, score: Callable[[int], LogWeights]) -> None:
        self.score = score
        self.first: LogWeights | None = None
        self.traced: dict[int, AutoTraced] = {}

    def __call__(self, K: int) -> LogWeights:
        if self.first is None:  # has all that is the same for every draw
            self.first = self.score(K)
            return self.first
        log_lik, log_prior, log_q = self.traced.setdefault(K, AutoTraced(lambda: self._densities(K)))()
        return replace(self.first, log_lik=log_lik, log_prior=log_prior, log_q=log_q)

    def _densities(self, K: int) -> tuple[Tensor, Tensor, Tensor]:
        w = self.score(K)
        return w.log_lik, w.log_prior, w.log_q


def score_draws(
    model: Program,
    guide: Program,
    x: Tensor,
    index: Tensor | None = None,
    K: int = 1,
    *,
    max_plate_nesting: int = 1,
    keep_latents: bool = False,
    hook: Hook | None = None,
    require_rsample: bool = False,
    path_gradient: bool = False,
    analytic_kl: bool = False,
) -> LogWeights:
    r"""Score draws as `log_weights` does, in one pass, with the gradients that an objective needs.

    Arguments:
        hook: maps a draw and its event dimensions to the value that the model sees in its place.
        require_rsample: refuse latents that are not reparametrized.
        path_gradient: let gradients of log_q reach the guide's parameters through the draws alone.
        analytic_kl: log_prior is :math:`-KL(q \| p)` in closed form and log_q is 0.
    """
    dim, shape = -1 - max_plate_nesting, (K, len(x))
    scored, drawn = _trace_sites(model, guide, x, index, K, dim, hook)
    if require_rsample or path_gradient:
        _check_gradients(drawn, path_gradient)
    log_lik, log_prior, log_q = (x.new_zeros(shape) for _ in range(3))
    if analytic_kl:
        _check_closed_form(scored, drawn)
    for name, site in scored.items():
        if site["is_observed"]:
            log_lik = log_lik + _sum_plates(name, site, _log_prob(site), shape, dim)
        else:
            log_p = -_kl(name, drawn[name], site) if analytic_kl else _log_prob(site)
            log_prior = log_prior + _sum_plates(name, site, log_p, shape, dim)
    for name, site in () if analytic_kl else drawn.items():
        log_q = log_q + _sum_plates(name, site, (_path_log_prob if path_gradient else _log_prob)(site), shape, dim)
    unobserved = {name: site for name, site in scored.items() if keep_latents and not site["is_observed"]}
    latents = {name: _own_dims(site) if K > 1 else _own_dims(site).unsqueeze(0) for name, site in unobserved.items()}
    point_mass = all(isinstance(site["fn"], pyro.distributions.Delta) for site in drawn.values())
    return LogWeights(log_lik, log_prior, log_q, latents, _subsampling_scale(scored), point_mass)


def _trace_sites(
    model: Program, guide: Program, x: Tensor, index: Tensor | None, K: int, dim: int, hook: Hook | None
) -> tuple[dict[str, Site], dict[str, Site]]:
    """Trace the guide, and the model at the guide's draws; return the sites of the model and of the guide."""
    # A single draw goes without the samples' plate: a guide that refines inside its own trace draws this way.
    with pyro.plate("samples", K, dim=dim) if K > 1 else nullcontext():
        guide_trace = poutine.trace(guide).get_trace(x, index)
        drawn = {name: dict(site) for name, site in random_sites(guide_trace)}
        if hook:
            for name, site in drawn.items():
                guide_trace.nodes[name]["value"] = hook(site["value"], site["fn"].event_dim)
        model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(x, index)
    scored = dict(random_sites(model_trace))
    _check_match(scored, drawn)
    return scored, drawn


def random_sites(trace: Any) -> Iterator[tuple[str, Site]]:
    """Yield the sites of a trace that are drawn or observed."""
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


def _subsampling_scale(sites: dict[str, Site]) -> float:
    """Rows of the data over rows of the batch, as the plate "data" states them, without ``poutine.scale``."""
    frames = [f for site in sites.values() for f in site["cond_indep_stack"] if f.name == "data"]
    return frames[0].full_size / frames[0].size if frames and frames[0].full_size else 1.0


def _log_prob(site: Site) -> Tensor:
    return site["fn"].log_prob(site["value"])


def _check_gradients(drawn: dict[str, Site], path_gradient: bool) -> None:
    for name, site in drawn.items():
        if not site["fn"].has_rsample:
            raise Incompatible(f"latent '{name}' is not reparametrized: only ELBO() without weights has its gradient")
    with_density = [name for name, site in drawn.items() if not isinstance(site["fn"], pyro.distributions.Delta)]
    if path_gradient and len(with_density) > 1:
        names = ", ".join(with_density)
        raise Incompatible(f"the guide draws {names} one by one: a path gradient needs them drawn jointly, as ours do")


def _path_log_prob(site: Site) -> Tensor:
    """Compute log q of a draw, whose gradient is the score at the draw times the draw's own."""
    fn, value = site["fn"], site["value"]
    log_q = fn.log_prob(value)
    if not (torch.is_grad_enabled() and value.requires_grad) or isinstance(fn, pyro.distributions.Delta):
        return log_q
    leaf = value.detach().requires_grad_()
    (score,) = torch.autograd.grad(fn.log_prob(leaf).sum(), leaf)
    change = (value - value.detach()) * score
    return log_q.detach() + change.reshape((*log_q.shape, -1)).sum(-1)


def _check_closed_form(scored: dict[str, Site], drawn: dict[str, Site]) -> None:
    if [name for name in drawn if name in scored] != [name for name in scored if name in drawn]:
        raise Incompatible("the guide draws its latents in another order than the model: there is no KL in closed form")
    for name in drawn:
        if name not in scored:
            raise Incompatible(f"the guide draws '{name}' jointly for all latents: there is no KL in closed form")


def _kl(name: str, q: Site, p: Site) -> Tensor:
    """Compute KL(q || p) of a latent in closed form."""
    for prior in (p["fn"], _as_multivariate(p["fn"])):
        with suppress(NotImplementedError):
            return kl_divergence(q["fn"], prior)
    kinds = " and ".join(type(getattr(site["fn"], "base_dist", site["fn"])).__name__ for site in (q, p))
    raise Incompatible(
        f"KL(q || p) of '{name}' has no closed form for {kinds}; set {param('objective', 'ELBO')}, which samples it"
    )


def _as_multivariate(fn: Any) -> Any:
    """Return a diagonal Gaussian as a multivariate one, for which PyTorch knows more closed forms."""
    base = getattr(fn, "base_dist", fn)
    if isinstance(base, torch.distributions.Normal) and fn.event_dim == 1:
        return pyro.distributions.MultivariateNormal(base.loc, scale_tril=base.scale.diag_embed())
    return fn


def _sum_plates(name: str, site: Site, log_p: Tensor, shape: tuple[int, int], samples_dim: int) -> Tensor:
    """Sum a site's unscaled log-density over plates inside "data", [K, B]."""
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
    """Return a draw without the dimensions of plates that the site does not stand in."""
    value, event = site["value"], site["fn"].event_dim
    dims = {frame.dim for frame in site["cond_indep_stack"]}
    others = [dim - event for dim in range(event - value.dim(), 0) if dim not in dims]
    return value.squeeze(tuple(others)) if others else value
