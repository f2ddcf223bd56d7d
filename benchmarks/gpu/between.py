"""Time the kernels between the GEMMs, and ways for a library GEMM to take a low-rank term along.

    python -m benchmarks.gpu.between [--device cuda|cpu] [--out CSV] [--seconds S]
    python -m benchmarks.gpu.between --compile      # no GPU: registers and stack of every candidate

Each candidate is first held to the error budget (at most twice plain torch's error, both against
float64); one that fails it is not timed. Times are medians of graph replays with a cold L2 cache,
candidates and torch in interleaved rounds. Two of torch's are given: `frozen_us`, what a
frozen model runs in this place, and `plain_us`, with the low-rank products in torch as well.
`--device cpu` walks through all of it with tiny shapes in Triton's interpreter.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.lib import rows, timing
from efft_kernels import available_backends, low_rank_linear
from efft_kernels.testing.error_budget import BUDGET, error_ratio

COLUMNS = rows.columns(
    f"kernel M C r variant config us bytes_moved gbps frozen_us plain_us err_ratio registers"
    f" stack_bytes note {rows.PROVENANCE}"
)
EPS = 1e-6
aten = torch.ops.aten

Outputs = dict[str, Tensor]


class Shape(NamedTuple):
    """Rows, width, hidden width, rank."""

    M: int
    K: int
    C: int
    r: int


VIT_B = Shape(12608, 768, 3072, 16)  # 64 images
VIT_L = Shape(12608, 1024, 4096, 16)
TINY = Shape(37, 40, 72, 5)


@dataclass
class Make:
    """Makes operands: random ones, or on the meta device only their sizes."""

    device: str
    dtype: torch.dtype

    def __call__(self, *size: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        dtype = dtype or self.dtype
        if self.device == "meta":
            return torch.empty(*size, dtype=dtype, device="meta")
        return (torch.randn(*size, device=self.device) * scale).to(dtype)


@dataclass
class Case:
    """One kernel at one shape: what to launch, what it replaces, what is right."""

    kernel: str
    shape: Shape
    variant: str  # of the operands, "" for the usual ones
    operands: Callable[[Make], dict[str, Tensor]]
    run: Callable[[dict[str, Tensor], Any], Outputs]
    frozen: Callable[[dict[str, Tensor]], object]
    plain: Callable[[dict[str, Tensor]], Outputs]  # in the operands' dtype, float64 included
    configs: list[Any] = field(default_factory=list)

    @property
    def width(self) -> int:
        return self.shape.C if self.kernel.startswith("act") else self.shape.K


def summed(*pairs: tuple[Tensor | None, tuple[int, int]]) -> list[Tensor | None]:
    """Up to five partial sums, each added up to [rows, columns], in one launch."""
    from efft_kernels.ops.backends.triton.reduce import launch_reduce

    outs = [None if p is None else p.new_empty(size, dtype=torch.float32) for p, size in pairs]
    launch_reduce([(partial, out) for (partial, _), out in zip(pairs, outs, strict=True)])
    return outs


def norm_fwd_case(shape: Shape, *, residual: bool, variant: str = "") -> Case:
    """`variant`: x32 is a float32 residual stream, w32 float32 norm weights."""
    from efft_kernels.ops.backends.triton.norm import Branch, NormConfig, launch_norm_fwd

    M, K, _, r = shape

    def operands(make: Make) -> dict[str, Tensor]:
        x_dtype = torch.float32 if "x32" in variant else None
        w_dtype = torch.float32 if "w32" in variant else None
        found = {
            "x": make(M, K, dtype=x_dtype),
            "weight": make(K, dtype=w_dtype),
            "bias": make(K, dtype=w_dtype),
            "down": make(K, r, scale=K**-0.5),
        }
        if residual:
            found |= {"y": make(M, K), "thin": make(M, r), "up": make(K, r, scale=r**-0.5)}
        return found

    def run(o: dict[str, Tensor], config: NormConfig) -> Outputs:
        branch = Branch(o["y"], o["thin"], o["up"]) if residual else None
        got = launch_norm_fwd(
            o["x"], branch, o["weight"], o["bias"], o["down"], eps=EPS,
            dtype=o["down"].dtype, config=config,
        )  # fmt: skip
        return {"out": got.out, "p": got.p, **({"z": got.z} if residual else {})}

    def norm(o: dict[str, Tensor], z: Tensor) -> Tensor:
        if o["weight"].dtype != z.dtype:
            z = z.to(o["weight"].dtype)
        return F.layer_norm(z, (K,), o["weight"], o["bias"], EPS).to(o["down"].dtype)

    def frozen(o: dict[str, Tensor]) -> object:
        return norm(o, o["x"] + o["y"] if residual else o["x"])

    def plain(o: dict[str, Tensor]) -> Outputs:
        z = o["x"]
        if residual:
            z = z + torch.addmm(o["y"], o["thin"], o["up"].T)
        out = norm(o, z)
        return {"out": out, "p": out @ o["down"], **({"z": z} if residual else {})}

    configs = [
        NormConfig(16, 256, True, 4),
        NormConfig(16, 256, True, 8),
        NormConfig(32, 256, True, 8),
        NormConfig(16, 256, False, 4),
        NormConfig(16, 256, False, 8),
        NormConfig(32, 128, False, 8),
    ]
    if not residual:
        configs += [NormConfig(4, 256, True, 4), NormConfig(16, 1024, True, 8)]
    name = "norm_residual_fwd" if residual else "norm_fwd"
    return Case(name, shape, variant, operands, run, frozen, plain, configs)


class TwoPasses(NamedTuple):
    """dz in one launch and d_down's partial sums in another."""

    norm: Any  # NormConfig
    down_grad: Any  # PassConfig


