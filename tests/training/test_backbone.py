"""timm models with local weights: loaded whole, or refused with a reason."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from efft_kernels.training.backbone import build_backbone, fingerprint

NAME = "vit_tiny_patch16_224"


@pytest.fixture(scope="module")
def source() -> nn.Module:
    torch.manual_seed(5)
    return timm.create_model(NAME, num_classes=7, img_size=32).eval()


def jax_arrays(model: Any) -> dict[str, np.ndarray]:
    """The original ViT's .npz layout: kernels [in, ..., out], heads apart."""
    heads, width = model.blocks[0].attn.num_heads, model.embed_dim

    def linear(layer: nn.Linear) -> tuple[np.ndarray, np.ndarray]:
        return layer.weight.detach().T.numpy(), layer.bias.detach().numpy()

    arrays = {
        "embedding/kernel": model.patch_embed.proj.weight.detach().permute(2, 3, 1, 0).numpy(),
        "embedding/bias": model.patch_embed.proj.bias.detach().numpy(),
        "cls": model.cls_token.detach().numpy(),
        "Transformer/posembed_input/pos_embedding": model.pos_embed.detach().numpy(),
    }
    norms = {"Transformer/encoder_norm": model.norm}
    arrays["head/kernel"], arrays["head/bias"] = linear(model.head)
    for index, block in enumerate(model.blocks):
        prefix = f"Transformer/encoderblock_{index}"
        norms |= {f"{prefix}/LayerNorm_0": block.norm1, f"{prefix}/LayerNorm_2": block.norm2}
        attention = f"{prefix}/MultiHeadDotProductAttention_1"
        kernel, bias = linear(block.attn.qkv)
        for part, name in enumerate(("query", "key", "value")):
            columns = slice(part * width, (part + 1) * width)
            arrays[f"{attention}/{name}/kernel"] = kernel[:, columns].reshape(width, heads, -1)
            arrays[f"{attention}/{name}/bias"] = bias[columns].reshape(heads, -1)
        kernel, arrays[f"{attention}/out/bias"] = linear(block.attn.proj)
        arrays[f"{attention}/out/kernel"] = kernel.reshape(heads, -1, width)
        for number, layer in enumerate((block.mlp.fc1, block.mlp.fc2)):
            dense = f"{prefix}/MlpBlock_3/Dense_{number}"
            arrays[f"{dense}/kernel"], arrays[f"{dense}/bias"] = linear(layer)
    for name, norm in norms.items():
        arrays[f"{name}/scale"] = norm.weight.detach().numpy()
        arrays[f"{name}/bias"] = norm.bias.detach().numpy()
    return arrays


def write(model: nn.Module, path: Path) -> Path:
    if path.suffix == ".safetensors":
        save_file(model.state_dict(), path)
    elif path.suffix == ".npz":
        np.savez(path, **jax_arrays(model))
    else:
        torch.save({"model": model.state_dict(), "epoch": 3}, path)
    return path


@pytest.mark.parametrize("file", ["w.safetensors", "w.pth", "w.npz"])
def test_local_weights_are_loaded_with_their_head(
    source: nn.Module, tmp_path: Path, file: str
) -> None:
    notes: list[str] = []
    path = write(source, tmp_path / file)
    model = build_backbone(NAME, num_classes=7, checkpoint=path, img_size=32, notify=notes.append)
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model.eval()(x), source(x), rtol=0, atol=0)
    assert notes == []


@pytest.mark.parametrize("file", ["w.safetensors", "w.npz"])
def test_a_head_of_another_size_is_dropped_and_said(
    source: nn.Module, tmp_path: Path, file: str
) -> None:
    notes: list[str] = []
    path = write(source, tmp_path / file)
    model = build_backbone(NAME, num_classes=3, checkpoint=path, img_size=32, notify=notes.append)
    assert model.get_classifier().out_features == 3
    assert fingerprint(model, ["head"]) == fingerprint(source, ["head"])
    assert notes == [f"{path} has a head for 7 classes, data has 3: the head starts anew"]
    assert "state_dict" not in model.pretrained_cfg


def test_position_embeddings_follow_the_image_size(source: nn.Module, tmp_path: Path) -> None:
    path = write(source, tmp_path / "w.safetensors")
    model = build_backbone(NAME, num_classes=7, checkpoint=path, img_size=48)
    assert model(torch.randn(1, 3, 48, 48)).shape == (1, 7)


