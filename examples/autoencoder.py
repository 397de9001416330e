"""Train an autoencoder beside a VAE: what do its codes rebuild, and what does the rest of its latent space decode to?

python examples/autoencoder.py [epochs]
"""

import sys

import torch

import pvae
from pvae.stats import mean_se, number

epochs = int(sys.argv[1]) if len(sys.argv) > 1 else 200
data, D = pvae.load_data("digits"), 8
# A point for q(z|x) and no KL leave the reconstruction alone: an autoencoder.
kinds = {
    "autoencoder": (pvae.families.Delta(D), pvae.objectives.ELBO(kl_weight=0)),
    "VAE": (pvae.families.DiagonalNormal(D), pvae.objectives.ELBO()),
}
for name, (family, objective) in kinds.items():
    torch.manual_seed(0)
    vae = pvae.VAE(
        pvae.networks.MLP(D, 64, hidden=[128]), pvae.likelihoods.Gaussian(scale=0.3), pvae.priors.StandardNormal(D)
    )
    guide = pvae.Amortized(pvae.networks.MLP(64, family.size, hidden=[128]), family)
    pvae.fit(vae.model, guide, data, epochs=epochs, learning_rate=2e-3, objective=objective)

    codes = pvae.applications.encode(vae.model, guide, data.test)
    found = pvae.diagnostics.measure_latent_geometry(vae.model, guide, data.test, data.train)
    figures = found.summary()
    print(f"{name}: error of rebuilt test rows {number(mean_se(codes.error.sqrt()))} (root mean square over pixels)")
    print(
        f"  distance from the nearest training row: rebuilt test rows {number(mean_se(found.rows))}",
        end=", ",
    )
    print(
        f"draws from the prior {number(mean_se(found.prior))}, halfway between codes {number(mean_se(found.between))}"
    )
    print(
        f"  share farther than 95% of the rebuilt rows: {number(figures['vacuum_prior'])} of draws from the prior,",
        end=" ",
    )
    print(f"{number(figures['vacuum_between'])} halfway between codes")
    print(f"  the 95th percentile of the decoder's steepness is {number(figures['roughness'])} times its median")
