"""Every baseline through attach, train, save, load, merge and detach."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import efft_kernels
from efft_kernels import EFFT2
from efft_kernels.baselines import (
    BASELINES,
    SSF,
    AttachedBaseline,
    Baseline,
    BitFit,
    FullFineTuning,
    LinearProbing,
    LoRAFix,
    attach_baseline,
    baseline_from_config,
    find_baseline,
    load_baseline,
)

Build = Callable[..., nn.Module]
Moved = Callable[..., AttachedBaseline]

MERGEABLE = {"linear", "full", "bitfit", "layernorm", "attention", "ssf", "lora_fix"}


def backbone(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items() if not k.startswith("head.")}


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def hooks(model: nn.Module) -> int:
    return sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._forward_pre_hooks_with_kwargs)
        for m in model.modules()
    )


def test_gradients_reach_what_trains_and_nothing_else(
    build: Build, baseline: Baseline, images: Tensor, moved: Moved
) -> None:
    model = build(baseline)
    handle = moved(model, baseline)
    model.train()
    cross_entropy(model(images), torch.arange(7) % 5).backward()
    trained = {id(p) for p in handle.parameters()} | {id(p) for p in model.head.parameters()}  # type: ignore[operator, union-attr]
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (id(parameter) in trained), name
        if id(parameter) not in trained:
            assert parameter.grad is None, name
            continue
        assert parameter.grad is not None, name
        assert (parameter.grad != 0).any(), name


def test_a_few_steps_lower_the_loss(build: Build, baseline: Baseline, images: Tensor) -> None:
    model = build(baseline)
    handle = attach_baseline(model, baseline)
    targets = torch.arange(7) % 5
    trained = [p for p in model.parameters() if p.requires_grad]
    start = {name: p.detach().clone() for name, p in handle.named_parameters()}
    optimizer = torch.optim.AdamW(trained, lr=3e-3)
    losses = []
    for _ in range(8):
        loss = cross_entropy(model(images), targets)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    for name, parameter in handle.named_parameters():
        assert not torch.equal(parameter, start[name]), name


def test_saved_loaded_and_detached(
    build: Build, baseline: Baseline, images: Tensor, moved: Moved, tmp_path: Path
) -> None:
    model = build(baseline)
    before, plain = backbone(model), model(images)
    handle = moved(model, baseline)
    adapted = model(images)
    assert not torch.equal(adapted, plain)
    handle.save(tmp_path / "baseline.safetensors", metadata={"task": "cifar"})

    other = build(baseline)
    loaded = load_baseline(other, tmp_path / "baseline.safetensors")
    assert loaded.baseline == baseline
    assert_same(loaded.state_dict(), handle.state_dict())
    assert torch.equal(other(images), adapted)

    required = {name: p.requires_grad for name, p in build(baseline).named_parameters()}
    for attached in (handle, loaded):
        detached = attached.detach()
        assert find_baseline(detached) is None and hooks(detached) == 0
        assert_same(backbone(detached), before)
        assert {n: p.requires_grad for n, p in detached.named_parameters()} == required
        with pytest.raises(RuntimeError, match="detached"):
            attached.detach()


def test_copies_carry_it_along(
    build: Build, baseline: Baseline, images: Tensor, moved: Moved
) -> None:
    model = build(baseline)
    handle = moved(model, baseline)
    expected = model(images)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert torch.equal(other(images), expected)
        with torch.no_grad():
            for parameter in AttachedBaseline(other).parameters():
                parameter.zero_()
        if handle.num_parameters():
            assert not torch.equal(other(images), expected)
        assert torch.equal(model(images), expected)
        AttachedBaseline(other).detach()
        assert hooks(other) == 0


def test_merged(build: Build, baseline: Baseline, images: Tensor, moved: Moved) -> None:
    model = build(baseline)
    before = backbone(model)
    handle = moved(model, baseline)
    adapted = model(images)
    if baseline.name not in MERGEABLE:
        with pytest.raises(ValueError, match=f"{baseline.name} must stay attached"):
            handle.merge()
        assert torch.equal(model(images), adapted) and not handle.merged
        return
    handle.merge()
    handle.merge()
    assert handle.merged
    torch.testing.assert_close(model(images), adapted, rtol=1e-4, atol=1e-5)
    handle.unmerge()
    assert torch.equal(model(images), adapted) and not handle.merged
    merged = model(images)
    handle.merge()
    plain = handle.detach()
    torch.testing.assert_close(plain(images), merged, rtol=1e-4, atol=1e-5)
    assert backbone(plain).keys() == before.keys()


def test_swin_s_reduction_gets_a_bias_by_merging_and_loses_it_again(moved: Moved) -> None:
    import timm

    torch.manual_seed(3)
    swin: Any = timm.create_model(
        "swin_tiny_patch4_window7_224", embed_dim=12, depths=(2, 2), num_heads=(2, 2),
        img_size=56, num_classes=5,
    ).eval()  # fmt: skip
    images = torch.randn(2, 3, 56, 56)
    handle = moved(swin, SSF())
    adapted, names = swin(images), set(swin.state_dict())
    handle.merge()
    torch.testing.assert_close(swin(images), adapted, rtol=1e-4, atol=1e-5)
    handle.unmerge()
    assert torch.equal(swin(images), adapted) and set(swin.state_dict()) == names


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_half_precision(
    build: Build, baseline: Baseline, images: Tensor, moved: Moved, dtype: torch.dtype
) -> None:
    """Under autocast, and with a backbone that is stored so."""
    model = build(baseline)
    moved(model, baseline)
    exact = model(images)
    if dtype == torch.bfloat16:
        model = build(baseline, dtype=dtype)
        moved(model, baseline)
        assert all(p.dtype == torch.float32 for p in model.baseline.parts.parameters())  # type: ignore[union-attr]
        logits = model(images.bfloat16())
        assert logits.isfinite().all()
    else:
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(images)
        torch.testing.assert_close(logits.float(), exact, rtol=0.05, atol=0.15)
    cross_entropy(logits.float(), torch.arange(7) % 5).backward()


def gradients(model: Any, forward: Callable[[Tensor], Tensor], images: Tensor) -> list[Tensor]:
    model.zero_grad()
    forward(images).square().sum().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def test_checkpointing_changes_nothing(
    build: Build, baseline: Baseline, images: Tensor, moved: Moved
) -> None:
    model: Any = build(baseline)
    moved(model, baseline)
    expected = gradients(model, model, images)
    model.set_grad_checkpointing(True)
    torch.testing.assert_close(gradients(model, model, images), expected)


@pytest.mark.parametrize("name", ["adaptformer", "lepe", "rpb", "vpt_deep", "ssf"])
def test_compiles_as_one_graph(build: Build, name: str, images: Tensor, moved: Moved) -> None:
    """One baseline for each kind of hook."""
    torch.compiler.reset()
    baseline = BASELINES[name]()
    model: Any = build(baseline)
    moved(model, baseline)
    expected = gradients(model, model, images)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(gradients(model, compiled, images), expected, rtol=1e-4, atol=1e-4)


def test_batch_norm_s_statistics_belong_to_it(build: Build, images: Tensor, tmp_path: Path) -> None:
    def with_norm() -> nn.Module:
        model: Any = build(BitFit())
        model.patch_embed.proj = nn.Sequential(model.patch_embed.proj, nn.BatchNorm2d(12))
        return model

    model: Any = with_norm()
    statistics = model.patch_embed.proj[1].running_mean
    handle = attach_baseline(model, BitFit())
    model.train()(images)
    handle.save(tmp_path / "file")
    assert statistics.abs().max() > 0
    other: Any = with_norm()
    load_baseline(other, tmp_path / "file")
    assert torch.equal(other.patch_embed.proj[1].running_mean, statistics)
    handle.detach()
    assert statistics.abs().max() == 0


def test_a_model_that_changed_since(build: Build, moved: Moved) -> None:
    model: Any = build(BitFit())
    handle = moved(model, BitFit())
    now = {name: p.clone() for name, p in handle.named_parameters()}
    bias, model.patch_embed.proj.bias = model.patch_embed.proj.bias, nn.Parameter(torch.ones(3))
    with pytest.raises(RuntimeError, match=r"patch_embed\.proj\.bias \[12\]"):
        handle.detach()
    model.patch_embed.proj.bias = bias
    assert_same(dict(handle.named_parameters()), now)  # type: ignore[arg-type]
    handle.detach()

    handle = moved(model, SSF())
    torch.nn.utils.parametrizations.weight_norm(model.blocks[1].mlp.fc1)
    weights = backbone(model)
    with pytest.raises(RuntimeError, match="weight must be a parameter"):
        handle.merge()
    assert_same(backbone(model), weights)


def test_described(build: Build, baseline: Baseline) -> None:
    handle = attach_baseline(build(baseline), baseline)
    description = handle.describe()
    head = 12 * 5 + 5
    assert sum(row["parameters"] for row in description.rows) == handle.num_parameters() + head
    assert "head.weight" in str(description) and type(baseline).__name__ in str(description)
    assert baseline_from_config(baseline.to_config()) == baseline
    assert f"{handle.num_parameters():,}" in repr(handle)


def test_names() -> None:
    assert set(BASELINES) == {
        *("linear", "full", "bitfit", "layernorm", "attention", "vpt_shallow", "vpt_deep"),
        *("adapter", "adaptformer", "adapterdrop", "ssf", "lora_fix", "compacter"),
        *("transformer_probing", "lepe", "rpb", "noah"),
    }


def test_one_at_a_time(
    build: Build, unchanged: Callable[..., Any], tmp_path: Path, moved: Moved
) -> None:
    model = build(BitFit())
    handle = moved(model, LoRAFix(rank=2))
    handle.save(tmp_path / "baseline")
    with unchanged(model):
        for attach in (
            lambda: attach_baseline(model, BitFit()),
            lambda: load_baseline(model, tmp_path / "baseline"),
            lambda: efft_kernels.attach(model, EFFT2(rank=2)),
        ):
            with pytest.raises(ValueError, match="carry no baseline"):
                attach()
    handle.detach()
    adapter = efft_kernels.attach(model, EFFT2(rank=2))
    adapter.save(tmp_path / "adapter")
    with unchanged(model), pytest.raises(ValueError, match="carry no adapter"):
        attach_baseline(model, BitFit())
    with pytest.raises(ValueError, match=r"efft-kernels\.baseline"):
        load_baseline(build(BitFit()), tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"efft-kernels\.adapter"):
        efft_kernels.load(build(BitFit()), tmp_path / "baseline")


def test_full_and_linear_without_a_head(build: Build, images: Tensor) -> None:
    model = build(FullFineTuning())
    handle = attach_baseline(model, FullFineTuning(), modules_to_train=())
    assert handle.num_parameters() == sum(p.numel() for p in model.parameters())
    handle.detach()
    with pytest.raises(ValueError, match="head"):
        attach_baseline(model, LinearProbing(), modules_to_train=())


def test_a_head_that_was_replaced_by_none(build: Build, images: Tensor, tmp_path: Path) -> None:
    model: Any = build(BitFit())
    handle = attach_baseline(model, BitFit())
    model.reset_classifier(0)
    handle.save(tmp_path / "file")
    other: Any = build(BitFit())
    other.reset_classifier(0)
    assert load_baseline(other, tmp_path / "file").modules_to_train == ()
    assert torch.equal(other(images), model(images))
