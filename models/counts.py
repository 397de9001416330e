"""Counts whose rows differ in size: how much was counted is one latent, of what is another."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints

from pvae.errors import UserError
from pvae.generative.likelihoods import Likelihood
from pvae.generative.priors import Prior
from pvae.runtime.pyro_params import LocalModule, local_method


class SizedCounts(LocalModule):
    r"""Counts with a latent size, :math:`E[x | z, l] = e^l\, \mathrm{softmax}(\eta(z))` with :math:`l \sim N(m, s^2)`.

    Story: a datapoint (a cell, a document) has a log size l ~ N(m, s^2), m and s learned, and a kind z ~ p(z); the
    decoder gives each column's share of the total, and the row is drawn from the likelihood with these means.

    Arguments:
        likelihood: of counts, whose first parameter of each value is the log of its mean: Poisson, NegativeBinomial.
        prior: p(z).
        decoder: z [..., D] to the likelihood's parameters eta.
        size: a row's total at the start of training: give the data's median.

    Edit: fix the log size to the log of the row's observed total, or let it depend on a batch label.

    Raises:
        UserError: the likelihood is not one of counts, or the size is not positive.

    Source: Lopez, Regier, Cole, Jordan, Yosef (2018), *Deep generative modeling for single-cell transcriptomics*,
    doi:10.1038/s41592-018-0229-2.

    >>> from pvae.generative.likelihoods import Poisson; from pvae.generative.priors import StandardNormal
    >>> program = SizedCounts(likelihood=Poisson(), prior=StandardNormal(4), decoder=nn.Linear(4, 64))
    >>> trace = pyro.poutine.trace(program.model).get_trace(torch.zeros(5, 64))
    >>> trace.nodes["z"]["value"].shape, trace.nodes["log_size"]["value"].shape
    (torch.Size([5, 4]), torch.Size([5, 1]))
    """

    def __init__(self, *, likelihood: Likelihood, prior: Prior, decoder: nn.Module, size: float = 1000.0) -> None:
        super().__init__()
        if likelihood.support is not constraints.nonnegative_integer:
            raise UserError(f"SizedCounts: {type(likelihood).__name__} is no likelihood of counts; choose Poisson")
        if not (size > 0 and math.isfinite(size)):
            raise UserError(f"SizedCounts: size is {size}, but it must be positive")
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
