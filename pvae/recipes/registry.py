"""Registry of components, where words become classes: ``__all__`` of a kind's module names its components."""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType, NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from torch import nn

from pvae.errors import UserError, fits, nearest
from pvae.generative import likelihoods, networks, priors, vae
from pvae.inference import families, guides
from pvae.training import objectives

Component = str | Mapping[str, Any]

# By kind: the module whose ``__all__`` names the components, their base class (a program is known by its method
# ``model``), and the constructor's arguments that `build_model` supplies, so that no recipe may.
_KINDS: dict[str, tuple[ModuleType, type, tuple[str, ...]]] = {
    "program": (vae, nn.Module, ("columns", "latent", "decoder", "likelihood", "prior", "classes")),
    "likelihood": (likelihoods, likelihoods.Likelihood, ()),
    "prior": (priors, priors.Prior, ("dim", "posterior", "data")),
    "family": (families, families.Family, ("dim",)),
    "network": (networks, nn.Module, ("inputs", "outputs", "shape", "labels", "decodes")),
    "guide": (guides, guides.Guide, ("encoder", "family", "num_data", "model", "sites")),
    "objective": (objectives, objectives.Objective, ()),
}
KINDS = {kind: module for kind, (module, _, _) in _KINDS.items()}
SUPPLIED = {kind: supplied for kind, (_, _, supplied) in _KINDS.items()}

# New names of arguments that earlier versions named otherwise, by class: recipes written before still open.
RENAMED_ARGUMENTS: dict[str, dict[str, str]] = {"PerDatapoint": {"new_steps": "num_steps_new_data"}}


def as_table(component: Component) -> dict[str, Any]:
    """Return a component as a table with ``type``."""
    return parse_component(component) if isinstance(component, str) else dict(component)


def with_new_words(component: Component, renamed: Mapping[str, Mapping[str, str]] = RENAMED_ARGUMENTS) -> Component:
    """Translate a component's arguments that an earlier version named otherwise.

    >>> with_new_words({"type": "PerDatapoint", "new_steps": 200})
    {'type': 'PerDatapoint', 'num_steps_new_data': 200}
    """
    table = as_table(component)
    names = renamed.get(str(table.get("type")), {})
    return {names.get(name, name): value for name, value in table.items()} if names.keys() & table else component


def with_old_words(component: Component) -> Component:
    """Translate a component's arguments to their first names, under which digests of fits stay the same."""
    return with_new_words(component, {k: {new: old for old, new in r.items()} for k, r in RENAMED_ARGUMENTS.items()})


def parse_component(word: str) -> dict[str, Any]:
    """Parse a component written as a name, with arguments in brackets if any.

    >>> parse_component("IWAE(K=20)"), parse_component("my_model.py:StudentT")
    ({'type': 'IWAE', 'K': 20}, {'type': 'my_model.py:StudentT'})
    """
    name, bracket, arguments = word.partition("(")
    if not bracket:
        return {"type": word.strip()}
    try:
        call = ast.parse(f"f({arguments}", mode="eval").body
        if not isinstance(call, ast.Call) or call.args or not isinstance(call.func, ast.Name):
            raise ValueError
        return {"type": name.strip()} | {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
    except (SyntaxError, ValueError):
        raise UserError(f"'{word}' can't be read; write a name, or Name(argument=value, ...)") from None


def split_words(words: str) -> list[str]:
    """Split words at commas outside brackets.

    >>> split_words("ELBO, IWAE(K=5, warm_up=10),DReG")
    ['ELBO', 'IWAE(K=5, warm_up=10)', 'DReG']
    """
    parts, depth = [""], 0
    for letter in words:
        depth += (letter in "([") - (letter in ")]")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts]


def label(component: Component, defaults: Mapping[str, Any] | None = None) -> str:
    """Write a component as one word, with the arguments that differ from the defaults.

    >>> label({"type": "IWAE", "K": 20, "kl_weight": 1.0}, {"K": 5, "kl_weight": 1.0})
    'IWAE(K=20)'
    """
    table, defaults = as_table(component), defaults or {}
    name = str(table.pop("type", None)).rsplit(":", 1)[-1]
    arguments = [f"{k}={v!r}" for k, v in table.items() if k not in defaults or defaults[k] != v]
    return f"{name}({', '.join(arguments)})" if arguments else name


def source_file(component: Component) -> str | None:
    """Return the file whose code a component would run, or None for a class of this package."""
    file, colon, _ = str(as_table(component).get("type", "")).rpartition(":")
    return file if colon else None


def source_code(component: Component) -> str:
    """Return the first 16 hex digits of the SHA-256 of a component's source file; empty for a class of this package."""
    file = source_file(component)
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16] if file else ""


def with_source_file(component: Component, file: Path) -> Component:
    """Name another file for a component's class."""
    table = as_table(component)
    return table | {"type": f"{file}:{table['type'].rpartition(':')[2]}"}


def with_absolute_path(component: Component) -> Component:
    """Name a component's source file by its absolute path, so that a run opens from any folder."""
    file = source_file(component)
    return component if file is None else with_source_file(component, Path(file).resolve())


def find_class(kind: str, name: str) -> Any:
    """Find the class of a kind by its name, or by ``file.py:Class``, which runs that file."""
    if file := source_file(name):
        return _from_file(kind, Path(file), name.rpartition(":")[2])
    if name not in KINDS[kind].__all__:
        raise UserError(f"unknown {kind} '{name}'{nearest(name, KINDS[kind].__all__)}, or file.py:Class")
    return getattr(KINDS[kind], name)


