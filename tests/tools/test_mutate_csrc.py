"""The list of faults fits the sources of today, and the driver tells which are noticed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tools import mutate_csrc
from tools.csrc_faults import FAULTS, Fault

PROGRAMS = mutate_csrc.ROOT / "tests" / "csrc"


@pytest.mark.parametrize("test", FAULTS)
def test_faults_and_their_tests_are_those_of_today(test: str) -> None:
    assert len(set(FAULTS[test])) == len(FAULTS[test])
    for fault in FAULTS[test]:
        source = (mutate_csrc.ROOT / "csrc" / fault.file).read_text()
        assert mutate_csrc.replaced(fault, source) != source
        assert fault.isa in mutate_csrc.RUNS_HERE
        assert (mutate_csrc.ROOT / "csrc" / mutate_csrc.unit_of(fault)).is_file()
    if test.endswith(".py"):
        assert (mutate_csrc.ROOT / "tests" / test).is_file()
    else:
        assert len([*PROGRAMS.rglob(f"test_{test}.cpp")]) == 1


def test_text_that_is_not_there_once_is_refused() -> None:
    for right in ("b", "c"):
        with pytest.raises(ValueError, match="must hold this once"):
            mutate_csrc.replaced(Fault("cuda/size.h", right, ""), "abb")


SIZE = "int size = 4;\n"
TEST = """
import os, pathlib, time
text = (pathlib.Path(__file__).parents[2] / "csrc" / "cuda" / "size.h").read_text()
assert "unreadable" not in text
def test_size():
    if "crash" in text:
        os.abort()
    if "endless" in text:
        time.sleep(1000)
    assert "= 4" in text
"""


@pytest.fixture
def small_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> mutate_csrc.Copy:
    root, copy = tmp_path / "project", tmp_path / "copy"
    files = {"csrc/cuda/size.h": SIZE, "tests/ops/test_size.py": TEST, "efft_kernels/a.py": ""}
    for file, text in (files | {"pyproject.toml": ""}).items():
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text(text)
    copy.mkdir()
    monkeypatch.setattr(mutate_csrc, "ROOT", root)
    monkeypatch.setitem(FAULTS, "ops/test_size.py", (Fault("cuda/size.h", "4", "5"),))
    return mutate_csrc.Copy(copy)


def test_what_is_noticed(small_project: mutate_csrc.Copy, monkeypatch: pytest.MonkeyPatch) -> None:
    def noticed(fault: Fault) -> bool:
        found = small_project.noticed(fault, "ops/test_size.py")
        assert (small_project.folder / "csrc" / "cuda" / "size.h").read_text() == SIZE
        return found

    assert not small_project.fails_without(FAULTS["ops/test_size.py"], "ops/test_size.py")
    assert noticed(Fault("cuda/size.h", "= 4", "= 5"))
    assert noticed(Fault("cuda/size.h", "4", "crash"))
    with pytest.raises(RuntimeError, match="unreadable"):
        noticed(Fault("cuda/size.h", "4", "unreadable"))
    ((_, limit),) = small_project.limits.items()
    assert mutate_csrc.AT_LEAST < limit < mutate_csrc.SECONDS
    small_project.limits = dict.fromkeys(small_project.limits, 3.0)
    assert noticed(Fault("cuda/size.h", "4", "endless"))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ is installed")
def test_a_fault_in_a_program(tmp_path: Path) -> None:
    (fault,) = FAULTS["ring"]
    assert mutate_csrc.Copy(tmp_path).noticed(fault, "ring")
