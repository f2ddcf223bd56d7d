"""The command line: efft-kernels demo | train | eval | doctor | bench | analyse."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from .. import __version__, use_backend
from ..methods import METHODS
from ..ops.dispatch import requested_backend
from ..training.settings import TrainSettings
from .analyse import app as analyse
from .bench import bench

if TYPE_CHECKING:
    from ..training.run import EpochRow, Run

# The commands import what they need: timm, torchvision and torchmetrics take seconds to load,
# and --help needs none of them.

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Adapt vision transformers with factor-tuning (EFFT) on fused kernels.",
)
app.add_typer(analyse, name="analyse")
app.command()(bench)

USER_ERROR, FAILED, INTERRUPTED = 2, 1, 130

_IMAGES, _MODEL, _METHOD, _TRAINING, _RUN = (
    partial(typer.Option, rich_help_panel=panel)
    for panel in ("Images", "Model", "Method", "Training", "Run")
)


class Amp(str, Enum):
    """Autocast dtype."""

    none = "none"
    float16 = "float16"
    bfloat16 = "bfloat16"


class Split(str, Enum):
    """Which images to evaluate on."""

    val = "val"
    all = "all"


def _fail(message: str, code: int) -> typer.Exit:
    typer.echo(f"error: {message}", err=True)
    return typer.Exit(code)


def _one_line(error: BaseException) -> str:
    # An error from a loader's worker process carries that process's traceback above its text.
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1] if len(lines) > 1 and "Traceback" in str(error) else " ".join(lines)


@contextmanager
def _input_errors() -> Iterator[None]:
    """Errors that a user's input causes become one line on stderr and exit code 2."""
    try:
        yield
    except (ValueError, TypeError, OSError) as error:
        raise _fail(_one_line(error), USER_ERROR) from error


@contextmanager
def _training_errors(run: Run) -> Iterator[None]:
    """What can go wrong while training: one line on stderr, with advice."""
    from ..training.images import UnreadableImageError
    from ..training.loop import NonFiniteLossError

    try:
        yield
    except UnreadableImageError as error:
        raise _fail(_one_line(error), USER_ERROR) from error
    except NonFiniteLossError as error:
        kept = f"epoch {len(run.history)}, the last good one" if run.history else "no epoch"
        raise _fail(
            f"{error}: training stopped; {run.output} keeps {kept}."
            " Start anew with a lower --lr or --scale and another --output",
            FAILED,
        ) from error
    except torch.OutOfMemoryError as error:
        raise _fail("out of device memory: pass a lower --batch-size", FAILED) from error
    except OSError as error:
        raise _fail(_one_line(error), FAILED) from error


def _check_backend(name: str) -> None:
    """Raise ValueError for a backend, by option or environment, unknown or unable to run here."""
    try:
        with use_backend(requested_backend(name)):
            pass
    except RuntimeError as error:
        raise ValueError(str(error)) from error


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def _bar(progress: Progress, description: str) -> Callable[[int, int], None]:
    """(done, total) -> None, showing them as a bar."""
    task = progress.add_task(description, total=None)
    return lambda done, total: progress.update(task, completed=done, total=total)


def _numbers(text: str | None, name: str) -> tuple[int, ...] | None:
    """ "0-3,11" -> (0, 1, 2, 3, 11)."""
    if text is None:
        return None
    numbers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise ValueError(f"{name} must be numbers and ranges such as 0-3,11, got {text!r}")
        numbers += range(int(first), int(last if dash else first) + 1)
    return tuple(numbers)


def _rank(text: str) -> int | tuple[int, int]:
    """ "16" -> 16, "8,16" -> (8, 16)."""
    try:
        ranks = [int(part) for part in text.split(",")]
    except ValueError:
        ranks = []
    if len(ranks) not in (1, 2):
        raise ValueError(f"rank must be a number R or two, R1,R2, got {text!r}")
    return ranks[0] if len(ranks) == 1 else (ranks[0], ranks[1])


def _print_version(value: bool) -> None:
    if value:
        typer.echo(f"efft-kernels {__version__}")
        raise typer.Exit()


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show it.")
    ] = False,
) -> None:
    pass


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder for the report.")] = Path("runs/demo"),
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds to average.")] = 3,
) -> None:
    """Adapt a small transformer to handwritten digits and show what it cost."""
    from ..demo import run as demonstration

    demonstration.run(output=output, seeds=seeds)


