"""tools/mutate.py puts faults into what the interpreter runs, not into what it was made of."""

from __future__ import annotations

from pathlib import Path

import pytest

from efft_kernels.ops.backends.triton.device import INTERPRETED
from tools import mutate

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="of the interpreter")

SOURCE = """
import triton
import triton.language as tl

@triton.jit(do_not_specialize=["n"])
def _sum_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    total = tl.sum(tl.load(x_ptr + offs, mask=offs < n, other=0.0), axis=0)
    for i in range(1):
        total += tl.load(x_ptr) * 2
    tl.store(out_ptr, total)
"""
BY_PATH = """
import importlib.util
spec = importlib.util.spec_from_file_location("sums", {path!r})
sums = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sums)
"""
BY_NAME = "from efft_kernels import sums\n"
TEST = """
import torch
def test_sum():
    x, out = torch.arange(8.0), torch.full((1,), torch.nan)
    sums._sum_kernel[(1,)](x, out, 5, BLOCK=8)
    assert out == 10
"""
PASSING = {(9, "2"), (10, "pass"), (10, "3")}  # x[0] is zero


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The kernel and an empty test of it."""
    (tmp_path / "sums.py").write_text(SOURCE)
    (tmp_path / "tests").mkdir()
    monkeypatch.setattr(mutate, "PACKAGE", tmp_path)
    monkeypatch.setattr(mutate, "ROOT", tmp_path)
    monkeypatch.setitem(mutate.FILES, "sums.py", ("test_it.py",))
    return tmp_path / "tests/test_it.py"


def test_where_the_kernel_has_run(written: Path) -> None:
    """Its test makes the module by itself, which no fault in memory reaches."""
    written.write_text(BY_PATH.format(path=str(written.parents[1] / "sums.py")) + TEST)
    faults = [fault for fault in mutate.faults_of("sums.py") if fault.line > 8]
    assert {(fault.line, fault.after) for fault in faults} > PASSING
    survivors = mutate.try_all("sums.py", faults)
    assert survivors is not None
    assert {(fault.line, fault.after) for fault in survivors} == PASSING


def test_from_memory(written: Path) -> None:
    """The module, of that name, is nowhere else."""
    written.write_text(BY_NAME + TEST)
    faults = {(fault.line, fault.after): fault for fault in mutate.faults_of("sums.py")}
    tests: mutate.Tests = {"tests/test_it.py::test_sum": (0.1, set(range(7, 12)))}
    assert mutate.passes(faults[10, "3"], tests)
    assert not mutate.passes(faults[8, "offs <= n"], tests)
