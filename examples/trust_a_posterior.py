"""Ask one guide, and the same q refined row by row, how far each may be trusted.

python examples/trust_a_posterior.py [epochs]
"""

import sys

import torch

from pvae.data.loading import load_data
from pvae.diagnostics.calibration import calibrate
from pvae.diagnostics.evaluation import bounds
from pvae.diagnostics.mcmc_reference import compare_with_chains, run_long_chains
from pvae.generative.likelihoods import Bernoulli
from pvae.generative.networks import MLP
from pvae.generative.priors import StandardNormal
from pvae.generative.vae import VAE
from pvae.inference.families import DiagonalNormal
from pvae.inference.guides import Amortized, RefinedGuide
from pvae.samplers.ais import anneal
from pvae.samplers.log_joint import LogJoint
from pvae.stats import mean_se, number
from pvae.training.loop import fit

epochs = int(sys.argv[1]) if len(sys.argv) > 1 else 100
data = load_data("digits", binarize="threshold")
torch.manual_seed(0)
vae = VAE(MLP(4, 64, hidden=[64]), Bernoulli(), StandardNormal(4))
guide = Amortized(MLP(64, 8, hidden=[64]), DiagonalNormal(4))
fit(vae.model, guide, data, epochs=epochs, learning_rate=2e-3)
x = data.test[:20]

# What no q enters: the evidence by annealing from the prior, and long HMC chains of each row's posterior.
evidence = anneal(LogJoint(vae.model, x), chains=8, temperatures=100).evidence
chains = run_long_chains(
    vae.model, x, sites=guide.sites, chains=4, draws=300, warm_up=100, temperatures=50, leapfrogs=3
)

for name, q in {"guide": guide, "refined": RefinedGuide(guide, vae.model, steps=50)}.items():
    own = bounds(vae.model, q, x, K=200).values
    reference = compare_with_chains(chains, q, x)
    known = calibrate(vae.model, q, data.test, rows=100).summary()
    print(f"{name}: {number(mean_se(evidence - own['elbo']))} nats below the evidence, k-hat {own['k_hat'].mean():.2f}")
    print(
        f"  means miss the chains' by {reference.mean_error.square().mean().sqrt():.2f} posterior sd (root mean square)"
    )
    print(f"  90% intervals hold {reference.coverage_90.mean():.0%} of the chains' draws, and of the true latents of")
    print(f"  simulated rows {known['sbc_coverage_90'].mean:.0%}, ranks uniform with p = {known['sbc_p'].mean:.2g}")
