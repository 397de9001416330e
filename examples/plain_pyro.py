"""Train pvae's program and guide in Pyro's own loop, with SVI and Trace_ELBO.

python examples/plain_pyro.py [steps]
"""

import sys

from pyro.infer import SVI, Trace_ELBO

import pvae
from pvae.training import FusedAdam

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 500
data = pvae.load_data("digits")
vae = pvae.VAE(
    pvae.networks.MLP(4, 64, hidden=[64]), pvae.likelihoods.Gaussian(scale=0.3), pvae.priors.StandardNormal(4)
)
guide = pvae.PerDatapoint(len(data.train), pvae.families.DiagonalNormal(4), model=vae.model)

# FusedAdam also updates the variational parameters of the rows in the batch.
svi = SVI(vae.model, guide, FusedAdam(vae, guide, learning_rate=2e-3), Trace_ELBO())
done, epoch, losses = 0, 0, []
while done < steps:
    for x, index in data.batches(128, seed=0, epoch=epoch):
        losses.append(svi.step(x, index) / len(x))
        done += 1
    epoch += 1
print(f"mean ELBO of the last epoch: {-sum(losses[-12:]) / 12:.2f} nats per row (log density)")
print(f"learned scale of the likelihood: {vae.likelihood.log_scale.exp().item():.3f}")
