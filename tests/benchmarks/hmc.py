"""One HMC leapfrog over B datapoints and C chains against the decoder's bare forward and backward pass.

``python -m tests.benchmarks.hmc`` prints medians of jobs that took turns: 784-400-20, each chain one row of a batch.
"""

from __future__ import annotations

import sys
import time

import torch

from pvae import hmc
from pvae.targets import Target
from tests.benchmarks.__main__ import binary, medians, program

LATENT, LEAPFROGS = 20, 10


def leapfrogs(rows: int, chains: int, repeats: int = 15) -> tuple[float, float]:
    """Median CPU seconds of a leapfrog, out of ten, and of a bare pass from z to its gradient through the decoder."""
    vae, _, _ = program(LATENT)
    target, step = Target(vae.model, binary(rows)), torch.full((rows,), 0.01)
    state = hmc.start(target, torch.randn(chains, rows, LATENT))
    toward = torch.randn(chains, rows, 784)

    def bare() -> None:
        z = torch.randn(chains, rows, LATENT, requires_grad=True)
        torch.autograd.grad(vae.decoder(z), z, toward)

    jobs = {"bare": bare, "transition": lambda: hmc.transition(target, state, step, leapfrogs=LEAPFROGS, jitter=0.0)}
    found = medians(jobs, repeats, time.process_time)
    return found["transition"] / LEAPFROGS, found["bare"]


def rows() -> list[tuple[str, str, float, float | None]]:
    """Lines of the page of benchmarks: 128 rows of 16 chains are what annealing moves together, 8 are a small job."""
    lines = []
    for count in (8, 128):
        leapfrog, bare = leapfrogs(count, 16)
        name = f"{count} rows x 16 chains"
        lines += [
            (f"the decoder forward and backward, {name}", f"{bare * 1e3:.1f} ms", 1.0, None),
            (f"HMC leapfrog of {name}", f"{leapfrog * 1e3:.1f} ms", leapfrog / bare, 1.5),
        ]
    return lines


def main() -> None:
    torch.manual_seed(0)
    for count, chains in ((8, 16), (32, 16), (64, 16), (128, 16), (512, 16)):
        begin = time.perf_counter()
        leapfrog, bare = leapfrogs(count, chains)
        print(
            f"B = {count}, C = {chains}: leapfrog {leapfrog * 1e3:.1f} ms, bare {bare * 1e3:.1f} ms, "
            f"ratio {leapfrog / bare:.2f}, {leapfrog / count / chains * 1e6:.1f} us a chain "
            f"({time.perf_counter() - begin:.0f} s)",
            flush=True,
        )


if __name__ == "__main__":
    sys.exit(main())
