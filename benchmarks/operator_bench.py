"""Times `low_rank_linear` beside torch's own frozen F.linear, layer by layer, and appends CSV rows.

    python benchmarks/operator_bench.py --models ViT-B/16 --images 64 --rank 16 --impl triton:auto
    torch:split

Every implementation first has to match the float64 reference within twice plain torch's error in
the same dtype; one that does not is reported and gets no row. Then all are timed in turn, round
after round, with the L2 cache flushed before each on a GPU, where each call is a replayed CUDA
graph (or, with --eager, the calls themselves, host overhead included). The floor that every ratio
refers to is the frozen nn.Linear in the same run: F.linear for "fwd" and "train fwd", and F.linear
with the gradient of its input for "fwd+bwd".

An implementation is backend:strategy, or "peft" for the unfused LoRA formula in eager torch.
"""

from __future__ import annotations

import argparse
import csv
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from efft_kernels.ops import cost_model, reference
from efft_kernels.ops.functional import low_rank_linear

COLUMNS = (
    "op",
    "impl",
    "strategy",
    "mode",
    "dtype",
    "M",
    "K",
    "N",
    "G",
    "r",
    "ms_p20",
    "ms_p50",
    "ms_p80",
    "tflops",
    "gbps",
    "roofline_frac",
    "ratio_to_linear",
    "peak_mem_mb",
    "err_ratio",
    "device",
    "torch",
    "triton",
    "cuda",
    "commit",
    "timestamp",
)
FLOOR = "F.linear"
MODES = ("fwd", "train fwd", "fwd+bwd")
Layer = tuple[str, int, int, int, int]


@dataclass
class Operands:
    """One layer's tensors; x and the factors are leaves that require grad."""

    x: Tensor  # [M, K]
    weight: Tensor  # [N, K], frozen
    bias: Tensor  # [N]
    down: Tensor  # [K, r]
    core: Tensor  # [G, r, r]
    up: Tensor  # [1, N/G, r]
    dy: Tensor  # [M, N]

    @classmethod
    def draw(cls, layer: Layer, rank: int, dtype: torch.dtype, device: str) -> Operands:
        _, M, K, N, G = layer
        torch.manual_seed(0)

        def normal(*size: int, scale: float = 1.0, grad: bool = False) -> Tensor:
            return torch.randn(size, device=device, dtype=dtype).mul_(scale).requires_grad_(grad)

        return cls(
            normal(M, K, grad=True),
            normal(N, K, scale=K**-0.5),
            normal(N),
            normal(K, rank, scale=K**-0.5, grad=True),
            normal(G, rank, rank, scale=rank**-0.5, grad=True),
            normal(1, N // G, rank, scale=rank**-0.5, grad=True),
            normal(M, N),
        )

    def tensors(self) -> tuple[Tensor, ...]:
        return self.x, self.weight, self.bias, self.down, self.core, self.up


def forward_of(impl: str, o: Operands) -> Callable[[], Tensor]:
    """The forward of an implementation by name."""
    if impl == FLOOR:
        return lambda: F.linear(o.x, o.weight, o.bias)
    if impl == "peft":

        def unfused() -> Tensor:
            t = torch.einsum("ma,gab->gmb", o.x @ o.down, o.core) @ o.up.mT
            return F.linear(o.x, o.weight, o.bias) + t.transpose(0, 1).flatten(1)

        return unfused
    backend, _, strategy = impl.partition(":")
    if backend == "reference":
        return lambda: reference.low_rank_linear(*o.tensors())
    return lambda: low_rank_linear(*o.tensors(), backend=backend, strategy=strategy or "auto")


def call_of(impl: str, mode: str, o: Operands) -> Callable[[], object]:
    """What is timed: the forward without a graph, as in training (P is saved), or the forward and
    its gradients.
    """
    forward = forward_of(impl, o)
    if mode == "fwd":

        def inference() -> Tensor:
            with torch.no_grad():
                return forward()

        return inference
    if mode == "train fwd":
        return forward
    wanted = [o.x] if impl == FLOOR else [o.x, o.down, o.core, o.up]
    return lambda: torch.autograd.grad(forward(), wanted, o.dy)


def err_ratio(impl: str, o: Operands) -> float:
    """The largest over y and the gradients of error / plain torch's error, against float64."""

    def results(forward: Callable[[], Tensor], operands: Operands) -> list[Tensor]:
        y = forward()
        wanted = (operands.x, operands.down, operands.core, operands.up)
        return [y.detach(), *torch.autograd.grad(y, wanted, operands.dy)]

    exact_operands = Operands(
        *(t.detach().double().requires_grad_(t.requires_grad) for t in (*o.tensors(), o.dy))
    )
    exact = results(forward_of("reference", exact_operands), exact_operands)
    plain = results(forward_of("reference", o), o)
    got = results(forward_of(impl, o), o)
    ratios = [0.0]
    for value, torch_value, truth in zip(got, plain, exact, strict=True):
        budget = max(
            float((torch_value.double() - truth).norm()),
            float(truth.norm()) * torch.finfo(value.dtype).eps / 2,
        )
        ratio = float((value.double() - truth).norm()) / budget
        ratios.append(ratio)
    return math.nan if any(map(math.isnan, ratios)) else max(ratios)


class Timer:
    """Milliseconds of one call, on a GPU by events around a cold-cache replay, on a CPU by the
    clock.
    """

    def __init__(self, device: str, eager: bool):
        self.cuda = device == "cuda"
        self.eager = eager
        self.flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda") if self.cuda else None

    def prepare(self, call: Callable[[], object]) -> Callable[[], object]:
        """Warm up; on a GPU capture the call in a graph."""
        if not self.cuda or self.eager:
            for _ in range(3):
                call()
            return call
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        graph.replay()
        return graph.replay

    def time(self, call: Callable[[], object]) -> float:
        if not self.cuda:
            start = time.perf_counter()
            call()
            return 1e3 * (time.perf_counter() - start)
        assert self.flush is not None
        self.flush.zero_()
        start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start_event.record()
        call()
        end_event.record()
        end_event.synchronize()
        return start_event.elapsed_time(end_event)


def peak_mem_mb(call: Callable[[], object], cuda: bool) -> float:
    """Device memory that the call itself needs at its highest; nan on a CPU."""
    if not cuda:
        return math.nan
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def commit() -> str:
    run = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
    )
    return run.stdout.strip() or "unknown"


