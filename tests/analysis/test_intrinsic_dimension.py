"""Intrinsic dimension where it is known, and what the measurement is careful about."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from efft_kernels.analysis import intrinsic_dimension as analysis
from efft_kernels.analysis.intrinsic_dimension import Settings, equal_step_lr, intrinsic_dimensions
from efft_kernels.analysis.task import Budget, Task

from .tasks import colour_task, task_of

CLASSES = 40


class Nearest(nn.Module):
    """Class c where the linear's one output lies nearest to c: each image is an equation."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.linear = nn.Linear(features, 1, bias=False)
        nn.init.zeros_(self.linear.weight)

    def forward(self, x: Tensor) -> Tensor:
        value: Tensor = self.linear(x.flatten(1))
        return -(value - torch.arange(CLASSES)).square() / 4


def equations_task(count: int, features: int = 48) -> Task:
    """`count` independent linear equations in `features` unknowns, exact to half a unit in 40.

    A random d-dimensional subspace solves them if d >= count, and else only by a stroke of luck:
    d_t is `count` by construction (as in the toy of Li et al., section 2).
    """
    torch.manual_seed(0)
    images = 20 * torch.linalg.qr(torch.randn(features, count)).Q.T.reshape(count, 1, 1, features)
    targets = torch.tensor([3, 37, 20, 9, 30, 0])[:count]
    return task_of(Nearest(features), images, targets, CLASSES, count)


@pytest.mark.parametrize("count", [2, 4])
def test_as_many_dimensions_as_equations_are_needed(count: int) -> None:
    task = equations_task(count)
    dims = (0, count - 1, count, count + 1)
    settings = Settings(dims=dims, fraction=1.0, modules_to_train=(), theta_lrs=(3.0,), seed=2)
    (result,) = intrinsic_dimensions(
        task, ["linear"], Budget(epochs=200, lr=0.3, weight_decay=0.0), settings
    )
    assert result.full_top1_percent == 100
    assert result.dimension == count
    assert tuple(point.dim for point in result.curve) == dims[:3]
    assert result.curve[-1].top1_percent == 100
    assert all(point.top1_percent < 100 for point in result.curve[:-1])


def test_the_model_stays_as_it_is_and_results_repeat(make_vit: Any) -> None:
    model = make_vit()
    before = copy.deepcopy(model.state_dict())
    task = colour_task(model)
    seen: list[tuple[str, int | None]] = []
    modules = ["blocks.0.attn", "blocks.0.mlp"]
    settings = Settings(dims=(0, 3, 16, 10**6), fraction=1.0, exhaustive=True)
    budget = Budget(epochs=2, lr=1e-2)

    def measure() -> list[analysis.IntrinsicDimension]:
        return intrinsic_dimensions(
            task, modules, budget, settings, on_result=lambda m, d, _: seen.append((m, d))
        )

    first = measure()
    assert seen[:4] == [(modules[0], None), (modules[0], 0), (modules[0], 3), (modules[0], 16)]
    assert (modules[1], None) not in seen  # one full training serves both
    assert first == measure()
    assert [result.parameters for result in first] == [
        sum(p.numel() for p in model.get_submodule(name).parameters()) for name in modules
    ]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())


def test_the_head_alone_may_be_enough(make_vit: Any) -> None:
    settings = Settings(dims=(0, 5), fraction=0.01)
    (result,) = intrinsic_dimensions(
        colour_task(make_vit()), ["blocks.1.mlp"], Budget(epochs=2, lr=1e-2), settings
    )
    assert result.dimension == 0
    assert len(result.curve) == 1
    assert result.to_json()["curve"][0]["theta_lr"] is None


def test_the_module_alone_can_be_the_reference(make_vit: Any, monkeypatch: Any) -> None:
    learning: list[set[str]] = []

    def spy(model: nn.Module, *_: Any) -> float:
        learning.append(
            {n.rpartition(".")[0] for n, p in model.named_parameters() if p.requires_grad}
        )
        return 50.0

    monkeypatch.setattr(analysis, "top1_after_training", spy)
    settings = Settings(dims=(0,), reference="module")
    intrinsic_dimensions(colour_task(make_vit()), ["blocks.0.attn"], Budget(), settings)
    assert learning == [{"blocks.0.attn.qkv", "blocks.0.attn.proj", "head"}, {"head"}]


def test_the_best_learning_rate_counts_and_divergence_does_not(
    make_vit: Any, monkeypatch: Any
) -> None:
    rates: list[float] = []

    def fake(*arguments: Any) -> float:
        theta = arguments[-1][-1]
        if "weight_decay" not in theta:
            return 80.0
        rates.append(theta["lr"])
        return {0.1: math.nan, 1.0: 60.0, 10.0: 75.0}[theta["lr"]]

    monkeypatch.setattr(analysis, "top1_after_training", fake)
    settings = Settings(dims=(4,), theta_lrs=(0.1, 1.0, 10.0))
    (result,) = intrinsic_dimensions(colour_task(make_vit()), ["blocks.0.attn"], Budget(), settings)
    assert rates == [0.1, 1.0, 10.0]
    assert result.curve == (analysis.Point(4, 75.0, 10.0),)
    assert result.dimension == 4


def test_equal_steps() -> None:
    assert equal_step_lr(1e-3, 10_000, 100) == pytest.approx(1e-2)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        ("blocks.0.nothing", r"such as blocks\.0\.attn"),
        ("", "must name"),
        ("head", "apart from"),
        ("blocks.0.ls1", "without"),
    ],
)
def test_modules_that_cannot_be_measured(make_vit: Any, module: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        intrinsic_dimensions(colour_task(make_vit()), [module], Budget())


@pytest.mark.parametrize(
    "options",
    [
        {"dims": ()},
        {"dims": (2, 2)},
        {"dims": (-1, 2)},
        {"fraction": 0.0},
        {"fraction": 1.1},
        {"reference": "head"},
        {"theta_lrs": ()},
        {"theta_lrs": (0.0,)},
        {"head_lr": -1.0},
    ],
)
def test_settings_are_checked(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be"):
        Settings(**options)
