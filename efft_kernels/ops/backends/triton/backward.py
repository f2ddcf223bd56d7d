"""The six gradients: which passes over dY and x, in which order.

With P = x·down saved by the forward, Q_g = dY_g·up[g] and T_g = P·core[g]:

    S = Σ_g Q_g·core[g]^T    dX = dY·W + S·down^T     d_down = x^T·S
    d_core[g] = P^T·Q_g      d_up[g] = dY_g^T·T_g     (summed over g when `up` is shared)

    thin        one pass over dY: S, and the partial sums of d_core and d_up
    gemm        dX with its low-rank term; under `merged` W + ΔW and the library's GEMM
    tall_grad   one pass over x: the partial sums of d_down
    reduce      all partial sums

At ranks above 32 core and up are folded first (fold.py); `thin` then gives d_B, and plain torch
d_core and d_up from it.

Where neither d_core nor d_up is needed, `fused` needs no pass for S: the GEMM computes it in its
loop, which takes B = stack_g up[g]·core[g]^T, folded by one small launch.

So dY is read twice and x once for everything, whatever G is: dX needs a GEMM over rows of dY while
d_up reduces over them. No temporary has M·N or M·K elements; the largest are the partial sums.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import torch_backend
from ..fallback import padded_rank, rows, torch_strategy
from ..torch_backend import Grads
from .factors import read_in_place
from .fold import launch_fold
from .forward import on_16_bytes, out_of_reach
from .gemm import launch_gemm
from .launch_cache import cache_of, once
from .merge import launch_merge
from .reduce import launch_reduce
from .thin import launch_tall_grad, launch_thin
from .tuning import can_compute_p, dot_precision

_Shape = tuple[int, ...] | None  # None: not wanted


class _Steps(NamedTuple):
    """What of a call follows from sizes, strides, dtypes and needs: cached, since attributes of
    tensors cost the host a tenth of a microsecond each.
    """

    ra: int
    in_torch: bool = False
    frozen: bool = False  # d_weight or d_bias is wanted
    strided: bool = False  # rows of dY, x or P have to be copied
    dx: str | None = None  # "fused": its GEMM computes S; "split": it reads S; "merged"
    folded: bool = False  # core and up are folded first
    pad_down: bool = False  # down is brought to rows of the padded rank first
    s: _Shape = None  # [M, padded rank]
    grad: bool = False  # the pass over dY also gives d_core and d_up, both if one is wanted
    d_b: _Shape = None  # d_core and d_up come from it
    d_down: _Shape = None
    d_core: _Shape = None
    d_up: _Shape = None


def _steps(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor,
    p: Tensor | None,
    down: Tensor,
    core: Tensor | None,
    up: Tensor,
    needs: tuple[bool, ...],
    strategy: str,
) -> _Steps:
    need_x, need_weight, need_bias, need_down, need_core, need_up = needs
    m, (n, k), ra = dy.shape[0], weight.shape, down.shape[1]
    if out_of_reach(m, n, k, ra):
        return _Steps(ra, in_torch=True)
    rank_a = padded_rank(ra)
    need_core = need_core and core is not None
    grad = need_core or need_up
    compute_s = need_x and not grad and strategy == "fused" and can_compute_p(dy.dtype, rank_a)
    merged = strategy == "merged"
    needs_s = need_down or grad or (need_x and not (compute_s or merged))
    padded = not read_in_place(down, up)
    return _Steps(
        ra,
        frozen=need_weight or need_bias,
        strided=any(t is not None and rows(t) is not t for t in (dy, x, p)),
        dx=None if not need_x else "fused" if compute_s else "merged" if merged else "split",
        folded=compute_s or (padded and needs_s),
        pad_down=padded,
        s=(m, rank_a) if needs_s else None,
        grad=grad,
        d_b=(n, ra) if grad and padded and core is not None else None,
        d_down=tuple(down.shape) if need_down else None,
        d_core=tuple(core.shape) if need_core and core is not None else None,
        d_up=tuple(up.shape) if need_up else None,
    )


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
    strategy = on_16_bytes(strategy, dy, weight, up)
    cache = cache_of(
        (dy, x, weight, p, down, core, up), "bwd", needs, strategy, dot_precision(dy.dtype)
    )
    steps = once(cache, "steps", _steps, dy, x, weight, p, down, core, up, needs, strategy)
    if steps.in_torch:
        return torch_backend.backward(
            dy, x, weight, p, down, core, up, needs=needs, strategy=torch_strategy(strategy)
        )
    dx = d_weight = d_bias = d_down = d_core = d_up = None
    if steps.strided:
        dy, x, p = rows(dy), None if x is None else rows(x), None if p is None else rows(p)
    if steps.frozen:
        d_weight, d_bias = torch_backend.frozen_grads(dy, x, weight, needs[1], needs[2])

    s = thin_in = d_up_partial = d_core_partial = None
    if steps.s is not None:
        s = dy.new_empty(*steps.s)
        if steps.ra != steps.s[1]:
            s = s[:, : steps.ra]
    up_in, core_in = up, core
    if steps.folded:
        up_in, core_in = launch_fold(up, core, dy.dtype, cache), None
    if steps.dx == "fused":
        thin_in = up_in
    elif s is not None:
        d_up_partial, d_core_partial = launch_thin(
            dy, up_in, core_in, s, p if steps.grad else None, cache=cache
        )
    if steps.dx == "merged":
        dx = torch.mm(dy, launch_merge(rows(weight), down, core, up, dy.dtype, cache))
    elif steps.dx is not None:
        thin_out = launch_fold(down, None, dy.dtype, cache, "pad down") if steps.pad_down else down
        dx = launch_gemm(dy, weight, None, thin_in, None, thin_out, s, ra=steps.ra, cache=cache)
    d_down_partial = None
    if steps.d_down is not None:
        assert x is not None and s is not None
        d_down_partial = launch_tall_grad(x, s, cache=cache)
        d_down = down.new_empty(*steps.d_down)
    if steps.d_b is not None:
        d_b = up.new_empty(*steps.d_b)
        launch_reduce([(d_up_partial, d_b), (d_down_partial, d_down)], cache)
        d_core, d_up = torch_backend.unfold_grads(
            d_b, core, up, steps.d_core is not None, steps.d_up is not None
        )
    elif steps.grad or d_down is not None:
        if steps.d_up is not None:
            d_up = up.new_empty(*steps.d_up)
        if steps.d_core is not None:
            d_core = up.new_empty(*steps.d_core)
        launch_reduce(
            [(d_up_partial, d_up), (d_core_partial, d_core), (d_down_partial, d_down)], cache
        )
    return dx, d_weight, d_bias, d_down, d_core, d_up
