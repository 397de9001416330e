"""The same VAE in NumPyro, trained as its own VAE example does: an epoch is one jitted loop over ``SVI.update``."""

from __future__ import annotations

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import lax, random
from jax.example_libraries import stax
from jax.nn.initializers import variance_scaling
from numpyro.infer import SVI, Trace_ELBO

from tests.benchmarks.clock import Peer
from tests.benchmarks.contenders import HIDDEN, LATENT, LEARNING_RATE, PIXELS


def mlp(outputs: int) -> tuple:
    """One hidden layer, its weights drawn as PyTorch draws them."""
    spread = variance_scaling(1 / 3, "fan_in", "uniform")
    return stax.serial(stax.Dense(HIDDEN, spread), stax.Relu, stax.Dense(outputs, spread))


def model(x: jax.Array) -> None:
    decode = numpyro.module("decoder", mlp(PIXELS), (LATENT,))
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0).expand([LATENT]).to_event(1))
        numpyro.sample("x", dist.Bernoulli(logits=decode(z)).to_event(1), obs=x)


def guide(x: jax.Array) -> None:
    encode = numpyro.module("encoder", mlp(2 * LATENT), (PIXELS,))
    with numpyro.plate("data", len(x)):
        mean, log_scale = jax.numpy.split(encode(x), 2, axis=-1)
        numpyro.sample("z", dist.Normal(mean, jax.numpy.exp(log_scale)).to_event(1))


class NumPyro(Peer):
    """Resident rows and all steps of an epoch in one call of compiled code, on as many cores as XLA finds."""

    def __init__(self, rows: np.ndarray, batch: int) -> None:
        self.rows, self.batch, self.key = jax.numpy.asarray(rows), batch, random.PRNGKey(0)
        self.svi = SVI(model, guide, numpyro.optim.Adam(LEARNING_RATE), Trace_ELBO())
        self.state = self.svi.init(random.PRNGKey(1), self.rows[:batch])
        self.run = jax.jit(self.steps)

    def steps(self, state: object, key: jax.Array, rows: jax.Array) -> object:
        order = random.permutation(key, len(rows)).reshape(-1, self.batch)
        return lax.fori_loop(0, len(order), lambda i, state: self.svi.update(state, rows[order[i]])[0], state)

    def epoch(self) -> None:
        self.key, key = random.split(self.key)
        self.state = jax.block_until_ready(self.run(self.state, key, self.rows))

    def weights(self) -> list[np.ndarray]:
        found = self.svi.get_params(self.state)
        layers = [layer for net in ("encoder", "decoder") for layer in found[f"{net}$params"] if layer]
        return [np.asarray(part).T for layer in layers for part in layer]
