"""Which strategy is cheapest for a problem: operations and bytes over the device's peaks, unless
measured.

For each of its strategies a backend gives the plan of a call: its list of launches, each with the
FLOPs it must do and the bytes it must move. A launch takes the longer of the two times, what a
matrix product stores after its loop, and its start-up; a strategy takes the sum. Where benchmark
rows of the same device say otherwise (`add_measured`), they decide.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

MEASURED = Path(__file__).parent / "measured.json"


class Problem(NamedTuple):
    """The numbers a strategy's cost depends on (bytes are per element)."""

    M: int
    K: int
    N: int
    G: int
    rank: int  # Ra, the width of the fold
    training: bool
    weight_bytes: int  # as stored
    compute_bytes: int
    device_type: str
    # Which of the two operators; `training` alone is the forward that saves P.
    backward: bool = False
    factor_bytes: int = 0  # of down, core and up as stored; 0: compute_bytes

    @classmethod
    def of(
        cls,
        x: Tensor,
        weight: Tensor,
        down: Tensor,
        core: Tensor | None,
        up: Tensor,
        training: bool,
        backward: bool = False,
    ) -> Problem:
        """The problem of one call. `x` may be dY: only its rows, dtype and device are read."""
        return cls(
            M=x.shape[0],
            K=weight.shape[1],
            N=weight.shape[0],
            G=up.shape[0] if core is None else core.shape[0],
            rank=down.shape[1],
            training=training,
            weight_bytes=weight.element_size(),
            compute_bytes=x.element_size(),
            device_type=x.device.type,
            backward=backward,
            factor_bytes=down.element_size(),
        )


@dataclass(frozen=True)
class Device:
    """What a prediction divides by: FLOP/s, bytes/s, seconds."""

    name: str
    half_flops: float  # the library's matrix products of 16-bit operands, apart from their stores
    float_flops: float  # of float32 operands
    bandwidth: float
    store_bandwidth: float  # of a matrix product's result, which its loop does not hide
    launch_s: float  # what a kernel takes however little it does, and the gap before the next
    tile_columns: int  # output columns per tile of the Triton GEMM
    # What P in that GEMM's loop costs at least, in columns of the main product.
    thin_columns: int
    multiprocessors: int
    # Share of the peak that a library product with `rank` columns reaches.
    thin_efficiency: float = 1.0
    merge_cost: float = 1.0  # of W + ΔW, against an update in place of as many elements
    sm90: bool = False  # it runs sm_90a code
    source: str = "datasheet"


# H100: fitted to ViT-B's eight products (64 images, bf16) by the library and to the fastest copies;
# a graph's launches are 0.26 us apart. H200: the same chip, its bandwidth measured by a copy. The
# others are datasheet figures times the shares that these reach of their own. What each backend's
# kernels reach of it stands with its launches; `python -m benchmarks.predictions --measured FILE`
# sets both against a file of benchmarks/gpu/kernel_times.py. thin_columns: on sm_80 the rows of `a`
# are in registers already, so a thin product costs its own columns; on sm_90 every wgmma reads them
# from shared memory again, measured as long as 30 to 100 more columns; on sm_100 the matrix unit is
# twice as fast and the read as long.
DEVICES = {
    "A100": Device("A100", 265e12, 132e12, 1.8e12, 3.0e12, 2.5e-6, 128, 16, 108),
    "H100": Device(
        *("H100", 832e12, 412e12, 3.0e12, 5.0e12, 2.5e-6, 256, 96, 132),
        sm90=True,
        source="measured",
    ),
    "H200": Device(
        *("H200", 832e12, 412e12, 4.3e12, 5.0e12, 2.5e-6, 256, 96, 132),
        sm90=True,
        source="measured on an H100, bandwidth on an H200",
    ),
    "B200": Device("B200", 1900e12, 950e12, 7.2e12, 12e12, 2.5e-6, 256, 128, 148),
    # Plain torch on a few cores. thin_efficiency: products with 16 columns against square ones.
    # merge_cost: within a step the weight is not in cache and its sum is memory fresh from the
    # system; a merge took 2.6 ns an element against 0.4 of an update (ViT-S, 394 rows, 1 thread).
    "CPU": Device(
        *("CPU", 60e9, 100e9, 20e9, math.inf, 5e-6, 64, 1, 2, 0.25, 6.0), source="assumed"
    ),
}


class Launch(NamedTuple):
    """One kernel: which, the FLOPs it does on matrix units, the bytes it moves with each operand
    counted once.
    """

    name: str
    flops: float
    bytes_moved: int
    efficiency: float = 1.0  # of the device's matrix rate
    memory_efficiency: float = 1.0  # of its bandwidth
    stored: int = 0  # of the bytes, those that a matrix product stores after its loop
    latency_s: float = 0.0  # of loads that wait for each other


def library_gemm(problem: Problem) -> Launch:
    """The frozen layer's product by the vendor's library: y, or dX in the backward."""
    M, K, N, *_ = problem
    b, columns = problem.compute_bytes, problem.K if problem.backward else problem.N
    moved = (M * (N + K) + N * K) * b
    return Launch("library gemm", 2 * M * N * K, moved, stored=M * columns * b)


