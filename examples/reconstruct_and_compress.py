"""Encode and decode rows; what their codes cost, and how well they are rebuilt, beside as many principal components.

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

codes = pvae.applications.encode(vae.model, guide, data.test)  # mean and sd of q(z|x), [B, D], and what they cost
rebuilt = pvae.applications.decode(vae.model, guide, codes.mean)  # means of p(x|z), [B, 64]
pca = PCA(D).fit(data.train)
projected = torch.from_numpy(pca.inverse_transform(pca.transform(data.test))).clamp(0, 1)
for name, x in {"VAE": rebuilt, "PCA": projected}.items():
    print(f"{name}, {D} numbers: squared error {number(mean_se((x - data.test).square().mean(1)))} per pixel")

# Both parts together are what a row takes without loss, by bits-back coding: -ELBO in bits.
rest = codes.distortion / math.log(2)
ink = torch.distributions.Bernoulli(data.train.mean(0).clamp(0.001, 0.999))
alone = -ink.log_prob(data.test).sum(1) / math.log(2)
print(f"rate {number(mean_se(codes.rate))} bits for a code, and {number(mean_se(rest))} bits for x given the code:")
print(
    f"  {number(mean_se(codes.rate + rest))} bits per row; {number(mean_se(alone))} bits pixel by pixel, 64 as stored"
)
