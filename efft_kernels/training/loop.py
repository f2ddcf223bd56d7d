"""The training loop of the demo, the analyses and `efft-kernels train`."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from timm.scheduler import create_scheduler_v2
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy

from .reproducible import epoch_seed, seed_everything

MIB = 2**20

Batches = Iterable[tuple[torch.Tensor, torch.Tensor]]


class NonFiniteLossError(RuntimeError):
    """The training loss, a trained parameter or a logit became NaN or infinite."""


class UpdateScheduler(Protocol):
    """What the loop needs of a scheduler: timm's made with `step_on_epochs=False` have it."""

    def step_update(self, num_updates: int) -> None: ...


@dataclass(frozen=True)
class EpochResult:
    """What one training epoch did.

    Attributes:
        loss: mean over the images.
        images: how many were seen.
        step_ms: milliseconds of each update, from the batch lying on the device to the finished
            optimizer step, without data loading.
    """

    loss: float
    images: int
    step_ms: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Schedule:
    """AdamW with a learning rate that rises linearly, then falls as a cosine.

    Once an epoch, it moves as in the EFFT and FacT releases, which call timm's `scheduler.step(e)`
    after epoch e, counted from 0: epochs 0 and 1 both run at `warmup_lr`, and every other at what
    the schedule has for the epoch before.

    Attributes:
        epochs: how many.
        lr: the peak learning rate.
        weight_decay: of AdamW.
        warmup_epochs: epochs of the rise.
        warmup_lr: where the rise begins.
        min_lr: where the cosine ends.
        step: when the learning rate moves, after each "update" or each "epoch".
    """

    epochs: int
    lr: float
    weight_decay: float
    warmup_epochs: int
    warmup_lr: float
    min_lr: float = 0.0
    step: str = "update"

    def start(
        self, parameters: Iterable[Any], updates_per_epoch: int
    ) -> tuple[torch.optim.Optimizer, UpdateScheduler]:
        """The optimizer, and the scheduler that `train_one_epoch` steps.

        Args:
            parameters: tensors, or groups of them as torch's optimizers take them.
            updates_per_epoch: batches of the loader.
        """
        optimizer = torch.optim.AdamW(parameters, lr=self.lr, weight_decay=self.weight_decay)
        scheduler: Any = create_scheduler_v2(
            optimizer,
            sched="cosine",
            num_epochs=self.epochs,
            warmup_epochs=self.warmup_epochs,
            warmup_lr=self.warmup_lr,
            min_lr=self.min_lr,
            step_on_epochs=self.step == "epoch",
            updates_per_epoch=updates_per_epoch,
        )[0]
        if self.step == "epoch":
            return optimizer, _OncePerEpoch(scheduler, updates_per_epoch)
        return optimizer, scheduler


@dataclass(frozen=True)
class _OncePerEpoch:
    """Counts updates, and steps a timm scheduler after an epoch's last with the epoch's number."""

    scheduler: Any
    updates_per_epoch: int

    def step_update(self, num_updates: int) -> None:
        epochs, updates = divmod(num_updates, self.updates_per_epoch)
        if updates == 0:
            self.scheduler.step(epochs - 1)


def trained_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that require grad."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def train_epochs(
    model: nn.Module,
    loader: DataLoader[Any],
    optimizer: torch.optim.Optimizer,
    epochs: range,
    *,
    device: torch.device | str,
    scheduler: UpdateScheduler,
    seed: int | None = None,
    autocast_dtype: torch.dtype | None = None,
    scaler: torch.amp.GradScaler | None = None,
    on_step: Callable[[int, float], None] | None = None,
) -> Iterator[tuple[int, EpochResult]]:
    """Train epoch by epoch; the caller measures and saves between two.

    Args:
        epochs: the epochs' numbers, counted from 0.
        seed: seeds every epoch anew, the loader's own generator too, so that an epoch does not
            depend on those before it; None leaves the generators alone.
        (others): as for `train_one_epoch`.

    Yields:
        (epoch, its result) after each.

    Raises:
        NonFiniteLossError: as in `train_one_epoch`.
    """
    for epoch in epochs:
        if seed is not None:
            of_epoch = epoch_seed(seed, epoch + 1)  # 0 is the initialisation's
            seed_everything(of_epoch)
            if loader.generator is not None:
                loader.generator.manual_seed(of_epoch)
        result = train_one_epoch(
            model,
            loader,
            optimizer,
            device=device,
            scheduler=scheduler,
            autocast_dtype=autocast_dtype,
            on_step=on_step,
            scaler=scaler,
            epoch=epoch,
        )
        yield epoch, result