def norm_bwd_case(shape: Shape, *, variant: str = "") -> Case:
    from efft_kernels.ops.backends.triton.configs import PassConfig
    from efft_kernels.ops.backends.triton.norm import (
        NormConfig,
        launch_norm_bwd,
        launch_norm_down_grad,
    )

    M, K, _, r = shape

    def operands(make: Make) -> dict[str, Tensor]:
        x_dtype = torch.float32 if "x32" in variant else None
        w_dtype = torch.float32 if "w32" in variant else None
        z = make(M, K, dtype=x_dtype)
        if make.device == "meta":
            mean, rstd = make(M, 1, dtype=torch.float32), make(M, 1, dtype=torch.float32)
        else:
            mean = z.float().mean(1, keepdim=True)
            rstd = (z.float().var(1, keepdim=True, correction=0) + EPS).rsqrt()
        return {
            "dout": make(M, K),
            "z": z,
            "mean": mean,
            "rstd": rstd,
            "weight": make(K, dtype=w_dtype),
            "bias": make(K, dtype=w_dtype),
            "s": make(M, r),
            "down": make(K, r, scale=r**-0.5),
            "residual": make(M, K, dtype=x_dtype),
        }

    def run(o: dict[str, Tensor], config: NormConfig | TwoPasses) -> Outputs:
        two = isinstance(config, TwoPasses)
        normed = o["z"], o["mean"], o["rstd"], o["weight"], o["bias"], o["s"]
        got = launch_norm_bwd(
            o["dout"], *normed, o["down"], o["residual"],
            down_grad=not two, config=config.norm if two else config,
        )  # fmt: skip
        partial = launch_norm_down_grad(*normed, config=config.down_grad) if two else got.d_down
        (d_down,) = summed((partial, (K, r)))
        return {"dz": got.dz, "d_down": d_down}

    def backward(o: dict[str, Tensor], dout: Tensor) -> Tensor:
        z, weight, bias = o["z"], o["weight"], o["bias"]
        if weight.dtype != z.dtype:
            z = z.to(weight.dtype)
        dout = dout.to(z.dtype)
        mean, rstd = o["mean"], o["rstd"]
        dz, _, _ = aten.native_layer_norm_backward(
            dout, z, [K], mean, rstd, weight, bias, [True, False, False]
        )
        return dz.to(o["residual"].dtype) + o["residual"]

    def frozen(o: dict[str, Tensor]) -> object:
        return backward(o, o["dout"])

    def plain(o: dict[str, Tensor]) -> Outputs:
        z = o["z"].to(o["weight"].dtype)
        out = F.layer_norm(z, (K,), o["weight"], o["bias"], EPS).to(o["s"].dtype)
        dz = backward(o, torch.addmm(o["dout"], o["s"], o["down"].T))
        return {"dz": dz, "d_down": out.T @ o["s"]}

    configs = [
        NormConfig(16, 256, True, 8, 132),
        NormConfig(16, 256, False, 8, 132),
        NormConfig(16, 256, False, 8, 264),
        NormConfig(16, 256, True, 16, 132),
        TwoPasses(NormConfig(16, 256, True, 8), PassConfig(64, 128, 22, 4, 2)),
        TwoPasses(NormConfig(16, 256, False, 8), PassConfig(64, 64, 22, 4, 3)),
        TwoPasses(NormConfig(16, 256, True, 4), PassConfig(64, 128, 44, 4, 3)),
    ]
    return Case("norm_bwd", shape, variant, operands, run, frozen, plain, configs)


