"""The tables and data of a benchmark."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from .benchmark import Outcome, Plan
from .cell import BEST_ON_TEST, LAST, PROTOCOLS, VAL_CHOSEN, Cell
from .grid import Grid
from .scores import Estimate, Scores, estimate, published_vtab
from .tasks import GROUPS, TASKS

# The published row that a method is to be seen beside.
PUBLISHED = {
    "efft1": "efft1_le32",
    "efft2": "efft2_le32",
    "fact_tt": "fact_tt_le16",
    "fact_tk": "fact_tk_le32",
    "lora": "lora_r8",
    "linear": "linear",
    "full": "full",
    "bitfit": "bitfit",
    "vpt_shallow": "vpt_shallow",
    "vpt_deep": "vpt_deep",
    "adapter": "adapter",
    "adaptformer": "adaptformer",
    "ssf": "ssf",
    "noah": "noah",
}
OTHER = "Other"


def vtab_scores(outcome: Outcome, protocol: str) -> list[Scores]:
    """The methods' accuracies by one protocol, in the order in which they ran."""
    top1: dict[str, dict[int, dict[str, float]]] = {}
    parameters: dict[str, dict[str, int]] = {}
    others: list[str] = []
    for cell, result in outcome.finished:
        method, task = cell.settings.method, cell.task
        if task not in TASKS and task not in others:
            others.append(task)
        parameters.setdefault(method, {})[task] = result["parameters"]
        if protocol in result["results"]:
            by_task = top1.setdefault(method, {}).setdefault(cell.settings.seed, {})
            by_task[task] = result["results"][protocol]["top1_percent"]
    groups = {**GROUPS, OTHER: tuple(others)} if others else dict(GROUPS)
    return [
        Scores(method, _mean_parameters(parameters[method], groups), seeds, groups=groups)
        for method, seeds in top1.items()
    ]


def _mean_parameters(by_task: Mapping[str, int], groups: Mapping[str, Sequence[str]]) -> float:
    """The mean over groups of the means over tasks, as FacT's Table 1 has it."""
    present = [[by_task[task] for task in group if task in by_task] for group in groups.values()]
    return statistics.fmean(statistics.fmean(group) for group in present if group)


def tasks_run(outcome: Outcome) -> list[str]:
    """The tasks of which a cell finished, in the benchmark's order."""
    found = dict.fromkeys(cell.task for cell, _ in outcome.finished)
    return [task for task in TASKS if task in found] + [t for t in found if t not in TASKS]


def with_published(scores: Sequence[Scores], tasks: Sequence[str]) -> list[Scores]:
    """The scores, and after them the published rows of the same methods where they have a task."""
    rows = published_vtab()
    beside = [rows[PUBLISHED[item.label]] for item in scores if item.label in PUBLISHED]
    return [*scores, *(item for item in beside if set(item.tasks()) & set(tasks))]


def vtab_grids(outcome: Outcome, protocol: str) -> list[Grid]:
    """A grid for each group of tasks by one protocol, and one of both averages by all of them."""
    tasks = tasks_run(outcome)
    measured = vtab_scores(outcome, protocol)
    rows = with_published(measured, tasks)
    grids = []
    for group in dict(measured[0].groups) if measured else {}:
        among = [task for task in measured[0].groups[group] if task in tasks]
        if not among:
            continue
        grids.append(
            Grid(
                f"{group}: top-1 %, {PROTOCOLS[protocol]}",
                ("", "#param", *among, "mean"),
                tuple(
                    (
                        _name(item),
                        _count(item.parameters),
                        *(_text(item.task(task)) for task in among),
                        _text(item.group(group, among) if group in item.groups else None),
                    )
                    for item in rows
                ),
            )
        )
    return [*grids, averages_grid(outcome)]


def averages_grid(outcome: Outcome) -> Grid:
    """Both averages of every method by each of the three protocols, and as published."""
    tasks = tasks_run(outcome)
    by_protocol = {
        protocol: {item.label: item for item in vtab_scores(outcome, protocol)}
        for protocol in PROTOCOLS
    }
    rows = []
    for label, item in by_protocol[LAST].items():
        found = [by_protocol[protocol].get(label) for protocol in PROTOCOLS]
        rows.append((label, _count(item.parameters), *_averages(found, tasks)))
        if label in PUBLISHED:
            published = published_vtab()[PUBLISHED[label]]
            if set(tasks) <= set(published.tasks()):
                blank = [None] * (len(PROTOCOLS) - 1)
                cells = _averages([*blank, published], tasks)
                rows.append((_name(published), _count(published.parameters), *cells))
    header = tuple(
        f"{protocol}: mean of {over}" for protocol in PROTOCOLS for over in ("groups", "tasks")
    )
    notes = [f"{protocol}: {meaning}." for protocol, meaning in PROTOCOLS.items()]
    notes.append("± is the 95 % interval over seeds; none for one seed.")
    notes.append(
        "Published: EFFT's and FacT's releases report the best of every tenth epoch on the test"
        " images."
    )
    known = [task for task in tasks if task in TASKS]
    if len(known) < len(TASKS):
        notes.append(
            "All means, the published too, are over the tasks that ran:"
            f" {len(known)} of VTAB-1K's {len(TASKS)}."
        )
    return Grid("Averages, top-1 %", ("", "#param", *header), tuple(rows), tuple(notes))


