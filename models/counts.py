"""Counts whose rows differ in size: one latent for the size, another for the composition."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints

import pvae
from pvae.runtime import LocalModule, local_method


class SizedCounts(LocalModule):
    r"""Counts with a latent size, :math:`E[x | z, l] = e^l\, \mathrm{softmax}(\eta(z))` with :math:`l \sim N(m, s^2)`.

    Story: a datapoint (a cell, a document) has a log size l ~ N(m, s^2), m and s learned, and a composition z ~ p(z);
    the decoder returns each column's share of the total, and the row is drawn from the likelihood with these means.

    Arguments:
        likelihood: of counts, whose first parameter per value is the log mean: Poisson, NegativeBinomial.
        prior: p(z).
        decoder: z [..., D] to the likelihood's parameters eta.
        size: a row's expected total at the start of training; use the median of the data.

    Edit: fix the log size to the log of the row's observed total, or let it depend on a batch label.

    Raises:
        UserError: the likelihood does not score counts, or the size is not positive.

    Source: Lopez, Regier, Cole, Jordan, Yosef (2018), *Deep generative modeling for single-cell transcriptomics*,
    doi:10.1038/s41592-018-0229-2.

    >>> parts = {"likelihood": pvae.likelihoods.Poisson(), "prior": pvae.priors.StandardNormal(4)}
    >>> program = SizedCounts(decoder=nn.Linear(4, 64), **parts)
    >>> trace = pyro.poutine.trace(program.model).get_trace(torch.zeros(5, 64))
    >>> trace.nodes["z"]["value"].shape, trace.nodes["log_size"]["value"].shape
    (torch.Size([5, 4]), torch.Size([5, 1]))
    """

    def __init__(
        self,
        *,
        likelihood: pvae.likelihoods.Likelihood,
        prior: pvae.priors.Prior,
        decoder: nn.Module,
        size: float = 1000.0,
    ) -> None:
        super().__init__()
        if likelihood.support is not constraints.nonnegative_integer:
            raise pvae.UserError(f"SizedCounts: {type(likelihood).__name__} is no likelihood of counts; choose Poisson")
        if not (size > 0 and math.isfinite(size)):
            raise pvae.UserError(f"SizedCounts: size is {size}, but it must be positive")
        self.likelihood, self.prior, self.decoder = likelihood, prior, decoder
        self.mean = nn.Parameter(torch.tensor([math.log(size)]))
        self.log_scale = nn.Parameter(torch.zeros(1))

    @local_method
    def model(self, x: Tensor, index: Tensor | None = None) -> None:
        """Draw z [B, D] and log_size [B, 1] for each row of x [B, columns] and observe x."""
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", self.prior())
            log_size = pyro.sample("log_size", dist.Normal(self.mean, self.log_scale.exp()).to_event(1))
            shares, *others = self.decoder(z).chunk(self.likelihood.params_per_value, -1)
            eta = torch.cat([log_size + shares.log_softmax(-1), *others], -1)
            pyro.sample("x", self.likelihood(eta), obs=x)
