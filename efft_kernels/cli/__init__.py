"""The command line, `efft-kernels`.

A command is a thin function in a file of its own, with a line in commands.py. That file is loaded
when the command is called: torch, timm, torchvision, torchmetrics and matplotlib take seconds, and
--version, the list of commands and a wrong path need none of them.

commands.py   the commands by name, and the loading of the one that is called
options.py    options and groups of options that commands share
benchmark.py  what vtab, fewshot and sweep share
scheduling.py the options on where the cells run
source.py     the options that open what training left
config.py     options from a file
parse.py      the text of an option as numbers
errors.py     exit codes, and how an error becomes one line
terminal.py   progress bars and notes
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn


def main() -> None:
    """Run the command line; the console script."""
    with ended_by_interrupt():
        from .commands import app

        app()


@contextmanager
def ended_by_interrupt() -> Iterator[None]:
    """Until a command runs, Ctrl-C prints one line and exits with code 130: while something is
    imported, and while typer parses, which would end without a word."""
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler:  # ignored, as in a shell's background
        yield
        return
    signal.signal(signal.SIGINT, _leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def raised_interrupts() -> Iterator[None]:
    """While a command runs, Ctrl-C is a KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is not _leave:
        yield
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, _leave)


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    # No exception: an import in progress could catch it, or raise another in its place.
    os.write(2, b"error: interrupted\n")
    os._exit(130)


def __getattr__(name: str) -> Any:
    if name == "app":
        from .commands import app

        return app
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
