"""Times `low_rank_linear` beside torch's own frozen F.linear, layer by layer, and appends CSV rows.

    python -m benchmarks.operators [--models ViT-S/16 ...] [--ranks 4 16 64] [--seconds 180]
    python -m benchmarks.operators --device cuda --impl triton:auto cuda:auto torch:split peft

On a CPU by default one image per layer (M = its tokens) in float32, which two cores finish within a
few minutes; on a GPU 64 images of ViT-B in bfloat16. With --images 8 a model is listed as
"ViT-S/16×8". `auto` is what a user gets who asks for nothing; an implementation is
backend:strategy, or "peft" for the unfused LoRA formula in eager torch. One that misses the error
budget gets no row.

The floor of a row is the frozen nn.Linear in the same rounds: F.linear for "fwd" and "train fwd"
(P is saved), its dX for "bwd", both for "fwd+bwd". On a GPU the L2 cache is flushed before each
call, and a call is a replayed CUDA graph (with --eager the call itself, host overhead included).
The peaks of the roofline come from a copy and a GEMM in the same run.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rich.console import Console

from efft_kernels.testing.error_budget import BUDGET

from . import tables
from .lib.operands import FLOOR, Gate, Operands, call_of
from .lib.rows import OPERATOR_COLUMNS, OPERATORS_CSV, Row, append_rows, provenance
from .lib.shapes import Layer, models
from .lib.timing import interleave, peak_mem_mb
from .roofline import Peaks, measure_peaks, peak_rows

MODES = ("fwd", "train fwd", "bwd", "fwd+bwd")
CPU_MODES = ("fwd", "bwd", "fwd+bwd")
CPU_IMPLS = ("torch:split", "torch:merged", "cpp:split", "cpp:merged", "auto", "peft")
GPU_MODES = ("fwd", "fwd+bwd")
GPU_IMPLS = ("triton:auto", "triton:fused", "triton:split", "torch:split", "peft")
GPU_ROUNDS = 50
RANKS = (4, 8, 16, 32, 64)
MAIN_RANK = 16


def errors(
    layer: Layer, rank: int, impls: Sequence[str], dtype: torch.dtype, device: str, label: str
) -> dict[str, float]:
    """impl → error over plain torch's, of those within the budget; the others are named."""
    gate = Gate(layer, rank, dtype, device)
    found = {FLOOR: 0.0}
    for impl in impls:
        try:
            error = gate.error(impl)
        except (RuntimeError, ValueError) as reason:
            print(f"{label} {impl}: {reason}", file=sys.stderr)
            continue
        if error <= BUDGET:
            found[impl] = error
        else:
            print(f"{label} {impl}: error {error:.2f} x torch's; no row", file=sys.stderr)
    return found


def measure_layer(
    model: str,
    layer: Layer,
    rank: int,
    *,
    peaks: Peaks,
    impls: Sequence[str] = CPU_IMPLS,
    modes: Sequence[str] = CPU_MODES,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seconds: float = 0.5,
    rounds: int | None = None,
    eager: bool = False,
) -> list[Row]:
    """Rows of one layer at one rank, the floor first in every mode.

    Args:
        model: what the `op` column puts before the layer's name.
        layer: name, M, K, N, G.
        seconds: of rounds, shared by the modes.
        rounds: exactly so many instead.
        eager: on a GPU, time the calls instead of replayed graphs.
    """
    name, m, k, n, g = layer
    op = f"{model} {name}"
    ratios = errors(layer, rank, impls, dtype, device, op)
    o = Operands.draw(layer, rank, dtype, device)
    cuda = device == "cuda"
    rows: list[Row] = []
    for mode in modes:
        calls = {impl: call_of(impl, mode, o) for impl in ratios}
        memory = {impl: peak_mem_mb(call, cuda) for impl, call in calls.items()}
        timings = interleave(
            calls,
            seconds=seconds / len(modes),
            device=device,
            graphs=not eager,
            fewest_rounds=rounds or 3,
            most_rounds=rounds or 100,
        )
        passes = 2 if mode == "fwd+bwd" else 1
        flops = passes * 2 * m * n * k
        moved = passes * (m * (k + n) + n * k) * o.x.element_size()
        shared = {
            "op": op,
            "mode": f"{mode} (eager)" if eager and cuda else mode,
            "dtype": str(dtype).removeprefix("torch."),
            **dict(zip("MKNGr", (m, k, n, g, rank), strict=True)),
            **provenance(device),
        }
        for impl in ratios:
            ms = timings.time(impl)
            backend, _, strategy = impl.partition(":")
            rows.append(
                shared
                | {
                    "impl": backend,
                    "strategy": strategy,
                    "ms_p20": f"{ms.p20:.5f}",
                    "ms_p50": f"{ms.p50:.5f}",
                    "ms_p80": f"{ms.p80:.5f}",
                    "tflops": f"{1e-9 * flops / ms.p50:.4f}",
                    "gbps": f"{1e-6 * moved / ms.p50:.2f}",
                    "roofline_frac": f"{peaks.floor_ms(flops, moved) / ms.p50:.4f}",
                    "ratio_to_linear": f"{timings.ratio(impl, FLOOR).p50:.4f}",
                    "peak_mem_mb": "" if math.isnan(memory[impl]) else f"{memory[impl]:.1f}",
                    "err_ratio": f"{ratios[impl]:.3f}",
                }
            )
    return rows


