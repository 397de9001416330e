"""The one exception a user's mistake may raise, and the nearest right name for a wrong one."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin


class UserError(Exception):
    """A mistake the user can mend: one line that says what is wrong, where, and what to do."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


class Incompatible(UserError):
    """Two components that do not go together; a grid of variants leaves such a pair out and says why."""


class AllChainsDiverged(UserError):
    """Every trajectory of every datapoint diverged, so that there is no number to give."""

    def __init__(self) -> None:
        super().__init__(
            "HMC diverges everywhere, so there is no number to give: the model's log-density or its gradient is not "
            "finite, or no step is small enough; look for NaN in the parameters and for rows outside the support"
        )


def nearest(word: str, known: Iterable[str]) -> str:
    """The end of an error message that names the nearest known word, and all of them.

    >>> nearest("Bernouli", ["Bernoulli", "Gaussian"])
    "; did you mean 'Bernoulli'? (known: Bernoulli, Gaussian)"
    """
    words = list(known)
    folded = {w.lower(): w for w in words}
    close = difflib.get_close_matches(word.lower(), folded, n=1, cutoff=0.5)
    hint = f"; did you mean '{folded[close[0]]}'?" if close else ""
    return f"{hint} (known: {', '.join(words)})"


def positive(who: str, **values: float) -> None:
    """Refuse a value that is not positive and finite; the message names whose it is.

    >>> positive("Laplace", scale=1.0)
    """
    for name, value in values.items():
        if not 0 < value < math.inf:
            raise UserError(f"{who}: {name} is {value}, but it must be positive and finite")


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a type hint's type: a whole number goes for a float, a truth value for no number.

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
