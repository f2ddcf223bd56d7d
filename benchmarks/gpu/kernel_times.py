"""Microseconds of every kernel of an adapted linear, beside the library's frozen product.

    python -m benchmarks.gpu.kernel_times [--model ViT-B/16] [--images 64] [--rank 16]
        [--impl cuda:split ...] [--weights float32] [--out FILE]

Each call runs a few times under torch.profiler; a row is one kernel of one call, and the printed
line has them all, the largest first. `F.linear` is the floor: forward, and dX. Host time is not in
it. On a CPU (`--device cpu`) the profiler's operators stand for kernels, so that the flow can be
tried; those numbers mean nothing. `--no-profiler` only makes each call once, for a profiler outside
the process, such as ncu; two profilers exclude each other. `--weights float32` is what autocast
leaves to the operator: a weight that it has to cast or to merge.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from ..lib.operands import FLOOR, Operands, call_of
from ..lib.rows import append_rows, columns, provenance
from ..lib.shapes import Layer, models

COLUMNS = columns(
    "model layer M K N G r weights impl pass kernel calls us share device torch triton cuda commit"
    " timestamp"
)
IMPLS = ("cuda:split", "cuda:fused", "triton:split", "triton:fused", "torch:split", "peft")
PASSES = ("train fwd", "bwd")
REPEATS = 10
# Name → a piece of the kernel's full name; the first that fits names it.
SHORT = (
    ("torch", r"at::native|at_cuda"),
    ("gemm sm90", r"low_rank_gemm_sm90"),
    ("gemm sm80", r"low_rank_gemm_sm80"),
    ("gemm triton", r"^_low_rank_gemm"),
    ("tall_grad", r"tall_grad_kernel"),
    ("thin_grad", r"thin_grad_kernel|thin_kernel<.*, true>"),
    ("thin", r"thin_kernel"),
    ("unfold", r"unfold_kernel"),
    ("fold", r"fold_kernel"),
    ("library gemm", r"nvjet|cutlass|gemm|cublas"),
    ("reduce", r"reduce_kernel"),
    ("merge", r"merge_kernel"),
)


def short(kernel: str) -> str:
    """A kernel's name without its template arguments."""
    for name, pattern in SHORT:
        if re.search(pattern, kernel):
            return name
    return re.sub(r"<.*", "", kernel)[-40:]


def times(events: Iterable[Any]) -> Iterator[tuple[str, float]]:
    """(kernel, microseconds that it adds) of all that ran on the GPU.

    A kernel may start before the one ahead of it has ended and wait there: the time that both run
    is the first one's.
    """
    on_gpu = [e for e in events if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
    covered = -math.inf
    for event in sorted(on_gpu, key=lambda e: e.time_range.start):
        begin, end = event.time_range.start, event.time_range.end
        yield event.name, max(0.0, end - max(begin, covered))
        covered = max(covered, end)


def operator_times(profiler: Any) -> Iterator[tuple[str, float]]:
    """(operator, microseconds without what it calls) of all that ran on the CPU."""
    return ((event.name, event.self_cpu_time_total) for event in profiler.events() or ())


def kernels_of(
    call: Callable[[], object], cuda: bool, repeats: int = REPEATS
) -> list[tuple[str, float, float]]:
    """[(kernel, launches per call, microseconds per call), ...], the longest first; the
    microseconds add up to the time in which something ran.
    """
    for _ in range(3):
        call()
    if cuda:
        torch.cuda.synchronize()
    activity = ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU
    with profile(activities=[activity], acc_events=True) as profiler:
        for _ in range(repeats):
            call()
        if cuda:
            torch.cuda.synchronize()
    found: dict[str, list[float]] = {}
    for name, us in times(profiler.events() or ()) if cuda else operator_times(profiler):
        row = found.setdefault(name, [0.0, 0.0])
        row[0] += 1 / repeats
        row[1] += us / repeats
    ordered = sorted(found.items(), key=lambda item: -item[1][1])
    return [(name, calls, us) for name, (calls, us) in ordered]


def operands_of(layer: Layer, rank: int, weights: str, device: str) -> Operands:
    """One layer's tensors; `weights` is the dtype of the weight, the bias and the factors."""
    half = device == "cuda" or weights == "bfloat16"
    drawn = Operands.draw(layer, rank, torch.bfloat16 if half else torch.float32, device)
    dtype = getattr(torch, weights)
    stored = {
        name: t.detach().to(dtype).requires_grad_(t.requires_grad)
        for name in ("weight", "bias", "down", "core", "up")
        for t in [getattr(drawn, name)]
    }
    return replace(drawn, **stored)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    here = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cuda", "cpu"), default=here)
    parser.add_argument("--model", default="ViT-B/16", choices=list(models(1)))
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--weights", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--impl", nargs="+", default=IMPLS)
    parser.add_argument("--no-profiler", action="store_true", help="only make each call once")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    cuda = options.device == "cuda"
    autocast = torch.autocast(options.device, torch.bfloat16, options.weights == "float32")
    failed = 0
    for layer in models(options.images)[options.model]:
        operands = operands_of(layer, options.rank, options.weights, options.device)
        floor: dict[str, float] = {}
        for impl in (FLOOR, *options.impl):
            for mode in PASSES:
                label = f"{layer[0]:5}{impl:13}{mode:10}"
                try:
                    with autocast:
                        call = call_of(impl, mode, operands)
                        kernels = [] if options.no_profiler else kernels_of(call, cuda)
                        if options.no_profiler:
                            call()
                except Exception as error:
                    failed += 1
                    print(f"{label}{type(error).__name__}: {error}", flush=True)
                    continue
                total = sum(us for *_, us in kernels)
                if impl == FLOOR:
                    floor[mode] = total
                ratio = total / floor[mode] if floor.get(mode) else float("nan")
                parts = "  ".join(f"{short(kernel)} {us:.1f}" for kernel, _, us in kernels)
                print(f"{label}{total:8.1f} us {ratio:5.2f}  {parts}", flush=True)
                if options.out is not None:
                    shared = {"model": options.model, "impl": impl, "pass": mode}
                    shared |= dict(zip(("layer", *"MKNG"), layer, strict=True))
                    shared |= {"r": options.rank, "weights": options.weights}
                    rows = [
                        {
                            **shared,
                            "kernel": kernel,
                            "calls": f"{calls:.2f}",
                            "us": f"{us:.3f}",
                            "share": f"{us / total:.4f}",
                            **provenance(options.device),
                        }
                        for kernel, calls, us in kernels
                    ]
                    append_rows(options.out, COLUMNS, rows)
        if cuda:
            torch.cuda.synchronize()
        del operands
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
