"""Components by name: the only place where a word becomes a class. ``__all__`` of a kind's module is its registry."""

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

KINDS: dict[str, ModuleType] = {
    "program": vae,
    "likelihood": likelihoods,
    "prior": priors,
    "family": families,
    "network": networks,
    "guide": guides,
    "objective": objectives,
}

# What a class must be a kind of; a program is known by its method ``model``.
BASES: dict[str, type] = {
    "program": nn.Module,
    "likelihood": likelihoods.Likelihood,
    "prior": priors.Prior,
    "family": families.Family,
    "network": nn.Module,
    "guide": guides.Guide,
    "objective": objectives.Objective,
}

# Arguments that building a recipe supplies to a constructor that takes them, so that no recipe may.
SUPPLIED: dict[str, tuple[str, ...]] = {
    "program": ("columns", "latent", "decoder", "likelihood", "prior", "classes"),
    "likelihood": (),
    "prior": ("dim", "posterior", "data"),
    "family": ("dim",),
    "network": ("inputs", "outputs", "shape", "labels", "decodes"),
    "guide": ("encoder", "family", "num_data", "model", "sites"),
    "objective": (),
}


def as_table(component: Component) -> dict[str, Any]:
    """A component as a table with ``type``."""
    return parse(component) if isinstance(component, str) else dict(component)


def parse(word: str) -> dict[str, Any]:
    """A component as one writes it on the command line: a name, and arguments in brackets if any.

    Raises:
        UserError: the brackets hold no arguments of the form ``name=value``.

    >>> parse("IWAE(K=20)"), parse("my_model.py:StudentT")
    ({'type': 'IWAE', 'K': 20}, {'type': 'my_model.py:StudentT'})
    """
    name, bracket, rest = word.partition("(")
    if not bracket:
        return {"type": word.strip()}
    try:
        call = ast.parse(f"f({rest}", mode="eval").body
        if not isinstance(call, ast.Call) or call.args or not isinstance(call.func, ast.Name):
            raise ValueError
        return {"type": name.strip()} | {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
    except (SyntaxError, ValueError):
        raise UserError(f"'{word}' can't be read; write a name, or Name(argument=value, ...)") from None


def split_words(words: str) -> list[str]:
    """Words at commas outside brackets.

    >>> split_words("ELBO, IWAE(K=5, warm_up=10),DReG")
    ['ELBO', 'IWAE(K=5, warm_up=10)', 'DReG']
    """
    found, depth = [""], 0
    for letter in words:
        depth += (letter in "([") - (letter in ")]")
        if letter == "," and depth == 0:
            found.append("")
        else:
            found[-1] += letter
    return [word.strip() for word in found]


def label(component: Component, defaults: Mapping[str, Any] | None = None) -> str:
    """A component as one word, with the arguments that differ from the defaults.

    >>> label({"type": "IWAE", "K": 20, "kl_weight": 1.0}, {"K": 5, "kl_weight": 1.0})
    'IWAE(K=20)'
    """
    known = defaults or {}
    own = [f"{k}={v!r}" for k, v in as_table(component).items() if k != "type" and (k not in known or known[k] != v)]
    name = str(as_table(component).get("type")).rsplit(":", 1)[-1]
    return f"{name}({', '.join(own)})" if own else name


def own_file(component: Component) -> str | None:
    """The file whose code a component would run, or None for one of this package."""
    file, colon, _ = str(as_table(component).get("type", "")).rpartition(":")
    return file if colon else None


def source_code(component: Component) -> str:
    """SHA-256 of the file whose code a component would run, first 16 hex digits; empty for one of this package."""
    file = own_file(component)
    return "" if file is None else hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16]


def rooted(component: Component) -> Component:
    """The same component, with its file named from the root, so that a run finds it from anywhere."""
    file = own_file(component)
    if file is None:
        return component
    own = as_table(component)
    return own | {"type": f"{Path(file).resolve()}:{own['type'].rpartition(':')[2]}"}


def find_class(kind: str, name: str) -> Any:
    """The class of a kind by its name, or by ``file.py:Class``, which runs that file.

    Raises:
        UserError: there is none, naming the nearest; a file that fails; a class that is not of the kind.
    """
    if file := own_file(name):
        return _from_file(kind, Path(file), name.rpartition(":")[2])
    known = KINDS[kind].__all__
    if name not in known:
        raise UserError(f"unknown {kind} '{name}'{nearest(name, known)}, or file.py:Class")
    return getattr(KINDS[kind], name)