def act_fwd_case(shape: Shape, *, variant: str = "") -> Case:
    """`variant`: tanh is GELU's approximation by tanh."""
    from efft_kernels.ops.backends.triton.act import ActConfig, launch_act_fwd

    M, _, C, r = shape
    approximate = "tanh" if variant == "tanh" else "none"

    def operands(make: Make) -> dict[str, Tensor]:
        return {
            "y": make(M, C),
            "bias": make(C),
            "thin": make(M, r),
            "up": make(C, r, scale=r**-0.5),
            "down": make(C, r, scale=C**-0.5),
        }

    def run(o: dict[str, Tensor], config: ActConfig) -> Outputs:
        act = "gelu_tanh" if variant == "tanh" else "gelu"
        got = launch_act_fwd(
            o["y"], o["bias"], o["thin"], o["up"], o["down"], act=act, config=config
        )
        p = got.p
        if p is not None and p.dim() == 3:
            (p,) = summed((p, (M, r)))
        return {"h": got.h, "a": got.a, "p": p}

    def frozen(o: dict[str, Tensor]) -> object:
        return F.gelu(o["y"], approximate=approximate)

    def plain(o: dict[str, Tensor]) -> Outputs:
        h = torch.addmm(o["y"] + o["bias"], o["thin"], o["up"].T)
        a = F.gelu(h, approximate=approximate)
        return {"h": h, "a": a, "p": a @ o["down"]}

    configs = [
        ActConfig(64, 32, 1, 4, 3),
        ActConfig(64, 32, 8, 4, 2),
        ActConfig(64, 32, 8, 4, 3),
        ActConfig(64, 64, 4, 4, 2),
        ActConfig(64, 64, 4, 4, 3),
        ActConfig(64, 64, 2, 4, 2, 168),
        ActConfig(128, 32, 8, 8, 2),
        ActConfig(32, 64, 4, 2, 2),
    ]
    return Case("act_fwd", shape, variant, operands, run, frozen, plain, configs)


def act_bwd_case(shape: Shape, *, variant: str = "") -> Case:
    from efft_kernels.ops.backends.triton.act import ActConfig, launch_act_bwd

    M, _, C, r = shape
    approximate = "tanh" if variant == "tanh" else "none"

    def operands(make: Make) -> dict[str, Tensor]:
        return {
            "dout": make(M, C),
            "h": make(M, C),
            "s": make(M, r),
            "down": make(C, r, scale=r**-0.5),
            "thin": make(M, r),
            "up": make(C, r, scale=C**-0.5),
        }

    def run(o: dict[str, Tensor], config: ActConfig) -> Outputs:
        act = "gelu_tanh" if variant == "tanh" else "gelu"
        got = launch_act_bwd(
            o["dout"], o["h"], o["s"], o["down"], o["thin"], o["up"], act=act, config=config
        )
        d_up, q, d_down = summed((got.d_up, (C, r)), (got.q, (M, r)), (got.d_down, (C, r)))
        return {"dh": got.dh, "q": q, "d_up": d_up, "d_down": d_down}

    def frozen(o: dict[str, Tensor]) -> object:
        return aten.gelu_backward(o["dout"], o["h"], approximate=approximate)

    def plain(o: dict[str, Tensor]) -> Outputs:
        da = torch.addmm(o["dout"], o["s"], o["down"].T)
        dh = aten.gelu_backward(da, o["h"], approximate=approximate)
        a = F.gelu(o["h"], approximate=approximate)
        return {"dh": dh, "q": dh @ o["up"], "d_up": dh.T @ o["thin"], "d_down": a.T @ o["s"]}

    configs = [
        ActConfig(64, 64, 11, 4, 1),
        ActConfig(64, 64, 11, 4, 2),
        ActConfig(64, 64, 5, 4, 2),
        ActConfig(64, 64, 5, 4, 3),
        ActConfig(64, 32, 11, 4, 2),
        ActConfig(64, 64, 8, 4, 2, 168),
        ActConfig(32, 64, 11, 4, 2),
        ActConfig(128, 64, 11, 8, 2),
    ]
    return Case("act_bwd", shape, variant, operands, run, frozen, plain, configs)


