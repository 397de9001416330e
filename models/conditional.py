"""Conditional VAE: the label is given, and the latent describes the rest of the row."""

from __future__ import annotations

import pyro
import torch
from torch import Tensor, nn

import pvae
from pvae.runtime import LocalModule, local_method


class ConditionalVAE(LocalModule):
    r"""Conditional VAE, :math:`p(x | y) = \int p(x | \eta(z + E y))\, p(z)\, dz`.

    Story: a datapoint comes with its one-hot label y, which is not modelled; its style z ~ p(z) is independent of
    the label; the label shifts z by its class's embedding, and the row is drawn, x ~ p(x | decoder(z + E y)).

    Arguments:
        columns: number of values in a row without its label.
        latent: D, the number of latent dimensions.
        classes: number of label classes.
        likelihood: eta to p(x|z, y).
        prior: p(z).
        decoder: z [..., D] to the likelihood's parameters eta.

    Rows hold columns + classes values, the label last; "x" observes the first columns, and the guide receives both.
    The same z under two labels gives one style in two classes.

    Edit: let the label change eta as well, or give each class its own prior.

    Source: Sohn, Lee, Yan (2015), *Learning Structured Output Representation using Deep Conditional Generative
    Models*, NeurIPS 28.

    >>> parts = {"likelihood": pvae.likelihoods.Bernoulli(), "prior": pvae.priors.StandardNormal(4)}
    >>> program = ConditionalVAE(columns=64, latent=4, classes=10, decoder=nn.Linear(4, 64), **parts)
    >>> trace = pyro.poutine.trace(program.model).get_trace(torch.zeros(5, 64 + 10))
    >>> trace.nodes["x"]["value"].shape
    torch.Size([5, 64])
    """

    uses_labels = True

    def __init__(
        self,
        *,
        columns: int,
        latent: int,
        classes: int,
        likelihood: pvae.likelihoods.Likelihood,
        prior: pvae.priors.Prior,
        decoder: nn.Module,
    ) -> None:
        super().__init__()
        self.columns, self.classes = columns, classes
        self.likelihood, self.prior, self.decoder = likelihood, prior, decoder
        self.places = nn.Parameter(torch.randn(classes, latent))

    @local_method
    def model(self, x: Tensor, index: Tensor | None = None) -> None:
        """Draw z [B, D] for each row of x [B, columns + classes] and observe the first columns."""
        values, label = x.split([self.columns, self.classes], -1)
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", self.prior())
            pyro.sample("x", self.likelihood(self.decoder(z + label @ self.places)), obs=values)
