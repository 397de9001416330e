"""Fit one program with three inference methods, and compare their test ELBO and inference gap.

python examples/inference_methods.py [epochs]
"""

import sys

import torch

import pvae
from pvae.stats import number

epochs = int(sys.argv[1]) if len(sys.argv) > 1 else 30
data = pvae.load_data("digits", binarize="threshold")
print(data.summary())


def program():
    torch.manual_seed(0)
    decoder = pvae.networks.MLP(8, 64, hidden=[128])
    return pvae.VAE(decoder, pvae.likelihoods.Bernoulli(), pvae.priors.StandardNormal(8))


def amortized(vae, family):
    return pvae.Amortized(pvae.networks.MLP(64, family.num_params, hidden=[128]), family)


def per_datapoint(vae, family):
    return pvae.PerDatapoint(len(data.train), family, model=vae.model)


def semi_amortized(vae, family):
    encoder = pvae.networks.MLP(64, family.num_params, hidden=[128])
    return pvae.SemiAmortized(encoder, family, steps=5, model=vae.model)


for inference in (amortized, per_datapoint, semi_amortized):
    vae = program()
    guide = inference(vae, pvae.families.DiagonalNormal(8))
    fit = pvae.fit(vae.model, guide, data, epochs=epochs, learning_rate=2e-3)
    budget = pvae.diagnostics.Budget(K=200, steps=200)
    summary = pvae.evaluate(vae.model, guide, data.test[:100], budget=budget).summary()
    print(f"{inference.__name__}: {fit.seconds:.1f} s, test ELBO {number(summary['elbo'])} nats,", end=" ")
    print(f"inference gap {number(summary['inference_gap'])} nats")
