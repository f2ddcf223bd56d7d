"""One cell: the three numbers that come of it, and what its key depends on."""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from efft_kernels.experiments import scheduler
from efft_kernels.experiments.benchmark import Choices, Outcome, Plan, plan_vtab, run
from efft_kernels.experiments.cell import Cell, run_cell
from efft_kernels.experiments.ledger import Ledger, key
from efft_kernels.training.loop import NonFiniteLossError

Write = Callable[..., Path]
SMALL: dict[str, Any] = {
    "model": "test_vit",
    "pretrained": False,
    "img_size": 32,
    "epochs": 3,
    "batch_size": 8,
    "device": "cpu",
}


def plan(root: Path, *methods: str, **given: Any) -> Plan:
    choices = Choices(methods or ("lora",), {**SMALL, **given}, {"rank": 2}, test_every=2)
    return plan_vtab(root, ["kitti"], [1], choices, lambda message: None)


@pytest.fixture
def cell(vtab_task: Write) -> Cell:
    (found,) = plan(vtab_task("kitti")).cells
    return found


def test_three_numbers_each_by_its_name(cell: Cell) -> None:
    seen: list[tuple[int, int]] = []
    result = run_cell(cell, on_epoch=lambda *progress: seen.append(progress))
    assert seen == [(done, 6) for done in range(1, 7)]  # 3 to choose an epoch, 3 to train
    tested = {int(epoch): top1 for epoch, top1 in result["test_top1_percent"].items()}
    val = result["val_top1_percent"]
    assert len(val) == 3
    chosen = 1 + val.index(max(val))
    assert set(tested) == {2, 3, chosen}
    results = result["results"]
    assert list(results) == ["last", "val_chosen", "best_on_test"]
    assert (results["last"]["epoch"], results["last"]["top1_percent"]) == (3, tested[3])
    assert results["val_chosen"]["epoch"] == chosen
    assert results["val_chosen"]["top1_percent"] == tested[chosen]
    assert results["best_on_test"]["top1_percent"] == max(tested[2], tested[3])
    assert results["best_on_test"]["optimistic"] is True
    assert "optimistic" in results["best_on_test"]["protocol"]
    assert result["images"] == {"train": 18, "val": 8}
    assert result["parameters"] == result["method"]["rank"] * 2 * 2 * 64 * 6  # q and v, 6 blocks
    assert run_cell(cell)["test_top1_percent"] == result["test_top1_percent"]


def test_without_validation_images_no_epoch_is_chosen(cell: Cell) -> None:
    lists = {name: cell.lists.lists[name] for name in ("train800val200", "test")}
    alone = dataclasses.replace(cell, lists=dataclasses.replace(cell.lists, lists=lists))
    result = run_cell(alone)
    assert list(result["results"]) == ["last", "best_on_test"]
    assert result["val_top1_percent"] is None
    assert result["results"]["last"] == run_cell(cell)["results"]["last"]


def test_the_key_is_of_what_decides_the_result(cell: Cell, tmp_path: Path) -> None:
    def other(**changes: Any) -> str:
        return key(dataclasses.replace(cell, **changes))

    def setting(**changes: Any) -> str:
        return other(settings=dataclasses.replace(cell.settings, **changes))

    same = key(cell)
    assert setting(data=tmp_path, workers=3, device="cuda", skip_bad_images=True) == same
    different = [
        setting(epochs=4),
        setting(seed=2),
        setting(rank=3),
        setting(lr=2e-3),
        setting(model="vit_tiny_patch16_224"),
        setting(pretrained=True),
        setting(normalize="model"),
        setting(optimizer="sgd"),
        setting(backbone_lr_factor=0.1),
        other(choosing=True),
        other(test_every=1),
        other(checkpoint_sha256="00"),
        other(lists=dataclasses.replace(cell.lists, classes=5)),
    ]
    assert len({same, *different}) == 1 + len(different)
    assert other(label="rank 2") == same
    # What ledgers that know no other optimizer have recorded is found again.
    assert not {"optimizer", "backbone_lr_factor"} & set(cell.identity()["settings"])


def test_a_cell_travels_to_another_process(cell: Cell) -> None:
    again = pickle.loads(pickle.dumps(cell))
    assert again == cell
    assert key(again) == key(cell)


