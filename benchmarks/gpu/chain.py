"""Every launch of a chain (efft_kernels/ops/chains.py) by itself, in several block shapes.

    python -m benchmarks.gpu.chain [--images 64] [--rank 16] [--rounds 10] [--out chain.csv]
    python -m benchmarks.gpu.chain --compile    # no GPU: registers and stack of every launch

At the sizes of a ViT-B, beside the same step in torch's operators: microseconds with a cold L2
cache, and the relative difference of the results. The first shape of a launch is the shipped one.
"passes" are GELU by torch with passes for its thin products. The norm's gradient is timed with S
and d_B of the linear before it, by a pass of their own or in the same one. A whole training step is
measured by step.py.

Launches are compiled beforehand, in processes that start before CUDA does. `--device cpu` walks
through all of it with a tiny model in Triton's interpreter, in float16.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from efft_kernels.ops.backends import native_library
from efft_kernels.ops.backends.chain_steps import Norm, TorchSteps

from ..lib.rows import CHAIN_COLUMNS, Row, append_rows, provenance
from ..lib.timing import interleave
from .between import Usage, compiled_by, label

NATIVE = "CUDA C++"  # in the place of a block shape
NATIVE_BEFORE = "CUDA C++, the linear before in the same pass"
MOST_COMPILING = 60.0  # seconds that a measurement waits for all launches to be compiled
FARTHEST = 0.03  # a launch's results from torch's, relative; both round to bfloat16


class Shape(NamedTuple):
    """Rows, width, hidden width, rank, layers."""

    M: int
    K: int
    C: int
    r: int
    L: int


TINY = Shape(51, 48, 64, 5, 5)


def candidates(device: str) -> dict[str, list[Any]]:
    """By field of triton/chain.py's Configs, what is tried; the first is shipped."""
    from efft_kernels.ops.backends.triton.act import ActConfig
    from efft_kernels.ops.backends.triton.configs import PassConfig
    from efft_kernels.ops.backends.triton.norm import NormConfig

    if device == "cpu":
        # Several tiles in every direction at the sizes that the interpreter can do.
        return {
            "norm": [NormConfig(16, 16, True, 4)],
            "norm_grad": [NormConfig(4, 16, True, 4)],
            "norm_down_grad": [PassConfig(32, 16, 2, 4, 1)],
            "gather": [PassConfig(32, 16, 2, 4, 1)],
            "pair_grad": [PassConfig(32, 16, 2, 4, 1)],
            "gelu": [ActConfig(32, 32, 2, 4, 1), None],
            "gelu_grad": [ActConfig(32, 32, 2, 4, 1), None],
        }
    return {
        "norm": [NormConfig(16, 256, True, 4), NATIVE, NormConfig(4, 256, True, 4)],
        "norm_grad": [NormConfig(4, 256, True, 4), NATIVE, NATIVE_BEFORE],
        "norm_down_grad": [
            PassConfig(32, 64, 44, 4, 3),
            PassConfig(32, 64, 22, 4, 3),
        ],
        "gather": [
            PassConfig(32, 256, 30, 4, 3),
            PassConfig(64, 128, 15, 4, 3),
            PassConfig(64, 256, 30, 8, 3),
            PassConfig(64, 128, 29, 4, 3),
        ],
        "pair_grad": [
            PassConfig(64, 128, 528, 8, 3),
            PassConfig(64, 64, 528, 8, 3),
            PassConfig(32, 64, 528, 8, 4),
            PassConfig(32, 128, 528, 4, 3),
            PassConfig(64, 128, 132, 8, 3),
            PassConfig(128, 64, 528, 8, 3),
            NATIVE,
        ],
        "gelu": [
            ActConfig(32, 128, 1, 8, 3),
            None,
            ActConfig(32, 128, 2, 4, 2),
            ActConfig(64, 64, 4, 4, 2),
            ActConfig(64, 128, 4, 8, 3),
            ActConfig(32, 128, 3, 4, 2),
            ActConfig(32, 256, 2, 8, 2),
            ActConfig(32, 128, 1, 4, 2),
            ActConfig(16, 128, 1, 4, 3),
            ActConfig(16, 256, 1, 4, 2),
            NATIVE,
        ],
        "gelu_grad": [
            ActConfig(32, 128, 16, 4, 3),
            None,
            ActConfig(32, 128, 11, 8, 3, max_registers=128),
            ActConfig(64, 64, 8, 4, 3),
            ActConfig(32, 128, 22, 4, 3, max_registers=128),
            ActConfig(32, 128, 22, 8, 2, max_registers=128),
            ActConfig(64, 128, 11, 8, 2, max_registers=128),
            ActConfig(16, 256, 22, 8, 3, max_registers=128),
            ActConfig(32, 256, 22, 8, 2),
            NATIVE,
        ],
    }