@pytest.mark.parametrize("file", ["w.safetensors", "w.pth", "w.npz"])
def test_another_architecture_is_refused(source: nn.Module, tmp_path: Path, file: str) -> None:
    path = write(source, tmp_path / file)
    with pytest.raises(ValueError, match=f"weights of vit_small_patch16_224, got {path}"):
        build_backbone("vit_small_patch16_224", num_classes=7, checkpoint=path, img_size=32)


def test_a_checkpoint_that_lacks_a_block_is_refused(source: nn.Module, tmp_path: Path) -> None:
    state = {k: v for k, v in source.state_dict().items() if not k.startswith("blocks.11.")}
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"blocks\.11\.norm1\.weight"):
        build_backbone(NAME, num_classes=3, checkpoint=tmp_path / "w.safetensors", img_size=32)


@pytest.mark.parametrize("suffix", [".npz", ".pth"])
def test_a_small_file_that_fills_the_memory_is_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"bomb{suffix}"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for number in range(5):
            packed.writestr(f"{number}.npy", bytes(60 << 20))
    with pytest.raises(ValueError, match=r"checkpoint must hold weights, got .* unpack to 314,5"):
        build_backbone(NAME, num_classes=7, checkpoint=path, img_size=32)


def test_missing_foreign_and_damaged_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "w.pth").write_bytes(b"not a checkpoint")
    (tmp_path / "w.npz").write_bytes(b"not an archive")
    (tmp_path / "w.safetensors").write_bytes(b"\x10")
    (tmp_path / "w.onnx").touch()
    for file, message in {
        "absent.pth": "nothing there",
        ".": "a folder",
        "w.onnx": "must end in",
        "w.pth": "file of plain tensors",
        "w.safetensors": "file of plain tensors",
        "w.npz": "original .npz weights",
    }.items():
        with pytest.raises(ValueError, match=message):
            build_backbone(NAME, num_classes=3, checkpoint=tmp_path / file, img_size=32)


class Command:
    """Unpickling it makes a folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


def test_code_in_a_checkpoint_does_not_run(tmp_path: Path) -> None:
    torch.save({"model": Command(tmp_path / "ran")}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match="file of plain tensors"):
        build_backbone(NAME, num_classes=3, checkpoint=tmp_path / "w.pth")
    assert not (tmp_path / "ran").exists()


def test_an_unknown_model_brings_suggestions() -> None:
    with pytest.raises(ValueError, match="got 'vit_tny_patch16_224'; did you mean vit_tiny"):
        build_backbone("vit_tny_patch16_224", num_classes=3)


def test_options_a_model_does_not_take_are_named() -> None:
    with pytest.raises(ValueError, match="resnet18 takes no img_size"):
        build_backbone("resnet18", num_classes=3, pretrained=False, img_size=32)
    own = build_backbone("resnet18", num_classes=3, pretrained=False, img_size=224)
    assert own.eval()(torch.zeros(1, 3, 64, 64)).shape == (1, 3)


def test_pretrained_weights_that_cannot_be_had_suggest_a_checkpoint(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def unreachable(*args: object, **kwargs: object) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr("timm.models._builder.load_pretrained", unreachable)
    with pytest.raises(ValueError, match=r"no route to host.*--checkpoint FILE"):
        build_backbone(NAME, num_classes=3, img_size=32)


def test_random_weights_are_said() -> None:
    notes: list[str] = []
    build_backbone(NAME, num_classes=3, pretrained=False, img_size=32, notify=notes.append)
    assert "weights are random" in notes[0]


def test_the_fingerprint_sees_one_bit_and_not_the_head(source: nn.Module) -> None:
    before = fingerprint(source, ["head"])
    with torch.no_grad():
        source.head.weight.add_(1)
    assert fingerprint(source, ["head"]) == before
    bias = source.blocks[3].mlp.fc1.bias
    value = bias[5].item()
    with torch.no_grad():
        bias[5] = torch.nextafter(bias[5], torch.tensor(9.0))
    assert fingerprint(source, ["head"]) != before
    with torch.no_grad():
        bias[5] = value
    assert fingerprint(source, ["head"]) == before
