"""inference.batching."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pvae.errors import UserError
from pvae.inference.importance import ROWS_PER_PASS
from pvae.runtime.pyro_params import Program, local_param_store, module_of
from pvae.runtime.torch_state import halve_on_oom, no_validation, seeded

# Datapoints that pass through the program together, and draws by which a start is chosen.
ROWS, LOOK_DRAWS = 250, 50


# Streams of noise: of a batch's draws, clear of all that searches and diagnostics take from small seeds and constants,
# and of the draws by which moments are found, the same for every row and seed; and the number of these.
STREAM, MOMENTS, MOMENT_DRAWS = 10**12, 10**18, 500


Values = Tensor | np.ndarray


class RowBatch(NamedTuple):
    """Some of the rows x [B, C], which training datapoints they are, index [B] or None, and where they stand."""

    x: Tensor
    index: Tensor | None  # type: ignore[assignment]
    place: slice


def as_rows(values: Values, model: Program) -> Tensor:
    """Rows [N, C] as a tensor of the type and on the device of the program's parameters.

    Raises:
        UserError: they are no table of numbers, or there are none.
    """
    try:
        found = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"the rows are no table of numbers ({error})") from None
    if found.dim() < 2:
        raise UserError(f"the rows have shape {tuple(found.shape)}, but a table [rows, columns] is needed")
    if not len(found):
        raise UserError("no rows are given; at least one is needed")
    like = next(iter(module_of(model).parameters()), torch.empty(0))
    return found.to(device=like.device, dtype=like.dtype)


def map_batches(
    model: Program,
    guide: Program | None,
    compute: Callable[[RowBatch], dict[str, Tensor]],
    x: Values,
    index: Tensor | None = None,
    *,
    seed: int = 0,
    size: int = ROWS,
    progress: Callable[[int], None] = lambda rows: None,
) -> dict[str, Tensor]:
    """Apply a function to batches of rows, without gradients, and lay what it gives end to end, on the CPU.

    Arguments:
        model, guide: the programs that the function uses; both are put into evaluation mode.
        compute: a batch to named tensors [B, ...].
        x, index: rows [N, C], and which training datapoints they are, on any device; None for new ones.
        seed: of all draws; the stream outside is left alone. Each batch has a stream of its own.
        size: rows of a batch, at most.
        progress: called with the number of rows done.

    Raises:
        UserError: no rows, or rows that are no table of numbers.
    """
    rows = as_rows(x, model)
    index = None if index is None else index.to(rows.device)
    for program in (model, guide):
        if program is not None:
            module_of(program).eval()

    def computed(part: slice) -> dict[str, Tensor]:
        with seeded(seed + STREAM + 1_000_003 * part.start):
            found = compute(RowBatch(rows[part], None if index is None else index[part], part))
        progress(part.stop - part.start)
        return {name: values.cpu() for name, values in found.items()}

    with torch.no_grad(), no_validation(), local_param_store():
        parts = list(halve_on_oom(computed, len(rows), size, "rows"))
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def draw_chunks(K: int, B: int, together: int | None = None) -> Iterator[slice]:
    """K draws of B rows in parts of so many draws in all, at the most, that pass through a program together."""
    size = max(1, (together or ROWS_PER_PASS) // B)
    return (slice(start, min(start + size, K)) for start in range(0, K, size))


def tile_rows(x: Tensor, index: Tensor | None, part: slice) -> tuple[Tensor, Tensor | None]:
    """Rows and their index once for each draw of a part."""
    times = part.stop - part.start
    return x.repeat(times, *(1,) * (x.dim() - 1)), None if index is None else index.repeat(times)
