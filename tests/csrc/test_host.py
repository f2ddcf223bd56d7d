"""The CUDA backend's C++ without a GPU: compiled by a plain compiler and run on the CPU.

tests/csrc/test_*.cpp walk the tile schedules, tensor maps, workspaces, argument checks and the
index maps of shared memory and tensor cores; csrc/cuda keeps all of those in headers without CUDA.

tests/csrc/model is a model of a multiprocessor: a block's threads are fibers, and its files take
the place of those of csrc/cuda, path by path, that hold instructions or ask the driver. On it the
kernels run as they are written, one by one (test_*.cpp) and as the operators call them
(operators.py). Slow, as each instruction is a function: small problems only.
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
INCLUDES = (f"-I{ROOT}", f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc' / 'cuda'}")
# As where the build has every architecture.
STANDARD = ("-std=c++20", "-DEFFT_KERNELS_SM90")
WARNINGS = ("-Wall", "-Wextra", "-Werror")
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
    flags = [*STANDARD, *INCLUDES, *WARNINGS, *sanitizers, "-O1", "-g"]
    run(COMPILER, *flags, source, "-o", program)
    run(program)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """csrc/cuda with the model's instructions, device and registration in place of its own."""
    folder = tmp_path_factory.mktemp("model") / "cuda"
    shutil.copytree(ROOT / "csrc" / "cuda", folder)
    for path in [MODEL / "register.cpp", *MODEL.glob("common/*"), *MODEL.glob("gemm/*")]:
        replaced = folder / path.relative_to(MODEL)
        assert replaced.exists(), f"{path.name} replaces nothing"
        shutil.copy(path, replaced)
    return folder


def model_flags(sources: Path) -> list[str]:
    includes = [f"-I{sources}", f"-I{MODEL}", f"-I{ROOT / 'csrc'}", f"-isystem{CUDA}"]
    # Device code reads two halves as one register through a reference: no strict aliasing.
    # Fibers jump to other stacks, which glibc's checks take for a mistake.
    return [*STANDARD, *includes, "-O1", "-U_FORTIFY_SOURCE", "-fno-strict-aliasing", "-Wno-psabi"]


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
    schemas = shutil.copy(ROOT / "csrc" / "schemas.cpp", sources)
    objects = []
    for source in sorted({Path(schemas), *sources.rglob("*.cu"), *sources.rglob("*.cpp")}):
        kernels = ["-include", "prelude.h"] if source.suffix == ".cu" else []
        torch_flags = ["-DTORCH_TARGET_VERSION=0x020b000000000000", f"-isystem{TORCH / 'include'}"]
        objects.append(source.with_suffix(".o"))
        flags = [*model_flags(sources), *kernels, *torch_flags, "-fPIC"]
        run(COMPILER, *flags, "-c", "-x", "c++", source, "-o", objects[-1])
    built = sources / "model.so"
    run(COMPILER, "-shared", *objects, "-o", built, f"-L{TORCH / 'lib'}", "-lc10", "-ltorch_cpu")
    return built


@needs_cuda_headers
@pytest.mark.slow
@pytest.mark.parametrize("hopper", [False, True], ids=["sm_80", "sm_90a"])
def test_operators_on_the_model(library: Path, hopper: bool) -> None:
    environment = {"EFFT_MODEL_SM90": "1"} if hopper else {}
    run(sys.executable, MODEL / "operators.py", library, PYTHONPATH=str(ROOT), **environment)
