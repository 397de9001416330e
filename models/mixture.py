"""VAE with clusters: each has its own prior component and its own template of a row."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

import pvae
from pvae.runtime import LocalModule, local_method


class GaussianMixtureVAE(LocalModule):
    r"""VAE with clusters summed out, :math:`p(x, z) = \sum_c \pi_c\, N(z; m_c, s_c^2)\, p(x | \eta(z) + t_c)`.

    Story: a datapoint has a cluster c ~ Categorical(pi); its latent is z ~ N(m_c, diag s_c^2); its row is drawn from
    the likelihood, x ~ p(x | decoder(z) + t_c), where t_c is the cluster's template, on the scale of eta.
    A VAE with a Gaussian mixture as its prior lacks t: there x is independent of c given z.

    Arguments:
        columns: number of values in a row x.
        latent: D, the number of latent dimensions.
        likelihood: eta to p(x|z, c).
        decoder: z [..., D] to eta.
        components: number of clusters; time and memory of the likelihood are proportional to it.

    No site draws c: "z" is drawn from the mixture, and "x" from the mixture of the clusters' likelihoods with
    weights p(c|z).
    Edit: give each cluster its own decoder, or a full covariance.

    Raises:
        UserError: fewer than 1 component.

    Source: Jiang, Zheng, Tan, Tang, Zhou (2017), *Variational Deep Embedding*, arXiv:1611.05148.

    >>> likelihood, decoder = pvae.likelihoods.Bernoulli(), nn.Linear(4, 64)
    >>> program = GaussianMixtureVAE(columns=64, latent=4, likelihood=likelihood, decoder=decoder)
    >>> program.responsibilities(torch.zeros(5, 4), torch.zeros(5, 64)).shape
    torch.Size([5, 10])
    """

    def __init__(
        self,
        *,
        columns: int,
        latent: int,
        likelihood: pvae.likelihoods.Likelihood,
        decoder: nn.Module,
        components: int = 10,
    ) -> None:
        super().__init__()
        self.likelihood, self.decoder = likelihood, decoder
        self.clusters = pvae.priors.GaussianMixture(latent, components=components)
        self.templates = nn.Parameter(torch.zeros(components, likelihood.params_per_value * columns))

    @local_method
    def model(self, x: Tensor, index: Tensor | None = None) -> None:
        """Draw z [B, D] for each row of x [B, columns] and observe x."""
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", self.clusters())
            weights = dist.Categorical(logits=self._joint(z))
            pyro.sample("x", dist.MixtureSameFamily(weights, self._rows(z)), obs=x)

    def responsibilities(self, z: Tensor, x: Tensor | None = None) -> Tensor:
        """Return p(c|z), or p(c|z, x) for rows x [..., columns], of latents z [..., D]: [..., components]."""
        log_lik = 0 if x is None else self._rows(z).log_prob(x.unsqueeze(-2))
        return (self._joint(z) + log_lik).softmax(-1)

    def _joint(self, z: Tensor) -> Tensor:
        """Return log p(c, z), [..., components]."""
        components = dist.Normal(self.clusters.means, self.clusters.log_scales.exp()).to_event(1)
        return self.clusters.logits.log_softmax(-1) + components.log_prob(z.unsqueeze(-2))

    def _rows(self, z: Tensor) -> dist.TorchDistribution:
        """Return p(x|z, c), [..., components]."""
        return self.likelihood(self.decoder(z).unsqueeze(-2) + self.templates)
