"""Training on two processes: what one process learns, whoever saves, resumes, and fails."""

from __future__ import annotations

import csv
import dataclasses
import errno
import json
import os
import re
from collections.abc import Callable, Sequence
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
from torch.distributed import TCPStore
from typer.testing import CliRunner

from efft_kernels.cli import app
from efft_kernels.training.evaluation import evaluate_adapter
from efft_kernels.training.images import UnreadableImageError
from efft_kernels.training.methods import TRAINABLE
from efft_kernels.training.ranks import ALONE, Ranks, session
from efft_kernels.training.run import fit, prepare
from efft_kernels.training.settings import TrainSettings

pytestmark = pytest.mark.slow  # two more processes
WORLD = 2
WITH_FSDP2 = ("efft2", "fact_tt", "lora", "full")


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
    """9 images to train and 5 to validate: the last batch of each has one, for two processes."""
    fields = {field.name for field in dataclasses.fields(TRAINABLE[method])}
    small = {"rank": 1 if method == "kadaptation" else 2, "dropout": 0.0}
    values = {
        "model": "two_blocks",
        "img_size": 16,
        "epochs": 1,
        "batch_size": 4,
        "drop_path": 0.0,
        "lr": 1e-2,
        "device": "cpu",
        "pretrained": False,
    }
    values |= {name: value for name, value in small.items() if name in fields}
    return TrainSettings(data=root / "images", method=method, **(values | given))


def make_images(root: Path) -> None:
    draw = np.random.default_rng(1)
    for split, count in (("train", (5, 4)), ("val", (2, 3))):
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
    # FSDP2 takes seconds for each.
    for fsdp in (False, True) if method in WITH_FSDP2 else (False,):
        output = folder / f"fsdp {fsdp}"
        result = fit(prepare(chosen, output, ranks=dataclasses.replace(ranks, fsdp=fsdp)))
        assert ranks.gather(result) == [result] * WORLD
        if ranks.first:
            same_run(output, folder / "alone", 1e-8)
    again = evaluate_adapter(chosen.data, result.adapter_path, device="cpu", ranks=ranks)
    assert (again.top1_percent, again.images) == (result.last_top1_percent, 5)


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
CASES["statistics"] = (learns_as_one, {"method": "efft2", "model": "batch_norm", "epochs": 2})
CASES["float16"] = (learns_as_one, {"method": "full", "amp": "float16"})
CASES["accumulated"] = (
    learns_as_one,
    {
        "method": "efft2",
        "epochs": 2,
        "accumulate": 2,
        "clip_grad": 0.1,
        "label_smoothing": 0.1,
        "keep": "best",
    },
)
CASES["resumes"] = (resumes, {})


def unreadable(patch: pytest.MonkeyPatch, ranks: Ranks) -> None:
    if ranks.rank == 1:
        failing = Failing(UnreadableImageError("cannot read image 7.png"))
        patch.setattr("efft_kernels.training.images.ImageList.__getitem__", failing)


