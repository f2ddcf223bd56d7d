"""What the CUDA compiler made of the kernels, read from the built library: no GPU needed.

Registers, stack and shared memory of every kernel, and the instructions that belong there: wgmma
(HGMMA) fed by TMA (UTMALDG) with registers moved between warpgroups (USETMAXREG) on sm_90a, mma
(HMMA) fed by asynchronous copies (LDGSTS) elsewhere. Skipped only where the library could not be
built; one that was built and fails is a failure.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from efft_kernels.ops.backends import native_library

NOT_BUILT = native_library.not_built("_native_cuda")
pytestmark = [
    pytest.mark.skipif(NOT_BUILT is not None, reason=str(NOT_BUILT)),
    pytest.mark.xdist_group("cuda_objects"),  # one process reads the library's machine code
]

# Shared memory that a block may have, in bytes.
SMEM_LIMIT = {"sm_80": 163 * 1024, "sm_90a": 227 * 1024}
SMALLEST_SMEM_LIMIT = 99 * 1024  # sm_86, sm_89, sm_120
REGISTERS_PER_MULTIPROCESSOR = 64 * 1024


@dataclass(frozen=True)
class Kernel:
    """One function of one architecture's machine code. local: bytes per thread that spilled."""

    arch: str
    name: str
    registers: int
    stack: int
    shared: int
    local: int

    def __str__(self) -> str:
        return f"{self.name} ({self.arch})"