def cases(shape: Shape, variant: str = "") -> list[Case]:
    """The five kernels; those whose operands a variant changes."""
    norms = [
        norm_fwd_case(shape, residual=False, variant=variant),
        norm_fwd_case(shape, residual=True, variant=variant),
        norm_bwd_case(shape, variant=variant),
    ]
    acts = [act_fwd_case(shape, variant=variant), act_bwd_case(shape, variant=variant)]
    return acts if variant == "tanh" else norms if variant else norms + acts


def later_cases(tiny: bool) -> list[Case]:
    """What the best configs of ViT-B's rank 16 are also timed at."""
    shapes = [] if tiny else [VIT_L, VIT_B._replace(r=32)]
    found = [case for shape in shapes for case in cases(shape)]
    usual = TINY if tiny else VIT_B
    return found + [case for variant in ("x32w32", "tanh") for case in cases(usual, variant)]


# Compiling


class Compiled(NamedTuple):
    kernel: str
    registers: int
    stack_bytes: int


Usage = list[Compiled] | str  # of all that a candidate launches; what failed in words


def compiled_by(launch: Callable[[], object], arch: int) -> Usage:
    """Compile all that a call on meta or CPU tensors launches, into Triton's cache on disk."""
    from efft_kernels.ops.backends.triton.launch_cache import CachedLaunch
    from efft_kernels.testing.fake_gpu import fake_gpu

    found: list[Any] = []

    def warm(launch, tensors, fresh=(), descriptors=()):
        arguments = (*tensors, *fresh, *descriptors, *launch.arguments)
        found.append(launch.kernel.warmup(*arguments, grid=launch.grid, **launch.options))

    try:
        with fake_gpu(arch), mock.patch.object(CachedLaunch, "__call__", warm):
            launch()
        return [inspected(kernel) for kernel in found]
    except Exception as error:  # one candidate must not stop the others
        return f"{type(error).__name__}: {str(error).strip()[:200]}"


def inspected(compiled: Any) -> Compiled:
    """Registers and stack, by cuobjdump."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        command = [tool, "--dump-resource-usage", cubin.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    used = re.search(r"REG:(\d+)\s+STACK:(\d+)", usage)
    registers, stack = (int(used[1]), int(used[2])) if used else (-1, -1)
    return Compiled(compiled.metadata.name, registers, stack)


def _compile_job(kernel: str, shape: Shape, variant: str, config: Any, arch: int) -> Usage:
    case = next(case for case in cases(shape, variant) if case.kernel == kernel)
    make = Make("meta", torch.bfloat16)
    return compiled_by(lambda: case.run(case.operands(make), config), arch)


def _compile_low_rank_linear(shape: Shape, arch: int) -> None:
    for K, N in linears(shape).values():
        calls = forward_gemms(Make("cpu", torch.bfloat16), shape.M, K, N, shape.r, ("triton",))
        for name, call in calls.items():
            if "triton" in name:
                compiled_by(torch.no_grad()(call), arch)


class Compiler:
    """Compiles candidates ahead, in processes that start before this one touches CUDA.

    Args:
        processes: 0 leaves compiling to the first launch.
    """

    def __init__(self, arch: int, processes: int) -> None:
        self._arch = arch
        self._futures: dict[tuple[str, Shape, str, Any], Future[Usage]] = {}
        self._pool = (
            ProcessPoolExecutor(processes, mp_context=get_context("fork")) if processes else None
        )

    def start(self, case: Case) -> None:
        """Compile the candidates of a case in the background."""
        for config in case.configs if self._pool else ():
            key = case.kernel, case.shape, case.variant, config
            self._futures[key] = self._pool.submit(_compile_job, *key, self._arch)

    def usage(self, case: Case, config: Any, seconds: float) -> Usage:
        """What became of a candidate, waiting at most so long."""
        future = self._futures.get((case.kernel, case.shape, case.variant, config))
        if future is None:
            return []
        try:
            return future.result(timeout=max(seconds, 1.0))
        except TimeoutError:
            return "not compiled in time"

    def start_gemms(self, shape: Shape) -> None:
        """Compile low_rank_linear at the block's linears in the background."""
        if self._pool:
            self._pool.submit(_compile_low_rank_linear, shape, self._arch)

    def close(self) -> None:
        if self._pool:
            self._pool.shutdown(wait=False, cancel_futures=True)


