"""Runs kernels/ in Triton's interpreter: two processes, each for about half of the time.

TRITON_INTERPRET has to be set before the kernels are defined, and the rest of the suite runs
without it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

KERNELS = Path(__file__).with_name("kernels")
HALF = ["test_budget", "test_exact", "test_operands"]
REST = sorted(path.stem for path in KERNELS.glob("test_*.py") if path.stem not in HALF)


@pytest.mark.parametrize("files", [HALF, REST], ids="+".join)
def test_in_the_interpreter(files):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("PYTEST_XDIST_WORKER", None)
    options = ["-q", "--no-header", "--tb=short", "-W", "ignore"]
    options += ["-p", "no:cacheprovider", "-p", "no:xdist"]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *(KERNELS / f"{name}.py" for name in files)],
        env=environment,
        cwd=KERNELS.parents[4],
        capture_output=True,
        text=True,
    )
    if run.returncode:
        pytest.fail(f"{run.stdout}\n{run.stderr}", pytrace=False)
    assert " passed" in run.stdout, run.stdout
