"""Flags of the command line, declared once: what they say becomes a recipe, its axes, and a job."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from pvae.errors import UserError, nearest

Flag = typer.Option
# Of annealing, where it is asked for and no number is given.
TEMPERATURES = 500
Run = Annotated[Path, typer.Argument(help="Folder of a run.")]
RecipePath = Annotated[Path | None, typer.Argument(help="A recipe (TOML); flags override its keys.")]
Device = Annotated[str, Flag(help="auto, cpu or cuda.")]
DataDir = Annotated[Path | None, Flag(help="Where torchvision's data sets are; else $PVAE_DATA.")]
Overwrite = Annotated[bool, Flag("--overwrite", help="Replace the run that the folder holds.")]
Resume = Annotated[bool, Flag("--resume", help="Go on with the run that the folder holds.")]
Out = Annotated[Path | None, Flag(help="Folder of the run (default runs/<verb>-<data or recipe>).")]
Jobs = Annotated[int, Flag(help="Variants that are trained at a time.")]
Trust = Annotated[bool, Flag("--trust", help="Run the code of files that the recipe names.")]


def recipe_flags(
    data: Annotated[str | None, Flag(help="digits, mnist, fashion-mnist, kmnist or a .npy/.npz/.csv/.parquet.")] = None,
    binarize: Annotated[
        str | None, Flag(help="none, threshold (x > 0.5), dynamic (by batch) or levels (0..255).")
    ] = None,
    test_size: Annotated[float | None, Flag(help="Test rows, as a count or a fraction (default 0.2).")] = None,
    validation_size: Annotated[float | None, Flag(help="Validation rows out of the training rows, likewise.")] = None,
    missing: Annotated[
        bool | None,
        Flag(
            "--missing/--no-missing", help="NaN marks entries that are missing; only those that are there are scored."
        ),
    ] = None,
    only: Annotated[
        str | None, Flag(help="Train, and hold out for test, rows of these labels alone, as 0,1,2.")
    ] = None,
    program: Annotated[str | None, Flag(help="The generative model: VAE, or file.py:Class.")] = None,
    likelihood: Annotated[str | None, Flag(help="p(x|z), see `pvae list`.")] = None,
    prior: Annotated[str | None, Flag(help="p(z), see `pvae list`.")] = None,
    family: Annotated[str | None, Flag(help="q(z|x), see `pvae list`.")] = None,
    network: Annotated[str | None, Flag(help="Encoder and decoder, see `pvae list`.")] = None,
    hidden: Annotated[str | None, Flag(help="Widths of the encoder's hidden layers, by commas.")] = None,
    objective: Annotated[str | None, Flag(help="What training climbs, e.g. 'IWAE(K=20)', see `pvae list`.")] = None,
    latent: Annotated[int | None, Flag(help="Number of latent dimensions (default by data).")] = None,
    epochs: Annotated[int | None, Flag(help="Visits of every datapoint (default by data).")] = None,
    batch_size: Annotated[int | None, Flag(help="Datapoints in a step (default 128).")] = None,
    learning_rate: Annotated[float | None, Flag(help="Of Adam, on what the datapoints share.")] = None,
    patience: Annotated[int | None, Flag(help="Stop after so many epochs without a better validation ELBO.")] = None,
    engine: Annotated[
        str | None, Flag(help="How a step is made: auto (default), pyro, traced, compiled or graph (CUDA).")
    ] = None,
    precision: Annotated[
        str | None, Flag(help="Of the networks' products: float32 (default), bf16, or tf32 (CUDA).")
    ] = None,
    seed: Annotated[int | None, Flag(help="Of splits, initial parameters, batches and draws (default 0).")] = None,
) -> Any:
    """A function from a recipe file, if any, to what it says with the flags in the place of its keys."""
    words = ("program", "likelihood", "prior", "family", "network", "objective")
    given = {name: value for name, value in locals().items() if value is not None and name not in ("hidden", "words")}
    if only is not None:
        given["only"] = whole_numbers("--only", only, "label", least=0)

    def described(path: Path | None, trust: bool = False, **more: Any) -> Any:
        from pvae.recipes import recipe, registry

        changes = given | {n: v for n, v in more.items() if v is not None}
        changes |= {name: registry.parse(changes[name]) for name in words if name in changes}
        if path is None:
            found = recipe.RecipeFile(recipe.Recipe(**changes), {}, {})
        else:
            found = recipe.open_file(path, changes, trust=trust)
        # A flag for what the recipe varies, or for the guide, which a comparison varies unless told, fixes it.
        fixed = {name: [value] for name, value in changes.items() if name in (*found.vary, "guide")}
        found = found._replace(vary=found.vary | fixed)
        if hidden is None:
            return found
        network = registry.as_table(found.recipe.network) | {
            "hidden": whole_numbers("--hidden", hidden, "width", least=1)
        }
        return found._replace(recipe=recipe.replace(found.recipe, network=network))

    described.given = given | ({} if hidden is None else {"network": None})  # type: ignore[attr-defined]
    return described


def guide_flags(
    local_steps: Annotated[int | None, Flag(help="PerDatapoint: steps of a row at each visit.")] = None,
    local_learning_rate: Annotated[float | None, Flag(help="PerDatapoint: rate of these steps.")] = None,
    semi_steps: Annotated[int | None, Flag(help="SemiAmortized: refinement steps.")] = None,
    unroll: Annotated[bool | None, Flag("--unroll/--no-unroll", help="SemiAmortized: train through them.")] = None,
) -> Callable[[Any], Any]:
    """A function from a guide to its table, with the flags that belong to it."""
    flags: dict[str, dict[str, Any]] = {
        "PerDatapoint": {"local_steps": local_steps, "local_learning_rate": local_learning_rate},
        "SemiAmortized": {"steps": semi_steps, "unroll": unroll},
    }

    def component(guide: Any) -> Any:
        from pvae.recipes.registry import as_table

        own = as_table(guide)
        more = {k: v for k, v in flags.get(str(own.get("type")), {}).items() if v is not None}
        return own | more if more else guide

    return component


def grid_flags(
    vary: Annotated[list[str] | None, Flag(help="An axis, as prior=StandardNormal,VampPrior; repeatable.")] = None,
    guides: Annotated[str | None, Flag(help="Short for --vary guide=...: guides to compare, by commas.")] = None,
    seeds: Annotated[int, Flag(help="Train each variant from so many seeds.")] = 1,
) -> Callable[[Any, Callable[[Any], Any], Any], dict[str, list[Any]]]:
    """A function from what a recipe file says, and what flags say of guides, to the axes of the comparison."""
    if seeds < 1:
        raise UserError(f"--seeds is {seeds}, but it must be at least 1")

    def axes(file: Any, guide_of: Callable[[Any], Any], described: Any) -> dict[str, list[Any]]:
        from pvae.experiments import sweep
        from pvae.experiments.compare import INFERENCE_METHODS

        words = [*(vary or []), *([] if guides is None else [f"guide={guides}"])]
        given = dict(sweep.parse_axis(word) for word in words)
        if len(given) < len(words):
            raise UserError("--vary names an axis twice")
        found = file.vary | given or {"guide": list(INFERENCE_METHODS)}
        for name in described.given:
            if name in given or (name == "network" and len(found.get(name, ())) > 1):
                flag = "hidden" if described.given[name] is None else name.replace("_", "-")
                raise UserError(f"--{flag} fixes what --vary {name} varies; give one of them")
        if seeds > 1 and "seed" in found:
            raise UserError("--seeds and an axis of seeds exclude each other")
        if "guide" in found:
            found["guide"] = [guide_of(guide) for guide in found["guide"]]
        if seeds > 1:
            found["seed"] = [file.recipe.seed + k for k in range(seeds)]
        return found

    return axes


def job_flags(
    device: Device = "auto",
    budget: Annotated[
        str,
        Flag(
            help="quick (100 rows of each split, K = 200, 100 steps), standard (300, 1000, 300) or thorough "
            "(1000, 5000, 1000); flags below change its numbers."
        ),
    ] = "standard",
    rows: Annotated[int | None, Flag(help="Rows of each split to evaluate.")] = None,
    samples: Annotated[int | None, Flag(help="K, draws for each row and bound; k-hat asks for 30.")] = None,
    refine_steps: Annotated[int | None, Flag(help="The most steps in search of the best q_params.")] = None,
    ais: Annotated[bool, Flag("--ais", help="Estimate the evidence by annealed importance sampling too.")] = False,
    temperatures: Annotated[int | None, Flag(help="Of annealing, as the three below (default 500).")] = None,
    chains: Annotated[int | None, Flag(help="For each row (default 16).")] = None,
    schedule: Annotated[str | None, Flag(help="sigmoid (default), linear or geometric.")] = None,
    start: Annotated[str | None, Flag(help="prior (default) or guide; each of these four implies --ais.")] = None,
    families: Annotated[str | None, Flag(help="What would these families of q win? By commas.")] = None,
    trust: Trust = False,
) -> Callable[[Path], Any]:
    """A function from a run's folder to the job that the flags describe."""
    least = {"rows": 2, "samples": 2, "refine-steps": 1, "temperatures": 1, "chains": 1}
    given = {"rows": rows, "samples": samples, "refine-steps": refine_steps, "temperatures": temperatures}
    for name, value in (given | {"chains": chains}).items():
        if value is not None and value < least[name]:
            raise UserError(f"--{name} is {value}, but it must be at least {least[name]}")
    numbers: dict[str, Any] = {"K": samples, "steps": refine_steps}
    annealing: dict[str, Any] = {"temperatures": temperatures, "chains": chains, "schedule": schedule, "start": start}

    def job(folder: Path) -> Any:
        from dataclasses import replace

        from pvae.experiments.compare import BUDGETS, RunOptions

        if budget not in BUDGETS:
            raise UserError(f"--budget is '{budget}'{nearest(budget, BUDGETS)}")
        preset_rows, preset = BUDGETS[budget]
        if ais or any(value is not None for value in annealing.values()):
            preset = replace(preset, temperatures=TEMPERATURES)
        own = replace(preset, **{name: value for name, value in (numbers | annealing).items() if value is not None})
        words = () if families is None else _families(families)
        return RunOptions(folder, device, rows or preset_rows, own, words, trust=trust, progress=True, say=typer.echo)

    return job


