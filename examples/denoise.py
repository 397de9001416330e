"""Denoise rows by the posterior mean, and compare with encoding and decoding alone.

python examples/denoise.py [epochs]
"""

import sys

import torch

import pvae
from pvae.stats import mean_se, number

epochs = int(sys.argv[1]) if len(sys.argv) > 1 else 200
data = pvae.load_data("digits")
torch.manual_seed(0)
vae = pvae.VAE(
    pvae.networks.MLP(8, 64, hidden=[128]), pvae.likelihoods.Gaussian(scale=0.3), pvae.priors.StandardNormal(8)
)
guide = pvae.Amortized(pvae.networks.MLP(64, 16, hidden=[128]), pvae.families.DiagonalNormal(8))
pvae.fit(vae.model, guide, data, epochs=epochs, learning_rate=2e-3)  # clean rows only

x = data.test[:200]
for scale in (0.1, 0.3, 0.5):
    noise = pvae.noise.GaussianNoise(scale=scale)
    y = noise.add_to(x)
    denoised = pvae.applications.denoise(vae.model, guide, y, noise)
    decoded = pvae.applications.reconstruct(vae.model, guide, y, K=20)
    estimates = {"noisy": y, "encoded and decoded": decoded, "denoised": denoised.x}
    errors = {name: mean_se((estimate - x).square().mean(1).sqrt()) for name, estimate in estimates.items()}
    coverage = mean_se(100 * ((denoised.x - x).abs() < 1.645 * denoised.sd).double().mean(1))
    print(f"noise of {scale}: root mean squared error " + ", ".join(f"{n} {number(e)}" for n, e in errors.items()))
    print(f"  90% intervals cover {number(coverage)}% of the clean pixels")
