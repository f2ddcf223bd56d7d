"""Which strategy is cheapest for a problem: operations and bytes over the device's peaks, unless
measured.

A strategy is a list of launches (`plan`), each with the FLOPs it must do and the bytes it must
move. A launch takes the longer of the two times plus its start-up; a strategy takes the sum. Where
benchmark rows of the same device say otherwise (`add_measured`), they decide.

`explain` says what is picked for a problem and why; benchmarks/predictions.py prints it for the
layers of ViT and Swin.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

MEASURED = Path(__file__).parent / "measured.json"
# The highest rank the Triton kernels take; above it plain torch runs (triton/forward.py).
TRITON_MAX_RANK = 128
# The highest padded rank at which they read the factors in place (triton/factors.py).
TRITON_IN_PLACE_RANK = 32


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
    """The peaks a prediction divides by: FLOP/s, bytes/s, seconds."""

    name: str
    half_flops: float  # matrix products of 16-bit operands
    float_flops: float  # matrix products of float32 operands
    bandwidth: float
    launch_s: float  # from one kernel's end to the next one's start
    gemm_efficiency: float  # share of the library's GEMM rate that the Triton GEMM reaches
    tile_columns: int  # output columns per tile of that GEMM
    thin_columns: (
        int  # columns a thin product riding in the loop costs at least, in main-product columns
    )
    multiprocessors: int
    thin_efficiency: float = (
        1.0  # share of the peak that a library product with `rank` columns reaches
    )
    merge_cost: float = 1.0  # of W + ΔW, against an update in place of as many elements
    source: str = "datasheet"


# Peaks: H200 measured on one machine (8192³ bf16 product on random data, device-to-device copy);
# the others are datasheet figures times the shares that the H200 reached of its own (0.8 of the
# rate, 0.9 of the bandwidth). gemm_efficiency and launch_s are assumptions until
# benchmarks/gpu_check.sh has run. thin_columns: on sm_80 the rows of `a` are in registers already,
# so a thin product costs its own columns; on sm_90 every wgmma reads them from shared memory again
# (64×16 elements, 16 to 20 cycles, as long as 64 to 80 more columns); on sm_100 the matrix unit is
# twice as fast and the read as long.
DEVICES = {
    "A100": Device("A100", 250e12, 125e12, 1.8e12, 2e-6, 0.90, 128, 16, 108),
    "H100": Device("H100", 788e12, 390e12, 3.0e12, 2e-6, 0.85, 256, 72, 132),
    "H200": Device(
        "H200", 788e12, 390e12, 4.3e12, 2e-6, 0.85, 256, 72, 132, source="peaks measured"
    ),
    "B200": Device("B200", 1800e12, 900e12, 7.2e12, 2e-6, 0.80, 256, 128, 148),
    # Plain torch on a few cores. thin_efficiency: products with 16 columns against square ones.
    # merge_cost: within a step the weight is not in cache and its sum is memory fresh from the
    # system; a merge took 2.6 ns an element against 0.4 of an update (ViT-S, 394 rows, 1 thread).
    "CPU": Device(
        "CPU",
        60e9,
        100e9,
        20e9,
        5e-6,
        1.0,
        64,
        1,
        2,
        thin_efficiency=0.25,
        merge_cost=6.0,
        source="assumed",
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


class Tiling(NamedTuple):
    """How many partial sums the two-stage reductions keep."""

    thin_grad: int
    tall_grad_x: int


def padded_rank(rank: int) -> int:
    """The power of two, at least 16, that holds `rank`: the width inside the Triton kernels."""
    return max(16, 1 << (rank - 1).bit_length())


def default_tiling(problem: Problem, multiprocessors: int) -> Tiling:
    """As the Triton backend tiles by default: 128-row tiles, 128-column tiles, two programs per
    multiprocessor.
    """
    row_tiles = -(-problem.M // 128)
    splits = min(2 * multiprocessors // -(-problem.K // 128), -(-problem.M // 256))
    return Tiling(min(row_tiles, 2 * multiprocessors), max(1, splits))


def plan(
    problem: Problem, strategy: str, device: Device, tiling: Tiling | None = None
) -> list[Launch]:
    """The Triton backend's launches for one call with a core, Ra = Rb, in order; each slice has its
    own up.

    The backward is the usual one: dX, and the gradients of down, core and up.
    """
    M, K, N, G, rank, *_ = problem
    b, wb = problem.compute_bytes, problem.weight_bytes
    f = problem.factor_bytes or b
    R = padded_rank(rank)
    in_place = R <= TRITON_IN_PLACE_RANK
    tiling = tiling or default_tiling(problem, device.multiprocessors)
    eff = device.gemm_efficiency
    if wb > b:
        eff *= 0.8  # the cast of w passes through registers inside the loop (assumed)
    ride = max(R, device.thin_columns) / device.tile_columns

    down = K * rank * f if in_place else K * R * b
    up = (N + G * rank) * rank * f if in_place else N * R * b  # with core
    ready = f == b and rank == R
    pad_down = [] if ready else [Launch("fold", 0, K * (rank * f + R * b))]
    fold_up = [] if in_place else [Launch("fold", 0, (N + G * rank) * rank * f + N * R * b)]
    pad_high = [] if in_place else pad_down

    def gemm(inner: int, columns: int, riding: bool, bias: bool, p: int, thin_out: int) -> Launch:
        flops = 2 * M * inner * columns * (1 + (ride if riding else 0)) + 2 * M * columns * R
        moved = (M * inner + M * columns + M * p + (inner * R if riding else 0)) * b + thin_out
        moved += inner * columns * wb + (columns * b if bias else 0)
        return Launch("gemm", flops, moved, eff)

    merge = Launch("merge", 0, N * K * (wb + b) + (N + K) * rank * f + G * rank * rank * f)
    library = Launch("library gemm", 2 * M * N * K, (M * (N + K) + N * K) * b)
    if not problem.backward:
        thin = Launch("thin", 2 * M * K * R, M * (K + rank) * b + down)
        if strategy == "fused":
            saved = rank if problem.training else 0
            return [*pad_down, *fold_up, gemm(K, N, True, True, saved, up)]
        if strategy == "split":
            return [*pad_high, thin, *fold_up, gemm(K, N, False, True, rank, up)]
        if not problem.training:
            return [merge, library]
        return [*pad_high, thin, merge, library]

    columns = (N * R + G * rank * R) if in_place else N * R
    dy_pass = Launch(
        "thin_grad", 4 * M * N * R, M * (N + 2 * rank) * b + up + tiling.thin_grad * columns * 4
    )
    x_pass = Launch("tall_grad", 2 * M * K * R, M * (K + rank) * b + tiling.tall_grad_x * K * R * 4)
    found = (N + K) * rank + (G * rank * rank if in_place else 0)
    reduce = Launch(
        "reduce", 0, (tiling.thin_grad * columns + tiling.tall_grad_x * K * R) * 4 + found * f
    )
    unfold = [] if in_place else [Launch("unfold", 0, 2 * N * rank * f)] * 2
    if strategy == "merged":
        return [*fold_up, dy_pass, merge, library, x_pass, reduce, *unfold]
    dx = gemm(N, K, False, False, rank, down)
    return [*fold_up, dy_pass, *pad_high, dx, x_pass, reduce, *unfold]


def torch_plan(problem: Problem, strategy: str, device: Device) -> list[Launch]:
    """The plain-torch backend's products and passes for one call."""
    M, K, N, _, r, *_ = problem
    b, wb = problem.compute_bytes, problem.weight_bytes
    thin_eff = device.thin_efficiency
    library = Launch("library gemm", 2 * M * N * K, (M * (N + K) + N * K) * b)
    wide = max(4, b)
    merge_bytes = N * K * (wb + wide + (b if b != wide else 0))
    merge = Launch("merge", 2 * N * K * r, merge_bytes, thin_eff / device.merge_cost)

    def thin(columns: int) -> Launch:
        return Launch("thin product", 2 * M * columns * r, M * columns * b, thin_eff)

    def update(columns: int) -> Launch:
        return Launch("update in place", 2 * M * columns * r, 2 * M * columns * b, thin_eff)

    if not problem.backward:
        if strategy == "split":
            return [thin(K), library, update(N)]
        return [*([thin(K)] if problem.training else []), merge, library]
    factors = [thin(N), thin(N), thin(K)]
    return [*factors, library, update(K)] if strategy == "split" else [*factors, merge, library]


