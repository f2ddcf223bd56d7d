"""The GPU check's flow without a GPU: every stage runs or is named, whatever becomes of others."""

from __future__ import annotations

import argparse
import os
import runpy
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import check
from benchmarks.gpu.check import Log, Stage
from benchmarks.gpu.stages import STAGES
from efft_kernels.testing.gpu_cases import CUDA_CASES

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
    why = "no-such-tool is not on this machine"
    assert (outcomes[0].verdict, outcomes[0].why) == ("skipped", why)


def test_a_program_is_found_beside_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for version in ("2024", "2025"):
        tool = tmp_path / version / "no-such-tool"
        tool.parent.mkdir()
        tool.write_text("#!/bin/sh\necho profiled $1\n")
        tool.chmod(0o755)
    monkeypatch.setattr(check, "TOOL_FOLDERS", ("/no/such/folder", f"{tmp_path}/*"))
    assert check.find_tool("no-such-tool") == f"{tmp_path}/2025/no-such-tool"
    assert check.find_tool("no-other-tool") is None
    stage = Stage("profile", "second", 5, ("{tool}", "rows"), needs="no-such-tool")
    outcomes, log = run(tmp_path, stage)
    assert outcomes[0].verdict == "ok" and "profiled rows" in log


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


class Parsed(BaseException):
    """A module's parser took its arguments."""


COMMANDS = [
    pytest.param(command, id=f"{stage.half} {stage.name}{' dry' * (command is stage.dry)}")
    for stage in STAGES
    for command in (stage.command, stage.dry)
    if command is not None and "-m" in command
]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_stage_has_the_options_of_its_module(
    command: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its main goes as far as the parser, with the arguments that the stage gives."""
    _, module, *arguments = check.filled(command[command.index("-m") - 1 :], tmp_path)[1:]
    parse = argparse.ArgumentParser.parse_known_args

    def parse_and_stop(parser: argparse.ArgumentParser, *given: Any) -> None:
        _, others = parse(parser, *given)
        if module == "benchmarks.parallel_tests":
            assert others[:2] == ["-m", "gpu"]
            others = [path for path in others[2:] if not (ROOT / path).exists()]
        assert not others
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parse_and_stop)
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    monkeypatch.delitem(sys.modules, module, raising=False)
    with pytest.raises(Parsed):
        runpy.run_module(module, run_name="__main__")


def test_the_sanitizers_cases_exist() -> None:
    (stage,) = (stage for stage in STAGES if stage.name == "compute-sanitizer memcheck")
    wanted = stage.command[stage.command.index("--only") + 1 :]
    assert set(wanted) <= {case.name for case in CUDA_CASES}


# The other stages' modules have tests of their own, and the options are checked above.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("half", "only"),
    [("first", ("load", "chain", "between")), ("second", ("chain", "operators", "step"))],
    ids=check.HALVES,
)
def test_a_half_runs_dry_from_its_script(half: str, only: tuple[str, ...], tmp_path: Path) -> None:
    environment = os.environ | {"PYTHON": sys.executable, "RESULTS": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    arguments = (half, "--dry", "--seconds", "1500", "--only", *only)
    done = subprocess.run(
        ["bash", "benchmarks/gpu_check.sh", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=1700,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == (tmp_path / "check.log").read_text()
    assert "skipped" in done.stdout or half == "first"
    assert len(list(tmp_path.iterdir())) <= 8
