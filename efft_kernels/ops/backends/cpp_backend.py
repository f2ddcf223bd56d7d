"""The C++ backend on the CPU: both passes over blocks of rows that stay in cache (csrc/cpu).

The frozen weight is packed once per call. Either the low-rank product takes r more steps of the
inner loop (`split`: [x|P]·[W|B]^T, P made from the same block of rows), or its sum with the weight
is formed while packing, in the accumulation dtype and never rounded to the storage dtype
(`merged`). One read of x and of dY serves the main product and the thin ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..cost_model import Problem
from . import native_library, native_operators, torch_backend
from .torch_backend import Grads

STRATEGIES = ("split", "merged")
DTYPES = (torch.float32, torch.float64, torch.bfloat16)

# As in csrc/schemas.cpp.
STRATEGY_CODES = {"split": 1, "merged": 2}


def unavailable() -> str | None:
    """Why this backend cannot run here, and what would change that."""
    return native_library.cpu_unavailable()


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
    return native_operators.backward(
        dy, x, weight, p, down, core, up, needs, STRATEGY_CODES[strategy]
    )