def bench_layer(
    layer: Layer,
    impls: list[str],
    modes: list[str],
    rank: int,
    dtype: torch.dtype,
    device: str,
    repeats: int,
    eager: bool,
) -> list[dict[str, object]]:
    """Rows of one layer, floor first."""
    name, M, K, N, G = layer
    o = Operands.draw(layer, rank, dtype, device)
    ratios = {FLOOR: 0.0}
    for impl in impls:
        try:
            ratios[impl] = err_ratio(impl, o)
        except (RuntimeError, ValueError) as error:
            print(f"{name} {impl}: {error}", file=sys.stderr)
            continue
        if not ratios[impl] <= 2:
            print(
                f"{name} {impl}: error {ratios[impl]:.2f} x plain torch's; no row", file=sys.stderr
            )
            del ratios[impl]
    timer = Timer(device, eager)
    peaks = cost_model.device_of(device)
    rows = []
    for mode in modes:
        calls = {impl: call_of(impl, mode, o) for impl in ratios}
        memory = {impl: peak_mem_mb(call, device == "cuda") for impl, call in calls.items()}
        prepared = {impl: timer.prepare(call) for impl, call in calls.items()}
        samples: dict[str, list[float]] = {impl: [] for impl in calls}
        for _ in range(repeats):
            for impl, call in prepared.items():
                samples[impl].append(timer.time(call))
        passes = 2 if mode == "fwd+bwd" else 1
        problem = cost_model.Problem(
            M, K, N, G, rank, mode != "fwd", o.weight.element_size(), o.x.element_size(), device
        )
        floor_ms = 1e3 * passes * cost_model.floor_seconds(problem, peaks)
        moved = passes * (M * (K + N) + N * K) * o.x.element_size()
        linear_ms = statistics.median(samples[FLOOR])
        for impl, ms in samples.items():
            p20, p50, p80 = (statistics.quantiles(ms, n=10)[i] for i in (1, 4, 7))
            backend, _, strategy = impl.partition(":")
            rows.append(
                {
                    "op": name,
                    "impl": backend,
                    "strategy": strategy,
                    "mode": f"{mode} (eager)" if eager and device == "cuda" else mode,
                    "dtype": str(dtype).removeprefix("torch."),
                    "M": M,
                    "K": K,
                    "N": N,
                    "G": G,
                    "r": rank,
                    "ms_p20": round(p20, 5),
                    "ms_p50": round(p50, 5),
                    "ms_p80": round(p80, 5),
                    "tflops": round(passes * 2e-09 * M * N * K / p50, 2),
                    "gbps": round(1e-06 * moved / p50, 1),
                    "roofline_frac": round(floor_ms / p50, 4),
                    "ratio_to_linear": round(p50 / linear_ms, 4),
                    "peak_mem_mb": round(memory[impl], 1),
                    "err_ratio": round(ratios[impl], 3),
                    "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
                    "torch": torch.__version__,
                    "triton": _version("triton"),
                    "cuda": torch.version.cuda or "",
                    "commit": commit(),
                    "timestamp": datetime.now(timezone.utc).isoformat(timespec="seconds"),
                }
            )
    return rows


