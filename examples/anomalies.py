"""Detect a digit that the model was not trained on: anomaly scores, thresholds, and their performance.

python examples/anomalies.py [epochs]
"""

import sys

import torch

import pvae
from pvae.stats import number

epochs = int(sys.argv[1]) if len(sys.argv) > 1 else 150
all_digits = pvae.load_data("digits", binarize="threshold", validation_size=0.2)
for anomaly in (1, 4):
    normal = [digit for digit in range(10) if digit != anomaly]
    data = pvae.load_data("digits", binarize="threshold", validation_size=0.2, only=normal)
    torch.manual_seed(0)
    vae = pvae.VAE(pvae.networks.MLP(8, 64, hidden=[128]), pvae.likelihoods.Bernoulli(), pvae.priors.StandardNormal(8))
    guide = pvae.Amortized(pvae.networks.MLP(64, 16, hidden=[128]), pvae.families.DiagonalNormal(8))
    pvae.fit(vae.model, guide, data, epochs=epochs, learning_rate=2e-3)

    # Thresholds are quantiles of held-out normal rows: 5% of such rows exceed them, for every score.
    anomalies = pvae.applications.detect_anomalies(
        vae.model, guide, all_digits.test, reference=data.validation, false_alarm=0.05
    )
    summary = anomalies.summary(all_digits.test_labels == anomaly)
    print(f"trained without {anomaly}; expected false alarm rate {number(anomalies.expected)}")
    for name in anomalies.scores:
        auroc, detected, alarms = (number(summary[f"{key}[{name}]"]) for key in ("auroc", "detected", "false_alarms"))
        print(f"  {name}: AUROC {auroc}, detection rate {detected}, false alarm rate {alarms}")
