"""Training on two processes: what one process learns, whoever saves, resumes, and fails."""

from __future__ import annotations

import csv
import dataclasses
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.multiprocessing as mp
from PIL import Image
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer

from efft_kernels.training.methods import TRAINABLE
from efft_kernels.training.ranks import ALONE, Ranks, session
from efft_kernels.training.run import fit, prepare
from efft_kernels.training.settings import TrainSettings

WORLD = 2


class TokenBatchNorm(torch.nn.BatchNorm1d):
    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return super().forward(tokens.mT).mT


def tiny(depth: int, options: dict[str, Any]) -> VisionTransformer:
    for name in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"):
        options.pop(name, None)
    model = VisionTransformer(patch_size=8, embed_dim=24, depth=depth, num_heads=2, **options)
    model.pretrained_cfg = {"input_size": (3, 16, 16), "mean": (0.5,) * 3, "std": (0.5,) * 3}
    return model


@timm.models.register_model
def two_blocks(pretrained: bool = False, **options: Any) -> VisionTransformer:
    return tiny(2, options)


@timm.models.register_model
def twelve_blocks(pretrained: bool = False, **options: Any) -> VisionTransformer:
    return tiny(12, options)


@timm.models.register_model
def batch_norm(pretrained: bool = False, **options: Any) -> VisionTransformer:
    model = tiny(2, options)
    model.patch_embed.norm = TokenBatchNorm(24)
    return model


def settings(root: Path, method: str, **given: Any) -> TrainSettings:
    """17 images to train: of three batches the last has one, for two processes."""
    fields = {field.name for field in dataclasses.fields(TRAINABLE[method])}
    small = {"rank": 1 if method == "kadaptation" else 2, "dropout": 0.0}
    values = {
        "model": "two_blocks",
        "img_size": 16,
        "epochs": 2,
        "batch_size": 8,
        "drop_path": 0.0,
        "lr": 1e-2,
        "device": "cpu",
        "pretrained": False,
    }
    values |= {name: value for name, value in small.items() if name in fields}
    return TrainSettings(data=root / "images", method=method, **(values | given))


def make_images(root: Path) -> None:
    draw = np.random.default_rng(1)
    for split, count in (("train", (9, 8)), ("val", (5, 6))):
        for channel, images in enumerate(count):
            folder = root / "images" / split / f"class{channel}"
            folder.mkdir(parents=True)
            for index in range(images):
                pixels = draw.integers(0, 200, (16, 16, 3), dtype=np.uint8)
                pixels[..., channel] += 30
                Image.fromarray(pixels).save(folder / f"{index}.png")


def rows(output: Path) -> list[dict[str, float]]:
    with (output / "metrics.csv").open() as file:
        return [
            {name: float(value) for name, value in row.items() if name != "seconds"}
            for row in csv.DictReader(file)
        ]


def same_run(output: Path, other: Path, tolerance: float) -> None:
    """The same numbers, and no parameter where it began."""
    for row, expected in zip(rows(output), rows(other), strict=True):
        assert row == pytest.approx(expected, rel=tolerance)
    found, expected = (load_file(path / "adapter.safetensors") for path in (output, other))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(
            found[name], tensor, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def learns_as_one(root: Path, folder: Path, ranks: Ranks, method: str, **given: Any) -> None:
    chosen = settings(root, method, **given)
    if ranks.first:
        fit(prepare(chosen, folder / "alone"))
    for fsdp in (False, True):
        output = folder / f"fsdp {fsdp}"
        result = fit(prepare(chosen, output, ranks=dataclasses.replace(ranks, fsdp=fsdp)))
        assert ranks.gather(result) == [result] * WORLD
        if ranks.first:
            same_run(output, folder / "alone", 1e-8)


def resumes(root: Path, folder: Path, ranks: Ranks) -> None:
    """Each epoch with another number of processes, DDP or FSDP2."""
    chosen = settings(root, "efft2", epochs=4, drop_last=True)
    if ranks.first:
        fit(prepare(chosen, folder / "alone"))
    notes: list[str] = []
    for epoch, fsdp in enumerate((None, True, False, None)):
        several = ranks if fsdp is None else dataclasses.replace(ranks, fsdp=fsdp)
        if fsdp is not None or ranks.first:
            run = prepare(
                chosen,
                folder / "run",
                resume=epoch > 0,
                notify=notes.append,
                ranks=ALONE if fsdp is None else several,
            )
            assert len(run.history) == epoch
            fit(dataclasses.replace(run, settings=dataclasses.replace(chosen, epochs=epoch + 1)))
        ranks.gather(None)
    assert bool(notes) is ranks.first
    if ranks.first:
        assert any("began with 1 process" in note for note in notes)
        same_run(folder / "run", folder / "alone", 1e-8)


CASES: dict[str, tuple[Callable[..., None], dict[str, Any]]] = {
    method: (learns_as_one, {"method": method}) for method in TRAINABLE
}
CASES["noah"][1]["model"] = "twelve_blocks"
CASES["statistics"] = (learns_as_one, {"method": "efft2", "model": "batch_norm"})
CASES["float16"] = (learns_as_one, {"method": "full", "amp": "float16"})
CASES["accumulated"] = (
    learns_as_one,
    {
        "method": "efft2",
        "accumulate": 2,
        "clip_grad": 0.1,
        "label_smoothing": 0.1,
        "keep": "best",
    },
)
CASES["resumes"] = (resumes, {})


def worker(rank: int, root: Path, port: int) -> None:
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)  # Adam makes rounding of a gradient of 0 a whole step
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(WORLD), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with session() as ranks:
        for name, (check, given) in CASES.items():
            folder = root / name
            if ranks.first:
                folder.mkdir()
            check(root, folder, ranks, **given)
            ranks.gather(None)
            if ranks.first:
                (folder / "passed").touch()


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder in which two processes ran the checks up to the first that failed, and why."""
    root = tmp_path_factory.mktemp("ranks")
    make_images(root)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    try:
        mp.spawn(worker, (root, port), nprocs=WORLD)
    except mp.ProcessRaisedException as error:
        return root, str(error)
    return root, ""


@pytest.mark.parametrize("name", CASES)
def test_on_two_processes(ran: tuple[Path, str], name: str) -> None:
    root, error = ran
    assert (root / name / "passed").exists(), error
