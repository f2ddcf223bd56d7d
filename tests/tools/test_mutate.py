"""The driver finds faults that tests miss, and does not take its own for theirs."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tools import mutate

SOURCE = '''
def area(width, height=2, square=False):
    """1 < 2 is no code."""
    if square and width < 0:
        raise ValueError(f"{width + 1}")
    print(width)
    return width * (height if not square else width)
'''


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "shapes.py").write_text(SOURCE)
    monkeypatch.setattr(mutate, "PACKAGE", tmp_path)
    return tmp_path


def test_every_kind_of_fault_and_no_text(package: Path) -> None:
    faults = mutate.faults_of("shapes.py")
    assert {(fault.line, fault.after) for fault in faults} == {
        (2, "3"),
        (2, "True"),
        (4, "square or width < 0"),
        (4, "width <= 0"),
        (4, "1"),
        (6, "pass"),
        (7, "return None"),
        (7, "width + (height if not square else width)"),
        (7, "width if not square else height"),
        (7, "square"),
    }
    before = ast.dump(ast.parse(SOURCE))
    assert all(ast.dump(fault.tree) != before for fault in faults)
    assert len({ast.dump(fault.tree) for fault in faults}) == len(faults)


def test_known_equivalents_are_left_out(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = ("shapes.py", "print(width)", "pass")
    monkeypatch.setitem(mutate.EQUIVALENT, known, "prints")
    assert "pass" not in {fault.after for fault in mutate.faults_of("shapes.py")}


def test_equivalents_are_faults_of_today() -> None:
    every = {
        (fault.file, fault.before, fault.after)
        for file in {file for file, *_ in mutate.EQUIVALENT}
        for fault in mutate.all_of(file)
    }
    assert set(mutate.EQUIVALENT) <= every


def test_files_and_their_tests_exist() -> None:
    for file, tests in mutate.FILES.items():
        assert (mutate.PACKAGE / file).is_file()
        for test in tests:
            path, _, name = test.partition("::")
            text = (mutate.ROOT / "tests" / path).read_text(encoding="utf-8")
            assert not name or re.search(rf"^(class|def) {name}\b", text, re.MULTILINE), test


def test_a_sample_reaches_every_file(package: Path) -> None:
    faults = mutate.faults_of("shapes.py")
    assert mutate.draw(faults, 0, 1) == faults
    assert len(set(mutate.draw(faults, 4, 1))) == 4
    assert mutate.draw(faults, 4, 1) != mutate.draw(faults, 4, 2)


@pytest.mark.parametrize(("text", "lines"), [("7", range(7, 8)), ("7-9", range(7, 10))])
def test_lines(text: str, lines: range) -> None:
    assert mutate.line_range(text) == lines


def test_short_tests_of_the_line_come_first() -> None:
    tests: mutate.Tests = {
        "elsewhere": (0.1, {1}),
        "longer": (2.0, {7}),
        "short": (1.0, {6, 7}),
        "too long": (mutate.LONG, {7}),
    }
    items = [SimpleNamespace(nodeid=name) for name in tests]
    mutate._Order(tests, 7).pytest_collection_modifyitems(items)  # type: ignore[arg-type]
    assert [item.nodeid for item in items] == ["short", "longer", "elsewhere"]


def test_few_tests_elsewhere_where_some_run_the_line() -> None:
    tests: mutate.Tests = {str(n): (mutate.OTHERS / 4 + 0.1, {n}) for n in range(9)}

    def chosen(line: int) -> list[str]:
        items = [SimpleNamespace(nodeid=name) for name in tests]
        mutate._Order(tests, line).pytest_collection_modifyitems(items)  # type: ignore[arg-type]
        return [item.nodeid for item in items]

    assert chosen(8) == ["8", "0", "1", "2"]
    assert chosen(99) == list(tests)


def test_a_fault_is_noticed_or_passes(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In forks; the module is nowhere but in memory."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/test_it.py").write_text(
        "def test_area():\n    from efft_kernels.shapes import area\n    assert area(3) == 6\n"
    )
    monkeypatch.setattr(mutate, "ROOT", tmp_path)
    monkeypatch.setitem(mutate.FILES, "shapes.py", ("test_it.py",))
    faults = {fault.after: fault for fault in mutate.faults_of("shapes.py")}
    tests = {"tests/test_it.py::test_area": (0.1, {4, 6, 7})}
    assert mutate.passes(faults["pass"], tests)
    assert not mutate.passes(faults["return None"], tests)


def test_faults_are_tried_where_the_functions_are(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test makes its module by itself: only what is put into its functions can be noticed."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/test_it.py").write_text(
        "import importlib.util\n"
        f"path = {str(tmp_path / 'shapes.py')!r}\n"
        "spec = importlib.util.spec_from_file_location('shapes', path)\n"
        "shapes = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(shapes)\n"
        "def test_area():\n    assert shapes.area(3) == 6\n"
        "def test_square():\n    assert shapes.area(4, square=True) == 16\n"
    )
    monkeypatch.setattr(mutate, "ROOT", tmp_path)
    monkeypatch.setitem(mutate.FILES, "shapes.py", ("test_it.py",))
    faults = [
        fault
        for fault in mutate.faults_of("shapes.py")
        if fault.after in ("3", "pass", "square or width < 0", "return None")
    ]
    assert len(faults) == 4
    survivors = mutate.try_all("shapes.py", faults)
    assert survivors is not None
    assert {fault.after for fault in survivors} == {"3", "pass"}  # a default is made at import

    file = tmp_path / "tests/test_it.py"
    source = file.read_text()
    # What passes once a process alone notices nothing in a second run, whatever the fault.
    file.write_text(
        source + "ran = []\ndef test_once():\n    ran.append(1)\n    assert ran == [1]\n"
    )
    assert mutate.try_all("shapes.py", faults) == faults
    file.write_text(source + "def test_more():\n    assert not shapes.area(1)\n")
    assert mutate.try_all("shapes.py", faults) is None


def test_what_a_fault_changes() -> None:
    """A function that another one makes anew at each call; and the module itself."""
    source = "def f(x):\n    def g(y):\n        return y + 1\n    return g(x)\n\nh = 5\n"

    def fault(after: str) -> mutate.Fault:
        return next(fault for fault in mutate.all_of("it.py") if fault.after == after)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "read_text", lambda *_, **__: source)
        inner, top = fault("y - 1"), fault("6")
    space: dict[str, Any] = {}
    exec(compile(source, str(mutate.PACKAGE / "it.py"), "exec"), space)
    live = mutate._live_functions(str(mutate.PACKAGE / "it.py"))
    swaps = mutate._swaps(inner, live)
    assert swaps is not None
    for function, code in swaps:
        function.__code__ = code
    assert space["f"](3) == 2
    assert mutate._swaps(top, live) is None  # it runs at import
