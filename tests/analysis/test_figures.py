"""What the pictures and tables show, number by number: no two of the data are alike."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from rich.table import Table

from efft_kernels.analysis import plots, tables
from efft_kernels.analysis.ablation import Ablation, Cell, ScaleSweep
from efft_kernels.analysis.intrinsic_dimension import IntrinsicDimension, Point
from efft_kernels.analysis.subspace import BlockComparison, Comparison


def numbers(rows: int, columns: int) -> Any:
    """[rows, columns], all different, between 0.1 and 0.9."""
    return np.linspace(0.1, 0.9, rows * columns).reshape(rows, columns)


def column(table: Table, header: str) -> list[str]:
    (found,) = (item for item in table.columns if item.header == header)
    return [str(cell) for cell in found.cells]


def test_a_heat_map_has_i_down_and_j_across() -> None:
    item = Comparison("g", "mhsa.V", "ffn.V", "factor", 40, numbers(2, 3), numbers(2, 3) ** 2)
    axes = plots.draw_comparisons([item]).axes[0]
    (image,) = axes.images
    expected = item.similarity - item.baseline
    np.testing.assert_allclose(image.get_array(), expected)
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["1", "2"]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["1", "2", "3"]
    written = {text.get_position(): text.get_text() for text in axes.texts}
    assert written == {(j, i): f"{value:.2f}" for (i, j), value in np.ndenumerate(expected)}
    table = tables.comparison_table([item])
    assert column(table, "similarity") == [f"{item.similarity[c]:.3f}" for c in ((0, 0), (1, 2))]
    assert column(table, "above random") == [f"{expected[c]:+.3f}" for c in ((0, 0), (1, 2))]


def test_each_role_has_a_panel_of_its_own() -> None:
    items = [
        BlockComparison("qkv", "in", 12, 4, (1, 4, 6), numbers(3, 3), 0.05),
        BlockComparison("fc1", "out", 24, 4, (1, 4, 6), numbers(3, 3)[::-1] ** 2, 0.15),
    ]
    figure = plots.draw_blocks(items)
    for axes, item in zip(figure.axes, items, strict=False):
        assert item.role in axes.get_title()
        np.testing.assert_allclose(axes.images[0].get_array(), item.similarity - item.baseline)
        assert [tick.get_text() for tick in axes.get_xticklabels()] == ["1", "4", "6"]


def test_neighbours_are_the_pairs_beside_the_diagonal() -> None:
    similarity = np.array([[9.0, 0.1, 0.6], [0.1, 9.0, 0.3], [0.6, 0.3, 9.0]])
    table = tables.block_table([BlockComparison("qkv", "in", 12, 4, (0, 1, 2), similarity, 0.05)])
    assert column(table, "neighbours") == ["+0.150"]
    assert column(table, "all pairs") == ["+0.283"]


def dimension(name: str, found: int | None, *top1: float) -> IntrinsicDimension:
    curve = tuple(Point(d, value, 0.1) for d, value in zip((0, 1, 10), top1, strict=True))
    return IntrinsicDimension(name, 1000, "model", 75.0, 0.9, curve, found)


def test_a_curve_s_marker_is_filled_where_the_threshold_is_reached() -> None:
    first = dimension("blocks.0.attn", 1, 40.0, 68.0, 70.0)
    second = dimension("blocks.0.mlp", None, 30.0, 35.0, 50.0)
    axes = plots.draw_dimensions([first, second]).axes[0]
    curves = [line for line in axes.lines if len(line.get_xdata()) == 3]
    assert [list(line.get_xdata()) for line in curves] == [[0, 1, 10]] * 2
    assert [list(line.get_ydata()) for line in curves] == [[40, 68, 70], [30, 35, 50]]
    assert all(line.get_markerfacecolor() == "white" for line in curves)
    (filled,) = (line for line in axes.lines if len(line.get_xdata()) == 1)
    assert (list(filled.get_xdata()), list(filled.get_ydata())) == ([1], [68.0])
    assert filled.get_color() == curves[0].get_color() != curves[1].get_color()
    (threshold,) = (line for line in axes.lines if "threshold" in str(line.get_label()))
    assert set(threshold.get_ydata()) == {67.5}
    table = tables.dimension_table([first, second])
    assert column(table, "d_t") == ["1", "> 10"]
    assert column(table, "top-1 % there") == ["68.00", ""]


@pytest.fixture
def ablation() -> Ablation:
    """Two methods whose full accuracies differ."""
    full = {
        "efft1": Cell("efft1", "both", None, 9, 80.0, (80.0,)),
        "efft2": Cell("efft2", "both", None, 9, 50.0, (50.0,)),
    }
    places = [
        ("efft1", "mhsa", None, 72.0),
        ("efft1", "mhsa", (0, 2), 60.0),
        ("efft2", "mhsa", None, 45.0),
        ("efft2", "mhsa", (0, 2), 40.0),
        ("efft2", "ffn", (0, 2), math.nan),
    ]
    cells = tuple(Cell(m, part, span, 5, top1, (top1,)) for m, part, span, top1 in places)
    return Ablation("tiny", full, cells)


def test_a_change_is_against_the_same_method_s_full_adaptation(ablation: Ablation) -> None:
    changes = [ablation.relative_change_percent(cell) for cell in ablation.cells]
    assert changes == pytest.approx([-10, -25, -10, -20, math.nan], nan_ok=True)
    table = tables.ablation_table(ablation)
    assert column(table, "layers") == ["all", "0-2"]
    assert column(table, "efft1 mhsa") == ["-10.00", "-25.00"]
    assert column(table, "efft2 mhsa") == ["-10.00", "-20.00"]
    assert column(table, "efft2 ffn") == ["", "diverged"]


def test_a_bar_stands_at_its_layers_and_is_as_high_as_its_change(ablation: Ablation) -> None:
    axes = plots.draw_ablation(ablation).axes[0]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["all", "0-2"]
    heights: dict[str, list[float]] = {}
    for index, bars in enumerate(axes.containers):
        heights[bars.get_label()] = [bar.get_height() for bar in bars]
        middles = [bar.get_x() + bar.get_width() / 2 for bar in bars]
        assert middles == pytest.approx([(index - 1) * 0.8 / 3, 1 + (index - 1) * 0.8 / 3])
    nan = math.nan
    assert list(heights) == ["efft1, mhsa", "efft2, mhsa", "efft2, ffn"]
    expected = ([-10, -25], [-10, -20], [nan, nan])
    for found, wanted in zip(heights.values(), expected, strict=True):
        assert found == pytest.approx(wanted, nan_ok=True)


def test_scales_stay_with_their_accuracies() -> None:
    top1 = np.array(
        [
            [[70.0, 60.0, 80.0], [65.0, 61.0, 75.0]],
            [[10.0, 30.0, 20.0], [50.0, math.nan, 40.0]],
        ]
    )
    sweep = ScaleSweep(("one", "two"), ("efft1", "efft2"), (10.0, 0.1, 1.0), top1)
    normal = sweep.normalised
    np.testing.assert_allclose(normal[0], [[0.5, 0.0, 1.0], [0.25, 0.05, 0.75]])
    np.testing.assert_allclose(normal[1], [[0.0, 0.5, 0.25], [1.0, 0.0, 0.75]])
    figure: Figure = plots.draw_scales(sweep)
    for m, axes in enumerate(figure.axes):
        assert axes.get_title("left") == sweep.methods[m]
        for t, line in enumerate(axes.lines):
            spread = ("60.0 to 80.0", "10.0 to 50.0")[t]
            assert line.get_label() == f"{sweep.tasks[t]} ({spread} %)"
            np.testing.assert_allclose(line.get_xdata(), [0.1, 1.0, 10.0])
            np.testing.assert_allclose(line.get_ydata(), normal[t, m][[1, 2, 0]])
    table = tables.scale_table(sweep)
    tens = ["70.00 (0.50)", "65.00 (0.25)", "10.00 (0.00)", "50.00 (1.00)"]
    assert column(table, "s = 10") == tens
    assert column(table, "s = 0.1")[-1] == "diverged (0.00)"


def test_blocks_are_compared_on_a_scale_of_the_others() -> None:
    """A block's similarity with itself is 1, and would leave the others one dark blue."""
    similarity = np.array([[1.0, 0.15, 0.25], [0.15, 1.0, 0.1], [0.25, 0.1, 1.0]])
    item = BlockComparison("qkv", "in", 12, 4, (0, 1, 2), similarity, 0.05)
    assert plots.draw_blocks([item]).axes[0].images[0].get_clim() == pytest.approx((0, 0.2))
    small = Comparison("g", "a", "b", "factor", 40, numbers(2, 3) / 10, np.zeros((2, 3)))
    assert plots.draw_comparisons([small]).axes[0].images[0].get_clim() == pytest.approx((0, 0.09))


def test_an_ablation_s_whiskers_are_the_deviations_over_its_seeds() -> None:
    full = {"efft1": Cell("efft1", "both", None, 9, 50.0, (50.0, 50.0))}
    cells = (Cell("efft1", "ffn", None, 5, 40.0, (39.0, 41.0)),)
    (bars,) = plots.draw_ablation(Ablation("tiny", full, cells)).axes[0].containers[1:]
    (segment,) = bars.errorbar[2][0].get_segments()
    assert sorted(segment[:, 1]) == pytest.approx([-20 - 2 * 2**0.5, -20 + 2 * 2**0.5])


def test_one_data_set_s_scales_are_shown_as_accuracies() -> None:
    sweep = ScaleSweep(("one",), ("efft1",), (1.0, 10.0), np.array([[[60.0, 62.0]]]))
    (axes,) = plots.draw_scales(sweep).axes
    assert list(axes.lines[0].get_ydata()) == [60.0, 62.0]
    assert "%" in axes.get_ylabel()