@app.command()
def train(
    data: Annotated[
        Path, _IMAGES(help="One folder of images per class, or train/ and val/ of such.")
    ],
    val_split: Annotated[
        float, _IMAGES(help="Fraction held out where there is no val/.")
    ] = TrainSettings.val_split,
    img_size: Annotated[int | None, _IMAGES(help="Pixels; default: the model's.")] = None,
    augment: Annotated[
        bool, _IMAGES("--augment", help="Random crops, flips and colours.")
    ] = TrainSettings.augment,
    skip_bad_images: Annotated[
        bool, _IMAGES("--skip-bad-images", help="Leave out images that cannot be read.")
    ] = False,
    workers: Annotated[int, _IMAGES(help="Processes that load images.")] = 2,
    model: Annotated[str, _MODEL(help="timm model.")] = TrainSettings.model,
    checkpoint: Annotated[
        Path | None, _MODEL(help="Local weights: .safetensors, .pth, or ViT's .npz.")
    ] = None,
    pretrained: Annotated[
        bool, _MODEL(help="Fetch timm's weights where no --checkpoint is given.")
    ] = True,
    method: Annotated[str, _METHOD(help=f"{', '.join(METHODS)}.")] = TrainSettings.method,
    rank: Annotated[str, _METHOD(help="Rank R, or R1,R2 for U and V.")] = "16",
    scale: Annotated[float | None, _METHOD(help="Factor s on ΔW.")] = None,
    init: Annotated[str | None, _METHOD(help="Factor that starts at zero: u or v.")] = None,
    dropout: Annotated[float | None, _METHOD(help="Dropout on the factors.")] = None,
    cores: Annotated[str | None, _METHOD(help="per_layer or shared.")] = None,
    learn_scale: Annotated[
        bool, _METHOD("--learn-scale", help="Train the scale too.")
    ] = TrainSettings.learn_scale,
    layers: Annotated[str | None, _METHOD(help="Blocks to adapt, e.g. 0-3,11.")] = None,
    targets: Annotated[
        str | None, _METHOD(help="Linears to adapt: mhsa, ffn, or names such as attn.qkv,fc1.")
    ] = None,
    epochs: Annotated[int, _TRAINING()] = TrainSettings.epochs,
    batch_size: Annotated[int, _TRAINING(help="Images per step.")] = TrainSettings.batch_size,
    lr: Annotated[float, _TRAINING(help="Peak learning rate.")] = TrainSettings.lr,
    min_lr: Annotated[float, _TRAINING(help="Last learning rate.")] = TrainSettings.min_lr,
    warmup_epochs: Annotated[
        int | None, _TRAINING(help="Default: a tenth of the epochs.")
    ] = TrainSettings.warmup_epochs,
    weight_decay: Annotated[float, _TRAINING()] = TrainSettings.weight_decay,
    drop_path: Annotated[float, _TRAINING(help="Stochastic depth.")] = TrainSettings.drop_path,
    amp: Annotated[Amp, _TRAINING(help="Autocast dtype.")] = Amp.none,
    seed: Annotated[int, _TRAINING()] = TrainSettings.seed,
    device: Annotated[str, _TRAINING(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    backend: Annotated[str, _TRAINING(help="Kernels: auto, torch, triton, ...")] = "auto",
    output: Annotated[
        Path | None, _RUN(help="Default: runs/train/DATA-MODEL-METHOD-rRANK.")
    ] = None,
    resume: Annotated[bool, _RUN("--resume", help="Continue the run in --output.")] = False,
) -> None:
    """Adapt a timm model to a folder of images; stop it at any time and --resume."""
    console = Console(soft_wrap=True)
    with _input_errors():
        settings = TrainSettings(
            data=data,
            model=model,
            method=method,
            rank=_rank(rank),
            scale=scale,
            init=init,
            dropout=dropout,
            cores=cores,
            learn_scale=learn_scale,
            layers=_numbers(layers, "layers"),
            targets=None if targets is None else tuple(targets.split(",")),
            epochs=epochs,
            batch_size=batch_size,
            lr=lr,
            weight_decay=weight_decay,
            warmup_epochs=warmup_epochs,
            min_lr=min_lr,
            drop_path=drop_path,
            seed=seed,
            val_split=val_split,
            augment=augment,
            workers=workers,
            device=device,
            amp=amp.value,
            checkpoint=checkpoint,
            pretrained=pretrained,
            skip_bad_images=skip_bad_images,
            backend=backend,
            img_size=img_size,
        )
        if output is None:
            name = f"{data.resolve().name}-{model}-{method}-r{rank.replace(',', 'x')}"
            output = Path("runs/train") / name.replace("/", "_").replace(":", "_")
        _check_backend(backend)
    try:
        with use_backend(backend):
            _train(console, settings, output, resume)
    except KeyboardInterrupt:
        again = "the same command with --resume continues it"
        raise _fail(f"interrupted. {again} in {output}", INTERRUPTED) from None


def _train(console: Console, settings: TrainSettings, output: Path, resume: bool) -> None:
    from ..training.run import fit, prepare

    with _input_errors(), _progress(console) as progress:
        run = prepare(
            settings,
            output,
            resume=resume,
            notify=lambda message: typer.echo(f"note: {message}", err=True),
            on_check=_bar(progress, "checking images"),
        )
    head = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    head -= run.adapter.num_parameters()
    images = run.config["images"]
    console.print(
        f"{settings.model} on {run.device}, {settings.method} rank {settings.rank}:"
        f" {run.adapter.num_parameters():,} factor parameters and {head:,} of the head;"
        f" {len(run.classes)} classes, {images['train']:,} images to train,"
        f" {images['val']:,} to validate"
    )
    with _training_errors(run), _progress(console) as progress:
        show_epochs, show_steps = _bar(progress, "epochs"), _bar(progress, "steps")
        show_epochs(len(run.history), settings.epochs)

        def on_epoch(row: EpochRow) -> None:
            show_epochs(row.epoch, settings.epochs)
            console.print(
                f"epoch {row.epoch}/{settings.epochs}  loss {row.train_loss:.4f}"
                f"  val top-1 {row.val_top1_percent:.2f} %  lr {row.lr:.2e}  {row.seconds:.1f} s",
                highlight=False,
            )

        result = fit(run, on_step=show_steps, on_epoch=on_epoch)
    console.print(
        f"val top-1: {result.last_top1_percent:.2f} % after the last epoch;"
        f" best {result.best_top1_percent:.2f} % in epoch {result.best_epoch}"
        " (chosen on these images, so optimistic)",
        highlight=False,
    )
    console.print(f"adapter: {result.adapter_path}", highlight=False)


@app.command("eval")
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
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    amp: Annotated[Amp | None, typer.Option(help="Default: as in training.")] = None,
    skip_bad_images: Annotated[
        bool, typer.Option("--skip-bad-images", help="Leave out images that cannot be read.")
    ] = False,
    backend: Annotated[str, typer.Option(help="Kernels: auto, torch, triton, ...")] = "auto",
) -> None:
    """Measure an adapter that train wrote: top-1 on held-out or new images."""
    from ..training.evaluation import evaluate_adapter

    console = Console(soft_wrap=True)
    with _input_errors(), _progress(console) as progress:
        _check_backend(backend)
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
                notify=lambda message: typer.echo(f"note: {message}", err=True),
                on_batch=_bar(progress, "batches"),
            )
    what = "merged model" if merge else "adapter"
    console.print(
        f"top-1: {result.top1_percent:.2f} %  ({what}, {result.images:,} images,"
        f" {result.images_from})",
        highlight=False,
    )


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Show versions, devices, and which backends run here, or why not."""
    from ..doctor import diagnose

    diagnosis = diagnose()
    if as_json:
        typer.echo(json.dumps(diagnosis.to_json(), indent=2))
    else:
        console = Console()
        versions = Table("what", "found", title="This machine")
        for name, version in diagnosis.versions.items():
            versions.add_row(name, version or "none")
        for device in diagnosis.devices:
            versions.add_row(*device.split(": ", 1))
        backends = Table("backend", "usable", "why not", title="Backends")
        for name, reason in diagnosis.backends.items():
            backends.add_row(name, "yes" if reason is None else "no", reason or "")
        console.print(versions, backends)
    if not diagnosis.healthy:
        raise typer.Exit(FAILED)
