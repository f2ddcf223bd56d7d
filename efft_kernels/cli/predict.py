"""`efft-kernels predict`."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from .. import use_backend
from .errors import FAILED, fail, input_errors
from .options import Amp, check_backend, with_options
from .source import BackboneOptions, Source
from .terminal import bar, note, progress


@with_options
def predict(
    source: Source,
    images: Annotated[
        list[Path], typer.Argument(help="Images, folders of them, or lists: .txt, a path a line.")
    ],
    output: Annotated[Path | None, typer.Option(help="A CSV file; default: stdout.")] = None,
    top_k: Annotated[
        int | None, typer.Option("--top-k", help="Classes of each image; default: 5, or all.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Images per batch.")] = 64,
    workers: Annotated[int, typer.Option(help="Processes that load images.")] = 2,
    amp: Annotated[Amp, typer.Option(help="Autocast dtype.")] = Amp.none,
    skip_bad_images: Annotated[
        bool, typer.Option("--skip-bad-images", help="Images left out are no failure.")
    ] = False,
    backend: Annotated[str, typer.Option(help="Kernels: auto, torch, triton, ...")] = "auto",
    *,
    backbone: BackboneOptions,
) -> None:
    """Name the classes of images: a CSV of path, top-k classes and their probabilities.

    An image that cannot be read is named and left out; the others are written, and the command ends
    with an error unless --skip-bad-images is given.
    """
    from ..training import prediction

    console = Console(stderr=True, soft_wrap=True)
    unreadable = 0
    with input_errors():
        check_backend(backend)
        paths = prediction.find_images(images)
        with use_backend(backend), progress(console) as shown, _table(output) as table:
            show = bar(shown, "images")
            trained = backbone.open(source, merge=False)
            found = prediction.predict(
                trained,
                paths,
                top_k=top_k,
                batch_size=batch_size,
                workers=workers,
                amp=amp.value,
            )
            numbers = range(1, (top_k or min(5, len(trained.classes))) + 1)
            names = [f"{what}_{n}" for n in numbers for what in ("class", "probability")]
            for done, item in enumerate(found, start=1):
                if done == 1:
                    table.writerow(["path", *names])
                show(done, len(paths))
                if item.unreadable:
                    unreadable += 1
                    note(f"left out: {item.unreadable}")
                    continue
                pairs = zip(item.classes, item.probabilities, strict=True)
                cells = [cell for name, value in pairs for cell in (name, f"{value:.6f}")]
                table.writerow([item.path, *cells])
    if unreadable and not skip_bad_images:
        raise fail(f"{unreadable} of {len(paths)} images could not be read: named above", FAILED)


@contextmanager
def _table(output: Path | None) -> Iterator[Any]:
    """A writer of CSV, to stdout or to a file that is replaced when all is written."""
    if output is None:
        yield csv.writer(sys.stdout, lineterminator="\n")
        return
    from ..atomic_files import replacing

    with (
        replacing(output) as path,
        path.open("w", newline="", encoding="utf-8") as file,
    ):
        yield csv.writer(file, lineterminator="\n")
