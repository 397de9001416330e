"""The command line: flags to a recipe and a job, results to the screen, a mistake to one line and exit status 2."""

from __future__ import annotations

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

from pvae.cli.options import (
    DataDir,
    Device,
    Jobs,
    Out,
    Overwrite,
    RecipePath,
    Resume,
    Run,
    Trust,
    grid_flags,
    guide_flags,
    job_flags,
    recipe_flags,
    with_options,
)
from pvae.cli.run_commands import COMMANDS
from pvae.errors import UserError, nearest
from pvae.runtime.signals import with_resume_hint
from pvae.runtime.torchrun import is_peer_failure, rank_info

app = typer.Typer(
    name="pvae",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
state = {"debug": False}


def _say_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"pvae {version('pvae-pyro')}")
        raise typer.Exit


Guide = Annotated[str | None, typer.Option(help="Where the parameters of q come from, see `pvae list`.")]


@app.callback()
def root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_say_version, is_eager=True, help="Show it and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Which approximate posterior to trust, and what it costs, for latent-variable models on Pyro."""
    state["debug"] = debug
    if rank_info().world > 1 and context.invoked_subcommand != "fit":
        line = (
            f"pvae {context.invoked_subcommand} is a job for one process; start it without torchrun, which is for fit"
        )
        raise typer.Exit(_fail(line, 2))


@app.command()
@with_options(recipe_flags, guide_flags, grid_flags, job_flags)
def compare(
    described: Any,
    guide_of: Any,
    axes_of: Any,
    job_in: Any,
    path: RecipePath = None,
    guide: Guide = None,
    data_dir: DataDir = None,
    out: Out = None,
    overwrite: Overwrite = False,
    resume: Resume = False,
    jobs: Jobs = 1,
    record: Annotated[bool, typer.Option("--record", help="Write what is found into the recipe's [expected].")] = False,
) -> None:
    """Train variants side by side, by default amortized, per-datapoint and semi-amortized inference: table and page."""
    from pvae.experiments import compare as comparing

    if record and path is None:
        raise UserError("--record needs a recipe file to write to")
    job = job_in(Path())
    file = described(path, job.trust, guide=guide)
    axes = axes_of(file, guide_of, described)
    job = replace(job, folder=out or _folder("compare", path or file.recipe.data), jobs=jobs)
    with with_resume_hint(job.folder, "--resume instead of --overwrite" if overwrite else "--resume"):
        results = comparing.compare(
            file.recipe, job, vary=axes, data_folder=data_dir, overwrite=overwrite, resume=resume
        )
    _show(results, job.folder)
    if record and path is not None:
        from pvae.experiments.results import expected_figures
        from pvae.recipes import recipe

        recipe.record(path, expected_figures(results))


@app.command()
@with_options(recipe_flags, guide_flags)
def fit(
    described: Any,
    guide_of: Any,
    path: RecipePath = None,
    guide: Guide = None,
    data_dir: DataDir = None,
    device: Device = "auto",
    out: Out = None,
    trust: Trust = False,
    overwrite: Overwrite = False,
    resume: Resume = False,
) -> None:
    """Train one variant and say its ELBO on all test rows; under torchrun, in several processes."""
    from pvae.diagnostics.evaluation import bounds
    from pvae.experiments import run_folder
    from pvae.recipes import preflight, recipe
    from pvae.recipes.preflight import warnings
    from pvae.reporting.tables import QUANTITIES
    from pvae.runtime import distributed
    from pvae.runtime.precision import check_precision
    from pvae.runtime.torch_state import pick_device
    from pvae.stats import number

    distributed.init_process_group()
    with distributed.fail_together():
        where = distributed.local_device(pick_device(device))
        own = recipe.resolve(_guided(described(path, trust, guide=guide), guide_of).recipe)
        check_precision(own.precision, where)
        dataset = recipe.load_recipe_data(own, data_dir)
        if distributed.is_main_process():
            typer.echo(dataset.summary())
        preflight.check_recipe(own, dataset)
        folder = out or _folder("fit", path or own.data)
        if distributed.is_main_process():
            for warning in warnings(own):
                typer.echo(f"warning: {warning}", err=True)
            run_folder.prepare_folder(folder, own, overwrite=overwrite, resume=resume)
    variant = run_folder.train_in_folder(own, dataset, folder, device=device, resume=resume, progress=True)
    distributed.destroy_process_group()
    if rank_info().rank > 0:
        return
    found = bounds(variant.model, variant.guide, dataset.test.to(where), K=10, seed=own.seed).summary()
    name = "elbo" if "elbo" in found else "log_joint"
    epochs = len(variant.fit.history)
    typer.echo(
        f"{epochs} epoch{'' if epochs == 1 else 's'} in {variant.fit.seconds:.1f} s; test {QUANTITIES[name]} "
        f"{number(found[name])} nats over {len(dataset.test)} rows, 10 draws each\n"
        f"the run: {folder} (pvae evaluate {folder} judges it)"
    )


