"""Speed and memory as ratios in one run on one machine: ``make bench`` prints them and writes docs/benchmarks.md."""

from __future__ import annotations

import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from pyro.infer import SVI
from torch import Tensor

from pvae.data import Dataset
from pvae.families import DiagonalNormal
from pvae.generative import VAE
from pvae.guides import Amortized, Guide, PerDatapoint, SemiAmortized, local_bound
from pvae.likelihoods import Bernoulli
from pvae.networks import MLP
from pvae.objectives import ELBO
from pvae.priors import StandardNormal
from pvae.runtime import unchecked
from pvae.training import FusedAdam, fit
from tests.benchmarks.peers import PlainVAE, pyro_example_epoch, pyro_svi

PAGE = Path(__file__).parents[2] / "docs" / "benchmarks.md"
BATCH = 128


def binary(rows: int) -> Tensor:
    return (torch.rand(rows, 784) < 0.3).float()


def program(latent: int, activation: str = "ReLU") -> tuple[VAE, DiagonalNormal, MLP]:
    vae = VAE(MLP(latent, 784, activation=activation), Bernoulli(), StandardNormal(latent))
    family = DiagonalNormal(latent)
    return vae, family, MLP(784, family.size, activation=activation)


def stepper(vae: VAE, guide: Guide, x: Tensor, rows: int) -> Callable[[], None]:
    """A function that makes one training step, on other rows each time."""
    svi = SVI(vae.model, guide, FusedAdam(vae, guide), ELBO())
    generator = torch.Generator().manual_seed(0)

    def step() -> None:
        with unchecked():
            svi.step(x, torch.randint(rows, (len(x),), generator=generator))

    step.guide = guide  # type: ignore[attr-defined]
    return step


