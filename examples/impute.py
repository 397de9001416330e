"""Train on rows of which entries are missing, and fill in those of new rows: means, intervals, draws.

python examples/impute.py [epochs]
"""

import sys
from dataclasses import replace

import torch

import pvae
from pvae.stats import mean_se, number

epochs = int(sys.argv[1]) if len(sys.argv) > 1 else 200
data = pvae.load_data("digits")
lost = torch.rand(data.train.shape, generator=torch.Generator().manual_seed(0)) < 0.3
rows = data.train.masked_fill(lost, torch.nan)
data = replace(data, train=rows, means=rows.nanmean(0))  # of a file with NaN: load(path, missing=True)
print(data.summary())

torch.manual_seed(0)
vae = pvae.VAE(
    pvae.networks.MLP(8, 64, hidden=[128]), pvae.likelihoods.Gaussian(scale=0.3), pvae.priors.StandardNormal(8)
)
encoder = pvae.networks.ImputeMeans(
    pvae.networks.MLP(64, 16, hidden=[128]), data.means
)  # sees the columns' means in the place of what is missing
guide = pvae.Amortized(encoder, pvae.families.DiagonalNormal(8))
pvae.fit(
    pvae.mask_missing(vae.model), guide, data, epochs=epochs, learning_rate=2e-3
)  # scores the entries that are there

x = data.test[:200]
hidden = torch.rand(x.shape, generator=torch.Generator().manual_seed(1)) < 0.5
found = pvae.applications.impute(vae.model, guide, x.masked_fill(hidden, torch.nan), draws=20)


def error(filled):
    return number(mean_se(((filled - x).square() * hidden).sum(1) / hidden.sum(1)))


print("squared error per hidden entry, half of each row's hidden:")
print(f"  columns' means {error(data.means)}, imputed means {error(found.x)}, a single draw {error(found.draws[0])}")
inside = ((found.x - x).abs() < 1.645 * found.sd) & hidden
print(f"  90% intervals hold {number(mean_se(100 * inside.sum(1) / hidden.sum(1)))}% of them")
print("squared distance of hidden entries from their columns' means, which imputed means make too small:")
spread = {"the rows": x, "draws": found.draws[0], "means": found.x}
apart = {name: ((each - data.means).square() * hidden).sum(1) / hidden.sum(1) for name, each in spread.items()}
print("  " + ", ".join(f"{name} {number(mean_se(each))}" for name, each in apart.items()))
