"""What samplers explore: log p(x, z) of given rows as a function of the real vectors behind their latents."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor

from pvae.errors import UserError
from pvae.inference.importance import random_sites, score_draws
from pvae.inference.latents import LatentSites, find_latent_sites
from pvae.runtime.pyro_params import Program, local_param_store, module_of
from pvae.runtime.torch_state import no_validation, seeded


class JointDraws(NamedTuple):
    """Draws from the joint density p(x, z): u [N, D] behind the latents is an exact posterior draw of its row of x."""

    u: Tensor
    x: Tensor


@dataclass(frozen=True)
class LogJoint:
    r"""The posterior of each row but for its constant, :math:`\log p(x, T(u)) + \log |\det \partial T / \partial u|`.

    Arguments:
        model: a Pyro program; it is put in ``eval`` mode where it has a mode.
        x, index: rows [B, ...] and which training datapoints they are.
        sites: the latents, see `find_latent_sites`, which finds them unless they are given.

    Attributes:
        latents: these sites; u is their real vector [D], and T takes it to their values.

    Calling it with u [C, B, D] gives [C, B] in nats, with gradients, C chains for every row. A u too far off to score
    gives -inf or NaN, no error.

    >>> from pvae.generative.vae import VAE
    >>> from pvae.generative.likelihoods import Bernoulli
    >>> from pvae.generative.priors import StandardNormal
    >>> target = LogJoint(VAE(torch.nn.Linear(2, 5), Bernoulli(), StandardNormal(2)).model, torch.zeros(3, 5))
    >>> target(target.prior(4)).shape
    torch.Size([4, 3])
    """

    model: Program
    x: Tensor
    index: Tensor | None = None
    sites: LatentSites | None = None
    latents: LatentSites = field(init=False)

    def __post_init__(self) -> None:
        with suppress(UserError):  # a plain function has no mode
            module_of(self.model).eval()
        object.__setattr__(self, "latents", self.sites or find_latent_sites(self.model, self.x))

    def rows(self, part: slice) -> LogJoint:
        """The target of some of the rows."""
        return LogJoint(self.model, self.x[part], None if self.index is None else self.index[part], self.latents)

    def parts(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """log p(x|T(u)) and log p(u) = log p(T(u)) + log |det dT/du|, [C, B] each in nats, of u [C, B, D]."""
        values = u if len(u) > 1 else u[0]  # the waist draws once without a plate of samples

        def guide(x: Tensor, index: Tensor | None = None) -> None:
            with pyro.plate("data", len(x), dim=-1):
                self.latents.sample(dist.Delta(values, event_dim=1))

        with _quiet(self.model):
            w = score_draws(self.model, guide, self.x, self.index, len(u))
        return w.log_lik, w.log_prior - w.log_q

    def __call__(self, u: Tensor) -> Tensor:
        log_lik, log_prior = self.parts(u)
        return log_lik + log_prior

    @torch.no_grad()
    def prior(self, chains: int) -> Tensor:
        """Draws u [C, B, D] from the program's prior, by the random stream outside."""
        with _quiet(self.model), pyro.plate("samples", chains, dim=-2):
            trace = poutine.trace(self.model).get_trace(self.x, self.index)
        return unconstrain(self.latents, {name: site["value"] for name, site in random_sites(trace)})


def unconstrain(sites: LatentSites, latents: dict[str, Tensor]) -> Tensor:
    """The real vectors u [..., D] behind values of the latents by site, [..., event shape] each.

    >>> from torch.distributions import constraints; from pvae.inference.latents import Site
    >>> unconstrain(LatentSites((Site("s", (), constraints.positive),)), {"s": torch.ones(3)})
    tensor([[0.],
            [0.],
            [0.]])
    """
    behind = [(site, site.transform.inv(latents[site.name])) for site in sites.sites]
    return torch.cat([u.flatten(u.dim() - len(site.free)) if site.free else u.unsqueeze(-1) for site, u in behind], -1)


@torch.no_grad()
def simulate_joint(model: Program, like: Tensor, sites: LatentSites | None = None, *, seed: int = 0) -> JointDraws:
    """Draw latents and rows from the program itself, as many and of the shape as the rows ``like`` [N, ...].

    Arguments:
        model: a Pyro program.
        like: rows; what the program does not observe of them, such as labels, is kept, and NaN, which is missing.
        sites: the latents, found unless they are given.
        seed: of the draws; the random stream outside is left alone.

    Raises:
        UserError: what the program observes is not a part of its rows, so that what it draws makes no row.
    """
    sites = sites or find_latent_sites(model, like)
    index = torch.zeros(len(like), dtype=torch.long, device=like.device)
    with seeded(seed), _quiet(model):
        trace = poutine.trace(poutine.uncondition(model)).get_trace(like, index)
    drawn = {name: site["value"] for name, site in random_sites(trace)}
    seen = {name: drawn[name] for name in drawn if name not in {site.name for site in sites.sites}}
    return JointDraws(unconstrain(sites, drawn), torch.where(like.isnan(), like, _put_back(model, seen, like)))


def _put_back(model: Program, seen: dict[str, Tensor], like: Tensor) -> Tensor:
    """The rows ``like`` with drawn values in the places that the program observes."""
    if [value.shape for value in seen.values()] == [like.shape]:
        return next(iter(seen.values())).to(like)
    rows = like.flatten(1).clone()
    for name, places in _observed_places(model, like).items():
        rows[:, places] = seen[name].to(like).reshape(len(like), -1)
    return rows.view_as(like)


def _observed_places(model: Program, like: Tensor) -> dict[str, Tensor]:
    """Which entries of a flat row each observed site sees: those whose number, put in their place, comes back."""
    numbers = torch.arange(like[0].numel(), dtype=like.dtype, device=like.device)
    marked = numbers.view(like[:1].shape)
    try:
        with seeded(0), _quiet(model):
            trace: Any = poutine.trace(model).get_trace(marked, torch.zeros(1, dtype=torch.long, device=like.device))
    except Exception as error:  # a user's program may raise anything
        raise UserError(f"no rows can be simulated: the program fails where its rows are numbered ({error})") from error
    places = {name: site["value"].flatten() for name, site in random_sites(trace) if site["is_observed"]}
    every = torch.cat(list(places.values())) if places else numbers[:0]
    if not torch.isin(every, numbers).all() or len(every.unique()) < len(every):
        raise UserError(
            f"no rows can be simulated: what the program observes ({', '.join(places)}) is not a part of its rows "
            f"of shape {tuple(like.shape[1:])}"
        )
    return {name: values.long() for name, values in places.items()}


@contextmanager
def _quiet(model: Program) -> Iterator[None]:
    """Run a program unchecked, since chains may stray, and its module's parameters in a store of their own."""
    try:
        module_of(model)
    except UserError:
        with no_validation():
            yield
        return
    with no_validation(), local_param_store():
        yield
