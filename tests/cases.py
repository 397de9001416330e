"""A small instance of every component. One line here puts a new component under every law of test_components."""

from pvae import families, likelihoods, networks, priors

LATENT, COLUMNS = 3, 5  # D of the latent, and values in one row of data

LIKELIHOODS = {
    "Bernoulli": likelihoods.Bernoulli,
    "Gaussian": lambda: likelihoods.Gaussian(scale=0.5),
}

PRIORS = {
    "StandardNormal": lambda: priors.StandardNormal(LATENT),
}

FAMILIES = {
    "DiagonalNormal": lambda: families.DiagonalNormal(LATENT),
    "Delta": lambda: families.Delta(LATENT),
}

NETWORKS = {
    "MLP": lambda: networks.MLP(COLUMNS, LATENT, hidden=[4, 6]),
}
