"""Resumable training.

Whatever is random in an epoch is derived from (seed, epoch), and all that an epoch changes is in
one file, replaced when the epoch ends. So a run that was stopped at any moment and resumed ends in
the same bits as one that was left alone.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..adapters.adapter import Adapter
from ..adapters.attach import resolve_modules_to_train
from ..atomic_files import replacing
from . import images, run_folder
from .backbone import Notify, build_backbone, fingerprint
from .loop import (
    Schedule,
    UpdateScheduler,
    evaluate,
    train_epochs,
    trained_parameters,
)
from .methods import put_on
from .reproducible import deterministic, epoch_seed, seed_everything
from .settings import AMP_DTYPES, TrainSettings, require, resolve_device

WARMUP_LR = 1e-6


@dataclass(frozen=True)
class EpochRow:
    """One line of metrics.csv.

    Attributes:
        epoch: counted from 1.
        train_loss: mean over the images.
        val_top1_percent: of the validation images.
        lr: learning rate after the last update.
        seconds: of training and validating.
    """

    epoch: int
    train_loss: float
    val_top1_percent: float
    lr: float
    seconds: float


@dataclass
class Run:
    """A training run that is ready to go on; `history` has a row for every finished epoch."""

    settings: TrainSettings
    output: Path
    config: run_folder.Config
    device: torch.device
    model: nn.Module
    adapter: Adapter
    classes: tuple[str, ...]
    train_loader: DataLoader[tuple[Tensor, Tensor]]
    val_loader: DataLoader[tuple[Tensor, Tensor]]
    optimizer: torch.optim.Optimizer
    scheduler: UpdateScheduler
    scaler: torch.amp.GradScaler | None
    history: list[EpochRow] = field(default_factory=list)


@dataclass(frozen=True)
class TrainResult:
    """What a finished run reached, in percent of the validation images.

    Attributes:
        last_top1_percent: after the last epoch.
        best_top1_percent: of the best epoch; chosen on the very images it is measured on, so it is
            optimistic.
        best_epoch: counted from 1.
        adapter_path: file of the last epoch's adapter.
    """

    last_top1_percent: float
    best_top1_percent: float
    best_epoch: int
    adapter_path: Path


def prepare(
    settings: TrainSettings,
    output: Path,
    *,
    splits: images.ImageSplits | None = None,
    resume: bool = False,
    notify: Notify = lambda message: None,
    on_check: Callable[[int, int], None] | None = None,
) -> Run:
    """Check everything, build the model, and make or reopen the output folder.

    Nothing is written before all of the input has been found good.

    Args:
        settings: what to train, and how.
        output: the run's folder.
        splits: the images, where they are not to be read from the folders in settings.data.
        resume: continue the run that is there.
        notify: called with lines for the user.
        on_check: called with (images checked, all images).

    Raises:
        ValueError: the settings, the images, the checkpoint or the folder are wrong; it names what.
        TypeError: a setting of the wrong type.
    """
    run_folder.check_output(output, resume=resume)
    device = resolve_device(settings.device)
    recorded = run_folder.read_config(output) if resume else None
    if recorded is not None:
        run_folder.compare_settings(recorded["settings"], settings.to_json())
    method = settings.method_config()

    before = [] if recorded is None else run_folder.left_out(recorded)
    leave_out = partial(_unreadable, settings, before, notify, on_check)
    if splits is not None:
        splits = splits.leaving_out(leave_out([*splits.train, *splits.val]))
    else:
        splits = images.open_splits(
            settings.data,
            val_split=settings.val_split,
            seed=settings.seed,
            leave_out=leave_out,
            notify=notify,
        )
    if settings.drop_last:
        fits = settings.batch_size <= len(splits.train)
        expected = f"at most the {len(splits.train)} images to train, with drop_last"
        require("batch_size", fits, expected, settings.batch_size)

    seed_everything(epoch_seed(settings.seed, 0))
    model = build_backbone(
        settings.model,
        num_classes=len(splits.classes),
        checkpoint=settings.checkpoint,
        pretrained=settings.pretrained,
        img_size=settings.img_size,
        drop_path=settings.drop_path,
        notify=notify,
    )
    identity = {
        "classes": list(splits.classes),
        "data": splits.fingerprint(),
        "skipped_images": list(splits.left_out),
        "backbone": fingerprint(model, resolve_modules_to_train(model, "head")),
    }
    adapter = put_on(model, method, targets=settings.targets, layers=settings.layers)
    model.to(device)

    run = _assemble(settings, output, splits, device, model, adapter)
    run.config = {
        "settings": settings.to_json(),
        "identity": identity,
        "method": method.to_config(),
        "factor_parameters": adapter.num_parameters(),
        "images": {"train": len(splits.train), "val": len(splits.val)},
        "versions": run_folder.library_versions(),
    }
    if recorded is None:
        if resume:
            notify(f"{output}: nothing to resume yet, starting with epoch 1")
        run_folder.write_config(output, run.config)
    else:
        run_folder.compare_identity(recorded["identity"], identity)
        if recorded["versions"] != run.config["versions"]:
            notify("other library versions than when the run began: its bits may differ")
        run.config = recorded
        run_folder.remove_leftovers(output)
        _restore(run)
        notify(f"{output}: resuming after epoch {len(run.history)} of {settings.epochs}")
    return run


def _unreadable(
    settings: TrainSettings,
    before: Collection[str],
    notify: Notify,
    on_check: Callable[[int, int], None] | None,
    samples: Sequence[images.Sample],
) -> set[str]:
    """The paths to leave out: those that a resumed run left out `before`, and the unreadable."""
    gone = {str(settings.data / name) for name in before} & {path for path, _ in samples}
    checked = [sample for sample in samples if sample[0] not in gone]
    unreadable = images.find_unreadable(checked, workers=settings.workers, on_check=on_check)
    images.refuse_or_report(unreadable, skip=settings.skip_bad_images, notify=notify)
    return gone | set(unreadable)


def _assemble(
    settings: TrainSettings,
    output: Path,
    splits: images.ImageSplits,
    device: torch.device,
    model: nn.Module,
    adapter: Adapter,
) -> Run:
    train_transform, val_transform = images.make_transforms(
        model,
        img_size=settings.img_size,
        augment=settings.augment,
        normalize=settings.normalize,
    )
    loading: dict[str, Any] = {
        "batch_size": settings.batch_size,
        "workers": settings.workers,
        "pin_memory": device.type == "cuda",
    }
    train_loader = images.make_loader(
        splits.train, train_transform, shuffle=True, drop_last=settings.drop_last, **loading
    )
    schedule = Schedule(
        epochs=settings.epochs,
        lr=settings.lr,
        weight_decay=settings.weight_decay,
        warmup_epochs=settings.resolved_warmup_epochs,
        warmup_lr=min(WARMUP_LR, settings.lr),
        min_lr=settings.min_lr,
        step=settings.schedule,
    )
    optimizer, scheduler = schedule.start(trained_parameters(model), len(train_loader))
    return Run(
        settings=settings,
        output=output,
        config={},
        device=device,
        model=model,
        adapter=adapter,
        classes=splits.classes,
        train_loader=train_loader,
        val_loader=images.make_loader(splits.val, val_transform, shuffle=False, **loading),
        optimizer=optimizer,
        scheduler=scheduler,
        scaler=torch.amp.GradScaler(device.type) if settings.amp == "float16" else None,
    )


def fit(
    run: Run,
    *,
    on_step: Callable[[int, int], None] | None = None,
    on_epoch: Callable[[EpochRow], None] | None = None,
) -> TrainResult:
    """Train the epochs that are left, saving after each.

    Args:
        run: from `prepare`.
        on_step: called with (updates done, updates of the epoch).
        on_epoch: called after an epoch is saved.

    Raises:
        NonFiniteLossError: the loss, a trained parameter or a logit of a validation image is NaN or
            infinite; the folder then holds the epoch before.
    """
    # On CUDA, prefer deterministic kernels, so that a resumed run can repeat the bits; those of
    # the CPU do so anyway.
    on_cuda = run.device.type == "cuda"
    with deterministic(run.device, warn_only=True) if on_cuda else nullcontext():
        for row in _rows(run, on_step):
            run.history.append(row)
            _save(run)
            if on_epoch is not None:
                on_epoch(row)
    best = max(run.history, key=lambda row: row.val_top1_percent)
    return TrainResult(
        run.history[-1].val_top1_percent,
        best.val_top1_percent,
        best.epoch,
        run.output / run_folder.ADAPTER,
    )


def _rows(run: Run, on_step: Callable[[int, int], None] | None) -> Iterator[EpochRow]:
    """Train and validate the epochs that are left, one by one."""
    autocast_dtype = AMP_DTYPES[run.settings.amp]
    steps = len(run.train_loader)
    trained = train_epochs(
        run.model,
        run.train_loader,
        run.optimizer,
        range(len(run.history), run.settings.epochs),
        device=run.device,
        scheduler=run.scheduler,
        seed=run.settings.seed,
        autocast_dtype=autocast_dtype,
        scaler=run.scaler,
        on_step=None if on_step is None else lambda step, loss: on_step(step + 1, steps),
    )
    start = time.perf_counter()
    for epoch, result in trained:
        top1_percent = evaluate(
            run.model,
            run.val_loader,
            device=run.device,
            num_classes=len(run.classes),
            autocast_dtype=autocast_dtype,
        )
        lr = run.optimizer.param_groups[0]["lr"]
        yield EpochRow(epoch + 1, result.loss, top1_percent, lr, time.perf_counter() - start)
        start = time.perf_counter()


def _save(run: Run) -> None:
    state = {
        "trained": run.adapter.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "scaler": None if run.scaler is None else run.scaler.state_dict(),
        "history": [dataclasses.asdict(row) for row in run.history],
    }
    run_folder.save_state(run.output, state)
    _write_products(run)


def _restore(run: Run) -> None:
    state = run_folder.read_state(run.output, run.device)
    if state is None:
        return
    try:
        run.adapter.load_state_dict(state["trained"])
        run.optimizer.load_state_dict(state["optimizer"])
        if run.scaler is not None:
            run.scaler.load_state_dict(state["scaler"])
        run.history = [EpochRow(**row) for row in state["history"]]
    except Exception as error:  # torch's optimizers trip over whatever another state holds
        raise run_folder.damaged_state(run.output, error) from error
    _write_products(run)


def _write_products(run: Run) -> None:
    """Write what is derived from the state: the adapter and the table of epochs."""
    header = {run_folder.HEADER_KEY: json.dumps(run.config)}
    run.adapter.save(run.output / run_folder.ADAPTER, metadata=header)
    with (
        replacing(run.output / run_folder.METRICS) as path,
        path.open("w", newline="") as file,
    ):
        writer = csv.DictWriter(file, [item.name for item in dataclasses.fields(EpochRow)])
        writer.writeheader()
        writer.writerows(dataclasses.asdict(row) for row in run.history)
