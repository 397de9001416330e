"""cli.use_context."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pvae.errors import UserError
from pvae.experiments.opened_run import Run, SelectedRows
from pvae.experiments.use_results import UseResult
from pvae.runtime.torch_state import available_memory
from pvae.stats import Estimate, mean_se, number


class UseContext(NamedTuple):
    """What concerns every use: an opened run, rows, the seed, whom to tell of progress, and where data sets are."""

    run: Run
    rows: SelectedRows
    seed: int = 0
    progress: Callable[[int], None] = lambda rows: None
    data_folder: Path | None = None

    @property
    def programs(self) -> tuple[Any, Any]:
        """The model and its guide."""
        return self.run.model, self.run.guide

    @property
    def x(self) -> Tensor:
        """The rows' own values, without those of a label."""
        return self.rows.x[:, : self.run.columns]

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of every function."""
        return {"seed": self.seed, "progress": self.progress}

    @property
    def given(self) -> tuple[Tensor, Tensor | None]:
        """The rows and which training datapoints they are."""
        return self.rows.x, self.rows.index


def check_room(asked: UseContext, rows: int, flag: str) -> None:
    """Refuse more new rows than half of the memory that is left can hold, twice: on their way and laid end to end."""
    size, room = 8 * rows * asked.run.columns, available_memory() / 2
    if size > room:
        raise UserError(
            f"{flag}: {rows:,} rows of {asked.run.columns} values take {size / 2**30:,.1f} GiB, and there is room for "
            f"{room / 2**30:.1f}; give a smaller number"
        )


def _beside(asked: UseContext, count: int, labels: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """What new rows are given beside their latents [count, C]: labels, if the program takes any, and these by name.

    Arguments:
        labels: of the new rows, [count]; those of the rows at hand, in their order, unless given.
    """
    run, rows = asked.run, asked.rows
    which = torch.arange(count) % len(rows.x)
    if not run.data.num_label_columns:
        if labels is not None:
            raise UserError("the run's program takes no labels; fit one that does, as models/conditional-digits.toml")
        return rows.x[which], {}
    labels = rows.labels[which] if labels is None and rows.labels is not None else labels
    assert labels is not None  # of every row of data whose program takes them
    return run.labelled(rows.x[which, : run.columns], labels), {"label": labels}


def _error(found: Tensor, x: Tensor) -> Estimate:
    """Squared error per value, over rows."""
    return mean_se((found - x).square().nanmean(1))


def _masked_error(found: Tensor, x: Tensor, where: Tensor) -> Estimate:
    """Squared error of some of the values, over rows that have some."""
    errors, count = torch.where(where, (found - x).square(), 0).sum(1), where.sum(1)
    return mean_se((errors / count.clamp(min=1))[count > 0])


def _of(estimate: Estimate) -> str:
    return number(estimate) if math.isfinite(estimate.mean) else "an unknown error (entries are missing)"


def _dim(run: Run) -> int:
    return run.guide.sites.dim


def _count(asked: UseContext) -> str:
    return f"{len(asked.x)} {asked.rows.where}"


def _shape(asked: UseContext) -> tuple[int, ...]:
    return asked.run.data.shape


def _labelled(asked: UseContext) -> dict[str, Tensor]:
    return {} if asked.rows.labels is None else {"label": asked.rows.labels}


def _arrays(lines: dict[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: values.detach().cpu().numpy() for name, values in lines.items()}


def _use(verb: str, arrays: dict[str, Tensor], told: list[str], figure: Any) -> UseResult:
    return UseResult(
        verb, {name: values.detach().cpu().numpy() for name, values in arrays.items()}, told, figure=figure
    )
