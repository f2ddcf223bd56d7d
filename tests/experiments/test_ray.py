"""Cells on a real Ray: the same table, whatever is killed, full or damaged meanwhile."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from efft_kernels import atomic_files
from efft_kernels.cli import app
from efft_kernels.cli.benchmark import BenchmarkOptions
from efft_kernels.cli.sweep import SearchOptions, make_plan
from efft_kernels.experiments.benchmark import Choices, Plan, plan_vtab, run
from efft_kernels.experiments.cell import Notify
from efft_kernels.experiments.ledger import Ledger
from efft_kernels.experiments.scheduler import HERE, OnRay, Scheduler
from efft_kernels.experiments.sweep import run_sweep, sweep_grids, tried_csv

ray = pytest.importorskip("ray")
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("ray")]

SMALL: dict[str, Any] = {
    "model": "test_vit",
    "pretrained": False,
    "img_size": 32,
    "epochs": 2,
    "batch_size": 8,
    "device": "cpu",
}
# The same cells as a command and as its options.
COMMAND = [
    "--tasks=kitti",
    "--methods=efft2,linear",
    "--ranks=2,4",
    "--seeds=1,2",
    "--model=test_vit",
    "--no-pretrained",
    "--img-size=32",
    "--epochs=2",
    "--batch-size=8",
    "--workers=0",
    "--device=cpu",
]


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of a Ray of two CPUs that runs in this process."""
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=100 * 2**20,
        log_to_driver=False,
        logging_level="ERROR",
    )
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()


OPTIONS: dict[str, Any] = {**SMALL, "methods": "efft2,linear", "workers": 0}


def sweep(
    data: Path, output: Path, scheduler: Scheduler = HERE, notify: Notify = print
) -> dict[str, Any]:
    """The results and tables of a sweep: all that has to be the same, whoever ran the cells."""
    plan = make_plan(
        BenchmarkOptions(data, **OPTIONS), SearchOptions(ranks="2,4"), "kitti", seeds="1,2"
    )
    ledger = Ledger(output / "cells", notify)
    outcome = run_sweep(plan, lambda what, cells: run(cells, ledger, scheduler=scheduler))
    assert not outcome.failed

    def without_times(path: Path) -> Any:
        return {k: v for k, v in json.loads(path.read_text())["result"].items() if k != "seconds"}

    found: dict[str, Any] = {
        path.parent.name: without_times(path) for path in output.glob("cells/*/result.json")
    }
    tables = [grid.markdown() for grid in sweep_grids(outcome, "last")]
    return found | {"tables": tables, "tried": tried_csv(outcome)}


