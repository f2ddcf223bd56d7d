"""`efft-kernels papers`: the tables and figures of the papers, from facts and formulas."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from efft_kernels.cli import app


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    output = tmp_path_factory.mktemp("runs") / "papers"
    return output, CliRunner(env={"COLUMNS": "100"}).invoke(
        app, ["papers", "--output", str(output)]
    )


def test_what_is_printed_wrongly_is_marked(made: tuple[Path, Result]) -> None:
    output, result = made
    assert result.exit_code == 0, result.output
    text = (output / "papers.md").read_text(encoding="utf-8")
    for line in (
        "| FacT-TT r=16 (printed: FacT-TK) [1] | 77.4 |",  # EFFT, Table 2
        "LoRA: 74.5 is printed, the printed cells give 74.60.",
        "EFFT1 r=16: 0.076 is printed, right is 0.0707. 5dr + 3Lr² = 70,656",
        "1.95B is printed, right is 0.195B",
        "284,783,77 [",
        "RPB Tuning: 85.3 is printed, the printed cells give 85.37.",
        "| kadaptation Table 2, ViT #params | Linear-probing | 86,697 | 129,961 |",
        "| [1] efft, section 4.1 | top performance in 14 of 19 tasks | 3 of 19, and tied",
    ):
        assert line in text
    assert "75.9" in result.output  # on the terminal too
    assert max(map(len, result.output.splitlines())) <= 100


def test_figures_and_data(made: tuple[Path, Result]) -> None:
    output, _ = made
    figures = {path.stem for path in output.glob("*.svg")}
    assert figures == {path.stem for path in output.glob("*.png")}
    assert figures >= {
        "efft-figure-1",
        "efft-figure-6",
        "fact-figure-1",
        "fact-figure-4",
        "fact-figure-5",
        "kadaptation-figure-1",
    }
    svg = (output / "fact-figure-1.svg").read_text(encoding="utf-8")
    assert "FacT-TT r=4: 73.5 %, 8K" in svg
    content = json.loads((output / "papers.json").read_text(encoding="utf-8"))
    assert len(content["counts"]) > 60
    assert {item["follows"] for item in content["means"]} == {True, False}


def test_a_file_in_the_way_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "papers").write_text("mine")
    result = CliRunner().invoke(app, ["papers", "--output", str(tmp_path / "papers")])
    assert result.exit_code == 2
    assert "output must be a folder" in result.stderr
    assert (tmp_path / "papers").read_text() == "mine"
