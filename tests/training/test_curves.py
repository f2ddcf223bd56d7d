"""A run's curves: the picture, and what TensorBoard is told."""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from efft_kernels.training import curves
from efft_kernels.training.curves import TensorBoardLog, draw_curves
from efft_kernels.training.run import EpochRow

ROWS = [EpochRow(epoch, 1.0 / epoch, 40.0 + epoch, 1e-3, 2.0) for epoch in (1, 2, 3)]


@pytest.mark.parametrize("rows", [ROWS[:1], ROWS])
def test_the_picture_is_written(tmp_path: Path, rows: list[EpochRow]) -> None:
    draw_curves(rows, len(rows), tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.size == (1050, 450)
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 50
    assert [path.name for path in tmp_path.iterdir()] == ["curves.png"]


def test_a_perfect_run_has_no_percents_above_a_hundred(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = []
    make = curves.new_figure
    monkeypatch.setattr(
        curves, "new_figure", lambda *size: figures.append(make(*size)) or figures[0]
    )
    draw_curves(
        [EpochRow(1, 1.0, 30.0, 1e-3, 2.0), EpochRow(2, 0.5, 100.0, 1e-3, 2.0)],
        2,
        tmp_path / "c.png",
    )
    loss, accuracy = (axes.get_ylim() for axes in figures[0].axes)
    assert accuracy[0] < 30 and 100 < accuracy[1] < 101
    assert loss[1] > 1  # as matplotlib chose it
    for axes in figures[0].axes:
        curve, kept = axes.lines
        assert axes.get_subplotspec().get_gridspec().get_geometry() == (1, 2)
        assert axes.get_title() and axes.get_xlabel().startswith("epoch")
        assert list(curve.get_xdata()) == [1, 2] and set(kept.get_xdata()) == {2}
        assert (curve.get_markersize(), kept.get_linewidth()) == (3, 0.8)
        assert not axes.spines["top"].get_visible()
    assert all(place % 1 == 0 for axes in figures[0].axes for place in axes.get_xticks())


class Writer:
    """What torch.utils.tensorboard has."""

    made: list[Writer] = []  # noqa: RUF012

    def __init__(self, folder: str, purge_step: int) -> None:
        self.folder, self.purge_step, self.closed = folder, purge_step, False
        self.scalars: list[tuple[str, float, int]] = []
        Writer.made.append(self)

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.scalars.append((name, value, step))

    def flush(self) -> None:
        self.flushed = len(self.scalars)

    def close(self) -> None:
        self.closed = True


def test_tensorboard_is_told_every_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *more: object())
    log = TensorBoardLog(tmp_path, done=1)
    log(ROWS[1])
    log.close()
    (writer,) = Writer.made
    assert (writer.folder, writer.purge_step, writer.closed) == (str(tmp_path), 2, True)
    assert writer.scalars == [
        ("train/loss", 0.5, 2),
        ("train/lr", 1e-3, 2),
        ("val/top1_percent", 42.0, 2),
        ("seconds", 2.0, 2),
    ]
    assert writer.flushed == 4
    TensorBoardLog(tmp_path)
    assert Writer.made[-1].purge_step == 1


def test_without_tensorboard_the_way_out_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *a: None if name == "tensorboard" else find(name)
    )
    with pytest.raises(ValueError, match=r"pip install 'efft-kernels\[tensorboard\]'"):
        TensorBoardLog(tmp_path / "log")
    assert not (tmp_path / "log").exists()
