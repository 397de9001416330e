"""Batched inference: the one loop over batches of rows, and the context that such computations run in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pvae.errors import UserError
from pvae.inference.importance import ROWS_PER_PASS
from pvae.runtime.pyro_params import Program, local_param_store, module_of
from pvae.runtime.result_cache import ResultCache
from pvae.runtime.torch_state import halve_on_oom, no_validation, seeded

ROWS = 250  # of a batch, at most
STREAM = 10**12  # where batches' random streams begin: clear of the small seeds of searches and diagnostics

Values = Tensor | np.ndarray
Progress = Callable[[int], None]


def silent(rows: int) -> None:
    """Show no progress."""


class RowBatch(NamedTuple):
    """A batch of rows: x [B, C], their training indices [B] or None, the rows' slice, and the batch's seed."""

    x: Tensor
    index: Tensor | None  # type: ignore[assignment]
    place: slice
    seed: int


@contextmanager
def inference_mode(*programs: Program | None, seed: int | None = None) -> Iterator[None]:
    """Run a block without gradients, argument validation or traces in Pyro's global parameter store.

    Arguments:
        programs: modules, or methods of modules, to put into evaluation mode, in which they stay; None is skipped.
        seed: of the block's own random stream; without it the block draws from the stream outside.
    """
    for program in programs:
        if program is not None:
            module_of(program).eval()
    with torch.no_grad(), no_validation(), local_param_store(), nullcontext() if seed is None else seeded(seed):
        yield


def as_rows(values: Values, model: Program) -> Tensor:
    """Return rows [N, C] as a tensor of the type and on the device of the program's parameters."""
    try:
        rows = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"the rows are no table of numbers ({error})") from None
    if rows.dim() < 2:
        raise UserError(f"the rows have shape {tuple(rows.shape)}, but a table [rows, columns] is needed")
    if not len(rows):
        raise UserError("no rows are given; at least one is needed")
    return rows.to(next(iter(module_of(model).parameters()), torch.empty(0)))


def map_batches(
    model: Program,
    guide: Program | None,
    compute: Callable[[RowBatch], dict[str, Tensor]],
    x: Values,
    index: Tensor | None = None,
    *,
    seed: int = 0,
    batch_size: int = ROWS,
    seed_of: Callable[[int], int] | None = None,
    cache: ResultCache | None = None,
    prefix: str = "rows",
    progress: Progress = silent,
) -> dict[str, Tensor]:
    """Map batches of rows to tensors in `inference_mode`, and concatenate the results on the CPU.

    Arguments:
        model, guide: the programs that ``compute`` runs; both are put into evaluation mode.
        compute: maps a batch to named tensors [B, ...], or to scalars, which come back as [number of batches].
        x, index: rows [N, C], and which training datapoints they are, on any device; None for new rows.
        seed: of all draws, from which each batch has a stream of its own; the random stream outside is left alone.
        batch_size: rows of a batch, at most; the batch is halved where the device has no memory for it.
        seed_of: maps the first row of a batch to the batch's seed, in place of the usual one.
        cache, prefix: keeps each batch's results under the name ``prefix-start-stop``.
        progress: called with the number of rows of each batch that is done.
    """
    rows = as_rows(x, model)
    index = None if index is None else index.to(rows.device)
    results, seed_of = cache or ResultCache(None, {}), seed_of or (lambda start: seed + STREAM + 1_000_003 * start)

    def compute_batch(place: slice) -> dict[str, Tensor]:
        batch = RowBatch(rows[place], None if index is None else index[place], place, seed_of(place.start))
        draw = seeded(batch.seed)(partial(compute, batch))
        values = results.get_or_compute_tensors(f"{prefix}-{place.start:06}-{place.stop:06}", draw)
        progress(len(batch.x))
        return {name: value.cpu() for name, value in values.items()}

    with inference_mode(model, guide):
        batches = list(halve_on_oom(compute_batch, len(rows), batch_size, "rows"))
    return {name: torch.cat([torch.atleast_1d(batch[name]) for batch in batches]) for name in batches[0]}


def draw_chunks(K: int, B: int, max_batch: int | None = None) -> Iterator[slice]:
    """Split K draws of each of B rows into slices of at most ``max_batch`` draws of all rows together."""
    size = max(1, (max_batch or ROWS_PER_PASS) // B)
    return (slice(start, min(start + size, K)) for start in range(0, K, size))


def tile_rows(x: Tensor, index: Tensor | None, draws: slice) -> tuple[Tensor, Tensor | None]:
    """Repeat rows and their indices once for each draw of a slice."""
    times = draws.stop - draws.start
    return x.repeat(times, *(1,) * (x.dim() - 1)), None if index is None else index.repeat(times)
