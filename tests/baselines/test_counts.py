"""The papers' own numbers of parameters."""

from __future__ import annotations

import statistics
from typing import Any

import pytest
import timm
import torch
from torch import nn

from efft_kernels.baselines import (
    NOAH,
    SSF,
    AdapterDrop,
    AdapterTuning,
    AdaptFormer,
    AttentionTuning,
    Baseline,
    BitFit,
    Compacter,
    FullFineTuning,
    LayerNormTuning,
    LePETuning,
    LinearProbing,
    LoRAFix,
    RPBTuning,
    TransformerProbing,
    VPTDeep,
    VPTShallow,
    attach_baseline,
)
from efft_kernels.baselines.noah import noah_subnets

CLASSES = 169  # the mean over KAdaptation's three data sets
HEAD = 129_961


def on_meta(name: str) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(name, num_classes=CLASSES)


@pytest.fixture(scope="module")
def vit() -> nn.Module:
    return on_meta("vit_base_patch16_224")


def counted(model: nn.Module, baseline: Baseline) -> int:
    handle = attach_baseline(model, baseline)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    head = sum(p.numel() for p in model.get_submodule("head").parameters())
    assert handle.num_parameters() == trained - head
    handle.detach()
    return trained - head


@pytest.mark.parametrize(
    ("baseline", "count"),
    [
        (LinearProbing(), 0),
        (FullFineTuning(), 85_798_656),
        (BitFit(), 102_912),
        (LayerNormTuning(), 38_400),
        (LayerNormTuning(norms="outer"), 131_497 - HEAD),  # KAdaptation's Table 2, as those below
        (AttentionTuning(), 28_348_416),
        (AttentionTuning(), 28_478_377 - HEAD),
        (LoRAFix(), 203_689 - HEAD),
        (VPTShallow(prompts=8), 8 * 768),
        (VPTDeep(prompts=8), 12 * 8 * 768),
        (AdapterTuning(), 156_768),
        (AdapterTuning(after="both"), 2 * 156_768),
        (AdaptFormer(), 156_768),
        (AdapterDrop(), 156_768 // 12),
        (AdapterDrop(kept=12), 156_768),
        (SSF(), 205_824),
        (Compacter(), 12 * 2 * 3 * (768 + 64) + 4**3),
        (TransformerProbing(), 7_087_872),
        (LePETuning(), 12 * 768 * 10),
        (RPBTuning(), 12 * 12 * 27**2),
    ],
)
def test_vit_b(vit: nn.Module, baseline: Baseline, count: int) -> None:
    assert counted(vit, baseline) == count


def test_layernorm_of_clip() -> None:
    """KAdaptation's Table 2: 89,769 with CLIP's head of 86,697."""
    clip = on_meta("vit_base_patch32_clip_224")
    assert counted(clip, LayerNormTuning(norms="outer")) == 89_769 - 86_697


def test_bitfit_of_swin_b() -> None:
    """FacT's Table 2 prints 0.201 M."""
    swin: Any = on_meta("swin_base_patch4_window7_224")
    handle = attach_baseline(swin, BitFit())
    assert handle.num_parameters() == 200_760


def test_ssf_prints_the_head_too() -> None:
    """0.24 M is 205,824 and the mean head of VTAB-1k's tasks, 38,045."""
    assert round((205_824 + 38_045) / 1e6, 2) == 0.24


def test_noah_s_subnets(vit: nn.Module) -> None:
    """FacT's Table 1 prints 0.361 M, a mean over the groups."""
    tasks = list(noah_subnets())
    groups = tasks[:7], tasks[7:11], tasks[11:]
    counts = {task: counted(vit, NOAH(subnet=task)) for task in tasks}
    mean = statistics.mean(statistics.mean(counts[task] for task in group) for group in groups)
    assert round(mean) == 361_531
