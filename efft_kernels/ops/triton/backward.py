"""The six gradients: which passes over dY and x, in which order.

With P = x·down saved by the forward, Q_g = dY_g·up[g] and T_g = P·core[g]:

    S = Σ_g Q_g·core[g]^T    dX = dY·W + S·down^T     d_down = x^T·S
    d_core[g] = P^T·Q_g      d_up[g] = dY_g^T·T_g     (summed over g when `up` is shared)

    thin        one pass over dY: S, and the partial sums of d_core and d_up
    gemm        dX with its low-rank term; under `merged` W + ΔW and the library's GEMM
    tall_grad   one pass over x: the partial sums of d_down
    reduce      all partial sums

At ranks above 32 core and up are folded first (factors.py); `thin` then gives d_B, and plain torch
d_core and d_up from it.

Where neither d_core nor d_up is asked for, `fused` needs no pass for S: it rides in the GEMM, whose
loop takes B = stack_g up[g]·core[g]^T, folded by one small launch.

So dY is read twice and x once for everything, whatever G is: dX needs a GEMM over rows of dY while
d_up reduces over them. No temporary has M·N or M·K elements; the largest are the partial sums.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import torch_backend
from ..cost_model import padded_rank
from ..torch_backend import Grads
from .factors import launch_fold, launch_merge, read_in_place
from .forward import out_of_reach, rows, thin_buffer, torch_strategy
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
    if out_of_reach(m, n, k, ra, up.shape[2]):
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
    need_core = need_core and core is not None
    grad_p = rows(p) if (need_core or need_up) and p is not None else None

    merged = strategy == "merged"
    ride = need_x and grad_p is None and strategy == "fused" and can_ride(dy.dtype, padded_rank(ra))
    padded = not read_in_place(down, up)
    s = None
    if need_down or grad_p is not None or (need_x and not (ride or merged)):
        s = thin_buffer(dy, ra)
    up_in, core_in = up, core
    if ride or (padded and s is not None):
        up_in, core_in = launch_fold(up, core, dy.dtype, plans), None
    d_up_partial = d_core_partial = d_down_partial = None
    if s is not None and not ride:
        d_up_partial, d_core_partial = launch_thin(dy, up_in, core_in, s, grad_p, plans=plans)
    if need_x and merged:
        dx = torch.mm(dy, launch_merge(rows(weight), down, core, up, dy.dtype, plans))
    elif need_x:
        down_in = launch_fold(down, None, dy.dtype, plans, "pad down") if padded else down
        thin_in = up_in if ride else None
        dx = launch_gemm(dy, weight, None, thin_in, None, down_in, s, width=ra, plans=plans)
    if need_down:
        assert x is not None and s is not None
        d_down_partial = launch_tall_grad(rows(x), s, plans=plans)
        d_down = down.new_empty(down.shape)
    if grad_p is not None and core is not None and core_in is None:
        d_b = up.new_empty((n, ra))
        launch_reduce(((d_up_partial, d_b), (None, None), (d_down_partial, d_down)), plans)
        d_core, d_up = torch_backend.unfold_grads(d_b, core, up, need_core, need_up)
    elif grad_p is not None or need_down:
        if grad_p is not None and need_up:
            d_up = up.new_empty(up.shape)
        if grad_p is not None and need_core:
            d_core = core.new_empty(core.shape)  # type: ignore[union-attr]
        launch_reduce(
            ((d_up_partial, d_up), (d_core_partial, d_core), (d_down_partial, d_down)), plans
        )
    return dx, d_weight, d_bias, d_down, d_core, d_up
