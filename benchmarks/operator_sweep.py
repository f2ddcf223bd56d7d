"""Every CPU backend and strategy on every layer shape: forward, backward and both.

    python -m benchmarks.operator_sweep [--models ViT-S/16 ...] [--ranks 4 16 64] [--seconds 180]

One image per layer (M = its tokens) in float32 by default, which two cores finish within a few
minutes; with --images 8 a model is listed as "ViT-S/16×8". `auto` is what a user gets who asks for
nothing; `operator_bench.py` is the tool for single questions and for a GPU. An implementation that
misses the error budget gets no row. The floor of a row is the frozen nn.Linear in the same rounds:
F.linear for "fwd", its dX for "bwd", both for "fwd+bwd". The peaks come from a copy and a GEMM in
the same run.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from efft_kernels.ops import cost_model

from . import tables
from .harness import (
    OPERATOR_COLUMNS,
    OPERATORS_CSV,
    Row,
    append_rows,
    interleave,
    provenance,
    worst_error,
)
from .operator_bench import FLOOR, Operands, call_of, forward_of, peak_mem_mb
from .roofline import Peaks, measure_peaks, peak_rows

MODES = ("fwd", "bwd", "fwd+bwd")
IMPLS = ("torch:split", "torch:merged", "cpp:split", "cpp:merged", "auto", "peft")
RANKS = (4, 8, 16, 32, 64)
MAIN_RANK = 16
GATE_ROWS = 256  # float64 einsums of all rows would take longer than the rounds
Layer = tuple[str, int, int, int, int]


def vit_layers(width: int, tokens: int, images: int) -> list[Layer]:
    """[(layer, M, K, N, G), ...] of a ViT block."""
    m = images * tokens
    return [
        ("qkv", m, width, 3 * width, 3),
        ("proj", m, width, width, 1),
        ("fc1", m, width, 4 * width, 1),
        ("fc2", m, 4 * width, width, 1),
    ]


def all_models(images: int) -> dict[str, list[Layer]]:
    """{model: [(layer, M, K, N, G), ...]} at 224×224 pixels, small models first."""
    small = {
        "ViT-Ti/16": vit_layers(192, 197, images),
        "ViT-S/16": vit_layers(384, 197, images),
    }
    return small | dict(cost_model.models(images))


def calls_of(mode: str, o: Operands, impls: Iterable[str]) -> dict[str, Callable[[], object]]:
    """impl → what is timed; "bwd" runs the backward of a graph that is there already."""
    if mode != "bwd":
        return {impl: call_of(impl, mode, o) for impl in impls}
    return {impl: _backward_of(impl, o) for impl in impls}


def _backward_of(impl: str, o: Operands) -> Callable[[], object]:
    y = forward_of(impl, o)()
    wanted: list[Tensor] = [o.x] if impl == FLOOR else [o.x, o.down, o.core, o.up]
    return lambda: torch.autograd.grad(y, wanted, o.dy, retain_graph=True)


def error_ratios(
    layer: Layer, rank: int, dtype: torch.dtype, device: str, impls: Sequence[str]
) -> dict[str, float]:
    """impl → its worst error, over y and the gradients, over plain torch's; on `GATE_ROWS` rows."""
    name, m, *shape = layer
    o = Operands.draw((name, min(m, GATE_ROWS), *shape), rank, dtype, device)
    tensors = (*o.tensors(), o.dy)
    exact = Operands(*(t.detach().double().requires_grad_(t.requires_grad) for t in tensors))

    def results(impl: str, operands: Operands) -> list[Tensor]:
        y = forward_of(impl, operands)()
        wanted = (operands.x, operands.down, operands.core, operands.up)
        return [y.detach(), *torch.autograd.grad(y, wanted, operands.dy)]

    truth, plain = results("reference", exact), results("reference", o)
    return {impl: worst_error(results(impl, o), plain, truth) for impl in impls}


