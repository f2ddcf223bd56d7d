"""Groups of options: what typer sees of them, and what the command gets."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, get_type_hints

import pytest
import typer
from typer.testing import CliRunner

from efft_kernels.cli import parse
from efft_kernels.cli.options import Amp, with_options
from efft_kernels.cli.train import TrainOptions
from efft_kernels.training.settings import TrainSettings


@dataclass(frozen=True)
class Group:
    needed: Annotated[Path, typer.Option(help="Say where.")]
    count: Annotated[int, typer.Option("--how-many")] = 3


def invoke(*arguments: str) -> tuple[int, str, list[object]]:
    """(exit code, output, what the command got)."""
    got: list[object] = []

    @with_options
    def command(*, first: bool = False, group: Group, last: str = "z") -> None:
        """What it does."""
        got.extend((first, group, last))

    app = typer.Typer()
    app.command()(command)
    result = CliRunner().invoke(app, arguments)
    return result.exit_code, result.output, got


def test_a_group_arrives_whole() -> None:
    assert invoke("--needed", "here")[2] == [False, Group(Path("here")), "z"]
    given = ("--last", "y", "--how-many", "7", "--first", "--needed", "there")
    assert invoke(*given)[2] == [True, Group(Path("there"), 7), "y"]


def test_its_options_are_checked_and_shown_in_their_place() -> None:
    assert invoke()[0] == 2
    assert invoke("--needed", "here", "--how-many", "many")[0] == 2
    text = invoke("--help")[1]
    places = [text.index(word) for word in ("What it does", "--first", "--needed", "--how-many")]
    assert places == sorted(places)
    assert places[-1] < text.index("--last")
    assert "Say where." in text


def test_train_has_an_option_for_every_setting() -> None:
    options, settings = get_type_hints(TrainOptions), get_type_hints(TrainSettings)
    parsed = {"rank": str, "layers": str | None, "targets": str | None, "amp": Amp}
    assert options == settings | parsed


def test_train_options_become_settings() -> None:
    options = TrainOptions(
        data=Path("images"), rank="8,16", layers="0-2,5", targets="mhsa,fc1", amp=Amp.float16
    )
    assert options.settings() == TrainSettings(
        data=Path("images"),
        rank=(8, 16),
        layers=(0, 1, 2, 5),
        targets=("mhsa", "fc1"),
        amp="float16",
        workers=2,
    )
    assert options.default_output().name == "images-vit_tiny_patch16_224-efft2-r8x16"


def test_texts_become_numbers() -> None:
    assert parse.rank("16") == 16
    assert parse.integers("0,10", "dims") == (0, 10)
    assert parse.floats("0.1,1", "scale") == (0.1, 1.0)
    assert parse.blocks("0-3, 11") == (0, 1, 2, 3, 11)
    assert parse.blocks("11,2-4,3,0-2,11") == (0, 1, 2, 3, 4, 11)
    assert parse.block_ranges("all, 0-2,5") == [None, (0, 2), (5, 5)]
    for text in ("", "-1", "2-", "x", "1-2-3", "5-3", "0-999999999999", "9" * 5000, "10000"):
        with pytest.raises(ValueError, match="layers must be numbers and ranges"):
            parse.blocks(text)
        with pytest.raises(ValueError, match="layers must be ranges such as"):
            parse.block_ranges(text)


def test_a_long_text_is_not_repeated_whole() -> None:
    for read in (parse.rank, parse.blocks, lambda text: parse.integers(text, "dims")):
        with pytest.raises(ValueError) as caught:
            read("x" * 10_000)
        assert len(str(caught.value)) < 250
