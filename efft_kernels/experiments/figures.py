"""A benchmark's figures, and those of the papers that their numbers and formulas give.

Published numbers have open markers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from ..figure_style import legend, look, mark_coinciding, new_figure, tidy
from ..methods import FacTTK, FacTTT, LoRA
from ..papers import results
from ..papers.counts import VIT_B, counts, factors
from .scores import Estimate, Scores, published_vtab


def radar(scores: Sequence[Scores], tasks: Sequence[str], title: str) -> Figure:
    """A ring of tasks, a line per method: top-1 from 0 to 100 %.

    Raises:
        ValueError: fewer than three tasks make no ring.
    """
    if len(tasks) < 3:
        raise ValueError(f"tasks must be at least 3 for a radar, got {len(tasks)}")
    figure = new_figure(7.6, 7.2)
    axes: Any = figure.add_subplot(projection="polar")
    angles = np.linspace(0, 2 * math.pi, len(tasks), endpoint=False)
    for index, item in enumerate(scores):
        found = [item.task(task) for task in tasks]
        values = [math.nan if value is None else value.mean for value in found]
        axes.plot(
            [*angles, angles[0]],
            [*values, values[0]],
            **look(index).line | _face(item.published),
            label=_label(item),
        )
    axes.set_xticks(angles, list(tasks), fontsize=8)
    axes.set_ylim(0, 100)
    axes.set_rlabel_position(180 / len(tasks))  # between two tasks
    axes.tick_params(axis="y", labelsize=7)
    axes.set_title(f"{title}: top-1 (%)", fontsize=10)
    legend(figure, [axes], 3)
    return figure


def group_bars(
    scores: Sequence[Scores], tasks: Sequence[str], title: str, *, by_size: bool = False
) -> Figure:
    """Bars of every group's mean and of the mean over groups; whiskers are 95 % intervals.

    Args:
        scores: one bar each in every group.
        tasks: over which the means are taken.
        title: of the figure.
        by_size: a bar's width grows with its number of parameters (FacT, Fig. 5).
    """
    names = [name for name in scores[0].groups if set(scores[0].groups[name]) & set(tasks)]
    columns = [*names, "mean of groups"] if len(names) > 1 else names
    figure = new_figure(min(12.0, max(6.4, 1.2 + 0.3 * len(columns) * len(scores))), 4.6)
    axes = figure.subplots()
    widths = _widths(scores, by_size)
    lefts = np.concatenate([[0.0], np.cumsum(widths)[:-1]]) - sum(widths) / 2
    lowest = 100.0
    for index, item in enumerate(scores):
        values = [
            item.group(name, tasks) if name in item.groups else item.group_average(tasks)
            for name in columns
        ]
        heights = [math.nan if value is None else value.mean for value in values]
        lowest = min([lowest, *(height for height in heights if height == height)])
        axes.bar(
            [place + lefts[index] + widths[index] / 2 for place in range(len(columns))],
            heights,
            widths[index],
            yerr=_whiskers(values),
            alpha=0.55 if item.published else 1.0,
            label=_label(item),
            **look(index).bar,
        )
    axes.set_xticks(range(len(columns)), columns)
    axes.set_ylim(max(0.0, lowest - 10), min(100.0, axes.get_ylim()[1]))
    axes.set_ylabel("top-1 accuracy (%)")
    suffix = "; bars as wide as their parameters" if by_size else ""
    axes.set_title(title + suffix, fontsize=10, loc="left")
    legend(figure, [axes])
    tidy(axes)
    return figure


def _widths(scores: Sequence[Scores], by_size: bool) -> list[float]:
    if not by_size:
        return [0.8 / len(scores)] * len(scores)
    sizes = [max(item.parameters or 0.0, 1.0) for item in scores]
    thinnest = 0.02  # or a small method's bar would be a line
    return [thinnest + (0.85 - thinnest * len(sizes)) * size / sum(sizes) for size in sizes]


def _whiskers(values: Sequence[Estimate | None]) -> list[float] | None:
    widths = [0.0 if v is None or v.half_width is None else v.half_width for v in values]
    return widths if any(widths) else None


def accuracy_against_parameters(
    points: Sequence[tuple[str, float | None, Estimate, bool]], title: str, y_label: str
) -> Figure:
    """A point per method on a logarithmic axis of parameters.

    A method without parameters is a line across, since a logarithm has no place for 0; one whose
    parameters are not known is left out.

    Args:
        points: (label, parameters, accuracy, whether published).
        title: of the figure.
        y_label: which accuracy.
    """
    figure = new_figure(7.2, 4.8)
    axes = figure.subplots()
    axes.set_xscale("log")
    for index, (label, parameters, accuracy, published) in enumerate(points):
        if parameters is None:
            continue
        own = look(index)
        text = f"{label}: {accuracy} %"
        if parameters == 0:
            axes.axhline(accuracy.mean, color=own.colour, linestyle=own.dash, label=f"{text}, 0")
            continue
        axes.errorbar(
            parameters,
            accuracy.mean,
            yerr=accuracy.half_width,
            capsize=3,
            label=f"{text}, {_short(parameters)}",
            **own.points | _face(published) | {"markersize": 7},
        )
    axes.set_ylim(None, min(101.0, axes.get_ylim()[1]))
    axes.set_xlabel("trained parameters, head left out (log scale)")
    axes.set_ylabel(y_label)
    axes.set_title(title, fontsize=10, loc="left")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
    low, high = axes.get_xlim()
    within_a_decade = FuncFormatter(lambda value, _: _short(value))
    axes.xaxis.set_minor_locator(LogLocator(subs=(2, 3, 5)))
    axes.xaxis.set_minor_formatter(within_a_decade if high < 20 * low else NullFormatter())
    axes.tick_params(which="minor", labelsize=8)
    figure.legend(loc="outside right upper", fontsize=7, frameon=False)
    tidy(axes)
    return figure


def scatter(scores: Sequence[Scores], tasks: Sequence[str], title: str) -> Figure:
    """`accuracy_against_parameters` of the mean over groups."""
    points = []
    for item in scores:
        accuracy = item.group_average(tasks)
        if accuracy is not None:
            points.append((_label(item), item.parameters, accuracy, item.published))
    return accuracy_against_parameters(points, title, "mean of groups, top-1 (%)")


def shots_lines(panels: Mapping[str, Mapping[str, Mapping[int, Estimate]]], y_label: str) -> Figure:
    """A panel per set, a line per method: accuracy over images a class (FacT, Fig. 6).

    Args:
        panels: set → method → images a class → accuracy.
        y_label: which accuracy.
    """
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = new_figure(3.4 * columns + 0.6, 3.2 * rows + 0.5)
    place = {name: i for i, name in enumerate(dict.fromkeys(m for p in panels.values() for m in p))}
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes, (name, methods) in zip(grid.flat, panels.items(), strict=False):
        shots = sorted({count for by_shots in methods.values() for count in by_shots})
        for method, by_shots in methods.items():
            axes.errorbar(
                list(by_shots),
                [accuracy.mean for accuracy in by_shots.values()],
                yerr=_whiskers(list(by_shots.values())),
                capsize=2,
                label=method,
                **look(place[method]).line,
            )
        axes.set_xscale("log", base=2)
        axes.set_xticks(shots, [str(count) for count in shots])
        axes.minorticks_off()
        axes.set_title(name, fontsize=10, loc="left")
        axes.set_xlabel("images a class")
        tidy(axes)
        mark_coinciding(axes)
    grid[0, 0].set_ylabel(y_label)
    legend(figure, grid.flat[: len(panels)])
    return figure


def of_papers() -> dict[str, Figure]:
    """Every figure of the papers that their tables and formulas give, by a name for its file."""
    rows = {row: replace(item, published=False) for row, item in published_vtab().items()}
    tasks = rows["full"].tasks()
    efft = list(results.table("efft_table_1").rows)
    fact = list(results.table("fact_table_1").rows)
    in_figure_1 = ["adaptformer", "lora_r8", "noah", "ssf", "fact_tk_le32", *efft[-2:]]
    petl = [row for row in fact if row not in ("full", "linear")]
    return {
        "efft-figure-1": scatter([rows[row] for row in in_figure_1], tasks, "EFFT, Figure 1"),
        "efft-figure-6": radar([rows[row] for row in in_figure_1], tasks, "EFFT, Figure 6"),
        "efft-figure-6-groups": group_bars(
            [rows[row] for row in in_figure_1], tasks, "EFFT, Figure 6"
        ),
        "efft-table-3": _scaling(),
        "fact-figure-1": scatter([rows[row] for row in fact], tasks, "FacT, Figure 1"),
        "fact-figure-4": _rank_figure(),
        "fact-figure-5": group_bars(
            [rows[row] for row in petl], tasks, "FacT, Figure 5", by_size=True
        ),
        "kadaptation-figure-1": _kadaptation_figure(),
    }


def _scaling() -> Figure:
    table = results.table("efft_table_3")
    sizes = [column.key for column in table.columns if not column.key.endswith("_params")]
    labels = [c.label.removesuffix(" ave.") for c in table.columns if c.key in sizes]
    figure = new_figure(7.2, 4.4)
    axes = figure.subplots()
    for index, (row, label) in enumerate(table.rows.items()):
        axes.plot(
            labels,
            list(table.values(row, tuple(sizes)).values()),
            label=label,
            **look(index).points | {"markersize": 8},
        )
    axes.set_ylabel("mean of groups, top-1 (%)")
    axes.set_title("EFFT, Table 3", fontsize=10, loc="left")
    axes.legend(fontsize=8, frameon=False)
    tidy(axes)
    return figure


def _rank_figure() -> Figure:
    ranks = (1, 2, 4, 8, 16, 32, 64)
    figure = new_figure(6.4, 4.4)
    axes = figure.subplots()
    kinds = {"LoRA": LoRA, "FacT-TT": FacTTT, "FacT-TK": FacTTK}
    for index, (label, kind) in enumerate(kinds.items()):
        axes.plot(
            ranks,
            [factors(VIT_B, kind(rank=rank)) for rank in ranks],
            label=label,
            **look(index).line,
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(ranks, [str(rank) for rank in ranks])
    axes.set_xlabel("rank r")
    axes.set_ylabel("trained parameters on ViT-B, head left out")
    axes.set_title("FacT, Figure 4", fontsize=10, loc="left")
    tidy(axes)
    mark_coinciding(axes)
    axes.legend(fontsize=8, frameon=False, handlelength=3.2)
    return figure


def _kadaptation_figure() -> Figure:
    table = results.table("kadaptation_table_2")
    counted = {
        count.row: count.counted
        for count in counts()
        if (count.table, count.column) == (table.key, "vit_params")
    }
    points: list[tuple[str, float | None, Estimate, bool]] = []
    for row, label in table.rows.items():
        printed = table.value(row, "vit_params")
        parameters = counted.get(row, printed)
        means = {mean.row: mean for mean in table.means() if mean.column == "vit_average"}
        points.append((label, parameters, Estimate(means[row].computed, None, 1), False))
    figure = accuracy_against_parameters(
        points, "KAdaptation, Figure 1", "mean of three data sets (%)"
    )
    figure.axes[0].set_xlabel("trained parameters, head included, by formula where there is one")
    return figure


def _label(item: Scores) -> str:
    return f"{item.label} (published)" if item.published else item.label


def _face(published: bool) -> dict[str, str]:
    return {"markerfacecolor": "white"} if published else {}


def _short(count: float) -> str:
    """ "85.8M", "37K" or "8"."""
    for unit, size in (("M", 1e6), ("K", 1e3)):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return f"{count:.3g}"
