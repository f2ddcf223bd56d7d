"""The training loop of the demo, the analyses and `efft-kernels train`."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from timm.scheduler import create_scheduler_v2
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy

from .rank_batches import IGNORED
from .ranks import ALONE, Ranks
from .replica import finite, share_buffers, synced_batch_norm
from .reproducible import epoch_seed, seed_everything
from .updates import PLAIN, Updates

MIB = 2**20

Batches = Iterable[tuple[torch.Tensor, torch.Tensor]]


class NonFiniteLossError(RuntimeError):
    """The training loss, a step, a trained parameter or a logit became NaN or infinite."""


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
            optimizer step, without data loading; of this process, as no other number is.
    """

    loss: float
    images: int
    step_ms: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Schedule:
    """An optimizer with a learning rate that rises linearly, then falls as a cosine.

    Once an epoch, it moves as in the EFFT and FacT releases, which call timm's `scheduler.step(e)`
    after epoch e, counted from 0: epochs 0 and 1 both run at `warmup_lr`, and every other at what
    the schedule has for the epoch before.

    Attributes:
        epochs: how many.
        lr: the peak learning rate.
        weight_decay: of the optimizer.
        warmup_epochs: epochs of the rise.
        warmup_lr: where the rise begins.
        min_lr: where the cosine ends.
        step: when the learning rate moves, after each "update" or each "epoch"; "constant" for
            never: neither rise nor fall.
        optimizer: "adamw", or "sgd" with momentum 0.9.
    """

    epochs: int
    lr: float
    weight_decay: float
    warmup_epochs: int
    warmup_lr: float
    min_lr: float = 0.0
    step: str = "update"
    optimizer: str = "adamw"

    def start(
        self, parameters: Iterable[Any], updates_per_epoch: int
    ) -> tuple[torch.optim.Optimizer, UpdateScheduler]:
        """The optimizer, and the scheduler that `train_one_epoch` steps.

        Args:
            parameters: tensors, or groups of them as torch's optimizers take them.
            updates_per_epoch: batches of the loader.
        """
        kind = (
            partial(torch.optim.SGD, momentum=0.9) if self.optimizer == "sgd" else torch.optim.AdamW
        )
        optimizer: torch.optim.Optimizer = kind(
            parameters, lr=self.lr, weight_decay=self.weight_decay
        )
        if self.step == "constant":
            return optimizer, _Constant()
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


