"""Interpolate between rows through the latent space: midpoints are nearer to the data than averages of pixels.

python examples/interpolate.py [epochs]
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
pvae.fit(vae.model, guide, data, epochs=epochs, learning_rate=2e-3)


def distance(x):
    """Root mean squared distance to the nearest training row."""
    return torch.cdist(x, data.train).amin(1) / 8


x = data.test[:200]  # pairs: rows 0 and 1, 1 and 2, and so on
print(f"distance to the nearest training row: test rows {number(mean_se(distance(x)))}")
print(f"  averages of two test rows {number(mean_se(distance((x[:-1] + x[1:]) / 2)))}")
for how in ("linear", "spherical"):
    path = pvae.applications.interpolate(vae.model, guide, x, steps=2, how=how)  # z [S, D], x [S, C], at [S]
    ends, middle = path.z[::2].norm(dim=1), path.z[1::2].norm(dim=1)
    print(f"  midpoints of {how} paths {number(mean_se(distance(path.x[1::2])))};", end=" ")
    print(f"norm of codes {number(mean_se(ends))} at the rows, {number(mean_se(middle))} at midpoints")

images = pvae.applications.interpolate(vae.model, guide, x[:2], steps=6).x.view(7, 8, 8).clamp(0, 1)
print(f"linear, from a {data.test_labels[0]} to a {data.test_labels[1]}:")
for lines in images.transpose(0, 1).tolist():
    print("  ".join("".join(" .:+#"[round(4 * ink)] * 2 for ink in line) for line in lines))
