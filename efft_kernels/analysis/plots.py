"""The analyses' pictures, as PNG and SVG."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..atomic_files import replacing
from ..figure_style import (
    COLOUR_MAP,
    REFERENCE,
    legend,
    looks,
    mark_coinciding,
    new_figure,
    tidy,
)
from .ablation import Ablation, Cell, ScaleSweep
from .intrinsic_dimension import IntrinsicDimension
from .subspace import BlockComparison, Comparison, Matrix
from .tables import SIDE_WORDS, layers_word

MOST_NUMBERS = 8  # a grid of more cells a side is too fine to write in


def save(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Write folder/name.png and .svg, each replaced in one step.

    Returns:
        Their paths.
    """
    paths = []
    for suffix in ("png", "svg"):
        path = folder / f"{name}.{suffix}"
        with replacing(path) as temporary, matplotlib.rc_context({"svg.fonttype": "none"}):
            figure.savefig(temporary, format=suffix)
        paths.append(path)
    return paths


def draw_comparisons(comparisons: Sequence[Comparison]) -> Figure:
    """A heat map for each comparison: similarity above random for i down and j across."""
    panels = [
        (
            f"{_pair(item.first, item.second)}\n{SIDE_WORDS[item.side]}, dim {item.dim}",
            item.above_random,
            [str(i) for i in range(1, item.similarity.shape[0] + 1)],
            [str(j) for j in range(1, item.similarity.shape[1] + 1)],
        )
        for item in comparisons
    ]
    return _heat_maps(panels, "i of the first", "j of the second")


def draw_blocks(comparisons: Sequence[BlockComparison]) -> Figure:
    """A heat map for each role: similarity above random of every block with every other."""
    panels = []
    for item in comparisons:
        title = f"ΔW of {item.role}, i = j = {item.top}\n{SIDE_WORDS[item.side]}, dim {item.dim}"
        labels = [str(block) for block in item.blocks]
        panels.append((title, item.above_random, labels, labels))
    return _heat_maps(panels, "block", "block", with_itself=True)


def _pair(first: str, second: str) -> str:
    return f"{first} of both" if first == second else f"{first}, {second}"


