"""Latent sites of a Pyro program, as one unconstrained real vector, so that one family serves any program."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import biject_to, constraints

from pvae.distributions.supports import base_constraint
from pvae.errors import UserError
from pvae.inference.importance import random_sites
from pvae.runtime.pyro_params import Program
from pvae.runtime.torch_state import seeded

JOINT = "_latents"


@dataclass(frozen=True)
class LatentSite:
    """Latent site of one datapoint: name, event shape and support."""

    name: str
    shape: tuple[int, ...]
    support: constraints.Constraint = field(compare=False)

    @property
    def transform(self) -> Any:
        """Transform from unconstrained reals to the support."""
        return biject_to(self.support)

    @property
    def unconstrained_shape(self) -> tuple[int, ...]:
        """Shape of the unconstrained reals behind the values; one entry less than the values of a simplex."""
        return tuple(self.transform.inverse_shape(self.shape))

    @property
    def is_real_vector(self) -> bool:
        """Whether the site is a vector of reals, which needs no transform."""
        # By class: a copied or unpickled site has a constraint of its own.
        return len(self.shape) == 1 and isinstance(base_constraint(self.support), type(constraints.real))


@dataclass(frozen=True)
class LatentSites:
    """All latents of one datapoint, for a family one unconstrained vector of ``dim`` reals.

    >>> LatentSites((LatentSite("z", (3,), constraints.real_vector), LatentSite("s", (), constraints.positive))).dim
    4
    """

    sites: tuple[LatentSite, ...]

    @property
    def dim(self) -> int:
        """D, the number of unconstrained reals behind all latents."""
        return sum(math.prod(site.unconstrained_shape) for site in self.sites)

    def sample(self, q: dist.TorchDistribution) -> None:
        r"""Draw all latents in a guide from q over their unconstrained vector, inside plate "data".

        Several sites, or one with a bounded support, are drawn jointly as an auxiliary site u, and are set to
        :math:`z_s = T_s(u_s)`, with the density :math:`q(u) \prod_s |\det \partial T_s / \partial u_s|^{-1}`.
        """
        if len(self.sites) == 1 and self.sites[0].is_real_vector:
            pyro.sample(self.sites[0].name, q)
            return
        joint = pyro.sample(JOINT, q, infer={"is_auxiliary": True})
        parts = joint.split([math.prod(site.unconstrained_shape) for site in self.sites], -1)
        for site, part in zip(self.sites, parts, strict=True):
            u = part.reshape(joint.shape[:-1] + site.unconstrained_shape)
            value = site.transform(u)
            log_det = site.transform.log_abs_det_jacobian(u, value).reshape(*joint.shape[:-1], -1).sum(-1)
            pyro.sample(site.name, dist.Delta(value, -log_det, event_dim=len(site.shape)))


def real_vector_latent(dim: int) -> LatentSites:
    """Return the sites of the default program: one real vector "z" of D entries."""
    return LatentSites((LatentSite("z", (dim,), constraints.real_vector),))


def find_latent_sites(model: Program, x: Tensor) -> LatentSites:
    """Find the latent sites of a program by running it on a few of the rows x [B, ...].

    Raises:
        UserError: the program fails or observes nothing, has no latent, or one that is discrete, is not in plate "data"
            alone, or changes its shape.
    """
    count = min(len(x), 3)
    sites, again = (_trace_latents(model, x[: count - skip], seed=skip) for skip in (0, 1 if count > 1 else 0))
    if sites != again:
        first, then = ({site.name: site.shape for site in run} for run in (sites, again))
        name = next(n for n in (*first, *then) if first.get(n) != then.get(n))
        raise UserError(
            f"the program's latent '{name}' changes from run to run ({first.get(name)}, then {then.get(name)}); "
            "its sites and their shapes must be the same for all datapoints"
        )
    return LatentSites(tuple(sites))


def _trace_latents(model: Program, x: Tensor, seed: int) -> list[LatentSite]:
    with seeded(seed), torch.no_grad():
        try:
            trace = poutine.trace(model).get_trace(x, torch.arange(len(x), device=x.device))
        except UserError:
            raise
        except Exception as error:  # a user's program may raise anything
            raise UserError(f"the program fails on {len(x)} rows of shape {tuple(x.shape[1:])}: {error}") from error
    sites = dict(random_sites(trace))
    if not any(site["is_observed"] for site in sites.values()):
        raise UserError('the program observes nothing; it needs pyro.sample("x", ..., obs=x)')
    latents = [_latent_site(name, site, len(x)) for name, site in sites.items() if not site["is_observed"]]
    if not latents:
        raise UserError('the program has no latent: it needs a pyro.sample without obs inside plate "data"')
    return latents


def _latent_site(name: str, site: dict[str, Any], rows: int) -> LatentSite:
    fn, frames = site["fn"], [(frame.name, frame.dim) for frame in site["cond_indep_stack"]]
    if ("data", -1) not in frames:
        raise UserError(f"latent '{name}' stands outside pyro.plate(\"data\", len(x), dim=-1), so it has no datapoint")
    if len(frames) > 1:
        raise UserError(f"latent '{name}' stands in a plate inside \"data\"; write that plate as .to_event(1)")
    if fn.support.is_discrete:
        raise UserError(f"latent '{name}' is discrete, and no family here holds it; sum it out of the program")
    if fn.batch_shape != (rows,):
        raise UserError(f"latent '{name}' has batch shape {tuple(fn.batch_shape)}, but plate \"data\" has {rows} rows")
    return LatentSite(name, tuple(fn.event_shape), _support(name, fn))


def _support(name: str, fn: Any) -> Any:
    """Return the support of one datapoint's latent, without the shapes of the rows at hand."""
    inner = base_constraint(fn.support)
    if inner is constraints.real:  # also behind a mixture's support, say, which biject_to does not know
        return constraints.independent(inner, fn.event_dim)
    bounds = {key: getattr(inner, key, None) for key in ("lower_bound", "upper_bound")}
    tensors = {key: value.flatten() for key, value in bounds.items() if isinstance(value, Tensor) and value.dim()}
    if not tensors:
        return fn.support
    inner = copy.copy(inner)
    for key, values in tensors.items():
        if (values != values[0]).any():
            raise UserError(f"the support of latent '{name}' is not the same everywhere; its bounds must be numbers")
        setattr(inner, key, values[0].item())
    return constraints.independent(inner, fn.event_dim)


def find_observed(trace: Any, x: Tensor) -> dict[str, Any]:
    """Return the site of a program's trace at which rows of the dimensions of x are observed; ``fn`` is p(x|z)."""
    for _, site in random_sites(trace):
        if site["is_observed"] and site["value"].dim() == x.dim():
            return site
    raise UserError("the program observes no site of the data's shape, so that no row can be drawn beside the data's")


def observed_site(program: Program, x: Tensor, index: Tensor | None = None) -> dict[str, Any]:
    """Run a program once and return its observed site, see `find_observed`."""
    return find_observed(poutine.trace(program).get_trace(x, index), x)


def base_measure(model: Program, x: Tensor) -> str:
    """Return whether log p(x|z) is of a ``mass`` or a ``density``; nats of the two can't be compared."""
    with seeded(0), torch.no_grad():
        sites = dict(random_sites(poutine.trace(model).get_trace(x, torch.arange(len(x), device=x.device))))
    kinds = {site["fn"].support.is_discrete for site in sites.values() if site["is_observed"]}
    return "mass" if kinds == {True} else "density" if kinds == {False} else "mixed"
