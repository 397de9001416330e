"""IWAE against the decoder's bare forward passes and pythae's estimate, memory over K, and the price of k-hat."""

from __future__ import annotations

import subprocess
import sys
import time

import torch
from torch import Tensor

from pvae.diagnostics.evaluation import ROWS, bounds
from pvae.inference.guides import Amortized
from pvae.inference.importance import ROWS_PER_PASS
from pvae.stats import k_hat
from tests.benchmarks.clock import medians, timed
from tests.benchmarks.contenders import Absent, find
from tests.benchmarks.ours import binary, program
from tests.benchmarks.page import Line, Table

LATENT = 20

MEMORY = """
import sys
from tests.benchmarks.clock import peak_memory
from tests.benchmarks.iwae import *
torch.manual_seed(0)
vae, family, encoder = program(LATENT)
bounds(vae.model, Amortized(encoder, family), binary(int(sys.argv[2])), K=int(sys.argv[1]))
print(peak_memory())
"""


def ratio(x: Tensor, K: int, repeats: int = 5) -> tuple[float, float]:
    """Median CPU seconds of IWAE-K with all that comes with it, and of the decoder alone on batches of z as large."""
    vae, family, encoder = program(LATENT)
    guide, size = Amortized(encoder, family), ROWS_PER_PASS // ROWS

    def bare() -> None:
        with torch.no_grad():
            for _ in range(0, len(x), ROWS):
                for done in range(0, K, size):
                    vae.decoder(torch.randn(min(size, K - done), ROWS, LATENT))

    found = medians({"bare": bare, "ours": lambda: bounds(vae.model, guide, x, K=K)}, repeats, time.process_time)
    return found["ours"], found["bare"]


def against_pythae(rows: int = 10, K: int = 5000, repeats: int = 5) -> Table:
    """Seconds of IWAE-5000 per datapoint, ours with errors and k-hat, pythae's with nothing else."""
    x, (vae, family, encoder) = binary(rows), program(LATENT)
    guide, size = Amortized(encoder, family), ROWS_PER_PASS // ROWS

    def bare() -> None:
        with torch.no_grad():
            for done in range(0, K, size):
                vae.decoder(torch.randn(min(size, K - done), rows, LATENT))

    jobs = {"the decoder's forward passes": bare, "pvae, bounds": lambda: bounds(vae.model, guide, x, K=K)}
    absent = {}
    try:
        peer = find("peers_pythae:vae")().eval()
    except Absent as reason:
        absent["pythae, get_nll"] = str(reason)
    else:
        jobs["pythae, get_nll"] = torch.no_grad()(lambda: peer.get_nll(x, K))
    found = medians(jobs, repeats)
    base = found.get("pythae, get_nll")
    lines = [
        Line(name, f"{s / rows * 1e3:.1f} ms", base and s / base, 0.40 if base and name.startswith("pvae") else None)
        for name, s in found.items()
    ]
    note = f"784-400-20, time per datapoint, {rows} evaluated together; ratios to pythae's `get_nll` at its defaults."
    return Table(f"IWAE-{K} of few datapoints", note, lines, absent)


def memory(K: int, rows: int = 50) -> int:
    """Peak bytes of a process that evaluates so many rows with K draws."""
    done = subprocess.run([sys.executable, "-c", MEMORY, str(K), str(rows)], capture_output=True, text=True, check=True)
    return int(done.stdout)


def rows() -> list[tuple[str, str, float, float | None]]:
    """Lines of the page of benchmarks."""
    torch.set_num_threads(1)  # others would spin at our cost while one is in Python
    ours, bare = ratio(binary(ROWS), 500, 7)
    few, many = memory(10_000), memory(50_000)  # fewer draws are not traced, and load fewer libraries
    log_w = 2 * torch.randn(1000, 10_000)
    seconds = timed(lambda: k_hat(log_w), time.process_time)
    return [
        ("the decoder's forward passes, 250 rows x 500 draws", f"{bare:.2f} s", 1.0, None),
        ("IWAE-500 of these rows, its errors and k-hat", f"{ours:.2f} s", ours / bare, 1.6),
        ("peak memory of K = 50,000, over that of K = 10,000", f"{many / 2**20:.0f} MiB", many / few, 1.1),
        ("k-hat of 10,000 rows x 1,000 weights, over 30 s", f"{seconds:.1f} s", seconds / 30, 1.0),
    ]
