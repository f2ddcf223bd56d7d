"""Finds what the native libraries are built with: compilers, ninja, and the headers of torch, CUDA
and CUTLASS. Whatever is not there raises `Missing`, with what to install.

Nothing is downloaded, and no GPU is looked for: a machine without one builds for others.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

BUILD_CUDA = "EFFT_KERNELS_BUILD_CUDA"
CUDA_ARCHS = "EFFT_KERNELS_CUDA_ARCHS"
DEFAULT_ARCHS = "8.0;9.0a"
MINIMUM_ARCH = (8, 0)
# Torch 2.11's headers and CUTLASS 4 need C++17; the sources use C++20.
CPP_STANDARD = "-std=c++20"

_ARCH = re.compile(r"(\d+)\.(\d)([af]?)")


class Missing(Exception):
    """Something a library needs is not on this machine; the message names it."""


class ToolError(Exception):
    """The build was asked for something that it cannot do."""


@dataclass(frozen=True)
class Settings:
    """What the environment asks for.

    Attributes:
        cuda: "auto" (built if everything is there), "0" (not built) or "1" (an error if not built).
        archs: compute capabilities, e.g. ("8.0", "9.0a"), ascending.
    """

    cuda: str = "auto"
    archs: tuple[str, ...] = tuple(DEFAULT_ARCHS.split(";"))

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> Settings:
        """Read EFFT_KERNELS_BUILD_CUDA and EFFT_KERNELS_CUDA_ARCHS.

        Raises:
            ToolError: a value that means nothing.
        """
        cuda = environ.get(BUILD_CUDA, "").strip().lower() or "auto"
        if cuda not in ("auto", "0", "1"):
            raise ToolError(f"{BUILD_CUDA} must be auto, 0 or 1, got {environ[BUILD_CUDA]!r}")
        return cls(cuda, parse_archs(environ.get(CUDA_ARCHS) or DEFAULT_ARCHS))


def parse_archs(text: str) -> tuple[str, ...]:
    """The capabilities in `text`, which ";", "," or spaces separate; ascending, each once.

    Raises:
        ToolError: not a capability, or one older than 8.0.
    """
    archs = {part for part in re.split(r"[;,\s]+", text) if part}
    if not archs:
        raise ToolError(f"{CUDA_ARCHS} names no architecture, e.g. {DEFAULT_ARCHS!r}: got {text!r}")
    for arch in archs:
        if _ARCH.fullmatch(arch) is None:
            raise ToolError(
                f"{CUDA_ARCHS} takes compute capabilities like 8.0 or 9.0a, separated by ';', ','"
                f" or spaces: got {arch!r} in {text!r}"
            )
        if capability(arch) < MINIMUM_ARCH:
            raise ToolError(f"{CUDA_ARCHS}: the kernels need 8.0 or newer, got {arch!r}")
    return tuple(sorted(archs, key=lambda arch: (*capability(arch), arch)))


def capability(arch: str) -> tuple[int, int]:
    """(major, minor) of e.g. "9.0a"."""
    major, minor, _ = _ARCH.fullmatch(arch).groups()  # type: ignore[union-attr]
    return int(major), int(minor)


def gencode_flags(archs: Sequence[str]) -> list[str]:
    """nvcc's flags: machine code for every arch, and PTX of the newest portable one, from which the
    driver compiles for GPUs that came later. ("a" and "f" archs have no such successors.)
    """
    numbers = [arch.replace(".", "") for arch in archs]
    flags = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in numbers]
    portable = [number for number in numbers if number.isdigit()]
    if portable:
        flags.append(f"-gencode=arch=compute_{portable[-1]},code=compute_{portable[-1]}")
    return flags


@dataclass(frozen=True)
class Torch:
    """The torch of the building interpreter.

    Attributes:
        cuda_version: None for a torch without CUDA.
    """

    root: Path
    version: str
    cuda_version: str | None

    @property
    def cuda_major(self) -> str | None:
        return self.cuda_version.split(".")[0] if self.cuda_version else None

    def wheel_folders(self, kind: str) -> list[Path]:
        """Where torch's CUDA wheels have the runtime's and cublas's files; kind: include or lib.
        CUDA 13's wheels share a folder, and those of CUDA 12 have one each.
        """
        packages = (f"cu{self.cuda_major}", "cuda_runtime", "cublas")
        folders = [self.root.parent / "nvidia" / package / kind for package in packages]
        return [folder for folder in folders if folder.is_dir()]


def find_torch() -> Torch:
    """The torch that this interpreter imports."""
    try:
        import torch
    except (ImportError, OSError) as error:
        raise Missing(f"torch cannot be imported where the build runs: {error}") from error
    return Torch(Path(torch.__file__).parent, str(torch.__version__), torch.version.cuda)


def run(command: Sequence[str | Path], **options: object) -> subprocess.CompletedProcess[str]:
    """The finished command, its outputs as one text; it is for the caller to judge."""
    return subprocess.run(
        [str(part) for part in command],
        text=True,
        errors="replace",
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
        **options,  # type: ignore[call-overload]
    )


def find_ninja(environ: Mapping[str, str]) -> str:
    """The ninja of the wheel, else of PATH."""
    spec = importlib.util.find_spec("ninja")
    if spec is not None:
        import ninja

        path = shutil.which("ninja", path=ninja.BIN_DIR)
        if path is not None:
            return path
    path = shutil.which("ninja", path=environ.get("PATH"))
    if path is None:
        raise Missing("ninja was not found: pip install ninja")
    return path


@dataclass(frozen=True)
class Compiler:
    """A C++ compiler.

    Attributes:
        command: what to run, with its own flags if CXX has some.
        version: the first line of its --version.
    """

    command: tuple[str, ...]
    version: str

    @property
    def program(self) -> str:
        """The compiler itself, for nvcc: without a launcher like ccache and without flags."""
        return [part for part in self.command if not part.startswith("-")][-1]


def find_cxx(environ: Mapping[str, str]) -> Compiler:
    """$CXX, else the first of c++, g++ and clang++ in PATH; it must know C++20.

    Raises:
        Missing: there is none that does.
        ToolError: the one that CXX names does not. It was asked for, so the build goes no further:
            pip hides what a build that succeeds has printed.
    """
    asked = environ.get("CXX", "").split()
    names = [asked] if asked else [["c++"], ["g++"], ["clang++"]]
    try:
        return _first_cxx(names, environ)
    except Missing as error:
        if not asked:
            raise
        raise ToolError(
            f"CXX={' '.join(asked)}: {error}. Name another, or unset CXX: c++, g++ and clang++ are"
            " then looked for in PATH"
        ) from error


def _first_cxx(names: Sequence[Sequence[str]], environ: Mapping[str, str]) -> Compiler:
    for name, *arguments in names:
        path = shutil.which(name, path=environ.get("PATH"))
        if path is not None:
            command = (path, *arguments)
            break
    else:
        raise Missing(
            f"no C++ compiler was found (looked for {', '.join(name for name, *_ in names)} in"
            " PATH): install g++ 10 or newer, e.g. apt install g++"
        )
    _probe([*command, CPP_STANDARD], "probe.cpp", "#include <concepts>\nint main() {}\n", environ)
    return Compiler(command, run([*command, "--version"], env=environ).stdout.split("\n")[0])


def _probe(command: Sequence[str], name: str, text: str, environ: Mapping[str, str]) -> None:
    """Raise Missing unless the compiler makes an object of `text`."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, name)
        source.write_text(text)
        answer = run([*command, "-c", source, "-o", Path(folder, "probe.o")], env=environ)
    if answer.returncode != 0:
        raise Missing(
            f"{command[0]} cannot compile a trivial program: "
            + " | ".join(answer.stdout.strip().splitlines()[:4])
        )


