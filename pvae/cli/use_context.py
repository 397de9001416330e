"""What all uses of a run share: the opened run with its rows, what is printed and written, and words for sentences."""

from __future__ import annotations

import math
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import torch
import typer
from matplotlib.figure import Figure
from rich.console import Console
from torch import Tensor

from pvae.cli.options import UseOptions
from pvae.errors import UserError
from pvae.experiments import use_results
from pvae.experiments.row_selection import SelectedRows, select_rows
from pvae.experiments.run import Run, open_run
from pvae.experiments.run_folder import fingerprint, unfinished_note
from pvae.experiments.use_results import UseResult
from pvae.reporting.application_figures import draw_sheets, draw_strips
from pvae.reporting.style import STYLE
from pvae.reporting.tables import Table, rich_table
from pvae.runtime.progress import progress_bar
from pvae.runtime.torch_state import available_memory, to_numpy
from pvae.stats import Estimate, mean_se, number

SELECTED = -1  # as the total of a progress bar: the number of selected rows


@dataclass(frozen=True)
class UseContext:
    """An opened run and rows to use it on; ``progress`` takes how many rows have passed since its last call."""

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
        """The rows' own values, [B, C], without the columns of a label."""
        return self.rows.x[:, : self.run.columns]

    @property
    def dim(self) -> int:
        """Number of latent dimensions, D."""
        return self.run.guide.sites.dim

    @property
    def labels(self) -> dict[str, Tensor]:
        """The rows' labels by the name of their array, if they are known."""
        return {} if self.rows.labels is None else {"label": self.rows.labels}

    @property
    def count(self) -> str:
        """How many rows there are and which, for a sentence."""
        return f"{len(self.x)} {self.rows.where}"

    def apply(self, application: Callable[..., Any], *inputs: Any, **arguments: Any) -> Any:
        """Call an application of model and guide on inputs (the rows and their index unless given), seed, progress."""
        inputs = inputs or (self.rows.x, self.rows.index)
        return application(*self.programs, *inputs, seed=self.seed, progress=self.progress, **arguments)

    def strips(self, lines: Mapping[str, Tensor], notes: Sequence[str] = ()) -> Figure:
        """Draw lines of rows one below the other, see `draw_strips`."""
        return draw_strips({name: to_numpy(rows) for name, rows in lines.items()}, self.run.data.shape, notes)

    def sheets(self, panels: Mapping[str, Tensor], **options: int) -> Figure:
        """Draw a sheet of rows for each title, see `draw_sheets`."""
        return draw_sheets({name: to_numpy(rows) for name, rows in panels.items()}, self.run.data.shape, **options)


def carry_out(
    options: UseOptions,
    use: str,
    rows: str = "test",
    select: str | None = None,
    *,
    total: int | None = SELECTED,
    page: bool = False,
    choose: str | None = None,
    raw: bool = False,
    missing: bool = False,
    **arguments: Any,
) -> None:
    """Open a run, apply a use to rows, write its result, and print its sentences.

    ``use`` names, as ``module:function`` of this wing, a function of a `UseContext` and ``arguments``; ``choose`` one
    of the run and the data folder, to select rows in the place of `select_rows`. ``total`` rows pass (None: unknown).
    """
    if not 0 <= options.seed < 2**31:
        raise UserError(f"--seed is {options.seed}, but it must be at least 0 and below {2**31}")
    paths = options.out or []
    use_results.check_outputs(paths, options.overwrite, page=page)
    folder, device, trust = options.data_dir, options.device, options.trust
    run = open_run(options.run, options.variant, device=device, data_folder=folder, trust=trust)
    selected = _function(choose)(run, folder) if choose else select_rows(run, rows, select, raw=raw, missing=missing)
    if note := unfinished_note(run.variant):
        typer.echo(f"warning: {run.name} {note}", err=True)
    if run.others and options.variant is None:
        typer.echo(f"{run.name}, of {1 + len(run.others)} variants (--variant names another)", err=True)
    with matplotlib.rc_context(STYLE), ExitStack() as stack:
        bar = partial(progress_bar, "rows", len(selected.x) if total == SELECTED else total)
        result = _function(use)(UseContext(run, selected, options.seed, _counted(stack, bar), folder), **arguments)
        result.columns = run.data.columns
        about = {"variant": run.name, "fitted": fingerprint(run.variant), "shape": run.data.shape}
        use_results.write_outputs(result, *paths)
        written = paths or use_results.save_in_run(result, options.run, about)
    console = Console()
    for sentence in result.sentences:
        console.print(sentence, markup=False, highlight=False)
    for table in result.tables:
        console.print(rich_table(Table(*table)))
    typer.echo(f"written: {', '.join(map(str, written))}")


def _function(name: str) -> Any:
    return pkgutil.resolve_name(f"pvae.cli.{name}")


def _counted(stack: ExitStack, bar: Callable[[], Any]) -> Callable[[int], None]:
    """Return a function that counts rows on a bar, which appears with the first, so that early errors come alone."""
    done, show = 0, None

    def count(rows: int) -> None:
        nonlocal done, show
        show = show or stack.enter_context(bar())
        done += rows
        show(done, "")

    return count


def make_result(
    verb: str, arrays: Mapping[str, Tensor], sentences: list[str], figure: Figure | None, **more: Any
) -> UseResult:
    """Return a `UseResult` with tensors as arrays."""
    return UseResult(verb, {k: to_numpy(values) for k, values in arrays.items()}, sentences, figure=figure, **more)


def check_room(context: UseContext, rows: int, option: str) -> None:
    """Refuse more new rows than half of the free memory can hold twice: in batches and concatenated."""
    size, room = 8 * rows * context.run.columns, available_memory() / 2
    if size > room:
        message = f"{option}: {rows:,} rows of {context.run.columns} values take {size / 2**30:,.1f} GiB"
        raise UserError(f"{message}, and there is room for {room / 2**30:.1f}", "give a smaller number")


def rows_to_decode(context: UseContext, count: int, labels: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """Return rows [count, C] with what the program takes beside new latents, and their labels by name."""
    run, rows = context.run, context.rows
    which = torch.arange(count) % len(rows.x)
    if not run.data.num_label_columns:
        if labels is not None:
            raise UserError("the run's program takes no labels; fit one that does, as models/conditional-digits.toml")
        return rows.x[which], {}
    labels = rows.labels[which] if labels is None and rows.labels is not None else labels
    assert labels is not None  # rows of such a program have labels
    return run.labelled(rows.x[which, : run.columns], labels), {"label": labels}


def squared_error(x_hat: Tensor, x: Tensor, where: Tensor | None = None) -> Estimate:
    """Return the mean squared error per value, over rows; of the entries ``where`` alone, over rows that have any."""
    errors = (x_hat - x).square()
    if where is None:
        return mean_se(errors.nanmean(1))
    count = where.sum(1)
    return mean_se((torch.where(where, errors, 0).sum(1) / count.clamp(min=1))[count > 0])


def error_words(error: Estimate) -> str:
    """Return an error as words, also if missing entries make it NaN."""
    return number(error) if math.isfinite(error.mean) else "an unknown error (entries are missing)"
