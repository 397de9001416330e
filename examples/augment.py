"""Augment 100 labelled rows, and measure whether small classifiers gain; some lose.

python examples/augment.py [epochs]
"""

import sys

import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

import pvae
from pvae.stats import mean_se, number

epochs = int(sys.argv[1]) if len(sys.argv) > 1 else 200
data = pvae.load_data("digits")
torch.manual_seed(0)
vae = pvae.VAE(
    pvae.networks.MLP(8, 64, hidden=[128]), pvae.likelihoods.Gaussian(scale=0.3), pvae.priors.StandardNormal(8)
)
guide = pvae.Amortized(pvae.networks.MLP(64, 16, hidden=[128]), pvae.families.DiagonalNormal(8))
pvae.fit(vae.model, guide, data, epochs=epochs, learning_rate=2e-3)  # all training rows, without labels

classifiers = {"logistic regression": LogisticRegression(max_iter=500), "nearest neighbour": KNeighborsClassifier(1)}
gains = {(name, spread): [] for name in classifiers for spread in (0.0, 1.0, 3.0)}
alone = {name: [] for name in classifiers}
for draw in range(10):  # different labelled rows each time
    which = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(draw))[:100]
    x, y = data.train[which], data.train_labels[which]
    for name, classifier in classifiers.items():
        alone[name].append(100 * classifier.fit(x, y).score(data.test, data.test_labels))
    for (name, spread), values in gains.items():
        new = pvae.applications.augment(vae.model, guide, x, which, per_row=10, spread=spread, seed=draw)
        classifiers[name].fit(torch.cat([x, new.x]), torch.cat([y, y[new.row]]))
        values.append(100 * classifiers[name].score(data.test, data.test_labels) - alone[name][-1])

print("accuracy on test rows, mean over ten choices of 100 labelled rows:")
for name in classifiers:
    print(f"  {name}: {number(mean_se(torch.tensor(alone[name])))}% without augmentation; with ten new rows per row")
    by_spread = {spread: mean_se(torch.tensor(values)) for (other, spread), values in gains.items() if other == name}
    print("    " + ", ".join(f"{number(gain)} points at spread {spread:g}" for spread, gain in by_spread.items()))
