"""Fit nine of the ten digits, and find the tenth among test rows: scores, thresholds, and how far each may be trusted.

python examples/anomalies.py [epochs]
"""

import sys

import torch

import pvae
from pvae.stats import number

epochs = int(sys.argv[1]) if len(sys.argv) > 1 else 150
every = pvae.load_data("digits", binarize="threshold", validation_size=0.2)
for out in (1, 4):
    normal = [digit for digit in range(10) if digit != out]
    data = pvae.load_data("digits", binarize="threshold", validation_size=0.2, only=normal)
    torch.manual_seed(0)
    vae = pvae.VAE(pvae.networks.MLP(8, 64, hidden=[128]), pvae.likelihoods.Bernoulli(), pvae.priors.StandardNormal(8))
    guide = pvae.Amortized(pvae.networks.MLP(64, 16, hidden=[128]), pvae.families.DiagonalNormal(8))
    pvae.fit(vae.model, guide, data, epochs=epochs, learning_rate=2e-3)

    # Thresholds come from normal rows that nothing was fitted to: 5% of such rows exceed them, whatever the score.
    found = pvae.applications.detect_anomalies(
        vae.model, guide, every.test, reference=data.validation, false_alarm=0.05
    )
    figures = found.summary(every.test_labels == out)
    print(f"fitted without {out}; thresholds that a share {number(found.expected)} of fresh normal rows exceeds")
    for name in found.scores:
        area, caught, alarms = (number(figures[f"{what}[{name}]"]) for what in ("auroc", "detected", "false_alarms"))
        print(f"  {name}: AUROC {area}, flagged {caught} of the {out}s and {alarms} of the others")
