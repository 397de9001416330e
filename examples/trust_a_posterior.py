"""Diagnose a guide, and the same q refined for each row: reference draws, calibration.

python examples/trust_a_posterior.py [epochs]
"""

import sys

import torch

import pvae
from pvae.stats import mean_se, number

epochs = int(sys.argv[1]) if len(sys.argv) > 1 else 100
data = pvae.load_data("digits", binarize="threshold")
torch.manual_seed(0)
vae = pvae.VAE(pvae.networks.MLP(4, 64, hidden=[64]), pvae.likelihoods.Bernoulli(), pvae.priors.StandardNormal(4))
guide = pvae.Amortized(pvae.networks.MLP(64, 8, hidden=[64]), pvae.families.DiagonalNormal(4))
pvae.fit(vae.model, guide, data, epochs=epochs, learning_rate=2e-3)
x = data.test[:20]

# References that don't use q: draws of each row's posterior with their evidence, from annealed particles on.
draws = pvae.samplers.posterior(vae.model, None, x)

for name, q in {"guide": guide, "refined": pvae.RefinedGuide(guide, vae.model, steps=50)}.items():
    values = pvae.diagnostics.bounds(vae.model, q, x, K=200).values
    reference = pvae.diagnostics.compare_with_reference(vae.model, q, x, draws=draws)
    calibration = pvae.diagnostics.calibrate(vae.model, q, data.test, rows=100).summary()
    gap, error = mean_se(draws.log_evidence - values["elbo"]), reference.mean_error.square().mean().sqrt()
    print(f"{name}: ELBO {number(gap)} nats below the evidence, k-hat {values['k_hat'].mean():.2f}")
    print(f"  root mean squared error of posterior means {error:.2f} posterior sd")
    print(f"  90% intervals cover {reference.coverage_90.mean():.0%} of the reference draws, and", end=" ")
    print(f"{calibration['sbc_coverage_90'].mean:.0%} of the true latents of simulated rows;", end=" ")
    print(f"SBC p = {calibration['sbc_p'].mean:.2g}")

# The same battery with its verdicts, in one call: print(pvae.diagnose(vae.model, guide, x, budget="quick"))
