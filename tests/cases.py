"""A small instance of every component. One line here puts a new component under every law of test_components."""

import torch

from pvae.generative import likelihoods, networks, priors
from pvae.inference import families

LATENT, COLUMNS = 3, 5  # D of the latent, and values in one row of data

LIKELIHOODS = {
    "Bernoulli": likelihoods.Bernoulli,
    "ContinuousBernoulli": likelihoods.ContinuousBernoulli,
    "Gaussian": lambda: likelihoods.Gaussian(scale=0.5),
    "Gaussian(fixed)": lambda: likelihoods.Gaussian(scale=0.5, spread="fixed"),
    "Gaussian(decoder)": lambda: likelihoods.Gaussian(scale=0.5, spread="decoder"),
    "StudentT": likelihoods.StudentT,
    "StudentT(decoder)": lambda: likelihoods.StudentT(spread="decoder"),
    "Laplace": likelihoods.Laplace,
    "Laplace(decoder)": lambda: likelihoods.Laplace(scale=2.0, spread="decoder"),
    "Beta": likelihoods.Beta,
    "DiscretizedLogistic": likelihoods.DiscretizedLogistic,
    "DiscretizedLogistic(mixture)": lambda: likelihoods.DiscretizedLogistic(levels=8, components=3),
    "Categorical": lambda: likelihoods.Categorical(levels=4),
    "Poisson": likelihoods.Poisson,
    "NegativeBinomial": likelihoods.NegativeBinomial,
    "ZeroInflatedNegativeBinomial": likelihoods.ZeroInflatedNegativeBinomial,
}

UNIT_ROWS = torch.linspace(0, 1, 20 * COLUMNS).view(20, COLUMNS)


def vamp(family, data):
    """A VampPrior over a fixed encoder that follows its inputs' type."""
    weights = torch.arange(family.num_params * COLUMNS).view(family.num_params, COLUMNS).sin()
    return priors.VampPrior(LATENT, pseudo_inputs=30, posterior=lambda u: family(u @ weights.mT.to(u) / 2), data=data)


PRIORS = {
    "StandardNormal": lambda: priors.StandardNormal(LATENT),
    "DiagonalNormal": lambda: priors.DiagonalNormal(LATENT),
    "Laplace": lambda: priors.Laplace(LATENT, scale=0.7),
    "StudentT": lambda: priors.StudentT(LATENT, df=6.0),
    "GaussianMixture": lambda: priors.GaussianMixture(LATENT, components=4),
    "VampPrior": lambda: vamp(families.DiagonalNormal(LATENT), UNIT_ROWS),
    "VampPrior(FullRankNormal)": lambda: vamp(families.FullRankNormal(LATENT), UNIT_ROWS),
    "VampPrior(real data)": lambda: vamp(families.DiagonalNormal(LATENT), 3 * UNIT_ROWS),
    "FlowPrior": lambda: priors.FlowPrior(LATENT, transforms=2, hidden=[8], bins=4),
    "FlowPrior(autoregressive)": lambda: priors.FlowPrior(LATENT, kind="autoregressive", hidden=[8], bins=4),
}

FAMILIES = {
    "DiagonalNormal": lambda: families.DiagonalNormal(LATENT),
    "Delta": lambda: families.Delta(LATENT),
    "LowRankNormal": lambda: families.LowRankNormal(LATENT),
    "FullRankNormal": lambda: families.FullRankNormal(LATENT),
    "MixtureOfNormals": lambda: families.MixtureOfNormals(LATENT),
    "FlowFamily": lambda: families.FlowFamily(LATENT, hidden=[8], bins=4, context=2),
}

NETWORKS = {
    "MLP": lambda: networks.MLP(COLUMNS, LATENT, hidden=[4, 6]),
    "MLP(decodes)": lambda: networks.MLP(COLUMNS, LATENT, hidden=[4, 6], decodes=True),
    "MLP(GLU)": lambda: networks.MLP(COLUMNS, LATENT, hidden=[4, 6], activation="GLU"),
    "ResidualMLP": lambda: networks.ResidualMLP(COLUMNS, LATENT, width=6),
    "ResidualMLP(decodes)": lambda: networks.ResidualMLP(COLUMNS, LATENT, width=6, activation="GLU", decodes=True),
    "Conv": lambda: networks.Conv(COLUMNS, LATENT, shape=[1, 5], channels=[2, 3], hidden=[4]),
    "Conv(decodes)": lambda: networks.Conv(
        COLUMNS, LATENT, shape=[1, 3], channels=[2, 3], hidden=[4], activation="ELU", decodes=True
    ),
    "Conv(GLU)": lambda: networks.Conv(COLUMNS, LATENT, shape=[5, 1, 1], channels=[2], hidden=[4], activation="GLU"),
}
