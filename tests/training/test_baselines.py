"""Baselines by the same command as the methods: trained, stopped, resumed, evaluated."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

from efft_kernels.baselines import BASELINES, AttachedBaseline
from efft_kernels.cli import app
from efft_kernels.methods import METHODS
from efft_kernels.training.evaluation import evaluate_adapter
from efft_kernels.training.methods import TRAINABLE
from efft_kernels.training.recipe import recipe_for
from efft_kernels.training.run import fit, prepare
from efft_kernels.training.settings import TrainSettings


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> TrainSettings:
    """Two classes, red and blue under noise."""
    root = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(1)
    for channel, name in enumerate(("red", "green")):
        (root / name).mkdir()
        for index in range(8):
            pixels = generator.integers(0, 200, (16, 16, 3), dtype=np.uint8)
            pixels[..., channel] += 55
            Image.fromarray(pixels).save(root / name / f"{index}.png")
    return TrainSettings(
        data=root,
        model="vit_tiny_patch16_224",
        epochs=2,
        batch_size=6,
        img_size=32,
        pretrained=False,
        device="cpu",
        val_split=0.25,
    )


@pytest.mark.parametrize(
    ("method", "options", "mergeable"),
    [
        ("full", {}, True),
        ("ssf", {}, True),
        ("vpt_deep", {"prompts": 3}, False),
        ("adaptformer", {"hidden": 4}, False),
    ],
)
def test_trained_resumed_and_evaluated(
    settings: TrainSettings, method: str, options: dict[str, int], mergeable: bool, tmp_path: Path
) -> None:
    settings = dataclasses.replace(settings, method=method, options=options)
    run = prepare(settings, tmp_path / "run")
    assert isinstance(run.adapter, AttachedBaseline)
    assert run.config["method"] == {"name": method, **dataclasses.asdict(run.adapter.baseline)}
    result = fit(run)

    class Stop(Exception):
        pass

    def after_the_first(row: object) -> None:
        raise Stop

    with pytest.raises(Stop):
        fit(prepare(settings, tmp_path / "again"), on_epoch=after_the_first)
    resumed = fit(prepare(settings, tmp_path / "again", resume=True))
    tensors, others = load_file(result.adapter_path), load_file(resumed.adapter_path)
    assert tensors.keys() == others.keys()
    assert all(torch.equal(tensor, others[name]) for name, tensor in tensors.items())

    said: list[str] = []
    evaluated = evaluate_adapter(
        settings.data, result.adapter_path, device="cpu", notify=said.append
    )
    assert evaluated.top1_percent == result.last_top1_percent
    assert not any("differ" in line for line in said)
    if mergeable:
        merged = evaluate_adapter(settings.data, result.adapter_path, device="cpu", merge=True)
        assert merged.top1_percent == result.last_top1_percent
    else:
        with pytest.raises(ValueError, match="must stay attached"):
            evaluate_adapter(settings.data, result.adapter_path, device="cpu", merge=True)


def test_settings(settings: TrainSettings, tmp_path: Path) -> None:
    assert not set(METHODS) & set(BASELINES) and set(TRAINABLE) == {*METHODS, *BASELINES}
    for name, baseline in BASELINES.items():
        assert isinstance(dataclasses.replace(settings, method=name).method_config(), baseline)
    with pytest.raises(ValueError, match="rank must be left out for method bitfit"):
        dataclasses.replace(settings, method="bitfit", rank=4).method_config()
    with pytest.raises(ValueError, match="hidden must be left out for method vpt_deep"):
        dataclasses.replace(settings, method="vpt_deep", options={"hidden": 4}).method_config()
    for given in ({"targets": ("ffn",)}, {"layers": (0,)}):
        wrong = dataclasses.replace(settings, method="bitfit", **given)
        with pytest.raises(ValueError, match="must be left out for the baseline bitfit"):
            prepare(wrong, tmp_path / "run")
        assert not (tmp_path / "run").exists()


def test_a_recipe_s_settings(settings: TrainSettings) -> None:
    made = recipe_for("vtab", "cifar", "lora_fix").settings(settings.data)
    assert made.method_config() == BASELINES["lora_fix"](rank=4)  # type: ignore[call-arg]
    assert made.normalize == "imagenet" and made.drop_last
    made = recipe_for("vtab", "dtd", "noah").settings(settings.data)
    assert made.method_config() == BASELINES["noah"](subnet="dtd")  # type: ignore[call-arg]


def test_the_command(settings: TrainSettings, tmp_path: Path) -> None:
    """A baseline's fields are options, its file is what `eval` takes."""
    common = ["--data", str(settings.data), "--device", "cpu", "--workers", "0"]
    arguments = ["--method", "adaptformer", "--hidden", "4", "--epochs", "1", "--img-size", "32"]
    arguments += ["--model", settings.model, "--no-pretrained", "--output", str(tmp_path / "run")]
    done = CliRunner().invoke(app, ["train", *common, *arguments])
    assert done.exit_code == 0 and "adaptformer: 20,784 parameters" in done.output, done.output
    file = tmp_path / "run" / "adapter.safetensors"
    done = CliRunner().invoke(app, ["eval", *common, "--adapter", str(file)])
    assert done.exit_code == 0 and "top-1" in done.output, done.output
    for wrong, message in (
        (["--method", "bitfit", "--hidden", "4"], "hidden must be left out for method bitfit"),
        (["--method", "bitfit", "--rank", "4"], "rank must be left out for method bitfit"),
        (["--method", "vpt_deep", "--prompts", "0"], "prompts must be at least 1"),
        (["--method", "rpb", "--model", "swin_tiny_patch4_window7_224"], "for rpb, got Swin"),
    ):
        refused = CliRunner().invoke(
            app, ["train", *common, "--no-pretrained", "--output", str(tmp_path / "no"), *wrong]
        )
        assert refused.exit_code == 2 and message in " ".join(refused.output.split()), (
            refused.output
        )
        assert not (tmp_path / "no").exists()
