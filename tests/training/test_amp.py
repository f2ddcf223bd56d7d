"""Every method through training under autocast: what it learns is near what float32 learns."""

from __future__ import annotations

import csv
import dataclasses
import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from efft_kernels.methods import METHODS
from efft_kernels.testing.error_budget import relative_error
from efft_kernels.training.backbone import build_backbone
from efft_kernels.training.evaluation import evaluate_adapter
from efft_kernels.training.run import fit, prepare
from efft_kernels.training.settings import TrainSettings


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes, one bright and one dark."""
    root = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(1)
    for base, name in ((0, "dark"), (120, "bright")):
        (root / name).mkdir()
        for index in range(5):
            pixels = generator.integers(base, base + 130, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{index}.png")
    return root


@pytest.fixture(autouse=True)
def _small_backbone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two blocks; and a scaler that skips no update, of which there are few."""

    def build(*args: Any, **options: Any) -> torch.nn.Module:
        model: Any = build_backbone(*args, **options)
        model.blocks = model.blocks[:2]
        return model

    for module in ("run", "trained"):
        monkeypatch.setattr(f"efft_kernels.training.{module}.build_backbone", build)
    scaler = functools.partial(torch.amp.GradScaler, init_scale=16.0)
    monkeypatch.setattr(torch.amp, "GradScaler", scaler)


def run(settings: TrainSettings, output: Path) -> tuple[torch.Tensor, float]:
    """All factors as the run's file has them, and the loss of its last epoch."""
    result = fit(prepare(settings, output))
    again = evaluate_adapter(settings.data, result.adapter_path, device="cpu")
    assert again.top1_percent == result.last_top1_percent
    state = load_file(result.adapter_path)
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    with (output / "metrics.csv").open(newline="") as file:
        loss = float(list(csv.DictReader(file))[-1]["train_loss"])
    return torch.cat([t.flatten() for k, t in sorted(state.items()) if "factors" in k]), loss


@pytest.mark.parametrize("method", METHODS)
def test_a_run_under_autocast_is_near_one_without(
    folder: Path, tmp_path: Path, method: str
) -> None:
    settings = TrainSettings(
        data=folder,
        model="vit_tiny_patch16_224",
        method=method,
        rank=2,
        epochs=2,
        batch_size=4,
        img_size=32,
        pretrained=False,
        device="cpu",
        val_split=0.3,
        drop_path=0.0,
    )
    expected, expected_loss = run(settings, tmp_path / "none")
    for amp in ("bfloat16", "float16"):
        found, loss = run(dataclasses.replace(settings, amp=amp), tmp_path / amp)
        assert not torch.equal(found, expected)
        assert relative_error(found, expected) < 0.05
        assert loss == pytest.approx(expected_loss, rel=0.05)
