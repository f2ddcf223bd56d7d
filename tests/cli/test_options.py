"""Groups of options: what typer sees of them, and what the command gets."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import pytest
import typer
from typer.testing import CliRunner

from efft_kernels.cli import parse
from efft_kernels.cli.method_options import MethodOptions, given, parameters
from efft_kernels.cli.options import Amp, Given, with_options
from efft_kernels.cli.train import TrainOptions
from efft_kernels.methods import EFFT2, METHODS
from efft_kernels.training.recipe import recipe_for
from efft_kernels.training.settings import OWN_OPTIONS, TrainSettings


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


def test_a_command_knows_what_was_given() -> None:
    got: list[object] = []

    @with_options
    def command(*, group: Group, fields: MethodOptions, given: Given) -> None:
        got.extend((fields, given))

    app = typer.Typer()
    app.command()(command)
    arguments = ["--needed", "here", "--rank", "2:4", "--no-learn-scale"]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert got == [{"rank": [2, 4], "learn_scale": False}, {"needed", "rank", "learn_scale"}]
    refused = CliRunner().invoke(app, ["--needed", "here", "--ffn-rank", "x"])
    assert refused.exit_code == 2
    assert "error: ffn_rank must be a number R or two" in refused.stderr


def test_train_has_an_option_for_every_setting() -> None:
    options, settings = get_type_hints(TrainOptions), get_type_hints(TrainSettings)
    parsed = {"layers": str | None, "targets": str | None, "amp": Amp}
    from_methods = {*OWN_OPTIONS, "options"}
    assert options == {k: v for k, v in (settings | parsed).items() if k not in from_methods}


def test_train_options_become_settings() -> None:
    options = TrainOptions(
        data=Path("images"),
        layers="0-2,5",
        targets="mhsa,fc1",
        amp=Amp.float16,
        normalize="imagenet",
    )
    settings = options.settings(given({"rank": "8,16", "ffn_rank": "4", "init": None}))
    assert settings == TrainSettings(
        data=Path("images"),
        rank=(8, 16),
        options={"ffn_rank": 4},
        layers=(0, 1, 2, 5),
        targets=("mhsa", "fc1"),
        amp="float16",
        normalize="imagenet",
        workers=2,
    )
    assert settings.method_config() == EFFT2(rank=(8, 16), ffn_rank=4)
    assert options.default_output(settings).name == "images-vit_tiny_patch16_224-efft2-r8x16"


TEXTS: dict[str, Any] = {  # field → what is written on the command line, and what it means
    "rank": ("3", 3),
    "ffn_rank": ("4,2", (4, 2)),
    "layer_rank": (5, 5),
    "products": (2, 2),
    "scale": (0.5, 0.5),
    "dropout": (0.2, 0.2),
    "init": ("u", "u"),
    "ffn_init": ("v", "v"),
    "factor_init": ("release", "release"),
    "attention_side": ("in", "in"),
    "cores": ("shared", "shared"),
    "learn_scale": (True, True),
    "matrices": ("q,fc1", ("q", "fc1")),
}


@pytest.mark.parametrize("name", METHODS)
def test_every_field_of_every_method_is_an_option(name: str) -> None:
    fields = [field.name for field in dataclasses.fields(METHODS[name])]
    assert set(fields) <= {parameter.name for parameter in parameters()}
    options = given({field: TEXTS[field][0] for field in fields})
    settings = TrainOptions(data=Path("images"), method=name).settings(options)
    assert settings.method_config() == METHODS[name](**{f: TEXTS[f][1] for f in fields})


def test_help_of_a_methods_field_is_the_methods_own() -> None:
    helps = {p.name: p.annotation.__metadata__[0].help for p in parameters()}
    assert helps["layer_rank"] == (
        "the mode-1 rank r of P and C; by default the larger of (r1, r2) (fact_tk)."
    )
    assert all(text[0] not in " (." for text in helps.values())


def test_a_recipe_is_followed_where_nothing_is_given() -> None:
    options = TrainOptions(data=Path("images"), recipe="vtab", task="svhn", epochs=7, lr=0.5)
    recipe = recipe_for("vtab", "svhn")
    assert options.settings() == recipe.settings(Path("images"), workers=2)
    by_hand = options.settings(given({"scale": 3.0, "ffn_init": "u"}), {"epochs"})
    expected = {"epochs": 7, "scale": 3.0, "options": {"ffn_init": "u"}, "workers": 2}
    assert by_hand == recipe.settings(Path("images"), **expected)
    with pytest.raises(ValueError, match="task must be left out without --recipe, got svhn"):
        TrainOptions(data=Path("images"), task="svhn").settings()


def test_texts_become_numbers() -> None:
    assert parse.rank("16") == 16
    assert parse.rank("2:4,8:16") == [2, (4, 8), 16]
    assert parse.rank("0:4") == [0, 4]
    for text in ("", "1,2,3", "4:", "4:x", "1;2"):
        with pytest.raises(ValueError, match="ffn_rank must be a number R or two"):
            parse.rank(text, "ffn_rank")
    assert given({"matrices": "all", "rank": None}) == {"matrices": None}
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
