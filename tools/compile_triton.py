"""Compile every shipped configuration ahead of time, without a GPU, and check the machine code.

    python -m tools.compile_triton [--arch 80 90 100] [--only gemm] [--jobs 2]

For sm_80, sm_90 and sm_100 and for every row of tuned/defaults.json: no register spills, no stack,
shared memory within the architecture's limit, and the tensor-core instruction that belongs there
(HMMA, HGMMA, UTCHMMA). Exits with 1 and the failing rows named otherwise.

Compiled is what a launch is specialised on (`source`), in these variants: factors of the rows'
dtype and float32; core and down as they are and, beside rows of 16 bits, transposed, as FacT-TT and
LoRA give them; sizes that blocks divide, that they do not, and odd ones; ranks that fill their
padding and that do not.
Left out, hence not known to be free of spills: transposed factors of float32 rows, and by the copy
engine; one odd size beside an aligned one; two different ranks; fp16's GEMM but at rank 16 and
sizes that blocks divide. Left out as less of the same code: no bias, P not saved, a sum of one
gradient alone, a 16-bit weight in `merge`.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from efft_kernels.ops.backends.triton import configs, device, tuning
from efft_kernels.ops.backends.triton.factors import _fold_kernel, _merge_kernel
from efft_kernels.ops.backends.triton.gemm import _low_rank_gemm_kernel
from efft_kernels.ops.backends.triton.limits import TRITON_IN_PLACE_RANK
from efft_kernels.ops.backends.triton.thin import _reduce_kernel, _tall_grad_kernel, _thin_kernel

ARCHS = (80, 90, 100)
RANKS = (16, 32, 64, 128)
KERNELS = {
    "gemm": _low_rank_gemm_kernel,
    "thin": _thin_kernel,
    "tall_grad": _tall_grad_kernel,
    "reduce": _reduce_kernel,
    "fold": _fold_kernel,
    "merge": _merge_kernel,
}
# The matrix instruction of each architecture; mma.sync is the right one for what wgmma cannot take.
TENSOR_CORE = {80: "HMMA", 90: "HGMMA", 100: "UTC.*MMA"}
# Integers that are multiples of 16 only where the ranks are.
_OF_A_RANK = re.compile(r"width|width_out|width_c|ra|rb|C_b|stride_(oc|un|ca|cb|cp|ct|dk)")
_POINTER = {"bf16": "*bf16", "fp16": "*fp16", "fp32": "*fp32"}
_TORCH = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Case:
    """One compilation: a kernel's argument types, its constants, and the instruction expected in
    its code.
    """

    kernel: str
    label: str
    dtype: str
    arch: int
    rank: int
    signature: dict[str, str]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int
    instruction: str | None
    aligned: bool = True
    ranks_fill_the_padding: bool = True

    @property
    def overlaps(self) -> bool:
        """Whether the loop's wgmma must overlap: operands reach it without passing registers."""
        through_registers = self.dtype == "fp32" or "wide" in self.label or not self.aligned
        return self.kernel == "gemm" and self.arch == 90 and not through_registers

    def __str__(self) -> str:
        return f"sm_{self.arch} {self.kernel} {self.label} {self.dtype} r{self.rank}"


@dataclass
class Report:
    """What came out: registers per thread; bytes of stack, spills and shared memory; problems in
    words.
    """

    case: Case
    registers: int = 0
    stack_bytes: int = 0
    smem_bytes: int = 0
    instructions: str = ""
    problems: list[str] = field(default_factory=list)


