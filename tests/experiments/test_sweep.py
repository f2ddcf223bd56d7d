"""Sweeps: what is tried, what is chosen, and what is trained and tested in the end."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from efft_kernels.cli import app
from efft_kernels.experiments import scheduler
from efft_kernels.experiments.benchmark import Choices, Outcome, Plan, plan_vtab, run
from efft_kernels.experiments.cell import Cell
from efft_kernels.experiments.ledger import Ledger, key
from efft_kernels.experiments.scheduler import HERE, Failure, OnRay, attempt
from efft_kernels.experiments.sweep import (
    Ladder,
    Search,
    SweepOutcome,
    SweepPlan,
    kadaptation,
    plan_sweep,
    run_sweep,
    sweep_grids,
    to_json,
    tried_csv,
)

Write = Callable[..., Path]
SMALL: dict[str, Any] = {
    "model": "test_vit",
    "pretrained": False,
    "img_size": 32,
    "epochs": 2,
    "batch_size": 8,
    "device": "cpu",
}


def plan(
    data: Path, search: Search, *methods: str, seeds: tuple[int, ...] = (1, 2), **given: Any
) -> SweepPlan:
    choices = Choices(methods or ("lora",), {**SMALL, **given})
    return plan_sweep(data, ["kitti", "svhn"], seeds, choices, search, lambda message: None)


def measured(
    plan: SweepPlan, top1: Callable[[Cell], float | str | None]
) -> tuple[SweepOutcome, list[tuple[str, list[Cell]]]]:
    """The outcome where `top1` tells what a cell measures, or why it fails; and what was run."""
    ran: list[tuple[str, list[Cell]]] = []

    def run(what: str, cells: Plan) -> Outcome:
        ran.append((what, list(cells.cells)))
        finished, failed = [], {}
        for cell in cells.cells:
            value = top1(cell)
            if isinstance(value, str):
                failed[cell.title] = value
                continue
            names = () if cell.choosing else ("last", "val_chosen", "best_on_test")
            result: dict[str, Any] = {
                "results": {name: {"top1_percent": value, "epoch": 2} for name in names},
                "val_top1_percent": None if value is None else [value / 2, value],
                "parameters": 10,
                "diverged": "loss is nan",
            }
            finished.append((cell, result))
        return Outcome(tuple(finished), failed)

    return run_sweep(plan, run), ran


def test_the_best_mean_over_the_seeds_is_trained_and_tested(kitti: Path) -> None:
    search = Search({"rank": (2, 4, 8), "lr": (1e-3, 1e-2)})

    def top1(cell: Cell) -> float | str | None:
        settings = cell.settings
        if settings.rank == 8 and settings.seed == 2:  # the best, were it not for this seed
            return "out of memory" if settings.lr == 1e-2 else None
        if settings.rank == 8:
            return 99.0
        return {(2, 1e-3): 50.0, (2, 1e-2): 60.0, (4, 1e-3): 60.0, (4, 1e-2): 55.0}[
            settings.rank, settings.lr
        ] + (3 if settings.seed == 2 else 0)

    sweep = plan(kitti, search)
    assert sweep.missing == ("svhn",)
    outcome, ran = measured(sweep, top1)
    assert [(what, len(cells)) for what, cells in ran] == [("to choose", 12), ("to test", 2)]
    assert all(cell.choosing for cell in ran[0][1])
    (chosen,) = outcome.chosen
    assert chosen.candidate.values == {"rank": 2, "lr": 1e-2}  # 61.5, as (4, 1e-3), which is later
    assert chosen.score == 61.5
    choices = Choices(("lora",), {**SMALL, "lr": 1e-2}, {"rank": 2})
    of_vtab = plan_vtab(kitti, ["kitti"], [1, 2], choices, lambda message: None).cells
    assert [key(cell) for cell in ran[1][1]] == [key(cell) for cell in of_vtab]
    assert outcome.failed == {
        "kitti-lora-seed2 (rank 8, lr 0.01, to choose)": "out of memory",
    }

    grids = {grid.title: grid for grid in sweep_grids(outcome, "last")}
    assert grids["Chosen"].header == (
        *("", "rank", "lr", "val200, last epoch"),
        *("last", "val_chosen", "best_on_test"),
    )
    interval = "61.5 ± 19.1"  # t(0.975, 1) · 3/√2 /√2
    assert grids["Chosen"].rows == (("kitti, lora", "2", "0.01", *[interval] * 4),)
    tried = grids["kitti: all that was tried"].rows
    assert [row[-2:] for row in tried] == [
        ("51.5 ± 19.1", ""),
        (interval, "chosen"),
        (interval, ""),
        ("56.5 ± 19.1", ""),
        ("diverged", ""),
        ("failed", ""),
    ]
    rows = list(csv.DictReader(io.StringIO(tried_csv(outcome))))
    assert len(rows) == 12
    assert [row["seed"] for row in rows if row["chosen"] == "1"] == ["1", "2"]
    assert rows[-1]["why_not"] == "out of memory" and rows[-1]["top1_percent"] == ""
    content = json.loads(json.dumps(to_json(sweep, outcome), allow_nan=False))
    assert (content["chosen_on"], content["optimistic"]) == ("val200", False)
    assert content["tried"][1]["chosen"] is True
    assert len(content["cells"]) == 2


def test_by_the_best_epoch(kitti: Path) -> None:
    search = Search({"rank": (2, 4)}, by="best")
    outcome, _ = measured(plan(kitti, search), lambda cell: -1.0 if cell.settings.rank == 2 else 1)
    assert [item.score for item in outcome.tried] == [-0.5, 1.0]


def test_a_method_is_tried_with_the_axes_that_it_has(kitti: Path) -> None:
    search = Search({"rank": (2, 4), "ffn_init": ("u", "v"), "weight_decay": (0.0, 0.1)})
    sweep = plan(kitti, search, "efft2", "lora", "linear", seeds=(1,))
    counts = dict.fromkeys(("efft2", "lora", "linear"), 0)
    for item in sweep.candidates:
        counts[item.method] += 1
    assert counts == {"efft2": 8, "lora": 4, "linear": 2}
    settings = sweep.candidates[7].finals[0].settings
    assert (settings.rank, settings.options["ffn_init"], settings.weight_decay) == (4, "v", 0.1)


def test_where_nothing_comes_to_a_number_nothing_is_chosen(kitti: Path) -> None:
    outcome, ran = measured(plan(kitti, Search({"rank": (2, 4)})), lambda cell: None)
    assert (outcome.chosen, len(ran)) == ((), 1)
    assert list(outcome.unchosen) == ["kitti, lora"]
    assert [grid.title for grid in sweep_grids(outcome, "last")][1:] == [
        "kitti: all that was tried"
    ]


def test_chosen_on_the_test_images_is_marked_optimistic(kitti: Path) -> None:
    sweep = plan(kitti, Search({"rank": (2, 4)}, select="test"))
    outcome, ran = measured(sweep, lambda cell: float(cell.settings.rank or 0))  # type: ignore[arg-type]
    assert not any(cell.choosing for _, cells in ran for cell in cells)
    assert outcome.chosen[0].candidate.values == {"rank": 4}
    assert {key(cell) for cell in ran[1][1]} <= {key(cell) for cell in ran[0][1]}  # run once
    grid = sweep_grids(outcome, "last")[0]
    assert "test, last epoch: optimistic" in grid.header
    assert "every number here is optimistic" in " ".join(grid.notes)
    assert to_json(sweep, outcome)["optimistic"] is True


def test_what_chooses_never_sees_the_test_images(vtab_task: Write, tmp_path: Path) -> None:
    data = vtab_task("kitti")
    sweep = plan(data, Search({"rank": (2,)}, given={"epochs": 3}), seeds=(1,))
    shutil.rmtree(data / "kitti/images/test")
    (cell,) = sweep.cells
    assert key(cell) != key(sweep.candidates[0].finals[0])
    result = HERE.run([cell], notify=print, on_epoch=lambda done, total: None)
    ((_, found),) = result
    assert isinstance(found, dict)
    assert found["results"] == {} and len(found["val_top1_percent"]) == 3
    assert found["images"] == {"train": 12, "val": 6}
    assert isinstance(attempt(sweep.candidates[0].finals[0], print), Failure)


def test_a_diverged_training_is_a_result(kitti: Path, tmp_path: Path) -> None:
    sweep = plan(kitti, Search({"lr": (1e-3, 1e20)}), seeds=(1,), optimizer="sgd", epochs=1)
    ledger = Ledger(tmp_path)
    outcome = run_sweep(sweep, lambda what, cells: run(cells, ledger))
    assert [item.text() for item in outcome.tried][1] == "diverged"
    assert outcome.tried[1].why[1].startswith("diverged: ")
    assert outcome.failed == {}
    assert ledger.find(sweep.cells[1]) is not None  # not run again
    assert outcome.chosen[0].candidate.values == {"lr": 1e-3}


def test_without_validation_images_a_task_is_left_out(vtab_task: Write) -> None:
    data = vtab_task("kitti")
    (data / "kitti/val200.txt").unlink()
    assert plan(data, Search({"rank": (2,)})).left_out == {
        "kitti": "it has no val200.txt to choose on"
    }
    assert len(plan(data, Search({"rank": (2,)}, select="test")).candidates) == 1


@pytest.mark.parametrize("peak", [0, 1, 17, 48, 50, 95, 96])
def test_a_ladder_finds_a_single_peak(peak: int) -> None:
    ladder = Ladder("weight_decay", tuple(float(rung) for rung in range(97)), 16)
    scores: dict[int | None, float | None] = {}
    waves = []
    while wanted := ladder.wanted(scores):
        waves.append(wanted)
        scores |= {rung: -abs(rung - peak) for rung in wanted}
    assert waves[0] == [0, 16, 32, 48, 64, 80, 96]
    assert max(scores, key=lambda rung: scores[rung] or 0.0) == peak
    assert len(scores) <= 7 + 2 * 4
    assert ladder.wanted(dict.fromkeys(waves[0])) == []


def test_kadaptations_protocol(kitti: Path) -> None:
    search, given = kadaptation()
    choices = Choices(("kadaptation", "full"), {**given, **SMALL})
    sweep = plan_sweep(kitti, ["kitti"], (0, 1, 2), choices, search, lambda message: None)
    assert len(sweep.candidates) == 2 * 6 * 7
    first, other = sweep.candidates[0], sweep.candidates[42]
    settings = first.finals[0].settings
    assert (settings.optimizer, settings.schedule) == ("sgd", "constant")
    assert first.values == {"lr": 1e-6, "weight_decay": 1e-6}
    assert first.tries[0].settings.epochs == 10
    assert kadaptation()[1]["epochs"] == 50
    assert (settings.backbone_lr_factor, other.finals[0].settings.backbone_lr_factor) == (1.0, 0.1)
    assert sweep.candidates[41].values["lr"] == 0.1
    assert math.isclose(sweep.candidates[41].values["weight_decay"], 1e6)
    method = settings.method_config()
    assert (method.products, method.rank) == (4, 1)  # type: ignore[union-attr]

    def top1(cell: Cell) -> float:
        return -abs(math.log10(cell.settings.weight_decay) + 4.125) - abs(cell.settings.lr - 0.01)

    outcome, ran = measured(sweep, top1)
    assert [len(cells) for _, cells in ran] == [252, 72, 72, 72, 36 * 2, 6]
    best = outcome.chosen[0].candidate.values
    assert best["lr"] == 0.01 and math.isclose(best["weight_decay"], 10**-4.125)
    order = [item.candidate.values for item in outcome.tried[:15]]
    assert [v["weight_decay"] for v in order] == sorted(v["weight_decay"] for v in order)


@pytest.mark.parametrize(
    ("search", "message"),
    [
        (
            {"axes": {"magic": (1,)}},
            "axes must be one of lr, .* or an option of a method, got 'magic'",
        ),
        ({"axes": {"rank": ()}}, "rank must be at least one value to try, got none"),
        ({"axes": {"rank": (2, 4, 2)}}, "rank must be values each given once, got 2 4 2"),
        ({"axes": {"rank": (2,)}, "select": "train"}, "select must be val200 or test"),
        ({"axes": {"rank": (2,)}, "by": "luck"}, "by must be last or best"),
        (
            {"axes": {"rank": (2,)}, "select": "test", "given": {"epochs": 3}},
            "settings of the search must be left out where select is test",
        ),
    ],
)
def test_searches_that_make_no_sense(search: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Search(**search)


def test_ray_is_not_needed_until_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"ray must be installed.*'efft-kernels\[sweep\]'"):
        OnRay()
    for arguments, message in (
        ({"cpus_per_cell": -1}, "cpus_per_cell must be at least 0 and finite, got -1"),
        ({"cpus_per_cell": 0}, "cpus_per_cell must be above 0 where gpus_per_cell is 0"),
        ({"gpus_per_cell": 1.5}, "gpus_per_cell must be a whole number above 1, got 1.5"),
        ({"max_retries": -1}, "max_retries must be at least 0"),
    ):
        with pytest.raises(ValueError, match=message):
            OnRay(**arguments)  # type: ignore[arg-type]


def test_without_ray_the_command_says_how_to_get_it(
    kitti: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    for options in (("--ray",), ("--ray-address=auto",)):
        result = sweep(kitti, tmp_path / "run", "--ranks=2", *options)
        assert result.exit_code == 2, result.output
        assert "pip install 'efft-kernels[sweep]'" in result.stderr.splitlines()[-1]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("address", ["127.0.0.1:1", "127.0.0.1:x"])
def test_where_no_cluster_runs_is_told_at_once(address: str) -> None:
    pytest.importorskip("ray")
    with pytest.raises(ValueError, match=f"ray_address must be where a cluster .* got {address}"):
        OnRay(address).connect()


def test_workers_look_for_this_very_package(monkeypatch: pytest.MonkeyPatch) -> None:
    home = str(Path(scheduler.__file__).parents[2])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["/somewhere", home]))
    assert scheduler._python_path() == os.pathsep.join([home, "/somewhere"])
    monkeypatch.delenv("PYTHONPATH")
    monkeypatch.setattr(scheduler.site, "getsitepackages", lambda: [home])
    assert scheduler._python_path() == ""  # installed: they find it by themselves


def sweep(data: Path, output: Path, *options: str) -> Result:
    command = ["sweep", "--data", str(data), "--output", str(output), "--model=test_vit"]
    command += ["--no-pretrained", "--img-size=32", "--epochs=1", "--batch-size=8", "--workers=0"]
    command += ["--device=cpu", "--tasks=kitti", *options]
    return CliRunner(env={"COLUMNS": "150"}).invoke(app, command)


def test_the_command(kitti: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    options = ("--methods=efft2", "--ranks=2,4", "--axis", "ffn-init=u v", "--seeds=3")
    listed = sweep(kitti, output, *options, "--dry-run")
    assert listed.exit_code == 0, listed.output
    assert listed.stdout.splitlines()[0] == (
        "kitti-efft2-seed3 (rank 2, ffn_init u, to choose): not run"
    )
    assert len(listed.stdout.splitlines()) == 4
    assert not output.exists()
    result = sweep(kitti, output, *options)
    assert result.exit_code == 0, result.output
    assert "to choose: 4 cells, 0 finished before" in result.stdout
    assert "to test: 1 cells, 0 finished before" in result.stdout
    assert {path.name for path in output.iterdir() if path.suffix not in (".png", ".svg")} == {
        *("cells", "report.html", "table.md", "tried.csv", "cells.csv", "results.json")
    }
    assert "Chosen on val200 by the last epoch" in (output / "report.html").read_text()
    again = sweep(kitti, output, *options, "--dry-run")
    assert again.stdout.count("finished") == 4


def test_a_sweep_that_chose_nothing_says_so(kitti: Path, tmp_path: Path) -> None:
    result = sweep(kitti, tmp_path / "run", "--methods=lora", "--lrs=1e30")
    assert result.exit_code == 1, result.output
    assert result.stderr.splitlines()[-1] == "error: nothing was chosen for kitti, lora"
    assert "nothing to choose from" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.parametrize(
    ("options", "axes"),
    [
        ((), "lr 1e-06, weight_decay 1e-06"),
        (("--lr=0.1",), "weight_decay 1e-06"),
        (("--weight-decays=0",), "lr 1e-06, weight_decay 0"),
        (("--lrs=0.5",), "lr 0.5, weight_decay 1e-06"),
        (("--axis=batch-size=8 16", "--lr=0.1"), "batch_size 8, weight_decay 1e-06"),
        (("--axis=optimizer=adamw sgd", "--lr=0.1"), "optimizer adamw, weight_decay 1e-06"),
        (("--axis=warmup-epochs=0 1",), "lr 1e-06, warmup_epochs 0, weight_decay 1e-06"),
    ],
)
def test_what_is_given_wins_over_the_protocols(
    kitti: Path, tmp_path: Path, options: tuple[str, ...], axes: str
) -> None:
    output = tmp_path / "run"
    command = ["sweep", "--data", str(kitti), "--output", str(output), "--model=test_vit"]
    command += ["--no-pretrained", "--img-size=32", "--workers=0", "--device=cpu", "--tasks=kitti"]
    command += ["--protocol=kadaptation", "--methods=lora", "--dry-run", *options]
    result = CliRunner(env={"COLUMNS": "150"}).invoke(app, command)
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[0] == f"kitti-lora-seed0 ({axes}, to choose): not run"


def test_a_file_in_the_place_of_the_folder(kitti: Path, tmp_path: Path) -> None:
    file = tmp_path / "run"
    file.write_text("mine")
    for options in ((), ("--dry-run",)):
        result = sweep(kitti, file, "--ranks=2", *options)
        assert (result.exit_code, file.read_text()) == (2, "mine")
        assert "output must be a folder, got the file" in result.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "axes must be given, as --ranks 8,16 or --protocol, got none"),
        (("--ranks=a",), "ranks must be whole numbers"),
        (("--lrs=0.1,x",), "lrs must be numbers such as 0.1,1,10"),
        (("--ranks=2", "--rank=4"), "rank must be either an axis or one value, got both"),
        (
            ("--ranks=2", "--methods=linear"),
            "rank must be an option of linear, got an axis that none of them has",
        ),
        (("--axis=epochs=1 2", "--search-epochs=1"), "epochs must be either an axis or one value"),
        (("--axis=rank",), "axis must be 'NAME=VALUE VALUE ...', got 'rank'"),
        (("--axis=magic=3",), "axis must name an option of a method, or one of lr, "),
        (("--axis=rank=2", "--ranks=4"), "axis must name rank once, got it twice"),
        (("--axis=batch-size=x",), "batch_size must be a whole number, got 'x'"),
        (("--axis=init=w", "--methods=efft2"), "init must be"),
        (("--lrs=-1",), "lr must be above 0"),
        (("--protocol=magic",), "protocol must be one of kadaptation, got 'magic'"),
        (("--ranks=2", "--select=train"), "select must be val200 or test, got 'train'"),
        (("--ranks=2", "--ray", "--device=cuda:0"), "device must be"),
        (("--ranks=2", "--ray", "--cpus-per-cell=0"), "cpus_per_cell must be above 0"),
    ],
)
def test_bad_arguments_are_one_line_and_write_nothing(
    kitti: Path, tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    output = tmp_path / "run"
    result = sweep(kitti, output, *options)
    assert result.exit_code == 2, result.output
    assert message in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.output
    assert not output.exists()
