"""One HMC leapfrog over B datapoints and C chains against the decoder's bare forward and backward pass."""

from __future__ import annotations

import time

import torch

from pvae.samplers import hmc
from pvae.samplers.log_joint import LogJoint
from tests.benchmarks.clock import medians
from tests.benchmarks.ours import binary, program

LATENT, LEAPFROGS = 20, 10


def leapfrogs(rows: int, chains: int, repeats: int = 15) -> tuple[float, float]:
    """Median CPU seconds of a leapfrog, traced as in a long run, and of a bare pass from z to its gradient."""
    vae, _, _ = program(LATENT)
    density, step_size = hmc.ValueAndGrad(LogJoint(vae.model, binary(rows))), torch.full((rows,), 0.01)
    state = hmc.init(density, torch.randn(chains, rows, LATENT))
    toward = torch.randn(chains, rows, 784)

    def bare() -> None:
        z = torch.randn(chains, rows, LATENT, requires_grad=True)
        torch.autograd.grad(vae.decoder(z), z, toward)

    jobs = {
        "bare": bare,
        "transition": lambda: hmc.transition(density, state, step_size, num_integration_steps=LEAPFROGS, jitter=0.0),
    }
    found = medians(jobs, repeats, time.process_time)
    return found["transition"] / LEAPFROGS, found["bare"]


def rows() -> list[tuple[str, str, float, float | None]]:
    """Lines of the page of benchmarks: 128 rows of 16 chains are what annealing moves together, 8 are a small job."""
    lines = []
    torch.set_num_threads(1)  # others would spin at our cost while one is in Python
    for count in (8, 128):
        leapfrog, bare = leapfrogs(count, 16)
        name = f"{count} rows x 16 chains"
        lines += [
            (f"the decoder forward and backward, {name}", f"{bare * 1e3:.1f} ms", 1.0, None),
            (f"HMC leapfrog of {name}", f"{leapfrog * 1e3:.1f} ms", leapfrog / bare, 1.5),
        ]
    return lines
