"""Draw new rows from the prior at two temperatures: distance to the training rows, and variety.

python examples/generate.py [epochs]
"""

import sys

import torch

import pvae
from pvae.stats import mean_se, number

epochs = int(sys.argv[1]) if len(sys.argv) > 1 else 200
data = pvae.load_data("digits", binarize="threshold")
torch.manual_seed(0)
vae = pvae.VAE(pvae.networks.MLP(8, 64, hidden=[128]), pvae.likelihoods.Bernoulli(), pvae.priors.StandardNormal(8))
guide = pvae.Amortized(pvae.networks.MLP(64, 16, hidden=[128]), pvae.families.DiagonalNormal(8))
pvae.fit(vae.model, guide, data, epochs=epochs, learning_rate=2e-3)

like = torch.zeros(500, 64)  # number and shape of the rows to draw
rows = {
    f"draws at temperature {t}": pvae.applications.sample(vae.model, like, temperature=t, draw=True) for t in (1.0, 0.5)
}
rows |= {"test rows": data.test, "independent pixels": torch.bernoulli(data.train.mean(0).expand(500, -1))}
print("number of 64 pixels that differ from the nearest training row:")
for name, x in rows.items():
    distance = torch.cdist(x, data.train, p=1).amin(1)
    print(f"  {name}: {number(mean_se(distance))}, copies {100 * (distance == 0).double().mean():.1f}% of the rows")

# Below temperature 1 draws stay near the prior's centre: they vary less, and are no better if no digit lies there.
print("root mean squared difference between two means of p(x|z):")
for t in (1.0, 0.5):
    means = pvae.applications.sample(vae.model, like, temperature=t)
    print(f"  temperature {t}: {number(mean_se((means[::2] - means[1::2]).square().mean(1).sqrt()))}")

means = pvae.applications.sample(vae.model, like[:6]).view(6, 8, 8)
print("six means, which are smoother than draws:")
for lines in means.transpose(0, 1).tolist():
    print("   ".join("".join(" .:+#"[round(4 * ink)] * 2 for ink in line) for line in lines))
