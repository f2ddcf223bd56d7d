"""The analyses' results as tables for a terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.table import Table

from .ablation import Ablation, Cell, LayerRange, ScaleSweep
from .intrinsic_dimension import IntrinsicDimension
from .subspace import BlockComparison, Comparison

SIDE_WORDS = {"in": "features read", "out": "features written", "factor": "rows of the factor"}


def layers_word(span: LayerRange | None) -> str:
    """ "all", "0-2" or "5"."""
    if span is None:
        return "all"
    return str(span[0]) if span[0] == span[1] else f"{span[0]}-{span[1]}"


def percent(value: float, sign: bool = False) -> str:
    """Two decimals, or "diverged"."""
    return "diverged" if math.isnan(value) else f"{value:{'+' if sign else ''}.2f}"


def comparison_table(comparisons: Sequence[Comparison]) -> Table:
    """Each comparison at i = j = 1 and at its largest i and j, above random."""
    table = Table(
        title="Subspace similarity (Eq. 4)",
        caption="Above random: minus max(i, j)/dim, what random subspaces give.",
    )
    for name in ("first", "second", "space"):
        table.add_column(name, no_wrap=True)
    for name in ("dim", "i, j", "similarity", "above random"):
        table.add_column(name, justify="right")
    for item in comparisons:
        corners = {(0, 0), tuple(size - 1 for size in item.similarity.shape)}
        for i, j in sorted(corners):
            table.add_row(
                item.first,
                item.second,
                SIDE_WORDS[item.side],
                str(item.dim),
                f"{i + 1}, {j + 1}",
                f"{item.similarity[i, j]:.3f}",
                f"{item.above_random[i, j]:+.3f}",
            )
    return table


def block_table(comparisons: Sequence[BlockComparison]) -> Table:
    """For each role the mean over pairs of neighbouring blocks, and over all pairs."""
    table = Table(
        title="Subspace similarity of ΔW between blocks, above random",
        caption="Means over pairs of different blocks.",
    )
    for name in ("role", "space"):
        table.add_column(name)
    for name in ("dim", "i = j", "neighbours", "all pairs"):
        table.add_column(name, justify="right")
    for item in comparisons:
        count = len(item.blocks)
        values = item.above_random
        near = [values[a, a + 1] for a in range(count - 1)]
        pairs = [values[a, b] for a in range(count) for b in range(a + 1, count)]
        table.add_row(
            item.role,
            SIDE_WORDS[item.side],
            str(item.dim),
            str(item.top),
            f"{sum(near) / len(near):+.3f}",
            f"{sum(pairs) / len(pairs):+.3f}",
        )
    return table


def dimension_table(results: Sequence[IntrinsicDimension]) -> Table:
    """d_t of each module."""
    table = Table(
        title="Local intrinsic dimension",
        caption="d_t: the smallest d tried that reaches the threshold; d = 0 is the head alone.",
    )
    table.add_column("module", overflow="fold")
    for name in ("parameters", "full top-1 %", "threshold %", "d_t", "top-1 % there"):
        table.add_column(name, justify="right")
    for item in results:
        reached = next((p.top1_percent for p in item.curve if p.dim == item.dimension), None)
        beyond = f"> {item.curve[-1].dim}" if item.curve else "?"
        table.add_row(
            item.module,
            f"{item.parameters:,}",
            percent(item.full_top1_percent),
            percent(item.threshold_top1_percent),
            beyond if item.dimension is None else str(item.dimension),
            "" if reached is None else percent(reached),
        )
    return table


def ablation_table(ablation: Ablation) -> Table:
    """Rows of layers, a column per method and part, as Table 4 has them."""
    full = ", ".join(f"{n} {percent(c.top1_percent)} %" for n, c in ablation.full.items())
    table = Table(
        title=f"{ablation.task}: top-1 against the full adaptation, relative change in %",
        caption=f"Full adaptation (MHSA and FFN of all layers): {full}.",
    )
    table.add_column("layers")
    columns = list(dict.fromkeys((cell.method, cell.part) for cell in ablation.cells))
    for method, part in columns:
        table.add_column(f"{method} {part}", justify="right")
    by_place = {(cell.method, cell.part, cell.layers): cell for cell in ablation.cells}
    for span in dict.fromkeys(cell.layers for cell in ablation.cells):
        cells = [by_place.get((method, part, span)) for method, part in columns]
        table.add_row(layers_word(span), *(_change(ablation, cell) for cell in cells))
    return table


def _change(ablation: Ablation, cell: Cell | None) -> str:
    return "" if cell is None else percent(ablation.relative_change_percent(cell), sign=True)


def scale_table(sweep: ScaleSweep) -> Table:
    """Rows of data sets and methods, a column per scale: top-1 and, in brackets, normalised."""
    table = Table(
        title="Top-1 % by scale s",
        caption="In brackets: 1 for the data set's best pair of method and scale, 0 for its worst.",
    )
    table.add_column("data set")
    table.add_column("method")
    for scale in sweep.scales:
        table.add_column(f"s = {scale:g}", justify="right")
    for t, task in enumerate(sweep.tasks):
        for m, method in enumerate(sweep.methods):
            cells = (
                f"{percent(top1)} ({normal:.2f})"
                for top1, normal in zip(
                    sweep.top1_percent[t, m], sweep.normalised[t, m], strict=True
                )
            )
            table.add_row(task, method, *cells)
    return table
