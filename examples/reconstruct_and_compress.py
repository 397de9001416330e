"""Encode and decode rows: rate, distortion and reconstruction error, against PCA of the same dimension.

python examples/reconstruct_and_compress.py [epochs]
"""

import math
import sys

import torch
from sklearn.decomposition import PCA

import pvae
from pvae.stats import mean_se, number

epochs = int(sys.argv[1]) if len(sys.argv) > 1 else 200
data, D = pvae.load_data("digits", binarize="threshold"), 8
torch.manual_seed(0)
vae = pvae.VAE(pvae.networks.MLP(D, 64, hidden=[128]), pvae.likelihoods.Bernoulli(), pvae.priors.StandardNormal(D))
guide = pvae.Amortized(pvae.networks.MLP(64, 2 * D, hidden=[128]), pvae.families.DiagonalNormal(D))
pvae.fit(vae.model, guide, data, epochs=epochs, learning_rate=2e-3)

codes = pvae.applications.encode(vae.model, guide, data.test)  # mean and sd of q(z|x), [B, D]; rate, distortion
decoded = pvae.applications.decode(vae.model, guide, codes.mean)  # means of p(x|z), [B, 64]
pca = PCA(D).fit(data.train)
projected = torch.from_numpy(pca.inverse_transform(pca.transform(data.test))).clamp(0, 1)
for name, x in {"VAE": decoded, "PCA": projected}.items():
    print(f"{name}, {D} numbers: squared error {number(mean_se((x - data.test).square().mean(1)))} per pixel")

# Rate and distortion add up to the cost of lossless bits-back coding, -ELBO in bits.
distortion = codes.distortion / math.log(2)
pixels = torch.distributions.Bernoulli(data.train.mean(0).clamp(0.001, 0.999))
independent = -pixels.log_prob(data.test).sum(1) / math.log(2)
print(f"rate {number(mean_se(codes.rate))} bits, distortion {number(mean_se(distortion))} bits:", end=" ")
print(f"{number(mean_se(codes.rate + distortion))} bits per row")
print(f"  independent pixels {number(mean_se(independent))} bits per row, uncompressed 64")
