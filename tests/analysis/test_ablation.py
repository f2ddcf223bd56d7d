"""Ablations and scale sweeps on tiny data: what is adapted, compared and reported."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import numpy as np
import pytest
import torch

from efft_kernels import EFFT1, EFFT2, KAdaptation, LoRA
from efft_kernels.analysis import ablation as analysis
from efft_kernels.analysis.ablation import (
    PAPER_RANGES,
    Ablation,
    Cell,
    ScaleSweep,
    ablate,
    default_ranges,
    depth_of,
    sweep_scales,
)
from efft_kernels.analysis.task import Budget, top1_after_training

from .tasks import colour_task

METHODS = [EFFT1(rank=2, scale=1.0), EFFT2(rank=2, scale=1.0)]
BUDGET = Budget(epochs=3, lr=1e-2)


def test_the_rows_are_the_papers_for_twelve_blocks() -> None:
    assert default_ranges(12) == PAPER_RANGES
    assert default_ranges(6) == ((0, 1), (2, 3), (4, 4), (5, 5))
    assert default_ranges(24) == ((0, 5), (6, 11), (12, 17), (18, 23))
    assert default_ranges(2) == ((0, 0), (1, 1))


def test_each_cell_adapts_its_part_of_its_layers(make_vit: Any, monkeypatch: Any) -> None:
    task = colour_task(make_vit())
    adapted: list[set[str]] = []

    def fake(model: Any, *_: Any) -> float:
        adapted.append({site.name for site in model.factor_bank.attachment.sites})
        return 80.0 if len(adapted) == 1 else 60.0

    monkeypatch.setattr(analysis, "top1_after_training", fake)
    cells: list[Cell] = []
    result = ablate(
        task,
        [EFFT2(rank=2)],
        BUDGET,
        parts=("mhsa", "both"),
        ranges=[None, (1, 1)],
        on_result=cells.append,
    )
    attention = {f"blocks.{block}.attn.{name}" for block in (0, 1) for name in ("qkv", "proj")}
    second = {f"blocks.1.{name}" for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")}
    assert adapted[1] == attention
    assert adapted[0] > attention | second
    assert adapted[2] == attention & second
    assert adapted[3] == second
    assert len(adapted) == 4
    assert cells == [result.full["efft2"], *result.cells]
    # U and V of 12 rows and four 2×2 cores a layer
    assert [cell.parameters for cell in result.cells[:2]] == [48 + 32, 48 + 16]
    assert result.relative_change_percent(result.cells[0]) == pytest.approx(-25)


def test_a_run_on_tiny_data(make_vit: Any) -> None:
    model = make_vit()
    before = copy.deepcopy(model.state_dict())
    task = colour_task(model)
    assert depth_of(task) == 2
    once = Budget(epochs=1, lr=1e-2)
    result = ablate(task, METHODS, once, seeds=(0, 1))
    assert len(result.cells) == 2 * 2 * 3
    again = ablate(task, METHODS[:1], once, parts=("mhsa",), seeds=(0, 1))
    assert again.cells == result.cells[:3]
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    data = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert data["cells"][1]["layers"] == [0, 0]
    assert set(data["full"]) == {"efft1", "efft2"}


def test_training_learns_the_colours(make_vit: Any) -> None:
    model = make_vit()
    task = colour_task(model, images_per_class=16)
    trained = task.copy_of_model()
    before = top1_after_training(trained.requires_grad_(False), task, BUDGET, 0)
    trained.requires_grad_(True)
    assert top1_after_training(trained, task, Budget(epochs=15, lr=5e-3), 0) > max(before, 70)


def test_divergence_is_told_apart(make_vit: Any) -> None:
    task = colour_task(make_vit())
    model = task.copy_of_model()
    assert math.isnan(top1_after_training(model, task, Budget(epochs=3, lr=1e30), 0))
    with pytest.raises(ValueError, match="efft1 diverged"):
        ablate(task, METHODS, Budget(epochs=3, lr=1e30))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"parts": ("mlp",)}, "parts must be among"),
        ({"ranges": [(1, 2)]}, r"within 0\.\.1, got \(1, 2\)"),
        ({"ranges": [(1, 0)]}, "FIRST-LAST"),
        ({"seeds": ()}, "seeds must hold"),
    ],
)
def test_arguments_are_checked(make_vit: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ablate(colour_task(make_vit()), METHODS, BUDGET, **options)
    with pytest.raises(ValueError, match="each once"):
        ablate(colour_task(make_vit()), METHODS[:1] * 2, BUDGET)


def test_the_scale_is_swept(make_vit: Any, monkeypatch: Any) -> None:
    task = colour_task(make_vit())
    seen: list[tuple[str, float]] = []

    def fake(model: Any, *_: Any) -> float:
        method = model.factor_bank.attachment.method
        seen.append((method.name, method.scale))
        return 50.0 + method.scale

    monkeypatch.setattr(analysis, "top1_after_training", fake)
    methods = [LoRA(rank=2), KAdaptation(products=2)]
    sweep = sweep_scales([task], methods, BUDGET, scales=(0.1, 10.0), seeds=(0, 1))
    assert seen == [(m, s) for m in ("lora", "kadaptation") for s in (0.1, 0.1, 10.0, 10.0)]
    assert sweep.top1_percent.tolist() == [[[50.1, 60.0], [50.1, 60.0]]]
    assert sweep.normalised.tolist() == [[[0.0, 1.0], [0.0, 1.0]]]
    with pytest.raises(ValueError, match="at least one each"):
        sweep_scales([task], methods, BUDGET, scales=())


def test_a_sweep_on_tiny_data(make_vit: Any) -> None:
    sweep = sweep_scales([colour_task(make_vit())], METHODS, BUDGET, scales=(0.1, 10.0))
    assert sweep.top1_percent.shape == (1, 2, 2)
    assert np.isfinite(sweep.top1_percent).all()
    assert json.loads(json.dumps(sweep.to_json(), allow_nan=False))["scales"] == [0.1, 10.0]


def test_normalisation_is_within_a_data_set_over_methods_and_scales() -> None:
    nan = math.nan
    tasks = (
        [[60.0, 80.0], [70.0, 65.0]],
        [[10.0, nan], [20.0, 30.0]],
        [[5.0, 5.0], [5.0, 5.0]],
        [[nan, nan], [nan, nan]],
    )
    top1 = np.array(tasks)
    sweep = ScaleSweep(("a", "b", "c", "d"), ("x", "y"), (1.0, 10.0), top1)
    assert sweep.normalised[0] == pytest.approx(np.array([[0, 1], [0.5, 0.25]]))
    assert sweep.normalised[1] == pytest.approx(np.array([[0, 0], [0.5, 1]]))
    assert sweep.normalised[2] == pytest.approx(np.ones((2, 2)))
    assert sweep.normalised[3] == pytest.approx(np.zeros((2, 2)))
    assert sweep.to_json()["top1_percent"][1][0] == [10.0, None]


def test_the_relative_change_is_of_the_accuracies() -> None:
    full = Cell("efft1", "both", None, 9, 75.0, (75.0,))
    cell = Cell("efft1", "ffn", (0, 2), 4, 72.0, (72.0,))
    ablation = Ablation("tiny", {"efft1": full}, (cell,))
    assert ablation.relative_change_percent(cell) == pytest.approx(-4)
    assert ablation.to_json()["cells"][0]["relative_change_percent"] == pytest.approx(-4)