@app.command()
@with_options(job_flags)
def evaluate(job_in: Any, run: Run, data_dir: DataDir = None) -> None:
    """Evaluate a run that fit or compare has trained: bounds, evidence and gaps with errors.

    What is finished is kept: the same command goes on where it was stopped.
    """
    from pvae.experiments import compare as comparing

    job = job_in(run)
    with with_resume_hint(run):
        results = comparing.evaluate_variants(comparing.load_variants(job, data_dir), job, comparing.left_out(run))
    _show(results, run)


@app.command()
def diagnose(
    run: Run,
    budget: Annotated[
        str, typer.Option(help="quick, standard (about 10 times its work) or thorough (about 100 times).")
    ] = "standard",
    only: Annotated[str | None, typer.Option(help="Variants to look at, by commas (default all).")] = None,
    device: Device = "auto",
    data_dir: DataDir = None,
    trust: Trust = False,
) -> None:
    """Say how far each posterior of a run is from the truth, why, and for which rows: figures, verdicts, the page.

    Bounds and gaps are those of the last pvae evaluate; a run without one is evaluated first, at the same budget.
    Of several seeds the first is looked at. The cost is said before it begins.
    What is finished is kept: the same command goes on where it was stopped.
    """
    from pvae.diagnostics.battery import DIAGNOSIS_BUDGETS
    from pvae.experiments import compare as comparing
    from pvae.experiments import diagnosis as diagnosing
    from pvae.recipes.registry import split_words

    if budget not in DIAGNOSIS_BUDGETS:
        raise UserError(f"--budget is '{budget}'{nearest(budget, DIAGNOSIS_BUDGETS)}")
    rows, own = comparing.BUDGETS[budget]
    job = comparing.RunOptions(run, device, rows, own, trust=trust, progress=True, say=typer.echo)
    entries = comparing.load_variants(job, data_dir)
    wanted = [] if only is None else list(dict.fromkeys(split_words(only)))
    diagnosing.select_variants(entries, wanted)
    with with_resume_hint(run):
        results = comparing.current_results(run, entries)
        if results:
            typer.echo(f"{_evaluated(results)}; pvae evaluate {run} --budget {budget} makes them anew")
        else:
            results = comparing.evaluate_variants(entries, job, comparing.left_out(run))
        found = diagnosing.diagnose_run(entries, results, job, DIAGNOSIS_BUDGETS[budget], wanted)
    _show_diagnosis([own for own in found["variants"] if not wanted or own["name"] in wanted], run)


@app.command()
def report(run: Run) -> None:
    """Write the page of an evaluated run anew."""
    from pvae.reporting import html_report as page

    typer.echo(f"the page: {page.write_report(run)}")


@app.command()
@with_options(recipe_flags, guide_flags)
def show(described: Any, guide_of: Any, path: RecipePath = None, guide: Guide = None, trust: Trust = False) -> None:
    """Write out a recipe with everything that its data and components fill in."""
    from pvae.recipes import recipe

    file = _guided(described(path, trust, guide=guide), guide_of)
    typer.echo(recipe.words(recipe.resolve(file.recipe), file.vary), nl=False)


@app.command()
@with_options(recipe_flags, guide_flags)
def check(
    described: Any,
    guide_of: Any,
    path: RecipePath = None,
    guide: Guide = None,
    data_dir: DataDir = None,
    trust: Trust = False,
) -> None:
    """Try a recipe before hours are spent: shapes, support, one step, a gradient in every parameter."""
    from pvae.experiments import sweep
    from pvae.recipes.preflight import try_recipe

    file = _guided(described(path, trust, guide=guide), guide_of)
    shelf = sweep.DatasetCache(data_dir)
    kept, left_out = sweep.runnable(sweep.sweep_points(file.recipe, file.vary), shelf)
    for name, reason in left_out.items():
        typer.echo(f"{name} is left out: {reason}")
    for cell in kept:
        for line in try_recipe(cell.recipe, shelf[cell.recipe]):
            typer.echo(f"{cell.name}: {line}" if len(kept) > 1 else line)


