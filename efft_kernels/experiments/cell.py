"""One cell of a benchmark: a task, a method and a seed, trained and measured.

Three numbers come of it, each by its name:

last          top-1 on the test images after the last epoch of training on all training images.
val_chosen    the same after the epoch that was best on the validation images, when the images for
              selection alone were trained on: VTAB's own protocol, choose and then retrain.
best_on_test  the best of the epochs that were tested. Chosen on the very images it is measured on,
              so it is optimistic; EFFT's and FacT's releases report it, of every tenth epoch.

A cell may be for choosing alone: it is trained on the images for selection and measured on the
validation images, and never sees the test images.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import use_backend
from ..training.images import ImageSplits
from ..training.loop import NonFiniteLossError, evaluate, train_epochs
from ..training.reproducible import deterministic
from ..training.run import prepare
from ..training.run_folder import library_versions
from ..training.settings import AMP_DTYPES, TrainSettings
from .lists import SELECT_TRAIN, SELECT_VAL, TEST, TRAIN, ImageLists

LAST, VAL_CHOSEN, BEST_ON_TEST = "last", "val_chosen", "best_on_test"
PROTOCOLS = {
    LAST: "after the last epoch",
    VAL_CHOSEN: "after the epoch that was best on val200, retrained on all training images",
    BEST_ON_TEST: "best tested epoch, chosen on the test images: optimistic",
}

# Where things lie and what runs them: without effect on the result but for rounding. A result names
# the images that were skipped.
FREE = ("data", "checkpoint", "workers", "device", "skip_bad_images")

# Settings that older ledgers do not have, and what they did: with these a cell has the key it had.
_BEFORE = {"optimizer": "adamw", "backbone_lr_factor": 1.0}

Notify = Callable[[str], None]


@dataclass(frozen=True)
class Cell:
    """One training of a benchmark.

    Attributes:
        suite: "vtab" or "fewshot".
        task: its name.
        settings: of the training; `data` is the task's folder.
        lists: the images.
        checkpoint_sha256: of the backbone's weights file; None without one.
        test_every: epochs between two measurements on the test images.
        shots: images a class, in a few-shot cell.
        choosing: whether it is for choosing alone.
        label: what sets it apart from its neighbours, for people: "rank 8, scale 0.1".
    """

    suite: str
    task: str
    settings: TrainSettings
    lists: ImageLists
    checkpoint_sha256: str | None = None
    test_every: int = 10
    shots: int | None = None
    choosing: bool = False
    label: str = field(default="", compare=False)

    @property
    def name(self) -> str:
        """For a folder: "cifar-efft2-seed42"."""
        shots = "" if self.shots is None else f"-{self.shots}shot"
        return f"{self.task}{shots}-{self.settings.method}-seed{self.settings.seed}"

    @property
    def title(self) -> str:
        """For people: "cifar-efft2-seed42 (rank 8, scale 0.1)"."""
        about = [self.label] if self.label else []
        about += ["to choose"] if self.choosing else []
        return f"{self.name} ({', '.join(about)})" if about else self.name

    def identity(self) -> dict[str, Any]:
        """All that decides the result."""
        settings = self.settings.to_json()
        if self.checkpoint_sha256 is not None:
            settings["pretrained"] = None  # of no effect
        identity = {
            "suite": self.suite,
            "task": self.task,
            "shots": self.shots,
            "settings": {
                name: value
                for name, value in settings.items()
                if name not in FREE and (name not in _BEFORE or value != _BEFORE[name])
            },
            "images": self.lists.digest,
            "checkpoint": self.checkpoint_sha256,
            "test_every": self.test_every,
        }
        if self.choosing:
            identity |= {"choosing": True, "test_every": None}
        return identity


@dataclass(frozen=True)
class _Curve:
    """What one training left: epoch, counted from 1 → percent, and what it was trained with."""

    top1_percent: Mapping[int, float]
    about: Mapping[str, Any]

    def best(self) -> int:
        """The earliest of the best epochs."""
        return max(self.top1_percent, key=lambda epoch: (self.top1_percent[epoch], -epoch))


def run_cell(
    cell: Cell,
    *,
    notify: Notify = lambda message: None,
    on_epoch: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Train and measure a cell; one that is for choosing may diverge, which is a result too.

    Args:
        cell: what to run.
        notify: called with lines for the user.
        on_epoch: called with (epochs done, epochs of the cell).

    Returns:
        The three numbers and how they came about, in JSON's own types.

    Raises:
        ValueError: the images, the model or the settings do not fit; it names what.
        NonFiniteLossError: the training diverged.
    """
    if cell.choosing:
        return _choosing_result(cell, notify, on_epoch)
    start = time.perf_counter()
    settings, lists = cell.settings, cell.lists
    epochs = settings.epochs
    selects = SELECT_VAL in lists.lists
    total = epochs * (2 if selects else 1)
    measured: dict[str, dict[str, Any]] = {}
    wanted = {epoch for epoch in range(1, epochs + 1) if epoch % cell.test_every == 0} | {epochs}
    chosen = None
    with use_backend(settings.backend):
        if selects:
            selection = _train(
                settings,
                lists.splits(SELECT_TRAIN, SELECT_VAL),
                lambda epoch: True,
                notify,
                lambda done: on_epoch(done, total),
            )
            chosen = selection.best()
        final = _train(
            settings,
            lists.splits(TRAIN, TEST),
            lambda epoch: epoch in wanted or epoch == chosen,
            notify,
            lambda done: on_epoch(done + total - epochs, total),
        )
    tested = {epoch: top1 for epoch, top1 in final.top1_percent.items() if epoch in wanted}
    best = _Curve(tested, {}).best()
    measured[LAST] = {"top1_percent": final.top1_percent[epochs], "epoch": epochs}
    if chosen is not None:
        measured[VAL_CHOSEN] = {"top1_percent": final.top1_percent[chosen], "epoch": chosen}
    measured[BEST_ON_TEST] = {"top1_percent": tested[best], "epoch": best, "optimistic": True}
    return {
        "results": {
            name: {"protocol": PROTOCOLS[name], **values} for name, values in measured.items()
        },
        **final.about,
        "notes": list(lists.notes),
        "test_top1_percent": {str(epoch): top1 for epoch, top1 in final.top1_percent.items()},
        "val_top1_percent": None if chosen is None else list(selection.top1_percent.values()),
        "versions": library_versions(),
        "seconds": time.perf_counter() - start,
    }


