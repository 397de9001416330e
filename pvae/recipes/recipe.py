"""Recipes: everything that fixes a run's numbers, as plain words and numbers, and their TOML files."""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import tomli_w

from pvae.data import loading
from pvae.data.dataset import Dataset
from pvae.data.sources import NAMES
from pvae.errors import UserError, fits, nearest, param
from pvae.recipes import registry
from pvae.recipes.registry import KINDS, Component, accepts_argument, as_table, make
from pvae.runtime.files import write_text
from pvae.runtime.precision import check_precision
from pvae.training.svi_engines import check_engine

# Defaults by kind of data: latent dimensions, hidden widths, epochs, learning rate, levels.
USUAL = {"digits": (8, [128], 150, 2e-3, 17), "images": (20, [400], 10, 1e-3, 256), "file": (8, [128], 100, 1e-3, 256)}
# Smallest values allowed.
LEAST = {"latent": 1, "epochs": 0, "batch_size": 1, "patience": 1, "seed": 0, "split_seed": 0}


@dataclass(frozen=True)
class Recipe:
    """Recipe of a run: data, components and training budget. None stands for a default by data, see `resolve`.

    Attributes:
        data: a name of ``pvae.data.sources.NAMES`` or a file.
        binarize: ``none``, ``threshold``, ``dynamic`` or ``levels``.
        test_size, validation_size: rows held out, as a count or a fraction.
        missing: NaN marks missing entries, and log p(x|z) is that of the observed entries.
        only: labels to keep; rows with other labels are left out of all splits.
        program, likelihood, prior, family, network, guide, objective: a class's name or ``file.py:Class``, with
            arguments as in ``IWAE(K=20)``, or a table with ``type`` and its arguments.
        latent: number of latent dimensions, D.
        epochs, batch_size, learning_rate, patience, engine, precision, seed: see `fit`.
        split_seed: seed of the split into training and held-out rows; ``seed`` unless given.
    """

    data: str = "digits"
    binarize: str | None = None
    test_size: float | None = None
    validation_size: float = 0
    missing: bool = False
    only: list[int] | None = None
    program: Component = "VAE"
    likelihood: Component = "Bernoulli"
    prior: Component = "StandardNormal"
    family: Component = "DiagonalNormal"
    network: Component = "MLP"
    guide: Component = "Amortized"
    objective: Component = "ELBO"
    latent: int | None = None
    epochs: int | None = None
    batch_size: int = 128
    learning_rate: float | None = None
    patience: int | None = None
    engine: str = "auto"
    precision: str = "float32"
    seed: int = 0
    split_seed: int | None = None

    def type_name(self, kind: str) -> str:
        """Return the class chosen for a kind, without arguments: its name, or ``file.py:Class``."""
        return str(as_table(getattr(self, kind))["type"])

    def name(self, kind: str) -> str:
        """Return the class chosen for a kind as one word, with arguments other than the defaults."""
        if kind in ("likelihood", "prior") and not accepts_argument("program", self.program, kind):
            return f"{self.name('program')}'s own"
        component = getattr(self, kind)
        return registry.label(component, registry.defaults(kind, component))


class RecipeFile(NamedTuple):
    """Content of a recipe file: the recipe, the axes to vary, and the expected results that a run recorded."""

    recipe: Recipe
    vary: dict[str, list[Any]]
    expected: dict[str, Any]

    def fixed_at(self, keys: Mapping[str, Any]) -> RecipeFile:
        """Return the same with one value for each of ``keys`` that it varies, and for the guide if it is one."""
        fixed = {key: [value] for key, value in keys.items() if key in (*self.vary, "guide")}
        return self._replace(vary=self.vary | fixed)


