"""The CUDA backend's C++ without a GPU: compiled by a plain compiler and run on the CPU.

tests/csrc/test_*.cpp walk the tile schedules, tensor maps, workspaces, argument checks and the
index maps of shared memory and tensor cores; csrc/cuda keeps all of those in headers without CUDA.

tests/csrc/model is a model of a multiprocessor: a block's threads are fibers, and its *.cuh take
the place of the headers of csrc/cuda that hold instructions. On it the kernels run as they are
written, one by one (test_*.cpp) and as the operators call them (operators.py). Slow, as each
instruction is a function: small problems only.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests" / "csrc"
MODEL = TESTS / "model"
COMPILER = next(filter(None, map(shutil.which, ("g++", "clang++", "c++"))), None)
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
TORCH = Path(torch.__file__).parent
# CUDA's headers come with torch's wheel; their types are all that the model needs of CUDA.
CUDA = next((p.parent for p in TORCH.parent.glob("nvidia/*/include/cuda_bf16.h")), None)

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler is installed")
needs_cuda_headers = pytest.mark.skipif(CUDA is None, reason="no CUDA headers beside torch")


def run(*command: object, **environment: str) -> None:
    done = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]


@pytest.fixture(scope="module")
def sanitizers(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """The sanitizers' flags, where their runtime is installed."""
    assert COMPILER is not None
    folder = tmp_path_factory.mktemp("probe")
    (folder / "probe.cpp").write_text("int main() {}\n")
    command = [COMPILER, *SANITIZERS, str(folder / "probe.cpp"), "-o", str(folder / "probe")]
    built = subprocess.run(command, capture_output=True).returncode == 0
    return SANITIZERS if built and subprocess.run([folder / "probe"]).returncode == 0 else ()


@pytest.mark.parametrize("source", sorted(TESTS.glob("test_*.cpp")), ids=lambda path: path.stem)
def test_host_logic(source: Path, sanitizers: tuple[str, ...], tmp_path: Path) -> None:
    program = tmp_path / source.stem
    flags = [
        "-std=c++20",
        "-O1",
        "-g",
        "-Wall",
        "-Wextra",
        "-Werror",
        f"-I{ROOT}",
        f"-I{ROOT / 'csrc' / 'cuda'}",
    ]
    run(COMPILER, *flags, *sanitizers, source, "-o", program)
    run(program)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """csrc/cuda with the model's instructions, device and registration in place of its own."""
    folder = tmp_path_factory.mktemp("model") / "cuda"
    shutil.copytree(ROOT / "csrc" / "cuda", folder)
    for path in [MODEL / "register.cpp", *MODEL.glob("common/*")]:
        replaced = folder / path.relative_to(MODEL)
        assert replaced.exists(), f"{path.name} replaces nothing"
        shutil.copy(path, replaced)
    return folder


def model_flags(sources: Path) -> list[str]:
    # -fno-strict-aliasing: device code reads two halves as one register through a reference.
    return [
        "-std=c++20", "-O2", "-fno-strict-aliasing", "-Wno-psabi",
        f"-I{sources}", f"-I{MODEL}", f"-isystem{CUDA}",
    ]  # fmt: skip


@needs_cuda_headers
@pytest.mark.slow
@pytest.mark.parametrize("source", sorted(MODEL.glob("test_*.cpp")), ids=lambda path: path.stem)
def test_kernels_on_the_model(source: Path, sources: Path, tmp_path: Path) -> None:
    program = tmp_path / source.stem
    run(COMPILER, *model_flags(sources), "-include", "prelude.h", source, "-o", program)
    run(program)


@pytest.fixture(scope="module")
def library(sources: Path) -> Path:
    """The operators and kernels for CPU tensors, as a library for torch."""
    objects = []
    for source in sorted([*sources.rglob("*.cu"), *sources.rglob("*.cpp")]):
        kernels = ["-include", "prelude.h"] if source.suffix == ".cu" else []
        objects.append(source.with_suffix(".o"))
        run(
            COMPILER, *model_flags(sources), *kernels, "-fPIC", "-DEFFT_KERNELS_SM90",
            "-DTORCH_TARGET_VERSION=0x020b000000000000", f"-isystem{TORCH / 'include'}",
            "-c", "-x", "c++", source, "-o", objects[-1],
        )  # fmt: skip
    built = sources / "model.so"
    run(COMPILER, "-shared", *objects, "-o", built, f"-L{TORCH / 'lib'}", "-lc10", "-ltorch_cpu")
    return built


@needs_cuda_headers
@pytest.mark.slow
@pytest.mark.parametrize("hopper", [False, True], ids=["sm_80", "sm_90a"])
def test_operators_on_the_model(library: Path, hopper: bool) -> None:
    environment = {"EFFT_MODEL_SM90": "1"} if hopper else {}
    run(sys.executable, MODEL / "operators.py", library, PYTHONPATH=str(ROOT), **environment)