def _averages(found: Sequence[Scores | None], tasks: Sequence[str]) -> list[str]:
    return [
        _text(None if item is None else average)
        for item in found
        for average in (
            (item.group_average(tasks), item.task_average(tasks)) if item else (None, None)
        )
    ]


def fewshot_panels(outcome: Outcome, protocol: str) -> dict[str, dict[str, dict[int, Estimate]]]:
    """Set, and "mean of sets" where there are several → method → images a class → accuracy."""
    sets = list(dict.fromkeys(cell.task for cell, _ in outcome.finished))
    shots = sorted({cell.shots for cell, _ in outcome.finished if cell.shots is not None})
    methods = list(dict.fromkeys(cell.settings.method for cell, _ in outcome.finished))
    wanted = {name: [name] for name in sets}
    if len(sets) > 1:
        wanted["mean of sets"] = sets
    return {
        name: {
            method: {
                count: value
                for count in shots
                if (value := fewshot(outcome, protocol, method, count, among)) is not None
            }
            for method in methods
        }
        for name, among in wanted.items()
    }


def fewshot_grids(outcome: Outcome, protocol: str) -> list[Grid]:
    """A grid for each panel: rows are methods, columns images a class."""
    grids = []
    for name, methods in fewshot_panels(outcome, protocol).items():
        shots = sorted({count for by_shots in methods.values() for count in by_shots})
        rows = tuple(
            (method, *(_text(by_shots.get(count)) for count in shots))
            for method, by_shots in methods.items()
        )
        title = f"{name}: top-1 % by images a class, {PROTOCOLS[protocol]}"
        grids.append(Grid(title, ("", *(str(count) for count in shots)), rows))
    return grids


def fewshot(
    outcome: Outcome, protocol: str, method: str, shots: int, sets: Sequence[str]
) -> Estimate | None:
    """A method's mean over sets with its interval over seeds, of the seeds that have them all."""
    seeds: dict[int, dict[str, float]] = {}
    for cell, result in outcome.finished:
        if (cell.settings.method, cell.shots) == (method, shots):
            if protocol not in result["results"]:
                continue
            top1 = result["results"][protocol]["top1_percent"]
            seeds.setdefault(cell.settings.seed, {})[cell.task] = top1
    complete = [tasks for tasks in seeds.values() if set(sets) <= set(tasks)]
    if not complete:
        return None
    return estimate([statistics.fmean(tasks[name] for name in sets) for tasks in complete])


def cells_csv(outcome: Outcome) -> str:
    """A row per finished cell."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ["suite", "task", "shots", "method", "seed", "parameters"]
        + [f"{protocol}_top1_percent" for protocol in (LAST, VAL_CHOSEN, BEST_ON_TEST)]
    )
    for cell, result in outcome.finished:
        numbers = [
            result["results"].get(protocol, {}).get("top1_percent") for protocol in PROTOCOLS
        ]
        place = [cell.suite, cell.task, cell.shots, cell.settings.method, cell.settings.seed]
        writer.writerow([*place, result["parameters"], *numbers])
    return text.getvalue()


def to_json(plan: Plan, outcome: Outcome) -> dict[str, Any]:
    """All that is known, with what is left out and what failed."""
    return {
        "suite": plan.suite,
        "protocols": PROTOCOLS,
        "cells": [{**_place(cell), **result} for cell, result in outcome.finished],
        "missing": list(plan.missing),
        "left_out": dict(plan.left_out),
        "failed": dict(outcome.failed),
    }


def _place(cell: Cell) -> dict[str, Any]:
    return {
        "task": cell.task,
        "shots": cell.shots,
        "method_name": cell.settings.method,
        "seed": cell.settings.seed,
    }


def _name(item: Scores) -> str:
    return f"{item.label} (published)" if item.published else item.label


def _text(value: Estimate | None) -> str:
    return "-" if value is None else str(value)


def _count(parameters: float | None) -> str:
    if parameters is None:
        return "-"
    return f"{parameters:,.0f}" if parameters < 1e6 else f"{parameters / 1e6:,.1f}M"