def cpp_plan(problem: Problem, strategy: str, device: Device) -> list[Launch]:
    """The C++ CPU backend's steps for one call. It packs the weight once, and `merged` adds the
    low-rank product there, at half the rate of the main product (0.3 ns an element at rank 16).
    """
    M, K, N, _, r, *_ = problem
    b = problem.compute_bytes
    inner, columns = (N, K) if problem.backward else (K, N)
    pack = Launch("pack", 0, N * K * (problem.weight_bytes + max(4, b)))
    library = Launch("gemm", 2 * M * N * K, (M * (N + K) + N * K) * b)
    thin = [Launch("thin", 2 * M * inner * r, 0)]
    if problem.backward:
        thin += [Launch("tall", 2 * M * N * r, 0), Launch("tall", 2 * M * K * r, M * K * b)]
    if strategy == "merged":
        return [pack, Launch("merge", 2 * N * K * r, 0, 0.5), library, *thin]
    return [pack, library, Launch("r more steps", 2 * M * columns * r, 0), *thin]


def packing_pays(problem: Problem) -> bool:
    """Whether the C++ CPU backend, which packs the weight once per call, is the faster one.

    Over plain torch, forward and backward, float32, two threads: 0.76 to 0.92 of its speed for
    weights of 1.8 to 2.4 million elements up to 394 rows, 1.03 to 1.06 at 1,576; 1.01 to 1.34 for
    590 thousand elements and fewer at any number of rows. In bfloat16 it is 1.6 times as fast as a
    library without AMX. `python -m benchmarks.operators` measures it anew.
    """
    return problem.compute_bytes == 2 or problem.N * problem.K <= 1 << 20 or problem.M >= 512


