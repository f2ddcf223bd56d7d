"""Training on a folder of images: it learns, stops and resumes, and refuses what cannot work."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.utils.data import RandomSampler, SequentialSampler

import efft_kernels
from efft_kernels import LoRA, attach
from efft_kernels.adapters.adapter import Adapter
from efft_kernels.methods import METHODS
from efft_kernels.training import run as training_run
from efft_kernels.training.backbone import build_backbone
from efft_kernels.training.evaluation import evaluate_adapter
from efft_kernels.training.images import UnreadableImageError, open_splits
from efft_kernels.training.loop import NonFiniteLossError
from efft_kernels.training.ranks import ALONE, Ranks
from efft_kernels.training.reproducible import epoch_seed
from efft_kernels.training.run import WARMUP_LR, EpochRow, fit, prepare
from efft_kernels.training.settings import TrainSettings, resolve_device

MODEL = "test_vit"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes, told apart by which colour is brighter under noise."""
    root = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(1)
    for channel, name in enumerate(("red", "green", "blue")):
        (root / name).mkdir()
        for index in range(10):
            pixels = generator.integers(0, 200, (16, 16, 3), dtype=np.uint8)
            pixels[..., channel] += 55
            Image.fromarray(pixels).save(root / name / f"{index}.png")
    return root


@pytest.fixture(scope="module")
def settings(images: Path) -> TrainSettings:
    return TrainSettings(
        data=images,
        model=MODEL,
        rank=4,
        epochs=3,
        batch_size=8,
        img_size=32,
        pretrained=False,
        device="cpu",
        val_split=0.3,
    )