def _case(
    kernel: str,
    label: str,
    arch: int,
    dtype: str,
    rank: int,
    pointers: dict[str, str | None],
    constants: dict[str, Any],
    num_warps: int,
    num_stages: int,
    instruction: str | None,
    unit: tuple[str, ...] = (),
    aligned: bool = True,
) -> Case:
    """Types and constants of every argument: pointers as given (None: absent), `unit` strides 1,
    other integers i32.
    """
    signature: dict[str, str] = {}
    values = dict(constants)
    for name in KERNELS[kernel].arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name in pointers:
            pointer = pointers[name]
            signature[name] = "constexpr" if pointer is None else pointer
            if pointer is None:
                values[name] = None
        elif name in unit:
            signature[name] = "constexpr"
            values[name] = 1
        else:
            signature[name] = "i32"
    return Case(
        kernel,
        label,
        dtype,
        arch,
        rank,
        signature,
        values,
        num_warps,
        num_stages,
        instruction,
        aligned,
    )


def _kinds(dtype: str) -> tuple[tuple[str, str], ...]:
    """(dtype class, tl.dot precision) pairs of a dtype."""
    return (("half", "ieee"),) if dtype != "fp32" else (("tf32", "tf32"), ("ieee", "ieee"))


def _descriptor(dtype: str, config: configs.GemmConfig, rows: int, columns: int) -> str | None:
    return f"tensordesc<{dtype}[{rows}, {columns}]>" if config.tma else None


class _Form(NamedTuple):
    """What a launch of the GEMM is of: the forward or dX, and what its last product reads."""

    direction: str = "fwd"  # or "dx"
    core: bool = False
    cross: bool = False  # a tile's columns may lie in several slices
    float32: bool = False  # core and thin_out are float32 beside half-precision rows
    transposed: bool = False  # the forward's core, or dX's thin_out (down), has its first stride 1


_FORMS = (
    _Form(),
    _Form(core=True),
    _Form(core=True, cross=True),
    _Form(float32=True),
    _Form(core=True, float32=True),
    _Form(core=True, cross=True, float32=True),
    _Form(core=True, transposed=True),
    _Form(core=True, float32=True, transposed=True),
    _Form(core=True, cross=True, transposed=True),
    _Form(core=True, cross=True, float32=True, transposed=True),
    _Form("dx"),
    _Form("dx", float32=True),
    _Form("dx", transposed=True),
    _Form("dx", float32=True, transposed=True),
)


def _gemm_cases(arch: int, dtype: str, rank: int, aligned: bool = True) -> Iterator[Case]:
    for kind, precision in _kinds(dtype):
        for wide in (False, True) if kind == "half" else (False,):
            suffix = "-wide" if wide and aligned else "" if aligned else "-unaligned"
            shipped = configs.gemm_candidates(arch, f"{kind}{suffix}", rank)
            by_copy_engine = arch >= 90 and kind == "half" and aligned and not wide
            rides = (True, False) if kind != "ieee" or rank <= tuning.IEEE_RIDE_LIMIT else (False,)
            for ride in rides:
                tried = shipped
                if by_copy_engine:
                    tried += tuple(config._replace(tma=True) for config in shipped)
                    tried += configs.persistent_candidates(arch, kind, rank, ride)
                for config in tried:
                    for form in _FORMS:
                        if (form.float32 or form.transposed) and kind != "half":
                            continue
                        in_place_only = form.core or form.float32 or form.transposed
                        if rank > TRITON_IN_PLACE_RANK and in_place_only:
                            continue
                        if form.transposed and config.tma:  # never taken unmeasured
                            continue
                        wide_tile = config.block_c > tuning.MOST_CROSSED
                        if form.cross and (wide_tile or config.persistent):
                            continue
                        yield _gemm_case(
                            arch, dtype, rank, aligned, precision, wide, ride, config, form
                        )


