"""What an analysis trains on, and how: a backbone, images of a data set, and one budget for all.

A task is a data set here; in `adapter_set` it is an adapter among those of a mixed batch.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.data import DataLoader

from ..training import digits
from ..training.backbone import Notify, build_backbone
from ..training.images import (
    find_unreadable,
    make_loader,
    make_transforms,
    open_splits,
    refuse_or_report,
)
from ..training.loop import (
    NonFiniteLossError,
    Schedule,
    evaluate,
    train_epochs,
    trained_parameters,
)
from ..training.reproducible import seed_everything
from ..training.settings import require, resolve_device

Loader = DataLoader[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Task:
    """One data set and the backbone to adapt to it.

    Attributes:
        name: of the data set.
        model: the backbone with a head for the classes; only copies of it are trained.
        train: loader of (images [B, C, H, W], targets [B] int64).
        val: loader of the same.
        num_classes: of the data set.
        device: where to train.
    """

    name: str
    model: nn.Module
    train: Loader
    val: Loader
    num_classes: int
    device: torch.device

    def copy_of_model(self) -> nn.Module:
        """A copy to train, on the task's device."""
        return copy.deepcopy(self.model).to(self.device)


@dataclass(frozen=True)
class Budget:
    """How long and how fast every run of an analysis trains.

    AdamW; the learning rate rises over the first tenth of the epochs to `lr` and falls to zero as a
    cosine. The defaults are EFFT's for VTAB-1k.

    Attributes:
        epochs: how many.
        lr: peak learning rate.
        weight_decay: of AdamW.

    Raises:
        ValueError: a number out of range.
    """

    epochs: int = 100
    lr: float = 1e-3
    weight_decay: float = 1e-4

    def __post_init__(self) -> None:
        require("epochs", self.epochs >= 1, "at least 1", self.epochs)
        require("lr", 0 < self.lr < math.inf, "above 0", self.lr)
        decays = 0 <= self.weight_decay < math.inf
        require("weight_decay", decays, "at least 0", self.weight_decay)


def top1_after_training(
    model: nn.Module,
    task: Task,
    budget: Budget,
    seed: int,
    parameter_groups: Iterable[dict[str, Any]] | None = None,
) -> float:
    """Train what requires grad and measure.

    Args:
        model: trained in place, on the task's device.
        task: the images.
        budget: the epochs and the learning rate.
        seed: of the order of the images and of dropout.
        parameter_groups: for the optimizer, each with a learning rate of its own if it likes; None
            for all parameters that require grad. Without any parameter the model is only measured.

    Returns:
        Top-1 in percent of the validation images, after the last epoch; NaN where the loss, a
        trained parameter or a logit became NaN or infinite on the way.
    """
    if parameter_groups is None:
        parameter_groups = [{"params": trained_parameters(model)}]
    groups = [group for group in parameter_groups if group["params"]]
    try:
        if groups:
            _train(model, task, budget, seed, groups)
        with parametrize.cached():
            return evaluate(model, task.val, device=task.device, num_classes=task.num_classes)
    except NonFiniteLossError:
        return math.nan


def _train(
    model: nn.Module, task: Task, budget: Budget, seed: int, groups: list[dict[str, Any]]
) -> None:
    schedule = Schedule(
        epochs=budget.epochs,
        lr=budget.lr,
        weight_decay=budget.weight_decay,
        warmup_epochs=budget.epochs // 10,
        warmup_lr=budget.lr / 10,
    )
    optimizer, scheduler = schedule.start(groups, len(task.train))
    for _ in train_epochs(
        model,
        task.train,
        optimizer,
        range(budget.epochs),
        device=task.device,
        scheduler=scheduler,
        seed=seed,
    ):
        pass


def folder_task(
    data: Path,
    *,
    model: str,
    checkpoint: Path | None = None,
    pretrained: bool = True,
    img_size: int | None = None,
    val_split: float = 0.2,
    batch_size: int = 64,
    workers: int = 0,
    device: str = "auto",
    seed: int = 0,
    notify: Notify = lambda message: None,
) -> Task:
    """A folder of images, one folder per class, and a timm model.

    Args:
        data: as for `efft-kernels train`.
        seed: of the head's weights and of what is held out, the same for all runs.
        (others): as for `efft-kernels train`.

    Raises:
        ValueError: the images, the model or the checkpoint do not fit, or no such device.
    """
    require("batch_size", batch_size >= 1, "at least 1", batch_size)
    torch_device = resolve_device(device)
    splits = open_splits(data, val_split=val_split, seed=seed, notify=notify)
    unreadable = find_unreadable(splits.train + splits.val, workers=workers)
    refuse_or_report(unreadable, skip=False, notify=notify)
    seed_everything(seed)
    backbone = build_backbone(
        model,
        num_classes=len(splits.classes),
        checkpoint=checkpoint,
        pretrained=pretrained,
        img_size=img_size,
        notify=notify,
    )
    train_transform, val_transform = make_transforms(backbone, img_size=img_size)

    def loader(samples: Any, transform: Any, shuffle: bool) -> Loader:
        return make_loader(
            samples,
            transform,
            batch_size=batch_size,
            workers=workers,
            shuffle=shuffle,
            pin_memory=torch_device.type == "cuda",
        )

    return Task(
        name=data.resolve().name,
        model=backbone,
        train=loader(splits.train, train_transform, True),
        val=loader(splits.val, val_transform, False),
        num_classes=len(splits.classes),
        device=torch_device,
    )


def digits_task(
    *,
    batch_size: int = 20,
    source_epochs: int | None = None,
    device: str = "cpu",
    seed: int = 0,
    on_epoch: Callable[[], None] = lambda: None,
) -> Task:
    """A small ViT trained on the handwritten digits 0 to 4, to be adapted to 5 to 9.

    Args:
        batch_size: images per step.
        source_epochs: of the training on 0 to 4; None for the demo's number.
        device: where to adapt; the training on 0 to 4 is on the CPU.
        seed: of the 20 training images a digit and of the head's weights.
        on_epoch: called after each epoch of the training on 0 to 4.

    Raises:
        ValueError: no such device, or a number below 1.
    """
    source_epochs = digits.SOURCE_EPOCHS if source_epochs is None else source_epochs
    require("batch_size", batch_size >= 1, "at least 1", batch_size)
    require("epochs", source_epochs >= 1, "at least 1", source_epochs)
    torch_device = resolve_device(device)
    backbone, _ = digits.pretrain(epochs=source_epochs, on_epoch=on_epoch)
    train, test = digits.split_digits(digits.TARGET_CLASSES, digits.TRAIN_PER_CLASS, seed)
    seed_everything(seed)
    backbone.reset_classifier(len(digits.TARGET_CLASSES))
    shuffled: Any = DataLoader(
        train, batch_size, shuffle=True, drop_last=True, generator=torch.Generator()
    )
    in_order: Any = DataLoader(test, batch_size=256)
    return Task(
        name="digits 5 to 9",
        model=backbone,
        train=shuffled,
        val=in_order,
        num_classes=len(digits.TARGET_CLASSES),
        device=torch_device,
    )


def without_nan(value: Any) -> Any:
    """`value` in JSON's own types: NaN becomes None."""
    if isinstance(value, float):
        return None if math.isnan(value) else value
    if isinstance(value, Mapping):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return value
