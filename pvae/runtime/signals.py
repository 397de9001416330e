"""Ctrl-C and SIGTERM: work that is stopped saves what it has and says how to resume."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from pvae.errors import param


class TrainingInterrupt(Exception):
    """Interruption by the signal of a number, raised after saving."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message, number)
        self.signal = number

    def __str__(self) -> str:
        return str(self.args[0])


@contextmanager
def handle_first_signal(act: Callable[[int], None]) -> Iterator[None]:
    """Call a function with the number of the first Ctrl-C or SIGTERM in the block; the second has its usual effect.

    Signals reach the main thread only: in another one the block runs as it is.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in handlers.items():
            signal.signal(number, handler)

    def handle(number: int, frame: FrameType | None) -> None:
        restore()
        act(number)

    for number in handlers:
        signal.signal(number, handle)
    try:
        yield
    finally:
        restore()


def raise_interrupt(number: int) -> None:
    """Raise a `TrainingInterrupt` at once; a policy for `handle_first_signal`."""
    name = signal.Signals(number).name
    raise TrainingInterrupt(f"stopped by {name}; the same command with {param('resume', True)} goes on", number)


@contextmanager
def with_resume_hint(folder: Path, flag: str = "") -> Iterator[None]:
    """Turn Ctrl-C in the block into an interrupt that names the folder of results and the flag that resumes."""
    try:
        yield
    except KeyboardInterrupt:
        if not (folder / "recipe.toml").is_file():
            raise
        how = f"the same command{f' with {flag}' if flag else ''} goes on"
        raise TrainingInterrupt(f"stopped; what is finished is kept in {folder}; {how}", signal.SIGINT) from None
