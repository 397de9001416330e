"""Compare an autoencoder with a VAE: reconstruction error, and what the rest of the latent space decodes to.

python examples/autoencoder.py [epochs]
"""

import sys

import torch

import pvae
from pvae.stats import mean_se, number

epochs = int(sys.argv[1]) if len(sys.argv) > 1 else 200
data, D = pvae.load_data("digits"), 8
# With a point mass as q(z|x) and no KL only the reconstruction is trained: an autoencoder.
variants = {
    "autoencoder": (pvae.families.Delta(D), pvae.objectives.ELBO(kl_weight=0)),
    "VAE": (pvae.families.DiagonalNormal(D), pvae.objectives.ELBO()),
}
for name, (family, objective) in variants.items():
    torch.manual_seed(0)
    vae = pvae.VAE(
        pvae.networks.MLP(D, 64, hidden=[128]), pvae.likelihoods.Gaussian(scale=0.3), pvae.priors.StandardNormal(D)
    )
    guide = pvae.Amortized(pvae.networks.MLP(64, family.num_params, hidden=[128]), family)
    pvae.fit(vae.model, guide, data, epochs=epochs, learning_rate=2e-3, objective=objective)

    codes = pvae.applications.encode(vae.model, guide, data.test)
    geometry = pvae.diagnostics.measure_latent_geometry(vae.model, guide, data.test, data.train)
    summary = geometry.summary()
    print(f"{name}: root mean squared error of reconstructed test rows {number(mean_se(codes.error.sqrt()))}")
    print(f"  distance to the nearest training row: reconstructions {number(mean_se(geometry.rows))},", end=" ")
    print(f"prior draws {number(mean_se(geometry.prior))}, midpoints of codes {number(mean_se(geometry.between))}")
    print(f"  farther than 95% of reconstructions: {number(summary['vacuum_prior'])} of prior draws,", end=" ")
    print(f"{number(summary['vacuum_between'])} of midpoints")
    print(f"  95th percentile of the decoder's steepness: {number(summary['roughness'])} times its median")