@pytest.fixture(scope="module")
def expected(kitti: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The table without Ray."""
    found = sweep(kitti, tmp_path_factory.mktemp("here"))
    assert len(found) == 2 * 3 + 2 * 2 + 2  # to choose: ranks 2 and 4, and linear; to test; tables
    return found


def test_the_same_table_on_ray_and_nothing_is_run_twice(
    kitti: Path, cluster: str, expected: dict[str, Any], tmp_path: Path
) -> None:
    assert sweep(kitti, tmp_path, OnRay()) == expected
    assert ray.is_initialized()  # it was there before
    written = {path: path.stat().st_mtime_ns for path in tmp_path.glob("cells/*/*")}
    damaged = sorted(written)[3]
    damaged.write_text(damaged.read_text()[:200])
    told: list[str] = []
    with OnRay(cpus_per_cell=0.5) as scheduler:
        assert sweep(kitti, tmp_path, scheduler, told.append) == expected
    assert told[0].startswith(f"{damaged} is no record of this cell")
    after = {path: path.stat().st_mtime_ns for path in tmp_path.glob("cells/*/*")}
    assert {path for path in after if after[path] != written[path]} == {damaged}


def test_a_killed_driver_loses_the_running_cells_alone(
    kitti: Path, cluster: str, expected: dict[str, Any], tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "efft_kernels", "sweep", "--data", kitti, *COMMAND]
    command += ["--output", tmp_path, "--ray-address", cluster]
    victim = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while victim.poll() is None and not list(tmp_path.glob("cells/*/result.json")):
        time.sleep(0.02)
    victim.kill()
    _, said = victim.communicate(timeout=60)
    assert victim.returncode == -signal.SIGKILL, said
    kept = {path: path.read_bytes() for path in tmp_path.glob("cells/*/result.json")}
    assert 1 <= len(kept) < len(expected) - 2
    assert sweep(kitti, tmp_path) == expected  # the ledger does not know who ran a cell
    assert all(path.read_bytes() == content for path, content in kept.items())


def test_an_interrupt_says_how_to_go_on(
    kitti: Path,
    cluster: str,
    expected: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wait = ray.wait

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        """Ctrl-C after the first result: where the command spends its time."""
        if list(tmp_path.glob("cells/*/result.json")):
            raise KeyboardInterrupt
        return wait(*args, **kwargs)

    monkeypatch.setattr(ray, "wait", interrupted)
    command = ["sweep", "--data", str(kitti), *COMMAND, "--output", str(tmp_path), "--ray"]
    result = CliRunner().invoke(app, command)
    monkeypatch.setattr(ray, "wait", wait)
    assert result.exit_code == 130, result.output
    line = result.stderr.splitlines()[-1]
    assert line == f"error: interrupted. the same command goes on where {tmp_path} ends"
    assert "Traceback" not in result.output
    assert sweep(kitti, tmp_path, OnRay()) == expected


def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(
    kitti: Path,
    cluster: str,
    expected: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    written = 0

    def full(descriptor: int) -> None:
        nonlocal written
        written += 1
        if written > 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(atomic_files.os, "fsync", full)
        command = ["sweep", "--data", str(kitti), *COMMAND, "--output", str(tmp_path), "--ray"]
        result = CliRunner().invoke(app, command)
    assert result.exit_code == 1, result.output
    line = result.stderr.splitlines()[-1]
    assert line.startswith("error: [Errno 28] No space left on device: ")
    assert "Traceback" not in result.output
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert [path.name for path in files] == ["result.json"] * 2
    assert sweep(kitti, tmp_path, OnRay()) == expected


def plan(data: Path, seed: int) -> Plan:
    choices = Choices(("lora",), SMALL, {"rank": 2})
    return plan_vtab(data, ["kitti"], [seed, seed + 1], choices, lambda message: None)


def kill_worker(title: str) -> threading.Thread:
    """Kill, once, the descendant of this process that runs a cell."""

    def parent(pid: int) -> int:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return int(fields[1])

    def own(pid: int) -> bool:
        while pid > 1:
            if pid == os.getpid():
                return True
            pid = parent(pid)
        return False

    def find() -> int | None:
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                name = path.read_bytes().strip(b"\0").decode()
                if name == f"ray::{title}" and own(int(path.parent.name)):
                    return int(path.parent.name)
            except (OSError, ValueError):
                continue
        return None

    def watch() -> None:
        end = time.monotonic() + 60
        while (pid := find()) is None and time.monotonic() < end:
            time.sleep(0.01)
        if pid is not None:
            time.sleep(0.1)  # mid-cell
            os.kill(pid, signal.SIGKILL)

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


def test_a_killed_worker_is_a_failed_cell_or_one_that_runs_again(
    kitti: Path, cluster: str, tmp_path: Path
) -> None:
    cells = plan(kitti, 7101).cells
    thread = kill_worker(cells[0].title)
    ledger = Ledger(tmp_path / "once")
    outcome = run(plan(kitti, 7101), ledger, scheduler=OnRay(max_retries=0))
    thread.join()
    assert list(outcome.failed) == ["kitti-lora-seed7101"]
    assert outcome.failed["kitti-lora-seed7101"].startswith("its worker died (")
    assert ledger.failure(cells[0]) == outcome.failed["kitti-lora-seed7101"]
    assert [cell.settings.seed for cell, _ in outcome.finished] == [7102]

    told: list[str] = []
    thread = kill_worker(cells[0].title)
    again = run(plan(kitti, 7101), ledger, scheduler=OnRay(max_retries=1), notify=told.append)
    thread.join()
    assert any(line.startswith("kitti-lora-seed7101: its worker died (") for line in told)
    assert not again.failed
    here = run(plan(kitti, 7101), Ledger(tmp_path / "here"))
    found = [[result["test_top1_percent"] for _, result in each.finished] for each in (again, here)]
    assert found[0] == found[1]


def test_what_a_cell_cannot_have_is_told_before(kitti: Path, cluster: str, tmp_path: Path) -> None:
    command = ["vtab", "--data", str(kitti), "--output", str(tmp_path / "run"), "--ray"]
    command += [*(part for part in COMMAND if "ranks" not in part), "--cpus-per-cell=3"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 2, result.output
    line = "error: cpus_per_cell must be at most the 2 of a machine, got 3.0"
    assert result.stderr.splitlines()[-1] == line
    assert not (tmp_path / "run").exists()
    for reserved, message in (
        ({"cpus_per_cell": 3}, "cpus_per_cell must be at most the 2 of a machine, got 3"),
        ({"gpus_per_cell": 99}, r"gpus_per_cell must be at most the \d+ of a machine, got 99"),
    ):
        with pytest.raises(ValueError, match=message):
            OnRay(**reserved).connect()
