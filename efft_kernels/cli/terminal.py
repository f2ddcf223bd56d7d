"""Progress bars and notes on the terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable

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
    """A context in which `bar` shows bars; they vanish at its end.

    What goes to the terminal meanwhile is printed above them; what goes elsewhere goes there.
    """
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
        redirect_stdout=sys.stdout.isatty(),
        redirect_stderr=sys.stderr.isatty(),
    )


def bar(progress: Progress, description: str) -> Callable[[int, int], None]:
    """(done, total) -> None, showing them as a bar."""
    task = progress.add_task(description, total=None)
    return lambda done, total: progress.update(task, completed=done, total=total)


def note(message: str) -> None:
    """Tell the user something on stderr."""
    # sys.stderr as it is now: while bars are shown, what rich has put there.
    print(f"note: {message}", file=sys.stderr, flush=True)
