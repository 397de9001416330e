"""Go from row to row through the latent space: what lies halfway is nearer to the data than a blend of both.

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
    """From the nearest training row, root mean square over pixels."""
    return torch.cdist(x, data.train).amin(1) / 8


x = data.test[:200]  # pairs: rows 0 and 1, 1 and 2, and so on
print(f"distance from the nearest training row: test rows {number(mean_se(distance(x)))}")
print(f"  halfway between two of them, a blend of pixels {number(mean_se(distance((x[:-1] + x[1:]) / 2)))}")
for how in ("linear", "spherical"):
    path = pvae.applications.interpolate(
        vae.model, guide, x, steps=2, how=how
    )  # z [S, D], x [S, C], and where they are, at [S]
    ends, middle = path.z[::2].norm(dim=1), path.z[1::2].norm(dim=1)
    print(f"  {how} path through the codes {number(mean_se(distance(path.x[1::2])))};", end=" ")
    print(f"norm of codes {number(mean_se(ends))} at the rows, {number(mean_se(middle))} halfway")

way = pvae.applications.interpolate(vae.model, guide, x[:2], steps=6).x.view(7, 8, 8)
print(f"linear, from a {data.test_labels[0]} to a {data.test_labels[1]}:")
for line in range(8):
    print(
        "  ".join("".join(" .:+#"[round(4 * min(max(ink, 0), 1))] * 2 for ink in row) for row in way[:, line].tolist())
    )
