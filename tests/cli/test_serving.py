"""predict, merge and export: what a run left, used without its training."""

from __future__ import annotations

import csv
import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from timm.data import create_transform, resolve_model_data_config
from torch import nn
from typer.testing import CliRunner, Result

from efft_kernels import Adapter
from efft_kernels.cli.commands import app
from efft_kernels.training.export import export
from efft_kernels.training.run import fit, prepare
from efft_kernels.training.settings import TrainSettings
from efft_kernels.training.trained import MODEL_KEY, open_trained

CLASSES = ["blue", "green", "red"]


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(1)
    for channel, name in enumerate(("red", "green", "blue")):
        (root / name).mkdir()
        for index in range(6):
            pixels = generator.integers(0, 200, (20, 16, 3), dtype=np.uint8)
            pixels[..., channel] += 55
            Image.fromarray(pixels).save(root / name / f"{index}.png")
    return root


@pytest.fixture(scope="module")
def run(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a short run whose ΔW is large enough to show."""
    output = tmp_path_factory.mktemp("runs") / "run"
    settings = TrainSettings(
        data=images,
        rank=4,
        scale=10.0,
        epochs=2,
        batch_size=6,
        img_size=32,
        normalize="imagenet",
        pretrained=False,
        device="cpu",
        val_split=0.34,
        lr=1e-2,
    )
    fit(prepare(settings, output))
    return output


@pytest.fixture(scope="module")
def merged(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("merged") / "model"
    result = invoke("merge", run, "--output", folder, "--device", "cpu")
    assert result.exit_code == 0, result.output
    return folder


def logits(model: nn.Module, path: Path) -> torch.Tensor:
    """By nothing but timm."""
    config = resolve_model_data_config(model)
    image = create_transform(**config, is_training=False)(Image.open(path).convert("RGB"))
    with torch.inference_mode():
        return model.eval()(image[None])[0]


def test_a_merged_model_is_timms_own(images: Path, run: Path, merged: Path) -> None:
    adapted = open_trained(run, device="cpu")
    plain = timm.create_model(f"local-dir:{merged}", pretrained=True)
    assert plain.pretrained_cfg["label_names"] == CLASSES
    image = images / "red" / "0.png"
    with torch.inference_mode():
        expected = adapted.model(adapted.transform(Image.open(image))[None])[0]
    found = logits(plain, image)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    base = Adapter(adapted.model).detach()
    with torch.inference_mode():
        without = base(adapted.transform(Image.open(image))[None])[0]
    assert (without - expected).abs().max() > 1e-2  # ΔW counts
    assert plain.state_dict().keys() == base.state_dict().keys()
    with safe_open(merged / "model.safetensors", framework="pt") as file:
        facts = json.loads(file.metadata()[MODEL_KEY])
    assert (facts["model"], facts["classes"]) == ("vit_tiny_patch16_224", CLASSES)


@pytest.mark.parametrize("kind", ["folder", "adapter", "merged", "merged file"])
def test_predictions_are_the_models(
    images: Path, run: Path, merged: Path, tmp_path: Path, kind: str
) -> None:
    sources = {"adapter": run / "adapter.safetensors", "merged": merged}
    sources |= {"merged file": merged / "model.safetensors", "folder": run}
    (tmp_path / "list.txt").write_text(f"{images / 'red' / '0.png'}\n\n")
    output = tmp_path / "found.csv"
    given = (images / "blue", tmp_path / "list.txt", images / "green" / "3.png")
    options = ("--output", output, "--top-k", 2, "--batch-size", 4, "--workers", 0)
    result = invoke("predict", sources[kind], *given, *options, "--device", "cpu")
    assert result.exit_code == 0, result.output
    rows = list(csv.DictReader(output.open(newline="")))
    paths = [images / "blue" / f"{n}.png" for n in range(6)]
    paths += [images / "red" / "0.png", images / "green" / "3.png"]
    assert [row["path"] for row in rows] == [str(path) for path in paths]
    plain = timm.create_model(f"local-dir:{merged}", pretrained=True)
    for row, path in zip(rows, paths, strict=True):
        top = logits(plain, path).softmax(-1).topk(2)
        assert [row["class_1"], row["class_2"]] == [CLASSES[i] for i in top.indices]
        found = [float(row["probability_1"]), float(row["probability_2"])]
        assert found == pytest.approx(top.values.tolist(), abs=1e-4)
    assert set(rows[0]) == {"path", "class_1", "probability_1", "class_2", "probability_2"}


def test_unreadable_images_are_named_and_the_rest_is_there(
    images: Path, merged: Path, tmp_path: Path
) -> None:
    for name in ("a", "c"):
        (tmp_path / f"{name}.png").write_bytes((images / "red" / "0.png").read_bytes())
    (tmp_path / "b.png").write_bytes(b"no image")
    (tmp_path / "notes.md").write_text("not looked at")
    result = invoke("predict", merged, tmp_path, "--workers", 0, "--device", "cpu")
    assert result.exit_code == 1
    lines = result.stdout.splitlines()
    assert lines[0].startswith("path,class_1,probability_1,class_2")
    assert [line.split(",")[0] for line in lines[1:]] == [
        str(tmp_path / "a.png"),
        str(tmp_path / "c.png"),
    ]
    left_out = f"note: left out: cannot read image {tmp_path / 'b.png'}"
    assert f"{left_out} (UnidentifiedImageError: cannot identify image file the file)" in (
        result.stderr
    )
    assert "error: 1 of 3 images could not be read" in result.stderr
    again = invoke(
        *("predict", merged, tmp_path, "--workers", 0, "--device", "cpu", "--skip-bad-images")
    )
    assert again.exit_code == 0 and again.stdout == result.stdout and left_out in again.stderr


@pytest.mark.parametrize("command", ["predict", "merge", "export"])
@pytest.mark.parametrize("name", ["model.onnx", "model.pt2"])
def test_a_program_is_not_opened(command: str, name: str, images: Path, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"a program")
    last = images if command == "predict" else f"--output={tmp_path / 'out.safetensors'}"
    result = invoke(command, tmp_path / name, last)
    assert result.exit_code == 2
    assert "source must be a run's folder, its adapter.safetensors or a merged" in result.stderr


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "7",
        "[]",
        '["model", "classes", "img_size", "normalize"]',
        pytest.param("[" * 10**5, id="deep"),
    ],
)
def test_a_header_of_other_text_is_one_line(tmp_path: Path, text: str) -> None:
    source = tmp_path / "model.safetensors"
    save_file({"weight": torch.ones(1)}, source, {MODEL_KEY: text})
    with pytest.raises(ValueError, match=r"source must have a readable header, got .*model"):
        open_trained(source)


def test_exports_compute_what_the_model_does(
    images: Path, run: Path, merged: Path, tmp_path: Path
) -> None:
    plain = timm.create_model(f"local-dir:{merged}", pretrained=True).eval()
    noise = torch.randn(5, 3, 32, 32)
    with torch.inference_mode():
        expected = plain(noise)
    path = tmp_path / "model.pt2"
    result = invoke("export", run, "--output", path, "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert "images of 3×32×32" in result.stdout
    extra = {MODEL_KEY: ""}
    program = torch.export.load(path, extra_files=extra)
    assert json.loads(extra[MODEL_KEY])["classes"] == CLASSES
    found = program.module()(noise)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)

    path = tmp_path / "model.safetensors"
    assert invoke("export", merged, "--output", path).exit_code == 0
    again = open_trained(path, device="cpu")
    with torch.inference_mode():
        assert torch.equal(again.model(noise), expected)


def test_onnx_names_what_is_missing(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *more: None if name == "onnx" else find(name)
    )
    result = invoke("export", run, "--output", tmp_path / "model.onnx")
    assert result.exit_code == 2
    assert "onnx" in result.stderr
    assert "pip install 'efft-kernels[onnx]'" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_onnx_file_names_the_classes(
    merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With an exporter in the place of torch's, which may not be installed whole."""
    calls: list[Any] = []
    program = SimpleNamespace(
        model=SimpleNamespace(metadata_props={}), save=lambda path: Path(path).write_text("graph")
    )

    def exporter(*args: Any, **options: Any) -> Any:
        calls.append(args)
        return program

    def find(name: str, *more: Any) -> Any:
        return None if name == "onnxruntime" else object()

    trained = open_trained(merged, merge=True, device="cpu")
    monkeypatch.setattr("torch.onnx.export", exporter)
    monkeypatch.setattr("importlib.util.find_spec", find)
    path = tmp_path / "model.onnx"
    assert export(trained, path) is None
    ((exported, (images,)),) = calls
    assert isinstance(exported, torch.export.ExportedProgram)
    assert images.shape == (2, 3, 32, 32)
    assert json.loads(program.model.metadata_props[MODEL_KEY])["classes"] == CLASSES
    assert [each.name for each in tmp_path.iterdir()] == ["model.onnx"]
    monkeypatch.setattr("efft_kernels.training.export.MOST_ONNX_BYTES", 1000)
    with pytest.raises(ValueError, match=r"output must be a \.pt2 file, as ONNX takes at most"):
        export(trained, path)


def test_an_onnx_file_computes_what_the_model_does(merged: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    result = invoke("export", merged, "--output", tmp_path / "model.onnx", "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert "logits within" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["predict", "absent", "x.png"], "source must be a file or a folder, got absent"),
        (["predict", "{run}", "absent"], "images must be images, folders or lists, got absent"),
        (["predict", "{run}", "{empty}"], "images must be at least one image, got none in"),
        (
            ["predict", "{run}", "{images}", "--top-k", "4"],
            "top_k must be within 1..3, the number of classes, got 4",
        ),
        (["predict", "{empty}", "{images}"], "source must be a run's folder or a merged model"),
        (["merge", "{run}", "--output", "{images}"], "output must be a new or empty folder"),
        (["export", "{run}", "--output", "model.h5"], "output must be a file ending in"),
        (["export", "{images}/red/0.png", "--output", "x.pt2"], "must be a whole safetensors file"),
    ],
)
def test_what_cannot_work_is_one_line(
    images: Path, run: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    places = {"run": run, "images": images, "empty": tmp_path}
    result = invoke(*(each.format(**places) for each in arguments))
    assert result.exit_code == 2, result.output
    errors = [line for line in result.stderr.splitlines() if not line.startswith("note: ")]
    assert len(errors) == 1, errors
    assert message in errors[0]
    assert not list(tmp_path.iterdir())