def _gemm_case(
    arch: int,
    dtype: str,
    rank: int,
    aligned: bool,
    precision: str,
    wide: bool,
    ride: bool,
    config: configs.GemmConfig,
    form: _Form,
) -> Case:
    pointer = _POINTER[dtype]
    factors = "*fp32" if form.float32 else pointer
    ieee = dtype == "fp32" and precision == "ieee"
    forward = form.direction == "fwd"
    w_block = (config.block_c, config.block_i)
    words = (
        form.direction,
        "ride" if ride else "given",
        f"{config.block_m}x{config.block_c}x{config.block_i}",
        *(name for name in ("tma", "persistent") if getattr(config, name)),
        *(name for name in ("core", "cross", "float32", "transposed") if getattr(form, name)),
        *(name for name, true in (("wide", wide), ("ieee", ieee)) if true),
    )
    return _case(
        "gemm",
        " ".join(words),
        arch,
        dtype,
        rank,
        {
            "a_ptr": pointer,
            "w_ptr": "*fp32" if wide else pointer,
            "a_desc": _descriptor(dtype, config, config.block_m, config.block_i),
            "w_desc": _descriptor(dtype, config, *(w_block if forward else w_block[::-1])),
            "d_desc": _descriptor(dtype, config, config.block_i, rank) if ride else None,
            "bias_ptr": pointer if forward else None,
            "thin_in_ptr": pointer if ride else None,
            "core_ptr": factors if form.core else None,
            "thin_out_ptr": factors,
            "p_ptr": pointer,
            "out_ptr": pointer,
        },
        {
            "BLOCK_M": config.block_m,
            "BLOCK_C": config.block_c,
            "BLOCK_I": config.block_i,
            "RANK": rank,
            "RANK_OUT": rank,
            "BLOCK_R": tuning.rank_block(_TORCH[dtype], precision, rank, form.core),
            "CROSS": form.cross,
            "GROUP_M": config.group_m,
            "EVEN_I": True,
            "EVEN_C": True,
            "RIDE": ride,
            "STORE_P": ride,
            "PRECISION": precision,
            "TMA": config.tma,
            "W_ROWS_ALONG_I": forward,
            "PERSISTENT": config.persistent,
            "FLATTEN": config.persistent,
        },
        config.num_warps,
        config.num_stages,
        None if ieee else TENSOR_CORE[arch],
        unit=(
            "stride_wi" if forward else "stride_wc",
            "stride_oc" if form.transposed and not forward else "stride_or",
            *(("stride_cp" if form.transposed else "stride_ct",) if form.core else ()),
        ),
        aligned=aligned,
    )


def _units(core: bool, transposed: bool) -> tuple[str, ...]:
    """The strides that are 1 of up and core; where there is no core, up may be LoRA's down, which
    is the one transposed.
    """
    if core:
        return "stride_ur", "stride_ca" if transposed else "stride_cb"
    return ("stride_un" if transposed else "stride_ur",)


def _pass_cases(arch: int, dtype: str, rank: int, aligned: bool = True) -> Iterator[Case]:
    pointer = _POINTER[dtype]
    for kind, precision in _kinds(dtype):
        suffix = " ieee" if kind == "ieee" else ""
        form = kind if aligned else f"{kind}-unaligned"
        # Thin products have few columns; any tensor-core instruction serves a pass bound by memory.
        instruction = None if kind == "ieee" else f"HMMA|{TENSOR_CORE[arch]}"
        for grad, core, transposed in itertools.product((False, True), repeat=3):
            name = "thin_grad" if grad else "thin"
            config = configs.pass_defaults(name, arch, form, rank)
            for factors in dict.fromkeys((pointer, "*fp32")):
                in_place_only = core or transposed or factors != pointer
                if rank > TRITON_IN_PLACE_RANK and in_place_only:
                    continue
                if transposed and (kind != "half" or (grad and not core)):
                    continue
                words = (
                    "S + factors" if grad else "S",
                    f"{config.block_m}x{config.block_c}",
                    *(("core",) if core else ()),
                    *(("float32",) if factors != pointer else ()),
                    *(("transposed",) if transposed else ()),
                )
                yield _case(
                    "thin",
                    " ".join(words) + suffix,
                    arch,
                    dtype,
                    rank,
                    {
                        "tall_ptr": pointer,
                        "up_ptr": factors,
                        "core_ptr": factors if core else None,
                        "s_ptr": pointer,
                        "p_ptr": pointer if grad else None,
                        "d_up_ptr": "*fp32" if grad else None,
                        "d_core_ptr": "*fp32" if grad and core else None,
                    },
                    {
                        "BLOCK_M": config.block_m,
                        "BLOCK_C": config.block_c,
                        "RA": rank,
                        "RB": rank,
                        "EVEN_C": True,
                        "GRAD": grad,
                        "PRECISION": precision,
                    },
                    config.num_warps,
                    config.num_stages,
                    instruction,
                    unit=_units(core, transposed),
                    aligned=aligned,
                )
        config = configs.pass_defaults("tall_grad", arch, form, rank)
        yield _case(
            "tall_grad",
            f"{config.block_m}x{config.block_c}{suffix}",
            arch,
            dtype,
            rank,
            {"tall_ptr": pointer, "thin_ptr": pointer, "partial_ptr": "*fp32"},
            {
                "BLOCK_M": config.block_m,
                "BLOCK_C": config.block_c,
                "RANK": rank,
                "EVEN_C": True,
                "PRECISION": precision,
            },
            config.num_warps,
            config.num_stages,
            instruction,
            aligned=aligned,
        )