# Measuring


@dataclass
class Bench:
    """Where it runs, until when, and where the rows go."""

    device: str
    out: Path | None
    seconds: float
    compiler: Compiler
    start: float = field(default_factory=time.perf_counter)

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device == "cuda" else torch.float32

    @property
    def slice_seconds(self) -> float:
        """For the rounds of one kernel at one shape."""
        return self.seconds / 100 if self.device == "cuda" else 0.0

    @property
    def left(self) -> float:
        return self.seconds - (time.perf_counter() - self.start)

    def late(self, what: str) -> bool:
        late = self.left < 0
        if late:
            print(f"{what}: skipped, {self.seconds:.0f} s are over", flush=True)
        return late

    def time(self, calls: dict[str, Callable[[], object]]) -> dict[str, float]:
        """Microseconds, medians."""
        timings = timing.interleave(
            calls,
            seconds=self.slice_seconds,
            device=self.device,
            graphs=self.device == "cuda",
            fewest_rounds=10 if self.device == "cuda" else 1,
            warm_ups=2 if self.device == "cuda" else 0,
        )
        return {name: 1e3 * timings.time(name).p50 for name in calls}

    def write(self, **cells: Any) -> None:
        """Print a row, and add it to the file at once."""
        row = dict.fromkeys(COLUMNS, "") | cells
        shown = (
            f"{row['kernel']:18} {row['M']}x{row['C']} r{row['r']} {row['variant']:7}"
            f" {row['config']:44} {_us(row['us'])} us {_us(row['gbps'])} GB/s"
            f"  frozen {_us(row['frozen_us'])} plain {_us(row['plain_us'])}"
            f"  err {row['err_ratio']} reg {row['registers']} stack {row['stack_bytes']}"
            f" {row['note']}"
        )
        print(shown, flush=True)
        if self.out:
            try:
                origin = rows.provenance(self.device)
            except OSError:  # no git here
                origin = {"device": rows.device_kind(self.device)}
            rows.append_rows(self.out, COLUMNS, [row | origin])


def _us(value: Any) -> str:
    return f"{value:8.1f}" if isinstance(value, float) else f"{value!s:>8}"


def label(config: Any) -> str:
    """A config in a few letters."""
    if isinstance(config, TwoPasses):
        return " + ".join(map(label, config))
    rest = [
        f"{name[:5]}{value}" if not isinstance(value, bool) else ("hold" if value else "reload")
        for name, value in zip(config._fields[2:], config[2:], strict=True)
        if value is not None
    ]
    return f"{config[0]}x{config[1]} {' '.join(rest)}"


def bytes_moved(operands: dict[str, Tensor], outputs: Outputs) -> int:
    """Every operand and every result once; partial sums not counted."""
    tensors = [*operands.values(), *outputs.values()]
    return sum(t.numel() * t.element_size() for t in tensors)


