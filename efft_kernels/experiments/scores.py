"""What a method reached on the tasks of a benchmark: measured here, or published."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from scipy.stats import t as student

from ..papers import results
from .tasks import GROUPS, TASKS


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds.

    Attributes:
        mean: percent.
        half_width: of the 95 % interval by Student's t; None for a single seed.
        seeds: how many.
    """

    mean: float
    half_width: float | None
    seeds: int

    def __str__(self) -> str:
        width = "" if self.half_width is None else f" ± {self.half_width:.1f}"
        return f"{self.mean:.1f}{width}"


def estimate(values: Sequence[float]) -> Estimate:
    """The mean of one value per seed, and its 95 % interval.

    Raises:
        ValueError: no value.
    """
    if not values:
        raise ValueError("values must hold one per seed, got none")
    count = len(values)
    half_width = None
    if count > 1:
        error = statistics.stdev(values) / math.sqrt(count)
        half_width = float(student.ppf(0.975, count - 1)) * error
    return Estimate(statistics.fmean(values), half_width, count)


@dataclass(frozen=True)
class Scores:
    """One method's accuracies.

    Attributes:
        label: its name.
        parameters: trained, the head left out; None where they are not known.
        top1: seed → task → percent. Published numbers have the one seed 0.
        published: whether a paper printed them.
    """

    label: str
    parameters: float | None
    top1: Mapping[int, Mapping[str, float]]
    published: bool = False
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: GROUPS)

    def tasks(self) -> list[str]:
        """The tasks that every seed has."""
        seeds = [set(tasks) for tasks in self.top1.values()]
        common = set.intersection(*seeds) if seeds else set()
        order = [task for tasks in self.top1.values() for task in tasks]
        return [task for task in dict.fromkeys(order) if task in common]

    def task(self, task: str) -> Estimate | None:
        """Over the seeds that have the task."""
        values = [tasks[task] for tasks in self.top1.values() if task in tasks]
        return estimate(values) if values else None

    def group(self, group: str, among: Sequence[str]) -> Estimate | None:
        """The mean of a group's tasks, of those that are in `among`."""
        tasks = [task for task in self.groups[group] if task in among]
        return self._over_seeds([[task] for task in tasks])

    def task_average(self, among: Sequence[str]) -> Estimate | None:
        """The mean over the tasks of `among`."""
        return self._over_seeds([[task] for task in among])

    def group_average(self, among: Sequence[str]) -> Estimate | None:
        """The mean over the groups of their means, of the tasks in `among`.

        None where one of these is in no group.
        """
        present = [[t for t in group if t in among] for group in self.groups.values()]
        if sum(map(len, present)) < len(among):
            return None
        return self._over_seeds([tasks for tasks in present if tasks])

    def _over_seeds(self, groups: Sequence[Sequence[str]]) -> Estimate | None:
        """The mean over groups of the means over their tasks, for the seeds that have them all."""
        needed = {task for group in groups for task in group}
        complete = [tasks for tasks in self.top1.values() if needed <= set(tasks)]
        if not needed or not complete:
            return None

        def mean(tasks: Mapping[str, float]) -> float:
            return statistics.fmean(statistics.fmean(tasks[t] for t in group) for group in groups)

        return estimate([mean(tasks) for tasks in complete])


def published_vtab() -> dict[str, Scores]:
    """Every row of VTAB-1K on ViT-B/16 that EFFT and FacT print, by the row's key."""
    found: dict[str, Scores] = {}
    for key in ("efft_table_1", "fact_table_1"):
        table = results.table(key)
        for row, label in table.rows.items():
            parameters = table.value(row, "params_m")
            found.setdefault(
                row,
                Scores(
                    label,
                    None if parameters is None else 1e6 * parameters,
                    {0: table.values(row, TASKS)},
                    published=True,
                ),
            )
    return found
