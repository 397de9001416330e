"""Option groups of the command line: dataclasses whose fields are options, and the names of parameters as options."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from pvae.errors import UserError, check_range, nearest, param

Option = typer.Option
OfRecipe = functools.partial(typer.Option, rich_help_panel="Recipe")
OfGuide = functools.partial(typer.Option, rich_help_panel="Inference method")
OfSweep = functools.partial(typer.Option, rich_help_panel="Sweep")
OfBudget = functools.partial(typer.Option, rich_help_panel="Evaluation budget")
Run = Annotated[Path, typer.Argument(help="Folder of a run.")]
Device = Annotated[str, Option(help="auto, cpu or cuda.")]
DataDir = Annotated[Path | None, Option(help="Folder of torchvision's data sets; default $PVAE_DATA.")]
Overwrite = Annotated[bool, Option("--overwrite", help="Replace the run that the folder holds.")]
Resume = Annotated[bool, Option("--resume", help="Continue the run that the folder holds.")]
Out = Annotated[Path | None, Option(help="Folder of the run (default runs/<verb>-<data or recipe>).")]
Jobs = Annotated[int, Option(help="Number of variants to train at a time.")]
Trust = Annotated[bool, Option("--trust", help="Run the code of files that the recipe names.")]
Text = str | None
Whole = int | None
Number = float | None
Flag = bool | None
Texts = list[str] | None
Paths = list[Path] | None
FLAGS = {"K": "--samples", "data_folder": "--data-dir"}  # of parameters with other names


def as_option(name: str, value: Any = None) -> str:
    """Write a parameter, with its value if one is given, as an option of the command line.

    >>> as_option("batch_size"), as_option("device", "cuda"), as_option("missing", True), as_option("missing", False)
    ('--batch-size', '--device cuda', '--missing', '--no-missing')
    """
    option = FLAGS.get(name, f"--{name.replace('_', '-')}")
    if isinstance(value, bool):
        return option if value else option.replace("--", "--no-", 1)
    return option if value is None else f"{option} {value}"


@dataclass(frozen=True)
class RecipeOptions:
    """A recipe file, if any, and options that take the place of its keys."""

    path: Annotated[Path | None, typer.Argument(help="A recipe (TOML); options override its keys.")] = None
    data: Annotated[Text, OfRecipe(help="digits, mnist, fashion-mnist, kmnist or a .npy/.npz/.csv/.parquet.")] = None
    binarize: Annotated[Text, OfRecipe(help="none, threshold (x > 0.5), dynamic (by batch) or levels (0..255).")] = None
    test_size: Annotated[Number, OfRecipe(help="Test rows, as a count or a fraction (default 0.2).")] = None
    validation_size: Annotated[Number, OfRecipe(help="Validation rows out of the training rows, likewise.")] = None
    missing: Annotated[Flag, OfRecipe("--missing/--no-missing", help="NaN marks missing entries (not scored).")] = None
    only: Annotated[Text, OfRecipe(help="Train and test on rows with these labels alone, as 0,1,2.")] = None
    program: Annotated[Text, OfRecipe(help="The generative model: VAE, or file.py:Class.")] = None
    likelihood: Annotated[Text, OfRecipe(help="p(x|z), see `pvae list`.")] = None
    prior: Annotated[Text, OfRecipe(help="p(z), see `pvae list`.")] = None
    family: Annotated[Text, OfRecipe(help="Posterior family of q(z|x), see `pvae list`.")] = None
    network: Annotated[Text, OfRecipe(help="Encoder and decoder, see `pvae list`.")] = None
    hidden: Annotated[Text, OfRecipe(help="Widths of the encoder's hidden layers, by commas.")] = None
    guide: Annotated[Text, OfRecipe(help="Inference method, see `pvae list`.")] = None
    objective: Annotated[Text, OfRecipe(help="Training objective, e.g. 'IWAE(K=20)', see `pvae list`.")] = None
    latent: Annotated[Whole, OfRecipe(help="Number of latent dimensions (default by data).")] = None
    epochs: Annotated[Whole, OfRecipe(help="Passes over the training rows (default by data).")] = None
    batch_size: Annotated[Whole, OfRecipe(help="Rows in a training step (default 128).")] = None
    learning_rate: Annotated[Number, OfRecipe(help="Adam's, for the shared parameters.")] = None
    patience: Annotated[Whole, OfRecipe(help="Stop after so many epochs without a better validation ELBO.")] = None
    engine: Annotated[Text, OfRecipe(help="Of training steps: auto, pyro, traced, compiled or graph (CUDA).")] = None
    precision: Annotated[Text, OfRecipe(help="Of matrix products: float32 (default), bf16, or tf32 (CUDA).")] = None
    seed: Annotated[Whole, OfRecipe(help="Of splits, initial parameters, batches and draws (default 0).")] = None

    def recipe_keys(self) -> dict[str, Any]:
        """Return the recipe's keys that options give; ``hidden``, an argument of the network, is none."""
        from pvae.recipes import registry

        keys = _not_none({name: value for name, value in vars(self).items() if name not in ("path", "hidden")})
        if self.only is not None:
            keys["only"] = whole_numbers("only", self.only, "label", least=0)
        parsed = registry.KINDS.keys() - {"guide"}  # GuideOptions completes it as it was given
        return {name: registry.parse_component(v) if name in parsed else v for name, v in keys.items()}

    def open(self, *, trust: bool = False) -> Any:
        """Return the `RecipeFile` with the options in the place of its keys, and fixed where the file varies them."""
        from pvae.recipes import recipe, registry

        keys = self.recipe_keys()
        file = recipe.RecipeFile(recipe.Recipe(**keys), {}, {})
        if self.path is not None:
            file = recipe.read_recipe_file(self.path, keys, trust=trust)
        if self.hidden is not None:
            widths = {"hidden": whole_numbers("hidden", self.hidden, "width", least=1)}
            network = registry.as_table(file.recipe.network) | widths
            file = file._replace(recipe=replace(file.recipe, network=network))
        return file.fixed_at(keys)