def _families(text: str) -> tuple[str, ...]:
    """Words of posterior families that can be asked what they would win, each tried before anything long runs."""
    from pvae.recipes import registry
    from pvae.runtime.torch_state import seeded

    words = tuple(dict.fromkeys(registry.split_words(text)))
    for word in words:
        with seeded(0):
            if registry.make("family", registry.parse(word), dim=2).point_mass:
                raise UserError(f"--families {word}: a point mass has no ELBO to compare; name a family with a density")
    return words


def with_options(*groups: Callable[..., Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
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
        # What must be given comes first in a group too, as the folder of a run does.
        needed = [p for p in shared if p.default is inspect.Parameter.empty]
        ordered = (*needed, *own, *(p for p in shared if p not in needed))
        everything = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in ordered]
        run.__signature__ = inspect.Signature(everything)
        run.__annotations__ = {p.name: p.annotation for p in everything}
        del run.__wrapped__
        return run

    return decorate


def whole_numbers(flag: str, text: str, what: str, *, least: int) -> list[int]:
    """The numbers that a flag lists by commas, each at least so large; ``what`` names one of them."""
    try:
        numbers = [int(word) for word in text.split(",")]
    except ValueError:
        raise UserError(f"{flag} is '{text}', but it must be whole numbers separated by commas") from None
    if min(numbers) < least:
        raise UserError(f"{flag} is '{text}', but every {what} must be at least {least}")
    return numbers
