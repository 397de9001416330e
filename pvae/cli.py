"""The command line: flags to a recipe and a job, results to the screen, a mistake to one line and exit status 2."""

from __future__ import annotations

import functools
import inspect
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any

import typer

from pvae.errors import UserError, nearest

__all__ = ["main"]

app = typer.Typer(
    name="pvae",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
state = {"debug": False}

Flag = typer.Option
Run = Annotated[Path, typer.Argument(help="Folder of a run.")]
Device = Annotated[str, Flag(help="auto, cpu or cuda.")]
DataDir = Annotated[Path | None, Flag(help="Where torchvision's data sets are; else $PVAE_DATA.")]
Overwrite = Annotated[bool, Flag("--overwrite", help="Replace the run that the folder holds.")]
Resume = Annotated[bool, Flag("--resume", help="Go on with the run that the folder holds.")]
Out = Annotated[Path | None, Flag(help="Folder of the run (default runs/<verb>-<data>).")]


def recipe_flags(
    data: Annotated[str, Flag(help="digits, mnist, fashion-mnist, kmnist, or a .npy/.npz/.csv/.parquet.")] = "digits",
    binarize: Annotated[str | None, Flag(help="none, threshold (x > 0.5) or dynamic (drawn for each batch).")] = None,
    test_size: Annotated[float | None, Flag(help="Test rows, as a count or a fraction (default 0.2).")] = None,
    validation_size: Annotated[float, Flag(help="Validation rows out of the training rows, likewise.")] = 0,
    likelihood: Annotated[str, Flag(help="p(x|z), see `pvae list`.")] = "Bernoulli",
    prior: Annotated[str, Flag(help="p(z), see `pvae list`.")] = "StandardNormal",
    family: Annotated[str, Flag(help="q(z|x), see `pvae list`.")] = "DiagonalNormal",
    network: Annotated[str, Flag(help="Encoder and decoder, see `pvae list`.")] = "MLP",
    hidden: Annotated[str | None, Flag(help="Widths of the encoder's hidden layers, by commas.")] = None,
    latent: Annotated[int | None, Flag(help="Number of latent dimensions (default by data).")] = None,
    epochs: Annotated[int | None, Flag(help="Visits of every datapoint (default by data).")] = None,
    batch_size: Annotated[int, Flag(help="Datapoints in a step.")] = 128,
    learning_rate: Annotated[float | None, Flag(help="Of Adam, on what the datapoints share.")] = None,
    patience: Annotated[int | None, Flag(help="Stop after so many epochs without a better validation ELBO.")] = None,
    seed: Annotated[int, Flag(help="Of splits, initial parameters, batches and draws.")] = 0,
) -> Any:
    """The recipe that the flags describe, its guide left open."""
    from pvae.recipe import Recipe

    widths: dict[str, Any] = {} if hidden is None else {"hidden": _whole_numbers("--hidden", hidden)}
    return Recipe(
        data=data,
        binarize=binarize,
        test_size=test_size,
        validation_size=validation_size,
        likelihood=likelihood,
        prior=prior,
        family=family,
        network={"type": network} | widths,
        latent=latent,
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        patience=patience,
        seed=seed,
    )


def guide_flags(
    local_steps: Annotated[int | None, Flag(help="PerDatapoint: steps of a row at each visit.")] = None,
    local_learning_rate: Annotated[float | None, Flag(help="PerDatapoint: rate of these steps.")] = None,
    semi_steps: Annotated[int | None, Flag(help="SemiAmortized: refinement steps.")] = None,
    unroll: Annotated[bool | None, Flag("--unroll/--no-unroll", help="SemiAmortized: train through them.")] = None,
) -> Callable[[str], dict[str, Any]]:
    """A function from a guide's name to its table, with the flags that belong to it."""
    flags: dict[str, dict[str, Any]] = {
        "PerDatapoint": {"local_steps": local_steps, "local_learning_rate": local_learning_rate},
        "SemiAmortized": {"steps": semi_steps, "unroll": unroll},
    }

    def component(name: str) -> dict[str, Any]:
        return {"type": name} | {k: v for k, v in flags.get(name, {}).items() if v is not None}

    return component


def job_flags(
    device: Device = "auto",
    rows: Annotated[int, Flag(help="Rows of each split to evaluate.")] = 300,
    samples: Annotated[int, Flag(help="K, draws for each row and bound.")] = 1000,
    refine_steps: Annotated[int, Flag(help="The most steps in search of the best lam of the family.")] = 300,
) -> Callable[[Path], Any]:
    """A function from a run's folder to the job that the flags describe."""
    for name, value, least in (("rows", rows, 2), ("samples", samples, 2), ("refine-steps", refine_steps, 1)):
        if value < least:
            raise UserError(f"--{name} is {value}, but it must be at least {least}")

    def job(folder: Path) -> Any:
        from pvae.compare import Job
        from pvae.evaluation import Budget

        return Job(folder, device, rows, Budget(samples, refine_steps), progress=True, say=typer.echo)

    return job


def takes(*groups: Callable[..., Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the flags of these functions; what they make of them are its first arguments."""

    def decorate(command: Callable[..., None]) -> Any:
        signatures = [inspect.signature(group, eval_str=True).parameters for group in groups]
        own = list(inspect.signature(command, eval_str=True).parameters.values())[len(groups) :]

        @functools.wraps(command)
        def wrapper(**flags: Any) -> None:
            made = [
                group(**{name: flags.pop(name) for name in names})
                for group, names in zip(groups, signatures, strict=True)
            ]
            command(*made, **flags)

        run: Any = wrapper
        shared = [p for parameters in signatures for p in parameters.values()]
        everything = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in (*shared, *own)]
        run.__signature__ = inspect.Signature(everything)
        run.__annotations__ = {p.name: p.annotation for p in everything}
        del run.__wrapped__
        return run

    return decorate


def _say_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"pvae {version('pvae-pyro')}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[bool, Flag("--version", callback=_say_version, is_eager=True, help="Show it and exit.")] = False,
    debug: Annotated[bool, Flag("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Which approximate posterior to trust, and what it costs, for latent-variable models on Pyro."""
    state["debug"] = debug


@app.command()
@takes(recipe_flags, guide_flags, job_flags)
def compare(
    own: Any,
    guide_of: Any,
    job_in: Any,
    guides: Annotated[str, Flag(help="Guides to compare, by commas.")] = "Amortized,PerDatapoint,SemiAmortized",
    data_dir: DataDir = None,
    out: Out = None,
    overwrite: Overwrite = False,
    resume: Resume = False,
) -> None:
    """Train amortized, per-datapoint and semi-amortized inference side by side: table, verdict and page."""
    from pvae import compare as comparing

    names = [name.strip() for name in guides.split(",")]
    if len(set(names)) < len(names):
        raise UserError(f"--guides {guides} names a guide twice")
    job = job_in(out or _folder("compare", own.data))
    sources = [guide_of(name) for name in names]
    results = comparing.compare(own, job, sources=sources, data_folder=data_dir, overwrite=overwrite, resume=resume)
    _show(results, job.folder)


@app.command()
@takes(recipe_flags, guide_flags)
def fit(
    own: Any,
    guide_of: Any,
    guide: Annotated[str, Flag(help="Where the parameters of q come from, see `pvae list`.")] = "Amortized",
    data_dir: DataDir = None,
    device: Device = "auto",
    out: Out = None,
    overwrite: Overwrite = False,
    resume: Resume = False,
) -> None:
    """Train one variant and say its ELBO on all test rows."""
    from pvae import recipe, runs
    from pvae.evaluation import bounds
    from pvae.runtime import pick_device
    from pvae.verdicts import number

    own = recipe.resolve(replace(own, guide=guide_of(guide)))
    where = pick_device(device)
    dataset = recipe.load_data(own, data_dir)
    typer.echo(dataset.summary())
    runs.check(own, dataset)
    folder = out or _folder("fit", own.data)
    runs.prepare(folder, own, overwrite=overwrite, resume=resume)
    variant = runs.train(own, dataset, folder, device=device, resume=resume, progress=True)
    vae, posterior = variant.built
    found = bounds(vae.model, posterior, dataset.test.to(where), K=10, seed=own.seed).summary()
    name = "elbo" if "elbo" in found else "log_joint"
    typer.echo(
        f"{len(variant.fit.history)} epochs in {variant.fit.seconds:.1f} s; test {name} {number(found[name])} nats "
        f"over {len(dataset.test)} rows, 10 draws each\nthe run: {folder} (pvae evaluate {folder} judges it)"
    )


@app.command()
@takes(job_flags)
def evaluate(job_in: Any, run: Run, data_dir: DataDir = None) -> None:
    """Evaluate a run that fit or compare has trained: bounds, evidence and gaps with errors."""
    from pvae import compare as comparing

    job = job_in(run)
    _show(comparing.judge(*comparing.load(job, data_dir), job), run)


@app.command()
def report(run: Run) -> None:
    """Write the page of an evaluated run anew."""
    from pvae import report as page

    typer.echo(f"the page: {page.write(run)}")


@app.command("list")
def list_() -> None:
    """All components by kind, with one line each."""
    from rich.console import Console
    from rich.table import Table

    from pvae import data
    from pvae.recipe import KINDS

    console = Console()
    for kind, module in KINDS.items():
        table = Table(title=f"--{kind}", title_justify="left", show_header=False, box=None, pad_edge=False)
        for name in module.__all__:
            table.add_row(f"[bold]{name}[/bold]", _one_line(getattr(module, name)))
        console.print(table, end="\n")
    console.print(f"[italic]--data[/italic]\n{', '.join(data.NAMES)}, or a .npy, .npz, .csv or .parquet file")
    console.print(f"[italic]--binarize[/italic]\n{', '.join(data.BINARIZATIONS)}")


def _one_line(component: Any) -> str:
    line = (component.__doc__ or "").strip().splitlines()[0]
    return line.replace(":math:", "").replace("`", "")


def _show(results: dict[str, Any], folder: Path) -> None:
    """The results as tables and sentences on the screen, and the page."""
    from rich.console import Console
    from rich.padding import Padding

    from pvae import report as page
    from pvae.tables import rich_tables

    console = Console()
    for table in rich_tables(results):
        console.print(table)
    console.print("\n[bold]Verdict[/bold]")
    for sentence in results["verdicts"]:
        console.print(Padding(f"- {sentence}", (0, 0, 0, 2)), markup=False, highlight=False)
    typer.echo(f"\nthe page: {page.write(folder)}")


def _folder(verb: str, data: str) -> Path:
    return Path("runs") / f"{verb}-{Path(data).stem}"


def _whole_numbers(flag: str, text: str) -> list[int]:
    try:
        numbers = [int(word) for word in text.split(",")]
    except ValueError:
        raise UserError(f"{flag} is '{text}', but it must be whole numbers separated by commas") from None
    if min(numbers) < 1:
        raise UserError(f"{flag} is '{text}', but every width must be at least 1")
    return numbers


def _usage(error: Any) -> str:
    """Typer's complaint about the command line, in one line and with the nearest right word."""
    text = " ".join(error.format_message().split()).replace(": Value error, ", ": ")
    text = re.sub(r" \(Possible options: (.*)\)$", r"; did you mean \1?", text)
    if text.startswith("Missing command"):
        return f"no command given{nearest('', error.ctx.command.commands)}" if error.ctx else text
    choice = re.search(r"'([^']*)' is not one of (.*?)\.?$", text)
    if choice and (close := get_close_matches(choice[1], re.findall(r"'([^']*)'", choice[2]), n=1)):
        text = f"{text.rstrip('.')}; did you mean '{close[0]}'?"
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status is 0, 2 for a user's mistake, or 128 + the signal that stopped it."""
    # Threads that wait should sleep: spinning, they take several times as long on a machine that does other work too.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        given = list(sys.argv[1:] if arguments is None else arguments)
        status = typer.main.get_command(app).main(args=given, prog_name="pvae", standalone_mode=False)
        return status if isinstance(status, int) else 0
    except typer.TyperException as error:
        return _fail(_usage(error), error.exit_code)
    except (typer.Abort, KeyboardInterrupt):
        return _fail("stopped", 128 + signal.SIGINT)
    except UserError as error:
        if state["debug"]:
            raise
        return _fail(str(error), 2)
    except Exception as error:
        number = getattr(error, "signal", None)
        if number is None:
            raise
        return _fail(str(error), 128 + number)


def _fail(line: str, status: int) -> int:
    print(f"error: {line}", file=sys.stderr)
    return status
