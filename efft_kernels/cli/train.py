"""`efft-kernels train`."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from .. import use_backend
from ..baselines import BASELINES
from ..training.methods import TRAINABLE, has_rank
from ..training.recipe import Recipe, recipe_for
from ..training.settings import OWN_OPTIONS, TrainSettings, require
from . import parse
from .config import Config
from .errors import input_errors, interruptible, training_errors
from .method_options import MethodOptions
from .options import Amp, Given, check_backend, with_options
from .terminal import bar, note, progress

if TYPE_CHECKING:
    from ..training.ranks import Ranks
    from ..training.run import EpochRow

_IMAGES, _MODEL, _METHOD, _TRAINING, _RUN = (
    partial(typer.Option, rich_help_panel=panel)
    for panel in ("Images", "Model", "Method", "Training", "Run")
)


@dataclass(frozen=True)
class TrainOptions:
    """The fields of `TrainSettings` as options, but for the method's; layers and targets are text
    to parse."""

    data: Annotated[
        Path, _IMAGES(help="One folder of images per class, or train/ and val/ of such.")
    ]
    recipe: Annotated[
        str | None,
        typer.Option(help="Published settings, where no option says otherwise: vtab."),
    ] = None
    task: Annotated[
        str | None, typer.Option(help="With --recipe: whose rank, scale and init, e.g. cifar.")
    ] = None
    val_split: Annotated[float, _IMAGES(help="Fraction held out where there is no val/.")] = (
        TrainSettings.val_split
    )
    img_size: Annotated[int | None, _IMAGES(help="Pixels; default: the model's.")] = None
    normalize: Annotated[
        str, _IMAGES(help="By the mean and deviation of the model, or of imagenet.")
    ] = TrainSettings.normalize
    augment: Annotated[bool, _IMAGES(help="Random crops, flips and colours.")] = (
        TrainSettings.augment
    )
    skip_bad_images: Annotated[bool, _IMAGES(help="Leave out images that cannot be read.")] = False
    workers: Annotated[int, _IMAGES(help="Processes that load images.")] = 2
    model: Annotated[str, _MODEL(help="timm model.")] = TrainSettings.model
    checkpoint: Annotated[
        Path | None, _MODEL(help="Local weights: .safetensors, .pth, or ViT's .npz.")
    ] = None
    pretrained: Annotated[
        bool, _MODEL(help="Fetch timm's weights where no --checkpoint is given.")
    ] = True
    method: Annotated[str, _METHOD(help=f"{', '.join(TRAINABLE)}.")] = TrainSettings.method
    layers: Annotated[str | None, _METHOD(help="Blocks to adapt, e.g. 0-3,11.")] = None
    targets: Annotated[
        str | None, _METHOD(help="Linears to adapt: mhsa, ffn, or names such as attn.qkv,fc1.")
    ] = None
    epochs: Annotated[int, _TRAINING()] = TrainSettings.epochs
    batch_size: Annotated[int, _TRAINING(help="Images per batch.")] = TrainSettings.batch_size
    drop_last: Annotated[
        bool, _TRAINING(help="Leave out an epoch's last batch where it is smaller.")
    ] = TrainSettings.drop_last
    lr: Annotated[float, _TRAINING(help="Peak learning rate.")] = TrainSettings.lr
    min_lr: Annotated[float, _TRAINING(help="Last learning rate.")] = TrainSettings.min_lr
    warmup_epochs: Annotated[int | None, _TRAINING(help="Default: a tenth of the epochs.")] = (
        TrainSettings.warmup_epochs
    )
    schedule: Annotated[
        str, _TRAINING(help="When the learning rate moves: update, epoch, or constant for never.")
    ] = TrainSettings.schedule
    weight_decay: Annotated[float, _TRAINING()] = TrainSettings.weight_decay
    optimizer: Annotated[str, _TRAINING(help="adamw, or sgd with momentum 0.9.")] = (
        TrainSettings.optimizer
    )
    backbone_lr_factor: Annotated[
        float, _TRAINING(help="On the learning rate, for all that trains but the head.")
    ] = TrainSettings.backbone_lr_factor
    drop_path: Annotated[float, _TRAINING(help="Stochastic depth.")] = TrainSettings.drop_path
    mixup: Annotated[float, _TRAINING(help="α of mixup; 0: none.")] = TrainSettings.mixup
    cutmix: Annotated[float, _TRAINING(help="α of CutMix; 0: none.")] = TrainSettings.cutmix
    label_smoothing: Annotated[
        float, _TRAINING(help="Share of a target that is spread over all classes.")
    ] = TrainSettings.label_smoothing
    ema: Annotated[
        float | None,
        _TRAINING(help="Validate and save a moving average of what trains, with this decay."),
    ] = TrainSettings.ema
    clip_grad: Annotated[float | None, _TRAINING(help="Largest norm of an update's gradient.")] = (
        TrainSettings.clip_grad
    )
    accumulate: Annotated[int, _TRAINING(help="Batches to an update.")] = TrainSettings.accumulate
    keep: Annotated[str, _TRAINING(help="Save the adapter of the last epoch, or of the best.")] = (
        TrainSettings.keep
    )
    amp: Annotated[Amp, _TRAINING(help="Autocast dtype.")] = Amp.none
    seed: Annotated[int, _TRAINING()] = TrainSettings.seed
    device: Annotated[str, _TRAINING(help="auto, cpu, cuda, cuda:1, ...")] = "auto"
    backend: Annotated[str, _TRAINING(help="Kernels: auto, torch, triton, ...")] = "auto"

    def settings(
        self, method_options: Mapping[str, Any] | None = None, given: Collection[str] = ()
    ) -> TrainSettings:
        """The settings that the options stand for.

        Args:
            method_options: the method's fields that were given.
            given: the options that win over a recipe.

        Raises:
            ValueError: an option that cannot be parsed or makes no sense.
        """
        values: dict[str, Any] = {
            field.name: getattr(self, field.name) for field in dataclasses.fields(self)
        }
        values["layers"] = None if self.layers is None else parse.blocks(self.layers)
        values["targets"] = None if self.targets is None else tuple(self.targets.split(","))
        values["amp"] = self.amp.value
        options = dict(method_options or {})
        values |= {name: options.pop(name) for name in OWN_OPTIONS & set(options)}
        values["options"] = options
        if self.recipe is None:
            require("task", self.task is None, "left out without --recipe", self.task)
            return TrainSettings(**values)
        recipe = recipe_for(self.recipe, self.task, self.method)
        published = {field.name for field in dataclasses.fields(Recipe)} - set(given)
        for name in ("recipe", *published & set(values)):
            del values[name]
        return recipe.settings(**values)

    def default_output(self, settings: TrainSettings) -> Path:
        """The run's folder where none is given."""
        name = f"{self.data.resolve().name}-{settings.model}-{self.method}"
        if has_rank(self.method):
            name += "-r" + re.sub(r"[^\d]+", "x", str(settings.resolved_rank)).strip("x")
        return Path("runs/train") / name.replace("/", "_").replace(":", "_")


