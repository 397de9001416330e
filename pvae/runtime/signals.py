"""Stopping: work that a signal stops ends where it can be gone on with, and says how."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType


class TrainingInterrupt(Exception):
    """Work was stopped by a signal, after saving what there was.

    Attributes:
        signal: its number.
    """

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message, number)
        self.signal = number

    def __str__(self) -> str:
        return str(self.args[0])


@contextmanager
def deferred_signals(caught: list[int]) -> Iterator[None]:
    """Note Ctrl-C and SIGTERM in a list instead of dying of the first; the second has its usual effect."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    usual = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in usual.items():
            signal.signal(number, handler)

    def note(number: int, frame: FrameType | None) -> None:
        caught.append(number)
        restore()

    for number in usual:
        signal.signal(number, note)
    try:
        yield
    finally:
        restore()


@contextmanager
def with_resume_hint(folder: Path, flag: str = "") -> Iterator[None]:
    """Let Ctrl-C in the block say that the same command, with this flag, goes on in the folder."""
    try:
        yield
    except KeyboardInterrupt:
        if not (folder / "recipe.toml").is_file():
            raise
        how = f"the same command{f' with {flag}' if flag else ''} goes on"
        raise TrainingInterrupt(f"stopped; what is finished is kept in {folder}; {how}", signal.SIGINT) from None