def _small_cases(
    arch: int, dtype: str, rank: int, aligned: bool = True, padded: bool = False
) -> Iterator[Case]:
    pointer = _POINTER[dtype]
    block, block_parts, num_warps = tuning.REDUCE_CONFIG
    for out in dict.fromkeys((pointer, "*fp32")):
        for sums in ("abc", "ac", "c"):  # of d_up, d_core, d_down
            pointers: dict[str, str | None] = {}
            for one in "abc":
                pointers[f"partial_{one}_ptr"] = "*fp32" if one in sums else None
                pointers[f"out_{one}_ptr"] = out if one in sums else None
            yield _case(
                "reduce",
                f"{sums} to {out[1:]}",
                arch,
                dtype,
                rank,
                pointers,
                {"RANK": rank, "RANK_C": rank, "BLOCK": block, "BLOCK_PARTS": block_parts},
                num_warps,
                3,
                None,
            )
    fold_block, fold_block_rb, fold_warps = tuning.FOLD_CONFIG
    block_n, block_k, block_r, merge_warps = tuning.merge_config(
        16 if aligned else 1, rank - padded
    )
    for factors in dict.fromkeys(("*fp32", pointer)):
        for core, transposed in itertools.product((factors, None), (False, True)):
            words = f"{factors[1:]} factors{'' if core else ' no core'}"
            words += " transposed" if transposed else ""
            yield _case(
                "fold",
                words,
                arch,
                dtype,
                rank,
                {"up_ptr": factors, "core_ptr": core, "out_ptr": pointer},
                {"BLOCK": fold_block, "BLOCK_RB": fold_block_rb, "RANK": rank},
                fold_warps,
                3,
                None,
                unit=_units(core is not None, transposed),
            )
            yield _case(
                "merge",
                f"fp32 weight {words}",
                arch,
                dtype,
                rank,
                {
                    "weight_ptr": "*fp32",
                    "up_ptr": factors,
                    "core_ptr": core,
                    "down_ptr": factors,
                    "out_ptr": pointer,
                },
                {"BLOCK_N": block_n, "BLOCK_K": block_k, "BLOCK_R": block_r, "RANK": rank},
                merge_warps,
                3,
                None,
                unit=("stride_ur", "stride_dr", *_units(True, transposed)[1:])
                if core
                else ("stride_ur", "stride_dk" if transposed else "stride_dr"),
            )


def cases(archs: tuple[int, ...] = ARCHS) -> Iterator[Case]:
    """Every shipped configuration of every kernel, in the variants named above."""
    for arch in archs:
        for dtype in _POINTER:
            for rank in RANKS:
                if dtype != "fp16" or rank == RANKS[0]:  # the GEMM's code is that of bf16
                    yield from _gemm_cases(arch, dtype, rank)
                yield from _pass_cases(arch, dtype, rank)
                yield from _small_cases(arch, dtype, rank)
                yield from _other_sizes(arch, dtype, rank)