def cases(
    names: Sequence[str], ranks: Sequence[int], images: int, layers: Sequence[str] | None = None
) -> list[tuple[str, Layer, int]]:
    """Every (model, layer, rank); large models only at the smallest, main and largest rank."""
    few = sorted({min(ranks), max(ranks), *(r for r in ranks if r == MAIN_RANK)})
    return [
        (name, layer, rank)
        for name in names
        for layer in models(images)[name]
        if layers is None or layer[0] in layers
        for rank in (ranks if name in ("ViT-Ti/16", "ViT-S/16", "ViT-B/16") else few)
    ]


def run(
    names: Sequence[str],
    ranks: Sequence[int],
    *,
    images: int = 1,
    layers: Sequence[str] | None = None,
    seconds: float = 180.0,
    rounds: int | None = None,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    impls: Sequence[str] = CPU_IMPLS,
    modes: Sequence[str] = CPU_MODES,
    eager: bool = False,
    out: Path | None = OPERATORS_CSV,
    progress: Callable[[str], None] = lambda line: None,
) -> list[Row]:
    """Measure peaks and cases; append to `out` as they come; all rows."""
    todo = cases(names, ranks, images, layers)
    peaks = measure_peaks(dtype, device)
    rows = peak_rows(peaks, dtype, device)
    if out is not None:
        append_rows(out, OPERATOR_COLUMNS, rows)
    for number, (model, layer, rank) in enumerate(todo, 1):
        label = model if images == 1 else f"{model}×{images}"
        progress(f"{number}/{len(todo)} {label} {layer[0]} r={rank}")
        found = measure_layer(
            label,
            layer,
            rank,
            peaks=peaks,
            impls=impls,
            modes=modes,
            dtype=dtype,
            device=device,
            seconds=seconds / len(todo),
            rounds=rounds,
            eager=eager,
        )
        if out is not None:
            append_rows(out, OPERATOR_COLUMNS, found)
        rows += found
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    here = "cuda" if torch.cuda.is_available() else "cpu"
    known = list(models(1))
    parser.add_argument("--device", choices=("cuda", "cpu"), default=here)
    parser.add_argument("--models", nargs="+", choices=known)
    parser.add_argument("--layers", help="comma-separated, e.g. qkv,fc1; default: all")
    parser.add_argument("--ranks", type=int, nargs="+")
    parser.add_argument("--images", type=int)
    parser.add_argument("--impl", nargs="+")
    parser.add_argument("--modes", nargs="+", choices=MODES)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16", "float64"))
    parser.add_argument("--seconds", type=float, default=180.0, help="of rounds, for all cases")
    parser.add_argument("--rounds", type=int, help="exactly so many per case; on a GPU 50")
    parser.add_argument("--eager", action="store_true", help="on a GPU, time calls, not graphs")
    parser.add_argument("--out", type=Path, default=OPERATORS_CSV)
    arguments = parser.parse_args()
    cuda = arguments.device == "cuda"
    console = Console(width=None if sys.stdout.isatty() else 130)
    with console.status("measuring the peaks") as status:
        rows = run(
            arguments.models or (["ViT-B/16"] if cuda else known),
            arguments.ranks or ((MAIN_RANK,) if cuda else RANKS),
            images=arguments.images or (64 if cuda else 1),
            layers=arguments.layers.split(",") if arguments.layers else None,
            seconds=arguments.seconds,
            rounds=arguments.rounds or (GPU_ROUNDS if cuda else None),
            device=arguments.device,
            dtype=getattr(torch, arguments.dtype or ("bfloat16" if cuda else "float32")),
            impls=arguments.impl or (GPU_IMPLS if cuda else CPU_IMPLS),
            modes=arguments.modes or (GPU_MODES if cuda else CPU_MODES),
            eager=arguments.eager,
            out=arguments.out,
            progress=status.update,
        )
    console.print(tables.operator_table(rows))


if __name__ == "__main__":
    main()
