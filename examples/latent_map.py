"""Map a two-dimensional latent space: codes, decoded grid, and how well codes separate the digits.

python examples/latent_map.py [epochs] [a page to write, such as map.html]
"""

import sys
from pathlib import Path

import torch
from sklearn.decomposition import PCA
from sklearn.neighbors import KNeighborsClassifier

import pvae
from pvae.reporting.latent_map_widget import render_page, render_widget

epochs = int(sys.argv[1]) if len(sys.argv) > 1 else 300
data = pvae.load_data("digits", binarize="threshold")
torch.manual_seed(0)
vae = pvae.VAE(pvae.networks.MLP(2, 64, hidden=[128, 128]), pvae.likelihoods.Bernoulli(), pvae.priors.StandardNormal(2))
guide = pvae.Amortized(pvae.networks.MLP(64, 4, hidden=[128, 128]), pvae.families.DiagonalNormal(2))
pvae.fit(vae.model, guide, data, epochs=epochs, learning_rate=2e-3)


def mean(values):
    return pvae.stats.number(pvae.stats.mean_se(values))


latent_map = pvae.applications.map_latents(vae.model, guide, data.test, size=20)
xs, ys = latent_map.grid_x, latent_map.grid_y
print(f"{len(latent_map.codes)} codes; a grid of {len(ys)} x {len(xs)} points is decoded,", end=" ")
print(f"from {xs[0]:.1f} to {xs[-1]:.1f} and from {ys[0]:.1f} to {ys[-1]:.1f}")
width = latent_map.spread.det().clamp(min=0).pow(0.25)
print(f"geometric mean of q's two standard deviations {mean(width)}; the prior's is 1")

index = torch.arange(len(data.train))
train_codes = pvae.applications.map_latents(vae.model, guide, data.train, index).codes
pca = PCA(2).fit(data.train)
planes = {
    "latent plane": (train_codes, latent_map.codes),
    "PCA": (pca.transform(data.train), pca.transform(data.test)),
}
for name, (train, test) in planes.items():
    predicted = KNeighborsClassifier(5).fit(train, data.train_labels).predict(test)
    correct = 100 * (torch.from_numpy(predicted) == data.test_labels).double()
    print(f"{name}: accuracy of five nearest neighbours {mean(correct)}%")

if len(sys.argv) > 2:
    widget = render_widget(latent_map, data.test_labels, data.shape)
    Path(sys.argv[2]).write_text(render_page("Digits", [("Latent plane", widget)]))
    print(f"written: {sys.argv[2]}")
