"""Progress bar on standard error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress_bar(
    label: str, total: int | None, *, done: int = 0, wanted: bool = True
) -> Iterator[Callable[[int, str], None]]:
    """Show a progress bar of things, ``label``; the yielded function updates it by the number done and a few words."""
    if not wanted:
        yield lambda done, words: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    columns = f"  {label:>10}", MofNCompleteColumn(), BarColumn(), "{task.description}", TimeRemainingColumn(), "left"
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=total, completed=done)
        yield lambda done, words: progress.update(task, completed=done, description=words)
