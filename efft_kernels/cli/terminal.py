"""Progress bars and notes on the terminal."""

from __future__ import annotations

from collections.abc import Callable

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


def progress(console: Console) -> Progress:
    """A context in which `bar` shows bars; they vanish at its end."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def bar(progress: Progress, description: str) -> Callable[[int, int], None]:
    """(done, total) -> None, showing them as a bar."""
    task = progress.add_task(description, total=None)
    return lambda done, total: progress.update(task, completed=done, total=total)


def note(message: str) -> None:
    """Tell the user something on stderr."""
    typer.echo(f"note: {message}", err=True)
