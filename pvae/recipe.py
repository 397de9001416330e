"""Recipes: everything that fixes a run, as plain words and numbers. The only place where a type is a string."""

from __future__ import annotations

import inspect
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, get_type_hints

import tomli_w

from pvae import data, families, guides, likelihoods, networks, priors
from pvae.errors import UserError, fits, nearest
from pvae.files import write_text
from pvae.generative import VAE
from pvae.guides import local_bound
from pvae.runtime import seeded

__all__ = ["KINDS", "Built", "Recipe", "build", "find", "load_data", "make", "read", "resolve", "table", "write"]

KINDS: dict[str, ModuleType] = {
    "likelihood": likelihoods,
    "prior": priors,
    "family": families,
    "network": networks,
    "guide": guides,
}
Component = str | Mapping[str, Any]

# What a data set takes where the user does not say: latent dimensions, hidden widths, epochs, learning rate.
USUAL = {"digits": (8, [128], 150, 2e-3), "images": (20, [400], 10, 1e-3), "file": (8, [128], 100, 1e-3)}

# Arguments that building a recipe supplies, so that no recipe may.
SUPPLIED = ("dim", "inputs", "outputs", "encoder", "family", "num_data", "bound")


@dataclass(frozen=True)
class Recipe:
    """Everything that fixes a run's numbers. None stands for what suits the data; :func:`resolve` fills it in.

    Attributes:
        data: a name of ``pvae.data.NAMES`` or a file.
        binarize: ``none``, ``threshold`` or ``dynamic``.
        test_size, validation_size: rows held out, as a count or a fraction.
        likelihood, prior, family, network, guide: a class's name, or a table with ``type`` and its arguments.
        latent: number of latent dimensions, D.
        epochs, batch_size, learning_rate, patience, seed: see :func:`pvae.training.fit`.
    """

    data: str = "digits"
    binarize: str | None = None
    test_size: float | None = None
    validation_size: float = 0
    likelihood: Component = "Bernoulli"
    prior: Component = "StandardNormal"
    family: Component = "DiagonalNormal"
    network: Component = "MLP"
    guide: Component = "Amortized"
    latent: int | None = None
    epochs: int | None = None
    batch_size: int = 128
    learning_rate: float | None = None
    patience: int | None = None
    seed: int = 0

    def name(self, kind: str) -> str:
        """The name of the class chosen for a kind."""
        return str(table(getattr(self, kind)).get("type"))


class Built(NamedTuple):
    """A recipe's program and guide, ready for :func:`pvae.training.fit`."""

    vae: VAE
    guide: guides.Guide


def table(component: Component) -> dict[str, Any]:
    """A component as a table with ``type``."""
    return {"type": component} if isinstance(component, str) else dict(component)


def find(kind: str, name: str) -> Any:
    """The class of a kind by its name.

    Raises:
        UserError: there is none; the message names the nearest.
    """
    known = KINDS[kind].__all__
    if name not in known:
        raise UserError(f"unknown {kind} '{name}'{nearest(name, known)}")
    return getattr(KINDS[kind], name)


def make(kind: str, component: Component, **supplied: Any) -> Any:
    """An instance of a component: its own arguments from the table, the rest from what is supplied by name.

    Raises:
        UserError: an unknown name or argument, or a value that the class refuses.
    """
    arguments = table(component)
    cls = _checked(kind, arguments)
    arguments.pop("type")
    takes = _arguments(cls)
    try:
        return cls(**arguments, **{name: value for name, value in supplied.items() if name in takes})
    except (TypeError, ValueError) as error:
        raise UserError(f"{kind} {cls.__name__}: {error}") from error


def _checked(kind: str, component: dict[str, Any]) -> Any:
    """The component's class, after its arguments have been looked at."""
    cls = find(kind, component.get("type", ""))
    own = [name for name in _arguments(cls) if name not in SUPPLIED]
    hints = get_type_hints(cls.__init__)
    for name, value in component.items():
        if name != "type" and name not in own:
            raise UserError(f"{kind} {cls.__name__} takes no argument '{name}'{nearest(name, own)}")
        if name != "type" and not fits(value, hints[name]):
            raise UserError(f"{kind} {cls.__name__}: {name} is {value!r}, but it takes {_words(hints[name])}")
    return cls


