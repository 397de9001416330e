"""Take noise away: the mean of a row given what is seen of it, beside a mere pass through encoder and decoder.

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
pvae.fit(vae.model, guide, data, epochs=epochs, learning_rate=2e-3)  # clean rows alone

x = data.test[:200]
for scale in (0.1, 0.3, 0.5):
    noise = pvae.noise.GaussianNoise(scale=scale)
    y = noise.added(x)
    found = pvae.applications.denoise(vae.model, guide, y, noise)
    passed = pvae.applications.reconstruct(vae.model, guide, y, K=20)
    told = {"seen": y, "encoded and decoded": passed, "denoised": found.x}
    errors = [f"{name} {number(mean_se((each - x).square().mean(1).sqrt()))}" for name, each in told.items()]
    inside = 100 * ((found.x - x).abs() < 1.645 * found.sd).double().mean(1)
    print(f"noise of {scale}: error (root mean square) {', '.join(errors)};")
    print(f"  90% intervals hold {number(mean_se(inside))}% of the clean pixels")
