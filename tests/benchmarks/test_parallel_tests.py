"""Tests in several processes without a plugin: every test once, and a failure is one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TESTS = """
import os, pathlib, pytest
@pytest.mark.parametrize("name", ["a b", "c[d]", "e::f", "g", "h"])
def test_each(name):
    pathlib.Path(__file__).with_name(name.replace(":", "_")).write_text(str(os.getppid()))
    assert name != os.environ.get("FAILS")
@pytest.mark.skip
def test_not():
    assert False
"""


def run(folder: Path, *arguments: str, fails: str = "") -> subprocess.CompletedProcess[str]:
    file = folder / "test_them.py"
    file.write_text(TESTS)
    command = [sys.executable, "-m", "benchmarks.parallel_tests", "--jobs", "3", str(file)]
    environment = {"PATH": "", "FAILS": fails, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [*command, "-p", "no:xdist", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )


def test_every_test_runs_once(tmp_path: Path) -> None:
    done = run(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "5 passed, 1 skipped"
    assert {"a b", "c[d]", "e__f", "g", "h"} <= {path.name for path in tmp_path.iterdir()}


def test_a_failure_is_shown_and_fails_the_run(tmp_path: Path) -> None:
    done = run(tmp_path, fails="e::f")
    assert done.returncode == 1
    assert "FAILED" in done.stdout and "e::f" in done.stdout
    assert done.stdout.splitlines()[-1] == "4 passed, 1 failed, 1 skipped"


@pytest.mark.parametrize("selected", [["-k", "nothing"], ["-m", "skip"]])
def test_no_test_at_all_is_a_failure(tmp_path: Path, selected: list[str]) -> None:
    done = run(tmp_path, *selected)
    assert done.returncode != 0
    assert "passed" not in done.stdout.splitlines()[-1:]
