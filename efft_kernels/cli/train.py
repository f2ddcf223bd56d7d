"""`efft-kernels train`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from .. import use_backend
from ..methods import METHODS
from ..training.settings import TrainSettings
from . import parse
from .errors import input_errors, interruptible, training_errors
from .options import Amp, check_backend, with_options
from .terminal import bar, note, progress

if TYPE_CHECKING:
    from ..training.run import EpochRow

_IMAGES, _MODEL, _METHOD, _TRAINING, _RUN = (
    partial(typer.Option, rich_help_panel=panel)
    for panel in ("Images", "Model", "Method", "Training", "Run")
)


@dataclass(frozen=True)
class TrainOptions:
    """The fields of `TrainSettings` as options; rank, layers and targets are text to parse."""

    data: Annotated[
        Path, _IMAGES(help="One folder of images per class, or train/ and val/ of such.")
    ]
    val_split: Annotated[float, _IMAGES(help="Fraction held out where there is no val/.")] = (
        TrainSettings.val_split
    )
    img_size: Annotated[int | None, _IMAGES(help="Pixels; default: the model's.")] = None
    augment: Annotated[bool, _IMAGES("--augment", help="Random crops, flips and colours.")] = (
        TrainSettings.augment
    )
    skip_bad_images: Annotated[
        bool, _IMAGES("--skip-bad-images", help="Leave out images that cannot be read.")
    ] = False
    workers: Annotated[int, _IMAGES(help="Processes that load images.")] = 2
    model: Annotated[str, _MODEL(help="timm model.")] = TrainSettings.model
    checkpoint: Annotated[
        Path | None, _MODEL(help="Local weights: .safetensors, .pth, or ViT's .npz.")
    ] = None
    pretrained: Annotated[
        bool, _MODEL(help="Fetch timm's weights where no --checkpoint is given.")
    ] = True
    method: Annotated[str, _METHOD(help=f"{', '.join(METHODS)}.")] = TrainSettings.method
    rank: Annotated[str, _METHOD(help="Rank R, or R1,R2 for U and V.")] = "16"
    scale: Annotated[float | None, _METHOD(help="Factor s on ΔW.")] = None
    init: Annotated[str | None, _METHOD(help="Factor that starts at zero: u or v.")] = None
    dropout: Annotated[float | None, _METHOD(help="Dropout on the factors.")] = None
    cores: Annotated[str | None, _METHOD(help="per_layer or shared.")] = None
    learn_scale: Annotated[bool, _METHOD("--learn-scale", help="Train the scale too.")] = (
        TrainSettings.learn_scale
    )
    layers: Annotated[str | None, _METHOD(help="Blocks to adapt, e.g. 0-3,11.")] = None
    targets: Annotated[
        str | None, _METHOD(help="Linears to adapt: mhsa, ffn, or names such as attn.qkv,fc1.")
    ] = None
    epochs: Annotated[int, _TRAINING()] = TrainSettings.epochs
    batch_size: Annotated[int, _TRAINING(help="Images per step.")] = TrainSettings.batch_size
    lr: Annotated[float, _TRAINING(help="Peak learning rate.")] = TrainSettings.lr
    min_lr: Annotated[float, _TRAINING(help="Last learning rate.")] = TrainSettings.min_lr
    warmup_epochs: Annotated[int | None, _TRAINING(help="Default: a tenth of the epochs.")] = (
        TrainSettings.warmup_epochs
    )
    weight_decay: Annotated[float, _TRAINING()] = TrainSettings.weight_decay
    drop_path: Annotated[float, _TRAINING(help="Stochastic depth.")] = TrainSettings.drop_path
    amp: Annotated[Amp, _TRAINING(help="Autocast dtype.")] = Amp.none
    seed: Annotated[int, _TRAINING()] = TrainSettings.seed
    device: Annotated[str, _TRAINING(help="auto, cpu, cuda, cuda:1, ...")] = "auto"
    backend: Annotated[str, _TRAINING(help="Kernels: auto, torch, triton, ...")] = "auto"

    def settings(self) -> TrainSettings:
        """The settings that the options stand for.

        Raises:
            ValueError: an option that cannot be parsed or makes no sense.
        """
        given: dict[str, Any] = {
            field.name: getattr(self, field.name) for field in dataclasses.fields(self)
        }
        given["rank"] = parse.rank(self.rank)
        given["layers"] = None if self.layers is None else parse.blocks(self.layers)
        given["targets"] = None if self.targets is None else tuple(self.targets.split(","))
        given["amp"] = self.amp.value
        return TrainSettings(**given)

    def default_output(self) -> Path:
        """The run's folder where none is given."""
        rank = self.rank.replace(",", "x")
        name = f"{self.data.resolve().name}-{self.model}-{self.method}-r{rank}"
        return Path("runs/train") / name.replace("/", "_").replace(":", "_")


@with_options
def train(
    options: TrainOptions,
    output: Annotated[
        Path | None, _RUN(help="Default: runs/train/DATA-MODEL-METHOD-rRANK.")
    ] = None,
    resume: Annotated[bool, _RUN("--resume", help="Continue the run in --output.")] = False,
) -> None:
    """Adapt a timm model to a folder of images; stop it at any time and --resume."""
    with input_errors():
        settings = options.settings()
        output = output or options.default_output()
        check_backend(settings.backend)
    interrupted = f"interrupted. the same command with --resume continues it in {output}"
    with interruptible(interrupted), use_backend(settings.backend):
        _train(settings, output, resume)


def _train(settings: TrainSettings, output: Path, resume: bool) -> None:
    from ..training.run import fit, prepare

    console = Console(soft_wrap=True)
    with input_errors(), progress(console) as shown:
        run = prepare(
            settings, output, resume=resume, notify=note, on_check=bar(shown, "checking images")
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
    with training_errors(run), progress(console) as shown:
        show_epochs, show_steps = bar(shown, "epochs"), bar(shown, "steps")
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
