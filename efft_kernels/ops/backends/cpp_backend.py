"""The C++ backend on the CPU: both passes as one product in tiles, with the thin products before it
(csrc/cpu).

A thread packs the part of the frozen weight that a tile reads into memory that stays in its cache.
Either the low-rank product takes r more steps of the inner loop (`split`: [x|P]·[W|B]^T), or its
sum with the weight is formed while packing, in the accumulation dtype and never rounded to the
storage dtype (`merged`).

A bfloat16 x or dY goes into all products as it is, two numbers at a time, where the processor has
AVX512_BF16: then W, down, B, P and S are rounded to bfloat16, as torch does under autocast (`split`
alone), and sums are float32.
"""

from __future__ import annotations

import os
from functools import cache

import torch
from torch import Tensor

from ..cost_model import Device, Launch, Problem
from ..schemas import STRATEGY_CODES
from . import native_library, torch_backend
from .torch_backend import Grads

NAME = "cpp"
NATIVE = True
STRATEGIES = ("split", "merged")
TILE_ROWS = 400  # kTileRows of csrc/cpu/blocking.h
ISA_VARIABLE = "EFFT_KERNELS_CPU_ISA"
DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def unavailable() -> str | None:
    """Why this backend cannot run here, and what would change that."""
    return native_library.load_cpu()


def rejects(x: Tensor) -> str | None:
    """Why x cannot be taken: its dtype or its device."""
    if x.device.type != "cpu":
        return f"x is on {x.device}; move it to the CPU or use another backend"
    if x.dtype not in DTYPES:
        return f"dtype must be float32, float64 or bfloat16, got {x.dtype}; use backend='torch'"
    return None


def out_of_reach(problem: Problem) -> bool:
    """Whether plain torch runs instead: nothing to multiply."""
    return problem.N == 0 or problem.K == 0


def preferred(problem: Problem) -> bool:
    """Whether this backend is faster than plain torch: always, but for one row of a large weight,
    and for bfloat16 beside a library that has AMX for it.

    Time over plain torch's, forward and backward, float32, two threads of an AMD EPYC, weights of
    0.1 to 6.5 million elements: 0.45 to 0.9 from 8 rows on. One row takes 0.6 to 1.0 where the
    weight comes from memory, and up to twice as long where it is in cache. In bfloat16 it
    multiplies with AVX512_BF16, as the library does, and takes 0.87 to 0.9 of plain torch's time;
    without that the library is several times slower. AMX, which is several times as fast, was not
    measured. `python -m benchmarks.operators` measures it anew.
    """
    if problem.compute_bytes == 2:
        return not _library_has_amx()
    return problem.M > 1 or problem.N * problem.K <= 1 << 20


@cache
def _library_has_amx() -> bool:
    return bool(torch.cpu.get_capabilities().get("amx_bf16", False))


def excluded(problem: Problem, strategy: str) -> str | None:
    """Why `auto` must not take the strategy: `merged` rounds nothing to the weight's storage dtype,
    so that it may always be right, but it multiplies in float32."""
    if strategy == "merged" and problem.compute_bytes == 2 and _multiplies_pairs():
        return "it multiplies in float32, and split two bfloat16 numbers at a time"
    return None


@cache
def _multiplies_pairs() -> bool:
    """Whether the library takes its kernels for AVX512_BF16."""
    if os.environ.get(ISA_VARIABLE, "avx512_bf16") != "avx512_bf16":
        return False
    return bool(torch.cpu.get_capabilities().get("avx512_bf16", False))


def launches(problem: Problem, strategy: str, device: Device) -> list[Launch]:
    """The steps of one call. `merged` adds the low-rank product while a tile of at most TILE_ROWS
    rows packs its part of the weight, at half the rate of the main product (0.3 ns an element at
    rank 16).
    """
    M, K, N, _, r, *_ = problem
    b = problem.compute_bytes
    inner, columns = (N, K) if problem.backward else (K, N)
    pack = Launch("pack", 0, N * K * problem.weight_bytes)
    library = Launch("gemm", 2 * M * N * K, M * (N + K) * b)
    thin = [Launch("thin", 2 * M * inner * r, 0)]
    if problem.backward:
        thin += [Launch("tall", 2 * M * N * r, 0), Launch("tall", 2 * M * K * r, M * K * b)]
    if strategy == "merged":
        tiles = -(-M // TILE_ROWS)
        return [pack, Launch("merge", 2 * N * K * r * tiles, 0, 0.5), library, *thin]
    return [pack, library, Launch("r more steps", 2 * M * columns * r, 0), *thin]


def forward(
    x: Tensor,  # [M, K]
    weight: Tensor,  # [N, K]
    bias: Tensor | None,  # [N]
    down: Tensor,  # [K, Ra]
    core: Tensor | None,  # [G, Ra, Rb]
    up: Tensor,  # [1 or G, N/G, Rb]
    *,
    save_p: bool,
    strategy: str,
) -> tuple[Tensor, Tensor | None]:
    """(y [M, N], P [M, Ra] if save_p else None), both in x's dtype."""
    if weight.numel() == 0:
        return torch_backend.forward(
            x, weight, bias, down, core, up, save_p=save_p, strategy="split"
        )
    y, p = torch.ops.efft_kernels.native_fwd(
        x, weight, bias, down, core, up, save_p, STRATEGY_CODES[strategy]
    )
    return y, p if save_p else None


def backward(
    dy: Tensor,  # [M, N]
    x: Tensor | None,  # [M, K]
    weight: Tensor,  # [N, K]
    p: Tensor | None,  # [M, Ra]
    down: Tensor,  # [K, Ra]
    core: Tensor | None,  # [G, Ra, Rb]
    up: Tensor,  # [1 or G, N/G, Rb]
    *,
    needs: tuple[bool, ...],
    strategy: str,
) -> Grads:
    """(dx, d_weight, d_bias, d_down, d_core, d_up); None where `needs` is False."""
    if weight.numel() == 0:
        return torch_backend.backward(
            dy, x, weight, p, down, core, up, needs=needs, strategy="split"
        )
    return native_library.backward(dy, x, weight, p, down, core, up, needs, strategy)
