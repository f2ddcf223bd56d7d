"""`efft-kernels merge`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from .errors import input_errors
from .options import with_options
from .source import BackboneOptions, Source


@with_options
def merge(
    source: Source,
    output: Annotated[Path, typer.Option(help="A new folder, which timm opens too.")],
    *,
    backbone: BackboneOptions,
) -> None:
    """Fold what was trained into the backbone: a plain model that needs no efft-kernels."""
    with input_errors():
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise ValueError(f"output must be a new or empty folder, got {output}")
        from ..training.trained import WEIGHTS, write_folder

        trained = backbone.open(source, merge=True)
        write_folder(trained, output)
    console = Console(soft_wrap=True)
    console.print(
        f"{trained.facts['model']} with {len(trained.classes)} classes: {output / WEIGHTS}\n"
        f'timm.create_model("local-dir:{output}", pretrained=True) opens it',
        highlight=False,
        markup=False,
    )
