"""Use pvae's program and guide in Pyro's own training loop.

python examples/plain_pyro.py [steps]
"""

import sys

from pyro.infer import SVI, Trace_ELBO

from pvae.data.loading import load_data
from pvae.generative.likelihoods import Gaussian
from pvae.generative.networks import MLP
from pvae.generative.priors import StandardNormal
from pvae.generative.vae import VAE
from pvae.inference.families import DiagonalNormal
from pvae.inference.guides import PerDatapoint
from pvae.training.optimizer import FusedAdam

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 500
data = load_data("digits")
vae = VAE(MLP(4, 64, hidden=[64]), Gaussian(scale=0.3), StandardNormal(4))
family = DiagonalNormal(4)
guide = PerDatapoint(len(data.train), family, model=vae.model)

# FusedAdam lets the visited rows of the guide take their step after the decoder's.
svi = SVI(vae.model, guide, FusedAdam(vae, guide, learning_rate=2e-3), Trace_ELBO())
done, epoch, losses = 0, 0, []
while done < steps:
    for x, index in data.batches(128, seed=0, epoch=epoch):
        losses.append(svi.step(x, index) / len(x))
        done += 1
    epoch += 1
print(f"mean ELBO of the last epoch: {-sum(losses[-12:]) / 12:.2f} nats of density per row")
print(f"learned scale of the pixels: {vae.likelihood.log_scale.exp().item():.3f}")
