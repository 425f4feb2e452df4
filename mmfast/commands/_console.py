"""Tables and progress bars of the commands."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

# A log or a pipe has no width of its own: 80 columns would cut tables.
console = Console(width=None if sys.stdout.isatty() else 140)


@contextmanager
def progress(title: str, total: int) -> Iterator[Callable[..., None]]:
    """Show a progress bar on stderr; the function yielded, `advance(note, steps=1)`, moves it and sets its note."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=total, note="")

        def advance(note: str, steps: float = 1) -> None:
            bar.update(task, advance=steps, note=note.replace("[", r"\["))

        yield advance
