"""Compile all that the Triton backend launches, without a GPU, and check the machine code.

    python -m tools.compile_triton [--arch 80 90 100] [--only gemm] [--sample 60] [--csv FILE]

tools/compilations.py says what is compiled. A row passes with no stack and no spills, shared and
tensor memory within the architecture's limit, and the tensor-core instruction that belongs there
(HMMA, HGMMA, UTCHMMA); TMA loads, overlapping wgmma and fused loops are looked for where they
should be. The exit code is 1 where a row fails.
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import triton

from efft_kernels.ops.backends.triton import device
from efft_kernels.testing.fake_gpu import fake_gpu

from .compilations import ARCHS, Row, rows, sample

COLUMNS = (
    "kernel", "label", "arch", "dtype", "rank",
    "registers", "stack_bytes", "smem_bytes", "instruction", "problems",
)  # fmt: skip


@dataclass
class Report:
    """What came out: registers per thread; bytes of stack and shared memory; problems in words."""

    row: Row
    registers: int = 0
    stack_bytes: int = 0
    smem_bytes: int = 0
    instructions: str = ""
    problems: list[str] = field(default_factory=list)

    @property
    def cells(self) -> tuple[Any, ...]:
        """In the order of COLUMNS."""
        row = self.row
        return (
            row.kernel, row.label, row.arch, row.dtype, row.rank, self.registers, self.stack_bytes,
            self.smem_bytes, self.instructions, "; ".join(self.problems),
        )  # fmt: skip


def compile_row(row: Row) -> Report:
    """Compile and inspect one row."""
    kernel = getattr(import_module(row.module), row.function)
    with fake_gpu(row.arch) as gpu:
        compiled = kernel.preload(row.specialisation)
        kernel.device_caches.pop(gpu.get_current_device())
    return inspect(row, compiled)


def inspect(row: Row, compiled: triton.compiler.CompiledKernel) -> Report:
    """Hold a compiled kernel to what its row asks for."""
    report = Report(row, smem_bytes=compiled.metadata.shared)
    problems = report.problems
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = _cuobjdump("--dump-resource-usage", cubin.name)
        sass = _cuobjdump("--dump-sass", cubin.name)
    used = re.search(r"REG:(\d+)\s+STACK:(\d+)", usage)
    if used is None:
        problems.append("cuobjdump named no resource usage")
        return report
    report.registers, report.stack_bytes = int(used[1]), int(used[2])
    mnemonics = set(re.findall(r"\b(UTC[A-Z]*MMA|HGMMA|HMMA|FFMA|UTMALDG)\b", sass))
    report.instructions = "+".join(sorted(mnemonics))
    if report.stack_bytes:
        problems.append(f"{report.stack_bytes} bytes of stack")
    if re.search(r"\b(LDL|STL)\b", sass):
        problems.append("register spills (LDL/STL)")
    # sm_86, sm_89 and sm_120 run sm_80's shapes too, with less shared memory.
    limit = min(v for arch, v in device.SMEM_BYTES.items() if device.family(arch) == row.arch)
    if report.smem_bytes > limit:
        problems.append(f"{report.smem_bytes} bytes of shared memory, limit {limit}")
    tensor_memory = getattr(compiled.metadata, "tmem_size", None) or 0
    if tensor_memory > device.TMEM_COLUMNS:
        problems.append(f"{tensor_memory} columns of tensor memory, limit {device.TMEM_COLUMNS}")
    if row.instruction and not any(re.fullmatch(row.instruction, name) for name in mnemonics):
        problems.append(f"no {row.instruction} in the machine code")
    if row.tma and "UTMALDG" not in mnemonics:
        problems.append("no UTMALDG (TMA load) in the machine code")
    if row.overlaps:
        waits = re.findall(r"warp_group_dot_wait[^\n]*pendings = (\d+)", compiled.asm["ttgir"])
        if not any(map(int, waits)):
            problems.append("every wgmma waits for the one before it")
    if row.one_loop and _has_nested_loops(compiled.asm["ttgir"]):
        problems.append("the loop over tiles is not one with the loop inside")
    return report


def _has_nested_loops(ttgir: str) -> bool:
    """Whether a loop stands within a loop, by the compiler's own indentation."""
    open_loops: list[int] = []
    for line in ttgir.splitlines():
        indent = len(line) - len(line.lstrip())
        while open_loops and line.strip() and indent <= open_loops[-1]:
            open_loops.pop()
        if "scf.for" in line:
            if open_loops:
                return True
            open_loops.append(indent)
    return False


def _cuobjdump(option: str, path: str) -> str:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return subprocess.run([tool, option, path], check=True, capture_output=True, text=True).stdout


def _compile_or_report(row: Row) -> Report:
    try:
        return compile_row(row)
    except Exception as error:  # one row that does not compile must not hide the others' results
        return Report(row, problems=[f"{type(error).__name__}: {str(error).strip()[:300]}"])


def compile_all(selected: list[Row], jobs: int) -> Iterator[Report]:
    """Reports in order, from `jobs` processes."""
    if jobs <= 1:
        yield from map(_compile_or_report, selected)
        return
    with ProcessPoolExecutor(jobs) as pool:
        yield from pool.map(_compile_or_report, selected, chunksize=4)


def main() -> int:
    """Print the table; 1 if any row fails."""
    from rich.console import Console
    from rich.table import Table

    if device.INTERPRETED:
        sys.exit("TRITON_INTERPRET is set: there is nothing to compile")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", type=int, nargs="+", default=list(ARCHS), choices=ARCHS)
    parser.add_argument(
        "--only",
        default="",
        help="a regular expression on 'sm_90 gemm fused forward even 128x256x64 bf16 r16'",
    )
    parser.add_argument("--sample", type=int, help="only so many rows, spread over all")
    parser.add_argument("--jobs", type=int, default=min(4, os.cpu_count() or 1))
    parser.add_argument("--csv", type=Path, help="write the rows here as well")
    arguments = parser.parse_args()
    selected = [row for row in rows(tuple(arguments.arch)) if re.search(arguments.only, str(row))]
    if arguments.sample is not None:
        selected = sample(selected, arguments.sample)
    table = Table(*COLUMNS)
    reports = []
    for report in compile_all(selected, arguments.jobs):
        reports.append(report)
        table.add_row(*map(str, report.cells))
        if report.problems:
            print(f"{report.row}: {'; '.join(report.problems)}", file=sys.stderr, flush=True)
    if arguments.csv:
        with arguments.csv.open("w", newline="") as file:
            csv.writer(file).writerows([COLUMNS, *(report.cells for report in reports)])
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    failures = sum(bool(report.problems) for report in reports)
    print(f"{len(selected) - failures} of {len(selected)} compiled configurations pass")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
