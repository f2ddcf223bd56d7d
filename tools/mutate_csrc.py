"""Small faults put into csrc, one at a time: which of them do the tests without a GPU notice?

    python -m tools.mutate_csrc [--only thin ops/test_mixed_batch.py ...] [--csv FILE]

Each is one changed expression in a copy of the project (tools/csrc_faults.py lists them, with the
test that is to notice each). Those of csrc/cuda go into the programs of tests/csrc/, which run on a
plain CPU, the kernels on the model of a multiprocessor. Those of csrc/cpu and csrc/entry go into
the library that the tests load: one file of it is compiled again without most optimisations, of the
kernels for the fault's instruction set. What this processor cannot run is not tried, and counted as
such. The sources themselves are not touched, and hold nothing for it.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from .csrc_faults import FAULTS, PAIRS, Fault
from .mutate import ROOT, append_score, present_commit

BUILD = ROOT / "build" / "native"
LIBRARIES = {"cpu": "_native", "entry": "_autograd"}  # by the folder of csrc
RUNS_HERE = {"baseline": lambda: True, PAIRS: torch.cpu._is_avx512_bf16_supported}
SECONDS = 900.0  # that a test may take without a fault
# A fault may make a loop endless: it has so many times as long as the test takes without, and these
# seconds.
TIMES, AT_LEAST = 5.0, 30.0


class Copy:
    """The project in a folder of its own, where one fault at a time is tried."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.limits: dict[tuple[str, str], float] = {}  # seconds, by test and instruction set
        unwanted = shutil.ignore_patterns("__pycache__", "*.so")
        for name in ("csrc", "tests", "efft_kernels"):
            shutil.copytree(ROOT / name, folder / name, ignore=unwanted)
        shutil.copy(ROOT / "pyproject.toml", folder)

    @cached_property
    def libraries(self) -> dict[str, _Library]:
        """Built from the sources as they are, put into the copy of the package.

        Raises:
            RuntimeError: one cannot be built here.
        """
        build = _build_module("native_build")
        settings = build.Settings.from_environment(os.environ)
        names = [*LIBRARIES.values(), "_build_info"]
        graph = build.build(settings, BUILD, names=names)
        if graph.missing:
            raise RuntimeError(f"no library to try faults in: {graph.missing}")
        build.install(graph, BUILD, self.folder / "efft_kernels")
        of_the_copy = build.build_graph(
            settings, self.folder / "build", root=self.folder, names=list(LIBRARIES.values())
        )
        return {made.name: _Library(self.folder, made) for made in of_the_copy.libraries}

    def fails_without(self, faults: Iterable[Fault], test: str) -> bool:
        """Whether the test fails with no fault, in libraries made as those with one are.

        Raises:
            RuntimeError: as `noticed`.
        """
        for isa in sorted({fault.isa for fault in faults}):
            for unit in sorted({unit_of(fault) for fault in faults if fault.isa == isa}):
                if library := self._library_of(unit):
                    library.rebuild(unit, kept=True)
            start = time.monotonic()
            if self._fails(test, isa):
                return True
            self.limits[test, isa] = AT_LEAST + TIMES * (time.monotonic() - start)
        return False

    def noticed(self, fault: Fault, test: str) -> bool:
        """Whether the test fails.

        Raises:
            RuntimeError: a source does not compile, which would tell nothing of the test; or there
                is no such test.
        """
        path, library = self.folder / "csrc" / fault.file, self._library_of(fault.file)
        right = path.read_text()
        path.write_text(replaced(fault, right))
        try:
            if library:
                library.rebuild(unit_of(fault))
            return self._fails(test, fault.isa)
        finally:
            path.write_text(right)
            if library:
                library.link()

    def _library_of(self, file: str) -> _Library | None:
        name = LIBRARIES.get(folder_of(file))
        return None if name is None else self.libraries[name]

    def _fails(self, test: str, isa: str) -> bool:
        options = ["-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", "-W", "ignore"]
        process = subprocess.Popen(
            [sys.executable, "-m", "pytest", *options, *arguments_of(test)],
            cwd=self.folder,
            env=os.environ
            | {
                "PYTHONPATH": str(self.folder),
                "OMP_NUM_THREADS": "1",
                "EFFT_KERNELS_CPU_ISA": isa,
                "TMPDIR": str(self.folder),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            output, _ = process.communicate(timeout=self.limits.get((test, isa), SECONDS))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            return True
        # A negative one is a signal's: a crash.
        if process.returncode > 1 or ": error:" in output:
            raise RuntimeError(output)
        return process.returncode != 0


@dataclass
class _Library:
    """A library of the copy: which of its objects were compiled there, and how it is linked."""

    folder: Path
    made: Any  # a Library of native_build

    def __post_init__(self) -> None:
        self.objects = {
            item.source: BUILD / "objects" / self.made.name / f"{self._relative(item.source)}.o"
            for item in self.made.objects
        }

    def rebuild(self, name: str, kept: bool = False) -> None:
        """Compile a file of csrc, and link. `kept`: for all links to come."""
        unit = self.folder / "csrc" / name
        (command,) = (item.command for item in self.made.objects if item.source == unit)
        target = self.folder / f"{unit.stem}.{'right' if kept else 'wrong'}.o"
        if kept and self.objects[unit] == target:
            return
        _run([*self._quickly(command), "-c", str(unit), "-o", str(target)])
        if kept:
            self.objects[unit] = target
        self.link({unit: target})

    def link(self, changed: dict[Path, Path] | None = None) -> None:
        objects = [str(path) for path in (self.objects | (changed or {})).values()]
        target = self.folder / "efft_kernels" / self.made.filename
        _run([*self.made.link, *objects, "-o", str(target), *self.made.link_libraries])

    def _relative(self, source: Path) -> Path:
        return source.relative_to(self.folder)

    def _quickly(self, command: tuple[str, ...]) -> list[str]:
        """The command with fewer optimisations, and torch's headers, most of the work, read once:
        15 seconds a file of csrc/entry in place of 45."""
        kernels = self.made.name == LIBRARIES["cpu"]
        quick = [("-O1" if kernels else "-O0") if part == "-O3" else part for part in command]
        if kernels:
            return quick
        header = self.folder / "precompiled.h"
        if not header.exists():
            header.write_text("#include <torch/extension.h>\n")
            _run([*quick, "-x", "c++-header", str(header), "-o", f"{header}.gch"])
        return [*quick, "-include", str(header)]


def folder_of(file: str) -> str:
    return file.partition("/")[0]


def unit_of(fault: Fault) -> str:
    """What is compiled for it: the file itself, or the kernels that a header is part of."""
    kernels = fault.file.startswith("cpu/") and fault.file.endswith(".h")
    return f"cpu/isa_{fault.isa}.cpp" if kernels else fault.file


def arguments_of(test: str) -> list[str]:
    """pytest's, for a test file or the name of a program of tests/csrc."""
    if test.endswith(".py"):
        return ["-m", "not slow", f"tests/{test}"]
    return ["-k", f"test_{test}", "tests/csrc/test_host.py"]


def replaced(fault: Fault, source: str) -> str:
    """The source with the fault in it.

    Raises:
        ValueError: the right text is not there exactly once.
    """
    if source.count(fault.right) != 1:
        raise ValueError(f"{fault.file} must hold this once: {fault.right}")
    return source.replace(fault.right, fault.wrong)


def _build_module(name: str) -> ModuleType:
    """A module of csrc/build, which is no package."""
    sys.path.insert(0, str(ROOT / "csrc" / "build"))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.pop(0)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(done.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description="Small faults in csrc: which are noticed?")
    parser.add_argument("--only", nargs="+", choices=FAULTS, default=list(FAULTS), metavar="TEST")
    parser.add_argument("--csv", type=Path, help="append the score of each test to this file")
    options = parser.parse_args()
    commit, tried, caught = present_commit(), 0, 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Copy(Path(folder).resolve())
        for test in options.only:
            here = [fault for fault in FAULTS[test] if RUNS_HERE[fault.isa]()]
            if len(here) < len(FAULTS[test]):
                print(f"not tried by {test}: {len(FAULTS[test]) - len(here)} that do not run here")
            if copy.fails_without(here, test):
                sys.exit(f"error: without a fault {test} fails")
            for part, group in itertools.groupby(here, lambda fault: folder_of(fault.file)):
                faults, noticed = list(group), 0
                for fault in faults:
                    if copy.noticed(fault, test):
                        noticed += 1
                    else:
                        print(
                            f"passes: {fault.file}\n  - {fault.right}\n  + {fault.wrong}",
                            flush=True,
                        )
                name = f"csrc/{part} by {test if test.endswith('.py') else f'test_{test}'}"
                print(f"{name}: {noticed} of {len(faults)}", flush=True)
                if options.csv is not None:
                    append_score(options.csv, commit, ["", name, len(faults), noticed])
                tried, caught = tried + len(faults), caught + noticed
    print(f"{caught} of {tried} caught, {100 * caught / tried:.1f} %")


if __name__ == "__main__":
    main()
