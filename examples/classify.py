"""Classify by Bayes' rule on a model for each class, and make its probabilities mean what they say.

python examples/classify.py [epochs]
"""

import sys

import torch

import pvae
from pvae.stats import mean_se, number

epochs = int(sys.argv[1]) if len(sys.argv) > 1 else 60
data = pvae.load_data("digits", binarize="threshold", validation_size=0.2)
models = []
for digit in range(10):
    torch.manual_seed(digit)
    vae = pvae.VAE(pvae.networks.MLP(4, 64, hidden=[64]), pvae.likelihoods.Bernoulli(), pvae.priors.StandardNormal(4))
    guide = pvae.Amortized(pvae.networks.MLP(64, 8, hidden=[64]), pvae.families.DiagonalNormal(4))
    own = data.train[data.train_labels == digit]
    pvae.fit(vae.model, guide, own, epochs=epochs, batch_size=32, learning_rate=5e-3)
    models.append((vae.model, guide))

# Rows that nothing was fitted to tell how much the evidence overstates: the temperature T divides it.
held = pvae.applications.classify(models, data.validation, K=64)
T = pvae.applications.fit_temperature(held.log_evidence, data.validation_labels)
found = pvae.applications.classify(models, data.test, K=64, seed=1)
print(f"{len(data.test)} test rows; temperature {number(T)} from {len(data.validation)} validation rows")
for name, at in {"as they are": found, "calibrated": found.at(T.mean)}.items():
    own = at.summary(data.test_labels)
    print(f"probabilities {name}: accuracy {number(own['accuracy'])}, log loss {number(own['log_loss'])} nats,")
    print(
        f"  Brier score {number(own['brier'])}, calibration error {number(own['calibration_error'])}",
        end=" ",
    )
    print(f"where chance alone makes {number(own['calibration_error_by_chance'])}")
sure = found.log_probabilities.exp().amax(1) > 0.99
right = found.predicted == data.test_labels
print(f"as they are, {100 * sure.double().mean():.0f}% of the rows get 99% or more, and of these ", end="")
print(f"{number(mean_se(100 * right[sure].double()))}% are right")