@dataclass(frozen=True)
class Nvcc:
    """A CUDA compiler.

    Attributes:
        includes, libraries: the folders of its toolkit.
    """

    path: str
    version: str
    includes: tuple[Path, ...]
    libraries: tuple[Path, ...]


def find_nvcc(
    environ: Mapping[str, str], torch: Torch, cxx: Compiler, archs: Sequence[str]
) -> Nvcc:
    """The nvcc of CUDA_HOME; without one the first in PATH, the nvidia-cuda-nvcc wheel and
    /usr/local/cuda that has the major version of torch's CUDA. It must compile for `archs`.
    """
    if torch.cuda_version is None:
        raise Missing(f"torch {torch.version} is built without CUDA")
    home = environ.get("CUDA_HOME") or environ.get("CUDA_PATH")
    if home:
        candidates = [Path(home, "bin", "nvcc")]
        if not candidates[0].exists():
            raise Missing(f"CUDA_HOME={home} has no bin/nvcc")
    else:
        in_path = shutil.which("nvcc", path=environ.get("PATH"))
        candidates = [Path(in_path)] if in_path else []
        candidates += [*_in_distribution("nvidia-cuda-nvcc", "bin/nvcc")]
        candidates += [Path("/usr/local/cuda/bin/nvcc")]
    found = {}
    for path in filter(Path.exists, candidates):
        found[path] = _nvcc_version(path, environ)
        if found[path].split(".")[0] == torch.cuda_major:
            break
    else:
        seen = "; ".join(f"{path} is {version}" for path, version in found.items())
        raise Missing(
            f"no nvcc of torch's CUDA {torch.cuda_major} was found in CUDA_HOME, PATH,"
            f" the nvidia-cuda-nvcc wheel or /usr/local/cuda{f' ({seen})' if seen else ''}:"
            f' pip install "cuda-toolkit[cccl,crt,nvcc,nvvm]=={torch.cuda_version}.*"'
        )
    flags = [f"-ccbin={cxx.program}", CPP_STANDARD, *gencode_flags(archs)]
    _probe([str(path), *flags], "probe.cu", "__global__ void probe() {}\n", environ)
    return Nvcc(str(path), found[path], *_nvcc_folders(path, environ))


