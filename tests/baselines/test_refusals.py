"""Bad input is refused by name and leaves the model as it was."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

from efft_kernels import AdapterSet, export_peft_lora
from efft_kernels.baselines import (
    BASELINES,
    NOAH,
    SSF,
    AdapterDrop,
    AdapterTuning,
    AdaptFormer,
    AttachedBaseline,
    AttentionTuning,
    Baseline,
    BitFit,
    Compacter,
    LayerNormTuning,
    LePETuning,
    LoRAFix,
    RPBTuning,
    VPTDeep,
    VPTShallow,
    attach_baseline,
    load_baseline,
    register_baseline,
)

Unchanged = Callable[..., AbstractContextManager[None]]
STRUCTURAL = ["vpt_shallow", "vpt_deep", "adapter", "adaptformer", "adapterdrop", "compacter"]
STRUCTURAL += ["transformer_probing", "lepe", "rpb", "noah"]


@pytest.mark.parametrize("name", STRUCTURAL)
def test_swin_is_refused_by_name(name: str, unchanged: Unchanged) -> None:
    swin = timm.create_model(
        "swin_tiny_patch4_window7_224", embed_dim=12, depths=(1, 1), num_heads=(2, 2),
        img_size=56, num_classes=5,
    )  # fmt: skip
    with unchanged(swin), pytest.raises(TypeError, match=f"for {name}, got SwinTransformer"):
        attach_baseline(swin, BASELINES[name]())


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, bias=False)
        self.head = nn.Linear(4, 5)


@pytest.mark.parametrize(
    ("baseline", "kind"),
    [
        (BitFit(), ValueError),
        (LayerNormTuning(), ValueError),
        (AttentionTuning(), ValueError),
        (LoRAFix(), ValueError),
        (SSF(), TypeError),
        (AdaptFormer(), TypeError),
    ],
)
def test_a_model_without_what_it_trains(
    baseline: Baseline, kind: type[Exception], unchanged: Unchanged
) -> None:
    model = Convolutions()
    with unchanged(model), pytest.raises(kind, match=rf"model must .*{baseline.name}"):
        attach_baseline(model, baseline)


def test_an_attention_that_hands_its_weights_on(unchanged: Unchanged) -> None:
    encoder = nn.Module()
    encoder.layers = nn.ModuleList([nn.TransformerEncoderLayer(12, 3, 24)])
    encoder.head = nn.Linear(12, 5)
    with unchanged(encoder), pytest.raises(TypeError, match="lora_fix"):
        attach_baseline(encoder, LoRAFix(rank=2))
    handle = attach_baseline(encoder, AttentionTuning())  # whose parameters train all the same
    assert handle.num_parameters() == 4 * 12 * 12 + 4 * 12


def test_a_qkv_whose_bias_is_joined_elsewhere(unchanged: Unchanged) -> None:
    """timm's BEiT passes its qkv by, unless it is told not to."""
    beit: Any = timm.create_model(
        "beit_base_patch16_224", img_size=32, embed_dim=12, depth=2, num_heads=2, num_classes=5
    )
    with unchanged(beit), pytest.raises(TypeError, match="qkv_bias_separate"):
        attach_baseline(beit, LoRAFix(rank=2))
    for block in beit.blocks:
        block.attn.qkv_bias_separate = True
    handle = attach_baseline(beit, LoRAFix(rank=2))
    beit(torch.randn(2, 3, 32, 32)).sum().backward()
    assert all(parameter.grad is not None for parameter in handle.parameters())


def test_what_takes_adapters_alone(
    make_vit: Callable[..., nn.Module], unchanged: Unchanged, tmp_path: Path
) -> None:
    model = make_vit()
    handle = attach_baseline(model, LoRAFix(rank=2))
    with unchanged(model):
        for call in (AdapterSet, lambda each: export_peft_lora(each, tmp_path / "peft")):
            with pytest.raises(TypeError, match="an Adapter, got AttachedBaseline"):
                call(handle)


