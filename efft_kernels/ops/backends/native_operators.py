"""The native operator of csrc/schemas.cpp for the gradients, as both native backends call it."""

from __future__ import annotations

import torch
from torch import Tensor

from .torch_backend import Grads, frozen_grads


def backward(
    dy: Tensor,  # [M, N]
    x: Tensor | None,  # [M, K]
    weight: Tensor,  # [N, K]
    p: Tensor | None,  # [M, Ra]
    down: Tensor,  # [K, Ra]
    core: Tensor | None,  # [G, Ra, Rb]
    up: Tensor,  # [1 or G, N/G, Rb]
    needs: tuple[bool, ...],
    strategy: int,
) -> Grads:
    """(dx, d_weight, d_bias, d_down, d_core, d_up); None where `needs` is False. `strategy` is the
    operator's own number for it."""
    need_x, need_weight, need_bias, need_down, need_core, need_up = needs
    need_core = need_core and core is not None
    d_weight, d_bias = frozen_grads(dy, x, weight, need_weight, need_bias)
    if not (need_x or need_down or need_core or need_up):
        return None, d_weight, d_bias, None, None, None
    dx, d_down, d_core, d_up = torch.ops.efft_kernels.native_bwd(
        dy,
        x if need_down else None,
        weight,
        p if need_core or need_up else None,
        down,
        core,
        up,
        need_x | need_down << 3 | need_core << 4 | need_up << 5,
        strategy,
    )
    return (
        dx if need_x else None,
        d_weight,
        d_bias,
        d_down if need_down else None,
        d_core if need_core else None,
        d_up if need_up else None,
    )
