"""The one exception a user's mistake may raise, and the nearest right name for a wrong one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["UserError", "nearest"]


class UserError(Exception):
    """A mistake the user can mend: one line that says what is wrong, where, and what to do."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


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
