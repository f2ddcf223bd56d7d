"""What the demo found: the table, the report's file and the lines on the terminal."""

from __future__ import annotations

import json
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..atomic_files import replacing, write_text
from ..training import digits
from .picture import Point, draw
from .recipes import RECIPES, THREADS, Settings

SOURCE_TOP1_NEEDED = 95.0

# What the columns mean, for readers of the report.
COLUMNS = {
    "trainable_params": "without the head, which every method trains; full: the whole backbone",
    "top1_mean": "percent of the test images, mean over the seeds",
    "top1_std": "sample standard deviation over the seeds, 0 for a single one",
    "step_ms_p50": "median milliseconds of a training step, the methods taking turns",
    "saved_mib": "MiB that autograd keeps for the backward of one such step, parameters left out",
}


@dataclass(frozen=True)
class Row:
    """One method's line of the table; `COLUMNS` says what the numbers are."""

    method: str
    trainable_params: int
    top1_mean: float
    top1_std: float
    step_ms_p50: float
    saved_mib: float


@dataclass(frozen=True)
class Result:
    """All that a run of the demo found.

    Attributes:
        settings: how long it trained and measured.
        quick: whether it was only to see that everything works.
        source_top1: percent of the held-out images of the digits 0 to 4.
        top1: method → percent of the test images, one number per seed.
        trainable_params: method → parameters trained, without the head.
        head_params: parameters of the head.
        step_ms: method → median milliseconds of a training step.
        saved_mib: method → MiB kept for the backward of one step.
        reload: of `reload_and_merge`.
    """

    settings: Settings
    quick: bool
    source_top1: float
    top1: Mapping[str, Sequence[float]]
    trainable_params: Mapping[str, int]
    head_params: int
    step_ms: Mapping[str, float]
    saved_mib: Mapping[str, float]
    reload: Mapping[str, Any]

    @property
    def seeds(self) -> int:
        """How many there were."""
        return len(next(iter(self.top1.values())))

    def rows(self) -> list[Row]:
        """One per method."""
        return [
            Row(
                method=name,
                trainable_params=self.trainable_params[name],
                top1_mean=statistics.fmean(top1),
                top1_std=statistics.stdev(top1) if len(top1) > 1 else 0.0,
                step_ms_p50=self.step_ms[name],
                saved_mib=self.saved_mib[name],
            )
            for name, top1 in self.top1.items()
        ]


def write(result: Result, output: Path) -> None:
    """Write report.json and accuracy.png into the folder `output`."""
    rows = result.rows()
    report = {
        "rows": [asdict(row) for row in rows],
        "columns": COLUMNS,
        "head_params": result.head_params,
        "source_top1": result.source_top1,
        "top1_per_seed": result.top1,
        "reload": result.reload,
        "quick": result.quick,
        "seeds": list(range(result.seeds)),
        "settings": {
            **asdict(result.settings),
            "weight_decay": digits.WEIGHT_DECAY,
            "source_lr": digits.SOURCE_LR,
            "source_batch_size": digits.SOURCE_BATCH_SIZE,
        },
        "recipes": {
            name: {
                "lr": recipe.lr,
                "method": recipe.method.to_config() if recipe.method else None,
            }
            for name, recipe in RECIPES.items()
        },
        "train_images": _train_images(),
        "test_images": result.reload["images"],
        "threads": THREADS,
        "machine": platform.machine(),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("efft-kernels", "torch", "timm", "scikit-learn")},
        },
    }
    write_text(output / "report.json", json.dumps(report, indent=2) + "\n")
    points = [
        Point(
            row.method,
            row.trainable_params + result.head_params,
            row.top1_mean,
            row.top1_std,
            result.top1[row.method],
        )
        for row in rows
    ]
    title = (
        f"Digits 5 to 9 from {digits.TRAIN_PER_CLASS} images a class,"
        f" {_seeds(result.seeds)} (mean ± std)"
    )
    with replacing(output / "accuracy.png") as path:
        draw(points, title, path)


def show(result: Result, output: Path, console: Console) -> None:
    """Print the table and what is around it."""
    reload = result.reload
    table = Table(
        title=(f"digits 5 to 9: {_train_images()} training images, {reload['images']} test images"),
        caption=(
            f"Trainable parameters are without the head ({result.head_params} for every method)."
            f" top-1: mean ± standard deviation over {_seeds(result.seeds)}."
            f" ms per step: median of {result.settings.timing_rounds} steps of"
            f" {result.settings.batch_size} images, the methods taking turns on {THREADS} CPU"
            " thread; it varies from run to run."
            " Activations: what autograd keeps for the backward of one such step, at most."
        ),
    )
    table.add_column("method")
    for heading in ("trainable parameters", "top-1 %", "ms per step", "activations, MiB"):
        table.add_column(heading, justify="right")
    for row in result.rows():
        table.add_row(
            row.method,
            f"{row.trainable_params:,}",
            f"{row.top1_mean:.1f} ± {row.top1_std:.1f}",
            f"{row.step_ms_p50:.1f}",
            f"{row.saved_mib:.2f}",
        )
    console.print(
        f"source task, digits 0 to 4: {result.source_top1:.1f}% of the held-out images"
        f" (needed: above {SOURCE_TOP1_NEEDED:g}%{', not asked of a quick run' * result.quick})"
    )
    console.print(table)
    console.print(
        f"{reload['adapter']} loaded from disk, merged and detached into a plain timm model:"
        f" the same prediction on {reload['equal_predictions']} of {reload['images']} test images,"
        f" logits within {reload['max_abs_logit_diff']:.1e}, top-1 {reload['top1']:.1f}%"
    )
    console.print(f"wrote report.json, accuracy.png, backbone.safetensors, adapters/ to {output}")


def _train_images() -> int:
    return digits.TRAIN_PER_CLASS * len(digits.TARGET_CLASSES)


def _seeds(count: int) -> str:
    return "one seed" if count == 1 else f"{count} seeds"