def resolve(recipe: Recipe) -> Recipe:
    """Fill in the defaults of a recipe and of its components, so that a later version's defaults change nothing.

    Raises:
        UserError: an unknown component or argument, or a number out of range.

    >>> resolve(Recipe()).binarize
    'threshold'
    """
    _check_range(recipe)
    for kind in ("likelihood", "prior"):
        name = recipe.type_name(kind)
        if name != getattr(Recipe, kind) and not accepts_argument("program", recipe.program, kind):
            raise UserError(f"program {recipe.name('program')} has its own {kind}; leave {param(kind, name)} out")
    data_kind = "digits" if recipe.data == "digits" else "images" if recipe.data in NAMES else "file"
    latent, hidden, epochs, learning_rate, levels = USUAL[data_kind]
    tables = {kind: as_table(getattr(recipe, kind)) for kind in KINDS}
    for kind, argument, default in (("network", "hidden", hidden), ("likelihood", "levels", levels)):
        if accepts_argument(kind, tables[kind], argument):
            tables[kind].setdefault(argument, default)
    components: dict[str, Any] = {kind: registry.with_defaults(kind, table) for kind, table in tables.items()}
    is_path = data_kind == "file" and Path(recipe.data).exists()
    return replace(
        recipe,
        **components,
        data=str(Path(recipe.data).resolve()) if is_path else recipe.data,
        only=recipe.only and sorted(set(recipe.only)),
        binarize=recipe.binarize or ("none" if data_kind == "file" else _default_binarization(components)),
        latent=recipe.latent or latent,
        epochs=epochs if recipe.epochs is None else recipe.epochs,
        learning_rate=learning_rate if recipe.learning_rate is None else recipe.learning_rate,
        split_seed=recipe.seed if recipe.split_seed is None else recipe.split_seed,
    )


def _default_binarization(components: Mapping[str, Component]) -> str:
    """Return the binarization of pictures that suits the support of the program or of its likelihood."""
    program = registry.find_class("program", as_table(components["program"])["type"])
    support = getattr(program, "support", None) or make("likelihood", components["likelihood"]).support
    return "threshold" if str(support) == "Boolean()" else "levels" if support.is_discrete else "none"


def check_value(key: str, value: Any, where: str = "") -> None:
    """Refuse a key that no recipe has, or a value of the wrong type; without ``where``, `param` renders the key."""
    hints = get_type_hints(Recipe)
    if key not in hints:
        raise UserError(f"{where.removesuffix('vary.')}unknown key '{key}'{nearest(key, hints)}")
    label = f"{where}{key}" if where else param(key)
    if not fits(value, hints[key]):
        raise UserError(f"{label} is {value!r}, but it takes {registry.type_words(hints[key])}")
    if isinstance(value, Mapping) and not isinstance(value.get("type"), str):
        raise UserError(f'{label} has no type; write type = "{getattr(Recipe, key)}", say, in its table')


def _check_range(recipe: Recipe, where: str = "") -> None:
    for name, least in LEAST.items():
        value = getattr(recipe, name)
        if value is not None and not least <= value < 2**31:
            bound = f"at least {least}" if value < least else f"below {2**31}"
            raise UserError(f"{where}{param(name)} is {value}, but it must be {bound}")
    check_engine(recipe.engine)
    check_precision(recipe.precision)
    if recipe.learning_rate is not None and not 0 < recipe.learning_rate < math.inf:
        raise UserError(f"{where}{param('learning_rate')} is {recipe.learning_rate}, but it must be positive")


def load_recipe_data(recipe: Recipe, folder: str | Path | None = None) -> Dataset:
    """Load the recipe's data; ``folder`` is where torchvision's data sets are."""
    program = registry.find_class("program", recipe.type_name("program"))
    seed = recipe.seed if recipe.split_seed is None else recipe.split_seed
    options = {name: getattr(recipe, name) for name in ("test_size", "validation_size", "missing", "only")}
    options |= {"binarize": recipe.binarize or "none", "with_labels": getattr(program, "uses_labels", False)}
    return loading.load_data(recipe.data, data_folder=folder, seed=seed, **options)


def write_recipe(recipe: Recipe, folder: Path, vary: Mapping[str, list[Any]] | None = None) -> None:
    """Write ``recipe.toml`` into a folder, with the axes that a comparison varies."""
    write_text(folder / "recipe.toml", to_toml(recipe, vary))


def to_toml(recipe: Recipe, vary: Mapping[str, list[Any]] | None = None) -> str:
    """Return a recipe as the text of a recipe file."""
    keys = {name: value for name, value in asdict(recipe).items() if value is not None}
    return _dump_toml(keys | ({"vary": vary} if vary else {}))


