"""How an error of the user's becomes one line on stderr and an exit code."""

from __future__ import annotations

import functools
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer

from . import raised_interrupts

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
    line = lines[-1] if len(lines) > 1 and "Traceback" in str(error) else " ".join(lines)
    return for_command_line(line)


def for_command_line(text: str) -> str:
    """Advice that is Python as options: targets=['q', 'v'] as --targets q,v."""
    text = re.sub(
        r"targets=(?:\[([^\]]*)\]|'([^']*)')",
        lambda match: "--targets " + re.sub(r"[' ]", "", match[1] or match[2]),
        text,
    )
    text = re.sub(r"targets=None finds", "without --targets the method finds", text)
    text = text.replace("LoRA(matrices=None)", "--method lora --matrices all")
    text = re.sub(r"matrices=None", "--matrices all", text)
    text = re.sub(r"\bthe baseline BitFit\b", "--method bitfit", text)
    return re.sub(r"\bLoRA\b(?!\()", "--method lora", text)


@contextmanager
def warnings_as_notes() -> Iterator[None]:
    """Python's UserWarnings inside the block are notes on stderr, each once."""
    with warnings.catch_warnings():
        show = warnings.showwarning

        def note_or_show(message: Warning | str, category: type[Warning], *rest: Any) -> None:
            if category is UserWarning:
                typer.echo(f"note: {for_command_line(str(message))}", err=True)
            else:
                show(message, category, *rest)

        warnings.showwarning = note_or_show  # type: ignore[assignment]
        yield


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
        with raised_interrupts():
            yield
    except KeyboardInterrupt:
        raise fail(message, INTERRUPTED) from None


def in_one_line(command: Callable[..., None]) -> Callable[..., None]:
    """The command, whose last errors are one line too: Ctrl-C, memory, the disk, a diverged model.

    An error that only a fault of ours explains keeps its traceback.
    """

    @functools.wraps(command)
    def run(*args: object, **kwargs: object) -> None:
        with interruptible("interrupted"), failures(), warnings_as_notes():
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
