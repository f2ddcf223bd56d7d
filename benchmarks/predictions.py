"""Prints what the cost model predicts for every linear layer of ViT-B/L/H and Swin-B. Measures
nothing.

    python -m benchmarks.predictions [--device H200] [--backend cuda] [--images 64] [--rank 16]
        [--weights float32]
    python -m benchmarks.predictions --measured kernel_times.csv    # beside what was measured

The floor is the frozen layer's own product at the library's rate (y forward, dX backward); "of
roofline" is the floor over the picked strategy's time. With a file of
benchmarks/gpu/kernel_times.py every kernel of it stands beside its prediction, from which the
constants in ops/cost_model.py and in the backends' cost files are set anew.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from efft_kernels.ops import cost_model
from efft_kernels.ops.backends import REGISTRY
from efft_kernels.ops.cost_model import Problem
from efft_kernels.ops.explain import Explanation, explain

from .gpu.kernel_times import short
from .lib.rows import Row, read_rows
from .lib.shapes import Layer, models

MODELS = ("ViT-B/16", "ViT-L/16", "ViT-H/14", "Swin-B")
STRATEGIES = ("fused", "split", "merged")
COLUMNS = (
    *("layer", "M", "K -> N", "pass", "floor us"),
    *(f"{strategy} us" for strategy in STRATEGIES),
    *("picked", "x floor", "of roofline"),
)
COMPARED = ("layer", "pass", "call", "measured", "predicted", "kernels, measured / predicted")


# What `kernel_times.short` calls a kernel → what the cost model may call its launch.
LAUNCHES = {
    "gemm": ("gemm", "gemm sm90", "gemm sm80", "gemm triton"),
    "thin": ("thin", "thin_grad"),
    "library gemm": ("library gemm", "thin product", "update in place"),
    "merge": ("merge", "cast"),
}
GROUP = {name: group for group, names in LAUNCHES.items() for name in names}


def predictions(
    layers: list[Layer], device: str, rank: int, weights: torch.dtype, backend: str = "cuda"
) -> list[Explanation]:
    """Forward and backward of every layer (name, M, K, N, G), bf16 compute."""
    options: Any = {"backend": backend, "weight_dtype": weights}
    return [
        explain(M, K, N, G, rank, torch.bfloat16, device, **options, backward=backward)
        for _, M, K, N, G in layers
        for backward in (False, True)
    ]


@dataclass
class Compared:
    """One call: microseconds of its kernels and of all together, measured and predicted."""

    layer: str
    backend: str
    strategy: str
    backward: bool
    measured: dict[str, float]
    predicted: dict[str, float]

    @property
    def totals(self) -> tuple[float, float]:
        """Of all kernels: measured, predicted."""
        return sum(self.measured.values()), sum(self.predicted.values())

    def cells(self) -> tuple[str, ...]:
        """A line of the table."""
        groups = dict.fromkeys((*self.predicted, *self.measured))
        kernels = ", ".join(
            f"{group} {self.measured.get(group, 0):.0f} / {self.predicted.get(group, 0):.0f}"
            for group in groups
        )
        measured, predicted = self.totals
        part = "backward" if self.backward else "forward"
        call = f"{self.backend}:{self.strategy}"
        return self.layer, part, call, f"{measured:.0f}", f"{predicted:.0f}", kernels


def compared(rows: Iterable[Row], device: str) -> list[Compared]:
    """Every call of a strategy in rows of kernel_times.py, with what is predicted for it.

    The library's launches other than the main product are not predicted one by one: those of plain
    torch stand in one group.
    """
    calls: dict[tuple[str, str, str], list[Row]] = {}
    for r in rows:
        calls.setdefault((r["layer"], r["impl"], r["pass"]), []).append(r)
    found = []
    for (layer, impl, part), own in calls.items():
        backend, _, strategy = impl.partition(":")
        if backend not in REGISTRY or strategy not in REGISTRY[backend].load().STRATEGIES:
            continue
        measured: dict[str, float] = {}
        for r in own:
            group = GROUP.get(short(r["kernel"]), short(r["kernel"]))
            measured[group] = measured.get(group, 0.0) + float(r["us"])
        m, k, n, g, rank = (int(own[0][name]) for name in "MKNGr")
        width = getattr(torch, own[0].get("weights") or "bfloat16").itemsize
        problem = Problem(
            *(m, k, n, g, rank, True, width, 2, "cuda"),
            backward=part == "bwd",
            factor_bytes=width,
        )
        peaks = cost_model.DEVICES[device]
        predicted: dict[str, float] = {}
        for launch in REGISTRY[backend].load().launches(problem, strategy, peaks):
            group = GROUP.get(launch.name, launch.name)
            us = 1e6 * cost_model.seconds([launch], problem, peaks)
            predicted[group] = predicted.get(group, 0.0) + us
        found.append(Compared(layer, backend, strategy, problem.backward, measured, predicted))
    return found


def agreement(calls: list[Compared]) -> list[str]:
    """Where the least predicted time is not the least measured one, and what that costs."""
    by_choice: dict[tuple[str, str, bool], list[Compared]] = {}
    for call in calls:
        by_choice.setdefault((call.layer, call.backend, call.backward), []).append(call)
    lines = []
    for (layer, backend, backward), own in by_choice.items():
        best = min(own, key=lambda call: call.totals[0])
        picked = min(own, key=lambda call: call.totals[1])
        if picked is not best:
            lost = picked.totals[0] - best.totals[0]
            part = "backward" if backward else "forward"
            lines.append(
                f"{backend}, {layer} {part}: {picked.strategy} is picked, {best.strategy} was"
                f" {lost:.0f} us faster"
            )
    return [f"{len(by_choice) - len(lines)} of {len(by_choice)} picks were the fastest", *lines]


def row(layer: str, e: Explanation) -> tuple[str, ...]:
    """One line of the table."""
    p, picked = e.problem, e.times_us[e.chosen]
    return (
        layer,
        f"{p.M:,}",
        f"{p.K} -> {p.N}",
        "backward" if p.backward else "forward",
        f"{e.floor_us:.1f}",
        *(f"{e.times_us[s]:.1f}" if s in e.times_us else "-" for s in STRATEGIES),
        e.chosen,
        f"{picked / e.floor_us:.2f}",
        f"{e.floor_us / picked:.2f}",
    )


def main() -> None:
    from rich.console import Console
    from rich.table import Table

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    devices = [name for name in cost_model.DEVICES if name != "CPU"]
    parser.add_argument("--device", choices=devices, help="default: H200, or that of --measured")
    parser.add_argument("--backend", choices=("torch", "triton", "cuda"), default="cuda")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--weights", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--markdown", action="store_true", help="print Markdown tables")
    parser.add_argument("--measured", type=Path, help="a CSV of benchmarks/gpu/kernel_times.py")
    arguments = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 140)

    def show(title: str, columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
        if arguments.markdown:
            print(f"\n**{title}**\n\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
            print("\n".join(f"| {' | '.join(cells)} |" for cells in rows))
            return
        table = Table(*columns, title=title)
        for cells in rows:
            table.add_row(*cells)
        console.print(table)

    if arguments.measured:
        measured = list(read_rows(arguments.measured))
        name = str(measured[0]["device"])
        device = arguments.device or next((d for d in devices if d in name), None)
        if device is None:
            parser.error(f"--device must be given: the cost model knows no {name}")
        calls = compared(measured, device)
        show(f"{name}: measured / predicted us", COMPARED, [call.cells() for call in calls])
        print("\n".join(agreement(calls)))
        return

    weights, device = getattr(torch, arguments.weights), arguments.device or "H200"
    shapes = models(arguments.images)
    for model in MODELS:
        layers = shapes[model]
        explained = predictions(layers, device, arguments.rank, weights, arguments.backend)
        names = [layer[0] for layer in layers for _ in range(2)]
        title = (
            f"{model}, {arguments.backend} on {device}, bf16, weights {arguments.weights},"
            f" rank {arguments.rank}: predicted, not measured"
        )
        show(title, COLUMNS, [row(name, e) for name, e in zip(names, explained, strict=True)])
        forward = [e.times_us[e.chosen] / e.floor_us for e in explained if not e.problem.backward]
        both = [
            (f.times_us[f.chosen] + b.times_us[b.chosen]) / (f.floor_us + b.floor_us)
            for f, b in zip(explained[::2], explained[1::2], strict=True)
        ]
        print(
            f"\n{model}: geometric mean x floor, forward {statistics.geometric_mean(forward):.2f}, "
            f"forward + backward {statistics.geometric_mean(both):.2f}"
        )


if __name__ == "__main__":
    main()