@dataclass(frozen=True)
class GuideOptions:
    """Arguments of the inference methods that take them."""

    local_steps: Annotated[Whole, OfGuide(help="PerDatapoint: steps of a row at each visit.")] = None
    local_learning_rate: Annotated[Number, OfGuide(help="PerDatapoint: learning rate of these steps.")] = None
    semi_steps: Annotated[Whole, OfGuide(help="SemiAmortized: number of refinement steps.")] = None
    unroll: Annotated[Flag, OfGuide("--unroll/--no-unroll", help="SemiAmortized: differentiate through them.")] = None

    def complete(self, file: Any) -> Any:
        """Return a `RecipeFile` with these arguments in its guide and in the guides that it varies."""
        guide, *guides = (self._complete(guide) for guide in (file.recipe.guide, *file.vary.get("guide", [])))
        vary = file.vary | ({"guide": guides} if guides else {})
        return file._replace(recipe=replace(file.recipe, guide=guide), vary=vary)

    def _complete(self, guide: Any) -> Any:
        from pvae.recipes.registry import as_table

        local: dict[str, Any] = {"local_steps": self.local_steps, "local_learning_rate": self.local_learning_rate}
        arguments = {"PerDatapoint": local, "SemiAmortized": {"steps": self.semi_steps, "unroll": self.unroll}}
        chosen = _not_none(arguments.get(as_table(guide)["type"], {}))
        return as_table(guide) | chosen if chosen else guide


@dataclass(frozen=True)
class SweepOptions:
    """What a comparison varies."""

    vary: Annotated[
        list[str] | None, OfSweep(help="A key and values, as prior=StandardNormal,VampPrior; repeatable.")
    ] = None
    guides: Annotated[Text, OfSweep(help="Short for --vary guide=...: inference methods to compare, by commas.")] = None
    seeds: Annotated[int, OfSweep(help="Train each variant from so many seeds.")] = 1

    def extend(self, file: Any, options: RecipeOptions) -> Any:
        """Return a `RecipeFile` with these axes beside its own; the three inference methods if there are none."""
        from pvae.experiments import sweep
        from pvae.experiments.compare import INFERENCE_METHODS

        check_range(least=1, seeds=self.seeds)
        words = [*(self.vary or []), *([] if self.guides is None else [f"guide={self.guides}"])]
        axes = dict(map(sweep.parse_axis, words))
        if len(axes) < len(words):
            raise UserError("--vary names an axis twice")
        vary = file.vary | axes or {"guide": list(INFERENCE_METHODS)}
        fixed = {name: name for name in options.recipe_keys() if name in axes}
        if options.hidden is not None and ("network" in axes or len(vary.get("network", ())) > 1):
            fixed["network"] = "hidden"
        for axis, name in fixed.items():
            raise UserError(f"{param(name)} fixes what --vary {axis} varies; give one of them")
        if self.seeds > 1:
            if "seed" in vary:
                raise UserError("--seeds and an axis of seeds exclude each other")
            vary["seed"] = [file.recipe.seed + k for k in range(self.seeds)]
        return file._replace(vary=vary)


