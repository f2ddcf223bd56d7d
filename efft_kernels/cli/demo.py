"""`efft-kernels demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .errors import FAILED, fail


def demo(
    output: Annotated[Path, typer.Option(help="Folder for the report.")] = Path("runs/demo"),
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds to average.")] = 3,
) -> None:
    """Adapt a small transformer to handwritten digits and show what it cost."""
    from ..demo.run import NothingLearntError, run

    try:
        run(output=output, seeds=seeds)
    except NothingLearntError as error:
        raise fail(str(error), FAILED) from error
