"""What decides between `split` and `merged` on a CPU: both strategies' forward and backward.

    python -m benchmarks.strategy_fit [--threads 1] [--clock process] [--seconds 0.5]

Every case is one layer, M and rank in float32, as in training (P is saved; dX and the factors'
gradients are wanted). The calls walk over as many copies of the layer as a model has blocks, so
that weights and activations are as cold as in a step; on one copy `merged` looks cheaper than it
is. Appends to results/strategy_fit.csv, then prints which strategy won where, and what a rule would
lose that takes `merged` where M is above c times the width that the update of `split` does not run
over: K in the forward, N in the backward.

On a machine with more load than cores, `--threads 1 --clock process` counts the processor's time
instead of the wall clock's.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

from efft_kernels.ops.backends import torch_backend

from .lib.operands import Operands
from .lib.rows import PROVENANCE, RESULTS, Row, append_rows, columns, newest, provenance, read_rows

CSV = RESULTS / "strategy_fit.csv"
COLUMNS = columns(f"part dtype M K N r rounds clock ms_p20 ms_p50 {PROVENANCE}")
KEY = ("part", "dtype", "M", "K", "N", "r", "clock", "device")
ROWS = (197, 788, 1576, 6304)
RANKS = (8, 16, 32, 64)
COPIES = 12
NEEDS = (True, False, False, True, True, True)  # dX and the factors' gradients


def layers() -> list[tuple[int, int, int]]:
    """(K, N, G) of ViT-S/16 and ViT-B/16."""
    return [
        shape
        for d in (384, 768)
        for shape in ((d, 3 * d, 3), (d, d, 1), (d, 4 * d, 1), (4 * d, d, 1))
    ]


@dataclass(frozen=True)
class Case:
    """One layer, M and rank."""

    M: int
    K: int
    N: int
    G: int
    r: int

    def calls(self) -> dict[str, Callable[[], object]]:
        """Every part that is timed, on tensors of its own."""
        o = Operands.draw(("", self.M, self.K, self.N, self.G), self.r, torch.float32, "cpu")
        x, weight, bias, down, core, up = (t.detach() for t in o.tensors())
        dy, b, p = o.dy, torch_backend.fold(core, up), x @ down
        y = dy.clone()

        def forward(strategy: str) -> Callable[[], object]:
            return lambda: torch_backend.forward(
                x, weight, bias, down, core, up, save_p=True, strategy=strategy
            )

        def backward(strategy: str) -> Callable[[], object]:
            return lambda: torch_backend.backward(
                dy, x, weight, p, down, core, up, needs=NEEDS, strategy=strategy
            )

        return {
            "linear": lambda: F.linear(x, weight, bias),
            "dX": lambda: torch.mm(dy, weight),
            "thin x": lambda: torch.mm(x, down),
            "update y": lambda: y.addmm_(p, b.t(), alpha=1e-6),
            "merge": lambda: torch_backend.merge_weight(weight, down, b, torch.float32),
            "fwd split": forward("split"),
            "fwd merged": forward("merged"),
            "bwd split": backward("split"),
            "bwd merged": backward("merged"),
        }


def measure(case: Case, seconds: float, clock: Callable[[], float]) -> dict[str, list[float]]:
    """Milliseconds of every part, in rounds; each round is one pass over all copies, per copy."""
    copies = [case.calls() for _ in range(COPIES)]
    ms: dict[str, list[float]] = {name: [] for name in copies[0]}
    start = time.perf_counter()
    rounds = 0
    while rounds < 3 or (rounds < 100 and time.perf_counter() - start < seconds):
        rounds += 1
        for name in ms:
            begin = clock()
            for calls in copies:
                calls[name]()
            ms[name].append(1e3 * (clock() - begin) / COPIES)
    return ms


def winners(rows: list[Row], clock: str) -> list[dict[str, Any]]:
    """One entry a case and pass: split's and merged's milliseconds, and linear's."""
    ms: dict[tuple[int, int, int, int], dict[str, float]] = {}
    for row in newest([r for r in rows if r["clock"] == clock], KEY):
        case = (int(row["M"]), int(row["K"]), int(row["N"]), int(row["r"]))
        ms.setdefault(case, {})[row["part"]] = float(row["ms_p20"])
    found = []
    for (m, k, n, r), parts in ms.items():
        for which, other, floor in (("fwd", k, "linear"), ("bwd", n, "dX")):
            split, merged = parts[f"{which} split"], parts[f"{which} merged"]
            found.append(
                {
                    "which": which,
                    "M": m,
                    "K": k,
                    "N": n,
                    "r": r,
                    "split": split,
                    "merged": merged,
                    "floor": parts[floor],
                    "rows_per_width": m / other,
                }
            )
    return found