def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def append(rows: list[dict[str, object]], path: Path) -> None:
    """Add rows to the CSV; its header is written once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)


def show(rows: list[dict[str, object]]) -> None:
    """The table, then each implementation's geometric mean over the layers."""
    from rich.console import Console
    from rich.table import Table

    table = Table(
        "layer",
        "M",
        "K -> N",
        "mode",
        "impl",
        "ms",
        "TFLOP/s",
        "GB/s",
        "of roofline",
        "x F.linear",
        "MiB",
        "error",
    )
    means: dict[tuple[str, str], list[float]] = {}
    for r in rows:
        impl = f"{r['impl']}:{r['strategy']}" if r["strategy"] else str(r["impl"])
        means.setdefault((str(r["mode"]), impl), []).append(float(str(r["ratio_to_linear"])))
        table.add_row(
            str(r["op"]),
            f"{r['M']:,}",
            f"{r['K']} -> {r['N']}",
            str(r["mode"]),
            impl,
            f"{r['ms_p50']:.4f}",
            str(r["tflops"]),
            str(r["gbps"]),
            f"{r['roofline_frac']:.2f}",
            f"{r['ratio_to_linear']:.3f}",
            str(r["peak_mem_mb"]),
            f"{r['err_ratio']:.2f}",
        )
    Console(width=None if sys.stdout.isatty() else 150).print(table)
    for (mode, impl), values in means.items():
        print(
            f"{mode:12} {impl:16} geometric mean over {len(values)} layers: "
            f"{statistics.geometric_mean(values):.3f} x F.linear"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--models", nargs="+", default=["ViT-B/16"], choices=sorted(cost_model.models(1))
    )
    parser.add_argument(
        "--layers", help="a comma-separated choice of the models' layers, e.g. qkv,fc1"
    )
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu")
    )
    parser.add_argument(
        "--impl",
        nargs="+",
        help="default: triton's strategies and torch's on a GPU, torch's on a CPU",
    )
    parser.add_argument("--modes", nargs="+", default=["fwd", "fwd+bwd"], choices=MODES)
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument(
        "--eager", action="store_true", help="on a GPU, time the calls instead of replayed graphs"
    )
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "operators.csv"
    )
    arguments = parser.parse_args()
    impls = arguments.impl or (
        ["triton:auto", "triton:fused", "triton:split", "torch:split", "peft"]
        if arguments.device == "cuda"
        else ["torch:split", "torch:merged", "peft"]
    )
    rows: list[dict[str, object]] = []
    for model in arguments.models:
        for layer in cost_model.models(arguments.images)[model]:
            if arguments.layers and layer[0] not in arguments.layers.split(","):
                continue
            found = bench_layer(
                (f"{model} {layer[0]}", *layer[1:]),
                impls,
                arguments.modes,
                arguments.rank,
                getattr(torch, arguments.dtype),
                arguments.device,
                arguments.repeats,
                arguments.eager,
            )
            append(found, arguments.out)
            rows += found
    show(rows)


if __name__ == "__main__":
    main()
