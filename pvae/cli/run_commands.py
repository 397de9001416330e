"""Commands that use a run: rows in, files out, a few sentences on the screen, and what the page of the run shows."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from pvae.cli.options import DataDir, Device, Run, Trust, with_options
from pvae.errors import UserError

Flag = typer.Option
Rows = Annotated[
    str,
    typer.Argument(help="test, train or validation rows of the run, or a .npy, .npz, .csv or .parquet file."),
]
Select = Annotated[str | None, Flag(help="Which rows, counted from 0, as 0:20 or 3,17,5 (default all).")]
Samples = Annotated[int, Flag(help="K, draws of each row's code.")]
Replace = Annotated[bool, Flag("--overwrite", help="Replace files that --out names.")]
# How many rows a bar counts to: those that are given; None where more pass than these.
OF_ROWS = -1
DrawX = Annotated[bool, Flag("--draw", help="Draw x from p(x|z) instead of taking its mean.")]


def use_flags(
    run: Run,
    variant: Annotated[str | None, Flag(help="Of a comparison, which one (default the first).")] = None,
    out: Annotated[
        list[Path] | None,
        Flag(help="A .npz, .npy, .csv, .png or .html; repeatable (default in the run's folder)."),
    ] = None,
    overwrite: Replace = False,
    seed: Annotated[int, Flag(help="Of all draws.")] = 0,
    device: Device = "auto",
    data_dir: DataDir = None,
    trust: Trust = False,
) -> Callable[..., None]:
    """A function that opens the run, takes rows to a use, and writes what comes of it."""
    if not 0 <= seed < 2**31:
        raise UserError(f"--seed is {seed}, but it must be at least 0 and below {2**31}")

    def carry_out(
        make: Callable[[Any], Any],
        rows: str = "test",
        select: str | None = None,
        *,
        total: int | None = OF_ROWS,
        choose: Callable[..., Any] | None = None,
        page: bool = False,
        **reading: bool,
    ) -> None:
        import matplotlib

        from pvae.cli.use_context import UseContext
        from pvae.experiments import opened_run, use_results
        from pvae.experiments.run_folder import fingerprint, unfinished_note
        from pvae.reporting.style import STYLE
        from pvae.runtime.progress import progress_bar

        outs = out or []
        use_results.check_outputs(outs, overwrite, page=page)
        own = opened_run.open_run(run, variant, device=device, data_folder=data_dir, trust=trust)
        chosen = choose(own, data_dir) if choose else opened_run.select_rows(own, rows, select, **reading)
        if left := unfinished_note(own.variant):
            typer.echo(f"warning: {own.name} {left}", err=True)
        if own.others and variant is None:
            typer.echo(f"{own.name}, of {1 + len(own.others)} variants (--variant names another)", err=True)
        with matplotlib.rc_context(STYLE), ExitStack() as stack:
            show = partial(progress_bar, "rows", len(chosen.x) if total == OF_ROWS else total)
            made = make(UseContext(own, chosen, seed, _counted(stack, show), data_dir))
            made.columns = own.data.columns
            about = {"variant": own.name, "fitted": fingerprint(own.variant), "shape": own.data.shape}
            use_results.write_outputs(made, *outs)
            written = outs or use_results.save_in_run(made, run, about)
        _tell(made, written)

    return carry_out


def _counted(stack: ExitStack, bar: Callable[[], Any]) -> Callable[[int], None]:
    """A function that counts rows on a bar, which appears with the first of them: mistakes found before come alone."""
    done, show = 0, None

    def count(rows: int) -> None:
        nonlocal done, show
        show = show or stack.enter_context(bar())
        done += rows
        show(done, "")

    return count


def _tell(made: Any, written: list[Path]) -> None:
    from rich.console import Console

    from pvae.reporting.tables import Table, rich_table

    console = Console()
    for sentence in made.sentences:
        console.print(sentence, markup=False, highlight=False)
    for table in made.tables:
        console.print(rich_table(Table(*table)))
    typer.echo(f"written: {', '.join(map(str, written))}")


@with_options(use_flags)
def reconstruct(carry_out: Any, rows: Rows = "test", select: Select = None, samples: Samples = 8) -> None:
    """Rows through their codes and back, beside principal components."""
    from pvae.cli import run_coding

    _at_least(samples=samples)
    carry_out(lambda asked: run_coding.reconstruct(asked, K=samples), rows, select)


@with_options(use_flags)
def sample(
    carry_out: Any,
    count: Annotated[int, Flag(help="How many.")] = 64,
    temperature: Annotated[float, Flag(help="Of the prior's noise: below 1, draws nearer to its centre.")] = 1.0,
    draw: DrawX = False,
    label: Annotated[str | None, Flag(help="Of all rows, for a program that is given labels.")] = None,
) -> None:
    """New rows from the prior."""
    from pvae.cli import run_coding

    _at_least(count=count)
    carry_out(
        lambda asked: run_coding.sample(asked, count, temperature=temperature, draw=draw, label=label), total=count
    )


@with_options(use_flags)
def interpolate(
    carry_out: Any,
    rows: Rows = "test",
    select: Annotated[str, Flag(help="The rows of the path, in their order.")] = "0:4",
    steps: Annotated[int, Flag(help="From one row to the next.")] = 9,
    how: Annotated[str, Flag(help="linear or spherical.")] = "linear",
) -> None:
    """From row to row through the latent space."""
    from pvae.cli import run_coding

    _at_least(steps=steps)
    carry_out(lambda asked: run_coding.interpolate(asked, steps=steps, how=how), rows, select, total=None)


@with_options(use_flags)
def latent_map(
    carry_out: Any,
    rows: Rows = "test",
    select: Select = None,
    projection: Annotated[
        str, Flag(help="plane (two latent dimensions), pca, tsne, or auto: plane where there is one, else pca.")
    ] = "auto",
    size: Annotated[int, Flag(help="Columns and rows of the grid that is decoded.")] = 20,
) -> None:
    """The codes on a plane, and a page on which the pointer shows what each place decodes to."""
    from pvae.cli import run_coding

    carry_out(
        lambda asked: run_coding.latent_map(asked, projection=projection, size=size),
        rows,
        select,
        total=None,
        page=True,
    )


@with_options(use_flags)
def encode(carry_out: Any, rows: Rows = "test", select: Select = None, samples: Samples = 64) -> None:
    """Rows to codes: mean and standard deviation, rate in bits, distortion."""
    from pvae.cli import run_coding

    _at_least(samples=samples)
    carry_out(lambda asked: run_coding.encode(asked, K=samples), rows, select)


@with_options(use_flags)
def decode(
    carry_out: Any,
    codes: Annotated[Path, typer.Argument(help="Codes: a file of encode, or a table.")],
    draw: DrawX = False,
) -> None:
    """Codes to rows."""
    from pvae.cli import run_coding

    carry_out(lambda asked: run_coding.decode(asked, codes, draw=draw), total=None)


@with_options(use_flags)
def denoise(
    carry_out: Any,
    rows: Rows = "test",
    select: Select = None,
    noise: Annotated[
        str, Flag(help="GaussianNoise(scale=...) or FlipNoise(rate=...), as it came upon the rows.")
    ] = "GaussianNoise(scale=0.5)",
    add: Annotated[
        bool | None, Flag("--add/--as-is", help="Add the noise first (default for the run's rows), or not (for files).")
    ] = None,
    samples: Samples = 100,
    steps: Annotated[int, Flag(help="The most refinement steps of a row.")] = 100,
) -> None:
    """Rows without their noise: the posterior mean of what they were."""
    from pvae.cli import run_restoration

    _at_least(samples=samples, steps=steps)

    def make(asked: Any) -> Any:
        wanted = asked.rows.from_run if add is None else add
        return run_restoration.denoise(asked, noise, add=wanted, K=samples, steps=steps)

    carry_out(make, rows, select, raw=not add)


@with_options(use_flags)
def impute(
    carry_out: Any,
    rows: Rows = "test",
    select: Select = None,
    hide: Annotated[float | None, Flag(help="Hide this share of the entries, to see how well they are told.")] = None,
    draws: Annotated[int, Flag(help="Of each missing entry.")] = 5,
    samples: Samples = 100,
    steps: Annotated[int, Flag(help="The most refinement steps of a row.")] = 100,
) -> None:
    """Missing entries (NaN) filled in from those that are there: mean, standard deviation, draws."""
    from pvae.cli import run_restoration

    _at_least(samples=samples, draws=draws, steps=steps)
    carry_out(
        lambda asked: run_restoration.impute(asked, hide=hide, draws=draws, K=samples, steps=steps),
        rows,
        select,
        missing=True,
    )


@with_options(use_flags)
def augment(
    carry_out: Any,
    rows: Rows = "train",
    select: Select = None,
    per_row: Annotated[int, Flag(help="New rows around each.")] = 4,
    spread: Annotated[float, Flag(help="In standard deviations of q; 0 reconstructs.")] = 1.0,
    draw: DrawX = False,
) -> None:
    """New rows around given ones, and how many of them keep their class."""
    from pvae.cli import run_coding

    _at_least(per_row=per_row)
    carry_out(lambda asked: run_coding.augment(asked, per_row=per_row, spread=spread, draw=draw), rows, select)


@with_options(use_flags)
def anomalies(
    carry_out: Any,
    rows: Rows = "test",
    select: Select = None,
    anomalous: Annotated[
        str | None,
        Flag(help="Labels that count as anomalous (default those that the run was not trained on; of a file 1)."),
    ] = None,
    score: Annotated[str | None, Flag(help="Scores, by commas (default all).")] = None,
    false_alarm: Annotated[float, Flag(help="Share of normal rows that may be flagged.")] = 0.05,
    samples: Samples = 16,
) -> None:
    """Which rows are unlike held-out ones: scores, thresholds for a false-alarm rate, AUROC where labels tell."""
    from pvae.cli import run_anomalies

    chosen = None if score is None else score.split(",")
    labels = None if anomalous is None else [word.strip() for word in anomalous.split(",")]
    others = rows == "test" and select is None
    _at_least(samples=samples)
    carry_out(
        lambda asked: run_anomalies.anomalies(asked, named=labels, chosen=chosen, K=samples, false_alarm=false_alarm),
        rows,
        select,
        total=None,
        choose=run_anomalies.with_others if others else None,
    )


@with_options(use_flags)
def classify(
    carry_out: Any,
    rows: Rows = "test",
    select: Select = None,
    epochs: Annotated[int | None, Flag(help="Of each class's model (default the run's).")] = None,
    samples: Samples = 16,
) -> None:
    """The class of rows by Bayes' rule on a model for each class, trained at the first use, and how sure that is."""
    from pvae.cli import run_classification

    _at_least(samples=samples, **({} if epochs is None else {"epochs": epochs}))

    def make(asked: Any) -> Any:
        models, data = run_classification.class_models(
            asked.run, epochs=epochs, data_folder=asked.data_folder, progress=True, say=typer.echo
        )
        return run_classification.classify(asked, models, data=data, K=samples)

    carry_out(make, rows, select, total=None)


def _at_least(**counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise UserError(f"--{name.replace('_', '-')} is {count}, but it must be at least 1")


COMMANDS: dict[str, Callable[..., None]] = {
    "reconstruct": reconstruct,
    "sample": sample,
    "interpolate": interpolate,
    "map": latent_map,
    "encode": encode,
    "decode": decode,
    "denoise": denoise,
    "impute": impute,
    "anomalies": anomalies,
    "augment": augment,
    "classify": classify,
}
