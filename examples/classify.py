"""Classify by Bayes' rule with one model per class, and calibrate the probabilities.

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
    rows = data.train[data.train_labels == digit]
    pvae.fit(vae.model, guide, rows, epochs=epochs, batch_size=32, learning_rate=5e-3)
    models.append((vae.model, guide))

# Held-out rows show how overconfident the evidence is: it is divided by the temperature T.
held_out = pvae.applications.classify(models, data.validation, K=64)
T = pvae.applications.fit_temperature(held_out.log_evidence, data.validation_labels)
predictions = pvae.applications.classify(models, data.test, K=64, seed=1)
print(f"{len(data.test)} test rows; temperature {number(T)} from {len(data.validation)} validation rows")
for name, classification in {"uncalibrated": predictions, "calibrated": predictions.at(T.mean)}.items():
    summary = classification.summary(data.test_labels)
    print(f"{name}: accuracy {number(summary['accuracy'])}, log loss {number(summary['log_loss'])} nats,", end=" ")
    print(f"Brier score {number(summary['brier'])},")
    print(f"  calibration error {number(summary['calibration_error'])};", end=" ")
    print(f"{number(summary['calibration_error_by_chance'])} is expected by chance")
confident = predictions.log_probabilities.exp().amax(1) > 0.99
correct = predictions.predicted == data.test_labels
print(f"uncalibrated, {100 * confident.double().mean():.0f}% of the rows have a probability of 99% or more;", end=" ")
print(f"of these {number(mean_se(100 * correct[confident].double()))}% are correct")
