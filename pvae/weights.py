"""The waist: the only place that scores traces. Everything that is evaluated is a function of its log-weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pvae.errors import UserError

__all__ = ["LogWeights", "Program", "elbo", "log_weights"]

Program = Callable[..., Any]
Site = dict[str, Any]

# Datapoints times samples in one pass through the program: large enough for the matrix products to rule,
# small enough to stay near the cache.
ROWS_PER_PASS = 8192


@dataclass(frozen=True)
class LogWeights:
    """Log-densities in nats of K draws of the latents from the guide, for each of B datapoints.

    Attributes:
        log_lik: log p(x|z), [K, B].
        log_prior: log p(z), [K, B].
        log_q: log q(z|x), [K, B].
        latents: the draws by site, [K, B, ...], a site's plates inside "data" before B; empty unless asked for.
    """

    log_lik: Tensor
    log_prior: Tensor
    log_q: Tensor
    latents: dict[str, Tensor] = field(default_factory=dict)

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
    if K < 1:
        raise UserError(f"K is {K}, but at least 1 draw is needed")
    parts = [
        _draw(model, guide, x, index, size, max_plate_nesting, keep_latents)
        for size in _chunks(K, max(1, ROWS_PER_PASS // max(1, len(x))))
    ]
    if len(parts) == 1:
        return parts[0]
    log_lik, log_prior, log_q = (
        torch.cat(p) for p in zip(*((p.log_lik, p.log_prior, p.log_q) for p in parts), strict=True)
    )
    latents = {name: torch.cat([p.latents[name] for p in parts]) for name in parts[0].latents}
    return LogWeights(log_lik, log_prior, log_q, latents)


def elbo(model: Program, guide: Program, x: Tensor, index: Tensor | None = None, K: int = 1) -> Tensor:
    r"""Evidence lower bound of each datapoint, :math:`\frac1K \sum_k \log w_k`, [B] in nats, with gradients."""
    return log_weights(model, guide, x, index, K).log_w.mean(0)


def _chunks(total: int, size: int) -> Iterator[int]:
    for start in range(0, total, size):
        yield min(size, total - start)


def _draw(
    model: Program, guide: Program, x: Tensor, index: Tensor | None, K: int, nesting: int, keep_latents: bool
) -> LogWeights:
    dim = -1 - nesting
    # A single draw goes without the samples' plate: a guide that refines inside its own trace draws this way.
    with pyro.plate("samples", K, dim=dim) if K > 1 else nullcontext():
        guide_trace = poutine.trace(guide).get_trace(x, index)
        model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(x, index)
    shape = (K, len(x))
    log_lik, log_prior, log_q = (x.new_zeros(shape) for _ in range(3))
    latents = {}
    for name, site in _random_sites(guide_trace):
        if name not in model_trace.nodes and not site["infer"].get("is_auxiliary"):
            raise UserError(f"the guide draws '{name}', but the model has no such site")
        log_q = log_q + _score(name, site, shape, dim)
    for name, site in _random_sites(model_trace):
        if site["is_observed"]:
            log_lik = log_lik + _score(name, site, shape, dim)
        elif name not in guide_trace.nodes:
            raise UserError(f"the model draws '{name}', but the guide has no such site")
        else:
            log_prior = log_prior + _score(name, site, shape, dim)
            if keep_latents:
                latents[name] = _own_dims(site) if K > 1 else _own_dims(site).unsqueeze(0)
    return LogWeights(log_lik, log_prior, log_q, latents)


def _random_sites(trace: Any) -> Iterator[tuple[str, Site]]:
    for name, site in trace.nodes.items():
        if site["type"] == "sample" and not site_is_subsample(site) and not site["infer"].get("_deterministic"):
            yield name, site


def _score(name: str, site: Site, shape: tuple[int, int], samples_dim: int) -> Tensor:
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
    log_p = scale_and_mask(site["fn"].log_prob(site["value"]), mask=site["mask"])
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