@app.command("list")
def list_(kind: Annotated[str | None, typer.Argument(help="One kind, with its components' arguments.")] = None) -> None:
    """All components by kind, with one line each."""
    from rich.console import Console
    from rich.table import Table

    from pvae.data import preprocessing, sources
    from pvae.recipes import registry

    if kind is not None and kind not in registry.KINDS:
        raise UserError(f"unknown kind '{kind}'{nearest(kind, registry.KINDS)}")
    console = Console()
    for each in registry.KINDS if kind is None else [kind]:
        table = Table(title=f"--{each}", title_justify="left", show_header=False, box=None, pad_edge=False)
        for name in registry.KINDS[each].__all__:
            own = registry.defaults(each, name) if kind else {}
            cells = [", ".join(f"{n}={v!r}" for n, v in own.items())] if kind else []
            table.add_row(f"[bold]{name}[/bold]", registry.first_doc_line(registry.find_class(each, name)), *cells)
        console.print(table, end="\n")
    if kind is None:
        console.print(f"[italic]--data[/italic]\n{', '.join(sources.NAMES)}, or a .npy, .npz, .csv or .parquet file")
        console.print(f"[italic]--binarize[/italic]\n{', '.join(preprocessing.BINARIZATIONS)}")
        console.print("\n`pvae list prior` shows the arguments of priors, and so on. Give them in brackets,")
        console.print("as in --objective 'IWAE(K=20)'; file.py:Class names a class of your own.")


for verb, command in COMMANDS.items():
    app.command(verb, rich_help_panel="Uses of a run")(command)


def _guided(file: Any, guide_of: Callable[[Any], Any]) -> Any:
    """What a recipe file says, with what the flags say of its guides."""
    vary = {name: [guide_of(v) for v in values] if name == "guide" else values for name, values in file.vary.items()}
    return file._replace(recipe=replace(file.recipe, guide=guide_of(file.recipe.guide)), vary=vary)


def _show(results: dict[str, Any], folder: Path) -> None:
    """The results as tables and sentences on the screen, and the page."""
    from rich.console import Console
    from rich.padding import Padding

    from pvae.reporting import html_report as page
    from pvae.reporting.tables import rich_tables

    console = Console()
    for table in rich_tables(results):
        console.print(table)
    console.print("\n[bold]Verdict[/bold]")
    for group in results["groups"]:
        if len(results["groups"]) > 1:
            console.print(f"{group['data']['identity']}, {group['data']['base_measure']}:", markup=False)
        for sentence in group["verdicts"]:
            console.print(Padding(f"- {sentence}", (0, 0, 0, 2)), markup=False, highlight=False)
    typer.echo(f"\nthe page: {page.write_report(folder)}")


def _show_diagnosis(variants: list[dict[str, Any]], folder: Path) -> None:
    """Figures and verdicts of each variant on the screen, and the page."""
    from rich.console import Console
    from rich.padding import Padding

    from pvae.diagnostics.trust import USES
    from pvae.reporting import html_report as page
    from pvae.reporting.tables import diagnosis_tables, rich_table

    console = Console()
    for variant in variants:
        console.rule(f"Diagnosis of {variant['name']}", align="left", style="bold")
        for table in diagnosis_tables(variant):
            console.print(rich_table(table))
        console.print(f"[bold]How far may {variant['name']} be trusted?[/bold]")
        for verdict in variant["verdicts"]:
            console.print(f"\n  [bold]{verdict['level']}[/bold]: {USES[verdict['use']]}", highlight=False)
            first = [f"change first: {verdict['first']}"] if verdict["first"] else []
            for sentence in (*verdict["because"], *first):
                console.print(Padding(f"- {sentence}", (0, 0, 0, 4)), markup=False, highlight=False)
        console.print()
    typer.echo(f"the page: {page.write_report(folder)}")


def _evaluated(results: dict[str, Any]) -> str:
    """Which evaluation a diagnosis takes bounds and gaps from."""
    own = [
        (g["data"]["evaluated_rows"]["test"], next(iter(g["rows"][0]["test"].values()))["K"]) for g in results["groups"]
    ]
    return "bounds and gaps of the last evaluation: " + ", ".join(
        f"{rows} test rows, K = {K}" for rows, K in dict.fromkeys(own)
    )


def _folder(verb: str, source: str | Path) -> Path:
    return Path("runs") / f"{verb}-{Path(source).stem}"


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
        if status == 128 + signal.SIGINT:  # how typer says that it has caught Ctrl-C
            return _fail("stopped", status)
        return status if isinstance(status, int) else 0
    except typer.TyperException as error:
        return _fail(_usage(error), error.exit_code)
    except (typer.Abort, KeyboardInterrupt):
        return _fail("stopped", 128 + signal.SIGINT)
    except UserError as error:
        if state["debug"]:
            raise
        return _fail(str(error), 2, speaks=True)
    except Exception as error:
        number = getattr(error, "signal", None)
        if is_peer_failure(error):
            return 2
        if number is None:
            raise
        return _fail(str(error), 128 + number)


def _fail(line: str, status: int, *, speaks: bool = False) -> int:
    """Say what is wrong; of several processes that know it one ``speaks``, the first unless told."""
    if speaks or rank_info().rank == 0:
        print(f"error: {line}", file=sys.stderr)
    return status
