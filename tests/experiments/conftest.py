"""Small data sets in the community's layouts; the brighter colour tells the class."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

Write = Callable[..., Path]


def _images(folder: Path, prefix: str, count: int, classes: int) -> list[str]:
    """Write images and give the lines of their list; there is a blank in every path."""
    generator = np.random.default_rng(len(prefix))
    (folder / prefix).mkdir(parents=True, exist_ok=True)
    lines = []
    for index in range(count):
        label = index % classes
        pixels = generator.integers(0, 200, (16, 16, 3), dtype=np.uint8)
        pixels[..., label] += 55
        name = f"{prefix}/no {index:02}.png"
        Image.fromarray(pixels).save(folder / name)
        lines.append(f"{name} {label}")
    return lines


@pytest.fixture
def vtab_task(tmp_path: Path) -> Write:
    """(folder's name, classes=2) -> ROOT, with a task of 12 + 6 + 8 images in it."""

    def write(name: str, classes: int = 2) -> Path:
        return _write_vtab_task(tmp_path / "vtab-1k", name, classes)

    return write


@pytest.fixture(scope="module")
def kitti(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ROOT with the one task, for all tests of a file."""
    return _write_vtab_task(tmp_path_factory.mktemp("vtab-1k"), "kitti", 2)


def _write_vtab_task(root: Path, name: str, classes: int) -> Path:
    folder = root / name
    train = _images(folder, "images/train", 12, classes)
    val = _images(folder, "images/val", 6, classes)
    test = _images(folder, "images/test", 8, classes)
    for split, lines in {
        "train800": train,
        "val200": val,
        "train800val200": train + val,
        "test": test,
    }.items():
        (folder / f"{split}.txt").write_text("\n".join(lines) + "\n")
    return root


@pytest.fixture
def fewshot_set(tmp_path: Path) -> Write:
    """(folder's name, images="images", seeds=(0,)) -> ROOT, with a set of 1 and 2 shots in it."""

    def write(name: str, images: str = "images", seeds: tuple[int, ...] = (0,)) -> Path:
        root = tmp_path / "few-shot"
        folder = root / name
        (folder / "annotations").mkdir(parents=True)
        train = _images(folder / images, "train", 4, 2)
        for seed in seeds:
            for shots in (1, 2):
                path = folder / f"annotations/train_meta.list.num_shot_{shots}.seed_{seed}"
                path.write_text("\n".join(train[: 2 * shots]))
        test = _images(folder / images, "test", 8, 2)
        (folder / "annotations/test_meta.list").write_text("\n".join(test))
        return root

    return write