class _Constant:
    def step_update(self, num_updates: int) -> None:
        """Leave the learning rates as they are."""


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
    ranks: Ranks = ALONE,
    updates: Updates = PLAIN,
) -> Iterator[tuple[int, EpochResult]]:
    """Train epoch by epoch; the caller measures and saves between two.

    Args:
        epochs: the epochs' numbers, counted from 0.
        seed: seeds every epoch anew, the loader's own generator too, so that an epoch does not
            depend on those before it; None leaves the generators alone. Each process draws numbers
            of its own, but the loader's generator is alike in all.
        (others): as for `train_one_epoch`.

    Yields:
        (epoch, its result) after each.

    Raises:
        NonFiniteLossError: as in `train_one_epoch`.
    """
    for epoch in epochs:
        if seed is not None:
            of_epoch = epoch_seed(seed, epoch + 1)  # 0 is the initialisation's
            seed_everything(of_epoch if ranks.first else epoch_seed(of_epoch, ranks.rank))
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
            ranks=ranks,
            updates=updates,
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
    ranks: Ranks = ALONE,
    updates: Updates = PLAIN,
) -> EpochResult:
    """Train `model` on every batch of `loader` once.

    Args:
        model: trained in place, on `device`; with several processes as `replicate` returns it.
        loader: yields (images [B, C, H, W], targets [B] int64); needs a length with `scheduler`,
            with several batches to an update and with `updates.after`, which count updates over the
            epochs. With several processes it is one of `part_of_batches`.
        optimizer: of the parameters to train.
        device: where the batches go.
        scheduler: counted in updates; stepped with those of the epochs before + those done.
        autocast_dtype: of the forward pass; None for no autocast.
        on_step: called after each batch with (step, loss), steps counted from 0.
        scaler: gradient scaler, for `autocast_dtype=torch.float16`.
        epoch: counted from 0 (in errors, epochs and steps count from 1); offsets the scheduler.
        ranks: the processes that train together. Loss and images are of all of them.
        updates: the loss, and how many batches make an update; cross entropy of each by default.

    Raises:
        NonFiniteLossError: before the optimizer step, when a batch's loss is NaN or infinite; in
            it, when it leaves float range; after the last, when a parameter is NaN or infinite.
        TypeError: a loader without a length where updates are counted.
        ValueError: a loader without a batch.
    """
    device = torch.device(device)
    batches = len(loader) if isinstance(loader, Sized) else None
    counts = scheduler is not None or updates.after is not None or updates.accumulate > 1
    if batches is None and counts:
        raise TypeError("loader must have a length when a scheduler, accumulate or after is given")
    updates_done = 0 if batches is None else epoch * updates.of_epoch(batches)

    model.train()
    loss_sum, images_seen = 0.0, 0
    step_ms: list[float] = []
    for step, (images, targets) in enumerate(loader):
        images = images.to(device, non_blocking=True)
        targets = targets.to(device, non_blocking=True)
        _synchronize(device)
        start = time.perf_counter()

        counted = (targets != IGNORED).sum()
        if updates.mix is not None:
            images, targets = updates.mix(images, targets)
        norm = synced_batch_norm(model, ranks, counts=ranks.world == 1 or bool(counted))
        with _autocast(device, autocast_dtype), norm:
            own_loss = updates.loss(model(images), targets)
        sums = ranks.sum(torch.stack([own_loss.detach().double(), counted.double()]))
        batch_loss, batch_images = sums.tolist()
        loss_value = batch_loss / batch_images
        # The gradients of all processes are averaged, and the loss is a mean over all images.
        loss = own_loss * (ranks.world / batch_images)
        if not math.isfinite(loss_value):
            raise NonFiniteLossError(f"loss is {loss_value} in epoch {epoch + 1}, step {step + 1}")

        place = step % updates.accumulate
        if place == 0:
            optimizer.zero_grad(set_to_none=True)
        if updates.accumulate > 1:
            assert batches is not None
            loss = loss / min(updates.accumulate, batches - (step - place))
        (loss if scaler is None else scaler.scale(loss)).backward()
        if place + 1 == updates.accumulate or step + 1 == batches:
            updates.clip(optimizer, scaler)
            try:
                if scaler is None:
                    optimizer.step()
                else:
                    scaler.step(optimizer)
                    scaler.update()
            except RuntimeError as error:  # of a learning rate that the parameters' dtype lacks
                if "without overflow" not in str(error):
                    raise
                at = f"epoch {epoch + 1}, step {step + 1}"
                raise NonFiniteLossError(f"the optimizer's step is not finite in {at}") from error
            updates_done += 1
            if scheduler is not None:
                scheduler.step_update(updates_done)
            if updates.after is not None:
                updates.after(updates_done)

        _synchronize(device)
        step_ms.append((time.perf_counter() - start) * 1e3)
        loss_sum += batch_loss
        images_seen += int(batch_images)
        if on_step is not None:
            on_step(step, loss_value)
    if images_seen == 0:
        raise ValueError("loader must yield at least one batch, got none")
    share_buffers(model, ranks)
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    diverged = next((name for name, parameter in named if not finite(parameter)), None)
    for name in filter(None, ranks.gather(diverged)):
        name = name.removeprefix("module.")  # DDP's
        raise NonFiniteLossError(f"{name} is not finite after epoch {epoch + 1}")
    return EpochResult(loss_sum / images_seen, images_seen, step_ms)


def evaluate(
    model: nn.Module,
    loader: Batches,
    *,
    device: torch.device | str,
    num_classes: int,
    autocast_dtype: torch.dtype | None = None,
    ranks: Ranks = ALONE,
) -> float:
    """Top-1 accuracy of `model` on `loader`.

    Puts the model back into the mode (training or not) it was in.

    Args:
        model: on `device`.
        loader: yields (images [B, C, H, W], targets [B] int64).
        device: where the batches go.
        num_classes: how many logits an image has.
        autocast_dtype: of the forward pass; None for no autocast.
        ranks: the processes, each with its part of the images (`part_of_batches`).

    Returns:
        Percent of the images of all processes.

    Raises:
        NonFiniteLossError: a logit is NaN or +∞, so that the largest means nothing.
    """
    device = torch.device(device)
    accuracy = MulticlassAccuracy(
        num_classes, average="micro", ignore_index=IGNORED, sync_on_compute=ranks.world > 1
    ).to(device)
    was_training = model.training
    model.eval()
    try:
        # What FSDP2 gathers in inference mode could not be trained afterwards.
        with torch.no_grad() if ranks.fsdp else torch.inference_mode():
            diverged = torch.zeros((), device=device)
            for images, targets in loader:
                with _autocast(device, autocast_dtype):
                    logits = model(images.to(device, non_blocking=True))
                diverged += (logits.isnan() | logits.isposinf()).any()
                if diverged and ranks.world == 1:
                    break
                accuracy.update(logits, targets.to(device, non_blocking=True))
            if ranks.sum(diverged):
                raise NonFiniteLossError("the model's logits are not finite")
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
