"""What one small linear costs the host, by every way through the package, in microseconds.

    python -m benchmarks.native_overhead [--repeats 30] [--out benchmarks/results/host.csv]

At 8 rows and 16 features the arithmetic is next to nothing: what is left are checks, dispatch,
autograd and allocations. On a fast GPU these decide whether an eager step waits for the host. Ways:

    F.linear          the frozen layer with the gradient of its input: the floor
    C++ entry         `low_rank_linear` as it is called by default, the C++ kernels
    Python entry      the same kernels through the autograd.Function in Python
    Python, direct    that, calling the backend without torch.library in between: what a bypass of
                      it in eager mode could save at most
    torch backend     plain torch, its Python called from the C++ entry
    eager torch       the formula as it is usually written, with torch's own autograd

Each number is the least of `repeats` loops, taken in turns, by the processor's clock; `launches` is
the number of operators that torch's dispatcher runs on tensors for one call.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from efft_kernels import low_rank_linear
from efft_kernels.ops import dispatch
from efft_kernels.ops.backends import native_library

from .lib.rows import PROVENANCE, RESULTS, append_rows, columns, provenance

HOST_CSV = RESULTS / "host.csv"
COLUMNS = columns(f"impl part M K N r us launches {PROVENANCE}")
M, K, N, RANK = 8, 16, 16, 4
CALLS = 100
FLOOR = "F.linear"


class Way(NamedTuple):
    """A way through the package."""

    forward: Callable[[], Tensor]
    wanted: list[Tensor]  # they get gradients
    setting: Callable[[], AbstractContextManager[None]] = nullcontext  # entered around a loop


def ways() -> dict[str, Way]:
    """impl → its way."""
    torch.manual_seed(0)
    x, down = torch.randn(M, K, requires_grad=True), torch.randn(K, RANK, requires_grad=True)
    core = torch.randn(1, RANK, RANK, requires_grad=True)
    up = torch.randn(1, N, RANK, requires_grad=True)
    weight, bias = torch.randn(N, K), torch.randn(N)
    wanted = [x, down, core, up]

    def with_backend(name: str) -> Callable[[], Tensor]:
        return lambda: low_rank_linear(x, weight, bias, down, core, up, backend=name)

    def eager() -> Tensor:
        return F.linear(x, weight, bias) + (x @ down) @ core[0] @ up[0].t()

    found = {FLOOR: Way(lambda: F.linear(x, weight, bias), [x])}
    if native_library.load_cpu() is None and native_library.autograd_unavailable() is None:
        cpp = with_backend("cpp")
        found["C++ entry"] = Way(cpp, wanted)
        found["Python entry"] = Way(cpp, wanted, _no_cpp_entry)
        found["Python, direct"] = Way(cpp, wanted, _no_torch_library)
    found["torch backend"] = Way(with_backend("torch"), wanted)
    found["eager torch"] = Way(eager, wanted)
    return found


@contextmanager
def _no_cpp_entry() -> Iterator[None]:
    with mock.patch.object(native_library, "autograd_module", lambda: None):
        yield


@contextmanager
def _no_torch_library() -> Iterator[None]:
    operators = torch.ops.efft_kernels
    with (
        _no_cpp_entry(),
        mock.patch.object(operators, "low_rank_linear_fwd", dispatch._fwd),
        mock.patch.object(operators, "low_rank_linear_bwd", dispatch._bwd),
    ):
        yield


def measure(repeats: int) -> list[dict[str, object]]:
    """One row for every way and part."""
    dy = torch.randn(M, N)
    found = ways()
    calls: dict[tuple[str, str], Callable[[], object]] = {}
    for impl, way in found.items():
        calls[impl, "fwd"] = way.forward
        calls[impl, "fwd+bwd"] = _with_backward(way.forward, way.wanted, dy)
    least = dict.fromkeys(calls, float("inf"))
    counts = {}
    for (impl, part), call in calls.items():
        with found[impl].setting():
            call()
            counts[impl, part] = launches(call)
    for _ in range(repeats):
        for (impl, part), call in calls.items():
            with found[impl].setting():
                begin = time.process_time()
                for _ in range(CALLS):
                    call()
                us = 1e6 * (time.process_time() - begin) / CALLS
            least[impl, part] = min(least[impl, part], us)
    size = {"M": M, "K": K, "N": N, "r": RANK}
    where = provenance("cpu")
    return [
        {"impl": impl, "part": part, **size, "us": f"{us:.1f}", "launches": counts[impl, part]}
        | where
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
