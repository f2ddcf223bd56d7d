"""Builds the native libraries: one ninja graph for all of them, with flags per file.

    _native.so         C++ operators on torch's stable ABI      schemas.cpp, cpu/*.cpp
    _native_cuda.so    CUDA operators on torch's stable ABI     cuda/**/*.cu, *.cpp (see CUDA_FILES)
    _autograd.*.so     the C++ autograd node, a Python module   entry/*.cpp
    _build_info.*.so   what all of this was built with          build/build_info.cpp

setup.py runs it for pip. By itself it builds into build/native, and with --sanitize an instrumented
_native.so (see asan.sh). MAX_JOBS limits how many compilers run at once.

Why not torch.utils.cpp_extension.BuildExtension: it gives every file of an extension the same
flags, and a file for sm_90a alone needs its own; it names every library like a Python module; and
its build folder is a temporary one in an editable install, so that each would compile everything.

A library that cannot be built is left out, with the reason in _build_report.json, which the package
reads. A source that does not compile fails the build.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import shlex
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import toolchain
from toolchain import Missing, Settings, ToolError

ROOT = Path(__file__).resolve().parents[2]
REPORT = "_build_report.json"
LIBRARIES = ("_native", "_native_cuda", "_autograd", "_build_info")

# The oldest torch that the stable-ABI libraries load in; the macro has major and minor on top.
TARGET_VERSION = "2.11"
TARGET_VERSION_MACRO = "-DTORCH_TARGET_VERSION=0x020b000000000000"

# No -march and no -fopenmp: sources pick instruction sets per function and use torch's own threads.
CXX_FLAGS = (
    toolchain.CPP_STANDARD,
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-fvisibility-inlines-hidden",
    "-Wall",
)
# -O1 keeps stack traces readable; any report ends the process.
SANITIZER_FLAGS = (
    "-O1",
    "-g",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all",
    "-fno-omit-frame-pointer",
)
NVCC_FLAGS = (
    toolchain.CPP_STANDARD,
    "-O3",
    "-lineinfo",  # profilers show the source's lines; three times the size without compression
    "-Xfatbin=-compress-all",
    "-DNDEBUG",  # CUTLASS asserts inside its device loops otherwise
    "--expt-relaxed-constexpr",
    "-Xcompiler=-fPIC,-fvisibility=hidden,-fvisibility-inlines-hidden",
)
# The .cu files that are for some GPUs only, by file name: the architectures that they compile for,
# of those asked for, and the macro that is defined where there is one, so that no other code calls
# into a file that was left out. Every other .cu file compiles for all architectures.
CUDA_FILES = {
    "*sm90*.cu": (("9.0a",), "EFFT_KERNELS_SM90"),
}
LINK_FLAGS = ("-shared", "-Wl,--as-needed")
# Finds an undefined symbol here instead of when a user loads the library. Not for Python modules,
# whose symbols of Python come from the interpreter, which is no library to link with.
NO_UNDEFINED = "-Wl,--no-undefined"


@dataclass(frozen=True)
class Object:
    """One source and the command that compiles it, without its input and output."""

    source: Path
    command: tuple[str, ...]


@dataclass(frozen=True)
class Library:
    """A shared library and the command that links it, without its objects and output.

    Attributes:
        link_libraries: what the command has after the objects.
    """

    name: str
    filename: str
    objects: tuple[Object, ...]
    link: tuple[str, ...]
    link_libraries: tuple[str, ...]


@dataclass
class BuildGraph:
    """What can be built here, and how.

    Attributes:
        libraries: those that can be built.
        missing: name -> why another cannot.
        facts: what the build is made with, for _build_info.
    """

    libraries: list[Library] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)
    facts: dict[str, str | list[str] | None] = field(default_factory=dict)

    def report(self) -> dict[str, dict[str, dict[str, str | None]]]:
        """What _build_report.json says: each library's file name, and why it is missing or null."""
        libraries: dict[str, dict[str, str | None]] = {}
        for name in LIBRARIES:
            libraries[name] = {"file": filename(name), "missing": self.missing.get(name)}
        return {"libraries": libraries}


def filename(name: str) -> str:
    """The library's file name: Python's own suffix for a module, a plain .so for torch's loader."""
    if name.startswith("_native"):
        return f"{name}.so"
    return f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"


