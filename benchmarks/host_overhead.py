"""What one call of the Triton backend costs the host, in microseconds. Needs no GPU, measures none.

    python -m benchmarks.host_overhead [--images 8] [--rank 16] [--repeats 15] [--out FILE.csv]

Kernels and library products are replaced by stubs, and the tensors are on the CPU: what is left is
Python, allocations and torch's own dispatch, of calls that come again. For every layer of ViT-B,
strategy and form of the factors (folded for a whole group at once: core=None; or with their core),
forward and backward:

    launches   kernels and library products that the call would start
    kernels    the Triton backend's `forward` or `backward`: block shapes, buffers, arguments
    operator   the same through `low_rank_linear`, its checks and autograd
    floor      an empty autograd.Function around a product that is a stub as well
    triton     `kernels` with Triton's own host code: the kernels are compiled for sm_90 and handed
               to a driver that does nothing. Triton's C launcher and the driver come on top

Each is the least of `repeats` loops, by the processor's clock. The number of rows changes the
allocations only; few images keep them small, as CUDA's caching allocator would.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from efft_kernels.ops.backends import triton as backend
from efft_kernels.ops.functional import low_rank_linear

from .lib.rows import PROVENANCE, append_rows, columns, provenance
from .lib.shapes import Layer, models

COLUMNS = columns(
    "op strategy factors part M K N G r launches kernels_us triton_us operator_us floor_us "
    + PROVENANCE
)
NEEDS = (True, False, False, True, True, True)
STRATEGIES = ("fused", "split")
CALLS = 100


class Launches:
    """Stands in for everything that would start a kernel, and counts."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        self.count += 1

    def matmul(self, a: Tensor, b: Tensor) -> Tensor:
        self.count += 1
        return a.new_empty((*a.shape[:-1], b.shape[-1]))

    def linear(self, a: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        self.count += 1
        return a.new_empty((a.shape[0], weight.shape[0]))


@contextmanager
def no_launches(triton_too: bool) -> Iterator[Launches]:
    """Library products do nothing but count. Kernels are compiled for an H200 that is not there:
    their compiled form does nothing but count, with `triton_too`, or all but the launch itself.
    """
    from efft_kernels.ops.backends.triton import launch_cache
    from efft_kernels.testing.fake_gpu import fake_gpu

    launches = Launches()
    with ExitStack() as stack:
        for owner, name, stub in (
            (torch, "matmul", launches.matmul),
            (torch, "mm", launches.matmul),
            (F, "linear", launches.linear),
        ):
            stack.enter_context(mock.patch.object(owner, name, stub))
        stack.enter_context(fake_gpu(90, 132, record=False))
        if triton_too:
            stack.enter_context(
                mock.patch.object(launch_cache, "_starter", lambda compiled, grid: launches)
            )
        yield launches


class _Floor(torch.autograd.Function):
    """As little as an operator with a gradient can be."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return torch.mm(x, weight.t())

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        (weight,) = ctx.saved_tensors
        return torch.mm(dy, weight), None


def least_us(call: Callable[[], object], repeats: int) -> float:
    """Microseconds of one call, the least of `repeats` loops."""
    best = float("inf")
    for _ in range(repeats):
        start = time.process_time()
        for _ in range(CALLS):
            call()
        best = min(best, time.process_time() - start)
    return 1e6 * best / CALLS


def operands(layer: Layer, rank: int, folded: bool) -> tuple[Tensor | None, ...]:
    """(x, weight, bias, down, core, up, dy) in bf16; the factors and x require grad."""
    _, M, K, N, G = layer

    def zeros(*size: int, grad: bool = False) -> Tensor:
        return torch.zeros(size, dtype=torch.bfloat16, requires_grad=grad)

    slices = 1 if folded else G
    return (
        zeros(M, K, grad=True),
        zeros(N, K),
        zeros(N),
        zeros(K, rank, grad=True),
        None if folded else zeros(G, rank, rank, grad=True),
        zeros(slices, N // slices, rank, grad=True),
        zeros(M, N),
    )


def measure(layer: Layer, strategy: str, folded: bool, rank: int, repeats: int) -> list[dict]:
    """The forward's and the backward's row."""
    name, M, K, N, G = layer
    x, weight, bias, down, core, up, dy = operands(layer, rank, folded)
    tensors = [None if t is None else t.detach() for t in (x, weight, bias, down, core, up)]
    x_, weight_, _, down_, core_, up_ = tensors
    p = torch.zeros(M, rank, dtype=torch.bfloat16)
    wanted = [t for t in (x, down, core, up) if t is not None]
    needs = (*NEEDS[:4], core is not None, NEEDS[5])

    def forward() -> object:
        return backend.forward(*tensors, save_p=True, strategy=strategy)

    def backward() -> object:
        return backend.backward(
            dy, x_, weight_, p, down_, core_, up_, needs=needs, strategy=strategy
        )

    def through_operator() -> Tensor:
        return low_rank_linear(x, weight, bias, down, core, up, backend="triton", strategy=strategy)

    found: dict[str, dict[str, float]] = {"forward": {}, "backward": {}}
    calls = {"forward": forward, "backward": backward}
    with no_launches(triton_too=True) as launches:
        for part, call in calls.items():
            call()
            before = launches.count
            call()
            found[part]["launches"] = launches.count - before
            found[part]["kernels_us"] = least_us(call, repeats)
        for column, of in (
            ("operator_us", through_operator),
            ("floor_us", lambda: _Floor.apply(x, weight)),
        ):
            y, inputs = of(), wanted if column == "operator_us" else [x]
            found["forward"][column] = least_us(of, repeats)
            found["backward"][column] = least_us(
                lambda y=y, inputs=inputs: torch.autograd.grad(  # type: ignore[misc]
                    y, inputs, dy, retain_graph=True
                ),
                repeats,
            )
    with no_launches(triton_too=False):
        for part, call in calls.items():
            call()
            found[part]["triton_us"] = least_us(call, repeats)
    case = {
        "op": name,
        "strategy": strategy,
        "factors": "folded" if folded else "core",
        "M": M,
        "K": K,
        "N": N,
        "G": G,
        "r": rank,
    }
    return [
        {**case, "part": part, "launches": numbers.pop("launches")}
        | {column: round(us, 2) for column, us in numbers.items()}
        for part, numbers in found.items()
    ]


def main() -> None:
    from rich.console import Console
    from rich.table import Table

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--layers", help="a comma-separated choice, e.g. qkv,fc1")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path, help="append the rows to this CSV as well")
    arguments = parser.parse_args()
    reason = host_only()
    if reason is not None:
        sys.exit(reason)
    torch.set_num_threads(1)
    rows: list[dict] = []
    for layer in models(arguments.images)["ViT-B/16"]:
        if arguments.layers and layer[0] not in arguments.layers.split(","):
            continue
        for strategy in STRATEGIES:
            for folded in (True, False):
                rows += measure(layer, strategy, folded, arguments.rank, arguments.repeats)
    shown = (
        "op",
        "strategy",
        "factors",
        "part",
        "launches",
        "kernels_us",
        "triton_us",
        "operator_us",
        "floor_us",
    )
    table = Table(*(column.replace("_us", " us") for column in shown))
    for row in rows:
        table.add_row(
            *(f"{row[c]:.1f}" if isinstance(row[c], float) else str(row[c]) for c in shown)
        )
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    for part in ("forward", "backward"):
        worst = max((row for row in rows if row["part"] == part), key=lambda r: r["kernels_us"])
        print(f"{part}: at most {worst['kernels_us']:.1f} us ({worst['op']}, {worst['strategy']})")
    if arguments.out:
        where = provenance("cpu")
        append_rows(arguments.out, COLUMNS, [{**row, **where} for row in rows])


def host_only() -> str | None:
    """Why this cannot run here: it needs Triton, and kernels that are compiled."""
    from importlib.util import find_spec

    if find_spec("triton") is None:
        return "triton is not installed; there is no host code to time"
    from efft_kernels.ops.backends.triton import device

    if device.INTERPRETED:
        return "TRITON_INTERPRET is set: the kernels are interpreted, there is nothing to time"
    return None


if __name__ == "__main__":
    main()
