"""The progress bar: what is done of what, in words of the job, with the time left."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress_bar(
    label: str, total: int | None, *, done: int = 0, wanted: bool = True
) -> Iterator[Callable[[int, str], None]]:
    """A progress bar on standard error; the yielded function takes how much is done and a few words.

    Arguments:
        label: what is counted, in the plural.
        total: of them; None where that is not known.
        done: at the start.
        wanted: show it at all.
    """
    if not wanted:
        yield lambda done, words: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn(f"  {label:>10}"),
        MofNCompleteColumn(),
        BarColumn(),
        TextColumn("{task.description}"),
        TimeRemainingColumn(),
        TextColumn("left"),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=total, completed=done)
        yield lambda done, words: progress.update(task, completed=done, description=words)