def read_recipe(folder: Path, *, trust: bool = False) -> Recipe:
    """Read ``recipe.toml`` of a run folder.

    Arguments:
        trust: run the code of files that the recipe names.

    Raises:
        UserError: the file is missing or broken, has an unknown key or a value of the wrong type, or names code that
            is not trusted.
    """
    if not (folder / "recipe.toml").is_file():
        raise UserError(f"{folder} is not a run: it has no recipe.toml")
    return read_recipe_file(folder / "recipe.toml", trust=trust).recipe


def read_recipe_file(path: Path, changes: Mapping[str, Any] | None = None, *, trust: bool = False) -> RecipeFile:
    """Read a TOML file with the keys of `Recipe` and tables ``vary`` and ``expected``, and change some of its keys.

    Arguments:
        trust: run the code of files that the recipe names; those that ``changes`` names are trusted.
    """
    keys, changes = _toml(path), changes or {}
    vary, expected = keys.pop("vary", {}), keys.pop("expected", {})
    if not isinstance(vary, dict) or not all(isinstance(values, list) and values for values in vary.values()):
        raise UserError(f"{path}: vary must be a table whose keys have lists of values")
    for where, lists in (("", {key: [value] for key, value in keys.items()}), ("vary.", vary)):
        for key, values in lists.items():
            for value in values:
                check_value(key, value, f"{path}: {where}")
    keys = {key: _locate(value, key, path.parent) for key, value in keys.items()}
    keys |= {kind: registry.with_new_words(keys[kind]) for kind in KINDS if kind in keys}
    vary = {key: [_locate(value, key, path.parent) for value in values] for key, values in vary.items()}
    if not trust:
        named = {registry.source_file(value) for value in changes.values() if isinstance(value, (str, dict))}
        untrusted = {key: [value] for key, value in keys.items() if key not in changes} | vary
        _refuse_code(path, untrusted, {Path(file).resolve() for file in named if file})
    recipe = Recipe(**(keys | dict(changes)))
    _check_range(recipe, f"{path}: ")
    return RecipeFile(recipe, vary, expected)


def record_expected(path: Path, expected: Mapping[str, Any]) -> None:
    """Write results into the table ``expected`` of a recipe file, and leave the rest of the file alone."""
    table = r"^\[expected[.\]].*?(?=^\[(?!expected[.\]])|\Z)"
    text = re.sub(table, "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
    write_text(path, f"{text.rstrip()}\n\n{_dump_toml({'expected': expected})}")


def _dump_toml(keys: Mapping[str, Any]) -> str:
    """Write TOML as one writes it by hand: a list on one line, if the line is not too long."""

    def join_lines(match: re.Match[str]) -> str:
        line = " ".join(value.strip() for value in match[1].splitlines())
        return f"[{line[:-1]}]" if len(line) < 100 else match[0]

    plain = r'(?: +(?:"[^\n]*"|[^\[\]\n]+),\n)+'  # values that are no lists
    return re.sub(rf"\[\n({plain}) *\]", join_lines, tomli_w.dumps(keys))


def _toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"there is no recipe {path}") from None
    except (tomllib.TOMLDecodeError, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} can't be read: {error}") from error


def _locate(value: Any, key: str, folder: Path) -> Any:
    """Look beside the recipe first for the file that a value names, if it names one."""
    if key == "data" and isinstance(value, str) and (folder / value).is_file():
        return str(folder / value)
    file = registry.source_file(value) if key in KINDS else None
    return value if file is None or not (folder / file).is_file() else registry.with_source_file(value, folder / file)


def _refuse_code(path: Path, keys: Mapping[str, list[Any]], named: Collection[Path]) -> None:
    for kind in KINDS:
        for value in keys.get(kind, []):
            file = registry.source_file(value)
            if file and Path(file).resolve() not in named:
                remedy = f"give {param('trust', True)} or name it in {param(kind)}"
                raise UserError(f"{path}: {kind} is code in {file}, which runs only if you {remedy}")
