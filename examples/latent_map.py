"""Lay codes of two dimensions on a plane with what its places decode to, and see which digits keep together there.

python examples/latent_map.py [epochs] [a page to write, such as map.html]
"""

import sys
from pathlib import Path

import torch
from sklearn.decomposition import PCA
from sklearn.neighbors import KNeighborsClassifier

import pvae
from pvae.reporting import render_page, render_widget

epochs = int(sys.argv[1]) if len(sys.argv) > 1 else 300
data = pvae.load_data("digits", binarize="threshold")
torch.manual_seed(0)
vae = pvae.VAE(pvae.networks.MLP(2, 64, hidden=[128, 128]), pvae.likelihoods.Bernoulli(), pvae.priors.StandardNormal(2))
guide = pvae.Amortized(pvae.networks.MLP(64, 4, hidden=[128, 128]), pvae.families.DiagonalNormal(2))
pvae.fit(vae.model, guide, data, epochs=epochs, learning_rate=2e-3)

plane = pvae.applications.map_latents(vae.model, guide, data.test, size=20)
print(f"{len(plane.codes)} codes; {plane.grid.shape[0]} x {plane.grid.shape[1]} places decoded,", end=" ")
print(f"from {plane.across[0]:.1f} to {plane.across[-1]:.1f} and from {plane.up[0]:.1f} to {plane.up[-1]:.1f}")
radius = plane.spread.det().clamp(min=0).pow(0.25)
print(f"a code is {pvae.stats.number(pvae.stats.mean_se(radius))} wide (geometric mean of q's two standard deviations); the prior's is 1")

known = pvae.applications.map_latents(vae.model, guide, data.train, torch.arange(len(data.train))).codes
pca = PCA(2).fit(data.train)
planes = {"latent plane": (known, plane.codes), "PCA": (pca.transform(data.train), pca.transform(data.test))}
for name, (train, test) in planes.items():
    told = KNeighborsClassifier(5).fit(train, data.train_labels).predict(test)
    right = 100 * (torch.from_numpy(told) == data.test_labels).double()
    print(f"{name}: five nearest training codes tell the digit of {pvae.stats.number(pvae.stats.mean_se(right))}% of the test rows")

if len(sys.argv) > 2:
    Path(sys.argv[2]).write_text(
        render_page("Digits", [("The latent plane", render_widget(plane, data.test_labels, data.shape))])
    )
    print(f"written: {sys.argv[2]}")
