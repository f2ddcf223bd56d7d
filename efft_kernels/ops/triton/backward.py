"""The six gradients: which passes over dY and x, in which order.

With P = x·down saved by the forward and B = stack_g up[g]·core[g]^T:

    S = dY·B            dX = dY·W + S·down^T          d_down = x^T·S
    d_B = dY^T·P        d_core[g] = d_B[g]^T·up[g]    d_up[g] = d_B[g]·core[g]
                                                      (summed over g when `up` is shared)

    fused            gemm (dX, S rides and is stored), tall_grad (x, S), tall_grad (dY, P), reduce
    split, merged    thin (S and the partial sums of d_B from one pass over dY), gemm (dX) or W + ΔW
                     and the library's GEMM, tall_grad (x, S), reduce
    dX not needed    as split, without the GEMM

So dY is read twice and x once for everything, whatever G is: dX needs a GEMM over rows of dY while
d_B reduces over them. No temporary has M·N or M·K elements; the largest are the partial sums.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import torch_backend
from ..torch_backend import Grads
from .factors import launch_fold
from .forward import (
    merged_weight,
    out_of_reach,
    rows,
    thin_buffer,
    torch_strategy,
)
from .gemm import launch_gemm
from .launch import plans_of
from .thin import launch_reduce, launch_tall_grad, launch_thin
from .tuning import can_ride, dot_precision


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
    m = dy.shape[0]
    n, k = weight.shape
    ra = down.shape[1]
    if out_of_reach(m, n, k, ra):
        return torch_backend.backward(
            dy, x, weight, p, down, core, up, needs=needs, strategy=torch_strategy(strategy)
        )
    need_x, need_weight, need_bias, need_down, need_core, need_up = needs
    plans = plans_of(
        (dy, x, weight, p, down, core, up), "bwd", needs, strategy, dot_precision(dy.dtype)
    )
    dy = rows(dy)
    dx = d_down = d_core = d_up = None
    d_weight, d_bias = torch_backend.frozen_grads(dy, x, weight, need_weight, need_bias)
    need_fold_grad = need_core or need_up
    grad_p = rows(p) if need_fold_grad and p is not None else None

    s = partial = None
    if need_down or need_x:
        b, down_in = launch_fold(down, core, up, n, dy.dtype, plans)
        rank = b.shape[1]
        if strategy == "fused" and not can_ride(dy.dtype, rank):
            strategy = "split"
        ride = need_x and strategy == "fused"
        if need_down or (need_x and strategy == "split"):
            s = thin_buffer(dy, ra, rank)
        if ride:
            dx = launch_gemm(dy, weight, None, b, down_in, s, width=ra, ride=True, plans=plans)
        elif s is not None:
            partial = launch_thin(dy, b, s, grad_p, plans=plans)
        if need_x and strategy == "split":
            dx = launch_gemm(dy, weight, None, b, down_in, s, width=ra, ride=False, plans=plans)
        elif need_x and strategy == "merged":
            dx = torch.mm(dy, merged_weight(weight, down, core, up, dy.dtype, plans))
    x_partial = None
    if need_down:
        assert x is not None and s is not None
        x_partial = launch_tall_grad(rows(x), s, plans=plans, name="tall_grad x")
    if grad_p is not None:
        if partial is None:
            partial = launch_tall_grad(dy, grad_p, plans=plans, name="tall_grad dy")
        folded = core is None  # then d_up is d_B
        d_b, d_down = launch_reduce(
            partial, x_partial, ra, (up.dtype, down.dtype), plans, up.shape if folded else None
        )
        if folded:
            d_up = d_b if need_up else None
        else:
            d_core, d_up = torch_backend.unfold_grads(d_b, core, up, need_core, need_up)
    elif x_partial is not None:
        d_down, _ = launch_reduce(x_partial, None, ra, (down.dtype, down.dtype), plans)
    return dx, d_weight, d_bias, d_down, d_core, d_up