def _heat_maps(
    panels: Sequence[tuple[str, Matrix, list[str], list[str]]],
    y_label: str,
    x_label: str,
    with_itself: bool = False,
) -> Figure:
    columns = min(4, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = new_figure(3.1 * columns + 1.0, 3.5 * rows)
    grid = figure.subplots(rows, columns, squeeze=False)
    # One scale for all panels, as far as their values go; a block's similarity with itself, by far
    # the largest of all, is beyond it.
    counted = [
        values[np.eye(*values.shape) == 0] if with_itself else values for _, values, _, _ in panels
    ]
    counted = [values for values in counted if values.size] or [np.ones(1)]
    low = min(0.0, *(float(np.nanmin(values)) for values in counted))
    top = max(low + 0.01, *(float(np.nanmax(values)) for values in counted))
    image = None
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes, (title, values, y_ticks, x_ticks) in zip(grid.flat, panels, strict=False):
        image = axes.imshow(values, cmap=COLOUR_MAP, vmin=low, vmax=top, aspect="equal")
        axes.set_title(title, fontsize=8)
        axes.set_xlabel(x_label, fontsize=8)
        axes.set_ylabel(y_label, fontsize=8)
        for axis, labels in ((axes.xaxis, x_ticks), (axes.yaxis, y_ticks)):
            step = math.ceil(len(labels) / 12)
            axis.set_ticks(range(0, len(labels), step), labels[::step], fontsize=7)
        if max(values.shape) <= MOST_NUMBERS:
            for (i, j), value in np.ndenumerate(values):
                colour = "black" if value > low + 0.55 * (top - low) else "white"
                text = f"{round(value, 2) + 0.0:.2f}"  # no -0.00
                axes.text(j, i, text, ha="center", va="center", size=6, color=colour)
    if image is not None:
        figure.colorbar(
            image,
            ax=grid,
            label="similarity above random",
            shrink=0.8,
            extend="max" if with_itself else "neither",
            ticks=MaxNLocator(5),
        )
    return figure


def draw_dimensions(results: Sequence[IntrinsicDimension]) -> Figure:
    """Accuracy over d for each module, the thresholds dashed, d_t filled (KAdaptation, Fig. 3)."""
    figure = new_figure(6.4, 4.2)
    axes = figure.subplots()
    look_of = looks([str(index) for index in range(len(results))])
    for item, look in zip(results, look_of.values(), strict=True):
        d_t = "not reached" if item.dimension is None else str(item.dimension)
        axes.plot(
            [point.dim for point in item.curve],
            [point.top1_percent for point in item.curve],
            markerfacecolor="white",
            **look.line,
            label=f"{item.module} ({item.parameters:,} parameters): d_t {d_t}",
        )
        for point in item.curve:
            if point.dim == item.dimension:
                axes.plot(point.dim, point.top1_percent, **look.points | {"markersize": 9})
    for index, level in enumerate(sorted({item.threshold_top1_percent for item in results})):
        axes.axhline(
            level,
            color=REFERENCE,
            linestyle="-",
            linewidth=0.8,
            label=None if index else f"threshold: {results[0].fraction:g} of the full accuracy",
        )
    dims = sorted({point.dim for item in results for point in item.curve})
    axes.set_xscale("symlog", linthresh=1)
    axes.set_xlim(-0.3, 1.4 * max(dims, default=1) + 0.3)
    axes.set_xticks(dims, [str(dim) for dim in dims], fontsize=8)
    axes.minorticks_off()
    axes.set_xlabel(
        "dimension d of the random subspace (0: head alone)\n"
        "d_t, filled: the least that reaches the threshold"
    )
    axes.set_ylabel("top-1 accuracy (%)")
    tidy(axes)
    mark_coinciding(axes)
    figure.legend(loc="outside upper center", fontsize=8, frameon=False, handlelength=3.2)
    return figure


def draw_ablation(ablation: Ablation) -> Figure:
    """Bars of the relative change, grouped by layers, one kind of bar per method and part.

    A whisker is the standard deviation over the seeds.
    """
    spans = list(dict.fromkeys(cell.layers for cell in ablation.cells))
    series = list(dict.fromkeys((cell.method, cell.part) for cell in ablation.cells))
    by_place = {(cell.method, cell.part, cell.layers): cell for cell in ablation.cells}
    figure = new_figure(max(6.4, 0.34 * len(spans) * (len(series) + 1)), 4.2)
    axes = figure.subplots()
    width = 0.8 / len(series)
    look_of = looks([f"{method}, {part}" for method, part in series])
    for index, (method, part) in enumerate(series):
        look = look_of[f"{method}, {part}"]
        cells = [by_place.get((method, part, span)) for span in spans]
        axes.bar(
            [x + (index - (len(series) - 1) / 2) * width for x in range(len(spans))],
            [math.nan if c is None else ablation.relative_change_percent(c) for c in cells],
            width,
            yerr=_deviations(ablation, cells),
            label=f"{method}, {part}",
            **look.bar,
        )
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xticks(range(len(spans)), [layers_word(span) for span in spans])
    axes.set_xlabel("adapted layers")
    axes.set_ylabel("change against the full adaptation (%)")
    axes.set_title(ablation.task, fontsize=10, loc="left")
    legend(figure, [axes])
    tidy(axes)
    return figure


def _deviations(ablation: Ablation, cells: Sequence[Cell | None]) -> list[float] | None:
    """Of the relative changes over the seeds; None where each cell has one seed."""
    if not any(cell is not None and len(cell.top1_per_seed) > 1 for cell in cells):
        return None
    return [
        math.nan
        if cell is None or len(cell.top1_per_seed) < 2
        else 100 * statistics.stdev(cell.top1_per_seed) / ablation.full[cell.method].top1_percent
        for cell in cells
    ]


def draw_scales(sweep: ScaleSweep) -> Figure:
    """A panel per method, a line per data set: accuracy over s (Figs. 7 and 8, less their scaling).

    With more data sets than one the accuracies are normalised to each set's worst and best, as the
    paper's are; the legend has those.
    """
    figure = new_figure(3.4 * len(sweep.methods) + 0.6, 3.8)
    panels = figure.subplots(1, len(sweep.methods), squeeze=False, sharey=True)[0]
    order = np.argsort(sweep.scales)
    scales = np.asarray(sweep.scales)[order]
    normalised = len(sweep.tasks) > 1
    values = sweep.normalised if normalised else sweep.top1_percent
    look_of = looks(sweep.tasks)
    for m, (axes, method) in enumerate(zip(panels, sweep.methods, strict=True)):
        for t, task in enumerate(sweep.tasks):
            found = sweep.top1_percent[t][np.isfinite(sweep.top1_percent[t])]
            spread = f" ({found.min():.1f} to {found.max():.1f} %)" if found.size else ""
            axes.plot(scales, values[t, m][order], label=f"{task}{spread}", **look_of[task].line)
        if (scales > 0).all():
            axes.set_xscale("log")
        axes.set_xticks(scales, [f"{scale:g}" for scale in scales])
        axes.minorticks_off()
        axes.set_xlabel("scale s")
        axes.set_title(method, fontsize=10, loc="left")
        if normalised:
            axes.set_ylim(-0.05, 1.05)
        axes.yaxis.set_major_locator(MaxNLocator(5))
        tidy(axes)
        mark_coinciding(axes)
    panels[0].set_ylabel("top-1, worst = 0, best = 1" if normalised else "top-1 accuracy (%)")
    legend(figure, panels, 3)
    return figure
