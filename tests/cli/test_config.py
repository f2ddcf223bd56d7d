"""Options from a file, and TensorBoard's absence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from efft_kernels.cli.commands import COMMANDS, app
from efft_kernels.training.settings import TrainSettings

YAML = """
data: images
batch-size: 8
lr: 2e-3
rank: [8, 16]
layers: [0, 1, 5]
targets: [mhsa, fc1]
augment: true
pretrained: false
ffn-rank: 4
checkpoint:
keep: best
output: out
"""
TOML = """
data = "images"
batch_size = 8
lr = 2e-3
rank = "8,16"
layers = "0-1,5"
targets = "mhsa,fc1"
augment = true
pretrained = false
ffn_rank = 4
keep = "best"
output = "out"
"""
MEANT: dict[str, Any] = {
    "batch_size": 8,
    "lr": 2e-3,
    "rank": (8, 16),
    "layers": (0, 1, 5),
    "targets": ("mhsa", "fc1"),
    "augment": True,
    "pretrained": False,
    "options": {"ffn_rank": 4},
    "keep": "best",
}


def settings_of(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> tuple[Result, Any]:
    """What train would do."""
    got: list[Any] = []
    monkeypatch.setattr("efft_kernels.cli.train._train", lambda *given: got.extend(given))
    result = CliRunner().invoke(app, ["train", *map(str, arguments)])
    return result, got


@pytest.mark.parametrize("suffix", [".yaml", ".yml", ".toml", ".json"])
def test_a_file_gives_what_the_command_line_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    path = tmp_path / f"options{suffix}"
    if suffix == ".json":
        content = MEANT | MEANT["options"] | {"data": "images", "output": "out"}
        del content["options"]
        path.write_text(json.dumps(content))
    else:
        path.write_text(TOML if suffix == ".toml" else YAML)
    result, (settings, output, resume, log_dir, _) = settings_of(monkeypatch, "--config", path)
    assert result.exit_code == 0, result.output
    assert settings == TrainSettings(data=Path("images"), workers=2, **MEANT)
    assert (output, resume, log_dir) == (Path("out"), False, None)

    more = ("--batch-size", 3, "--no-augment", "--rank", 2, "--config", path)
    _, (settings, *_) = settings_of(monkeypatch, *more)
    by_hand = MEANT | {"batch_size": 3, "augment": False, "rank": 2}
    assert settings == TrainSettings(data=Path("images"), workers=2, **by_hand)


def test_a_file_wins_over_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "options.yaml"
    path.write_text("data: images\nrecipe: vtab\ntask: svhn\nepochs: 7\n")
    _, (settings, *_) = settings_of(monkeypatch, "--config", path)
    assert (settings.epochs, settings.batch_size, settings.recipe) == (7, 64, "vtab")


def test_every_option_of_train_may_stand_in_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {param.name for param in COMMANDS["train"].load("train").params}
    path = tmp_path / "options.json"
    path.write_text(json.dumps(dict.fromkeys(names - {"config", "help"}) | {"data": "images"}))
    assert settings_of(monkeypatch, "--config", path)[0].exit_code == 0


# Each list nine times the one before: the last is 200 MB as text.
BOMB = "rank: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join(['*' + old] * 9)}]\n"
    for old, new in zip("abcdefg", "bcdefgh", strict=True)
)
BOMB += "method: *h\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "epoch: 3\nnonsense: 1\n",
            "options of the command, got epoch (did you mean epochs?), nonsense",
        ),
        ("config: x.yaml\n", "options of the command, got config"),
        ("batch-size: 1\nbatch_size: 2\n", "config must name batch_size once"),
        ("- a\n- b\n", "config must hold options by name"),
        ("a: [b\n", "config must be readable"),
        ("rank: {a: 1}\n", "rank must be a text, a number or a list of these, got {'a': 1}"),
        ("lr: -1\ndata: x\n", "lr must be above 0, got -1.0"),
        pytest.param("rank: " + "[" * 3000 + "]" * 3000, "config must be readable", id="deep"),
        pytest.param(BOMB, "method must be a text, a number or a list of these, got [[", id="bomb"),
    ],
)
def test_a_wrong_file_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, message: str
) -> None:
    path = tmp_path / "options.yaml"
    path.write_text(text)
    result, got = settings_of(monkeypatch, "--config", path)
    assert (result.exit_code, got) == (2, [])
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert message in line


def test_a_file_that_is_not_there_or_of_another_kind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result, _ = settings_of(monkeypatch, "--config", tmp_path / "absent.yaml")
    assert "config must be a file, got" in result.stderr
    (tmp_path / "options.ini").write_text("")
    result, _ = settings_of(monkeypatch, "--config", tmp_path / "options.ini")
    assert "config must end in .yaml, .yml, .toml, .json, got" in result.stderr
