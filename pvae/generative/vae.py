"""The default generative program of a variational autoencoder (VAE)."""

from __future__ import annotations

import pyro
from torch import Tensor, nn

from pvae.generative.likelihoods import Likelihood
from pvae.generative.priors import Prior
from pvae.runtime.pyro_params import LocalModule, local_method

__all__ = ["VAE"]


class VAE(LocalModule):
    r"""Generative program of a variational autoencoder (VAE), :math:`p(x) = \int p(x | \eta(z))\, p(z)\, dz`.

    Arguments:
        decoder: maps z [..., D] to the likelihood's parameters eta.
        likelihood: maps eta to p(x|z).
        prior: p(z).

    ``model(x, index)`` is a Pyro program with plate "data" and sites "z" and "x", for Pyro's ``SVI`` or `fit` with any
    guide of the same signature.

    Source: Kingma and Welling (2014), *Auto-Encoding Variational Bayes*, arXiv:1312.6114.

    >>> import pvae, torch
    >>> vae = VAE(pvae.networks.MLP(2, 64, hidden=[32]), pvae.likelihoods.Bernoulli(), pvae.priors.StandardNormal(2))
    >>> trace = pyro.poutine.trace(vae.model).get_trace(torch.zeros(5, 64))
    >>> trace.nodes["z"]["value"].shape
    torch.Size([5, 2])
    """

    def __init__(self, decoder: nn.Module, likelihood: Likelihood, prior: Prior) -> None:
        super().__init__()
        self.decoder, self.likelihood, self.prior = decoder, likelihood, prior

    @local_method
    def model(self, x: Tensor, index: Tensor | None = None) -> None:
        """Draw z for each row of x [B, D] and observe x; ``index`` [B] is ignored."""
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", self.prior())
            pyro.sample("x", self.likelihood(self.decoder(z)), obs=x)