@pytest.fixture(scope="module")
def uninterrupted(settings: TrainSettings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with `settings` that was left alone."""
    output = tmp_path_factory.mktemp("uninterrupted") / "run"
    fit(prepare(settings, output))
    return output


def rows(output: Path) -> list[dict[str, str]]:
    """metrics.csv without the times."""
    with (output / "metrics.csv").open(newline="") as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


def assert_same_run(first: Path, second: Path) -> None:
    tensors, others = (load_file(path / "adapter.safetensors") for path in (first, second))
    assert tensors.keys() == others.keys()
    assert all(torch.equal(tensor, others[name]) for name, tensor in tensors.items())
    assert rows(first) == rows(second)


def test_training_learns_and_evaluation_repeats_it(settings: TrainSettings, tmp_path: Path) -> None:
    output = tmp_path / "run"
    run = prepare(dataclasses.replace(settings, epochs=5), output)
    start = time.perf_counter()
    result = fit(run)
    assert 0 < sum(row.seconds for row in run.history) < time.perf_counter() - start
    assert result.last_top1_percent > 80  # chance is 33
    assert result.best_top1_percent >= result.last_top1_percent
    files = {"adapter.safetensors", "config.json", "curves.png", "metrics.csv", "state.pt"}
    assert {path.name for path in output.iterdir()} == files
    assert [int(row["epoch"]) for row in rows(output)] == [1, 2, 3, 4, 5]
    assert float(rows(output)[-1]["val_top1_percent"]) == result.last_top1_percent
    for merge in (False, True):
        again = evaluate_adapter(settings.data, result.adapter_path, merge=merge, device="cpu")
        assert again.top1_percent == result.last_top1_percent
        assert again.images == 9


class TokenBatchNorm(torch.nn.BatchNorm1d):
    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return super().forward(tokens.flatten(1, -2).mT).mT.reshape(tokens.shape)


@pytest.fixture
def batch_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every backbone that is built has a frozen BatchNorm, whose statistics training moves."""

    def build(*args: Any, **options: Any) -> torch.nn.Module:
        model: Any = build_backbone(*args, **options)
        model.patch_embed.norm = TokenBatchNorm(model.embed_dim)
        return model

    for module in ("run", "trained"):
        monkeypatch.setattr(f"efft_kernels.training.{module}.build_backbone", build)


def test_statistics_are_part_of_a_run(
    settings: TrainSettings,
    tmp_path: Path,
    batch_norm: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What evaluation repeats, and a resumed run continues from."""
    output, other = tmp_path / "run", tmp_path / "killed"
    run = prepare(dataclasses.replace(settings, epochs=2), output)
    result = fit(run)
    key = "buffers.patch_embed.norm.running_mean"
    saved = load_file(result.adapter_path)[key]
    assert torch.equal(saved, run.adapter.state_dict()[key]) and saved.abs().max() > 0.01
    for merge in (False, True):
        again = evaluate_adapter(settings.data, result.adapter_path, merge=merge, device="cpu")
        assert again.top1_percent == result.last_top1_percent
    with pytest.raises(Killed):
        fit(
            prepare(dataclasses.replace(settings, epochs=2), other),
            on_step=stop_in_an_epoch(monkeypatch),
        )
    fit(prepare(dataclasses.replace(settings, epochs=2), other, resume=True))
    assert_same_run(output, other)


def test_a_finished_run_resumes_to_its_result(settings: TrainSettings, tmp_path: Path) -> None:
    result = fit(prepare(dataclasses.replace(settings, epochs=1), tmp_path / "run"))
    (tmp_path / "run" / "adapter.safetensors").unlink()  # as if killed before it was written
    run = prepare(dataclasses.replace(settings, epochs=1), tmp_path / "run", resume=True)
    assert fit(run) == result
    assert result.adapter_path.is_file()


class Killed(BaseException):
    """The process ends here."""


def stop_in_an_epoch(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    calls = iter(range(100))

    def on_step(done: int, total: int) -> None:
        if next(calls) == 4:  # 3 updates an epoch: in the second
            raise Killed

    return on_step


def stop_while_saving_the_state(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = iter(range(100))
    write = Path.write_bytes

    def half(path: Path, content: Any) -> int:
        if path.name == "state.pt" and next(calls) == 1:
            write(path, content[:1000])
            raise Killed
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", half)


def stop_before_the_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = iter(range(100))
    save = Adapter.save

    def not_twice(self: Adapter, *args: Any, **kwargs: Any) -> None:
        if next(calls) == 1:
            raise Killed
        save(self, *args, **kwargs)

    monkeypatch.setattr(Adapter, "save", not_twice)


def stop_in_the_first_epoch(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    def on_step(done: int, total: int) -> None:
        raise Killed

    return on_step


@pytest.mark.parametrize(
    ("stop", "finished"),
    [
        (stop_in_the_first_epoch, 0),
        (stop_in_an_epoch, 1),
        (stop_while_saving_the_state, 1),
        (stop_before_the_adapter, 2),
    ],
)
def test_a_stopped_run_resumes_to_the_same_bits(
    settings: TrainSettings,
    tmp_path: Path,
    uninterrupted: Path,
    stop: Callable[[pytest.MonkeyPatch], Any],
    finished: int,
) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        on_step = stop(monkeypatch)
        with pytest.raises(Killed):
            fit(prepare(settings, tmp_path / "run"), on_step=on_step)
    (tmp_path / "run" / ".adapter.safetensors.x1").touch()  # what a kill while saving leaves
    torch.manual_seed(999)
    run = prepare(settings, tmp_path / "run", resume=True)
    assert len(run.history) == finished
    fit(run)
    assert_same_run(tmp_path / "run", uninterrupted)
    assert not list((tmp_path / "run").glob(".*"))


def test_a_run_that_steps_once_an_epoch_resumes_to_the_same_bits(
    settings: TrainSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """21 images in batches of 8 and no smaller one: 2 updates an epoch."""
    released = dataclasses.replace(settings, schedule="epoch", drop_last=True, warmup_epochs=1)
    fit(prepare(released, tmp_path / "whole"))
    with pytest.raises(Killed):
        fit(prepare(released, tmp_path / "killed"), on_step=stop_in_an_epoch(monkeypatch))
    run = prepare(released, tmp_path / "killed", resume=True)
    assert len(run.history) == 2
    assert run.optimizer.param_groups[0]["lr"] == run.history[-1].lr
    fit(run)
    assert_same_run(tmp_path / "killed", tmp_path / "whole")
    low, peak = settings.min_lr, settings.lr
    fall = [low + (peak - low) / 2 * (1 + math.cos(math.pi * t / 3)) for t in (1, 2)]
    rates = [float(row["lr"]) for row in rows(tmp_path / "whole")]
    assert rates == pytest.approx([WARMUP_LR, *fall])


def test_half_precision_with_augmentation_resumes_too(
    settings: TrainSettings, tmp_path: Path
) -> None:
    half = dataclasses.replace(settings, amp="float16", augment=True, epochs=2, learn_scale=True)
    fit(prepare(half, tmp_path / "whole"))
    with pytest.MonkeyPatch.context() as monkeypatch, pytest.raises(Killed):
        fit(prepare(half, tmp_path / "run"), on_step=stop_in_an_epoch(monkeypatch))
    fit(prepare(dataclasses.replace(half, workers=1), tmp_path / "whole", resume=True))
    fit(prepare(half, tmp_path / "run", resume=True))
    assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": 0.01}, r"lr must be 0\.001 as when the run began, got 0\.01"),
        ({"rank": (4, 2)}, "rank must be 4"),
        ({"scale": 2.0}, "scale must be unset"),
        ({"epochs": 9}, "epochs must be 3"),
        ({"val_split": 0.4}, "val_split must be 0.3"),
    ],
)
def test_resuming_with_another_setting_names_it(
    settings: TrainSettings, uninterrupted: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        prepare(dataclasses.replace(settings, **change), uninterrupted, resume=True)


def test_resuming_with_other_images_or_backbone_is_refused(
    settings: TrainSettings, tmp_path: Path
) -> None:
    for label in ("a", "b"):
        (tmp_path / "images" / label).mkdir(parents=True)
        for index in range(8):
            path = tmp_path / "images" / label / f"{index}.png"
            Image.new("RGB", (8, 8), (index, 0, 9)).save(path)
    mine = dataclasses.replace(settings, data=tmp_path / "images", epochs=1)
    fit(prepare(mine, tmp_path / "run"))
    config = tmp_path / "run" / "config.json"
    text = config.read_text()
    config.write_text(text.replace('"backbone": "', '"backbone": "0'))
    with pytest.raises(ValueError, match=r"checkpoint must be as .* backbone's weights changed"):
        prepare(mine, tmp_path / "run", resume=True)
    config.write_text(text)
    (tmp_path / "images" / "a" / "0.png").rename(tmp_path / "images" / "a" / "9.png")
    with pytest.raises(ValueError, match=r"data must be as .* image files changed"):
        prepare(mine, tmp_path / "run", resume=True)


def test_an_output_in_use_is_refused(
    settings: TrainSettings, uninterrupted: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="holds a run: pass --resume"):
        prepare(settings, uninterrupted)
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ValueError, match=r"holds thesis\.tex: pass another --output"):
        prepare(settings, tmp_path)
    with pytest.raises(ValueError, match=r"without config\.json"):
        prepare(settings, tmp_path, resume=True)
    with pytest.raises(ValueError, match="must be a folder"):
        prepare(settings, tmp_path / "thesis.tex")


def test_a_bad_setting_writes_nothing(settings: TrainSettings, tmp_path: Path) -> None:
    for change, message in (
        ({"rank": 0}, "rank"),
        ({"rank": 5000}, "rank"),
        ({"init": "w"}, "init"),
        ({"options": {"ffn_init": "w"}}, "ffn_init must be one of"),
        ({"options": {"layer_rank": 3}}, "layer_rank must be left out for method efft2, got 3"),
        ({"rank": [2, 4]}, "rank must have one entry per stage"),
        ({"dropout": 1.5}, "dropout"),
        ({"layers": (12,)}, "layers"),
        ({"targets": ("nothing",)}, "targets"),
        ({"device": "cuda:99"}, "device"),
        ({"device": "quantum"}, "device"),
        ({"device": "meta"}, "device"),
        ({"model": "resnet18", "img_size": None, "drop_path": 0.0}, "targets"),
    ):
        with pytest.raises(ValueError, match=message):
            prepare(dataclasses.replace(settings, **change), tmp_path / "run")
    assert not (tmp_path / "run").exists()


# Setting → (values that are taken, values that are refused), at the bounds of its range.
EDGES: dict[str, tuple[list[Any], list[Any]]] = {
    "method": (["lora"], ["magic"]),
    "amp": (["none", "float16"], ["float8"]),
    "normalize": (["imagenet"], ["clip"]),
    "schedule": (["constant"], ["step"]),
    "optimizer": (["sgd"], ["adam"]),
    "keep": (["best"], ["first"]),
    "epochs": ([1], [0]),
    "batch_size": ([1], [0]),
    "accumulate": ([1], [0]),
    "weight_decay": ([0.0], [-1e-9, math.inf]),
    "min_lr": ([0.0, 1e-3], [-1e-9, 1.0001e-3]),  # lr is 1e-3
    "mixup": ([0.0], [-1e-9, math.inf]),
    "cutmix": ([0.0], [-1e-9, math.inf]),
    "workers": ([0, 1024], [-1, 1025]),
    "seed": ([0, 2**32 - 1], [-1, 2**32]),
    "lr": ([1e-5], [0.0, math.nan, math.inf]),
    "backbone_lr_factor": ([1.0], [0.0, math.inf]),
    "label_smoothing": ([0.0, 0.999], [-1e-9, 1.0]),
    "ema": ([1e-9, 0.999], [0.0, 1.0]),
    "clip_grad": ([1e-9], [0.0, math.inf]),
    "drop_path": ([0.0, 0.999], [-1e-9, 1.0]),
    "val_split": ([1e-9, 0.999], [0.0, 1.0]),
    "img_size": ([1, 8192], [0, 8193]),
    "layers": ([(0,)], [(), (1, -1)]),
    "warmup_epochs": ([0, 2], [-1, 3]),  # epochs is 3
}


@pytest.mark.parametrize("name", EDGES)
def test_senseless_settings_are_named(settings: TrainSettings, name: str) -> None:
    taken, refused = EDGES[name]
    for value in taken:
        assert getattr(dataclasses.replace(settings, **{name: value}), name) == value
    for value in refused:
        with pytest.raises(ValueError, match=f"{name} must be .*, got"):
            dataclasses.replace(settings, **{name: value})


def test_the_defaults_of_a_run(images: Path) -> None:
    nothing = "rank scale init dropout cores layers targets warmup_epochs checkpoint img_size ema"
    nothing += " clip_grad recipe task"
    expected: dict[str, Any] = dict.fromkeys(nothing.split())
    expected |= {"data": images, "model": "vit_tiny_patch16_224", "method": "efft2", "options": {}}
    expected |= {"epochs": 100, "batch_size": 64, "accumulate": 1, "seed": 42, "val_split": 0.2}
    expected |= {"lr": 1e-3, "min_lr": 1e-5, "weight_decay": 1e-4, "backbone_lr_factor": 1.0}
    expected |= {"optimizer": "adamw", "schedule": "update", "keep": "last", "drop_path": 0.1}
    expected |= {"mixup": 0.0, "cutmix": 0.0, "label_smoothing": 0.0, "normalize": "model"}
    expected |= {"device": "auto", "amp": "none", "backend": "auto", "workers": 0}
    expected |= {"pretrained": True, "learn_scale": False, "drop_last": False, "augment": False}
    expected |= {"skip_bad_images": False}
    assert dataclasses.asdict(TrainSettings(images)) == expected


@pytest.mark.parametrize("method", METHODS)
def test_the_rank_is_the_methods_own_by_default(method: str) -> None:
    settings = TrainSettings(Path("images"), method=method)
    assert settings.method_config() == METHODS[method]()
    assert settings.resolved_rank == settings.to_json()["rank"] == METHODS[method]().rank  # type: ignore[attr-defined]


def test_warmup_is_a_tenth_by_default(settings: TrainSettings) -> None:
    assert dataclasses.replace(settings, epochs=100).resolved_warmup_epochs == 10
    assert dataclasses.replace(settings, epochs=9).resolved_warmup_epochs == 0


def test_a_nan_stops_the_run_and_keeps_the_last_good_epoch(
    settings: TrainSettings, tmp_path: Path
) -> None:
    run = prepare(settings, tmp_path / "run")
    before: dict[str, bytes] = {}

    def poison(row: object) -> None:
        before.update({p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()})
        with torch.no_grad():
            next(run.adapter.parameters()).fill_(float("nan"))

    with pytest.raises(NonFiniteLossError, match="loss is nan in epoch 2, step 1"):
        fit(run, on_epoch=poison)
    assert {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()} == before
    assert len(prepare(settings, tmp_path / "run", resume=True).history) == 1


def test_a_last_update_that_diverges_is_not_saved(settings: TrainSettings, tmp_path: Path) -> None:
    run = prepare(settings, tmp_path / "run")

    def poison(done: int, total: int) -> None:
        if done == total:
            with torch.no_grad():
                next(run.adapter.parameters()).fill_(float("inf"))

    with pytest.raises(NonFiniteLossError, match="is not finite after epoch 1"):
        fit(run, on_step=poison)
    assert not (tmp_path / "run" / "state.pt").exists()


def test_a_last_update_that_leaves_float_range_is_not_saved(
    settings: TrainSettings, tmp_path: Path
) -> None:
    run = prepare(dataclasses.replace(settings, epochs=1), tmp_path / "run")

    def blow_up(done: int, total: int) -> None:
        if done == total:
            with torch.no_grad():
                run.model.head.weight.fill_(3e38)  # type: ignore[union-attr,operator]

    with pytest.raises(NonFiniteLossError, match="logits are not finite"):
        fit(run, on_step=blow_up)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.json"]


def test_the_best_epoch_may_not_be_the_last(
    settings: TrainSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = iter([50.0, 80.0, 80.0, 70.0])
    monkeypatch.setattr("efft_kernels.training.run.evaluate", lambda *_, **__: next(measured))
    result = fit(prepare(dataclasses.replace(settings, epochs=4), tmp_path / "run"))
    assert (result.best_top1_percent, result.best_epoch) == (80.0, 2)
    assert result.last_top1_percent == 70.0
    assert [float(row["val_top1_percent"]) for row in rows(tmp_path / "run")] == [50, 80, 80, 70]


def test_the_learning_rate_follows_the_updates(
    settings: TrainSettings, uninterrupted: Path
) -> None:
    peak, low, updates = settings.lr, settings.min_lr, 9  # 21 images in batches of 8, 3 epochs
    expected = [low + (peak - low) / 2 * (1 + math.cos(math.pi * n / updates)) for n in (3, 6, 9)]
    assert [float(row["lr"]) for row in rows(uninterrupted)] == pytest.approx(expected, rel=1e-6)


def test_the_learning_rate_rises_in_the_warm_up(settings: TrainSettings, tmp_path: Path) -> None:
    run = prepare(dataclasses.replace(settings, warmup_epochs=2), tmp_path / "run")
    found = [run.optimizer.param_groups[0]["lr"]]
    for update in range(1, 7):
        run.scheduler.step_update(update)
        found.append(run.optimizer.param_groups[0]["lr"])
    rise = [WARMUP_LR + (settings.lr - WARMUP_LR) * update / 6 for update in range(6)]
    assert found[:6] == pytest.approx(rise)
    middle = settings.min_lr + (settings.lr - settings.min_lr) / 2 * (1 + math.cos(math.pi * 6 / 9))
    assert found[6] == pytest.approx(middle)


def test_sgd_at_a_constant_rate_in_two_groups(settings: TrainSettings, tmp_path: Path) -> None:
    sgd = dataclasses.replace(
        settings, optimizer="sgd", schedule="constant", lr=0.01, backbone_lr_factor=0.5, epochs=2
    )
    run = prepare(sgd, tmp_path / "whole")
    rest, head = run.optimizer.param_groups
    assert isinstance(run.optimizer, torch.optim.SGD)
    assert (rest["lr"], head["lr"]) == (0.005, 0.01)
    assert (head["momentum"], head["nesterov"], head["weight_decay"]) == (0.9, False, 1e-4)
    assert {id(p) for p in head["params"]} == {id(p) for p in run.model.head.parameters()}  # type: ignore[union-attr]
    assert {id(p) for p in rest["params"]} == {id(p) for p in run.adapter.parameters()} - {
        id(p) for p in head["params"]
    }
    fit(run)
    assert [float(row["lr"]) for row in rows(tmp_path / "whole")] == [0.005, 0.005]
    assert (rest["lr"], head["lr"]) == (0.005, 0.01)

    class Stop(Exception):
        pass

    def stop(row: object) -> None:
        raise Stop

    with pytest.raises(Stop):
        fit(prepare(sgd, tmp_path / "resumed"), on_epoch=stop)
    fit(prepare(sgd, tmp_path / "resumed", resume=True))
    assert_same_run(tmp_path / "whole", tmp_path / "resumed")


def test_the_cosine_does_not_rise_for_the_slower_group(settings: TrainSettings) -> None:
    with pytest.raises(ValueError, match=r"min_lr must be at most lr · backbone_lr_factor=1e-06"):
        dataclasses.replace(settings, backbone_lr_factor=1e-3)
    dataclasses.replace(settings, backbone_lr_factor=0.5, min_lr=0.5 * settings.lr)
    with pytest.raises(ValueError, match=r"min_lr must be at most lr=0\.001, got 0\.0015"):
        dataclasses.replace(settings, backbone_lr_factor=2.0, min_lr=1.5 * settings.lr)


class Command:
    """Unpickling it makes a folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


def test_a_foreign_or_damaged_state_is_refused(settings: TrainSettings, tmp_path: Path) -> None:
    output = tmp_path / "run"
    once = dataclasses.replace(settings, epochs=1)
    fit(prepare(once, output))
    whole = (output / "state.pt").read_bytes()
    torch.save({"trained": Command(tmp_path / "ran")}, output / "state.pt")
    with pytest.raises(ValueError, match=r"state\.pt must be the state of this run"):
        prepare(once, output, resume=True)
    assert not (tmp_path / "ran").exists()
    for content in (whole[: len(whole) // 2], b""):
        (output / "state.pt").write_bytes(content)
        with pytest.raises(ValueError, match=r"state\.pt must be the state of this run"):
            prepare(once, output, resume=True)
    torch.save({"trained": {}}, output / "state.pt")
    with pytest.raises(ValueError, match=r"state\.pt must be the state of this run"):
        prepare(once, output, resume=True)
    (output / "config.json").write_text('{"settings": {}}')
    with pytest.raises(ValueError, match=r"config\.json must be the configuration of a run"):
        prepare(once, output, resume=True)


def test_a_skipped_image_is_as_if_it_were_not_there(
    settings: TrainSettings, tmp_path: Path
) -> None:
    data = tmp_path / "images"
    shutil.copytree(settings.data, data)
    bad = data / "red" / "3.png"
    bad.write_bytes(b"\x89PNG no more")
    once = dataclasses.replace(settings, data=data, epochs=1, skip_bad_images=True)
    notes: list[str] = []
    first = fit(prepare(once, tmp_path / "first", notify=notes.append))
    assert any(f"skipped 1 unreadable images: cannot read image {bad}" in note for note in notes)

    def evaluated(**options: Any) -> tuple[float, int]:
        result = evaluate_adapter(data, first.adapter_path, device="cpu", **options)
        return result.top1_percent, result.images

    assert evaluated() == (first.last_top1_percent, 9)
    shutil.copy(settings.data / "red" / "3.png", bad)  # mended: the split is still the run's own
    assert evaluated() == (first.last_top1_percent, 9)
    assert len(prepare(once, tmp_path / "first", resume=True).history) == 1
    bad.unlink()
    fit(prepare(once, tmp_path / "second"))
    assert_same_run(tmp_path / "first", tmp_path / "second")
    assert evaluated() == (first.last_top1_percent, 9)
    assert len(prepare(once, tmp_path / "first", resume=True).history) == 1

    held_out = open_splits(data, val_split=0.3, seed=settings.seed).val
    Path(held_out[0][0]).write_bytes(b"gone")
    with pytest.raises(UnreadableImageError, match="got 1 unreadable"):
        evaluated()
    assert evaluated(skip_bad_images=True)[1] == 8
    with pytest.raises(ValueError, match="the image files changed"):
        prepare(once, tmp_path / "first", resume=True)


def test_evaluation_on_other_images(
    settings: TrainSettings, uninterrupted: Path, tmp_path: Path
) -> None:
    adapter = uninterrupted / "adapter.safetensors"
    (tmp_path / "green").mkdir()
    Image.new("RGB", (16, 16), (90, 200, 90)).save(tmp_path / "green" / "0.png")
    everything = evaluate_adapter(settings.data, adapter, split="all", device="cpu")
    assert everything.images == 30
    one = evaluate_adapter(tmp_path, adapter, split="all", device="cpu")
    assert (one.images, one.top1_percent) == (1, 100.0)
    with pytest.raises(ValueError, match="at least 2 classes"):
        evaluate_adapter(tmp_path, adapter, device="cpu")
    (tmp_path / "red").mkdir()
    for label in ("green", "red"):
        for index in range(1, 9):
            Image.new("RGB", (8, 8), (index, 0, 9)).save(tmp_path / label / f"{index}.png")
    with pytest.raises(ValueError, match=r"others in .*: pass --split all"):
        evaluate_adapter(tmp_path, adapter, device="cpu")
    (tmp_path / "mauve").mkdir()
    with pytest.raises(ValueError, match=r"only the classes .*, got .* with mauve"):
        evaluate_adapter(tmp_path, adapter, split="all", device="cpu")


def test_evaluation_refuses_what_is_no_adapter(images: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing there"):
        evaluate_adapter(images, tmp_path / "absent.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"12")
    with pytest.raises(ValueError, match="safetensors"):
        evaluate_adapter(images, tmp_path / "broken.safetensors")


def test_evaluation_on_another_backbone_warns(
    settings: TrainSettings, uninterrupted: Path, tmp_path: Path
) -> None:
    torch.manual_seed(77)
    other = build_backbone(MODEL, num_classes=3, pretrained=False, img_size=32)
    torch.save(other.state_dict(), tmp_path / "other.pth")
    notes: list[str] = []
    evaluate_adapter(
        settings.data,
        uninterrupted / "adapter.safetensors",
        checkpoint=tmp_path / "other.pth",
        device="cpu",
        notify=notes.append,
    )
    assert "backbone's weights differ" in notes[0]


def test_the_adapter_loads_in_plain_code(uninterrupted: Path) -> None:
    config = json.loads((uninterrupted / "config.json").read_text())
    model = timm.create_model(MODEL, num_classes=3, img_size=32)
    adapter = efft_kernels.load(model, uninterrupted / "adapter.safetensors")
    assert adapter.num_parameters() == config["factor_parameters"]


@pytest.mark.parametrize("there", [True, False])
def test_auto_is_cuda_where_there_is_one(monkeypatch: pytest.MonkeyPatch, there: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    assert resolve_device("auto") == torch.device("cuda" if there else "cpu")


EXTRAS: dict[str, Any] = {
    "mixup": 0.4,
    "cutmix": 1.0,
    "label_smoothing": 0.1,
    "ema": 0.9,
    "clip_grad": 0.5,
    "accumulate": 2,
    "keep": "best",
    "epochs": 4,
}


def test_a_run_with_every_extra_resumes_to_the_same_bits(
    settings: TrainSettings, tmp_path: Path
) -> None:
    settings = dataclasses.replace(settings, **EXTRAS)
    result = fit(prepare(settings, tmp_path / "whole"))
    again = evaluate_adapter(settings.data, result.adapter_path, device="cpu")
    assert again.top1_percent == result.best_top1_percent

    class Stopped(Exception):
        pass

    def stop(row: Any) -> None:
        if row.epoch == 2:
            raise Stopped

    with pytest.raises(Stopped):
        fit(prepare(settings, tmp_path / "stopped"), on_epoch=stop)
    assert not (tmp_path / "stopped" / "curves.png").exists()
    fit(prepare(settings, tmp_path / "stopped", resume=True))
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")
    assert (tmp_path / "stopped" / "curves.png").read_bytes()[1:4] == b"PNG"


@pytest.mark.parametrize("ema", [None, 0.9])
def test_the_kept_adapter_is_the_best_epochs(
    settings: TrainSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ema: float | None
) -> None:
    """Also after a resumed run's first epoch, whatever goes on to be trained."""
    validated: list[dict[str, torch.Tensor]] = []
    run = prepare(dataclasses.replace(settings, keep="best", ema=ema), tmp_path / "run")

    def measured(*args: Any, **kwargs: Any) -> float:
        state = run.adapter.state_dict()
        validated.append({name: tensor.clone() for name, tensor in state.items()})
        return (50.0, 90.0, 90.0)[len(validated) - 1]

    monkeypatch.setattr("efft_kernels.training.run.evaluate", measured)
    result = fit(run)
    assert (result.kept_epoch, result.best_epoch, result.last_top1_percent) == (2, 2, 90.0)
    saved = load_file(result.adapter_path)
    assert all(torch.equal(saved[name], tensor) for name, tensor in validated[1].items())
    same = [torch.equal(tensor, validated[1][n]) for n, tensor in run.adapter.state_dict().items()]
    assert not all(same)
    result.adapter_path.unlink()
    prepare(run.settings, run.output, resume=True)
    again = load_file(result.adapter_path)
    assert all(torch.equal(again[name], tensor) for name, tensor in saved.items())


class Second(Ranks):
    """The second of two processes; the first finds what it finds itself, but another backbone."""

    def from_first(self, make: Callable[[], Any]) -> Any:
        made = make()
        if isinstance(made, dict) and "backbone" in made:
            made = made | {"backbone": "other"}
        return made

    def gather(self, value: Any) -> list[Any]:
        return [value, value]


class TestOfATinyBackbone:
    """Of a few thousand parameters, in place of timm's."""

    @pytest.fixture
    def built(self, monkeypatch: pytest.MonkeyPatch, make_vit: Any) -> list[Any]:
        """What a backbone was built with, and where it went."""
        events: list[Any] = []

        def build(name: str, *, num_classes: int, **options: Any) -> torch.nn.Module:
            events.append(torch.initial_seed())
            model = make_vit(num_classes=num_classes)
            model.pretrained_cfg = {"input_size": (3, 8, 8), "mean": (0.5,) * 3, "std": (0.5,) * 3}
            move = model.to
            model.to = lambda device: events.append(device) or move(device)
            return model

        monkeypatch.setattr(training_run, "build_backbone", build)
        return events

    @pytest.fixture
    def tiny(self, settings: TrainSettings, built: list[Any]) -> TrainSettings:
        return dataclasses.replace(settings, rank=2, img_size=8, drop_path=0.0)

    def test_what_a_run_is_made_of(
        self, tiny: TrainSettings, tmp_path: Path, built: list[Any]
    ) -> None:
        run = prepare(dataclasses.replace(tiny, batch_size=1), tmp_path / "plain")
        assert built == [epoch_seed(tiny.seed, 0), torch.device("cpu")]
        assert isinstance(run.train_loader.sampler, RandomSampler)
        assert isinstance(run.val_loader.sampler, SequentialSampler)
        assert not run.train_loader.pin_memory and not run.val_loader.pin_memory
        assert len(run.optimizer.param_groups) == 1
        assert run.scaler is run.average is run.updates.after is None
        slow = {"lr": 1e-5, "min_lr": 0.0, "backbone_lr_factor": 0.01, "warmup_epochs": 1}
        changed = dataclasses.replace(tiny, amp="float16", ema=0.9, **slow)
        run = prepare(changed, tmp_path / "changed")
        assert isinstance(run.scaler, torch.amp.GradScaler)
        assert run.average is not None and run.updates.after == run.average.update
        assert [group["lr"] for group in run.optimizer.param_groups] == pytest.approx([1e-7] * 2)

    def test_a_batch_that_is_left_out_is_not_the_only_one(
        self, tiny: TrainSettings, tmp_path: Path
    ) -> None:
        whole = dataclasses.replace(tiny, batch_size=21, drop_last=True)
        assert len(prepare(whole, tmp_path / "whole").train_loader) == 1
        with pytest.raises(ValueError, match="batch_size must be at most the 21 images to train"):
            prepare(dataclasses.replace(whole, batch_size=22), tmp_path / "none")

    @pytest.mark.parametrize(
        ("fsdp", "change", "message"),
        [
            (False, {"batch_size": 1}, "batch_size must be at least 1 image for each of the 2"),
            (True, {"ema": 0.9}, r"ema must be left out with fsdp, got 0\.9"),
            (False, {}, "backbone must be the same in every process, got another in rank 1"),
        ],
    )
    def test_what_two_processes_are_refused(
        self,
        tiny: TrainSettings,
        tmp_path: Path,
        fsdp: bool,
        change: dict[str, Any],
        message: str,
    ) -> None:
        with pytest.raises(ValueError, match=message):
            ranks = Second(1, 2, fsdp=fsdp)
            prepare(dataclasses.replace(tiny, **change), tmp_path / "run", ranks=ranks)

    def test_what_is_said_of_a_resumed_run(self, tiny: TrainSettings, tmp_path: Path) -> None:
        output, notes = tmp_path / "run", []  # type: ignore[var-annotated]

        def said() -> list[str]:
            notes.clear()
            prepare(tiny, output, resume=True, notify=notes.append)
            return list(notes)

        assert said() == [f"{output}: nothing to resume yet, starting with epoch 1"]
        resuming = f"{output}: resuming after epoch 0 of 3"
        assert said() == [resuming]
        path = output / "config.json"
        config = json.loads(path.read_text())
        del config["processes"]  # as older releases
        path.write_text(json.dumps(config))
        assert said() == [resuming]
        config |= {"processes": 3, "versions": {"torch": "1.0"}}
        path.write_text(json.dumps(config))
        versions = "other library versions than when the run began: its bits may differ"
        processes = "the run began with 3 processes: its bits may differ"
        assert said() == [versions, processes, resuming]

    def test_the_scale_of_gradients_and_the_average_are_part_of_a_run(
        self, tiny: TrainSettings, tmp_path: Path
    ) -> None:
        half = dataclasses.replace(tiny, amp="float16", ema=0.9)
        run = prepare(half, tmp_path / "run")
        assert run.scaler is not None and run.average is not None
        for tensor in run.average.state_dict().values():
            tensor.fill_(0.25)
        run.scaler.load_state_dict(run.scaler.state_dict() | {"scale": 8.0})
        run.history.append(EpochRow(1, 1.0, 50.0, 1e-3, 2.0))
        training_run._save(run)
        again = prepare(half, tmp_path / "run", resume=True)
        assert again.scaler is not None and again.scaler.get_scale() == 8.0
        assert again.average is not None
        assert all((tensor == 0.25).all() for tensor in again.average.state_dict().values())


def test_an_image_that_was_left_out_is_not_looked_at_again(
    settings: TrainSettings, tmp_path: Path
) -> None:
    paths = [tmp_path / name for name in ("0.png", "1.png", "bad.png")]
    for path in paths[:2]:
        Image.new("RGB", (2, 2)).save(path)
    paths[2].touch()
    checked, notes = [], []  # type: ignore[var-annotated]
    found = training_run._unreadable(
        dataclasses.replace(settings, data=tmp_path),
        ["bad.png", "removed.png"],
        notes.append,
        lambda *counts: checked.append(counts),
        ALONE,
        [(str(path), 0) for path in paths],
    )
    assert (found, checked, notes) == ({str(paths[2])}, [(2, 2)], [])


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_kernels_on_cuda_repeat_their_bits_where_they_can(
    monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    asked: list[Any] = []

    @contextmanager
    def deterministic(device: torch.device, **options: Any) -> Iterator[None]:
        asked.append((device.type, options))
        yield

    monkeypatch.setattr(training_run, "deterministic", deterministic)
    monkeypatch.setattr(training_run, "_rows", lambda *_: iter(()))
    monkeypatch.setattr(training_run, "draw_curves", lambda *_: None)
    row, device = EpochRow(1, 1.0, 50.0, 1e-3, 2.0), torch.device(kind)
    run: Any = SimpleNamespace(ranks=ALONE, device=device, history=[row], best=row, kept_epoch=1)
    run.output = Path("run")
    assert fit(run).last_top1_percent == 50.0
    assert asked == ([("cuda", {"warn_only": True})] if kind == "cuda" else [])


@pytest.mark.parametrize("keep", ["last", "best"])
@pytest.mark.parametrize("average", [None, "an average"])
def test_a_state_is_held_on_to_where_it_will_not_stay(
    make_vit: Any, keep: str, average: str | None
) -> None:
    adapter = attach(make_vit(), LoRA(rank=1))
    run: Any = SimpleNamespace(average=average, adapter=adapter, kept="before", kept_epoch=1)
    run.settings, run.history = SimpleNamespace(keep=keep), [1, 2]
    training_run._keep(run)
    assert run.kept == "before"
    run.kept_epoch = 2
    training_run._keep(run)
    assert (run.kept is None) is (average is None and keep == "last")


@pytest.mark.parametrize(
    ("ranks", "does"),
    [
        (Ranks(0, 2, fsdp=True), ["writes", "waits"]),
        (Ranks(1, 2), ["waits"]),
        (Ranks(1, 2, fsdp=True), ["gathers", "waits"]),
    ],
    ids=str,
)
def test_all_processes_gather_what_the_first_writes(
    monkeypatch: pytest.MonkeyPatch, ranks: Ranks, does: list[str]
) -> None:
    events: list[str] = []
    monkeypatch.setattr(Ranks, "from_first", lambda self, make: events.append("waits"))
    monkeypatch.setattr(training_run, "whole_state", lambda state: events.append("gathers"))
    monkeypatch.setattr(training_run, "_write_first", lambda run: events.append("writes"))
    adapter = SimpleNamespace(state_dict=dict)
    training_run._write_products(SimpleNamespace(ranks=ranks, adapter=adapter, kept=None))  # type: ignore[arg-type]
    assert events == does
