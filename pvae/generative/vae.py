"""The default Pyro program: a latent z for every datapoint, a decoder, a likelihood."""

from __future__ import annotations

import pyro
from torch import Tensor, nn

from pvae.generative.likelihoods import Likelihood
from pvae.generative.priors import Prior
from pvae.runtime.pyro_params import LocalModule, local_method

__all__ = ["VAE"]


class VAE(LocalModule):
    r"""The generative half of a variational autoencoder, :math:`p(x) = \int p(x | \eta(z))\, p(z)\, dz`.

    Arguments:
        decoder: z [..., D] to the likelihood's parameters eta.
        likelihood: eta to p(x|z).
        prior: p(z).

    ``model(x, index)`` is a Pyro program with plate "data" and sites "z" and "x"; it goes with any guide of the
    same signature into Pyro's ``SVI`` or into `fit`.

    Source: Kingma and Welling (2014), *Auto-Encoding Variational Bayes*, arXiv:1312.6114.

    >>> import torch
    >>> from pvae.generative.networks import MLP
    >>> from pvae.generative.likelihoods import Bernoulli
    >>> from pvae.generative.priors import StandardNormal
    >>> vae = VAE(MLP(2, 64, hidden=[32]), Bernoulli(), StandardNormal(2))
    >>> trace = pyro.poutine.trace(vae.model).get_trace(torch.zeros(5, 64))
    >>> trace.nodes["z"]["value"].shape
    torch.Size([5, 2])
    """

    def __init__(self, decoder: nn.Module, likelihood: Likelihood, prior: Prior) -> None:
        super().__init__()
        self.decoder = decoder
        self.likelihood = likelihood
        self.prior = prior

    @local_method
    def model(self, x: Tensor, index: Tensor | None = None) -> None:
        """Draw z for each row of x [B, D] and observe x; ``index`` [B] tells which datapoints they are."""
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", self.prior())
            pyro.sample("x", self.likelihood(self.decoder(z)), obs=x)
