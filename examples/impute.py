"""Train on rows with missing entries, and impute those of new rows: means, intervals, draws.

python examples/impute.py [epochs]
"""

import sys
from dataclasses import replace

import torch

import pvae
from pvae.stats import mean_se, number

epochs = int(sys.argv[1]) if len(sys.argv) > 1 else 200
data = pvae.load_data("digits")
missing = torch.rand(data.train.shape, generator=torch.Generator().manual_seed(0)) < 0.3
rows = data.train.masked_fill(missing, torch.nan)
data = replace(data, train=rows, means=rows.nanmean(0))  # from a file with NaN: load_data(path, missing=True)
print(data.summary())

torch.manual_seed(0)
vae = pvae.VAE(
    pvae.networks.MLP(8, 64, hidden=[128]), pvae.likelihoods.Gaussian(scale=0.3), pvae.priors.StandardNormal(8)
)
# The encoder sees column means in the place of missing entries; the likelihood scores observed entries only.
encoder = pvae.networks.ImputeMeans(pvae.networks.MLP(64, 16, hidden=[128]), data.means)
guide = pvae.Amortized(encoder, pvae.families.DiagonalNormal(8))
pvae.fit(pvae.mask_missing(vae.model), guide, data, epochs=epochs, learning_rate=2e-3)

x = data.test[:200]
hidden = torch.rand(x.shape, generator=torch.Generator().manual_seed(1)) < 0.5
imputed = pvae.applications.impute(vae.model, guide, x.masked_fill(hidden, torch.nan), draws=20)


def over_hidden(values):
    """Mean over hidden entries of each row, then over rows with its standard error."""
    return number(mean_se((values * hidden).sum(1) / hidden.sum(1)))


estimates = {"column means": data.means, "imputed means": imputed.x, "a single draw": imputed.draws[0]}
print("squared error per hidden entry, half of the entries of each row hidden:")
print("  " + ", ".join(f"{name} {over_hidden((estimate - x).square())}" for name, estimate in estimates.items()))
covered = 100.0 * ((imputed.x - x).abs() < 1.645 * imputed.sd)
print(f"  90% intervals cover {over_hidden(covered)}% of them")
print("squared distance of hidden entries from their column means, which is too small for imputed means:")
values = {"rows": x, "draws": imputed.draws[0], "imputed means": imputed.x}
print("  " + ", ".join(f"{name} {over_hidden((value - data.means).square())}" for name, value in values.items()))
