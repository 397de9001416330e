"""IWAE against the decoder's bare forward passes, memory over K, and the price of k-hat.

``python -m tests.benchmarks.iwae`` prints them for a 784-400-20 VAE; jobs take turns, in one process on one machine.
"""

from __future__ import annotations

import subprocess
import sys
import time

import torch
from torch import Tensor

from pvae.evaluation import ROWS, bounds
from pvae.guides import Amortized
from pvae.stats import k_hat
from pvae.weights import ROWS_PER_PASS
from tests.benchmarks.__main__ import binary, medians, program

LATENT = 20

MEMORY = """
import sys
from tests.benchmarks.__main__ import peak_memory
from tests.benchmarks.iwae import *
torch.manual_seed(0)
vae, family, encoder = program(LATENT)
bounds(vae.model, Amortized(encoder, family), binary(int(sys.argv[2])), K=int(sys.argv[1]))
print(peak_memory())
"""


def ratio(x: Tensor, K: int, repeats: int = 5) -> tuple[float, float]:
    """Median seconds of IWAE-K with all that comes with it, and of the decoder alone on batches of z as large."""
    vae, family, encoder = program(LATENT)
    guide, size = Amortized(encoder, family), ROWS_PER_PASS // ROWS

    def bare() -> None:
        with torch.no_grad():
            for _ in range(0, len(x), ROWS):
                for done in range(0, K, size):
                    vae.decoder(torch.randn(min(size, K - done), ROWS, LATENT))

    found = medians({"bare": bare, "ours": lambda: bounds(vae.model, guide, x, K=K)}, repeats)
    return found["ours"], found["bare"]


def memory(K: int, rows: int = 50) -> int:
    """Peak bytes of a process that evaluates so many rows with K draws."""
    done = subprocess.run([sys.executable, "-c", MEMORY, str(K), str(rows)], capture_output=True, text=True, check=True)
    return int(done.stdout)


def main() -> None:
    torch.manual_seed(0)
    for rows, K in ((250, 500), (250, 2000)):
        ours, bare = ratio(binary(rows), K, 3)
        print(
            f"IWAE-{K} of {rows} rows: {ours:.2f} s, decoder {bare:.2f} s, ratio {ours / bare:.2f} (goal 1.6)",
            flush=True,
        )
    few, many = memory(500), memory(50_000)
    print(
        f"peak memory, K = 500: {few / 2**20:.0f} MiB, K = 50,000: {many / few:.3f} times that (goal 1.1)", flush=True
    )
    log_w = 2 * torch.randn(1000, 10_000)
    start = time.perf_counter()
    k_hat(log_w)
    print(f"k-hat of 10,000 datapoints x 1,000 weights: {time.perf_counter() - start:.1f} s (goal 30)")


if __name__ == "__main__":
    main()