def lost(entries: list[dict[str, Any]], threshold: float) -> float:
    """Mean of chosen over best time when `merged` is taken where M / width is above `threshold`."""
    total = 0.0
    for e in entries:
        chosen = e["merged"] if e["rows_per_width"] > threshold else e["split"]
        total += chosen / min(e["split"], e["merged"])
    return total / len(entries)


def report(rows: list[Row], clock: str) -> None:
    entries = winners(rows, clock)
    for which, floor, width in (("fwd", "linear", "K"), ("bwd", "dX", "N")):
        own = [e for e in entries if e["which"] == which]
        table = Table(
            "K -> N",
            "r",
            *(f"M={m}" for m in ROWS),
            title=f"{which}: split / merged, over the frozen {floor} (20th percentile)",
        )
        for k, n, r in dict.fromkeys((e["K"], e["N"], e["r"]) for e in own):
            cells = []
            for m in ROWS:
                e = next((e for e in own if (e["M"], e["K"], e["N"], e["r"]) == (m, k, n, r)), None)
                if e is None:
                    cells.append("-")
                    continue
                split, merged = e["split"] / e["floor"], e["merged"] / e["floor"]
                cells.append(f"{split:.2f} / {merged:.2f} {'s' if split <= merged else 'm'}")
            table.add_row(f"{k} -> {n}", str(r), *cells)
        Console(width=120).print(table)
        thresholds = sorted({0.0, 1e9, *(e["rows_per_width"] * 1.001 for e in own)})
        for name, threshold in (
            ("always merged", 0.0),
            ("always split", 1e9),
            ("best single threshold", min(thresholds, key=lambda t: lost(own, t))),
        ):
            share = 100 * (lost(own, threshold) - 1)
            rule = f"merged where M > {threshold:g}·{width}"
            print(f"{which} {name}: {rule}; {share:.1f}% over the best choice")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--seconds", type=float, default=0.5, help="for one case; at least 3 rounds are run"
    )
    parser.add_argument("--threads", type=int, help="torch's threads")
    parser.add_argument("--clock", choices=("wall", "process"), default="wall")
    parser.add_argument("--ranks", type=int, nargs="+", default=RANKS)
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS, help="M")
    parser.add_argument("--report-only", action="store_true")
    parser.add_argument("--out", type=Path, default=CSV)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    clock = time.perf_counter if arguments.clock == "wall" else time.process_time
    for m in () if arguments.report_only else arguments.rows:
        for k, n, g in layers():
            for r in arguments.ranks:
                where = provenance("cpu")
                ms = measure(Case(m, k, n, g, r), arguments.seconds, clock)
                rows = []
                for part, sample in ms.items():
                    ordered = sorted(sample)
                    rows.append(
                        dict(
                            part=part,
                            dtype="float32",
                            M=m,
                            K=k,
                            N=n,
                            r=r,
                            rounds=len(sample),
                            clock=arguments.clock,
                            ms_p20=round(ordered[len(ordered) // 5], 5),
                            ms_p50=round(ordered[len(ordered) // 2], 5),
                            **where,
                        )
                    )
                append_rows(arguments.out, COLUMNS, rows)
    report(list(read_rows(arguments.out)), arguments.clock)


if __name__ == "__main__":
    main()