def _other_sizes(arch: int, dtype: str, rank: int) -> Iterator[Case]:
    """Sizes that are multiples of 16 but not of a block ("ragged"), and odd ones ("unaligned"),
    both with masked loads; each with ranks that fill their padding and that do not ("padded").
    """
    for sizes, padded in (
        ("", True),
        ("ragged", False),
        ("ragged", True),
        ("unaligned", False),
        ("unaligned", True),
    ):
        aligned = sizes != "unaligned"
        as_aligned = aligned and tuning.is_aligned(16, rank - padded)
        for case in (
            *(_gemm_cases(arch, dtype, rank, as_aligned) if dtype != "fp16" else ()),
            *_pass_cases(arch, dtype, rank, as_aligned),
            *(_small_cases(arch, dtype, rank, aligned, padded) if sizes != "ragged" else ()),
        ):
            even = {name: not sizes for name in case.constants if name.startswith("EVEN")}
            yield replace(
                case,
                label=" ".join(filter(None, (case.label, sizes, "padded" if padded else ""))),
                constants={**case.constants, **even},
                aligned=aligned,
                ranks_fill_the_padding=not padded,
            )


def _owners(kernel: str, name: str) -> tuple[str, ...]:
    """The pointers, of those that a launch may leave out, that an integer describes."""
    if kernel == "reduce":
        sums = {"width": "ab", "width_c": "c", "C_a": "a", "C_b": "b", "C_c": "c"}.get(name, "")
        return tuple(f"out_{one}_ptr" for one in sums)
    return ("core_ptr",) if name.startswith("stride_c") else ()


def _multiple_of_16(case: Case, name: str) -> bool:
    """Whether a launch of this case is specialised on the integer being one."""
    forward, grad = case.constants.get("W_ROWS_ALONG_I"), case.constants.get("GRAD")
    owners = _owners(case.kernel, name)
    if owners and all(case.signature[pointer] == "constexpr" for pointer in owners):
        return True  # the size or stride of what is absent is 0
    folded = case.rank > TRITON_IN_PLACE_RANK and case.kernel in ("gemm", "thin")
    if folded and name in ("width_out", "rb", "stride_oc", "stride_un"):
        return True  # what a fold gives has the padded rank
    # S is stored in rows of the padded rank, P in rows of the rank itself.
    reads_p = name == "stride_p" and (forward or grad)
    if reads_p or (name == "stride_s" and not grad) or _OF_A_RANK.fullmatch(name):
        return case.ranks_fill_the_padding
    if name in ("stride_ug", "stride_og", "stride_cg"):
        return case.aligned or case.ranks_fill_the_padding
    return case.aligned or name in ("stride_p", "stride_s", "stride_thin")


def source(case: Case) -> ASTSource:
    """What Triton compiles, specialised as a launch on aligned tensors specialises it."""
    kernel = KERNELS[case.kernel]
    names = kernel.arg_names
    attrs = {}
    for position, name in enumerate(names):
        if case.signature[name] == "constexpr":
            continue
        pointer = case.signature[name].startswith("*")
        specialised = name not in kernel.do_not_specialize
        if pointer or (specialised and _multiple_of_16(case, name)):
            attrs[(position,)] = [["tt.divisibility", 16]]
    return ASTSource(
        kernel,
        case.signature,
        {(names.index(name),): value for name, value in case.constants.items()},
        attrs,
    )