def sources(name: str, root: Path = ROOT) -> list[Path]:
    """The library's sources as they are now, sorted."""
    patterns = {
        "_native": ("schemas.cpp", "cpu/*.cpp"),
        "_native_cuda": ("cuda/**/*.cu", "cuda/**/*.cpp"),
        "_autograd": ("entry/*.cpp",),
        "_build_info": ("build/build_info.cpp",),
    }[name]
    found = sorted(path for pattern in patterns for path in (root / "csrc").glob(pattern))
    if not found:
        raise Missing("there are no sources " + ", ".join(f"csrc/{name}" for name in patterns))
    return found


def build_graph(
    settings: Settings,
    build_dir: Path,
    *,
    environ: Mapping[str, str] = os.environ,
    root: Path = ROOT,
    names: Sequence[str] = LIBRARIES,
    sanitize: bool = False,
) -> BuildGraph:
    """Which of the libraries can be built here, and by which commands.

    Raises:
        ToolError: EFFT_KERNELS_BUILD_CUDA=1 and the CUDA library cannot be built.
    """
    graph = BuildGraph()
    try:
        commands = _Commands(settings, build_dir, environ, root, sanitize, graph.facts)
    except Missing as error:
        graph.missing = dict.fromkeys(names, str(error))
    else:
        makers: dict[str, Callable[[], Library]] = {
            "_native": commands.native,
            "_native_cuda": commands.native_cuda,
            "_autograd": commands.autograd,
            "_build_info": commands.build_info,
        }
        for name in names:
            try:
                graph.libraries.append(makers[name]())
            except Missing as error:
                graph.missing[name] = str(error)
    if settings.cuda == "1" and "_native_cuda" in graph.missing:
        reason = graph.missing["_native_cuda"]
        raise ToolError(f"{toolchain.BUILD_CUDA}=1, but the CUDA library cannot be built: {reason}")
    return graph


def cuda_archs(source: Path, archs: Sequence[str]) -> list[str]:
    """Those of `archs` that a .cu file compiles for, by CUDA_FILES."""
    for pattern, (own, _) in CUDA_FILES.items():
        if source.match(pattern):
            return [arch for arch in archs if arch in own]
    return list(archs)


