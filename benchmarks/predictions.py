"""Prints what the cost model predicts for every linear layer of ViT-B/L/H and Swin-B. Measures
nothing.

    python -m benchmarks.predictions [--device H200] [--images 64] [--rank 16] [--weights float32]

The floor is the frozen layer's own product at the library's rate (y forward, dX backward); "of
roofline" is the floor over the picked strategy's time.
"""

from __future__ import annotations

import argparse
import statistics
import sys

import torch

from efft_kernels.ops import cost_model
from efft_kernels.ops.explain import Explanation, explain

from .lib.shapes import Layer, models

MODELS = ("ViT-B/16", "ViT-L/16", "ViT-H/14", "Swin-B")
STRATEGIES = ("fused", "split", "merged")
COLUMNS = (
    *("layer", "M", "K -> N", "pass", "floor us"),
    *(f"{strategy} us" for strategy in STRATEGIES),
    *("picked", "x floor", "of roofline"),
)


def predictions(
    layers: list[Layer], device: str, rank: int, weights: torch.dtype
) -> list[Explanation]:
    """Forward and backward of every layer (name, M, K, N, G), bf16 compute."""
    return [
        explain(M, K, N, G, rank, torch.bfloat16, device, weight_dtype=weights, backward=backward)
        for _, M, K, N, G in layers
        for backward in (False, True)
    ]


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
    parser.add_argument("--device", choices=devices, default="H200")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--weights", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--markdown", action="store_true", help="print Markdown tables")
    arguments = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 140)
    weights = getattr(torch, arguments.weights)
    shapes = models(arguments.images)
    for model in MODELS:
        layers = shapes[model]
        explained = predictions(layers, arguments.device, arguments.rank, weights)
        names = [layer[0] for layer in layers for _ in range(2)]
        title = (
            f"{model}, {arguments.device}, bf16, weights {arguments.weights}, rank {arguments.rank}"
        )
        table = Table(*COLUMNS, title=f"{title}: predicted, not measured")
        rows = [row(name, e) for name, e in zip(names, explained, strict=True)]
        if arguments.markdown:
            print(f"\n**{title}**\n\n| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
            print("\n".join(f"| {' | '.join(cells)} |" for cells in rows))
        else:
            for cells in rows:
                table.add_row(*cells)
            console.print(table)
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
