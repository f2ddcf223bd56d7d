"""`efft-kernels bench`."""

from __future__ import annotations

from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from benchmarks import operators, roofline
from efft_kernels.cli import bench


@pytest.fixture
def app() -> typer.Typer:
    app = typer.Typer()
    app.command()(bench.bench)
    return app


def test_it_prints_the_table(app: typer.Typer, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = {"Tiny": [("qkv", 13, 17, 33, 3)]}
    monkeypatch.setattr(operators, "models", lambda images: layers)
    peaks = roofline.Peaks(0.1, 20.0)
    monkeypatch.setattr(operators, "measure_peaks", lambda *_: peaks)
    result = CliRunner().invoke(app, ["--model", "Tiny", "--rank", "3", "--seconds", "0"])
    assert result.exit_code == 0, result.output
    assert "Tiny qkv" in result.output and "13" in result.output


def test_an_unknown_model_is_an_error(app: typer.Typer) -> None:
    result = CliRunner().invoke(app, ["--model", "VGG"])
    assert result.exit_code == 2 and "ViT-B/16" in result.output


def test_outside_a_clone_it_says_so(
    app: typer.Typer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(bench, "_CLONE", tmp_path)
    result = CliRunner().invoke(app, [])
    assert result.exit_code == 2 and "make setup" in result.output