def test_the_papers_recipe_is_what_runs(vtab_task: Write) -> None:
    (cell,) = plan_vtab(
        vtab_task("kitti"), ["kitti"], [42], Choices(("efft2",)), lambda message: None
    ).cells
    settings = cell.settings
    assert settings.model == "vit_base_patch16_224.orig_in21k"
    assert (settings.epochs, settings.batch_size, settings.lr) == (100, 64, 1e-3)
    assert (settings.rank, settings.scale, settings.init) == (16, 10, "v")  # kitti: "vv"
    assert settings.options["ffn_init"] == "u"
    assert settings.normalize == "imagenet"
    assert not settings.drop_last  # these lists are smaller than a batch


def test_finished_cells_are_skipped_and_failed_ones_run_again(
    vtab_task: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = plan(vtab_task("kitti"), "lora", "efft2", "fact_tt")
    ledger = Ledger(tmp_path / "cells")
    ran: list[str] = []

    def fake(cell: Cell, **_: Any) -> dict[str, Any]:
        ran.append(cell.settings.method)
        if cell.settings.method == "efft2" and len(ran) < 4:
            raise NonFiniteLossError("loss is nan in epoch 1, step 1")
        return {"results": {}, "parameters": 1, "skipped_images": []}

    monkeypatch.setattr(scheduler, "run_cell", fake)
    outcome: Outcome = run(found, ledger)
    assert ran == ["lora", "efft2", "fact_tt"]
    assert outcome.failed == {"kitti-efft2-seed1": "loss is nan in epoch 1, step 1"}
    assert ledger.failure(found.cells[1]) == "loss is nan in epoch 1, step 1"
    ledger.finish(found.cells[2], {"results": {}})  # of a release that recorded less
    again = run(found, ledger)
    assert ran[3:] == ["efft2", "fact_tt"]
    assert again.failed == {}
    assert [cell.settings.method for cell, _ in again.finished] == ["lora", "efft2", "fact_tt"]


def test_killed_in_between_only_the_running_cell_is_lost(
    vtab_task: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = plan(vtab_task("kitti"), "lora", "efft2", "fact_tt")
    ledger = Ledger(tmp_path / "cells")
    ran: list[str] = []

    def killed(cell: Cell, **_: Any) -> dict[str, Any]:
        ran.append(cell.settings.method)
        if ran == ["lora", "efft2"]:
            raise KeyboardInterrupt
        return {"results": {}, "parameters": 1, "skipped_images": []}

    monkeypatch.setattr(scheduler, "run_cell", killed)
    with pytest.raises(KeyboardInterrupt):
        run(found, ledger)
    run(found, ledger)
    assert ran == ["lora", "efft2", "efft2", "fact_tt"]


def test_a_broken_image_fails_its_cell_or_is_skipped_by_name(
    vtab_task: Write, tmp_path: Path
) -> None:
    root = vtab_task("kitti")
    broken = root / "kitti/images/test/no 03.png"
    broken.write_bytes(broken.read_bytes()[:60])
    (root / "kitti/images/val/no 02.png").unlink()
    ledger = Ledger(tmp_path / "cells")
    outcome = run(plan(root), ledger)
    (reason,) = outcome.failed.values()
    assert "images/val/no 02.png" in reason and "--skip-bad-images" in reason
    told: list[str] = []
    skipping = plan(root, skip_bad_images=True)
    ((_, result),) = run(skipping, ledger, notify=told.append).finished
    assert result["skipped_images"] == ["images/test/no 03.png", "images/val/no 02.png"]
    assert result["images"] == {"train": 17, "val": 7}
    assert any("no 03.png" in line for line in told)
    assert run(plan(root), ledger).failed  # what skipped images is no result without the option
    Image.new("RGB", (16, 16)).save(broken)
    Image.new("RGB", (16, 16)).save(root / "kitti/images/val/no 02.png")
    assert not run(plan(root), ledger).failed


def test_choices_that_make_no_sense() -> None:
    for arguments, message in (
        ({"methods": ()}, "methods must be names of methods, got none"),
        ({"methods": ("magic",)}, "methods must be of efft1"),
        ({"methods": ("lora", "lora")}, "methods must be each named once"),
        ({"methods": ("lora",), "test_every": 0}, "test_every must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            Choices(**arguments)  # type: ignore[arg-type]