def compile_case(case: Case) -> Report:
    """Compile and inspect one case."""
    compiled = triton.compile(
        source(case),
        target=GPUTarget("cuda", case.arch, 32),
        options={"num_warps": case.num_warps, "num_stages": case.num_stages},
    )
    report = Report(case, smem_bytes=compiled.metadata.shared)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = _cuobjdump("--dump-resource-usage", cubin.name)
        sass = _cuobjdump("--dump-sass", cubin.name)
    found = re.search(r"REG:(\d+)\s+STACK:(\d+)", usage)
    if found is None:
        report.problems.append("cuobjdump named no resource usage")
        return report
    report.registers, report.stack_bytes = int(found[1]), int(found[2])
    mnemonics = re.findall(r"\b(UTC[A-Z]*MMA|HGMMA|HMMA|FFMA|UTMALDG)\b", sass)
    report.instructions = "+".join(sorted(set(mnemonics)))
    if report.stack_bytes:
        report.problems.append(f"{report.stack_bytes} bytes of stack")
    if re.search(r"\b(LDL|STL)\b", sass):
        report.problems.append("register spills (LDL/STL)")
    # sm_86, sm_89 and sm_120 run sm_80's shapes too, with less shared memory.
    limit = min(v for arch, v in device.SMEM_BYTES.items() if device.family(arch) == case.arch)
    if report.smem_bytes > limit:
        report.problems.append(f"{report.smem_bytes} bytes of shared memory, limit {limit}")
    tensor_memory = getattr(compiled.metadata, "tmem_size", None) or 0
    if tensor_memory > device.TMEM_COLUMNS:
        report.problems.append(
            f"{tensor_memory} columns of tensor memory, limit {device.TMEM_COLUMNS}"
        )
    if case.instruction and not any(re.fullmatch(case.instruction, name) for name in mnemonics):
        report.problems.append(f"no {case.instruction} in the machine code")
    if case.overlaps:
        waits = re.findall(r"warp_group_dot_wait[^\n]*pendings = (\d+)", compiled.asm["ttgir"])
        if not any(map(int, waits)):
            report.problems.append("every wgmma waits for the one before it")
    if case.constants.get("FLATTEN") and _has_nested_loops(compiled.asm["ttgir"]):
        report.problems.append("the loop over tiles is not one with the loop inside")
    if case.constants.get("TMA") and "UTMALDG" not in mnemonics:
        report.problems.append("no UTMALDG (copy engine) in the machine code")
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


def _compile_or_report(case: Case) -> Report:
    try:
        return compile_case(case)
    except Exception as error:  # one case that does not compile must not hide the others' results
        return Report(case, problems=[f"{type(error).__name__}: {str(error).strip()[:300]}"])


def compile_all(selected: list[Case], jobs: int) -> Iterator[Report]:
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
        sys.exit(
            "TRITON_INTERPRET is set: the kernels are interpreted, there is nothing to compile"
        )
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", type=int, nargs="+", default=list(ARCHS), choices=ARCHS)
    parser.add_argument(
        "--only",
        default="",
        help="a regular expression on 'sm_90 gemm fwd ride 128x256x64 bf16 r16'",
    )
    parser.add_argument("--jobs", type=int, default=min(4, os.cpu_count() or 1))
    arguments = parser.parse_args()
    selected = [
        case for case in cases(tuple(arguments.arch)) if re.search(arguments.only, str(case))
    ]
    table = Table(
        "arch",
        "kernel",
        "configuration",
        "dtype",
        "rank",
        "warps",
        "stages",
        "registers",
        "smem KiB",
        "instructions",
        "verdict",
    )
    failures = 0
    for report in compile_all(selected, arguments.jobs):
        case = report.case
        failures += bool(report.problems)
        table.add_row(
            f"sm_{case.arch}",
            case.kernel,
            case.label,
            case.dtype,
            str(case.rank),
            str(case.num_warps),
            str(case.num_stages),
            str(report.registers),
            f"{report.smem_bytes / 1024:.1f}",
            report.instructions,
            "; ".join(report.problems) or "ok",
        )
        if report.problems:
            print(f"{case}: {'; '.join(report.problems)}", file=sys.stderr, flush=True)
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    print(f"{len(selected) - failures} of {len(selected)} compiled configurations pass")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