def sweep_layer(
    model: str,
    layer: Layer,
    rank: int,
    *,
    peaks: Peaks,
    impls: Sequence[str] = IMPLS,
    modes: Sequence[str] = MODES,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seconds: float = 0.5,
) -> list[Row]:
    """Rows of one layer at one rank; `seconds` are shared by the modes."""
    name, m, k, n, g = layer
    o = Operands.draw(layer, rank, dtype, device)
    ratios = {FLOOR: 0.0}
    for impl, ratio in error_ratios(layer, rank, dtype, device, impls).items():
        if ratio <= 2:
            ratios[impl] = ratio
        else:
            print(f"{model} {name} {impl}: error {ratio:.2f} x torch's; no row", file=sys.stderr)
    rows: list[Row] = []
    for mode in modes:
        calls = calls_of(mode, o, ratios)
        memory = {impl: peak_mem_mb(call, device == "cuda") for impl, call in calls.items()}
        timings = interleave(
            calls, seconds=seconds / len(modes), device=device, fewest_rounds=3, most_rounds=100
        )
        passes = 2 if mode == "fwd+bwd" else 1
        flops = passes * 2 * m * n * k
        moved = passes * (m * (k + n) + n * k) * o.x.element_size()
        where = provenance(device)
        for impl in ratios:
            ms = timings.time(impl)
            backend, _, strategy = impl.partition(":")
            rows.append(
                {
                    "op": f"{model} {name}", "impl": backend, "strategy": strategy, "mode": mode,
                    "dtype": str(dtype).removeprefix("torch."), "M": m, "K": k, "N": n, "G": g,
                    "r": rank, "ms_p20": f"{ms.p20:.5f}", "ms_p50": f"{ms.p50:.5f}",
                    "ms_p80": f"{ms.p80:.5f}", "tflops": f"{1e-9 * flops / ms.p50:.4f}",
                    "gbps": f"{1e-6 * moved / ms.p50:.2f}",
                    "roofline_frac": f"{peaks.floor_ms(flops, moved) / ms.p50:.4f}",
                    "ratio_to_linear": f"{timings.ratio(impl, FLOOR).p50:.4f}",
                    "peak_mem_mb": "" if math.isnan(memory[impl]) else f"{memory[impl]:.1f}",
                    "err_ratio": f"{ratios[impl]:.3f}", **where,
                }
            )  # fmt: skip
    return rows


def cases(models: Sequence[str], ranks: Sequence[int], images: int) -> list[tuple[str, Layer, int]]:
    """Every (model, layer, rank); large models only at the smallest, main and largest rank."""
    few = sorted({min(ranks), max(ranks), *(r for r in ranks if r == MAIN_RANK)})
    return [
        (model, layer, rank)
        for model in models
        for layer in all_models(images)[model]
        for rank in (ranks if model in ("ViT-Ti/16", "ViT-S/16", "ViT-B/16") else few)
    ]


def run(
    models: Sequence[str],
    ranks: Sequence[int],
    *,
    images: int = 1,
    seconds: float = 180.0,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    impls: Sequence[str] = IMPLS,
    modes: Sequence[str] = MODES,
    out: Path | None = OPERATORS_CSV,
    progress: Callable[[str], None] = lambda line: None,
) -> list[Row]:
    """Measure peaks and cases; append to `out` as they come; all rows."""
    todo = cases(models, ranks, images)
    peaks = measure_peaks(dtype, device)
    rows = peak_rows(peaks, dtype, device)
    if out is not None:
        append_rows(out, OPERATOR_COLUMNS, rows)
    for number, (model, layer, rank) in enumerate(todo, 1):
        label = model if images == 1 else f"{model}×{images}"
        progress(f"{number}/{len(todo)} {label} {layer[0]} r={rank}")
        found = sweep_layer(
            label, layer, rank, peaks=peaks, impls=impls, modes=modes, dtype=dtype, device=device,
            seconds=seconds / len(todo),
        )  # fmt: skip
        if out is not None:
            append_rows(out, OPERATOR_COLUMNS, found)
        rows += found
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = list(all_models(1))
    parser.add_argument("--models", nargs="+", default=known, choices=known)
    parser.add_argument("--ranks", type=int, nargs="+", default=RANKS)
    parser.add_argument("--images", type=int, default=1)
    parser.add_argument("--impl", nargs="+", default=IMPLS)
    parser.add_argument("--modes", nargs="+", default=MODES, choices=MODES)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float64"))
    parser.add_argument("--seconds", type=float, default=180.0, help="of rounds, for all cases")
    parser.add_argument("--out", type=Path, default=OPERATORS_CSV)
    arguments = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 130)
    with console.status("measuring the peaks") as status:
        rows = run(
            arguments.models, arguments.ranks, images=arguments.images,
            dtype=getattr(torch, arguments.dtype), seconds=arguments.seconds,
            impls=arguments.impl, modes=arguments.modes, out=arguments.out, progress=status.update,
        )  # fmt: skip
    console.print(tables.operator_table(rows))


if __name__ == "__main__":
    main()
