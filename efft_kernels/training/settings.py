"""What a training run is told: its settings, and the checks on them."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

import torch

from ..baselines import Baseline
from ..methods.base import Method, Rank, decode, encode
from .methods import TRAINABLE, has_rank

AMP_DTYPES = {"none": None, "float16": torch.float16, "bfloat16": torch.bfloat16}
NORMALIZE = ("model", "imagenet")
SCHEDULES = ("update", "epoch", "constant")
OPTIMIZERS = ("adamw", "sgd")
KEEP = ("last", "best")

MOST_PIXELS = 8192
MOST_WORKERS = 1024


@dataclass(frozen=True)
class TrainSettings:
    """Everything that decides a run. Where the papers' VTAB-1K recipe differs from the defaults,
    `recipe_for` has it.

    Attributes:
        data: folder with one folder of images per class, or with train/ and val/ of such.
        model: name of a timm model.
        method: name of a method or of a baseline, a key of `TRAINABLE`.
        rank: of the factors; (R1, R2) for different ones of U and V; a list with one per stage;
            None for the method's own, as for the next four.
        scale: factor s on ΔW.
        init: the factor that starts at zero, "u" or "v".
        dropout: probability, on the factors.
        cores: "per_layer" or "shared".
        learn_scale: train s too.
        options: the method's further options, by name.
        layers: block indices from 0; None for all.
        targets: roles or patterns of the linears to adapt; None for the method's own.
        epochs: how many.
        batch_size: images per batch; `accumulate` of them make an update.
        drop_last: leave out an epoch's last batch where it is smaller.
        lr: peak learning rate.
        weight_decay: of the optimizer.
        optimizer: "adamw", or "sgd" with momentum 0.9.
        backbone_lr_factor: on lr, for all that trains but the head.
        warmup_epochs: epochs in which the learning rate rises; None for a tenth of them.
        min_lr: where the cosine ends.
        schedule: when the learning rate moves, after each "update" or each "epoch" as the releases
            do it (`Schedule`); "constant" for never.
        drop_path: probability, stochastic depth.
        seed: of everything random.
        val_split: fraction of the images held out, for a folder without train/ and val/.
        augment: train with random crops, flips and colours.
        workers: processes that load images.
        device: "auto" is CUDA where there is one.
        amp: autocast dtype, "none", "float16" or "bfloat16".
        checkpoint: file of the backbone's weights; None for timm's.
        pretrained: fetch timm's weights where no checkpoint is given.
        skip_bad_images: leave out images that cannot be decoded.
        backend: of the kernels.
        img_size: pixels; None for the model's own.
        normalize: by whose mean and deviation, the "model"'s own or those of "imagenet".
        mixup: α of mixup; 0 for none.
        cutmix: α of CutMix; 0 for none.
        label_smoothing: the share of a target that is spread over all classes.
        ema: decay of a moving average of what is trained, which is then what is validated and
            saved; None for none.
        clip_grad: the largest norm of an update's gradient; None for any.
        accumulate: batches whose gradients make one update.
        keep: whose adapter is saved, the "last" epoch's or the "best"'s by validation accuracy.
        recipe: name of the recipe that the settings came from, for the record.
        task: the task whose published options they are, for the record.

    Raises:
        ValueError: a value that makes no sense; it names the setting.
    """

    data: Path
    model: str = "vit_tiny_patch16_224"
    method: str = "efft2"
    rank: Rank | list[Rank] | None = None
    scale: float | None = None
    init: str | None = None
    dropout: float | None = None
    cores: str | None = None
    learn_scale: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    layers: tuple[int, ...] | None = None
    targets: tuple[str, ...] | None = None
    epochs: int = 100
    batch_size: int = 64
    drop_last: bool = False
    lr: float = 1e-3
    weight_decay: float = 1e-4
    optimizer: str = "adamw"
    backbone_lr_factor: float = 1.0
    warmup_epochs: int | None = None
    min_lr: float = 1e-5
    schedule: str = "update"
    drop_path: float = 0.1
    seed: int = 42
    val_split: float = 0.2
    augment: bool = False
    workers: int = 0
    device: str = "auto"
    amp: str = "none"
    checkpoint: Path | None = None
    pretrained: bool = True
    skip_bad_images: bool = False
    backend: str = "auto"
    img_size: int | None = None
    normalize: str = "model"
    mixup: float = 0.0
    cutmix: float = 0.0
    label_smoothing: float = 0.0
    ema: float | None = None
    clip_grad: float | None = None
    accumulate: int = 1
    keep: str = "last"
    recipe: str | None = None
    task: str | None = None

    def __post_init__(self) -> None:
        require("method", self.method in TRAINABLE, f"one of {', '.join(TRAINABLE)}", self.method)
        choices = {
            "amp": AMP_DTYPES,
            "normalize": NORMALIZE,
            "schedule": SCHEDULES,
            "optimizer": OPTIMIZERS,
            "keep": KEEP,
        }
        for name, allowed in choices.items():
            value = getattr(self, name)
            require(name, value in allowed, f"one of {', '.join(allowed)}", value)
        if repeated := sorted(set(self.options) & OWN_OPTIONS):
            raise ValueError(f"options must leave out {', '.join(repeated)}: settings of their own")
        for name in ("epochs", "batch_size", "accumulate"):
            require(name, getattr(self, name) >= 1, "at least 1", getattr(self, name))
        for name in ("weight_decay", "min_lr", "mixup", "cutmix"):
            fits = 0 <= getattr(self, name) < math.inf
            require(name, fits, "at least 0 and finite", getattr(self, name))
        fits = 0 <= self.workers <= MOST_WORKERS
        require("workers", fits, f"within 0..{MOST_WORKERS}", self.workers)
        require("seed", 0 <= self.seed < 2**32, "within 0..2^32-1", self.seed)
        require("lr", 0 < self.lr < math.inf, "above 0", self.lr)
        fits = 0 < self.backbone_lr_factor < math.inf
        require("backbone_lr_factor", fits, "above 0", self.backbone_lr_factor)
        require("min_lr", self.min_lr <= self.lr, f"at most lr={self.lr}", self.min_lr)
        of_backbone = self.lr * self.backbone_lr_factor
        expected = f"at most lr · backbone_lr_factor={of_backbone:g}"
        require("min_lr", self.min_lr <= of_backbone, expected, self.min_lr)
        fits = 0 <= self.label_smoothing < 1
        require("label_smoothing", fits, "within [0, 1)", self.label_smoothing)
        require("ema", self.ema is None or 0 < self.ema < 1, "between 0 and 1", self.ema)
        fits = self.clip_grad is None or 0 < self.clip_grad < math.inf
        require("clip_grad", fits, "above 0 and finite", self.clip_grad)
        require("drop_path", 0 <= self.drop_path < 1, "within [0, 1)", self.drop_path)
        require("val_split", 0 < self.val_split < 1, "between 0 and 1", self.val_split)
        if self.img_size is not None:
            fits = 1 <= self.img_size <= MOST_PIXELS
            require("img_size", fits, f"within 1..{MOST_PIXELS} pixels", self.img_size)
        if self.layers is not None:
            named = bool(self.layers) and min(self.layers) >= 0
            require("layers", named, "block indices from 0, at least one", self.layers)
        if self.warmup_epochs is not None:
            expected = f"within 0..{self.epochs - 1} for epochs={self.epochs}"
            fits = 0 <= self.warmup_epochs < self.epochs
            require("warmup_epochs", fits, expected, self.warmup_epochs)

    @property
    def resolved_warmup_epochs(self) -> int:
        """warmup_epochs, or a tenth of the epochs."""
        return self.epochs // 10 if self.warmup_epochs is None else self.warmup_epochs

    @property
    def resolved_rank(self) -> Rank | list[Rank] | None:
        """rank, or the method's own; None where it has none."""
        if self.rank is None and has_rank(self.method):
            return getattr(TRAINABLE[self.method], "rank", None)
        return self.rank

    def method_config(self) -> Method | Baseline:
        """The method's configuration, with the method's own defaults where nothing is set.

        Raises:
            ValueError: a setting that the method does not have, or a value that it refuses.
            TypeError: a value of another type than the method takes.
        """
        method = TRAINABLE[self.method]
        known = {item.name for item in dataclasses.fields(method)}
        own = {name: getattr(self, name) for name in OWN_OPTIONS}
        own["learn_scale"] = self.learn_scale or None
        chosen = {name: value for name, value in own.items() if value is not None}
        chosen |= self.options
        for name, value in chosen.items():
            require(name, name in known, f"left out for method {self.method}", value)
        return method(**chosen)

    def to_json(self) -> dict[str, Any]:
        """The settings in JSON's own types, paths absolute."""
        values = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        for name, value in values.items():
            if isinstance(value, Path):
                values[name] = str(value.resolve())
        rank = self.resolved_rank
        values["rank"] = {"stages": encode(rank)} if isinstance(rank, list) else rank
        values["options"] = {name: encode(value) for name, value in self.options.items()}
        return json.loads(json.dumps(values))  # type: ignore[no-any-return]


