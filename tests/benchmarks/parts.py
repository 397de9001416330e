"""Where the microseconds of a compiled step go."""

from __future__ import annotations

import torch

from pvae.inference.guides import Amortized
from pvae.runtime.torch_state import no_validation
from pvae.training.objectives import ELBO
from pvae.training.optimizer import FusedAdam
from pvae.training.svi_engines import TracedStep
from tests.benchmarks.clock import medians
from tests.benchmarks.ours import program
from tests.benchmarks.page import Line, Table
from tests.benchmarks.peers_torch import Products
from tests.benchmarks.rows import binarized, pictures

BATCH, REPEATS = 128, 300
STEP, GATHER, GRADIENTS, ADAM = (
    "a step of compiled",
    "gathering its rows",
    "its compiled part: loss and gradients",
    "Adam by PyTorch's fused kernel",
)
PRODUCTS = "the bare matrix products"


def compiled() -> TracedStep:
    vae, family, encoder = program(20)
    guide = Amortized(encoder, family)
    made = TracedStep(vae.model, guide, FusedAdam(vae, guide), ELBO(), compile=True)
    with no_validation():
        made(rows := binarized(pictures(BATCH)), torch.arange(len(rows)))
    return made


def table(repeats: int = REPEATS) -> Table:
    data, order = binarized(pictures(12_800)), torch.arange(BATCH) * 99
    step = compiled()
    x, products = data[order], Products(data[:BATCH].numpy(), BATCH)
    found = step.gradients(x, order)[1:]
    jobs = {
        STEP: lambda: step(data[order], order),
        GATHER: lambda: data[order],
        GRADIENTS: lambda: step.gradients(x, order),
        ADAM: lambda: step.apply(order, found),
        PRODUCTS: products.epoch,
    }
    times = medians(jobs, repeats)
    lines = [Line(name, f"{s * 1e3:.2f} ms", s / times[STEP]) for name, s in times.items()]
    note = (
        "784-400-20, batch 128, amortized; ratios to the step. The remainder is Python: the loop, the order of the "
        "rows, the check of the loss. A part measured alone has more of its data in the caches than in a step."
    )
    return Table("Where a compiled step spends its time", note, lines, {})
