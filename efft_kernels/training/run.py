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
from ..methods.sharded import whole_state
from . import images, run_folder
from .averaging import Average, State, copy_state, lent
from .backbone import Notify, build_backbone, fingerprint
from .curves import draw_curves
from .loop import (
    Schedule,
    UpdateScheduler,
    evaluate,
    train_epochs,
    trained_parameters,
)
from .methods import put_on
from .rank_batches import part_of_batches
from .ranks import ALONE, Ranks
from .replica import load_optimizer_state, replicate, whole_optimizer_state
from .reproducible import deterministic, epoch_seed, seed_everything
from .settings import AMP_DTYPES, TrainSettings, require
from .updates import Updates, make_loss

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
    """A training run that is ready to go on; `history` has a row for every finished epoch.

    `replica` is what training calls in the place of `model`: with several processes, DDP's copy.
    `kept` is the adapter's state to save, where it is another than what goes on to be trained: the
    average's, or the best epoch's.
    """

    settings: TrainSettings
    output: Path
    config: run_folder.Config
    device: torch.device
    model: nn.Module
    replica: nn.Module
    adapter: Adapter
    classes: tuple[str, ...]
    train_loader: DataLoader[tuple[Tensor, Tensor]]
    val_loader: DataLoader[tuple[Tensor, Tensor]]
    optimizer: torch.optim.Optimizer
    scheduler: UpdateScheduler
    scaler: torch.amp.GradScaler | None
    updates: Updates
    average: Average | None
    ranks: Ranks = ALONE
    kept: State | None = None
    history: list[EpochRow] = field(default_factory=list)

    @property
    def best(self) -> EpochRow:
        """The first of the epochs with the highest validation accuracy."""
        return max(self.history, key=lambda row: row.val_top1_percent)

    @property
    def kept_epoch(self) -> int:
        """Whose adapter is saved."""
        return (self.best if self.settings.keep == "best" else self.history[-1]).epoch


@dataclass(frozen=True)
class TrainResult:
    """What a finished run reached, in percent of the validation images.

    Attributes:
        last_top1_percent: after the last epoch.
        best_top1_percent: of the best epoch; chosen on the very images it is measured on, so it is
            optimistic.
        best_epoch: counted from 1.
        adapter_path: file of the adapter.
        kept_epoch: whose adapter it is.
    """

    last_top1_percent: float
    best_top1_percent: float
    best_epoch: int
    adapter_path: Path
    kept_epoch: int


def prepare(
    settings: TrainSettings,
    output: Path,
    *,
    splits: images.ImageSplits | None = None,
    resume: bool = False,
    notify: Notify = lambda message: None,
    on_check: Callable[[int, int], None] | None = None,
    ranks: Ranks = ALONE,
) -> Run:
    """Check everything, build the model, and make or reopen the output folder.

    Nothing is written before all of the input has been found good.

    With several processes, each calls this and `fit` within `ranks.session`. The first alone writes
    and calls back. A batch is divided among them, so that the losses and factors are those of one
    process, up to rounding and to the random numbers of dropout, stochastic depth and augmentation.

    Args:
        settings: what to train, and how.
        output: the run's folder.
        splits: the images, where they are not to be read from the folders in settings.data.
        resume: continue the run that is there.
        notify: called with lines for the user.
        on_check: called with (images checked, all images).
        ranks: the processes that train together.

    Raises:
        ValueError: the settings, the images, the checkpoint or the folder are wrong; it names what.
        TypeError: a setting of the wrong type.
    """
    if not ranks.first:
        notify, on_check = _unheard, None
    recorded = ranks.from_first(lambda: _recorded(output, resume))
    device = ranks.device(settings.device)
    expected = f"at least 1 image for each of the {ranks.world} processes"
    require("batch_size", settings.batch_size >= ranks.world, expected, settings.batch_size)
    if recorded is not None:
        run_folder.compare_settings(recorded["settings"], settings.to_json())
    method = settings.method_config()
    fits = settings.ema is None or not ranks.fsdp
    require("ema", fits, "left out with fsdp", settings.ema)

    before = [] if recorded is None else run_folder.left_out(recorded)
    leave_out = partial(_unreadable, settings, before, notify, on_check, ranks)
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
    for name, value in ranks.from_first(lambda: identity).items():
        same = identity[name] == value
        require(name, same, "the same in every process", f"another in rank {ranks.rank}")
    adapter = put_on(model, method, targets=settings.targets, layers=settings.layers)
    parameters = adapter.num_parameters()
    model.to(device)

    run = _assemble(settings, output, splits, device, model, adapter, ranks)
    run.config = {
        "settings": settings.to_json(),
        "identity": identity,
        "method": method.to_config(),
        "factor_parameters": parameters,
        "images": {"train": len(splits.train), "val": len(splits.val)},
        "processes": ranks.world,
        "versions": run_folder.library_versions(),
    }
    if recorded is None:
        if resume:
            notify(f"{output}: nothing to resume yet, starting with epoch 1")
        ranks.from_first(lambda: run_folder.write_config(output, run.config))
    else:
        run_folder.compare_identity(recorded["identity"], identity)
        if recorded["versions"] != run.config["versions"]:
            notify("other library versions than when the run began: its bits may differ")
        if (began_with := recorded.get("processes", 1)) != ranks.world:
            notify(f"the run began with {began_with} processes: its bits may differ")
        run.config = recorded
        ranks.from_first(lambda: run_folder.remove_leftovers(output))
        _restore(run)
        notify(f"{output}: resuming after epoch {len(run.history)} of {settings.epochs}")
    return run


