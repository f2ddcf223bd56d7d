"""Runs test_triton_kernels.py in Triton's interpreter, one process per test function.

TRITON_INTERPRET has to be set before the kernels are defined, and the rest of the suite runs without it.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

CASES = Path(__file__).with_name("test_triton_kernels.py")


def functions() -> list[str]:
    """The test functions of the case file that need no GPU."""
    return [
        node.name
        for node in ast.parse(CASES.read_text()).body
        if isinstance(node, ast.FunctionDef)
        and node.name.startswith("test_")
        and not any(isinstance(d, ast.Name) and d.id == "needs_cuda" for d in node.decorator_list)
    ]


@pytest.mark.parametrize("function", functions())
def test_in_the_interpreter(function):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("PYTEST_XDIST_WORKER", None)
    command = [
        sys.executable, "-m", "pytest", "-q", "--no-header", "--tb=short", "-p", "no:cacheprovider",
        "-p", "no:xdist", f"{CASES}::{function}",
    ]  # fmt: skip
    run = subprocess.run(command, env=environment, cwd=CASES.parents[2], capture_output=True, text=True)
    if run.returncode:
        pytest.fail(f"{run.stdout}\n{run.stderr}", pytrace=False)
    assert " passed" in run.stdout, run.stdout
