"""What one small linear costs the host, by every way through the package, in microseconds.

    python -m benchmarks.native_overhead [--repeats 30] [--out benchmarks/results/host.csv]

At 8 rows and 16 features the arithmetic is next to nothing: what is left are checks, dispatch,
autograd and allocations. On a fast GPU these decide whether an eager step waits for the host. Ways:

    F.linear          the frozen layer with the gradient of its input: the floor
    C++ entry         `low_rank_linear` as it is called by default, the C++ kernels
    Python entry      the same kernels through the autograd.Function in Python
    torch backend     plain torch, its Python called from the C++ entry
    eager torch       the formula as it is usually written, with torch's own autograd

Each number is the least of `repeats` loops, taken in turns, by the processor's clock; `launches` is
the number of operators that torch's dispatcher runs on tensors for one call.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from efft_kernels import low_rank_linear
from efft_kernels.ops.backends import native_library

from .lib.rows import PROVENANCE, RESULTS, append_rows, columns, provenance

HOST_CSV = RESULTS / "host.csv"
COLUMNS = columns(f"impl part M K N r us launches {PROVENANCE}")
M, K, N, RANK = 8, 16, 16, 4
CALLS = 100
FLOOR = "F.linear"


def ways() -> dict[str, tuple[Callable[[], Tensor], list[Tensor]]]:
    """impl → (its forward, the tensors that get gradients)."""
    torch.manual_seed(0)
    x, down = torch.randn(M, K, requires_grad=True), torch.randn(K, RANK, requires_grad=True)
    core = torch.randn(1, RANK, RANK, requires_grad=True)
    up = torch.randn(1, N, RANK, requires_grad=True)
    weight, bias = torch.randn(N, K), torch.randn(N)
    wanted = [x, down, core, up]

    def with_backend(name: str) -> Callable[[], Tensor]:
        return lambda: low_rank_linear(x, weight, bias, down, core, up, backend=name)

    def python_entry() -> Tensor:
        with mock.patch.object(native_library, "autograd_module", _no_module):
            return low_rank_linear(x, weight, bias, down, core, up, backend="cpp")

    def eager() -> Tensor:
        return F.linear(x, weight, bias) + (x @ down) @ core[0] @ up[0].t()

    found = {FLOOR: (lambda: F.linear(x, weight, bias), [x])}
    if native_library.cpu_unavailable() is None and native_library.autograd_unavailable() is None:
        found["C++ entry"] = with_backend("cpp"), wanted
        found["Python entry"] = python_entry, wanted
    found["torch backend"] = with_backend("torch"), wanted
    found["eager torch"] = eager, wanted
    return found


def _no_module() -> None:
    return None


def measure(repeats: int) -> list[dict[str, object]]:
    """One row for every way and part."""
    dy = torch.randn(M, N)
    calls: dict[tuple[str, str], Callable[[], object]] = {}
    for impl, (forward, wanted) in ways().items():
        calls[impl, "fwd"] = forward
        calls[impl, "fwd+bwd"] = _with_backward(forward, wanted, dy)
    least = dict.fromkeys(calls, float("inf"))
    for call in calls.values():
        call()
    for _ in range(repeats):
        for key, call in calls.items():
            begin = time.process_time()
            for _ in range(CALLS):
                call()
            least[key] = min(least[key], 1e6 * (time.process_time() - begin) / CALLS)
    where = provenance("cpu")
    return [
        {
            "impl": impl,
            "part": part,
            "M": M,
            "K": K,
            "N": N,
            "r": RANK,
            "us": f"{us:.1f}",
            "launches": launches(calls[impl, part]),
            **where,
        }
        for (impl, part), us in least.items()
    ]


def _with_backward(
    forward: Callable[[], Tensor], wanted: list[Tensor], dy: Tensor
) -> Callable[[], object]:
    return lambda: torch.autograd.grad(forward(), wanted, dy)


def launches(call: Callable[[], object]) -> int:
    """How many operators one call runs that no other operator called."""
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiled:
        call()
    events = profiled.events() or []
    operators = ("aten::", "efft_kernels::")
    return sum(
        event.name.startswith(operators)
        and not (event.cpu_parent is not None and event.cpu_parent.name.startswith(operators))
        for event in events
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--out", type=Path, default=HOST_CSV)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = measure(arguments.repeats)
    append_rows(arguments.out, COLUMNS, rows)
    table = Table("way", "part", "µs a call", "operators", title="host time of one small linear")
    for row in rows:
        table.add_row(*(str(row[column]) for column in ("impl", "part", "us", "launches")))
    Console().print(table)


if __name__ == "__main__":
    main()
