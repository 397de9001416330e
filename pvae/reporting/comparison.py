"""Compare inference methods, families, priors, ... from Python: `compare` carries out the main job."""

from __future__ import annotations

import io
import weakref
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas
import xarray as xr
from matplotlib.figure import Figure

from pvae.diagnostics.evaluation import Budget
from pvae.diagnostics.quantities import describe
from pvae.errors import UserError, check_range, nearest, param
from pvae.experiments import arviz_export
from pvae.experiments import compare as comparing
from pvae.recipes.recipe import Recipe, RecipeFile, check_value, read_recipe_file
from pvae.reporting.comparison_figures import draw_comparison
from pvae.reporting.html_report import read_results, write_report
from pvae.reporting.rendering import render_template
from pvae.reporting.tables import comparison_tables, print_results


@dataclass(frozen=True)
class Comparison:
    """Evaluated variants of a run: tables, conclusions, figures and draws.

    Attributes:
        folder: of the run; a temporary one is deleted with the object.
        results: what ``results.json`` holds. Variants whose nats can't be compared are in different groups.
    """

    folder: Path
    results: dict[str, Any] = field(repr=False)

    @classmethod
    def from_folder(cls, folder: str | Path) -> Comparison:
        """Open the run folder of a comparison that `compare` or the command line has evaluated.

        Raises:
            UserError: the folder has no results, or they are broken or of another version.
        """
        return cls(Path(folder), read_results(Path(folder)))

    @property
    def conclusions(self) -> list[str]:
        """Sentences that the numbers support, the most important first."""
        return [sentence for group in self.results["groups"] for sentence in group["verdicts"]]

    @cached_property
    def idata(self) -> xr.DataTree:
        """Draws and quantities of each row in ArviZ's layout; of the first group, see `load_idata` for others."""
        return arviz_export.load_idata(self.folder)

    def to_frame(self) -> pandas.DataFrame:
        """Return all quantities in a tidy table: a row for each variant, split and quantity.

        Its columns are ``group`` (from 1), ``variant``, ``split``, ``quantity``, ``label``, ``unit``, ``mean``, ``se``
        and ``K``. A wide table of means is
        ``frame.query("split == 'test'").pivot(index="variant", columns="quantity", values="mean")``.
        """
        lines = [
            (number, row["name"], split, key, *describe(key)[1:3], value["mean"], value["se"], value.get("K"))
            for number, group in enumerate(self.results["groups"], 1)
            for row in group["rows"]
            for split in ("train", "test", "latent_space")
            for key, value in row.get(split, {}).items()
        ]
        columns = ["group", "variant", "split", "quantity", "label", "unit", "mean", "se", "K"]
        frame = pandas.DataFrame(lines, columns=columns).astype({"mean": float, "se": float, "K": "Int64"})
        return frame.replace({"split": {"latent_space": "test"}})

    def figures(self) -> dict[str, Figure]:
        """Return the figures of the page by name; those of further groups as ``curves-2`` and so on."""
        return {
            name if number == 1 else f"{name}-{number}": figure
            for number, group in enumerate(self.results["groups"], 1)
            for name, figure in draw_comparison(group, arviz_export.load_idata(self.folder, number)).items()
        }

    def write_report(self) -> Path:
        """Write the page, ``report.html``, into the folder and return its path."""
        return write_report(self.folder, self.results)

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(file=io.StringIO(), width=120)
        print_results(self.results, console)
        return console.file.getvalue().rstrip()  # type: ignore[attr-defined]

    def _repr_html_(self) -> str:
        groups = [(group, comparison_tables(group)) for group in self.results["groups"]]
        return str(render_template("comparison.html.jinja", groups=groups))