def measure(case: Case, bench: Bench) -> list[Any]:
    """Check and time the candidates of one case.

    Returns:
        Those that passed, the fastest first.
    """
    torch.manual_seed(0)
    operands = case.operands(Make(bench.device, bench.dtype))
    plain = case.plain(operands)
    exact = case.plain({name: t.double() for name, t in operands.items()})
    common = {
        "kernel": case.kernel,
        "M": case.shape.M,
        "C": case.width,
        "r": case.shape.r,
        "variant": case.variant,
    }
    calls: dict[str, Callable[[], object]] = {
        "frozen": lambda: case.frozen(operands),
        "plain": lambda: case.plain(operands),
    }
    passed: dict[str, tuple[Any, float, Usage]] = {}
    moved = 0
    for config in case.configs:
        cells = common | {"config": label(config)}
        usage = bench.compiler.usage(case, config, bench.left)
        if isinstance(usage, str):
            bench.write(**cells, note=usage)
            continue
        try:
            got = case.run(operands, config)
            ratios = {name: error_ratio(got[name], plain[name], exact[name]) for name in exact}
        except Exception as error:  # a candidate that does not run must not stop the others
            bench.write(**cells, note=f"{type(error).__name__}: {str(error).strip()[:120]}")
            continue
        moved = bytes_moved(operands, got)
        worst = max(ratios, key=lambda name: math.inf if math.isnan(r := ratios[name]) else r)
        if not ratios[worst] <= BUDGET:
            bench.write(**cells, err_ratio=f"{ratios[worst]:.2f}", note=f"WRONG: {worst}")
            continue
        passed[label(config)] = config, ratios[worst], usage
        calls[label(config)] = lambda config=config: case.run(operands, config)
        del got
    del exact, plain
    us = bench.time(calls)
    for name, (_, ratio, usage) in passed.items():
        bench.write(
            **common,
            config=name,
            us=us[name],
            bytes_moved=moved,
            gbps=moved / us[name] / 1e3,
            frozen_us=us["frozen"],
            plain_us=us["plain"],
            err_ratio=f"{ratio:.2f}",
            registers=usage[0].registers if usage else "",
            stack_bytes=usage[0].stack_bytes if usage else "",
        )
    return [passed[name][0] for name in sorted(passed, key=us.__getitem__)]


# Library GEMMs


def linears(shape: Shape) -> dict[str, tuple[int, int]]:
    """(K, N) of a block's linears."""
    d, h = shape.K, shape.C
    return {"qkv": (d, 3 * d), "fc1": (d, h), "fc2": (h, d), "proj": (d, d)}


def forward_gemms(
    make: Make, M: int, K: int, N: int, r: int, backends: Sequence[str]
) -> dict[str, Callable[[], Tensor]]:
    """Ways to y = x·W^T + b + P·B^T; `plain` alone is without the last term."""
    weight, bias = make(N, K, scale=K**-0.5), make(N)
    down, up = make(K, r, scale=K**-0.5), make(N, r, scale=r**-0.5)
    x = make(M, K)
    p = x @ down
    calls: dict[str, Callable[[], Tensor]] = {"L0 plain": lambda: F.linear(x, weight, bias)}
    for extra in (r, 64):
        x_wide, w_wide = x.new_zeros(M, K + extra), x.new_zeros(N, K + extra)
        x_wide[:, :K], x_wide[:, K : K + r] = x, p
        w_wide[:, :K], w_wide[:, K : K + r] = weight, up
        calls[f"L1 extended K+{extra}"] = lambda a=x_wide, w=w_wide: F.linear(a, w, bias)
        view = x_wide[:, :K]
        calls[f"L3 plain, x a view of K+{extra}"] = lambda a=view: F.linear(a, weight, bias)
    calls["L2 then addmm_"] = lambda: F.linear(x, weight, bias).addmm_(p, up.T)
    for backend in backends:
        for strategy in ("split", "fused") if backend != "torch" else ("auto",):

            def call(backend: str = backend, strategy: str = strategy) -> Tensor:
                return low_rank_linear(
                    x, weight, bias, down, None, up[None], backend=backend, strategy=strategy
                )

            calls[f"L4 {backend} {strategy}, P too"] = call
    return calls


def dx_gemms(make: Make, M: int, K: int, N: int, r: int) -> dict[str, Callable[[], Tensor]]:
    """Ways to dx = dy·W + S·down^T; `plain` alone is without the last term."""
    dy, weight = make(M, N), make(N, K, scale=N**-0.5)
    s, down = make(M, r), make(K, r, scale=r**-0.5)
    calls: dict[str, Callable[[], Tensor]] = {"D0 plain": lambda: dy @ weight}
    for extra in (r, 64):
        dy_wide, w_wide = dy.new_zeros(M, N + extra), dy.new_zeros(N + extra, K)
        dy_wide[:, :N], dy_wide[:, N : N + r] = dy, s
        w_wide[:N], w_wide[N : N + r] = weight, down.T
        calls[f"D1 extended N+{extra}"] = lambda a=dy_wide, w=w_wide: a @ w
    calls["D2 then addmm_"] = lambda: (dy @ weight).addmm_(s, down.T)
    return calls


