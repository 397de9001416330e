"""Your own likelihood, prior and posterior family: write each as a class, and refer to it as file.py:Class.

python examples/my_components.py [epochs]
pvae fit --likelihood examples/my_components.py:Geometric --epochs 2
"""

import sys

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints

import pvae
from pvae import recipes


class Geometric(pvae.likelihoods.Likelihood):
    r"""Geometric likelihood of counts, :math:`p(x|z) = \prod_d q_d^{x_d} (1 - q_d)`, log-odds of q eta."""

    support = constraints.nonnegative_integer
    base_measure = "mass"

    def forward(self, eta: Tensor) -> dist.TorchDistribution:
        return dist.Geometric(logits=-eta).to_event(1)


class SpikeAndSlab(pvae.priors.Prior):
    r"""Spike-and-slab prior, :math:`p(z) = \prod_d w N(z_d; 0, s^2) + (1 - w) N(z_d; 0, 1)`, w learned."""

    def __init__(self, dim: int, *, spike: float = 0.1) -> None:
        super().__init__(dim)
        self.logits = nn.Parameter(torch.zeros(2))
        self.register_buffer("scales", torch.tensor([spike, 1.0]))

    def forward(self) -> dist.TorchDistribution:
        weights = dist.Categorical(logits=self.logits.expand(self.dim, 2))
        return dist.MixtureSameFamily(weights, dist.Normal(0.0, self.scales.expand(self.dim, 2))).to_event(1)


class Laplace(pvae.families.Family):
    r"""Independent Laplace family, :math:`q(z|x) = \prod_d e^{-|z_d - m_d| / b_d} / 2 b_d`, of m and log b."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.num_params = 2 * dim

    def forward(self, q_params: Tensor) -> dist.TorchDistribution:
        mean, log_scale = q_params.chunk(2, -1)
        return dist.Laplace(mean, pvae.families.positive_scale(log_scale)).to_event(1)


if __name__ == "__main__":
    recipe = recipes.resolve(
        pvae.Recipe(
            data="digits",
            likelihood=f"{__file__}:Geometric",
            prior=f"{__file__}:SpikeAndSlab(spike=0.05)",
            family=f"{__file__}:Laplace",
            epochs=int(sys.argv[1]) if len(sys.argv) > 1 else 50,
        )
    )
    data = recipes.load_recipe_data(recipe)
    print(data.summary())
    fitted = recipes.fit_recipe(recipes.build_model(recipe, data), data)
    iwae = pvae.diagnostics.bounds(fitted.model, fitted.guide, data.test, K=100).summary()["iwae"]
    print(f"test IWAE-100: {pvae.stats.number(iwae)} nats per row (log probability mass)")
    print(f"weight of the spike: {fitted.program.prior.logits.softmax(-1)[0].item():.2f}")
