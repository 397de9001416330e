"""Factor analysis: a linear decoder and one noise variance per column; the evidence has a closed form."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints

import pvae
from pvae.runtime import LocalModule, local_method


class FactorAnalysis(LocalModule):
    r"""Factor analysis, :math:`p(x) = N(x; b, W W^T + \mathrm{diag}(\psi))`.

    Story: a datapoint has a few factors z ~ N(0, I); its row is x ~ N(W z + b, diag psi).

    Arguments:
        columns: number of values in a row x.
        latent: D, the number of factors.
        noise: square root of psi at the start of training, in the data's units.

    The posterior is a normal whose full covariance is the same for every row, so that bounds, gaps and diagonal
    families can be checked exactly.

    Edit: tie psi to one number for probabilistic PCA, or put a sparse prior on z (the evidence then has no closed
    form).

    Raises:
        UserError: the noise is not positive.

    Source: Rubin and Thayer (1982), *EM algorithms for ML factor analysis*, doi:10.1007/BF02293851.

    >>> FactorAnalysis(columns=5, latent=2).evidence(torch.zeros(3, 5)).shape
    torch.Size([3])
    """

    support = constraints.real

    def __init__(self, *, columns: int, latent: int, noise: float = 1.0) -> None:
        super().__init__()
        if not (noise > 0 and math.isfinite(noise)):
            raise pvae.UserError(f"FactorAnalysis: noise is {noise}, but it must be positive")
        self.prior = pvae.priors.StandardNormal(latent)
        self.loadings = nn.Parameter(torch.randn(columns, latent) / math.sqrt(latent))
        self.offset = nn.Parameter(torch.zeros(columns))
        self.log_psi = nn.Parameter(torch.full((columns,), 2 * math.log(noise)))

    @local_method
    def model(self, x: Tensor, index: Tensor | None = None) -> None:
        """Draw z [B, D] for each row of x [B, columns] and observe x."""
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", self.prior())
            mean = z @ self.loadings.T + self.offset
            pyro.sample("x", dist.Normal(mean, (self.log_psi / 2).exp()).to_event(1), obs=x)

    def evidence(self, x: Tensor) -> Tensor:
        """Return log p(x) of each row, [B] in nats."""
        return dist.LowRankMultivariateNormal(self.offset, self.loadings, self.log_psi.exp()).log_prob(x)
