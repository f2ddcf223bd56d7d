"""efft-kernels analyse: from files and folders to tables, JSON and pictures; errors in one line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner, Result

from efft_kernels import EFFT2, LoRA, attach
from efft_kernels.cli.analyse import app
from efft_kernels.training import digits

SMALL = ["--epochs", "1", "--batch-size", "8"]


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refused(result: Result, message: str) -> None:
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert re.search(message, result.stderr), result.stderr


@pytest.fixture
def adapters(make_vit: Any, randomize: Any, tmp_path: Path) -> list[Path]:
    paths = []
    for seed in range(2):
        adapter = attach(make_vit(), EFFT2(rank=4))
        torch.manual_seed(seed)
        randomize(adapter.bank)
        paths.append(tmp_path / f"{seed}.safetensors")
        adapter.save(paths[-1])
    return paths


@pytest.fixture
def images(tmp_path: Path) -> Path:
    root = tmp_path / "colours"
    for name, colour in (("blue", (20, 30, 220)), ("red", (230, 20, 30))):
        (root / name).mkdir(parents=True)
        for index in range(10):
            pixel = tuple(max(0, channel - 2 * index) for channel in colour)
            Image.new("RGB", (16, 16), pixel).save(root / name / f"{index}.png")
    return root


@pytest.fixture
def folder_options(images: Path) -> list[str]:
    model = ["--model", "test_vit", "--img-size", "32", "--no-pretrained", "--device", "cpu"]
    return ["--data", str(images), *model, *SMALL]


def test_one_adapter_is_compared_within(adapters: list[Path], tmp_path: Path) -> None:
    output = tmp_path / "out"
    result = run("subspace", adapters[0], "--output", output, "--max", "3")
    assert result.exit_code == 0, result.output
    pictures = {
        f"{name}.{suffix}" for name in ("subspace", "subspace-blocks") for suffix in ("png", "svg")
    }
    assert {path.name for path in output.iterdir()} == {"subspace.json"} | pictures
    data = json.loads((output / "subspace.json").read_text())
    assert len(data["comparisons"]) == 4
    assert len(data["comparisons"][0]["above_random"]) == 3
    assert {item["role"] for item in data["blocks"]} == {"qkv", "o", "fc1", "fc2"}
    assert "above random" in result.output


def test_two_adapters_are_compared(adapters: list[Path], tmp_path: Path) -> None:
    result = run("subspace", *adapters, "--output", tmp_path / "out")
    assert result.exit_code == 0, result.output
    data = json.loads((tmp_path / "out" / "subspace.json").read_text())
    assert {item["kind"] for item in data["comparisons"]} == {"seeds"}
    assert data["blocks"] == []


def test_subspace_errors(
    adapters: list[Path], make_vit: Any, randomize: Any, tmp_path: Path
) -> None:
    refused(run("subspace", tmp_path / "absent"), "found none at")
    (tmp_path / "text").write_text("no adapter")
    refused(run("subspace", tmp_path / "text"), "whole safetensors file")
    attach(make_vit(), EFFT2(rank=2)).save(tmp_path / "fresh")
    refused(run("subspace", tmp_path / "fresh"), "it spans no subspace")
    (tmp_path / "file").touch()
    refused(run("subspace", adapters[0], "--output", tmp_path / "file"), "must be a folder")
    single = attach(make_vit(depth=1), LoRA(rank=2))
    randomize(single.bank)
    single.save(tmp_path / "single")
    refused(run("subspace", tmp_path / "single"), "both MHSA and FFN, or several blocks")


def test_intrinsic_dimension_of_a_folder(folder_options: list[str], tmp_path: Path) -> None:
    output = tmp_path / "out"
    options = ["--dims", "0,2", "--exhaustive", "--theta-lr", "0.1", "--output", str(output)]
    result = run("intrinsic-dimension", *folder_options, *options)
    assert result.exit_code == 0, result.output
    data = json.loads((output / "intrinsic-dimension.json").read_text())
    assert [item["module"] for item in data["results"]] == ["blocks.0.attn", "blocks.0.mlp"]
    assert [point["dim"] for point in data["results"][0]["curve"]] == [0, 2]
    assert (output / "intrinsic-dimension.svg").is_file()
    assert "Local intrinsic dimension" in result.output


def test_ablation_of_a_folder(folder_options: list[str], tmp_path: Path) -> None:
    output = tmp_path / "out"
    options = ["--method", "efft2", "--rank", "2", "--layers", "all,0", "--parts", "mhsa"]
    result = run("ablation", *folder_options, *options, "--output", output)
    assert result.exit_code == 0, result.output
    data = json.loads((output / "ablation.json").read_text())
    assert [cell["layers"] for cell in data["cells"]] == [None, [0, 0]]
    assert data["settings"]["methods"][0]["rank"] == 2
    assert data["settings"]["model"] == "test_vit"
    assert (output / "ablation.png").is_file()


def test_scales_of_two_folders(folder_options: list[str], images: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    options = ["--data", str(images), "--method", "efft2", "--rank", "2", "--scale", "1,10"]
    result = run("scales", *folder_options, *options, "--output", output)
    assert result.exit_code == 0, result.output
    data = json.loads((output / "scales.json").read_text())
    assert data["tasks"] == ["colours", "colours"]
    assert data["scales"] == [1, 10]


def test_the_digits(monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setattr(digits, "SOURCE_TRAIN_SHARE", 0.05)
    monkeypatch.setattr(digits, "TRAIN_PER_CLASS", 4)
    options = ["--digits", "--source-epochs", "1", "--epochs", "1", "--device", "cpu"]
    chosen = ["--method", "efft2", "--rank", "2", "--scale", "1"]
    result = run("scales", *options, *chosen, "--output", tmp_path)
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "scales.json").read_text())["tasks"] == ["digits 5 to 9"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ablation"], "either --data FOLDER or --digits"),
        (["ablation", "--data", "absent"], "nothing there"),
        (["ablation", "--data", "a", "--digits"], "either"),
        (["ablation", "--data", "a", "--data", "b"], "given once"),
        (["ablation", "--digits", "--layers", "0:2"], "ranges such as"),
        (["ablation", "--digits", "--method", "adam"], "method must be one of"),
        (["ablation", "--digits", "--epochs", "0"], "epochs must be at least 1"),
        (["scales", "--digits", "--scale", "big"], "scale must be numbers"),
        (["intrinsic-dimension", "--digits", "--dims", "1,x"], "dims must be whole numbers"),
    ],
)
def test_errors_are_one_line(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    refused(run(*arguments), message)
