"""What the tests of baselines share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from efft_kernels.baselines import BASELINES, AttachedBaseline, Baseline, attach_baseline

# The sizes that suit a model of width 12.
SMALL: dict[str, dict[str, Any]] = {
    "vpt_shallow": {"prompts": 3},
    "vpt_deep": {"prompts": 3},
    "adapter": {"hidden": 5, "after": "both"},
    "adapterdrop": {"hidden": 5},
    "adaptformer": {"hidden": 5},
    "compacter": {"hidden": 8},
    "lora_fix": {"rank": 2},
}


@pytest.fixture(params=list(BASELINES))
def baseline(request: pytest.FixtureRequest) -> Baseline:
    """Every baseline, small."""
    return BASELINES[request.param](**SMALL.get(request.param, {}))


@pytest.fixture
def build(make_vit: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """A small ViT that every baseline takes, whose head reads all patches."""

    def make(baseline: Baseline, **options: Any) -> nn.Module:
        depth = 12 if baseline.name == "noah" else 2
        options = {"depth": depth, "global_pool": "avg", "drop_path_rate": 0.0} | options
        return make_vit(**options).eval()

    return make


@pytest.fixture
def images() -> Tensor:
    return torch.randn(7, 3, 8, 8)


@pytest.fixture
def moved() -> Callable[..., AttachedBaseline]:
    """A baseline on a model, all that trains moved away from where it starts."""

    def attach(model: nn.Module, baseline: Baseline, **options: Any) -> AttachedBaseline:
        handle = attach_baseline(model, baseline, **options)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
        return handle

    return attach