class _Commands:
    """The commands that make each library.

    Raises:
        Missing: from the constructor, a tool that every library needs is not on this machine; from
            a library's method, one that this library needs.
    """

    def __init__(
        self,
        settings: Settings,
        build_dir: Path,
        environ: Mapping[str, str],
        root: Path,
        sanitize: bool,
        facts: dict[str, str | list[str] | None],
    ) -> None:
        if sys.platform != "linux":
            raise Missing(f"the native libraries are built on Linux, this is {sys.platform}")
        self.settings, self.build_dir, self.environ, self.root = settings, build_dir, environ, root
        self.cxx = toolchain.find_cxx(environ)
        toolchain.find_ninja(environ)
        self.torch = toolchain.find_torch()
        self.flags = CXX_FLAGS + (SANITIZER_FLAGS if sanitize else ())
        self.link_flags = LINK_FLAGS + (("-fsanitize=address,undefined",) if sanitize else ())
        self.facts = facts
        facts.update(
            compiler=self.cxx.version,
            cxx_flags=" ".join(self.flags),
            torch_version=self.torch.version,
            target_version=TARGET_VERSION,
            cuda_version=None,
            cuda_archs=[],
            cutlass_version=None,
            nvcc_flags="",
        )

    def native(self) -> Library:
        flags = [TARGET_VERSION_MACRO, *self._includes(self.root / "csrc"), *self._torch_includes]
        # Nobody reads the floating-point exceptions, and they keep a choice of values scalar.
        flags.append("-fno-trapping-math")
        return self._library("_native", self._cxx(flags), ["torch_cpu"])

    def native_cuda(self) -> Library:
        if self.settings.cuda == "0":
            raise Missing(f"it was left out: {toolchain.BUILD_CUDA}=0")
        archs = self.settings.archs
        found = sources("_native_cuda", self.root)
        nvcc = toolchain.find_nvcc(self.environ, self.torch, self.cxx, archs)
        cutlass = toolchain.find_cutlass()
        macros = [macro for own, macro in CUDA_FILES.values() if set(own) & set(archs)]
        defines = [TARGET_VERSION_MACRO, "-DUSE_CUDA", *(f"-D{macro}" for macro in macros)]
        includes = [
            *self._includes(self.root / "csrc", self.root / "csrc" / "cuda", cutlass.include),
            *self._torch_includes,
        ]
        # The toolkit's own headers come first (nvcc adds them by itself); torch's wheels fill in
        # those of libraries that the toolkit lacks.
        toolkit_includes = self._includes(*nvcc.includes, flag="-isystem")
        wheel_includes = self._includes(*self.torch.wheel_folders("include"), flag="-isystem")
        nvcc_flags = [*NVCC_FLAGS, f"-ccbin={self.cxx.program}", *defines]
        self.facts.update(
            cuda_version=nvcc.version,
            cuda_archs=list(archs),
            cutlass_version=cutlass.version,
            nvcc_flags=" ".join([*NVCC_FLAGS, *toolchain.gencode_flags(archs)]),
        )

        cxx_command = self._cxx([*defines, *includes, *toolkit_includes, *wheel_includes])
        objects = []
        for source in found:
            if source.suffix == ".cpp":
                objects.append(Object(source, cxx_command))
            elif own := cuda_archs(source, archs):
                gencode = toolchain.gencode_flags(own)
                command = (nvcc.path, *nvcc_flags, *gencode, *includes, *wheel_includes)
                objects.append(Object(source, command))
        major = self.torch.cuda_major
        folders = [*self.torch.wheel_folders("lib"), self.torch.root / "lib", *nvcc.libraries]
        # By the names that torch itself has loaded, so that a process has one runtime. libcuda is
        # not among them: a machine without a driver can still import the library.
        exact = [f"lib{name}.so.{major}" for name in ("cudart", "cublas", "cublasLt")]
        present = [name for name in exact if any((folder / name).exists() for folder in folders)]
        return self._link(
            "_native_cuda",
            objects,
            ["torch_cpu", "torch_cuda", *(f":{name}" for name in present)],
            folders,
        )

    def autograd(self) -> Library:
        flags = [
            "-DTORCH_EXTENSION_NAME=_autograd",
            "-DTORCH_API_INCLUDE_EXTENSION_H",
            *self._includes(self.root / "csrc"),
            *self._torch_includes,
            *self._includes(
                self.torch.root / "include" / "torch" / "csrc" / "api" / "include",
                toolchain.find_python_include(),
                flag="-isystem",
            ),
        ]
        return self._library(
            "_autograd", self._cxx(flags), ["c10", "torch_cpu", "torch", "torch_python"]
        )

    def build_info(self) -> Library:
        """Last, since it says what the others were built with."""
        generated = self.build_dir / "generated"
        flags = self._includes(
            generated, toolchain.find_pybind11(), toolchain.find_python_include(), flag="-isystem"
        )
        write_if_changed(generated / "build_facts.h", facts_header(self.facts))
        return self._library("_build_info", self._cxx(flags), [])

    @property
    def _torch_includes(self) -> list[str]:
        return self._includes(self.torch.root / "include", flag="-isystem")

    @staticmethod
    def _includes(*folders: Path, flag: str = "-I") -> list[str]:
        return [part for folder in folders for part in (flag, str(folder))]

    def _cxx(self, flags: Sequence[str]) -> tuple[str, ...]:
        return (*self.cxx.command, *self.flags, *flags)

    def _library(self, name: str, command: tuple[str, ...], libraries: list[str]) -> Library:
        objects = [Object(source, command) for source in sources(name, self.root)]
        return self._link(name, objects, libraries, [self.torch.root / "lib"])

    def _link(
        self, name: str, objects: list[Object], libraries: list[str], folders: Sequence[Path]
    ) -> Library:
        search = [f"-L{folder}" for folder in folders] if libraries else []
        undefined = (NO_UNDEFINED,) if name.startswith("_native") else ()
        return Library(
            name,
            filename(name),
            tuple(objects),
            (*self.cxx.command, *self.link_flags, *undefined),
            (*search, *(f"-l{library}" for library in libraries)),
        )


def facts_header(facts: Mapping[str, str | list[str] | None]) -> str:
    """The build's facts as JSON in a C++ string, which build_info.cpp includes."""
    return f'#pragma once\nconstexpr char kBuildFacts[] = R"json({json.dumps(facts)})json";\n'


