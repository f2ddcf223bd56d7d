"""The C++ backend on the CPU: both passes over blocks of rows that stay in cache (csrc/cpu).

The frozen weight is packed once per call. Either the low-rank product takes r more steps of the
inner loop (`split`: [x|P]·[W|B]^T, P made from the same block of rows), or its sum with the weight
is formed while packing, in the accumulation dtype and never rounded to the storage dtype
(`merged`). One read of x and of dY serves the main product and the thin ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..cost_model import Device, Launch, Problem
from ..schemas import STRATEGY_CODES
from . import native_library, torch_backend
from .torch_backend import Grads

NAME = "cpp"
NATIVE = True
STRATEGIES = ("split", "merged")
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
    """Whether this backend, which packs the weight once per call, is faster than plain torch.

    Over plain torch, forward and backward, float32, two threads, AVX-512: 1.05 to 1.26 times as
    fast for weights of 0.6 to 2.4 million elements from 197 rows on, 0.93 to 1.07 at 64; for 3 to
    6.5 million 0.86 to 1.08 up to 394 rows, 0.87 to 1.28 from 788 on. In bfloat16 it is several
    times as fast as a library without AMX. `python -m benchmarks.operators` measures it anew.
    """
    if problem.compute_bytes == 2 or problem.M >= 512:
        return True
    elements = problem.N * problem.K
    return elements <= (5 << 19 if problem.M >= 128 else 1 << 20)


def excluded(problem: Problem, strategy: str) -> str | None:
    """Why `auto` must not take the strategy: it may take both, since `merged` rounds nothing to the
    weight's storage dtype."""
    return None


def launches(problem: Problem, strategy: str, device: Device) -> list[Launch]:
    """The steps of one call. The weight is packed once, and `merged` adds the low-rank product
    there, at half the rate of the main product (0.3 ns an element at rank 16).
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
