"""What takes the place of weights, data and hours when the pages' snippets and commands run.

Models keep their names and lose their size: two blocks, 48 wide, random weights, no network.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from .pages import Block

Namespace = dict[str, Any]

_create_model = timm.create_model


def small_model(name: str, pretrained: bool = False, **options: Any) -> torch.nn.Module:
    """timm.create_model, small and without weights."""
    if name.startswith(("vit_", "deit_")):
        width, depth = (60, 12) if "small" in name else (48, 2)  # two names, two architectures
        options = {"depth": depth, "embed_dim": width, "num_heads": 3} | options
    elif name.startswith("swin_"):
        options = {"depths": (1, 1, 1, 1), "embed_dim": 24, "num_heads": (1, 2, 4, 8)} | options
    return _create_model(name, pretrained=False, **options)


def small_vit(name: str, *, num_labels: int = 2, **options: Any) -> Any:
    """What stands in for `ViTForImageClassification.from_pretrained` of a name on the hub."""
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3}
    sizes |= {"intermediate_size": 96, "image_size": 32}
    return ViTForImageClassification(ViTConfig(**sizes, num_labels=num_labels))


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the stand-ins in place of what would fetch weights or compile for minutes."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(timm, "create_model", small_model)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))


def shortened(block: Block) -> Block:
    """The block with next to no steps of training: the notebook's outputs are of all of them."""
    return replace(block, text=re.sub(r"\bsteps=\d+", "steps=2", block.text))


def loader(classes: int = 37) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """A loader of one batch."""
    return [(torch.randn(2, 3, 224, 224), torch.randint(classes, (2,)))]


def adapter_file(path: str, classes: int) -> None:
    """Write an adapter of the pages' ViT-B with EFFT2 of rank 16, for so many classes."""
    from efft_kernels import EFFT2, attach

    model = small_model("vit_base_patch16_224", num_classes=classes)
    adapter = attach(model, EFFT2(rank=16, scale=10.0))
    for parameter in adapter.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    adapter.save(path)


def _with_loader() -> Namespace:
    return {"loader": loader()}


def _readme() -> Namespace:
    adapter_file("cars.safetensors", 196)
    return {"loader": loader(), "three_images": torch.randn(3, 3, 224, 224)}


def _tasks() -> Namespace:
    adapter_file("pets.safetensors", 37)
    return _readme()


def _pets() -> Namespace:
    adapter_file("pets.safetensors", 37)
    return {}


def _trainer() -> Namespace:
    items = [{"pixel_values": torch.randn(3, 32, 32), "labels": i % 5} for i in range(8)]
    return {"dataset": items}


def _lightning() -> Namespace:
    images, labels = loader()[0]
    data = torch.utils.data.TensorDataset(images, labels)
    return {"loader": torch.utils.data.DataLoader(data, batch_size=2)}


# Page → what makes the names that it does not define itself, and its files.
NAMES: dict[str, Callable[[], Namespace]] = {
    "README.md": _readme,
    "docs/quickstart.md": _with_loader,
    "docs/guides/accelerate.md": _lightning,
    "docs/guides/huggingface.md": _trainer,
    "docs/guides/lightning.md": _lightning,
    "docs/guides/many-tasks.md": _tasks,
    "docs/guides/serving.md": _pets,
    "docs/guides/timm.md": _with_loader,
}


def image_folders(root: Path) -> None:
    """photos/ and more_photos/ of two classes, and weights.safetensors of the default model."""
    generator = np.random.default_rng(1)
    for folder, count in (("photos", 8), ("more_photos", 2)):
        for channel, name in enumerate(("red", "green")):
            (root / folder / name).mkdir(parents=True)
            for index in range(count):
                pixels = generator.integers(0, 200, (32, 32, 3), dtype=np.uint8)
                pixels[..., channel] += 55
                Image.fromarray(pixels).save(root / folder / name / f"{index}.png")
    save_file(small_model("vit_tiny_patch16_224").state_dict(), root / "weights.safetensors")
