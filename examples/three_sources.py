"""Fit one program with three sources of inference, and see what each loses.

python examples/three_sources.py [epochs]
"""

import sys

import torch

import pvae

epochs = int(sys.argv[1]) if len(sys.argv) > 1 else 30
data = pvae.load_data("digits", binarize="threshold")
print(data.summary())


def program():
    torch.manual_seed(0)
    return pvae.VAE(
        pvae.networks.MLP(8, 64, hidden=[128]), pvae.likelihoods.Bernoulli(), pvae.priors.StandardNormal(8)
    ), pvae.families.DiagonalNormal(8)


def amortized(vae, family):
    return pvae.Amortized(pvae.networks.MLP(64, family.size, hidden=[128]), family)


def per_datapoint(vae, family):
    return pvae.PerDatapoint(len(data.train), family, model=vae.model)


def semi_amortized(vae, family):
    encoder = pvae.networks.MLP(64, family.size, hidden=[128])
    return pvae.SemiAmortized(encoder, family, steps=5, model=vae.model)


for source in (amortized, per_datapoint, semi_amortized):
    vae, family = program()
    guide = source(vae, family)
    done = pvae.fit(vae.model, guide, data, epochs=epochs, learning_rate=2e-3)
    found = pvae.evaluate(vae.model, guide, data.test[:100], budget=pvae.diagnostics.Budget(K=200, steps=200)).summary()
    gaps = ", ".join(f"{name} {found[name].mean:.2f} ± {found[name].se:.2f}" for name in ("elbo", "inference_gap"))
    print(f"{source.__name__}: {done.seconds:.1f} s, test {gaps} nats")