def seconds(launches: Iterable[Launch], problem: Problem, device: Device) -> float:
    """The predicted time of launches run one after another."""
    rate = device.half_flops if problem.compute_bytes == 2 else device.float_flops
    return sum(
        max(launch.flops / (rate * launch.efficiency), launch.bytes_moved / device.bandwidth)
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
    problem: Problem, strategies: tuple[str, ...], backend: str
) -> tuple[dict[str, float], dict[str, str]]:
    """({strategy: predicted seconds}, {strategy: why it is ruled out})."""
    device = device_of(problem.device_type)
    return _candidates(problem, strategies, backend, device)


def _candidates(
    problem: Problem, strategies: tuple[str, ...], backend: str, device: Device
) -> tuple[dict[str, float], dict[str, str]]:
    if backend == "cpp":
        steps = {strategy: cpp_plan(problem, strategy, device) for strategy in strategies}
        return {name: seconds(plan, problem, device) for name, plan in steps.items()}, {}
    in_torch = backend not in ("triton", "cuda") or problem.rank > TRITON_MAX_RANK
    predicted: dict[str, float] = {}
    excluded: dict[str, str] = {}
    for strategy in strategies:
        if strategy == "merged" and problem.weight_bytes < 4:
            excluded[strategy] = (
                "the weight is stored in half precision: increments below half an ulp of W0"
                " would vanish"
            )
        elif strategy == "fused" and in_torch:
            excluded[strategy] = (
                f"rank {problem.rank} is above {TRITON_MAX_RANK}; plain torch runs it"
            )
        else:
            launches = (
                torch_plan(problem, strategy, device)
                if in_torch
                else plan(problem, strategy, device)
            )
            predicted[strategy] = seconds(launches, problem, device)
    return predicted, excluded


_Key = tuple[str, bool, int, int, int, int, int]
_measured: dict[_Key, dict[str, dict[int, float]]] = {}


def _key(problem: Problem, backend: str) -> _Key:
    p = problem
    return backend, p.backward, p.compute_bytes, p.weight_bytes, p.K, p.N, p.rank


_forget: list[Callable[[], None]] = []


def when_measured(forget: Callable[[], None]) -> None:
    """Have `forget` called after new measurements: for whoever remembers what `choose` said."""
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
def choose(problem: Problem, strategies: tuple[str, ...], backend: str) -> str:
    """The strategy of `strategies` with the least measured, else the least predicted, time.

    `merged` is ruled out for weights stored in half precision, where an increment below half an ulp
    of W0 would vanish.
    """
    _load_shipped()
    predicted, _ = candidates(problem, strategies, backend)
    if not predicted:
        return strategies[0]
    times = measured_ms(problem, predicted, backend) or predicted
    return min(times, key=lambda strategy: times[strategy])