def _choosing_result(
    cell: Cell, notify: Notify, on_epoch: Callable[[int, int], None]
) -> dict[str, Any]:
    start = time.perf_counter()
    settings = cell.settings
    found: dict[str, Any] = {"results": {}, "notes": list(cell.lists.notes)}
    try:
        with use_backend(settings.backend):
            curve = _train(
                settings,
                cell.lists.splits(SELECT_TRAIN, SELECT_VAL),
                lambda epoch: True,
                notify,
                lambda done: on_epoch(done, settings.epochs),
            )
        found |= curve.about
        found["val_top1_percent"] = list(curve.top1_percent.values())
    except NonFiniteLossError as error:
        found |= {"diverged": str(error), "val_top1_percent": None}
        found |= {"parameters": None, "skipped_images": []}
    return {**found, "versions": library_versions(), "seconds": time.perf_counter() - start}


def _train(
    settings: TrainSettings,
    splits: ImageSplits,
    measures: Callable[[int], bool],
    notify: Notify,
    on_epoch: Callable[[int], None],
) -> _Curve:
    """Train on one list and measure on another, after the epochs for which `measures` is true."""
    with tempfile.TemporaryDirectory(prefix="efft-kernels-") as folder:
        run = prepare(settings, Path(folder) / "run", splits=splits, notify=notify)
    autocast_dtype = AMP_DTYPES[settings.amp]
    on_cuda = run.device.type == "cuda"
    curve: dict[int, float] = {}
    with deterministic(run.device, warn_only=True) if on_cuda else nullcontext():
        for epoch, _ in train_epochs(
            run.model,
            run.train_loader,
            run.optimizer,
            range(settings.epochs),
            device=run.device,
            scheduler=run.scheduler,
            seed=settings.seed,
            autocast_dtype=autocast_dtype,
            scaler=run.scaler,
        ):
            if measures(epoch + 1):
                curve[epoch + 1] = evaluate(
                    run.model,
                    run.val_loader,
                    device=run.device,
                    num_classes=len(run.classes),
                    autocast_dtype=autocast_dtype,
                )
            on_epoch(epoch + 1)
    trained = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    parameters = run.adapter.num_parameters()
    about = {
        "method": run.config["method"],
        "parameters": parameters,
        "head_parameters": trained - parameters,
        "images": run.config["images"],
        "skipped_images": run.config["identity"]["skipped_images"],
        "backbone": run.config["identity"]["backbone"],
    }
    return _Curve(curve, about)