def _nvcc_version(path: Path, environ: Mapping[str, str]) -> str:
    answer = run([path, "--version"], env=environ)
    match = re.search(r"\bV(\d+\.\d+\.\d+)", answer.stdout)
    return match.group(1) if match else "unknown"


def _nvcc_folders(
    path: Path, environ: Mapping[str, str]
) -> tuple[tuple[Path, ...], tuple[Path, ...]]:
    """Where nvcc itself looks for headers and libraries. Asked of it, since an nvcc in PATH is
    often a link or a wrapper, from which its toolkit cannot be told.
    """
    answer = run([path, "--dryrun", "-x", "cu", "-c", os.devnull], env=environ).stdout
    variables = dict(re.findall(r"^#\$ (\w+)=(.*)$", answer, flags=re.MULTILINE))
    named = variables.get("INCLUDES", "") + variables.get("SYSTEM_INCLUDES", "")
    includes = [Path(os.path.normpath(name)) for name in re.findall(r'"(?:-I)?(/[^"]+)"', named)]
    top = Path(os.path.normpath(variables.get("TOP") or path.resolve().parents[1]))
    includes.append(top / "include")
    libraries = [include.parent / "lib" for include in includes] + [top / "lib64", top / "lib"]
    return _existing(includes), _existing(libraries)


def _existing(folders: Iterable[Path]) -> tuple[Path, ...]:
    return tuple(dict.fromkeys(folder for folder in folders if folder.is_dir()))


def _in_distribution(name: str, ending: str) -> list[Path]:
    """The installed files of a distribution whose path ends so."""
    try:
        files = metadata.files(name) or []
    except metadata.PackageNotFoundError:
        return []
    return [Path(str(file.locate())) for file in files if file.as_posix().endswith("/" + ending)]


@dataclass(frozen=True)
class Headers:
    """A folder of headers and the version that they say they have."""

    include: Path
    version: str


def find_cutlass() -> Headers:
    """CUTLASS's and CuTe's headers in the nvidia-cutlass wheel."""
    for header in _in_distribution("nvidia-cutlass", "include/cutlass/version.h"):
        numbers = dict(
            re.findall(r"#define CUTLASS_(MAJOR|MINOR|PATCH)\s+(\d+)", header.read_text())
        )
        version = ".".join(numbers[part] for part in ("MAJOR", "MINOR", "PATCH"))
        return Headers(header.parents[1], version)
    raise Missing("the CUTLASS headers were not found: pip install nvidia-cutlass")


def find_python_include() -> Path:
    """The folder of Python.h."""
    include = Path(sysconfig.get_paths()["include"])
    if not (include / "Python.h").exists():
        raise Missing(f"{include}/Python.h was not found: e.g. apt install python3-dev")
    return include


def find_pybind11() -> Path:
    """pybind11's headers."""
    try:
        import pybind11
    except ImportError as error:
        raise Missing("pybind11 was not found: pip install pybind11") from error
    return Path(pybind11.get_include())
