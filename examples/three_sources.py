"""Fit one program with three sources of inference, and see what each loses.

python examples/three_sources.py [epochs]
"""

import sys

import torch

from pvae.data.loading import load_data
from pvae.diagnostics.evaluation import Budget, evaluate
from pvae.generative.likelihoods import Bernoulli
from pvae.generative.networks import MLP
from pvae.generative.priors import StandardNormal
from pvae.generative.vae import VAE
from pvae.inference.families import DiagonalNormal
from pvae.inference.guides import Amortized, PerDatapoint, SemiAmortized
from pvae.training.loop import fit

epochs = int(sys.argv[1]) if len(sys.argv) > 1 else 30
data = load_data("digits", binarize="threshold")
print(data.summary())


def program():
    torch.manual_seed(0)
    return VAE(MLP(8, 64, hidden=[128]), Bernoulli(), StandardNormal(8)), DiagonalNormal(8)


def amortized(vae, family):
    return Amortized(MLP(64, family.size, hidden=[128]), family)


def per_datapoint(vae, family):
    return PerDatapoint(len(data.train), family, model=vae.model)


def semi_amortized(vae, family):
    encoder = MLP(64, family.size, hidden=[128])
    return SemiAmortized(encoder, family, steps=5, model=vae.model)


for source in (amortized, per_datapoint, semi_amortized):
    vae, family = program()
    guide = source(vae, family)
    done = fit(vae.model, guide, data, epochs=epochs, learning_rate=2e-3)
    found = evaluate(vae.model, guide, data.test[:100], budget=Budget(K=200, steps=200)).summary()
    gaps = ", ".join(f"{name} {found[name].mean:.2f} ± {found[name].se:.2f}" for name in ("elbo", "inference_gap"))
    print(f"{source.__name__}: {done.seconds:.1f} s, test {gaps} nats")
