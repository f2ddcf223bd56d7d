"""The demo's picture: each method's numbers are its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from efft_kernels.demo import picture


def test_each_point_has_its_own_place_bar_and_words(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    figures: list[Any] = []
    save = Figure.savefig

    def kept(figure: Figure, *args: Any, **kwargs: Any) -> None:
        figures.append(figure)
        save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", kept)
    points = [
        picture.Point("linear", 400, 71.0, 1.0, [70.0, 72.0]),
        picture.Point("full", 90_000, 94.0, 2.0, [92.0, 96.0]),
        picture.Point("efft1", 5_000, 90.0, 3.0, [87.0, 93.0]),
        picture.Point("efft2", 20_000, 92.5, 0.5, [92.0, 93.0]),
    ]
    picture.draw(points, "title", tmp_path / "picture.png")
    (axes,) = figures[0].axes
    assert axes.get_xscale() == "log"
    assert len(axes.containers) == len(points)
    dots = [item for item in axes.collections if len(item.get_offsets()) == 2]
    names = ["linear probe", "full fine-tuning", "efft1", "efft2"]
    shown = set()
    drawn = zip(points, names, axes.containers, dots, axes.texts, strict=True)
    for point, name, bar, seeds, text in drawn:
        marker, _, (segments,) = bar
        assert (list(marker.get_xdata()), list(marker.get_ydata())) == (
            [point.trained_params],
            [point.top1_mean],
        )
        ends = sorted(y for _, y in segments.get_segments()[0])
        assert ends == [point.top1_mean - point.top1_std, point.top1_mean + point.top1_std]
        assert [y for _, y in seeds.get_offsets()] == list(point.top1)
        assert text.xy == (point.trained_params, point.top1_mean)
        words = f"{name}\n{point.top1_mean:.1f}%, {point.trained_params:,} parameters"
        assert text.get_text() == words
        shown.add((marker.get_color(), marker.get_marker()))
    assert len(shown) == len(points)
