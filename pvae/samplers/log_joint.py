"""Log joint density log p(x, u) of given rows over the unconstrained latents u, and draws from the joint."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor

from pvae.errors import UserError
from pvae.inference.importance import random_sites, score_draws
from pvae.inference.latents import LatentSite, LatentSites, find_latent_sites
from pvae.runtime.pyro_params import Program, local_param_store, module_of
from pvae.runtime.torch_state import no_validation, seeded


class JointDraws(NamedTuple):
    """Draws from the joint p(x, u): each row of u [N, D] is an exact posterior draw given its row of x."""

    u: Tensor
    x: Tensor


@dataclass(frozen=True)
class LogJoint:
    r"""Log joint density in unconstrained space, :math:`\log p(x, T(u)) + \log |\det \partial T / \partial u|`.

    Arguments:
        model: a Pyro program; it is put in ``eval`` mode where it has a mode.
        x, index: rows [B, ...] and their numbers among the training datapoints.
        sites: the latent sites; `find_latent_sites` finds them by default.

    Attributes:
        latents: these sites; T maps their unconstrained vector u [D] to their values.

    Calling it with u [C, B, D], C chains for every row, returns [C, B] in nats, with gradients; a u that can't be
    scored gives -inf or NaN, no error.

    >>> import pvae
    >>> vae = pvae.VAE(torch.nn.Linear(2, 5), pvae.likelihoods.Bernoulli(), pvae.priors.StandardNormal(2))
    >>> target = LogJoint(vae.model, torch.zeros(3, 5))
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

    def rows(self, part: slice | Tensor) -> LogJoint:
        """Return the log joint of some of the rows, by a slice or by their numbers."""
        return LogJoint(self.model, self.x[part], None if self.index is None else self.index[part], self.latents)

    def log_lik_and_prior(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Return log p(x|T(u)) and log p(u) = log p(T(u)) + log |det dT/du|, [C, B] each in nats, at u [C, B, D]."""
        values = u if len(u) > 1 else u[0]  # `score_draws` has no plate of samples for a single draw

        def guide(x: Tensor, index: Tensor | None = None) -> None:
            with pyro.plate("data", len(x), dim=-1):
                self.latents.sample(dist.Delta(values, event_dim=1))

        with _unvalidated(self.model):
            w = score_draws(self.model, guide, self.x, self.index, len(u))
        return w.log_lik, w.log_prior - w.log_q

    def __call__(self, u: Tensor) -> Tensor:
        log_lik, log_prior = self.log_lik_and_prior(u)
        return log_lik + log_prior

    @torch.no_grad()
    def prior(self, chains: int) -> Tensor:
        """Draw u [C, B, D] from the program's prior, by the random stream outside."""
        with _unvalidated(self.model), pyro.plate("samples", chains, dim=-2):
            trace = poutine.trace(self.model).get_trace(self.x, self.index)
        return unconstrain(self.latents, {name: site["value"] for name, site in random_sites(trace)})


def unconstrain(sites: LatentSites, latents: dict[str, Tensor]) -> Tensor:
    """Return the unconstrained vectors u [..., D] of latent values by site, [..., event shape] each.

    >>> from torch.distributions.constraints import positive
    >>> unconstrain(LatentSites((LatentSite("s", (), positive),)), {"s": torch.ones(3)}).tolist()
    [[0.0], [0.0], [0.0]]
    """

    def vector(site: LatentSite) -> Tensor:
        u, shape = site.transform.inv(latents[site.name]), site.unconstrained_shape
        return u.flatten(-len(shape)) if shape else u.unsqueeze(-1)

    return torch.cat([vector(site) for site in sites.sites], -1)


@torch.no_grad()
def simulate_joint(model: Program, like: Tensor, sites: LatentSites | None = None, *, seed: int = 0) -> JointDraws:
    """Draw latents and rows from the joint of the program (ancestral sampling), in the shape of ``like`` [N, ...].

    Arguments:
        like: rows; entries that the program does not observe, such as labels, are copied, and so is NaN (missing).
        sites: the latent sites, found by default.
        seed: of the draws; the random stream outside is left alone.

    Raises:
        UserError: the values that the program observes are not entries of its rows.
    """
    sites = sites or find_latent_sites(model, like)
    index = torch.zeros(len(like), dtype=torch.long, device=like.device)
    with seeded(seed), _unvalidated(model):
        trace = poutine.trace(poutine.uncondition(model)).get_trace(like, index)
    values = {name: site["value"] for name, site in random_sites(trace)}
    x = _fill_observed(model, {n: v for n, v in values.items() if n not in {s.name for s in sites.sites}}, like)
    return JointDraws(unconstrain(sites, values), torch.where(like.isnan(), like, x))


def _fill_observed(model: Program, observed: dict[str, Tensor], like: Tensor) -> Tensor:
    """Return the rows ``like`` with drawn values in the entries that the program observes."""
    if [value.shape for value in observed.values()] == [like.shape]:
        return next(iter(observed.values())).to(like)
    # A row of column numbers shows which columns of a flat row each site observes.
    numbers = torch.arange(like[0].numel(), dtype=like.dtype, device=like.device)
    index = torch.zeros(1, dtype=torch.long, device=like.device)
    try:
        with seeded(0), _unvalidated(model):
            trace: Any = poutine.trace(model).get_trace(numbers.view(like[:1].shape), index)
    except Exception as error:  # a user's program may raise anything
        raise UserError(f"no rows can be simulated: the program fails where its rows are numbered ({error})") from error
    columns = {name: site["value"].flatten() for name, site in random_sites(trace) if site["is_observed"]}
    joined = torch.cat([numbers[:0], *columns.values()])
    if not torch.isin(joined, numbers).all() or len(joined.unique()) < len(joined):
        wrong = f"({', '.join(columns)}) are not entries of its rows of shape {tuple(like.shape[1:])}"
        raise UserError(f"no rows can be simulated: the values that the program observes {wrong}")
    rows = like.flatten(1).clone()
    for name, numbers in columns.items():
        rows[:, numbers.long()] = observed[name].to(like).reshape(len(like), -1)
    return rows.view_as(like)


@contextmanager
def _unvalidated(model: Program) -> Iterator[None]:
    """Run a program without validation, since chains may stray, and its module in its own parameter store."""
    with ExitStack() as stack:
        stack.enter_context(no_validation())
        with suppress(UserError):  # a plain function has no module
            module_of(model)
            stack.enter_context(local_param_store())
        yield