@functools.cache
def _run(path: Path, state: tuple[int, int]) -> ModuleType:
    """Import a user's file, once for each state of the file, so that a class stays the same class."""
    name = "pvae_user_" + re.sub(r"\W", "_", str(path))
    spec: Any = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # as an import would: dataclasses and get_type_hints look there
    sys.path.insert(0, str(path.parent))  # as for a script, so that it finds its neighbours
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.parent))
    return module


def _from_file(kind: str, path: Path, name: str) -> Any:
    if path.suffix != ".py" or not path.is_file():
        raise UserError(f"{kind} {path}:{name}: there is no Python file {path}")
    try:
        module = _run(path.resolve(), (path.stat().st_mtime_ns, path.stat().st_size))
    except Exception as error:
        raise UserError(f"{kind} {path}: the file fails with {type(error).__name__}: {error}") from error
    classes = [n for n, v in vars(module).items() if inspect.isclass(v) and v.__module__ == module.__name__]
    if name not in classes:
        raise UserError(f"{path} has no class '{name}'{nearest(name, classes)}")
    cls, base = getattr(module, name), _KINDS[kind][1]
    if not issubclass(cls, base) or (kind == "program" and not callable(getattr(cls, "model", None))):
        needs = "an nn.Module with a method model(x, index)" if kind == "program" else f"a {base.__name__}"
        raise UserError(f"{path}:{name} is no {kind}: it must be {needs}")
    return cls


def make(kind: str, component: Component, **supplied: Any) -> Any:
    """Make an instance of a component: its own arguments from the table, others from those supplied by name."""
    cls, arguments = _check(kind, component)
    accepted = _arguments(cls)
    try:
        return cls(**arguments, **{name: value for name, value in supplied.items() if name in accepted})
    except (TypeError, ValueError) as error:
        raise UserError(f"{kind} {cls.__name__}: {error}") from error


def with_defaults(kind: str, component: Component) -> dict[str, Any]:
    """Return a component as a table with the defaults of all its own arguments, which a later version may change."""
    arguments = defaults(kind, component) | _check(kind, component)[1]
    # TOML has no word for None, which is then the default anyway.
    plain = {name: list(v) if isinstance(v, tuple) else v for name, v in arguments.items() if v is not None}
    return {"type": as_table(with_absolute_path(component))["type"]} | plain


def defaults(kind: str, component: Component) -> dict[str, Any]:
    """Return the default of each of a component's own arguments that has one."""
    arguments = _arguments(find_class(kind, str(as_table(component).get("type", ""))), SUPPLIED[kind])
    values = {name: p.default for name, p in arguments.items() if p.default is not p.empty}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def accepts_argument(kind: str, component: Component, argument: str) -> bool:
    """Return whether a component's constructor has an argument."""
    return argument in _arguments(find_class(kind, str(as_table(component).get("type", ""))))


def first_doc_line(cls: Any) -> str:
    """Return the first paragraph of a class's docstring without mark-up, up to its formula if it has one.

    >>> first_doc_line(likelihoods.Bernoulli).count("`")
    0
    """
    words, formula, _ = " ".join((inspect.getdoc(cls) or "").split("\n\n")[0].split()).partition(":math:")
    words = words.rstrip(" ,:") + "." if formula else words
    return re.sub(r":\w+:`~?([^`]*)`|``?([^`]*)``?", r"\1\2", words)


def _check(kind: str, component: Component) -> tuple[Any, dict[str, Any]]:
    """Return a component's class and its own arguments, checked against the constructor's signature."""
    arguments = as_table(with_new_words(component))
    cls = find_class(kind, str(arguments.pop("type", "")))
    accepted, hints = _arguments(cls, SUPPLIED[kind]), get_type_hints(cls.__init__)
    for name, value in arguments.items():
        if name not in accepted:
            known = nearest(name, accepted) if accepted else "; it takes none"
            raise UserError(f"{kind} {cls.__name__} takes no argument '{name}'{known}")
        if name in hints and not fits(value, hints[name]):
            raise UserError(f"{kind} {cls.__name__}: {name} is {value!r}, but it takes {type_words(hints[name])}")
    missing = [name for name, p in accepted.items() if p.default is p.empty and name not in arguments]
    if missing:
        raise UserError(f"{kind} {cls.__name__} needs {', '.join(missing)}: write {cls.__name__}({missing[0]}=...)")
    return cls, arguments


def type_words(hint: Any) -> str:
    """Describe a type hint in words.

    >>> type_words(int | None), type_words(str | Mapping[str, int])
    ('a whole number', 'text or a table')
    """
    known = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    if hint in known:
        return known[hint]
    kind, inner = get_origin(hint), get_args(hint)
    if kind in (Union, UnionType):
        return " or ".join(type_words(i) for i in inner if i is not NoneType)
    if kind is Literal:
        return " or ".join(map(repr, inner))
    if kind in (list, Sequence):
        return f"a list, each {type_words(inner[0])}"
    return "a table" if kind in (dict, Mapping) else getattr(hint, "__name__", str(hint))


def _arguments(cls: type, supplied: Sequence[str] = ()) -> dict[str, inspect.Parameter]:
    named = {name: p for name, p in inspect.signature(cls).parameters.items() if name not in supplied}
    return {name: p for name, p in named.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
