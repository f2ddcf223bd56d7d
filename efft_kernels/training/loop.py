"""The plain training loop that the demo and `efft-kernels train` share."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sized
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from timm.utils import random_seed
from torch import nn
from torch.nn.functional import cross_entropy
from torchmetrics.classification import MulticlassAccuracy

MIB = 2**20

Batches = Iterable[tuple[torch.Tensor, torch.Tensor]]


class NonFiniteLossError(RuntimeError):
    """The training loss (or a trained parameter) became NaN or infinite."""


class UpdateScheduler(Protocol):
    """What the loop needs of a timm scheduler made with `step_on_epochs=False`."""

    def step_update(self, num_updates: int) -> None: ...


@dataclass(frozen=True)
class EpochResult:
    """What one training epoch did.

    loss: mean over the images. images: how many were seen. step_ms: milliseconds of each update,
    from the batch lying on the device to the finished optimizer step, without data loading.
    """

    loss: float
    images: int
    step_ms: list[float] = field(default_factory=list)


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and torch's generators (all devices)."""
    random_seed(seed)


def train_one_epoch(
    model: nn.Module,
    loader: Batches,
    optimizer: torch.optim.Optimizer,
    *,
    device: torch.device | str,
    criterion: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
    scheduler: UpdateScheduler | None = None,
    autocast_dtype: torch.dtype | None = None,
    clip_grad: float | None = None,
    on_step: Callable[[int, float], None] | None = None,
    scaler: torch.amp.GradScaler | None = None,
    epoch: int = 0,
) -> EpochResult:
    """Train `model` on every batch of `loader` once.

    loader        yields (images [B, C, H, W], targets [B] int64); needs a length with `scheduler`
    criterion     (logits, targets) -> mean loss over the batch; default cross entropy
    scheduler     a timm scheduler counted in updates; stepped with epoch·len(loader) + steps done
    clip_grad     largest norm of all gradients together
    on_step       called after each update with (step, loss), steps counted from 0
    scaler        gradient scaler, for `autocast_dtype=torch.float16`
    epoch         counted from 0 (in errors, epochs and steps count from 1); offsets the scheduler

    Raises NonFiniteLossError before the optimizer step when a batch's loss is NaN or infinite.
    """
    device = torch.device(device)
    criterion = criterion or cross_entropy
    updates_before = 0
    if scheduler is not None:
        if not isinstance(loader, Sized):
            raise TypeError("loader must have a length when a scheduler is given")
        updates_before = epoch * len(loader)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    model.train()
    loss_sum, images_seen = 0.0, 0
    step_ms: list[float] = []
    for step, (images, targets) in enumerate(loader):
        images = images.to(device, non_blocking=True)
        targets = targets.to(device, non_blocking=True)
        _synchronize(device)
        start = time.perf_counter()

        with _autocast(device, autocast_dtype):
            loss = criterion(model(images), targets)
        loss_value = loss.item()
        if not math.isfinite(loss_value):
            raise NonFiniteLossError(f"loss is {loss_value} in epoch {epoch + 1}, step {step + 1}")

        optimizer.zero_grad(set_to_none=True)
        if scaler is None:
            loss.backward()
        else:
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
        if clip_grad is not None:
            nn.utils.clip_grad_norm_(parameters, clip_grad)
        if scaler is None:
            optimizer.step()
        else:
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
    """Top-1 accuracy of `model` on `loader`, in percent of the images.

    loader  yields (images [B, C, H, W], targets [B] int64)

    Puts the model back into the mode (training or not) it was in.
    """
    device = torch.device(device)
    accuracy = MulticlassAccuracy(num_classes, average="micro").to(device)
    was_training = model.training
    model.eval()
    try:
        for images, targets in loader:
            with _autocast(device, autocast_dtype):
                logits = model(images.to(device, non_blocking=True))
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

    images [B, C, H, W], targets [B] int64, on the model's device. Counts the storages that autograd
    saves, each once, without those of parameters and buffers. Leaves the random generators, the
    gradients and the mode of the model as they were.
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