def make_steps(shapes: Any) -> TorchSteps:
    """The steps as launches in these block shapes (triton/chain.py's Configs)."""
    from efft_kernels.ops.backends.cuda_chain import CudaSteps
    from efft_kernels.ops.backends.triton.chain import TritonSteps

    if not is_native(shapes):
        return TritonSteps(shapes)
    if (reason := native_library.cuda_unavailable()) is not None:
        raise RuntimeError(reason)
    return CudaSteps(
        shapes,
        pair_grad=shapes.pair_grad == NATIVE,
        before=shapes.norm_grad == NATIVE_BEFORE,
        gelu=shapes.gelu == NATIVE,
        gelu_grad=shapes.gelu_grad == NATIVE,
    )


def is_native(shapes: Any) -> bool:
    """Whether a step of these is in CUDA C++."""
    return NATIVE in shapes or NATIVE_BEFORE in shapes


def calls(
    steps: TorchSteps, shape: Shape, device: str, dtype: torch.dtype
) -> dict[str, Callable[[], Any]]:
    """Every launch of a step at a model's sizes, on random operands or the meta device's.

    A name's first word is the field of Configs that the launch depends on, if it is one.
    """
    M, K, C, r, L = shape

    def make(*size: int, like: torch.dtype = dtype) -> Tensor:
        if device == "meta":
            return torch.empty(size, dtype=like, device=device)
        return torch.randn(size, device=device).to(like)

    def sums(*names: str) -> tuple[Tensor, ...]:
        found = {
            "thin_grad": lambda: steps.thin_grad(y, down, p)[1],
            "tall_grad": lambda: steps.tall_grad(x, p),
            "norm_down_grad": lambda: steps.norm_down_grad(z, mean, rstd, norm, p),
        }
        return finished([found[name]() for name in names])

    def norm_grad() -> tuple[Tensor, ...]:
        got = steps.norm_grad(x, z, mean, rstd, norm, z, p, (down, p))
        return got.dz, got.dy, got.s, *finished([got.sum_b, got.sum_down])

    def finished(sums: list[Any]) -> tuple[Tensor, ...]:
        outs = tuple(grad(K) for _ in sums)
        steps.finish(list(zip(sums, outs, strict=True)))
        return outs

    def grad(columns: int) -> Tensor:
        return make(columns, r, like=torch.float32)

    def gather(copy: bool) -> tuple[Tensor | None, ...]:
        d_b = grad(3 * K)
        return *steps.gather_grad((x, y, x), b_qkv, p, copy, d_b, []), d_b

    def gelu_grad() -> tuple[Tensor, ...]:
        d_b, d_down = grad(C), grad(C)
        return *steps.gelu_grad(da, h, p, wide_down, p, d_b, d_down, []), d_b, d_down

    z, x, y, p = make(M, K, like=torch.float32), make(M, K), make(M, K), make(M, r)
    h, da = make(M, C), make(M, C)
    mean, rstd = make(M, like=torch.float32), make(M, like=torch.float32)
    norm = Norm(make(K, like=torch.float32), make(K, like=torch.float32), 1e-6)
    down, wide_down, b_qkv = make(K, r), make(C, r), make(3 * K, r)
    found: dict[str, Callable[[], Any]] = {
        "norm first": lambda: steps.norm(z, None, norm, down, dtype),
        "norm": lambda: steps.norm(z, y, norm, down, dtype),
        "norm_grad": norm_grad,
        "norm_down_grad": lambda: sums("thin_grad", "norm_down_grad"),
        "pair_grad": lambda: finished([*steps.pair_grad(x, y, down, down)]),
        "gather": lambda: gather(True),
        "gather (no copy)": lambda: gather(False),
        "gelu": lambda: steps.gelu(h, wide_down),
        "gelu_grad": gelu_grad,
    }
    for name, (n, k) in {"qkv": (3 * K, K), "proj": (K, K), "fc1": (C, K), "fc2": (K, C)}.items():
        weights = [make(n, k, like=torch.float32) for _ in range(L)]
        found[f"merge {name}"] = functools.partial(
            steps.merge, weights, make(L, n, r), make(L, k, r)
        )
    return found


def tried(what: str, device: str) -> list[Any]:
    """All block shapes of one launch."""
    from efft_kernels.ops.backends.triton.chain import Configs

    own = candidates(device)
    shipped = Configs(**{field: configs[0] for field, configs in own.items()})
    field = what.partition(" ")[0]
    return [shipped._replace(**{field: c}) for c in own.get(field, ())] or [shipped]


def shape_label(what: str, shapes: Any) -> str:
    """The block shape of a launch."""
    config = getattr(shapes, what.partition(" ")[0], None)
    if config is None:
        return "passes" if what.startswith("gelu") else ""
    return config if config in (NATIVE, NATIVE_BEFORE) else label(config)


# Compiling ahead


def _compile(shapes: Any, what: str, shape: Shape, arch: int) -> Usage:
    return compiled_by(calls(make_steps(shapes), shape, "meta", torch.bfloat16)[what], arch)