@with_options
def train(
    options: TrainOptions,
    method_options: MethodOptions,
    given: Given,
    output: Annotated[
        Path | None, _RUN(help="Default: runs/train/DATA-MODEL-METHOD-rRANK.")
    ] = None,
    resume: Annotated[bool, _RUN(help="Continue the run in --output.")] = False,
    fsdp: Annotated[
        bool, _RUN(help="With torchrun, divide the weights too: FSDP2, not DDP.")
    ] = False,
    log_dir: Annotated[
        Path | None, _RUN(help="Also write the epochs there, for TensorBoard.")
    ] = None,
    config: Config = None,
) -> None:
    """Adapt a timm model to a folder of images; stop it at any time and --resume.

    On N devices: torchrun --nproc-per-node N -m efft_kernels train ...
    """
    from ..training.ranks import session

    with ExitStack() as stack:
        with input_errors():
            ranks = stack.enter_context(session(fsdp=fsdp))
            settings = options.settings(method_options, given)
            output = output or options.default_output(settings)
            check_backend(settings.backend)
        interrupted = f"interrupted. the same command with --resume continues it in {output}"
        with interruptible(interrupted), use_backend(settings.backend):
            _train(settings, output, resume, log_dir, ranks)


def _train(
    settings: TrainSettings, output: Path, resume: bool, log_dir: Path | None, ranks: Ranks
) -> None:
    from ..training.curves import TensorBoardLog, require_tensorboard
    from ..training.run import fit, prepare

    console = Console(soft_wrap=True, quiet=not ranks.first)
    with input_errors(), progress(console) as shown:
        if log_dir is not None:
            require_tensorboard()
        on_check = bar(shown, "checking images")
        run = prepare(settings, output, resume=resume, notify=note, on_check=on_check, ranks=ranks)
    head = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    head -= run.adapter.num_parameters()
    images = run.config["images"]
    rank = f" rank {settings.resolved_rank}" if has_rank(settings.method) else ""
    recipe = f", recipe {settings.recipe}" if settings.recipe else ""
    recipe += f" for {settings.task}" if settings.task else ""
    kind = "" if settings.method in BASELINES else "factor "
    console.print(
        f"{settings.model} on {run.device}, {settings.method}{rank}{recipe}:"
        f" {run.adapter.num_parameters():,} {kind}parameters and {head:,} of the head;"
        f" {len(run.classes)} classes, {images['train']:,} images to train,"
        f" {images['val']:,} to validate"
    )
    with training_errors(run), ExitStack() as stack, progress(console) as shown:
        show_epochs, show_steps = bar(shown, "epochs"), bar(shown, "steps")
        show_epochs(len(run.history), settings.epochs)
        log = (
            None
            if log_dir is None
            else stack.enter_context(closing(TensorBoardLog(log_dir, len(run.history))))
        )

        def on_epoch(row: EpochRow) -> None:
            show_epochs(row.epoch, settings.epochs)
            console.print(
                f"epoch {row.epoch}/{settings.epochs}  loss {row.train_loss:.4f}"
                f"  val top-1 {row.val_top1_percent:.2f} %  lr {row.lr:.2e}  {row.seconds:.1f} s",
                highlight=False,
            )
            if log is not None:
                log(row)

        result = fit(run, on_step=show_steps, on_epoch=on_epoch)
    console.print(
        f"val top-1: {result.last_top1_percent:.2f} % after the last epoch;"
        f" best {result.best_top1_percent:.2f} % in epoch {result.best_epoch}"
        " (chosen on these images, so optimistic)",
        highlight=False,
    )
    of_epoch = f" (epoch {result.kept_epoch})" if settings.keep == "best" else ""
    console.print(f"adapter: {result.adapter_path}{of_epoch}", highlight=False)