class Priced(Protocol):
    """What a backend tells the cost model."""

    def __hash__(self) -> int:
        """`choose` remembers by it."""
        ...

    @property
    def NAME(self) -> str:
        """What a user asks for."""
        ...

    @property
    def STRATEGIES(self) -> tuple[str, ...]:
        """The strategies it implements."""
        ...

    def excluded(self, problem: Problem, strategy: str) -> str | None:
        """Why `auto` must not take the strategy; None where it may."""
        ...

    def launches(self, problem: Problem, strategy: str, device: Device) -> list[Launch]:
        """The launches of one call in order, its backward being the usual one: dX, and the
        gradients of down, core and up."""
        ...


def loses_increments(problem: Problem, strategy: str) -> str | None:
    """Why `merged`, where it rounds W + ΔW to the weight's own dtype, is ruled out."""
    if strategy == "merged" and problem.weight_bytes < 4:
        return (
            "the weight is stored in half precision: increments below half an ulp of W0 would"
            " vanish"
        )
    return None


def seconds(launches: Iterable[Launch], problem: Problem, device: Device) -> float:
    """The predicted time of launches run one after another."""
    rate = device.half_flops if problem.compute_bytes == 2 else device.float_flops
    return sum(
        max(
            launch.flops / (rate * launch.efficiency),
            launch.bytes_moved / (device.bandwidth * launch.memory_efficiency),
        )
        + launch.stored / device.store_bandwidth
        + launch.latency_s
        + device.launch_s
        for launch in launches
    )


@cache
def device_of(device_type: str) -> Device:
    """The peaks of this machine's device; an unknown GPU gets those of the nearest known
    architecture.
    """
    if device_type != "cuda" or not torch.cuda.is_available():
        return DEVICES["CPU"]
    name = torch.cuda.get_device_name()
    for known in ("H200", "H100", "B200", "A100"):
        if known in name:
            return DEVICES[known]
    major, _ = torch.cuda.get_device_capability()
    nearest = DEVICES["A100" if major < 9 else "H100" if major == 9 else "B200"]
    logger.info("%s is not in the cost model's table; %s stands in", name, nearest.name)
    return nearest


def candidates(
    problem: Problem, backend: Priced, device: Device | None = None
) -> tuple[dict[str, float], dict[str, str]]:
    """({strategy: predicted seconds}, {strategy: why it is ruled out}) of one backend."""
    device = device or device_of(problem.device_type)
    predicted: dict[str, float] = {}
    excluded: dict[str, str] = {}
    for strategy in backend.STRATEGIES:
        reason = backend.excluded(problem, strategy)
        if reason is None:
            launches = backend.launches(problem, strategy, device)
            predicted[strategy] = seconds(launches, problem, device)
        else:
            excluded[strategy] = reason
    return predicted, excluded


_Key = tuple[str, bool, int, int, int, int, int]
_measured: dict[_Key, dict[str, dict[int, float]]] = {}


def _key(problem: Problem, backend: str) -> _Key:
    p = problem
    return backend, p.backward, p.compute_bytes, p.weight_bytes, p.K, p.N, p.rank


_forget: list[Callable[[], None]] = []


def when_measured(forget: Callable[[], None]) -> None:
    """Have `forget` called after new measurements, to drop remembered answers of `choose`."""
    _forget.append(forget)


def add_measured(rows: Iterable[Mapping[str, Any]]) -> None:
    """Let benchmark rows of this machine's device decide instead of the model.

    Each row: backend, backward (bool), compute_bytes, weight_bytes, M, K, N, rank, strategy,
    ms_p50.
    """
    for row in rows:
        key = (
            str(row["backend"]),
            bool(row["backward"]),
            int(row["compute_bytes"]),
            int(row["weight_bytes"]),
            int(row["K"]),
            int(row["N"]),
            int(row["rank"]),
        )
        _measured.setdefault(key, {}).setdefault(str(row["strategy"]), {})[int(row["M"])] = float(
            row["ms_p50"]
        )
    choose.cache_clear()
    for forget in _forget:
        forget()


@cache
def _load_shipped() -> None:
    """Rows of measured.json for this device: {"<device name>": [row, ...]}."""
    if MEASURED.is_file() and torch.cuda.is_available():
        add_measured(json.loads(MEASURED.read_text()).get(torch.cuda.get_device_name(), ()))


def measured_ms(problem: Problem, strategies: Iterable[str], backend: str) -> dict[str, float]:
    """{strategy: milliseconds} measured at the nearest M within a factor of two; two strategies or
    none.
    """
    found = {}
    for strategy, by_rows in _measured.get(_key(problem, backend), {}).items():
        nearest = min(by_rows, key=lambda m: abs(m - problem.M))
        if strategy in strategies and nearest / 2 <= problem.M <= nearest * 2:
            found[strategy] = by_rows[nearest]
    return found if len(found) > 1 else {}


@lru_cache(maxsize=8192)
def choose(problem: Problem, backend: Priced) -> str:
    """The backend's strategy with the least measured, else the least predicted, time."""
    _load_shipped()
    predicted, _ = candidates(problem, backend)
    if not predicted:
        return backend.STRATEGIES[0]
    times = measured_ms(problem, predicted, backend.NAME) or predicted
    return min(times, key=lambda strategy: times[strategy])


def floor_seconds(problem: Problem, device: Device) -> float:
    """The frozen layer's own product (y, or dX in the backward) at the library's rate: what no
    adapter goes below.
    """
    return seconds([library_gemm(problem)], problem, device)
