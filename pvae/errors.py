"""The one exception that a user's mistake raises, the names of parameters in it, and range checks."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin


class UserError(Exception):
    """Mistake of the user, reported in one line: what is wrong, where, and what to do.

    Arguments:
        message: what is wrong; line breaks become spaces.
        hint: what to do, appended after a semicolon.
    """

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(" ".join(f"{message}; {hint}".split() if hint else message.split()))


class Incompatible(UserError):
    """Components that can't be combined; a sweep reports and leaves out such a pair."""


class AllChainsDiverged(UserError):
    """Divergence of every HMC trajectory of every datapoint."""

    def __init__(self) -> None:
        super().__init__(
            "HMC diverges everywhere, so there is no number to give: the model's log-density or its gradient is not "
            "finite, or no step is small enough; look for NaN in the parameters and for rows outside the support"
        )


_renderer: ContextVar[Callable[[str, Any], str]] = ContextVar(
    "renderer", default=lambda name, value: name if value is None else f"{name}={value}"
)


def param(name: str, value: Any = None) -> str:
    """Return a parameter, with its value if one is given, in the words of the interface in use.

    >>> param("batch_size"), param("device", "cuda")
    ('batch_size', 'device=cuda')
    """
    return _renderer.get()(name, value)


@contextmanager
def params_rendered_by(render: Callable[[str, Any], str]) -> Iterator[None]:
    """Let a function of name and value (None without one) write the parameters of messages made in the block.

    >>> with params_rendered_by(lambda name, value: f"--{name}"): param("epochs")
    '--epochs'
    """
    token = _renderer.set(render)
    try:
        yield
    finally:
        _renderer.reset(token)


def nearest(word: str, known: Iterable[str]) -> str:
    """Return the end of an error message: the nearest known word, and all of them.

    >>> nearest("Bernouli", ["Bernoulli", "Gaussian"])
    "; did you mean 'Bernoulli'? (known: Bernoulli, Gaussian)"
    """
    words = list(known)
    folded = {w.lower(): w for w in words}
    close = difflib.get_close_matches(word.lower(), folded, n=1, cutoff=0.5)
    hint = f"; did you mean '{folded[close[0]]}'?" if close else ""
    return f"{hint} (known: {', '.join(words)})"


def check_range(who: str = "", *, least: float | None = None, **values: float | Sequence[float]) -> None:
    """Raise a `UserError` for the first number, or sequence with a number, that is below ``least`` or not finite.

    Any positive value is allowed without ``least``; without ``who``, the class or function, `param` renders the names.

    >>> check_range(least=1, epochs=0)
    Traceback (most recent call last):
    pvae.errors.UserError: epochs is 0, but it must be at least 1
    """
    for name, value in values.items():
        numbers = value if isinstance(value, Sequence) else [value]
        if not all((v > 0 if least is None else least <= v) and v < math.inf for v in numbers):
            label = f"{who}: {name}" if who else param(name)
            need = "positive and finite" if least is None else f"at least {least}"
            raise UserError(f"{label} is {value}, but it must be {need}")


def refuse_first(
    bad: Any, x: Any, message: str, *, where: str = "", rows: Any = None, counted: str = "such values"
) -> None:
    """Raise a `UserError` that names row, column and value of the first bad entry, if there is one.

    Arguments:
        bad: Boolean tensor [N, ...]: the entries of ``x``, a tensor or array, to refuse.
        message: what is wrong, from a comma or semicolon on, in "{where} row r, column c is v{message} (n {counted})".
        rows: numbers of the rows, [N]; 0 to N - 1 unless given.
    """
    if not bad.any():
        return
    row, *columns = first = tuple(bad.nonzero()[0].tolist())
    number = row if rows is None else int(rows[row])
    place = f"{where} row {number}, column {', '.join(map(str, columns))} is {float(x[first]):g}"
    raise UserError(f"{place}{message} ({int(bad.sum())} {counted})")


def fits(value: Any, hint: Any) -> bool:
    """Whether a value has the type of a type hint: an int is accepted as a float, a bool is not a number.

    >>> fits(3, float | None), fits(True, int), fits([1, "a"], Sequence[int])
    (True, False, False)
    """
    kind, inner = get_origin(hint), get_args(hint)
    if kind in (Union, UnionType):
        return any(fits(value, choice) for choice in inner)
    if kind is Literal:
        return value in inner
    if kind in (list, Sequence):
        return isinstance(value, (list, tuple)) and all(fits(item, inner[0]) for item in value)
    if kind is Mapping:
        return isinstance(value, Mapping)
    if hint in (int, float):
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    return not isinstance(hint, type) or isinstance(value, NoneType if hint is None else hint)