def compile_all(shape: Shape, arch: int, processes: int, seconds: float) -> bool:
    """Compile every launch into Triton's cache on disk, and print registers and stack.

    Returns:
        Whether all compiled.
    """
    whole = True
    until = time.perf_counter() + seconds
    pool = ProcessPoolExecutor(processes, mp_context=get_context("fork"))
    jobs = [
        (what, shapes, pool.submit(_compile, shapes, what, shape, arch))
        for what in calls(TorchSteps(), shape, "meta", torch.bfloat16)
        for shapes in tried(what, "cuda")
        if not is_native(shapes)
    ]
    for what, shapes, job in jobs:
        usage: Usage
        try:
            usage = job.result(timeout=max(1.0, until - time.perf_counter()))
        except Exception as error:  # then the first launch compiles it
            usage = f"{type(error).__name__}: {error}"
        text = usage if isinstance(usage, str) else "  ".join(map(_usage, usage))
        whole &= not isinstance(usage, str)
        print(f"compiled {what:27} {shape_label(what, shapes):36} {text}", flush=True)
    pool.shutdown(wait=False, cancel_futures=True)
    return whole


def _usage(one: Any) -> str:
    return f"{one.kernel}: {one.registers} registers, {one.stack_bytes} B stack;"


# Every launch by itself


def measure(shape: Shape, device: str, rounds: int, out: Path | None) -> bool:
    """Print each launch's microseconds in torch and in all block shapes, and how far its results
    are from torch's; append them to `out` as well.

    Returns:
        Whether all ran and were right.
    """
    dtype = torch.bfloat16 if device == "cuda" else torch.float16
    whole = True
    for what in calls(TorchSteps(), shape, "meta", dtype):
        try:
            right, rows = _measure(what, shape, device, dtype, rounds)
            whole &= right
            if out is not None:
                append_rows(out, CHAIN_COLUMNS, rows)
        except Exception as error:  # one launch must not stop the others
            whole = False
            print(f"{what:27} FAILED: {type(error).__name__}: {str(error)[:300]}", flush=True)
    return whole


def _measure(
    what: str, shape: Shape, device: str, dtype: torch.dtype, rounds: int
) -> tuple[bool, list[Row]]:
    def made(steps: TorchSteps) -> Callable[[], Any]:
        torch.manual_seed(0)  # the same operands for all
        return calls(steps, shape, device, dtype)[what]

    timed = {"torch": made(TorchSteps())}
    apart: dict[str, str] = {"torch": ""}
    whole = True
    with torch.no_grad():
        expected = _tensors(timed["torch"]())
        for shapes in tried(what, device):
            name = shape_label(what, shapes) or "triton"
            call = made(make_steps(shapes))
            try:
                distance = _distance(_tensors(call()), expected)
            except Exception as error:  # one block shape must not stop the others
                whole = False
                print(f"{what:27} {name} FAILED: {str(error)[:200]}", flush=True)
                continue
            right = distance < FARTHEST
            whole &= right
            apart[name] = f"{distance:.0e}" if right else f"WRONG: {distance:.0e}"
            if right:
                timed[name] = call
        del expected
        timings = interleave(
            timed,
            seconds=0.0,
            device=device,
            graphs=device == "cuda",
            fewest_rounds=rounds,
            warm_ups=1 if device == "cuda" else 0,
        )
    cells = [f"{name} {1e3 * timings.time(name).p50:.1f}" for name in timed]
    distances = "; ".join(filter(None, apart.values()))
    print(f"{what:27} µs: {'; '.join(cells)}   apart: {distances}", flush=True)
    sizes = {"launch": what, "M": shape.M, "K": shape.K, "C": shape.C, "r": shape.r}
    rows: list[Row] = []
    for name in timed:
        spread = timings.time(name)
        us = {p: f"{1e3 * getattr(spread, p):.1f}" for p in ("p20", "p50", "p80")}
        times = {f"us_{p}": value for p, value in us.items()}
        row = {**sizes, "form": name, "rounds": rounds, **times, "apart": apart[name]}
        rows.append({**row, **provenance(device)})
    return whole, rows


def _tensors(result: Any) -> list[Tensor]:
    return [t for t in (result if isinstance(result, tuple) else (result,)) if t is not None]


def _distance(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest relative difference of two results."""
    pairs = [
        (f.float().flatten(), e.float().flatten()) for f, e in zip(found, expected, strict=True)
    ]
    return max(float((f - e).norm() / e.norm()) for f, e in pairs)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--compile", action="store_true", help="only compile, and print registers")
    parser.add_argument("--arch", type=int, default=90, help="compiled ahead for this GPU")
    parser.add_argument("--processes", type=int, default=max(1, (os.cpu_count() or 2) - 2))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, help="append the rows to this CSV as well")
    options = parser.parse_args(arguments)
    if options.compile or options.device == "cuda":
        shape = Shape(options.images * 197, 768, 3072, options.rank, 12)
        seconds = 3600.0 if options.compile else MOST_COMPILING
        whole = compile_all(shape, options.arch, options.processes, seconds)
        if options.compile:
            return 0 if whole else 1
    else:
        if os.environ.get("TRITON_INTERPRET") != "1":
            os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are defined
            os.execv(sys.executable, [sys.executable, "-m", __spec__.name, *sys.argv[1:]])
        shape, options.rounds = TINY, 1
    return 0 if measure(shape, options.device, options.rounds, options.out) else 1


if __name__ == "__main__":
    sys.exit(main())
