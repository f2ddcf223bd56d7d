"""`efft-kernels eval`."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from .. import use_backend
from .errors import input_errors
from .options import Amp, Device, check_backend
from .terminal import bar, note, progress


class Split(str, Enum):
    """Which images to evaluate on."""

    val = "val"
    all = "all"


def evaluate(
    data: Annotated[Path, typer.Option(help="The folder trained on, or another of images.")],
    adapter: Annotated[Path, typer.Option(help="The adapter.safetensors that train wrote.")],
    split: Annotated[
        Split, typer.Option(help="val: held out by training, or val/; all: every image.")
    ] = Split.val,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Local weights; default: those trained on.")
    ] = None,
    pretrained: Annotated[
        bool | None, typer.Option(help="Fetch timm's weights; default: as in training.")
    ] = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="Evaluate the plain model with ΔW in its weights.")
    ] = False,
    batch_size: Annotated[int | None, typer.Option(help="Default: as in training.")] = None,
    workers: Annotated[int, typer.Option(help="Processes that load images.")] = 2,
    device: Device = "auto",
    amp: Annotated[Amp | None, typer.Option(help="Default: as in training.")] = None,
    skip_bad_images: Annotated[
        bool, typer.Option("--skip-bad-images", help="Leave out images that cannot be read.")
    ] = False,
    backend: Annotated[str, typer.Option(help="Kernels: auto, torch, triton, ...")] = "auto",
) -> None:
    """Measure an adapter that train wrote: top-1 on held-out or new images."""
    from ..training.evaluation import evaluate_adapter

    console = Console(soft_wrap=True)
    with input_errors(), progress(console) as shown:
        check_backend(backend)
        with use_backend(backend):
            result = evaluate_adapter(
                data,
                adapter,
                split=split.value,
                checkpoint=checkpoint,
                pretrained=pretrained,
                merge=merge,
                batch_size=batch_size,
                workers=workers,
                device=device,
                amp=None if amp is None else amp.value,
                skip_bad_images=skip_bad_images,
                notify=note,
                on_batch=bar(shown, "batches"),
            )
    what = "merged model" if merge else "adapter"
    console.print(
        f"top-1: {result.top1_percent:.2f} %  ({what}, {result.images:,} images,"
        f" {result.images_from})",
        highlight=False,
    )
