"""Which layers and blocks to adapt, and at which scale.

Source: EFFT (arXiv:2311.06749), section 4.3, Table 4 and Figs. 7 to 9.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..adapters.attach import attach
from ..adapters.sites import find_sites
from ..methods.base import Method
from ..training.reproducible import seed_everything
from .task import Budget, Task, top1_after_training, without_nan

LayerRange = tuple[int, int]  # first and last block, both included

# As printed in Table 4, for the 12 blocks of ViT-B: block 2 is in two rows.
PAPER_RANGES: tuple[LayerRange, ...] = ((0, 2), (2, 4), (5, 8), (9, 11))
PAPER_SCALES = (0.1, 1.0, 10.0, 100.0)
PARTS = ("mhsa", "ffn", "both")


@dataclass(frozen=True)
class Cell:
    """One method with one part of some layers adapted.

    Attributes:
        method: its name.
        part: "mhsa", "ffn" or "both".
        layers: first and last block; None for all.
        parameters: of the factors.
        top1_percent: mean over the seeds; NaN where one diverged.
        top1_per_seed: in the seeds' order.
    """

    method: str
    part: str
    layers: LayerRange | None
    parameters: int
    top1_percent: float
    top1_per_seed: tuple[float, ...]


@dataclass(frozen=True)
class Ablation:
    """All cells, and what they are compared with: both parts of all layers adapted.

    Attributes:
        task: name of the data set.
        full: method name → its full adaptation.
        cells: the others.
    """

    task: str
    full: Mapping[str, Cell]
    cells: tuple[Cell, ...]

    def relative_change_percent(self, cell: Cell) -> float:
        """100·(cell/full − 1), of the accuracies: the numbers of Table 4."""
        return 100 * (cell.top1_percent / self.full[cell.method].top1_percent - 1)

    def to_json(self) -> dict[str, Any]:
        """Everything, with the relative changes, in JSON's own types; null for NaN."""
        cells = [
            dataclasses.asdict(cell)
            | {"relative_change_percent": self.relative_change_percent(cell)}
            for cell in self.cells
        ]
        full = {name: dataclasses.asdict(cell) for name, cell in self.full.items()}
        return without_nan({"task": self.task, "full": full, "cells": cells})


@dataclass(frozen=True)
class ScaleSweep:
    """Accuracy by data set, method and scale.

    Attributes:
        tasks: names of the data sets.
        methods: names of the methods.
        scales: s.
        top1_percent: [tasks, methods, scales], means over the seeds; NaN where one diverged.
    """

    tasks: tuple[str, ...]
    methods: tuple[str, ...]
    scales: tuple[float, ...]
    top1_percent: NDArray[np.float64]

    @property
    def normalised(self) -> NDArray[np.float64]:
        """[tasks, methods, scales]: in each data set the best method-scale pair is 1 and the worst
        0 (Fig. 7). A run that diverged is 0, and not the measure of the worst; equals are all 1."""
        result = np.zeros_like(self.top1_percent)
        for index, values in enumerate(self.top1_percent):
            finite = np.isfinite(values)
            if not finite.any():
                continue
            low, high = values[finite].min(), values[finite].max()
            spread = high - low
            scaled = (values[finite] - low) / spread if spread > 0 else 1.0
            result[index][finite] = scaled
        return result

    def to_json(self) -> dict[str, Any]:
        """The axes, the accuracies and the normalised ones in JSON's own types; null for NaN."""
        arrays = ("top1_percent", "normalised")
        return without_nan(vars(self) | {name: getattr(self, name).tolist() for name in arrays})


def depth_of(task: Task) -> int:
    """How many transformer blocks the task's model has."""
    return 1 + max(site.block for site in find_sites(task.model))


def default_ranges(depth: int) -> tuple[LayerRange, ...]:
    """The paper's four rows for 12 blocks; else up to four ranges of nearly equal length."""
    if depth == 12:
        return PAPER_RANGES
    parts = np.array_split(np.arange(depth), min(4, depth))
    return tuple((int(part[0]), int(part[-1])) for part in parts)