def write_if_changed(path: Path, content: str | bytes, mode: int = 0o644) -> None:
    """Write the file whole or not at all, as running processes may have it mapped; leave it and its
    time alone if it says this already.
    """
    data = content.encode() if isinstance(content, str) else content
    if path.exists() and path.read_bytes() == data:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
    os.chmod(temporary, mode)
    os.replace(temporary, path)


def ninja_file(libraries: Sequence[Library], root: Path = ROOT) -> str:
    """The graph: an object per source, a shared library per list of objects. Commands are part of
    it, so a changed flag rebuilds what it concerns."""
    lines = ["ninja_required_version = 1.5", ""]
    lines += ["rule compile", "  command = $line -c $in -o $out -MD -MF $out.d"]
    lines += ["  depfile = $out.d", "  deps = gcc", "  description = compiling $in for $library"]
    lines += ["rule link", "  command = $line $in -o $out $libraries"]
    lines += ["  description = linking $out", ""]
    for library in libraries:
        outputs = []
        for item in library.objects:
            output = f"objects/{library.name}/{item.source.relative_to(root)}.o"
            outputs.append(output)
            lines += [f"build {_path(output)}: compile {_path(item.source)}"]
            lines += [f"  line = {_command(item.command)}", f"  library = {library.name}"]
        inputs = " ".join(_path(output) for output in outputs)
        lines += [f"build {library.filename}: link {inputs}"]
        lines += [f"  line = {_command(library.link)}"]
        lines += [f"  libraries = {_command(library.link_libraries)}", ""]
    return "\n".join(lines) + "\n"


def _path(path: str | Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def _command(parts: Sequence[str]) -> str:
    return shlex.join(parts).replace("$", "$$")


@contextmanager
def _locked(build_dir: Path) -> Iterator[None]:
    """Two builds in one folder wait for each other; ninja itself does not."""
    build_dir.mkdir(parents=True, exist_ok=True)
    with (build_dir / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def build(
    settings: Settings,
    build_dir: Path,
    *,
    environ: Mapping[str, str] = os.environ,
    root: Path = ROOT,
    names: Sequence[str] = LIBRARIES,
    sanitize: bool = False,
) -> BuildGraph:
    """Build what can be built into `build_dir`; a second run compiles only what changed.

    Raises:
        ToolError: a source does not compile, or see `build_graph`.
    """
    build_dir = build_dir.resolve()
    with _locked(build_dir):
        graph = build_graph(
            settings, build_dir, environ=environ, root=root, names=names, sanitize=sanitize
        )
        for reason in dict.fromkeys(graph.missing.values()):
            names_left_out = [name for name, why in graph.missing.items() if why == reason]
            print(f"left out: {', '.join(names_left_out)}: {reason}", flush=True)
        if graph.libraries:
            write_if_changed(build_dir / "build.ninja", ninja_file(graph.libraries, root))
            jobs = environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
            command = [toolchain.find_ninja(environ), "-C", str(build_dir), "-j", jobs]
            if subprocess.run(command, env=dict(environ), check=False).returncode != 0:
                raise ToolError("a native source did not compile; the compiler's message is above")
    return graph


def install(graph: BuildGraph, build_dir: Path, package: Path) -> None:
    """Put the built libraries and the report into the package's folder, and remove from it what an
    earlier build left there and this one has not made."""
    built = {library.filename for library in graph.libraries}
    for name in map(filename, LIBRARIES):
        if name in built:
            write_if_changed(package / name, (build_dir / name).read_bytes(), mode=0o755)
        else:
            (package / name).unlink(missing_ok=True)
    write_if_changed(package / REPORT, json.dumps(graph.report(), indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the native libraries, without installing.")
    parser.add_argument("--build-dir", type=Path, default=ROOT / "build" / "native")
    parser.add_argument("--only", nargs="+", choices=LIBRARIES)
    parser.add_argument("--sanitize", action="store_true", help="with ASan and UBSan")
    arguments = parser.parse_args()
    try:
        graph = build(
            Settings.from_environment(os.environ),
            arguments.build_dir,
            names=arguments.only or LIBRARIES,
            sanitize=arguments.sanitize,
        )
    except ToolError as error:
        sys.exit(f"error: {error}")
    sys.exit(1 if arguments.only and graph.missing else 0)


if __name__ == "__main__":
    main()
