"""Measuring a trained adapter: on which images, in which batches, and what is refused."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch.utils.data import SequentialSampler
from torchvision.transforms.functional import to_tensor

from efft_kernels import LoRA, attach
from efft_kernels.training import evaluation, run_folder
from efft_kernels.training.evaluation import EvalResult, evaluate_adapter
from efft_kernels.training.images import open_splits
from efft_kernels.training.settings import TrainSettings


def make_images(root: Path, count: int) -> Path:
    for label in "ab":
        (root / label).mkdir(parents=True)
        for index in range(count):
            Image.new("RGB", (2, 2), (index, 0, 9)).save(root / label / f"{index}.png")
    return root


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make_images(tmp_path / "images", 5)


@pytest.fixture
def adapter(root: Path, tmp_path: Path, make_vit: Any) -> Path:
    """Of a run in bfloat16 and batches of 3, which held out 2 images of each class."""
    splits = open_splits(root, val_split=0.4, seed=42)
    identity = {"classes": list(splits.classes), "data": splits.fingerprint()}
    config = {
        "settings": TrainSettings(root, batch_size=3, amp="bfloat16", val_split=0.4).to_json(),
        "identity": identity | {"skipped_images": [], "backbone": "1"},
        "versions": {},
    }
    path = tmp_path / "adapter.safetensors"
    attach(make_vit(), LoRA(rank=1)).save(
        path, metadata={run_folder.HEADER_KEY: json.dumps(config)}
    )
    return path


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """(loader, targets, dtype of autocast) of each measurement, which finds 50 %."""
    found: list[Any] = []
    make = evaluation.images.make_loader

    def loader(*args: Any, **options: Any) -> Any:
        found.append([make(*args, **options)])
        return found[-1][0]

    def evaluate(model: Any, batches: Any, *, autocast_dtype: Any, **options: Any) -> float:
        found[-1] += [[targets.tolist() for _, targets in batches], autocast_dtype]
        return 50.0

    trained = SimpleNamespace(model=None, transform=to_tensor)
    monkeypatch.setattr(evaluation.images, "make_loader", loader)
    monkeypatch.setattr(evaluation, "evaluate", evaluate)
    monkeypatch.setattr(evaluation, "open_trained", lambda *args, **options: trained)
    return found


def test_batches_and_precision_are_the_runs_or_those_given(
    root: Path, adapter: Path, measured: list[Any]
) -> None:
    done: list[tuple[int, int]] = []
    result = evaluate_adapter(root, adapter, device="cpu", on_batch=lambda *n: done.append(n))
    assert result == EvalResult(50.0, 4, f"held out of {root} by training")
    evaluate_adapter(root, adapter, device="cpu", batch_size=2, amp="float16")
    (loader, targets, dtype), (_, others, other_dtype) = measured
    assert (targets, dtype) == ([[0, 0, 1], [1]], torch.bfloat16)
    assert (others, other_dtype) == ([[0, 0], [1, 1]], torch.float16)
    assert done == [(1, 2), (2, 2)]
    assert isinstance(loader.sampler, SequentialSampler) and not loader.pin_memory


def test_which_images_are_measured(
    root: Path, adapter: Path, measured: list[Any], tmp_path: Path
) -> None:
    found = evaluate_adapter(root, adapter, split="all", device="cpu")
    assert (found.images, found.images_from) == (10, f"all of {root}")
    make_images(tmp_path / "other" / "val", 3)
    found = evaluate_adapter(tmp_path / "other", adapter, device="cpu")
    assert (found.images, found.images_from) == (6, f"all of {tmp_path / 'other' / 'val'}")


@pytest.mark.parametrize(
    ("name", "taken", "refused"),
    [
        ("split", ["val", "all"], ["train"]),
        ("amp", [None, "none", "float16"], ["float8"]),
        ("batch_size", [None, 1], [0]),
        ("workers", [0, 1], [-1]),
    ],
)
def test_senseless_options_are_named(
    tmp_path: Path, name: str, taken: list[Any], refused: list[Any]
) -> None:
    for values, message in ((taken, "nothing there"), (refused, f"^{name} must be ")):
        for value in values:
            with pytest.raises(ValueError, match=message):
                evaluate_adapter(tmp_path, tmp_path / "absent.safetensors", **{name: value})


def test_the_defaults_of_a_measurement() -> None:
    expected: dict[str, Any] = dict.fromkeys(("checkpoint", "pretrained", "batch_size", "amp"))
    expected |= {"split": "val", "merge": False, "workers": 0, "skip_bad_images": False}
    parameters = inspect.signature(evaluate_adapter).parameters
    assert {name: parameters[name].default for name in expected} == expected