@dataclass(frozen=True)
class BudgetOptions:
    """Rows, draws and steps of an evaluation."""

    budget: Annotated[
        str,
        OfBudget(
            help="quick (100 rows of each split, K = 200, 100 steps), standard (300, 1000, 300) or thorough "
            "(1000, 5000, 1000); the options below change its numbers."
        ),
    ] = "standard"
    rows: Annotated[Whole, OfBudget(help="Rows of each split to evaluate.")] = None
    samples: Annotated[Whole, OfBudget(help="K, draws for each row and bound; k-hat needs 30.")] = None
    refine_steps: Annotated[Whole, OfBudget(help="Most steps of a row's search for its best q.")] = None
    ais: Annotated[bool, OfBudget("--ais", help="Estimate the evidence by annealed importance sampling.")] = False
    temperatures: Annotated[Whole, OfBudget(help="AIS: number of temperatures (default 500).")] = None
    chains: Annotated[Whole, OfBudget(help="AIS: chains for each row (default 16).")] = None
    schedule: Annotated[Text, OfBudget(help="AIS: sigmoid (default), linear or geometric.")] = None
    start: Annotated[Text, OfBudget(help="AIS: prior (default) or guide; each of these four implies --ais.")] = None
    families: Annotated[Text, OfBudget(help="Other posterior families whose gain is estimated, by commas.")] = None

    def run_options(self, folder: Path, **options: Any) -> Any:
        """Return the `RunOptions` of an evaluation in a folder, with further ``options`` as they are."""
        from pvae.experiments.compare import BUDGETS, RunOptions
        from pvae.recipes import registry

        for least, names in ((2, ("rows", "samples")), (1, ("refine_steps", "temperatures", "chains"))):
            check_range(least=least, **_not_none({name: getattr(self, name) for name in names}))
        if self.budget not in BUDGETS:
            raise UserError(f"{param('budget')} is '{self.budget}'{nearest(self.budget, BUDGETS)}")
        rows, preset = BUDGETS[self.budget]
        annealing = _not_none({name: getattr(self, name) for name in ("temperatures", "chains", "schedule", "start")})
        if self.ais or annealing:
            preset = replace(preset, temperatures=500)
        budget = replace(preset, **_not_none({"K": self.samples, "steps": self.refine_steps}), **annealing)
        families = () if self.families is None else tuple(dict.fromkeys(registry.split_words(self.families)))
        return RunOptions(
            folder, rows=self.rows or rows, budget=budget, families=families, progress=True, say=typer.echo, **options
        )


@dataclass(frozen=True)
class UseOptions:
    """A run, the variant to use, and where to write."""

    run: Run
    variant: Annotated[Text, Option(help="Variant of a comparison (default its first).")] = None
    out: Annotated[
        list[Path] | None, Option(help="A .npz, .npy, .csv, .png or .html; repeatable (default in the run).")
    ] = None
    overwrite: Annotated[bool, Option("--overwrite", help="Replace files that --out names.")] = False
    seed: Annotated[int, Option(help="Of all draws.")] = 0
    device: Device = "auto"
    data_dir: DataDir = None
    trust: Trust = False

    def apply(self, use: str, *args: Any, **kwargs: Any) -> None:
        """Check counts, and carry out the use ``module:function`` of the run, see `use_context.carry_out`."""
        counts: Any = {name: value for name, value in kwargs.items() if type(value) is int and name != "size"}
        check_range(least=1, **counts)
        from pvae.cli.use_context import carry_out

        carry_out(self, use, *args, **kwargs)


def _not_none(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the fields of the dataclasses among its parameters as options, and call it with their instances.

    Typer reads options from a signature: the command gets one of plain parameters, those without defaults first.
    """
    groups: dict[str, Any] = {}
    options: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(command, eval_str=True).parameters.items():
        if is_dataclass(parameter.annotation):
            groups[name] = parameter.annotation
            options += inspect.signature(groups[name], eval_str=True).parameters.values()
        else:
            options.append(parameter)

    def run(**values: Any) -> None:
        objects = {name: group(**{f.name: values.pop(f.name) for f in fields(group)}) for name, group in groups.items()}
        command(**objects, **values)

    options.sort(key=lambda parameter: parameter.default is not parameter.empty)
    keywords = [parameter.replace(kind=parameter.KEYWORD_ONLY) for parameter in options]
    run.__name__, run.__doc__ = command.__name__, command.__doc__
    run.__signature__ = inspect.Signature(keywords)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in keywords}
    return run


def whole_numbers(name: str, text: str, what: str, *, least: int) -> list[int]:
    """Return the numbers that the parameter of this name lists by commas, each at least so large; ``what`` is one."""
    try:
        numbers = [int(word) for word in text.split(",")]
    except ValueError:
        raise UserError(f"{param(name)} is '{text}', but it must be whole numbers separated by commas") from None
    if min(numbers) < least:
        raise UserError(f"{param(name)} is '{text}', but every {what} must be at least {least}")
    return numbers