@pytest.mark.parametrize(
    ("baseline", "options", "message"),
    [
        (AdapterDrop(kept=3), {}, "kept must be at most"),
        (Compacter(products=5, hidden=10), {}, "products must divide d=12"),
        (LoRAFix(rank=13), {}, "rank must be at most"),
        (NOAH(), {}, "12 blocks for noah"),
        (LePETuning(), {"dynamic_img_size": True}, "one grid"),
        (RPBTuning(), {"patch_drop_rate": 0.5}, "one grid"),
    ],
)
def test_sizes_that_do_not_fit(
    make_vit: Callable[..., nn.Module],
    unchanged: Unchanged,
    baseline: Baseline,
    options: dict[str, Any],
    message: str,
) -> None:
    model = make_vit(**options)
    with unchanged(model), pytest.raises(ValueError, match=message):
        attach_baseline(model, baseline)


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda: VPTShallow(prompts=0), ValueError),
        (lambda: VPTDeep(prompts=2.0), TypeError),  # type: ignore[arg-type]
        (lambda: VPTDeep(dropout=1.0), ValueError),
        (lambda: AdapterTuning(hidden=True), TypeError),
        (lambda: AdapterTuning(after="attention"), ValueError),
        (lambda: AdaptFormer(scale=float("nan")), ValueError),
        (lambda: AdapterDrop(kept=0), ValueError),
        (lambda: Compacter(products=-1), ValueError),
        (lambda: LayerNormTuning(norms="some"), ValueError),
        (lambda: LoRAFix(rank=0), ValueError),
        (lambda: NOAH(subnet="mnist"), ValueError),
        (lambda: NOAH(subnet=["cifar"]), ValueError),  # type: ignore[arg-type]
        (lambda: BitFit.from_config({"name": "bitfit", "rank": 3}), ValueError),
    ],
)
def test_fields(make: Callable[[], Baseline], kind: type[Exception]) -> None:
    with pytest.raises(kind, match=r"must be|fields"):
        make()


def test_arguments(make_vit: Callable[..., nn.Module], unchanged: Unchanged) -> None:
    model = make_vit()
    with unchanged(model):
        with pytest.raises(TypeError, match="baseline must be"):
            attach_baseline(model, BitFit)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="modules_to_train"):
            attach_baseline(model, BitFit(), modules_to_train="tail")
        with pytest.raises(ValueError, match="carry a baseline"):
            AttachedBaseline(model)
        with pytest.raises(TypeError, match=r"nn\.Module"):
            attach_baseline({}, BitFit())  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="name must be new"):
            register_baseline(type("Other", (Baseline,), {"name": "bitfit"}))


def test_hooks_that_cannot_be_put(
    make_vit: Callable[..., nn.Module], unchanged: Unchanged, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = make_vit()
    del model.blocks[1].drop_path2
    with unchanged(model), pytest.raises(AttributeError):
        attach_baseline(model, AdapterTuning())
    assert not model.blocks[0].drop_path2._forward_hooks


@pytest.fixture
def saved(make_vit: Callable[..., nn.Module], tmp_path: Path) -> Path:
    attach_baseline(make_vit(), VPTDeep(prompts=2)).save(tmp_path / "baseline")
    return tmp_path / "baseline"


def rewritten(path: Path, **changes: str) -> Path:
    """The file with other strings in its header, but for the checksum."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"].update(changes)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])
    return path


@pytest.mark.parametrize(
    "changes",
    [
        {"method": '{"name": "unknown"}'},
        {"method": '{"name": "vpt_deep", "prompts": 3}'},
        {"method": '{"name": "bitfit"}'},
        {"method": "[]"},
        {"method": "{"},
        {"modules_to_train": '["tail"]'},
        {"modules_to_train": '"head"'},
        {"base_shapes": "[]"},
        {"base_shapes": "{}"},
        {"base_shapes": '{"head.bias": [1e400]}'},
        {"format_version": "2"},
        {"sha256": "0"},
    ],
)
def test_headers(
    saved: Path, make_vit: Callable[..., nn.Module], unchanged: Unchanged, changes: dict[str, str]
) -> None:
    model = make_vit()
    with unchanged(model), pytest.raises(ValueError, match=str(saved)):
        load_baseline(model, rewritten(saved, **changes))


def test_damaged_missing_and_of_another_model(
    saved: Path, make_vit: Callable[..., nn.Module], unchanged: Unchanged, tmp_path: Path
) -> None:
    other = make_vit(depth=3)
    with unchanged(other), pytest.raises(ValueError, match=r"architecture.*blocks\.2"):
        load_baseline(other, saved)
    model = make_vit()
    saved.write_bytes(saved.read_bytes()[:-5])
    with unchanged(model):
        with pytest.raises(ValueError, match="whole safetensors file"):
            load_baseline(model, saved)
        with pytest.raises(FileNotFoundError):
            load_baseline(model, tmp_path / "nothing")


def test_a_state_that_does_not_fit_changes_nothing(make_vit: Callable[..., nn.Module]) -> None:
    handle = attach_baseline(make_vit(), VPTDeep(prompts=2))
    state = {name: tensor + 1 for name, tensor in handle.state_dict().items()}
    before = {name: tensor.clone() for name, tensor in handle.state_dict().items()}
    for name, value in (("head.weight", None), ("parts.blocks_0.prompts", torch.zeros(3, 12))):
        wrong = {**state, name: value} if value is not None else state | {name: torch.zeros(1)}
        with pytest.raises(ValueError, match="must"):
            handle.load_state_dict(wrong)
    after = handle.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    with pytest.raises(ValueError, match="metadata keys"):
        handle.save("nowhere", metadata={"method": "mine"})