def compare(
    recipe: Recipe | str | Path = "digits",
    *,
    vary: Mapping[str, Sequence[Any]] | None = None,
    budget: str | Budget = "standard",
    rows: int | None = None,
    families: Sequence[str] = (),
    out: str | Path | None = None,
    overwrite: bool = False,
    resume: bool = False,
    device: str = "auto",
    jobs: int = 1,
    data_folder: str | Path | None = None,
    trust: bool = False,
    progress: bool = False,
    **keys: Any,
) -> Comparison:
    """Train and evaluate variants of a recipe side by side, from the same seed and number of epochs.

    Arguments:
        recipe: a `Recipe`, the path of a recipe (.toml), or what its key ``data`` takes: a name or a file.
        vary: values of recipe keys to combine, as ``{"prior": ["StandardNormal", "VampPrior"]}``; by default what the
            recipe file varies, else the three inference methods.
        budget: of the evaluation: ``quick``, ``standard``, ``thorough``, or a `Budget` of your own.
        rows: of each split to evaluate; the budget's unless given.
        families: other posterior families whose gain is estimated.
        out: folder of the run; a temporary one unless given.
        overwrite: replace the run that the folder holds.
        resume: continue that run; trained variants are not trained again.
        device: ``auto``, ``cpu`` or ``cuda``.
        jobs: number of variants to train at a time, each in a process of its own.
        data_folder: of torchvision's data sets.
        trust: run the code of files that the recipe names.
        progress: show progress bars and lines.
        keys: recipe keys that take the place of the recipe's, as ``epochs=20`` or ``likelihood="Gaussian"``.

    Raises:
        UserError: an unknown key or a value out of range, data that don't go with the likelihood, a folder that holds
            another run.

    See also: `pvae.diagnose` for how far one fitted posterior is from the truth; `pvae.open_run` for uses of a run.

    >>> comparison = compare("digits", guide="Amortized", test_size=20, epochs=1, rows=5, budget=Budget(K=5, steps=2))
    >>> comparison.to_frame()["variant"].unique().tolist()
    ['Amortized']
    """
    word = budget if isinstance(budget, str) else "standard"
    if word not in comparing.BUDGETS:
        raise UserError(f"{param('budget')} is '{word}'{nearest(word, comparing.BUDGETS)}")
    preset_rows, preset = comparing.BUDGETS[word]
    preset = budget if isinstance(budget, Budget) else preset
    rows = preset_rows if rows is None else rows
    check_range(least=2, rows=rows)
    file = _recipe_file(recipe, keys, trust)
    axes = file.vary | _checked_axes(vary or {}, keys)
    with ExitStack() as stack:
        if out is None:
            out = stack.enter_context(TemporaryDirectory(prefix="pvae-", ignore_cleanup_errors=True))
        options = comparing.RunOptions(Path(out), device, rows, preset, families, jobs, trust, progress)
        options = replace(options, say=print) if progress else options
        comparing.compare(
            file.recipe, options, vary=axes or None, data_folder=data_folder, overwrite=overwrite, resume=resume
        )
        comparison = Comparison.from_folder(out)
        weakref.finalize(comparison, stack.pop_all().close)
    return comparison


def _checked_axes(vary: Mapping[str, Sequence[Any]], keys: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Return axes whose keys a recipe has, whose values are of their types, and that no other argument fixes."""
    for key, values in vary.items():
        if key in keys:
            raise UserError(f"{key} is both fixed and varied; give one of them")
        if isinstance(values, str) or not values:
            raise UserError(f"vary: {key} is {values!r}, but it must be a list of values")
        for value in values:
            check_value(key, value, "vary: ")
    return {key: list(values) for key, values in vary.items()}


def _recipe_file(recipe: Recipe | str | Path, keys: Mapping[str, Any], trust: bool) -> RecipeFile:
    """Return a recipe with these keys, which fix what its file varies."""
    for key, value in keys.items():
        check_value(key, value)
    if not isinstance(recipe, Recipe) and Path(recipe).suffix == ".toml":
        return read_recipe_file(Path(recipe), keys, trust=trust).fixed_at(keys)
    start = recipe if isinstance(recipe, Recipe) else Recipe(str(recipe))
    return RecipeFile(replace(start, **keys), {}, {}).fixed_at(keys)