@dataclass(frozen=True)
class Explanation:
    """What `auto` picks for a problem and why."""

    problem: Problem
    device: Device
    backend: str
    chosen: str
    source: str  # "measured" or "predicted"
    times_us: dict[str, float]
    excluded: dict[str, str]
    floor_us: float  # the frozen layer alone: its matrix product at the library's rate

    def __str__(self) -> str:
        p = self.problem
        part = "backward" if p.backward else "forward"
        lines = [
            f"{part} of [{p.M}, {p.K}] x [{p.K} -> {p.N}], G={p.G}, rank {p.rank}, "
            f"{8 * p.compute_bytes}-bit compute, weight stored in {8 * p.weight_bytes} bits",
            f"backend {self.backend} on {self.device.name} ({self.device.source}): {self.chosen}, "
            f"the least {self.source} time",
        ]
        for strategy, us in sorted(self.times_us.items(), key=lambda item: item[1]):
            lines.append(
                f"  {strategy:<7} {us:9.1f} us  {us / self.floor_us:5.2f} x the frozen layer"
            )
        lines.extend(f"  {strategy:<7} ruled out: {why}" for strategy, why in self.excluded.items())
        return "\n".join(lines)


_BACKEND_STRATEGIES = {
    "triton": ("fused", "split", "merged"),
    "cuda": ("fused", "split", "merged"),
    "cpp": ("split", "merged"),
    "torch": ("split", "merged"),
}


def explain(
    M: int,
    K: int,
    N: int,
    G: int = 1,
    rank: int = 16,
    dtype: torch.dtype = torch.bfloat16,
    device: str | None = None,
    *,
    backend: str | None = None,
    weight_dtype: torch.dtype | None = None,
    training: bool = True,
    backward: bool = False,
) -> Explanation:
    """Which strategy `auto` would take for this problem, with every candidate's time.

    Args:
        M, K, N, G, rank: rows, in_features, out_features, slices, Ra.
        dtype: of x and y. weight_dtype: as stored, dtype itself by default.
        device: a name of `DEVICES` ("H200", "CPU", ...); this machine's by default.
        backend: "triton", "cuda", "cpp" or "torch"; by default triton on a GPU, torch on a CPU.
        training: the forward saves P. backward: the backward operator instead of the forward.

    Raises:
        ValueError: no such device or backend.
    """
    if device is None:
        peaks = device_of("cuda" if torch.cuda.is_available() else "cpu")
    elif device in DEVICES:
        peaks = DEVICES[device]
    else:
        raise ValueError(f"device must be one of {tuple(DEVICES)}, got {device!r}")
    device_type = "cpu" if peaks.name == "CPU" else "cuda"
    backend = backend or ("torch" if device_type == "cpu" else "triton")
    if backend not in _BACKEND_STRATEGIES:
        raise ValueError(f"backend must be one of {tuple(_BACKEND_STRATEGIES)}, got {backend!r}")
    problem = Problem(
        M,
        K,
        N,
        G,
        rank,
        training or backward,
        (weight_dtype or dtype).itemsize,
        dtype.itemsize,
        device_type,
        backward,
    )
    strategies = _BACKEND_STRATEGIES[backend]
    predicted, excluded = _candidates(problem, strategies, backend, peaks)
    here = peaks == device_of(device_type)
    measured = measured_ms(problem, predicted, backend) if here else {}
    times = {s: 1e3 * ms for s, ms in measured.items()} or {
        s: 1e6 * t for s, t in predicted.items()
    }
    return Explanation(
        problem,
        peaks,
        backend,
        min(times, key=lambda s: times[s]),
        "measured" if measured else "predicted",
        times,
        excluded,
        1e6 * floor_seconds(problem, peaks),
    )


def floor_seconds(problem: Problem, device: Device) -> float:
    """The frozen layer's own product (y, or dX in the backward) at the library's rate: what no
    adapter goes below.
    """
    p = problem
    library = Launch(
        "library gemm", 2 * p.M * p.N * p.K, (p.M * (p.N + p.K) + p.N * p.K) * p.compute_bytes
    )
    return seconds([library], p, device) - device.launch_s


def _vit(width: int, tokens: int, images: int) -> list[tuple[str, int, int, int, int]]:
    M = images * tokens
    return [
        ("qkv", M, width, 3 * width, 3),
        ("proj", M, width, width, 1),
        ("fc1", M, width, 4 * width, 1),
        ("fc2", M, 4 * width, width, 1),
    ]


def models(images: int) -> dict[str, list[tuple[str, int, int, int, int]]]:
    """{model: [(layer, M, K, N, G), ...]} at 224×224 pixels."""
    swin = []
    for stage, width in enumerate((128, 256, 512, 1024)):
        swin += [
            (f"stage {stage + 1} {layer[0]}", *layer[1:])
            for layer in _vit(width, (56 >> stage) ** 2, images)
        ]
    return {
        "ViT-B/16": _vit(768, 197, images),
        "ViT-L/16": _vit(1024, 197, images),
        "ViT-H/14": _vit(1280, 257, images),
        "Swin-B": swin,
    }
