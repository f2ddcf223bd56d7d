"""How an error of the user's becomes one line on stderr and an exit code."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from ..training.run import Run

USER_ERROR, FAILED, INTERRUPTED = 2, 1, 130
_OUT_OF_MEMORY = "out of memory: a lower --batch-size takes less"


def fail(message: str, code: int) -> typer.Exit:
    """Print the line, unless another process has told of its own error; the exception to raise."""
    ranks = sys.modules.get("efft_kernels.training.ranks")  # loaded where there are several
    text = message if ranks is None else ranks.first_to_fail(message)
    if text is not None:
        typer.echo(f"error: {text}", err=True)
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
    except BrokenPipeError:
        raise
    except (ValueError, TypeError, OSError) as error:
        raise fail(_one_line(error), USER_ERROR) from error


@contextmanager
def interruptible(message: str) -> Iterator[None]:
    """Ctrl-C inside the block prints the message and exits with code 130."""
    try:
        yield
    except KeyboardInterrupt:
        raise fail(message, INTERRUPTED) from None


def in_one_line(command: Callable[..., None]) -> Callable[..., None]:
    """The command, whose last errors are one line too: Ctrl-C, memory, the disk, a diverged model.

    An error that only a fault of ours explains keeps its traceback.
    """

    @functools.wraps(command)
    def run(*args: object, **kwargs: object) -> None:
        with interruptible("interrupted"), failures():
            command(*args, **kwargs)

    return run


@contextmanager
def failures() -> Iterator[None]:
    """What the machine, or a model's numbers, cause inside the block exits with code 1."""
    try:
        yield
    except (typer.Exit, BrokenPipeError):  # of `| head`; typer ends it quietly
        raise
    except MemoryError as error:
        raise fail(_OUT_OF_MEMORY, FAILED) from error
    except OSError as error:
        raise fail(_one_line(error), FAILED) from error
    except RuntimeError as error:
        from torch import OutOfMemoryError

        if isinstance(error, OutOfMemoryError) or "DefaultCPUAllocator" in str(error):
            raise fail(_OUT_OF_MEMORY, FAILED) from error
        from ..training.loop import NonFiniteLossError
        from ..training.ranks import OtherRankError

        if not isinstance(error, NonFiniteLossError | OtherRankError):
            raise
        raise fail(_one_line(error), FAILED) from error


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
