"""A VAE with clusters: each has its place in the latent space and its own template of a row."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pvae.generative.likelihoods import Likelihood
from pvae.generative.priors import GaussianMixture
from pvae.runtime.pyro_params import LocalModule, local_method


class GaussianMixtureVAE(LocalModule):
    r"""Clusters summed out exactly, :math:`p(x, z) = \sum_c \pi_c\, N(z; m_c, s_c^2)\, p(x | \eta(z) + t_c)`.

    Story: a datapoint has a cluster c ~ Categorical(pi); its latent is z ~ N(m_c, diag s_c^2); its row is drawn from
    the likelihood, x ~ p(x | decoder(z) + t_c), where t_c is the cluster's template, on the scale of eta.
    A VAE with a Gaussian mixture as its prior lacks t: there c tells nothing about x that z does not.

    Arguments:
        columns: number of values in a row x.
        latent: D, the number of latent dimensions.
        likelihood: eta to p(x|z, c).
        decoder: z [..., D] to eta.
        components: number of clusters; time and memory of the likelihood grow with it.

    No site draws c: "z" comes from the mixture, and "x" from the mixture of the clusters' rows with weights p(c|z).
    Edit: give each cluster its own decoder, or a full covariance.

    Raises:
        UserError: fewer than 1 component.

    Source: Jiang, Zheng, Tan, Tang, Zhou (2017), *Variational Deep Embedding*, arXiv:1611.05148.

    >>> from pvae.generative.likelihoods import Bernoulli
    >>> program = GaussianMixtureVAE(columns=64, latent=4, likelihood=Bernoulli(), decoder=nn.Linear(4, 64))
    >>> program.responsibilities(torch.zeros(5, 4), torch.zeros(5, 64)).shape
    torch.Size([5, 10])
    """

    def __init__(
        self, *, columns: int, latent: int, likelihood: Likelihood, decoder: nn.Module, components: int = 10
    ) -> None:
        super().__init__()
        self.likelihood, self.decoder = likelihood, decoder
        self.clusters = GaussianMixture(latent, components=components)
        self.templates = nn.Parameter(torch.zeros(components, likelihood.params_per_value * columns))

    @local_method
    def model(self, x: Tensor, index: Tensor | None = None) -> None:
        """Draw z [B, D] for each row of x [B, columns] and observe x."""
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", self.clusters())
            weights = dist.Categorical(logits=self._joint(z))
            pyro.sample("x", dist.MixtureSameFamily(weights, self._rows(z)), obs=x)

    def responsibilities(self, z: Tensor, x: Tensor | None = None) -> Tensor:
        """p(c|z), or p(c|z, x) for rows x [..., columns], of latents z [..., D]: [..., components]."""
        seen = 0 if x is None else self._rows(z).log_prob(x.unsqueeze(-2))
        return (self._joint(z) + seen).softmax(-1)

    def _joint(self, z: Tensor) -> Tensor:
        """log p(c, z), [..., components]."""
        places = dist.Normal(self.clusters.means, self.clusters.log_scales.exp()).to_event(1)
        return self.clusters.logits.log_softmax(-1) + places.log_prob(z.unsqueeze(-2))

    def _rows(self, z: Tensor) -> dist.TorchDistribution:
        """p(x|z, c), [..., components]."""
        return self.likelihood(self.decoder(z).unsqueeze(-2) + self.templates)