def disk_full(patch: pytest.MonkeyPatch, ranks: Ranks) -> None:
    if ranks.first:
        failing = Failing(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
        patch.setattr("efft_kernels.training.run_folder.save_state", failing)


def fault(patch: pytest.MonkeyPatch, ranks: Ranks) -> None:
    if ranks.rank == 1:
        patch.setattr("efft_kernels.training.run.put_on", Failing(KeyError("a fault of ours")))


def other_images(patch: pytest.MonkeyPatch, ranks: Ranks) -> None:
    if ranks.rank == 1:
        patch.setattr("efft_kernels.training.run.fingerprint", lambda *_: "another")


def vanished(patch: pytest.MonkeyPatch, ranks: Ranks) -> None:
    """As a killed process, it says nothing to the others."""
    if ranks.rank == 1:
        patch.setattr("efft_kernels.training.run.put_on", Failing(SystemExit(3)))
        patch.setattr("efft_kernels.training.ranks._tell_first", lambda *_: (True, ""))


def nothing(patch: pytest.MonkeyPatch, ranks: Ranks) -> None:
    pass


class Failing:
    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise self.error


# What goes wrong, the command line's further options, the one line on stderr, exit codes by rank.
FAILURES = {
    "unreadable": (unreadable, (), "error: rank 1: cannot read image 7.png", (1, 2)),
    "disk full": (disk_full, (), r"error: rank 0: \[Errno 28\] No space left on device", (1, 1)),
    "a fault of ours": (fault, (), "", (1, "KeyError")),
    "other images": (
        other_images,
        (),
        "error: rank 1: backbone must be the same in every process, got another in rank 1",
        (1, 2),
    ),
    "vanished": (
        vanished,
        (),
        "error: rank 0: another process ended without a word, killed or out of memory",
        (1, 3),
    ),
    "in every process": (
        nothing,
        ("--lr", "0"),
        r"error: rank \d: lr must be above 0, got 0.0",
        (2, 2),
    ),
}


def worker(rank: int, root: Path, ports: Sequence[int]) -> None:
    torch.set_num_threads(1)
    # As torchrun does, which holds the store that the processes share.
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(WORLD), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    forked = mp.get_context("fork")
    for name, port in zip(FAILURES, ports[1:], strict=True):
        os.environ["MASTER_PORT"] = str(port)
        failing = forked.Process(target=fail, args=(root, name, Ranks(rank, WORLD)))
        failing.start()
        failing.join(60)
        failing.kill()
    os.environ["MASTER_PORT"] = str(ports[0])
    torch.set_default_dtype(torch.float64)  # Adam makes rounding of a gradient of 0 a whole step
    with session() as ranks:
        for name, (check, given) in CASES.items():
            folder = root / name
            if ranks.first:
                folder.mkdir()
            check(root, folder, ranks, **given)
            ranks.gather(None)
            if ranks.first:
                (folder / "passed").touch()


def fail(root: Path, name: str, ranks: Ranks) -> None:
    """Write what `train` prints on stderr, and its exit code or the name of the error."""
    broken, options, *_ = FAILURES[name]
    data, model, output = root / "images", "two_blocks", root / name
    arguments = ["train", "--data", data, "--model", model, "--method", "bitfit", "--no-pretrained"]
    arguments += ["--img-size", 16, "--epochs", 1, "--batch-size", 4, "--device", "cpu"]
    arguments += ["--workers", 0, "--output", output, *options]
    with pytest.MonkeyPatch.context() as patch:
        broken(patch, ranks)
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    unexpected = result.exception if not isinstance(result.exception, SystemExit) else None
    shown = result.stderr, type(unexpected).__name__ if unexpected else result.exit_code
    (root / f"{name}.{ranks.rank}").write_text(json.dumps(shown))


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder in which two processes ran the checks up to the first that failed, and why."""
    root = tmp_path_factory.mktemp("ranks")
    make_images(root)
    stores = [
        TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        for _ in range(1 + len(FAILURES))
    ]
    try:
        mp.start_processes(
            worker,
            (root, [store.port for store in stores]),
            nprocs=WORLD,
            start_method="forkserver",
        )
    except mp.ProcessRaisedException as error:
        return root, str(error)
    return root, ""


@pytest.mark.parametrize("name", CASES)
def test_on_two_processes(ran: tuple[Path, str], name: str) -> None:
    root, error = ran
    assert (root / name / "passed").exists(), error


@pytest.mark.parametrize("name", FAILURES)
def test_one_process_tells_why_all_end(ran: tuple[Path, str], name: str) -> None:
    root, _ = ran
    _, _, expected, codes = FAILURES[name]
    shown = [json.loads((root / f"{name}.{rank}").read_text()) for rank in range(WORLD)]
    lines = [line for text, _ in shown for line in text.splitlines() if "note:" not in line]
    assert len(lines) == bool(expected) and re.fullmatch(expected, "".join(lines)), lines
    found = tuple(code for _, code in shown)
    assert found == codes or (name == "in every process" and sorted(found) == [1, 2])