def cuobjdump(*arguments: str) -> str:
    """Its output for the built library. It comes with Triton, and with the CUDA toolkit."""
    triton = pytest.importorskip("triton")
    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    tool = str(bundled) if bundled.exists() else shutil.which("cuobjdump")
    if tool is None:
        pytest.skip("cuobjdump comes with triton and with the CUDA toolkit; neither is installed")
    library = str(native_library.library_path("_native_cuda"))
    run = subprocess.run([tool, *arguments, library], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout


@cache
def kernels() -> tuple[Kernel, ...]:
    found, arch, name = [], "", ""
    for line in cuobjdump("--dump-resource-usage").splitlines():
        if match := re.match(r"arch = (\w+)", line):
            arch = match[1]
        elif match := re.match(r"\s*Function (\S+):", line):
            name = match[1]
        elif match := re.match(r"\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line):
            found.append(Kernel(arch, name, *map(int, match.groups())))
    return tuple(found)


@cache
def instructions() -> dict[tuple[str, str], str]:
    """The machine code of every kernel: {(arch, name): text}."""
    code: dict[tuple[str, str], list[str]] = {}
    arch, lines = "", []
    for line in cuobjdump("-sass").splitlines():
        if match := re.match(r"arch = (\w+)", line):
            arch = match[1]
        elif match := re.match(r"\s*Function : (\S+)", line):
            lines = code.setdefault((arch, match[1]), [])
        elif re.match(r"\s*/\*[0-9a-f]{4,}\*/", line):
            lines.append(line.split("*/", 1)[1].split(";")[0].strip())
    return {key: "\n".join(lines) for key, lines in code.items()}


def has(text: str, mnemonic: str) -> bool:
    return re.search(rf"(^|\s){mnemonic}\b", text, flags=re.MULTILINE) is not None


def selected(*parts: str, arch: str | None = None) -> list[tuple[tuple[str, str], str]]:
    """The kernels whose name holds one of the parts."""
    return [
        (key, text)
        for key, text in instructions().items()
        if any(part in key[1] for part in parts) and arch in (None, key[0])
    ]


def archs() -> set[str]:
    return {kernel.arch for kernel in kernels()}


def test_the_library_has_every_kernel_for_every_architecture():
    passes = ("thin_kernel", "thin_grad", "tall_grad", "reduce")
    general = ("gemm_sm80", *passes, "fold", "merge", "unfold")
    for arch in archs():
        names = " ".join(kernel.name for kernel in kernels() if kernel.arch == arch)
        missing = [name for name in general if name not in names]
        assert not missing, f"{arch}: {missing}"
    assert not [k for k in kernels() if "gemm_sm90" in k.name and k.arch != "sm_90a"]
    if "sm_90a" in archs():
        # Two dtypes, two layouts of w, two widths, P read or computed.
        assert len([k for k in kernels() if "gemm_sm90" in k.name]) == 16


def test_no_spills_and_no_stack():
    assert kernels()
    spilling = [f"{k}: stack {k.stack}, local {k.local}" for k in kernels() if k.stack or k.local]
    assert not spilling, "\n".join(spilling)


def test_no_local_memory_instructions():
    assert {(kernel.arch, kernel.name) for kernel in kernels()} == set(instructions())
    touching = [
        f"{name} ({arch})"
        for (arch, name), text in instructions().items()
        if has(text, r"(LDL|STL)(\.\w+)*")
    ]
    assert not touching, "\n".join(touching)


def test_registers_fit_the_blocks():
    """The launch bounds: 384 threads of the sm_90a GEMM in one block, 256 of the general one."""
    for kernel in kernels():
        threads = 384 if "gemm_sm90" in kernel.name else 256
        allocated = -(-kernel.registers // 8) * 8
        assert allocated * threads <= REGISTERS_PER_MULTIPROCESSOR, kernel


def test_static_shared_memory_fits():
    """What kernels ask for at launch is checked where it is defined (config_sm80.h, config_sm90.h)
    and in tests/csrc.
    """
    for kernel in kernels():
        assert kernel.shared <= SMEM_LIMIT.get(kernel.arch, SMALLEST_SMEM_LIMIT), kernel


def test_the_hopper_gemm_uses_the_instructions_it_was_written_for():
    if "sm_90a" not in archs():
        pytest.skip("built without sm_90a")
    found = selected("gemm_sm90", arch="sm_90a")
    assert found
    for key, text in found:
        for mnemonic in ("HGMMA", "UTMALDG", "USETMAXREG", "STSM"):
            assert has(text, rf"{mnemonic}(\.\w+)*"), f"{mnemonic} is missing in {key}"
        assert not has(text, r"HMMA(\.\w+)*"), key


def test_a_computed_p_has_the_instructions_meant_for_it():
    """In the forward 128 + 16 and 192 + 16 columns in one wgmma, not a second one that reads `a`
    again; in dX one of 16, since one that ends inside 64 columns is slow there.
    """
    if "sm_90a" not in archs():
        pytest.skip("built without sm_90a")
    for key, text in selected("gemm_sm90", arch="sm_90a"):
        match = re.search(r"Sm90ConfigILi(\d+)ELi(\d+)EL\w*?WLayoutE(\d)", key[1])
        assert match is not None, key
        block, p_cols, rows_of_c = map(int, match.groups())
        shapes = {int(width) for width in re.findall(r"HGMMA\.64x(\d+)x16", text)}
        own = {p_cols if rows_of_c else block + p_cols} if p_cols else set()
        assert shapes == {block} | own, (key, shapes)


def test_wgmma_is_not_serialised():
    """The main loop issues four wgmma and waits for the group before: where the compiler orders
    them, each is followed by a wait for all.
    """
    if "sm_90a" not in archs():
        pytest.skip("built without sm_90a")
    for key, text in selected("gemm_sm90", arch="sm_90a"):
        groups = re.findall(r"HGMMA\S* [^\n]*gsb0", text)
        assert groups and len(groups) < len(re.findall(r"HGMMA", text)) / 2, key
        assert re.search(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x1", text), key


def test_the_other_kernels_use_tensor_cores_and_asynchronous_copies():
    found = selected("gemm_sm80", "thin_kernel", "thin_grad_kernel", "tall_grad_kernel")
    assert found
    for key, text in found:
        assert has(text, r"HMMA\.16816\.F32(\.\w+)*"), f"no mma in {key}"
        assert has(text, r"LDGSTS(\.\w+)*"), f"no asynchronous copy in {key}"
        assert has(text, r"LDSM(\.\w+)*"), f"no ldmatrix in {key}"