# Options of a method that are settings by themselves.
OWN_OPTIONS = frozenset({"rank", "scale", "init", "dropout", "cores", "learn_scale"})


def check_recorded(values: Mapping[str, Any]) -> None:
    """Check settings that were read from a file, as `to_json` writes them.

    Raises:
        ValueError: a value of another type, or one that makes no sense.
    """
    in_json = {Path: (str,), tuple: (list,), float: (int, float), list: (dict,), Mapping: (dict,)}
    given: dict[str, Any] = {}
    for name, hint in get_type_hints(TrainSettings).items():
        kinds = get_args(hint) if isinstance(hint, UnionType) else (hint,)
        plain = [get_origin(kind) or kind for kind in kinds]
        allowed = tuple(kind for each in plain for kind in in_json.get(each, (each,)))
        value = values[name]
        require(name, isinstance(value, allowed), f"as training writes it ({hint})", repr(value))
        given[name] = tuple(value) if isinstance(value, list) else value
        if Path in plain and value is not None:
            given[name] = Path(value)
    try:
        if isinstance(given["rank"], dict):
            given["rank"] = decode(given["rank"]["stages"])
        given["options"] = {name: decode(value) for name, value in given["options"].items()}
        TrainSettings(**given)
    except (TypeError, LookupError) as error:  # what a list or a dictionary holds
        raise ValueError(str(error)) from None


# Settings that runs of older releases have not recorded, and what they did.
BEFORE_THERE_WAS: dict[str, Any] = {
    "options": {},
    "drop_last": False,
    "schedule": "update",
    "normalize": "model",
    "mixup": 0.0,
    "cutmix": 0.0,
    "label_smoothing": 0.0,
    "ema": None,
    "clip_grad": None,
    "accumulate": 1,
    "keep": "last",
    "recipe": None,
    "task": None,
    "optimizer": "adamw",
    "backbone_lr_factor": 1.0,
}


def require(name: str, condition: bool, expected: str, got: object) -> None:
    """Check a setting.

    Raises:
        ValueError: "NAME must be EXPECTED, got GOT", unless `condition`.
    """
    if not condition:
        raise ValueError(f"{name} must be {expected}, got {got}")


def resolve_device(name: str) -> torch.device:
    """The device that `name` stands for.

    Raises:
        ValueError: torch has no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"device must be auto, cpu or a CUDA device present here, got {name!r} ({reason})"
        ) from error
    require("device", device.type in ("cpu", "cuda"), "auto, cpu or a CUDA device", repr(name))
    return device
