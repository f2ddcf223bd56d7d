"""`efft-kernels export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from .errors import input_errors
from .options import with_options
from .source import BackboneOptions, Source


@with_options
def export(
    source: Source,
    output: Annotated[
        Path, typer.Option(help="A file: .safetensors, .pt2 (torch.export) or .onnx.")
    ],
    batch_size: Annotated[
        int | None, typer.Option(help="Images that the program takes at once; default: any.")
    ] = None,
    *,
    backbone: BackboneOptions,
) -> None:
    """Write the merged model for others: safetensors, torch.export, ONNX."""
    with input_errors():
        from ..training.export import check_format
        from ..training.export import export as write

        check_format(output)
        trained = backbone.open(source, merge=True)
        difference = write(trained, output, batch_size=batch_size)
    told = "" if difference is None else f", logits within {difference:.1e} of the model's"
    size = "×".join(str(n) for n in trained.input_size)
    Console(soft_wrap=True).print(
        f"{trained.facts['model']} with {len(trained.classes)} classes, images of {size}: {output}"
        f"{told}",
        highlight=False,
        markup=False,
    )
