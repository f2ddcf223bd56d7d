"""Pictures and tables: they exist, differ with the data, and say what they should."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console
from rich.table import Table

from efft_kernels.analysis import plots, tables
from efft_kernels.analysis.ablation import Ablation, Cell, ScaleSweep
from efft_kernels.analysis.intrinsic_dimension import IntrinsicDimension, Point
from efft_kernels.analysis.subspace import BlockComparison, Comparison


def comparison(value: float = 0.5, size: int = 4) -> Comparison:
    baseline = np.full((size, size), 0.1)
    return Comparison(
        "groups", "mhsa.V", "ffn.V", "factor", 40, np.full((size, size), value), baseline
    )


def blocks() -> BlockComparison:
    return BlockComparison("qkv", "in", 12, 4, (0, 1, 2), np.eye(3), 1 / 3)


def dimension(found: int | None = 10) -> IntrinsicDimension:
    curve = (Point(0, 40.0, None), Point(1, math.nan, 0.1), Point(10, 70.0, 0.1))
    return IntrinsicDimension("blocks.0.attn", 1000, "model", 75.0, 0.9, curve, found)


def ablation() -> Ablation:
    full = {"efft1": Cell("efft1", "both", None, 9, 75.0, (75.0,))}
    cells = tuple(
        Cell("efft1", part, span, 5, top1, (top1,))
        for part, top1 in (("mhsa", 72.0), ("ffn", math.nan))
        for span in (None, (0, 2), (5, 5))
    )
    return Ablation("tiny", full, cells)


def sweep() -> ScaleSweep:
    top1 = np.array([[[60.0, 80.0, 70.0], [math.nan, 65.0, 61.0]]])
    return ScaleSweep(("tiny",), ("efft1", "efft2"), (0.1, 1.0, 10.0), top1)


FIGURES = {
    "comparisons": lambda: plots.draw_comparisons([comparison()] * 5),
    "fine grid": lambda: plots.draw_comparisons([comparison(size=30)]),
    "blocks": lambda: plots.draw_blocks([blocks()]),
    "dimensions": lambda: plots.draw_dimensions([dimension(), dimension(None)]),
    "ablation": lambda: plots.draw_ablation(ablation()),
    "scales": lambda: plots.draw_scales(sweep()),
}


@pytest.mark.parametrize("name", FIGURES)
def test_both_files_are_there_and_not_blank(tmp_path: Path, name: str) -> None:
    figure: Figure = FIGURES[name]()
    png, svg = plots.save(figure, tmp_path, "picture")
    assert sorted(tmp_path.iterdir()) == [png, svg]
    with Image.open(png) as image:
        assert min(image.size) > 300
        assert len(set(image.convert("L").resize((60, 60)).tobytes())) > 10
    assert svg.read_text().count("<path") > 10


def test_the_picture_follows_the_data(tmp_path: Path) -> None:
    low, high = (
        plots.save(plots.draw_comparisons([comparison(value)]), tmp_path, name)[0].read_bytes()
        for name, value in (("low", 0.3), ("high", 0.9))
    )
    assert low != high


def test_pictures_name_their_axes(tmp_path: Path) -> None:
    _, svg = plots.save(plots.draw_ablation(ablation()), tmp_path, "ablation")
    text = svg.read_text()
    assert all(word in text for word in ("adapted layers", "efft1, ffn", "0-2", "(%)"))
    _, svg = plots.save(plots.draw_comparisons([comparison()]), tmp_path, "subspace")
    assert "similarity above random" in svg.read_text()
    assert "0.40" in svg.read_text()


def text_of(table: Table) -> str:
    console = Console(width=160)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_tables() -> None:
    assert "+0.400" in text_of(tables.comparison_table([comparison()]))
    assert "-0.333" in text_of(tables.block_table([blocks()]))
    text = text_of(tables.dimension_table([dimension(), dimension(None)]))
    assert "67.50" in text
    assert "> 10" in text
    text = text_of(tables.ablation_table(ablation()))
    assert "-4.00" in text
    assert "diverged" in text
    assert text.index("all") < text.index("0-2")
    text = text_of(tables.scale_table(sweep()))
    assert "80.00 (1.00)" in text
    assert "diverged (0.00)" in text
