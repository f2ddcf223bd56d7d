"""The demo's tasks and its backbone, of the photographs that scikit-image ships."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

pytest.importorskip("skimage")

from efft_kernels.experiments import photographs
from efft_kernels.experiments.lists import vtab_lists
from efft_kernels.training.backbone import build_backbone


def test_tasks_are_whole_and_repeat_their_bits(tmp_path: Path) -> None:
    for root in (tmp_path / "a", tmp_path / "b"):
        photographs.write_tasks(root)
    sizes = {"faces": (64, 16, 80, 120, 2), "textures": (96, 32, 128, 96, 8)}
    for task, expected in sizes.items():
        lists = vtab_lists(tmp_path / "a", task)
        assert lists.notes == ()
        assert (*(len(samples) for samples in lists.lists.values()), lists.classes) == expected
        images = {
            path: np.asarray(Image.open(path)).tobytes()
            for samples in lists.lists.values()
            for path, _ in samples
        }
        train, test = (
            {images[path] for path, _ in lists.lists[name]} for name in ("train800val200", "test")
        )
        assert not train & test
        for path, pixels in images.items():
            other = tmp_path / "b" / Path(path).relative_to(tmp_path / "a")
            assert np.asarray(Image.open(other)).tobytes() == pixels


def test_the_backbone_is_a_checkpoint_that_vtab_takes(tmp_path: Path) -> None:
    weights, top1 = photographs.train_backbone(tmp_path, epochs=1)
    assert 0 <= top1 <= 100
    model = build_backbone(
        photographs.MODEL, num_classes=2, checkpoint=weights, img_size=photographs.SIZE
    )
    kept = load_file(weights)["blocks.3.attn.qkv.weight"]
    torch.testing.assert_close(model.state_dict()["blocks.3.attn.qkv.weight"], kept)
    assert not any(path.suffix == ".tmp" for path in tmp_path.iterdir())