def medians(
    jobs: dict[str, Callable[[], object]], repeats: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """Median seconds of each job; the jobs take turns, so that a slow spell of the machine hits all.

    Jobs that wait for nothing go by ``time.process_time``, which leaves out what other processes take.
    """
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for turn in range(repeats + 3):
        for name, job in jobs.items():
            start = clock()
            job()
            if turn >= 3:
                times[name].append(clock() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def steps() -> list[tuple[str, str, float, float | None]]:
    x = binary(BATCH)
    svi = pyro_svi(PlainVAE(20, 400))
    vae, family, encoder = program(20)
    bound = local_bound(vae.model, family)
    table = PerDatapoint(20_000, family, bound=bound, local_steps=1)
    jobs: dict[str, Callable[[], object]] = {
        "Pyro": lambda: svi.step(x),
        "Amortized": stepper(vae, Amortized(encoder, family), x, 20_000),
        "PerDatapoint, 1 local step": stepper(vae, table, x, 20_000),
        "PerDatapoint, 5 local steps": stepper(vae, PerDatapoint(20_000, family, bound=bound), x, 20_000),
        "SemiAmortized, 5 steps of 8 draws": stepper(vae, SemiAmortized(encoder, family, bound=bound), x, 20_000),
    }
    found = medians(jobs, 60)
    goals = {"Amortized": 0.75}
    return [
        (f"step, {name}", f"{seconds * 1e3:.2f} ms", seconds / found["Pyro"], goals.get(name))
        for name, seconds in found.items()
    ]


def epochs() -> list[tuple[str, str, float, float | None]]:
    images = (torch.rand(12_800, 28, 28) * 255).byte()
    peer = pyro_example_epoch(images, 256)
    rows = (images.flatten(1).float() / 255).round()
    data = Dataset("noise", rows, rows[:0], rows[:0], (28, 28))
    vae, family, encoder = program(50, "Softplus")
    guide = Amortized(encoder, family)
    found = medians({"Pyro's example": peer, "pvae": lambda: fit(vae.model, guide, data, epochs=1, batch_size=256)}, 5)
    return [
        (f"epoch of 12,800 images, {name}", f"{seconds:.2f} s", seconds / found["Pyro's example"], goal)
        for (name, seconds), goal in zip(found.items(), (None, 0.35), strict=True)
    ]


def tables() -> list[tuple[str, str, float, float | None]]:
    x = binary(BATCH)
    vae, family, _ = program(20)
    sizes = (20_000, 2_000_000)
    jobs = {f"{rows:,}": stepper(vae, PerDatapoint(rows, family, local_steps=1), x, rows) for rows in sizes}
    found = medians(jobs, 80)
    fewest = found[f"{sizes[0]:,}"]
    return [
        (f"per-datapoint step, {name} rows", f"{seconds * 1e3:.2f} ms", seconds / fewest, goal)
        for (name, seconds), goal in zip(found.items(), (None, 1.15), strict=True)
    ]


MEMORY = """
import sys
from tests.benchmarks.__main__ import *
rows = int(sys.argv[1])
vae, family, _ = program(20)
step = stepper(vae, PerDatapoint(rows, family, local_steps=1), binary(BATCH), rows)
for table in (step.guide.table, step.guide.first, step.guide.second):
    table += 0  # pages of zeros take no memory until they are touched
for _ in range(5): step()
print(peak_memory())
"""


def peak_memory() -> int:
    """Bytes of the most memory that this process has held (Linux)."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def memory() -> list[tuple[str, str, float, float | None]]:
    """Peak memory of training a large table, less that of training a small one, against the table's own size."""
    peaks = {}
    for rows in (20_000, 2_000_000):
        done = subprocess.run([sys.executable, "-c", MEMORY, str(rows)], capture_output=True, text=True, check=True)
        peaks[rows] = int(done.stdout)
    grown = peaks[2_000_000] - peaks[20_000]
    table = (2_000_000 - 20_000) * (3 * 40 + 1) * 4
    return [
        ("memory of 2,000,000 rows, over that of table and moments", f"{grown / 2**20:.0f} MiB", grown / table, 1.05)
    ]


def evaluations() -> list[tuple[str, str, float, float | None]]:
    from tests.benchmarks import hmc, iwae

    return [*iwae.rows(), *hmc.rows()]


def main() -> None:
    torch.manual_seed(0)
    lines = [
        "# Benchmarks",
        "",
        "Written by `make bench`. A ratio is of medians of jobs that took turns in one run on one machine. The peer,",
        "at 1, is the first line of its group: Pyro's `SVI.step` with `pyro.optim.Adam` and `Trace_ELBO` on the same",
        "model (784-400-20, batch 128); an epoch of Pyro's VAE example with its DataLoader (784-400-50, batch 256);",
        "the same step with fewer rows; the table's own size; the decoder's bare forward passes on as many draws; its",
        "bare forward and backward pass on as many chains. The last two groups are in CPU time.",
        "",
        "| | median | ratio | goal |",
        "|---|---|---|---|",
    ]
    for group in (steps, epochs, tables, memory, evaluations):
        for name, figure, ratio, goal in group():
            shown = f"**{ratio:.2f}**" if goal and ratio > goal else f"{ratio:.2f}"
            line = f"| {name} | {figure} | {shown} | {f'at most {goal}' if goal else ''} |"
            print(line, flush=True)
            lines.append(line)
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, Python {platform.python_version()}"
    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "pyro-ppl"))
    lines += [
        "",
        f"{machine}, {libraries}. What misses its goal is in bold.",
        "The epoch's ratio depends on how fast the machine serves single images: pvae's own time is mostly that of the",
        "matrix products.",
        "",
        "Of a chunk of IWAE (16 draws for each of 250 rows) the decoder takes 70%, the likelihood 17%,",
        "the encoder, which runs once a chunk, 5%, Pyro and the totals 8%. A leapfrog costs 2 ms of Pyro and Python",
        "whatever its size, so that it meets its goal from rows x chains of about 1,000 on (64 x 16: 1.40); annealing",
        "moves 2,048 at once.",
    ]
    PAGE.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
