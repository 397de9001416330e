"""The command line: options to a recipe and a run, results to the screen, a mistake to one line and exit status 2."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any

import typer

from pvae.cli import options as opt
from pvae.cli.run_commands import COMMANDS
from pvae.errors import UserError, nearest, params_rendered_by
from pvae.runtime.signals import with_resume_hint
from pvae.runtime.torchrun import is_peer_failure, rank_info

app = typer.Typer(add_completion=False, context_settings={"help_option_names": ["-h", "--help"]})
state = {"debug": False}


def _say_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"pvae {version('pvae-pyro')}")
        raise typer.Exit


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
    if rank_info().world_size > 1 and context.invoked_subcommand != "fit":
        line = f"pvae {context.invoked_subcommand} is a job for one process; start it without torchrun"
        raise typer.Exit(_fail(f"{line}, which is for fit", 2))


@app.command()
@opt.with_options
def compare(
    options: opt.RecipeOptions,
    arguments: opt.GuideOptions,
    axes: opt.SweepOptions,
    budget: opt.BudgetOptions,
    device: opt.Device = "auto",
    data_dir: opt.DataDir = None,
    out: opt.Out = None,
    overwrite: opt.Overwrite = False,
    resume: opt.Resume = False,
    jobs: opt.Jobs = 1,
    trust: opt.Trust = False,
    record: Annotated[
        bool, typer.Option("--record", help="Write the figures into the table \\[expected] of the recipe.")
    ] = False,
) -> None:
    """Train and evaluate variants side by side: tables, conclusions and the page.

    Amortized, per-datapoint and semi-amortized inference are compared unless axes are given.
    """
    from pvae.experiments import compare as comparing
    from pvae.experiments.results import expected_figures
    from pvae.recipes import recipe

    if record and options.path is None:
        raise UserError("--record needs a recipe file to write to")
    file = arguments.complete(axes.extend(options.open(trust=trust), options))
    folder = out or Path("runs") / f"compare-{Path(options.path or file.recipe.data).stem}"
    run = budget.run_options(folder, device=device, jobs=jobs, trust=trust)
    with with_resume_hint(folder, "--resume instead of --overwrite" if overwrite else "--resume"):
        results = comparing.compare(
            file.recipe, run, vary=file.vary, data_folder=data_dir, overwrite=overwrite, resume=resume
        )
    _show(results, folder)
    if record and options.path is not None:
        recipe.record_expected(options.path, expected_figures(results))


@app.command()
@opt.with_options
def fit(
    options: opt.RecipeOptions,
    arguments: opt.GuideOptions,
    data_dir: opt.DataDir = None,
    device: opt.Device = "auto",
    out: opt.Out = None,
    trust: opt.Trust = False,
    overwrite: opt.Overwrite = False,
    resume: opt.Resume = False,
) -> None:
    """Train one variant and print its ELBO on all test rows; under torchrun, train on several processes."""
    from pvae.experiments import run_folder
    from pvae.recipes import preflight, recipe
    from pvae.runtime import distributed
    from pvae.runtime.precision import check_precision
    from pvae.runtime.torch_state import pick_device

    distributed.init_process_group()
    with distributed.fail_together():
        local_device = distributed.local_device(pick_device(device))
        complete = recipe.resolve(arguments.complete(options.open(trust=trust)).recipe)
        check_precision(complete.precision, local_device)
        dataset = recipe.load_recipe_data(complete, data_dir)
        if distributed.is_main_process():
            typer.echo(dataset.summary())
        untrained = preflight.check_recipe(complete, dataset)
        folder = out or Path("runs") / f"fit-{Path(options.path or complete.data).stem}"
        if distributed.is_main_process():
            for warning in preflight.recipe_warnings(complete):
                typer.echo(f"warning: {warning}", err=True)
            run_folder.prepare_folder(folder, complete, overwrite=overwrite, resume=resume)
    fitted = run_folder.train_in_folder(
        untrained, dataset, folder, device=device, resume=resume, progress=True, check_data=False
    )
    distributed.destroy_process_group()
    if rank_info().rank == 0:
        typer.echo(f"{_test_bound(fitted, dataset.test.to(local_device))}\nthe run: {folder} (pvae evaluate {folder})")


def _test_bound(fitted: Any, x: Any) -> str:
    """Say how long training took and what the ELBO of test rows is, or log p(x, z) at a point mass."""
    from pvae.diagnostics.evaluation import bounds
    from pvae.diagnostics.quantities import describe
    from pvae.stats import measure_row_influence, number

    evaluation = bounds(fitted.model, fitted.guide, x, K=10, seed=fitted.recipe.seed)
    means = evaluation.summary()
    name, epochs = "elbo" if "elbo" in means else "log_joint", len(fitted.fit.history)
    took = f"{epochs} epoch{'' if epochs == 1 else 's'} in {fitted.fit.seconds:.1f} s"
    influence = measure_row_influence(evaluation.values[name])
    rows = ", ".join(map(str, influence.rows))
    few = f"; median {influence.median:.5g}, for test rows {rows} rule the mean" if influence.dominates else ""
    return f"{took}; test {describe(name).label} {number(means[name])} nats over {len(x)} rows, 10 draws each{few}"


@app.command()
@opt.with_options
def evaluate(
    run: opt.Run,
    budget: opt.BudgetOptions,
    device: opt.Device = "auto",
    data_dir: opt.DataDir = None,
    trust: opt.Trust = False,
) -> None:
    """Evaluate a run of fit or compare: bounds, evidence and gaps, each with its standard error.

    Finished parts are cached; rerun the command to resume.
    """
    from pvae.experiments import compare as comparing
    from pvae.experiments.run import open_variants

    options = budget.run_options(run, device=device, trust=trust)
    with with_resume_hint(run):
        variants = open_variants(run, device=device, data_folder=data_dir, trust=trust, say=options.say)
        results = comparing.evaluate_variants(variants, options, comparing.left_out(run))
    _show(results, run)


@app.command()
def diagnose(
    run: opt.Run,
    budget: Annotated[
        str, typer.Option(help="quick, standard (about 7 times its work) or thorough (about 80 times).")
    ] = "standard",
    only: Annotated[str | None, typer.Option(help="Variants to diagnose, by commas (default all).")] = None,
    device: opt.Device = "auto",
    data_dir: opt.DataDir = None,
    trust: opt.Trust = False,
) -> None:
    """Diagnose the posterior of each variant of a run: how far from the truth, why, and for which rows.

    Bounds and gaps are those of the last pvae evaluate; a run without one is evaluated first, at the same budget.
    If a variant was trained with several seeds, only the first is diagnosed. An estimate of the run time is printed
    first. Finished parts are cached; rerun the command to resume.
    """
    from pvae.diagnostics.battery import DIAGNOSIS_BUDGETS
    from pvae.experiments import compare as comparing
    from pvae.experiments import diagnosis as diagnosing
    from pvae.experiments.run import open_variants
    from pvae.recipes.registry import split_words
    from pvae.reporting.tables import print_diagnosis

    options = opt.BudgetOptions(budget).run_options(run, device=device, trust=trust)
    variants = open_variants(run, device=device, data_folder=data_dir, trust=trust, say=options.say)
    wanted = [] if only is None else list(dict.fromkeys(split_words(only)))
    diagnosing.select_variants(variants, wanted)
    with with_resume_hint(run):
        if results := comparing.current_results(run, variants):
            typer.echo(f"{_evaluated(results)}; pvae evaluate {run} --budget {budget} replaces them")
        else:
            results = comparing.evaluate_variants(variants, options, comparing.left_out(run))
        diagnosis = diagnosing.diagnose_run(variants, results, options, DIAGNOSIS_BUDGETS[budget], wanted)
    for variant in diagnosis["variants"]:
        if not wanted or variant["name"] in wanted:
            print_diagnosis(variant)
    report(run)


@app.command()
def report(run: opt.Run) -> None:
    """Write the page of an evaluated run again."""
    from pvae.reporting import write_report

    typer.echo(f"the page: {write_report(run)}")


@app.command()
@opt.with_options
def show(options: opt.RecipeOptions, arguments: opt.GuideOptions, trust: opt.Trust = False) -> None:
    """Print a recipe with everything that its data and components fill in."""
    from pvae.recipes import recipe

    file = arguments.complete(options.open(trust=trust))
    typer.echo(recipe.to_toml(recipe.resolve(file.recipe), file.vary), nl=False)


@app.command()
@opt.with_options
def check(
    options: opt.RecipeOptions, arguments: opt.GuideOptions, data_dir: opt.DataDir = None, trust: opt.Trust = False
) -> None:
    """Try a recipe before hours are spent: shapes, support, one step, a gradient in every parameter."""
    from pvae.experiments import sweep
    from pvae.recipes.preflight import try_recipe

    file = arguments.complete(options.open(trust=trust))
    datasets = sweep.DatasetCache(data_dir)
    points, left_out = sweep.runnable(sweep.sweep_points(file.recipe, file.vary), datasets)
    for name, reason in left_out.items():
        typer.echo(f"{name} is left out: {reason}")
    for point in points:
        assert point.untrained is not None  # of every runnable point
        for line in try_recipe(point.untrained, datasets[point.recipe]):
            typer.echo(f"{point.name}: {line}" if len(points) > 1 else line)


@app.command("list")
def list_(kind: Annotated[str | None, typer.Argument(help="One kind, with its components' arguments.")] = None) -> None:
    """List all components by kind, with one line each."""
    from rich.console import Console
    from rich.table import Table

    from pvae.data import preprocessing, sources
    from pvae.recipes import registry

    if kind is not None and kind not in registry.KINDS:
        raise UserError(f"unknown kind '{kind}'{nearest(kind, registry.KINDS)}")
    console = Console()
    for title in registry.KINDS if kind is None else [kind]:
        table = Table(title=f"--{title}", title_justify="left", show_header=False, box=None, pad_edge=False)
        for name in registry.KINDS[title].__all__:
            cells = [", ".join(f"{k}={v!r}" for k, v in registry.defaults(title, name).items())] if kind else []
            table.add_row(f"[bold]{name}[/bold]", registry.first_doc_line(registry.find_class(title, name)), *cells)
        console.print(table, end="\n")
    if kind is None:
        console.print(f"[italic]--data[/italic]\n{', '.join(sources.NAMES)}, or a .npy, .npz, .csv or .parquet file")
        console.print(f"[italic]--binarize[/italic]\n{', '.join(preprocessing.BINARIZATIONS)}")
        console.print("\n`pvae list prior` shows the arguments of priors, and so on. Give them in brackets,")
        console.print("as in --objective 'IWAE(K=20)'; file.py:Class names a class of your own.")


for verb, command in COMMANDS.items():
    app.command(verb, rich_help_panel="Uses of a run")(command)


def _show(results: dict[str, Any], folder: Path) -> None:
    """Print results as tables and conclusions, and write the page."""
    from pvae.reporting import write_report
    from pvae.reporting.tables import print_results

    print_results(results)
    typer.echo(f"\nthe page: {write_report(folder, results)}")


def _evaluated(results: dict[str, Any]) -> str:
    """Say which evaluation a diagnosis takes bounds and gaps from."""
    sizes = [
        f"{group['data']['evaluated_rows']['test']} test rows, K = {next(iter(group['rows'][0]['test'].values()))['K']}"
        for group in results["groups"]
    ]
    return f"bounds and gaps of the last evaluation: {', '.join(dict.fromkeys(sizes))}"


def _usage(error: Any) -> str:
    """Return typer's message about the command line in one line, with the nearest right word."""
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
        with params_rendered_by(opt.as_option):
            words = list(sys.argv[1:] if arguments is None else arguments)
            status = typer.main.get_command(app).main(args=words, prog_name="pvae", standalone_mode=False)
        if status == 128 + signal.SIGINT:  # typer has caught Ctrl-C
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
        if is_peer_failure(error):
            return 2
        if not hasattr(error, "signal"):
            raise
        return _fail(str(error), 128 + error.signal)


def _fail(line: str, status: int, *, speaks: bool = False) -> int:
    """Print an error and return the status; the first process prints, or one that alone knows it and ``speaks``."""
    if speaks or rank_info().rank == 0:
        print(f"error: {line}", file=sys.stderr)
    return status