def ablate(
    task: Task,
    methods: Sequence[Method],
    budget: Budget,
    *,
    parts: Sequence[str] = ("mhsa", "ffn"),
    ranges: Sequence[LayerRange | None] | None = None,
    seeds: Sequence[int] = (0,),
    on_result: Callable[[Cell], None] = lambda cell: None,
) -> Ablation:
    """Train each method with one part of some layers adapted, and with all (Table 4).

    Args:
        task: the data set and the backbone, which stays as it is.
        methods: configurations, at most one of each kind.
        budget: of every run.
        parts: of "mhsa", "ffn" and "both"; "both" of all layers is the full adaptation itself.
        ranges: (first, last) block of each row, None for all; by default all and `default_ranges`.
        seeds: each gives factors, order of images and dropout of its own; accuracies are averaged.
        on_result: called with every finished cell, the full adaptations first.

    Raises:
        ValueError: an unknown part, a range outside the model, no seed, two methods of one name, or
            a full adaptation that diverged.
    """
    depth = depth_of(task)
    if ranges is None:
        ranges = (None, *default_ranges(depth))
    for part in parts:
        if part not in PARTS:
            raise ValueError(f"parts must be among {PARTS}, got {part!r}")
    for span in ranges:
        if span is not None and not 0 <= span[0] <= span[1] < depth:
            raise ValueError(f"ranges must be FIRST-LAST within 0..{depth - 1}, got {span}")
    _check_runs(methods, seeds)

    full: dict[str, Cell] = {}
    for method in methods:
        cell = _cell(task, method, budget, "both", None, seeds)
        if math.isnan(cell.top1_percent):
            raise ValueError(f"lr and scale must be low enough, but {method.name} diverged")
        if cell.top1_percent == 0:
            raise ValueError(f"{method.name} must learn something to compare with, got 0 %")
        full[method.name] = cell
        on_result(cell)
    cells: list[Cell] = []
    for method in methods:
        for part in parts:
            for span in ranges:
                if part == "both" and span is None:
                    continue
                cells.append(_cell(task, method, budget, part, span, seeds))
                on_result(cells[-1])
    return Ablation(task.name, full, tuple(cells))


def _cell(
    task: Task,
    method: Method,
    budget: Budget,
    part: str,
    span: LayerRange | None,
    seeds: Sequence[int],
) -> Cell:
    runs = [adapt(task, method, budget, seed, part, span) for seed in seeds]
    top1 = tuple(accuracy for accuracy, _ in runs)
    return Cell(method.name, part, span, runs[0][1], statistics.fmean(top1), top1)


def adapt(
    task: Task,
    method: Method,
    budget: Budget,
    seed: int,
    part: str = "both",
    span: LayerRange | None = None,
) -> tuple[float, int]:
    """(top-1 percent, factor parameters) of the task's model adapted anew."""
    model = task.copy_of_model()
    seed_everything(seed)
    adapter = attach(
        model,
        method,
        targets=None if part == "both" else part,
        layers=None if span is None else range(span[0], span[1] + 1),
    )
    return top1_after_training(model, task, budget, seed), adapter.num_parameters()


def sweep_scales(
    tasks: Sequence[Task],
    methods: Sequence[Method],
    budget: Budget,
    *,
    scales: Sequence[float] = PAPER_SCALES,
    seeds: Sequence[int] = (0,),
    on_result: Callable[[str, str, float, float], None] = lambda task, method, scale, top1: None,
) -> ScaleSweep:
    """Train each method at each scale on each data set (Figs. 7 and 8).

    Args:
        tasks: data sets, with the same or different backbones, which stay as they are.
        methods: configurations, whose own scale is replaced; at most one of each kind.
        budget: of every run.
        scales: s.
        seeds: accuracies are averaged over them.
        on_result: called with (data set, method, scale, top-1 percent) after each.

    Raises:
        ValueError: no task, scale or seed, or two methods of one name.
    """
    if not tasks or not scales:
        raise ValueError("tasks and scales must hold at least one each")
    _check_runs(methods, seeds)
    top1 = np.empty((len(tasks), len(methods), len(scales)))
    for t, task in enumerate(tasks):
        for m, method in enumerate(methods):
            for s, scale in enumerate(scales):
                scaled: Any = dataclasses.replace(method, scale=scale)  # type: ignore[call-arg]
                runs = [adapt(task, scaled, budget, seed)[0] for seed in seeds]
                top1[t, m, s] = statistics.fmean(runs)
                on_result(task.name, method.name, scale, float(top1[t, m, s]))
    names = tuple(task.name for task in tasks)
    return ScaleSweep(names, tuple(m.name for m in methods), tuple(scales), top1)


def _check_runs(methods: Sequence[Method], seeds: Sequence[int]) -> None:
    names = [method.name for method in methods]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"methods must be one or several, each once, got {names}")
    if not seeds:
        raise ValueError("seeds must hold at least one")