def _unheard(message: str) -> None:
    pass


def _recorded(output: Path, resume: bool) -> run_folder.Config | None:
    run_folder.check_output(output, resume=resume)
    return run_folder.read_config(output) if resume else None


def _unreadable(
    settings: TrainSettings,
    before: Collection[str],
    notify: Notify,
    on_check: Callable[[int, int], None] | None,
    ranks: Ranks,
    samples: Sequence[images.Sample],
) -> set[str]:
    """The paths to leave out: those that a resumed run left out `before`, and the unreadable."""
    gone = {str(settings.data / name) for name in before} & {path for path, _ in samples}
    checked = [sample for sample in samples if sample[0] not in gone]
    own = checked[ranks.rank :: ranks.world]
    found = images.find_unreadable(own, workers=settings.workers, on_check=on_check)
    reasons = {path: reason for part in ranks.gather(found) for path, reason in part.items()}
    unreadable = {path: reasons[path] for path, _ in checked if path in reasons}
    images.refuse_or_report(unreadable, skip=settings.skip_bad_images, notify=notify)
    return gone | set(unreadable)


def _assemble(
    settings: TrainSettings,
    output: Path,
    splits: images.ImageSplits,
    device: torch.device,
    model: nn.Module,
    adapter: Adapter,
    ranks: Ranks,
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
    val_loader = images.make_loader(splits.val, val_transform, shuffle=False, **loading)
    schedule = Schedule(
        epochs=settings.epochs,
        lr=settings.lr,
        weight_decay=settings.weight_decay,
        warmup_epochs=settings.resolved_warmup_epochs,
        warmup_lr=min(WARMUP_LR, settings.lr, settings.lr * settings.backbone_lr_factor),
        min_lr=settings.min_lr,
        step=settings.schedule,
        optimizer=settings.optimizer,
    )
    replica = replicate(model, ranks)  # FSDP2 changes the parameters
    loss, mix = make_loss(
        len(splits.classes),
        mixup=settings.mixup,
        cutmix=settings.cutmix,
        label_smoothing=settings.label_smoothing,
    )
    average = None if settings.ema is None else Average(model, settings.ema)
    updates = Updates(
        loss,
        mix,
        settings.accumulate,
        settings.clip_grad,
        after=None if average is None else average.update,
    )
    optimizer, scheduler = schedule.start(
        _groups(model, settings), updates.of_epoch(len(train_loader))
    )
    return Run(
        settings=settings,
        output=output,
        config={},
        device=device,
        model=model,
        replica=replica,
        adapter=adapter,
        classes=splits.classes,
        train_loader=part_of_batches(train_loader, ranks),
        val_loader=part_of_batches(val_loader, ranks),
        optimizer=optimizer,
        scheduler=scheduler,
        scaler=torch.amp.GradScaler(device.type) if settings.amp == "float16" else None,
        updates=updates,
        average=average,
        ranks=ranks,
    )


def _groups(model: nn.Module, settings: TrainSettings) -> list[Any]:
    """What trains, in two groups where all but the head has a learning rate of its own."""
    trained: list[Any] = trained_parameters(model)
    if settings.backbone_lr_factor == 1:
        return trained
    heads = [model.get_submodule(path) for path in resolve_modules_to_train(model, "head")]
    of_head = {id(parameter) for head in heads for parameter in head.parameters()}
    rest = [parameter for parameter in trained if id(parameter) not in of_head]
    groups: list[dict[str, Any]] = [
        {"params": rest, "lr": settings.lr * settings.backbone_lr_factor},
        {"params": [parameter for parameter in trained if id(parameter) in of_head]},
    ]
    return [group for group in groups if group["params"]]


def fit(
    run: Run,
    *,
    on_step: Callable[[int, int], None] | None = None,
    on_epoch: Callable[[EpochRow], None] | None = None,
) -> TrainResult:
    """Train the epochs that are left, saving after each.

    Args:
        run: from `prepare`; with several processes, the first of them calls back.
        on_step: called with (batches done, batches of the epoch).
        on_epoch: called after an epoch is saved.

    Raises:
        NonFiniteLossError: the loss, a trained parameter or a logit of a validation image is NaN or
            infinite; the folder then holds the epoch before.
    """
    # On CUDA, prefer deterministic kernels, so that a resumed run can repeat the bits; those of
    # the CPU do so anyway.
    if not run.ranks.first:
        on_step = on_epoch = None
    on_cuda = run.device.type == "cuda"
    with deterministic(run.device, warn_only=True) if on_cuda else nullcontext():
        for row in _rows(run, on_step):
            _save(run)
            if on_epoch is not None:
                on_epoch(row)
    if run.ranks.first:
        draw_curves(run.history, run.kept_epoch, run.output / run_folder.CURVES)
    return TrainResult(
        run.history[-1].val_top1_percent,
        run.best.val_top1_percent,
        run.best.epoch,
        run.output / run_folder.ADAPTER,
        run.kept_epoch,
    )


def _rows(run: Run, on_step: Callable[[int, int], None] | None) -> Iterator[EpochRow]:
    """Train and validate the epochs that are left, one by one."""
    autocast_dtype = AMP_DTYPES[run.settings.amp]
    steps = len(run.train_loader)
    trained = train_epochs(
        run.replica,
        run.train_loader,
        run.optimizer,
        range(len(run.history), run.settings.epochs),
        device=run.device,
        scheduler=run.scheduler,
        seed=run.settings.seed,
        autocast_dtype=autocast_dtype,
        scaler=run.scaler,
        on_step=None if on_step is None else lambda step, loss: on_step(step + 1, steps),
        ranks=run.ranks,
        updates=run.updates,
    )
    start = time.perf_counter()
    for epoch, result in trained:
        with nullcontext() if run.average is None else run.average.in_place():
            top1_percent = evaluate(
                run.model,
                run.val_loader,
                device=run.device,
                num_classes=len(run.classes),
                autocast_dtype=autocast_dtype,
                ranks=run.ranks,
            )
            lr, seconds = run.optimizer.param_groups[0]["lr"], time.perf_counter() - start
            run.history.append(EpochRow(epoch + 1, result.loss, top1_percent, lr, seconds))
            _keep(run)
        yield run.history[-1]
        start = time.perf_counter()


def _keep(run: Run) -> None:
    """Hold on to the state that was validated, if it is the one to save and will not stay."""
    if run.kept_epoch == len(run.history):
        stays = run.average is None and run.settings.keep == "last"
        run.kept = None if stays else copy_state(run.adapter)


def _save(run: Run) -> None:
    state = {
        "trained": whole_state(run.adapter.state_dict()),
        "kept": run.kept,
        "average": None if run.average is None else run.average.state_dict(),
        "optimizer": whole_optimizer_state(run.optimizer),
        "scaler": None if run.scaler is None else run.scaler.state_dict(),
        "history": [dataclasses.asdict(row) for row in run.history],
    }
    run.ranks.from_first(lambda: run_folder.save_state(run.output, state))
    _write_products(run)


def _restore(run: Run) -> None:
    cpu = torch.device("cpu")  # each process puts it on its own device
    state = run.ranks.from_first(lambda: run_folder.read_state(run.output, cpu))
    if state is None:
        return
    try:
        run.adapter.load_state_dict(state["trained"])
        load_optimizer_state(run.optimizer, state["optimizer"])
        if run.scaler is not None:
            run.scaler.load_state_dict(state["scaler"])
        if run.average is not None:
            run.average.load_state_dict(state["average"])
        run.kept = state.get("kept")
        run.history = [EpochRow(**row) for row in state["history"]]
    except Exception as error:  # torch's optimizers trip over whatever another state holds
        raise run_folder.damaged_state(run.output, error) from error
    _write_products(run)


def _write_products(run: Run) -> None:
    """Write what is derived from the state: the adapter and the table of epochs."""
    if run.ranks.first:
        _write_first(run)
    elif run.ranks.fsdp:
        with lent(run.adapter, run.kept):
            whole_state(run.adapter.state_dict())  # what the first gathers to save it
    run.ranks.from_first(lambda: None)


def _write_first(run: Run) -> None:
    header = {run_folder.HEADER_KEY: json.dumps(run.config)}
    with lent(run.adapter, run.kept):
        run.adapter.save(run.output / run_folder.ADAPTER, metadata=header)
    with (
        replacing(run.output / run_folder.METRICS) as path,
        path.open("w", newline="") as file,
    ):
        writer = csv.DictWriter(file, [item.name for item in dataclasses.fields(EpochRow)])
        writer.writeheader()
        writer.writerows(dataclasses.asdict(row) for row in run.history)