def measure_gemms(shape: Shape, bench: Bench) -> None:
    """The library's GEMMs at the four linears of a block."""
    M, r = shape.M, shape.r
    make = Make(bench.device, bench.dtype)
    reasons = available_backends()
    backends = [name for name in ("torch", "triton", "cuda") if reasons[name] is None]
    forward = functools.partial(forward_gemms, backends=backends)
    for linear, (K, N) in linears(shape).items():
        for direction, of in (("forward", forward), ("dx", dx_gemms)):
            name = f"gemm {linear} {direction}"
            if bench.late(name):
                continue
            calls = of(make, M, K, N, r)
            with torch.no_grad():
                results = {}
                for config, call in list(calls.items()):
                    try:
                        results[config] = call()
                    except Exception as error:  # an alternative that does not run here
                        note = f"{type(error).__name__}: {str(error).strip()[:120]}"
                        bench.write(kernel=name, M=M, C=N, r=r, config=config, note=note)
                        del calls[config]
                notes = {config: _agreement(config, results) for config in calls}
                us = bench.time(calls)
            plain = next(iter(us.values()))
            moved = (M * K + M * N + N * K) * (2 if bench.device == "cuda" else 4)
            for config, value in us.items():
                bench.write(
                    kernel=name, M=M, C=N, r=r, config=config, us=value, bytes_moved=moved,
                    gbps=moved / value / 1e3, frozen_us=plain, note=notes[config],
                )  # fmt: skip


def _agreement(config: str, results: dict[str, Tensor]) -> str:
    """Whether a result is near that of the plain way to the same."""
    plain = next(iter(results))
    with_term = next(name for name in results if "then addmm_" in name)
    expected = results[plain if "plain" in config else with_term].float()
    error = float((results[config].float() - expected).norm() / expected.norm())
    return "" if error < 0.01 else f"WRONG: differs by {error:.1e}"


def print_usage(selected: list[Case], compiler: Compiler) -> None:
    """Registers and bytes of stack of every candidate's kernels."""
    for case in selected:
        for config in case.configs:
            usage = compiler.usage(case, config, 3600.0)
            shown = usage if isinstance(usage, str) else [tuple(one) for one in usage]
            print(f"{case.kernel:18} {label(config):44} {shown}", flush=True)


def measure_all(first: list[Case], shape: Shape, bench: Bench, *, gemms: bool) -> None:
    """All candidates at one shape, the GEMMs, then the two best of each at the other shapes."""
    if gemms:
        bench.compiler.start_gemms(shape)
    later = []
    for case in first:
        if bench.late(case.kernel):
            continue
        best = measure(case, bench)[:2]
        for other in later_cases(shape is TINY):
            if other.kernel == case.kernel:
                other.configs = best
                bench.compiler.start(other)
                later.append(other)
    if gemms:
        measure_gemms(shape, bench)
    for case in later:
        if case.configs and not bench.late(f"{case.kernel} {case.shape} {case.variant}"):
            measure(case, bench)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, help="add the rows to this CSV")
    parser.add_argument("--seconds", type=float, default=60.0, help="start nothing new after these")
    parser.add_argument("--only", default="", help="a regular expression on kernels and 'gemm'")
    parser.add_argument("--compile", action="store_true", help="only compile, and print registers")
    parser.add_argument("--arch", type=int, default=90, help="compiled ahead for this GPU")
    parser.add_argument("--processes", type=int, default=max(1, (os.cpu_count() or 2) - 2))
    arguments = parser.parse_args()
    tiny = arguments.device == "cpu" and not arguments.compile
    if tiny and os.environ.get("TRITON_INTERPRET") != "1":
        os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are defined
        os.execv(sys.executable, [sys.executable, "-m", "benchmarks.gpu.between", *sys.argv[1:]])
    shape = TINY if tiny else VIT_B
    first = [case for case in cases(shape) if re.search(arguments.only, case.kernel)]
    compiler = Compiler(arguments.arch, 0 if tiny else arguments.processes)
    with contextlib.closing(compiler):
        for case in first:
            if tiny:
                del case.configs[1:-1]
            compiler.start(case)
        if arguments.compile:
            print_usage(first, compiler)
            return 0
        bench = Bench(arguments.device, arguments.out, arguments.seconds, compiler)
        measure_all(first, shape, bench, gemms=bool(re.search(arguments.only, "gemm")))
        print(f"done in {time.perf_counter() - bench.start:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