def train_one_epoch(
    model: nn.Module,
    loader: Batches,
    optimizer: torch.optim.Optimizer,
    *,
    device: torch.device | str,
    scheduler: UpdateScheduler | None = None,
    autocast_dtype: torch.dtype | None = None,
    on_step: Callable[[int, float], None] | None = None,
    scaler: torch.amp.GradScaler | None = None,
    epoch: int = 0,
) -> EpochResult:
    """Train `model` on every batch of `loader` once, by cross entropy.

    Args:
        model: trained in place, on `device`.
        loader: yields (images [B, C, H, W], targets [B] int64); needs a length with `scheduler`.
        optimizer: of the parameters to train.
        device: where the batches go.
        scheduler: counted in updates; stepped with epoch·len(loader) + steps done.
        autocast_dtype: of the forward pass; None for no autocast.
        on_step: called after each update with (step, loss), steps counted from 0.
        scaler: gradient scaler, for `autocast_dtype=torch.float16`.
        epoch: counted from 0 (in errors, epochs and steps count from 1); offsets the scheduler.

    Raises:
        NonFiniteLossError: before the optimizer step, when a batch's loss is NaN or infinite; after
            the last, when a parameter is that it trains.
        TypeError: a scheduler, and a loader without a length.
        ValueError: a loader without a batch.
    """
    device = torch.device(device)
    updates_before = 0
    if scheduler is not None:
        if not isinstance(loader, Sized):
            raise TypeError("loader must have a length when a scheduler is given")
        updates_before = epoch * len(loader)

    model.train()
    loss_sum, images_seen = 0.0, 0
    step_ms: list[float] = []
    for step, (images, targets) in enumerate(loader):
        images = images.to(device, non_blocking=True)
        targets = targets.to(device, non_blocking=True)
        _synchronize(device)
        start = time.perf_counter()

        with _autocast(device, autocast_dtype):
            loss = cross_entropy(model(images), targets)
        loss_value = loss.item()
        if not math.isfinite(loss_value):
            raise NonFiniteLossError(f"loss is {loss_value} in epoch {epoch + 1}, step {step + 1}")

        optimizer.zero_grad(set_to_none=True)
        if scaler is None:
            loss.backward()
            optimizer.step()
        else:
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        if scheduler is not None:
            scheduler.step_update(updates_before + step + 1)

        _synchronize(device)
        step_ms.append((time.perf_counter() - start) * 1e3)
        loss_sum += loss_value * len(targets)
        images_seen += len(targets)
        if on_step is not None:
            on_step(step, loss_value)
    if images_seen == 0:
        raise ValueError("loader must yield at least one batch, got none")
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not torch.isfinite(parameter).all():
            raise NonFiniteLossError(f"{name} is not finite after epoch {epoch + 1}")
    return EpochResult(loss_sum / images_seen, images_seen, step_ms)


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    loader: Batches,
    *,
    device: torch.device | str,
    num_classes: int,
    autocast_dtype: torch.dtype | None = None,
) -> float:
    """Top-1 accuracy of `model` on `loader`.

    Puts the model back into the mode (training or not) it was in.

    Args:
        model: on `device`.
        loader: yields (images [B, C, H, W], targets [B] int64).
        device: where the batches go.
        num_classes: how many logits an image has.
        autocast_dtype: of the forward pass; None for no autocast.

    Returns:
        Percent of the images.

    Raises:
        NonFiniteLossError: a logit is NaN or +∞, so that the largest means nothing.
    """
    device = torch.device(device)
    accuracy = MulticlassAccuracy(num_classes, average="micro").to(device)
    was_training = model.training
    model.eval()
    try:
        for images, targets in loader:
            with _autocast(device, autocast_dtype):
                logits = model(images.to(device, non_blocking=True))
            if (logits.isnan() | logits.isposinf()).any():
                raise NonFiniteLossError("the model's logits are not finite")
            accuracy.update(logits, targets.to(device, non_blocking=True))
        return 100.0 * accuracy.compute().item()
    finally:
        model.train(was_training)


def saved_for_backward_mib(
    model: nn.Module,
    images: torch.Tensor,
    targets: torch.Tensor,
    *,
    autocast_dtype: torch.dtype | None = None,
) -> float:
    """Mebibytes that one training forward keeps for its backward.

    Counts the storages that autograd saves, each once, without those of parameters and buffers.
    Leaves the random generators, the gradients and the mode of the model as they were.

    Args:
        model: any.
        images: [B, C, H, W], on the model's device.
        targets: [B] int64, on the model's device.
        autocast_dtype: of the forward pass; None for no autocast.
    """
    device = images.device
    owned = {_storage_key(t) for t in (*model.parameters(), *model.buffers())}
    saved: dict[tuple[torch.device, int], int] = {}
    kept: list[torch.Tensor] = []  # holds the storages, so that no address is used twice

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        key = _storage_key(tensor)
        if key not in owned:
            saved[key] = tensor.untyped_storage().nbytes()
            kept.append(tensor.detach())
        # Detached: a node that saved its own output would hold itself, and never be freed.
        return tensor.detach()

    was_training = model.training
    model.train()
    try:
        with (
            torch.random.fork_rng([device] if device.type == "cuda" else []),
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
            _autocast(device, autocast_dtype),
        ):
            cross_entropy(model(images), targets)
    finally:
        model.train(was_training)
    return sum(saved.values()) / MIB


def _storage_key(tensor: torch.Tensor) -> tuple[torch.device, int]:
    return tensor.device, tensor.untyped_storage().data_ptr()


def _autocast(device: torch.device, dtype: torch.dtype | None) -> Any:
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
