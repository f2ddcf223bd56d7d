"""Runs test_kernels.py in Triton's interpreter: the long tests in processes of their own,
the rest in one.

TRITON_INTERPRET has to be set before the kernels are defined, and the rest of the suite runs
without it.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

CASES = Path(__file__).with_name("test_kernels.py")


def functions() -> list[str]:
    """The test functions of the case file that need no GPU."""
    return [
        node.name
        for node in ast.parse(CASES.read_text()).body
        if isinstance(node, ast.FunctionDef)
        and node.name.startswith("test_")
        and not any(isinstance(d, ast.Name) and d.id == "needs_cuda" for d in node.decorator_list)
    ]


LONG = (
    "test_every_rank",
    "test_exact_operands_give_exact_results",
    "test_all_results_within_the_error_budget",
)
GROUPS = {name: [name] for name in LONG} | {
    "the_rest": [name for name in functions() if name not in LONG]
}


@pytest.mark.parametrize("group", GROUPS)
def test_in_the_interpreter(group):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("PYTEST_XDIST_WORKER", None)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--no-header",
        "--tb=short",
        "-W",
        "ignore",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        *(f"{CASES}::{name}" for name in GROUPS[group]),
    ]
    run = subprocess.run(
        command, env=environment, cwd=CASES.parents[4], capture_output=True, text=True
    )
    if run.returncode:
        pytest.fail(f"{run.stdout}\n{run.stderr}", pytrace=False)
    assert " passed" in run.stdout, run.stdout
