"""How an error of the user's becomes one line on stderr and an exit code."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
import typer

if TYPE_CHECKING:
    from ..training.run import Run

USER_ERROR, FAILED, INTERRUPTED = 2, 1, 130


def fail(message: str, code: int) -> typer.Exit:
    """Print the line; the exception to raise."""
    typer.echo(f"error: {message}", err=True)
    return typer.Exit(code)


def _one_line(error: BaseException) -> str:
    # An error from a loader's worker process carries that process's traceback above its text.
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1] if len(lines) > 1 and "Traceback" in str(error) else " ".join(lines)


@contextmanager
def input_errors() -> Iterator[None]:
    """What a user's input causes inside the block exits with code 2."""
    try:
        yield
    except (ValueError, TypeError, OSError) as error:
        raise fail(_one_line(error), USER_ERROR) from error


@contextmanager
def interruptible(message: str) -> Iterator[None]:
    """Ctrl-C inside the block prints the message and exits with code 130."""
    try:
        yield
    except KeyboardInterrupt:
        raise fail(message, INTERRUPTED) from None


@contextmanager
def training_errors(run: Run) -> Iterator[None]:
    """What can go wrong while training exits with advice, and code 1 or 2."""
    from ..training.images import UnreadableImageError
    from ..training.loop import NonFiniteLossError

    try:
        yield
    except UnreadableImageError as error:
        raise fail(_one_line(error), USER_ERROR) from error
    except NonFiniteLossError as error:
        kept = f"epoch {len(run.history)}, the last good one" if run.history else "no epoch"
        raise fail(
            f"{error}: training stopped; {run.output} keeps {kept}."
            " Start anew with a lower --lr or --scale and another --output",
            FAILED,
        ) from error
    except torch.OutOfMemoryError as error:
        raise fail("out of device memory: pass a lower --batch-size", FAILED) from error
    except OSError as error:
        raise fail(_one_line(error), FAILED) from error
