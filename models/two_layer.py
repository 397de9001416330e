"""Two stochastic layers: the prior of the lower latent is a learned function of the upper latent."""

from __future__ import annotations

from collections.abc import Sequence

import pyro
from torch import Tensor, nn

import pvae
from pvae.runtime import LocalModule, local_method


class TwoLayer(LocalModule):
    r"""VAE with two stochastic layers, :math:`p(x) = \int p(x | z_1)\, N(z_1; f(z_2), s^2(z_2))\, N(z_2; 0, I)\, dz`.

    Story: the upper latent is z2 ~ N(0, I); a network maps it to mean and scale of the lower latent,
    z1 ~ N(f(z2), diag s(z2)^2); the row is drawn from the likelihood, x ~ p(x | decoder(z1)).

    Arguments:
        latent: D, the number of dimensions of z1.
        likelihood: eta to p(x|z1).
        decoder: z1 [..., D] to the likelihood's parameters eta.
        top: number of dimensions of z2.
        hidden: widths of the network from z2 to z1.
        activation: of that network.

    Edit: add a third layer, let x depend on z2 as well, or put another prior on z2.

    Source: Burda, Grosse, Salakhutdinov (2016), *Importance Weighted Autoencoders*, arXiv:1509.00519.

    >>> import torch
    >>> program = TwoLayer(latent=4, likelihood=pvae.likelihoods.Bernoulli(), decoder=pvae.networks.MLP(4, 64))
    >>> trace = pyro.poutine.trace(program.model).get_trace(torch.zeros(5, 64))
    >>> trace.nodes["z2"]["value"].shape, trace.nodes["z1"]["value"].shape
    (torch.Size([5, 2]), torch.Size([5, 4]))
    """

    def __init__(
        self,
        *,
        latent: int,
        likelihood: pvae.likelihoods.Likelihood,
        decoder: nn.Module,
        top: int = 2,
        hidden: Sequence[int] = (64,),
        activation: str = "Tanh",
    ) -> None:
        super().__init__()
        self.likelihood, self.decoder = likelihood, decoder
        self.upper, self.lower = pvae.priors.StandardNormal(top), pvae.families.DiagonalNormal(latent)
        self.network = pvae.networks.MLP(top, self.lower.num_params, hidden=hidden, activation=activation)

    @local_method
    def model(self, x: Tensor, index: Tensor | None = None) -> None:
        """Draw z2 [B, top] and z1 [B, D] for each row of x [B, columns] and observe x."""
        with pyro.plate("data", len(x), dim=-1):
            z2 = pyro.sample("z2", self.upper())
            z1 = pyro.sample("z1", self.lower(self.network(z2)))
            pyro.sample("x", self.likelihood(self.decoder(z1)), obs=x)
