"""The CUDA C++ backend: float16 and bfloat16 on NVIDIA GPUs from compute capability 8.0 on.

    csrc/cuda/gemm/sm90.cuh   the GEMM on Hopper: tiles by TMA, wgmma; its loop can compute P
    csrc/cuda/gemm/sm80.cu    the same function on every other GPU, and for rows of any alignment
    csrc/cuda/passes/         passes over a tall matrix: tall·thin, tall^T·thin, two-stage sums
    csrc/cuda/factors/        the fold of (down, core, up), W + ΔW, and d_core and d_up from d_B
    csrc/cuda/ops.cpp         the order in which they run

`fused` computes P inside the GEMM at ranks up to 16 on Hopper, where x, W and y have rows of a
multiple of 16 bytes and there are enough tiles to fill the GPU; elsewhere it runs as `split`.
`merged` leaves the product to the library. float32 and float64 are for the other backends. Ranks
above 128, and problems without rows or columns, run in plain torch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..cost_model import Problem
from ..schemas import STRATEGY_CODES
from . import native_library, torch_backend
from .cuda_cost import MAX_RANK, excluded, launches
from .fallback import note_rank, rows, too_old, torch_strategy
from .torch_backend import Grads

NAME = "cuda"
NATIVE = True
STRATEGIES = ("fused", "split", "merged")
DTYPES = (torch.float16, torch.bfloat16)

__all__ = [
    "DTYPES",
    "MAX_RANK",
    "NAME",
    "NATIVE",
    "STRATEGIES",
    "backward",
    "excluded",
    "forward",
    "launches",
    "out_of_reach",
    "preferred",
    "rejects",
    "unavailable",
]


def unavailable() -> str | None:
    """Why this backend cannot run here, and what would change that. Loads the library."""
    return native_library.cuda_unavailable()


def rejects(x: Tensor) -> str | None:
    """Why x cannot be taken: its dtype or its device."""
    if x.dtype not in DTYPES:
        return f"dtype must be float16 or bfloat16, got {x.dtype}; use backend='triton' or 'torch'"
    if not x.is_cuda:
        return f"x is on {x.device}; move it to a CUDA device or use backend='torch'"
    return too_old(x.device.index)


def out_of_reach(problem: Problem) -> bool:
    """Whether plain torch runs instead: nothing to multiply, or a rank beyond what a tile's
    registers hold.
    """
    return _beyond(problem.rank) or problem.N == 0 or problem.K == 0


def preferred(problem: Problem) -> bool:
    """Whether `auto` may take this backend: always."""
    return True


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
    if _in_torch(x.shape[0], weight, bias, down, up):
        return torch_backend.forward(
            x, weight, bias, down, core, up, save_p=save_p, strategy=torch_strategy(strategy)
        )
    y, p = torch.ops.efft_kernels.native_fwd(
        rows(x), rows(weight), bias, down, core, up, save_p, STRATEGY_CODES[strategy]
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
    if _in_torch(dy.shape[0], weight, None, down, up):
        return torch_backend.backward(
            dy, x, weight, p, down, core, up, needs=needs, strategy=torch_strategy(strategy)
        )
    return native_library.backward(
        rows(dy),
        None if x is None else rows(x),
        rows(weight),
        None if p is None else rows(p),
        down,
        core,
        up,
        needs,
        strategy,
    )


def _in_torch(m: int, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor) -> bool:
    """Whether plain torch runs instead: a rank beyond the kernels, nothing to launch on, or float64
    tensors under autocast.
    """
    if _beyond(down.shape[1]) or m == 0 or weight.numel() == 0:
        return True
    return any(t is not None and t.dtype == torch.float64 for t in (weight, bias, down, up))


def _beyond(rank: int) -> bool:
    if rank > MAX_RANK:
        note_rank(rank, MAX_RANK, "CUDA")
    return rank > MAX_RANK