@functools.cache
def _run(path: Path, state: tuple[int, int]) -> ModuleType:
    """The module of a user's file, run once for each state of the file, so that a class stays the same class."""
    where = "pvae_user_" + re.sub(r"\W", "_", str(path))
    spec = importlib.util.spec_from_file_location(where, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[where] = module  # as an import would: dataclasses and get_type_hints look there
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
    found = getattr(module, name)
    if not issubclass(found, BASES[kind]) or (kind == "program" and not callable(getattr(found, "model", None))):
        needs = "an nn.Module with a method model(x, index)" if kind == "program" else f"a {BASES[kind].__name__}"
        raise UserError(f"{path}:{name} is no {kind}: it must be {needs}")
    return found


def make(kind: str, component: Component, **supplied: Any) -> Any:
    """An instance of a component: its own arguments from the table, the rest from what is supplied by name.

    Raises:
        UserError: an unknown name or argument, or a value that the class refuses.
    """
    arguments = as_table(component)
    cls = _checked(kind, arguments)
    arguments.pop("type")
    takes = _arguments(cls)
    try:
        return cls(**arguments, **{name: value for name, value in supplied.items() if name in takes})
    except (TypeError, ValueError) as error:
        raise UserError(f"{kind} {cls.__name__}: {error}") from error


def spelled_out(kind: str, component: Component) -> dict[str, Any]:
    """A component as a table with the defaults of all its own arguments, that a later version may change.

    Raises:
        UserError: an unknown name or argument.
    """
    given = as_table(component)
    _checked(kind, given)
    plain: dict[str, Any] = {
        n: list(v) if isinstance(v, tuple) else v for n, v in (defaults(kind, given) | given).items()
    }
    plain["type"] = as_table(rooted(given))["type"]
    # TOML has no word for None, which is then the default anyway.
    return {"type": plain["type"]} | {n: v for n, v in plain.items() if n != "type" and v is not None}


def defaults(kind: str, component: Component) -> dict[str, Any]:
    """The default of each of a component's own arguments that has one."""
    takes = _arguments(find_class(kind, str(as_table(component).get("type", ""))))
    return {
        name: list(p.default) if isinstance(p.default, tuple) else p.default
        for name, p in takes.items()
        if name not in SUPPLIED[kind] and p.default is not p.empty
    }


def accepts_argument(kind: str, component: Component, argument: str) -> bool:
    """Whether a component's constructor has an argument."""
    return argument in _arguments(find_class(kind, str(as_table(component).get("type", ""))))


def first_doc_line(cls: Any) -> str:
    """The first line of a class's documentation, in plain words."""
    return plain_words((inspect.getdoc(cls) or "").split("\n\n")[0])


def plain_words(line: str) -> str:
    """A line of documentation without its mark-up, up to its formula if it has one.

    >>> plain_words("Binary values, :math:`p(x) = 1` for all.")
    'Binary values.'
    """
    words, formula, _ = " ".join(line.split()).partition(":math:")
    words = words.rstrip(" ,:") + "." if formula else words
    return re.sub(r":\w+:`~?([^`]*)`|``?([^`]*)``?", r"\1\2", words)


def _checked(kind: str, component: dict[str, Any]) -> Any:
    """The component's class, after its arguments have been looked at."""
    cls = find_class(kind, str(component.get("type", "")))
    own = [name for name in _arguments(cls) if name not in SUPPLIED[kind]]
    hints = get_type_hints(cls.__init__)
    for name, value in component.items():
        if name == "type":
            continue
        if name not in own:
            known = nearest(name, own) if own else "; it takes none"
            raise UserError(f"{kind} {cls.__name__} takes no argument '{name}'{known}")
        if name in hints and not fits(value, hints[name]):
            raise UserError(f"{kind} {cls.__name__}: {name} is {value!r}, but it takes {type_words(hints[name])}")
    missing = [n for n in own if _arguments(cls)[n].default is inspect.Parameter.empty and n not in component]
    if missing:
        raise UserError(f"{kind} {cls.__name__} needs {', '.join(missing)}: write {cls.__name__}({missing[0]}=...)")
    return cls


def type_words(hint: Any) -> str:
    """A type hint in words.

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


def _arguments(cls: type) -> dict[str, inspect.Parameter]:
    parameters = inspect.signature(cls).parameters
    return {name: p for name, p in parameters.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
