"""The GPU check's flow without a GPU: every stage runs or is named, whatever becomes of others."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.gpu import check
from benchmarks.gpu.check import Log, Stage
from benchmarks.gpu.stages import STAGES

ROOT = Path(__file__).resolve().parents[2]


def python(code: str) -> tuple[str, ...]:
    # Braces are the placeholders' own.
    return ("{python}", "-c", code.replace("{", "{{").replace("}", "}}"))


def run(folder: Path, *stages: Stage, dry: bool = False, total_s: float = 60.0) -> tuple:
    with (folder / "check.log").open("w") as file:
        outcomes = check.run(stages, Log(file), folder, dry=dry, total_s=total_s)
    return outcomes, (folder / "check.log").read_text()


def test_a_stage_that_fails_hangs_or_is_no_program_does_not_stop_the_next(tmp_path: Path) -> None:
    outcomes, log = run(
        tmp_path,
        Stage("fails", "first", 20, python("print('before'); raise SystemExit(3)")),
        Stage(
            "hangs",
            "first",
            1.5,
            python("print('started', flush=True); import time; time.sleep(60)"),
        ),
        Stage("absent", "first", 5, ("/no/such/program",)),
        Stage("works", "first", 20, python("print('reached')")),
    )
    assert [outcome.verdict for outcome in outcomes] == ["FAILED", "FAILED", "FAILED", "ok"]
    assert outcomes[0].why == "exit 3"
    assert outcomes[1].why == "killed after its 2 s" and outcomes[1].seconds < 10
    assert "/no/such/program" in outcomes[2].why
    assert all(word in log for word in ("before", "started", "reached"))


def test_a_killed_stage_takes_its_children_along(tmp_path: Path) -> None:
    child = tmp_path / "child"
    code = f"""
import pathlib, subprocess, sys, time
process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
pathlib.Path({str(child)!r}).write_text(str(process.pid))
time.sleep(60)
"""
    outcomes, _ = run(tmp_path, Stage("parent", "first", 3, python(code)))
    assert outcomes[0].verdict == "FAILED"
    pid = int(child.read_text())
    for _ in range(50):
        state = Path(f"/proc/{pid}/stat")
        if not state.exists() or state.read_text().split()[2] == "Z":
            return
        time.sleep(0.1)
    pytest.fail(f"process {pid} still runs")


def test_what_does_not_fit_into_the_time_is_named(tmp_path: Path) -> None:
    outcomes, _ = run(
        tmp_path,
        Stage("long", "first", 20, python("import time; time.sleep(1.5)")),
        Stage("late", "first", 20, python("print('reached')")),
        total_s=check.LEAST_S + 1,
    )
    assert [outcome.verdict for outcome in outcomes] == ["ok", "FAILED"]
    assert outcomes[1].why == "not run: the 6 s are over"


def test_a_missing_program_skips_its_stage_by_name(tmp_path: Path) -> None:
    outcomes, _ = run(tmp_path, Stage("profile", "second", 5, python("1"), needs="no-such-tool"))
    assert (outcomes[0].verdict, outcomes[0].why) == ("skipped", "no-such-tool is not on the PATH")


def test_dry_prints_what_only_a_gpu_can_run(tmp_path: Path) -> None:
    outcomes, log = run(
        tmp_path,
        Stage("gpu", "first", 5, ("gpu-only", "{results}/rows.csv")),
        Stage("both", "first", 20, ("gpu-only",), dry=python("print('on the CPU')")),
        dry=True,
    )
    assert [outcome.verdict for outcome in outcomes] == ["skipped", "ok"]
    assert f"would run: gpu-only {tmp_path}/rows.csv" in log and "on the CPU" in log


@pytest.mark.parametrize("half", check.HALVES)
def test_the_stages_of_a_half(half: str) -> None:
    stages = [stage for stage in STAGES if stage.half == half]
    assert len({stage.name for stage in stages}) == len(stages) > 3
    written = {
        Path(argument).name
        for stage in stages
        for argument in stage.command
        if argument.startswith("{results}/")
    }
    assert len(written) <= 7  # and check.log


@pytest.mark.slow
@pytest.mark.parametrize("half", check.HALVES)
def test_a_half_runs_dry_from_its_script(half: str, tmp_path: Path) -> None:
    environment = os.environ | {"PYTHON": sys.executable, "RESULTS": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        ["bash", "benchmarks/gpu_check.sh", half, "--dry", "--seconds", "600"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == (tmp_path / "check.log").read_text()
    assert len(list(tmp_path.iterdir())) <= 8