def _words(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("collections.abc.", "")


def _arguments(cls: type) -> dict[str, inspect.Parameter]:
    parameters = inspect.signature(cls).parameters
    return {name: p for name, p in parameters.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}


def resolve(recipe: Recipe) -> Recipe:
    """Fill in what suits the data, and every component's defaults, so that nothing is left to a later version's.

    Raises:
        UserError: an unknown component or argument.

    >>> resolve(Recipe()).binarize
    'threshold'
    """
    kind = "digits" if recipe.data == "digits" else "images" if recipe.data in data.NAMES else "file"
    latent, hidden, epochs, learning_rate = USUAL[kind]
    if recipe.latent is not None and recipe.latent < 1:
        raise UserError(f"--latent is {recipe.latent}, but at least 1 dimension is needed")
    if not 0 <= recipe.seed < 2**31:
        raise UserError(f"--seed is {recipe.seed}, but it must be from 0 to {2**31 - 1}")
    network = table(recipe.network)
    if network.get("type") == "MLP":
        network.setdefault("hidden", hidden)
    binary = str(find("likelihood", recipe.name("likelihood")).support) == "Boolean()"
    components: dict[str, Any] = {
        name: _spelled_out(name, getattr(recipe, name)) for name in KINDS if name != "network"
    }
    return replace(
        recipe,
        **components,
        data=str(Path(recipe.data).resolve()) if kind == "file" and Path(recipe.data).exists() else recipe.data,
        network=_spelled_out("network", network),
        binarize=recipe.binarize or ("threshold" if binary and kind != "file" else "none"),
        latent=recipe.latent or latent,
        epochs=epochs if recipe.epochs is None else recipe.epochs,
        learning_rate=learning_rate if recipe.learning_rate is None else recipe.learning_rate,
    )


def _spelled_out(kind: str, component: Component) -> dict[str, Any]:
    given = table(component)
    takes = _arguments(_checked(kind, given))
    own = {name: p.default for name, p in takes.items() if name not in SUPPLIED and p.default is not p.empty}
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in (own | given).items()}
    return {"type": given["type"]} | {name: value for name, value in plain.items() if name != "type"}


def load_data(recipe: Recipe, folder: str | Path | None = None) -> data.Dataset:
    """The recipe's data; ``folder`` is where torchvision's data sets are."""
    return data.load(
        recipe.data,
        binarize=recipe.binarize or "none",
        folder=folder,
        test_size=recipe.test_size,
        validation_size=recipe.validation_size,
        seed=recipe.seed,
    )


def build(recipe: Recipe, dataset: data.Dataset) -> Built:
    """Program and guide of a resolved recipe, sized from the data.

    Recipes that differ in the guide alone start from the same decoder and, where they have one, the same encoder.

    Raises:
        UserError: a component refuses its arguments.
    """
    columns, latent = dataset.train.shape[1], recipe.latent
    likelihood = make("likelihood", recipe.likelihood)
    prior, family = (make(kind, getattr(recipe, kind), dim=latent) for kind in ("prior", "family"))
    with seeded(recipe.seed):
        network = table(recipe.network)
        if "hidden" in network:
            network["hidden"] = network["hidden"][::-1]
        decoder = make("network", network, inputs=latent, outputs=likelihood.params_per_value * columns)
        vae = VAE(decoder, likelihood, prior)
        encoder = make("network", recipe.network, inputs=columns, outputs=family.size)
    bound = local_bound(vae.model, family)
    supplied = {"encoder": encoder, "family": family, "num_data": len(dataset.train), "bound": bound}
    return Built(vae, make("guide", recipe.guide, **supplied))


def write(recipe: Recipe, folder: Path) -> None:
    """Write ``recipe.toml``."""
    keys = {name: value for name, value in asdict(recipe).items() if value is not None}
    write_text(folder / "recipe.toml", tomli_w.dumps(keys))


def read(folder: Path) -> Recipe:
    """Read ``recipe.toml`` of a run folder.

    Raises:
        UserError: it is missing or broken, or has an unknown key.
    """
    path = folder / "recipe.toml"
    try:
        keys = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder} is not a run: it has no recipe.toml") from None
    except (tomllib.TOMLDecodeError, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} can't be read: {error}") from error
    hints = get_type_hints(Recipe)
    known = [f.name for f in fields(Recipe)]
    for key in keys:
        if key not in known:
            raise UserError(f"{path}: unknown key '{key}'{nearest(key, known)}")
        if not fits(keys[key], hints[key]):
            raise UserError(f"{path}: {key} is {keys[key]!r}, but it takes {_words(hints[key])}")
    return Recipe(**keys)
