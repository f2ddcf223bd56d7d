"""Two small tasks in VTAB-1K's layout, and a backbone for them, of photographs that pip can bring.

scikit-image ships 100 small photographs of faces and 100 of no faces (`lfw_subset`), and some
twenty larger photographs. `faces` tells the two apart; `textures` tells which of eight photographs
a crop comes from, trained on crops of the left halves and tested on crops of the right ones. The
backbone learnt the same on crops of six other photographs.

These tasks have a hundred images where VTAB-1K's have a thousand, and the backbone is 150 times
smaller than ViT-B: they show that everything runs and learns, not which method is best.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save_file
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer

from ..atomic_files import replacing
from ..training.run import fit, prepare
from ..training.settings import TrainSettings
from .lists import TEST, TRAIN, vtab_lists

MODEL = "efft_kernels_demo_vit"
SIZE = 32  # pixels of an image
CROP = 64  # pixels of a photograph that become one
TASKS = ("faces", "textures")
TEXTURES = ("brick", "grass", "gravel", "coins", "moon", "page", "text", "cell")
SOURCE = ("astronaut", "camera", "chelsea", "coffee", "rocket", "immunohistochemistry")

Gray = NDArray[np.uint8]

default_cfgs = generate_default_cfgs({MODEL: {"input_size": (3, SIZE, SIZE)}})


@register_model
def efft_kernels_demo_vit(pretrained: bool = False, **options: Any) -> VisionTransformer:
    """A ViT for images of 32×32 pixels: 16 patches, width 96, 4 blocks."""
    shape: dict[str, Any] = {"img_size": SIZE, "patch_size": 8, "embed_dim": 96, "num_heads": 3}
    shape |= {"depth": 4, **options}
    return build_model_with_cfg(VisionTransformer, MODEL, pretrained, **shape)  # type: ignore[no-any-return]


def write_tasks(root: Path, seed: int = 0) -> None:
    """Write `TASKS` under root, each with its four lists.

    Raises:
        ValueError: scikit-image is not there.
    """
    data = _photographs()
    generator = np.random.default_rng(seed)
    faces = (255 * data.lfw_subset()).round().astype(np.uint8)
    parts: dict[str, list[tuple[Gray, int]]] = {"train": [], "val": [], "test": []}
    for label, pictures in enumerate((faces[100:], faces[:100])):  # 1: a face
        shuffled = pictures[generator.permutation(100)]
        for name, start, stop in (("train", 0, 32), ("val", 32, 40), ("test", 40, 100)):
            parts[name] += [(picture, label) for picture in shuffled[start:stop]]
    _write_task(root / "faces", parts)

    parts = {"train": [], "val": [], "test": []}
    for label, photograph in enumerate(TEXTURES):
        left, right = _halves(getattr(data, photograph)())
        for name, half, count in (("train", left, 12), ("val", left, 4), ("test", right, 12)):
            parts[name] += [(crop, label) for crop in _crops(half, count, generator)]
    _write_task(root / "textures", parts)


def train_backbone(
    folder: Path, epochs: int = 20, on_epoch: Callable[[int, int], None] = lambda *_: None
) -> tuple[Path, float]:
    """Train `MODEL` on crops of the left halves of `SOURCE`.

    Args:
        folder: where its images and its weights are written.
        epochs: of the training.
        on_epoch: called with (epochs done, all epochs).

    Returns:
        (file of the weights, top-1 percent of crops of the right halves).

    Raises:
        ValueError: scikit-image is not there.
    """
    data = _photographs()
    generator = np.random.default_rng(1)
    parts: dict[str, list[tuple[Gray, int]]] = {"train": [], "val": [], "test": []}
    for label, photograph in enumerate(SOURCE):
        left, right = _halves(getattr(data, photograph)())
        for name, half, count in (("train", left, 128), ("val", left, 1), ("test", right, 20)):
            parts[name] += [(crop, label) for crop in _crops(half, count, generator)]
    _write_task(folder / "source", parts)
    lists = vtab_lists(folder, "source")
    settings = TrainSettings(
        data=lists.root,
        model=MODEL,
        method="full",
        epochs=epochs,
        batch_size=32,
        weight_decay=0.05,
        drop_path=0.0,
        seed=0,
        device="cpu",
        pretrained=False,
        img_size=SIZE,
        normalize="imagenet",
    )
    run = prepare(settings, folder / "run", splits=lists.splits(TRAIN, TEST))
    result = fit(run, on_epoch=lambda row: on_epoch(row.epoch, epochs))
    run.adapter.merge()
    model = run.adapter.detach()
    weights = folder / "backbone.safetensors"
    with replacing(weights) as path:
        save_file(model.state_dict(), path)
    return weights, result.last_top1_percent


def _photographs() -> Any:
    try:
        from skimage import data
    except ImportError as error:
        raise ValueError(
            f"the photographs must come from scikit-image, which is not there ({error}):"
            " pip install scikit-image"
        ) from error
    return data


def _halves(photograph: NDArray[Any]) -> tuple[Gray, Gray]:
    """Its left and its right half in grey."""
    gray = np.asarray(Image.fromarray(photograph).convert("L"))
    middle = gray.shape[1] // 2
    return gray[:, :middle], gray[:, middle:]


def _crops(half: Gray, count: int, generator: np.random.Generator) -> Iterable[Gray]:
    for _ in range(count):
        top, left = (int(generator.integers(0, side - CROP + 1)) for side in half.shape)
        yield half[top : top + CROP, left : left + CROP]


def _write_task(folder: Path, parts: dict[str, list[tuple[Gray, int]]]) -> None:
    """Write images and lists, the lists last, so that a folder with lists is whole."""
    lines: dict[str, list[str]] = {}
    for part, pictures in parts.items():
        (folder / "images" / part).mkdir(parents=True, exist_ok=True)
        lines[part] = []
        for index, (pixels, label) in enumerate(pictures):
            name = f"images/{part}/{index:06}.png"
            picture = Image.fromarray(pixels).convert("RGB")
            picture.resize((SIZE, SIZE), Image.Resampling.BICUBIC).save(folder / name)
            lines[part].append(f"{name} {label}")
    lists: dict[str, Sequence[str]] = {
        "train800": lines["train"],
        "val200": lines["val"],
        "train800val200": lines["train"] + lines["val"],
        "test": lines["test"],
    }
    for name, content in lists.items():
        (folder / f"{name}.txt").write_text("\n".join(content) + "\n", encoding="utf-8")
