"""`low_rank_linear` with dropout on the rank-r activation T = x·down·core[g], of which only x,
P = x·down and a seed are kept.

`keep_mask` makes the mask of 0 and 1 from the seed, in both passes; m below is mask / (1 - p). The
slices' T lie side by side, [M, G·Rb]. With dY = dL/dy:

    T = P·core[g]              D = T ⊙ m                y = x·W^T + bias + D[g]·up[g]^T
    dT[g] = dY[g]·up[g] ⊙ m    S = Σ_g dT[g]·core[g]^T  dX = dY·W + S·down^T
    d_down = x^T·S             d_core[g] = P^T·dT[g]    d_up[g] = dY[g]^T·D[g]

d_up is summed over the slices where they share `up`: they are then G times as many rows of one
product.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from .. import functions
from . import checks, dispatch, reference
from .backends.torch_backend import mm_into, thin_grad
from .dropout_mask import keep_mask, new_seed
from .recompute import Source, down_grad, kept_for, made_from


def low_rank_linear_with_dropout(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor,
    core: Tensor | None,
    up: Tensor,
    p: float,
    *,
    backend: str = "auto",
    source: Source | None = None,
) -> Tensor:
    """`low_rank_linear` with dropout on the rank-r activation, x·down·core[g], as FacT trains.

    Without a core the slices share the mask of x·down. The masks' seed comes from torch's generator
    of x's device, so that torch.manual_seed repeats them and checkpointing replays them.

    Args:
        x: [..., K]; the other tensors, their dtypes and what is raised are as in `low_rank_linear`.
        p: probability of dropping an entry, at least 0 and below 1; the others are scaled by
            1 / (1 - p).
        backend: as in `low_rank_linear`. A compiled backend makes x·weight^T, x·down and dY·weight;
            the mask stands between its thin products, so the others are torch's. 'auto' takes one
            on the CPU, where it is faster than the library, and library GEMMs elsewhere.
            'reference' keeps the mask and leaves the gradients to torch.
        source: what the backward makes x from; None where it keeps x.

    Returns:
        [..., N]. Source: FacT (arXiv:2212.03145), its released training code.

    Second derivatives, forward mode and `torch.func` transforms are taken through plain torch; vmap
    needs randomness='different' or 'same'.
    """
    backend = dispatch.requested_backend(backend)
    if not 0 <= p < 1:
        raise ValueError(f"p must be at least 0 and below 1, got {p}")
    x = checks.to_autocast_dtype(x)
    checks.check_operands(x, weight, bias, down, core, up)
    transformed = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    if transformed and backend not in ("auto", "torch", "reference"):
        raise RuntimeError(
            f"backend {backend!r} does not support torch.func transforms or forward mode; use"
            " backend='torch'"
        )
    seed = new_seed(x.device)
    if core is None:
        up = up.flatten(0, 1).unsqueeze(0)  # the slices share the mask: they are one
    flat = x.reshape(-1, x.shape[-1]) if x.dim() != 2 else x
    if transformed or backend == "reference":
        y = _reference(flat, weight, bias, down, core, up, seed, p)
    else:
        if backend == "auto" and flat.device.type != "cpu":
            backend = "torch"
        y = functions.apply(
            _LowRankLinearWithDropout, flat, weight, bias, down, core, up, seed, p, backend, source
        )
    return y if x.dim() == 2 else y.reshape(*x.shape[:-1], y.shape[1])


def _reference(
    x: Tensor,  # [M, K]
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor,
    core: Tensor | None,
    up: Tensor,
    seed: Tensor,
    p: float,
) -> Tensor:
    dtype = x.dtype
    shape = down.shape[1:] if core is None else (core.shape[0], core.shape[2])
    keep = keep_mask(seed, x.shape[0], math.prod(shape), p, dtype).unflatten(1, shape)
    return reference.low_rank_linear(
        x,
        weight.to(dtype),
        None if bias is None else bias.to(dtype),
        down.to(dtype),
        None if core is None else core.to(dtype),
        up.to(dtype),
        keep,
        p,
    )


class _LowRankLinearWithDropout(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # [M, K]
        weight: Tensor,  # [N, K]
        bias: Tensor | None,  # [N]
        down: Tensor,  # [K, Ra]
        core: Tensor | None,  # [G, Ra, Rb], or None for G = 1
        up: Tensor,  # [1 or G, N/G, Rb]
        seed: Tensor,  # []
        rate: float,
        backend: str,
        source: Source | None,
    ) -> Tensor:
        _, need_weight, _, need_down, need_core, need_up = ctx.needs_input_grad[:6]
        dtype = x.dtype
        need_x = need_down or need_weight
        with checks.without_autocast(x.device):
            cast = weight.to(dtype) if backend == "torch" else weight
            if backend == "torch":
                p = torch.mm(x, down.to(dtype))
                y = F.linear(x, cast, None if bias is None else bias.to(dtype))
            else:  # the backend's own y has nothing of P in it where up is zero
                nothing = down.new_zeros(1, weight.shape[0], down.shape[1])
                y, p = torch.ops.efft_kernels.low_rank_linear_fwd(
                    x, weight, bias, down, None, nothing, True, backend, "auto"
                )
            t = p if core is None else torch.mm(p, _wide(core, dtype))
            d = _drop(t, _keep(seed, x.shape[0], t.shape[1], rate, dtype), rate)
            y = _add_low_rank(y, d, up.to(dtype))
        ctx.source = source if need_x else None
        ctx.save_for_backward(
            # On a GPU one cast serves both passes, as that of a frozen nn.Linear does.
            cast if x.is_cuda and not need_weight else weight,
            p if need_core or need_up else None,
            down,
            core,
            up,
            seed,
            *kept_for(x if need_x else None, ctx.source),
        )
        ctx.rate, ctx.backend = rate, backend
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        weight, p, down, core, up, seed, *kept = ctx.saved_tensors
        need_x, need_weight, need_bias, need_down, need_core, need_up = ctx.needs_input_grad[:6]
        dtype = dy.dtype
        dx = d_bias = d_down = d_core = d_up = None
        with checks.without_autocast(dy.device):
            backend = ctx.backend
            if dispatch.has_tangent(dy):
                backend = "torch"
            second = torch.is_grad_enabled() and not torch.compiler.is_compiling()
            x = made_from(kept, ctx.source, dy) if need_weight or second else None
            if second:
                backend = "torch"
                p = None if p is None else _with_graph(x, down)
            d_weight = None
            if need_weight:
                assert x is not None
                d_weight = mm_into(dy.t(), x, weight.dtype)
            if need_bias:
                d_bias = dy.sum(0, dtype=torch.promote_types(dtype, torch.float32))
                d_bias = d_bias.to(ctx.bias_dtype)
            if not (need_x or need_down or need_core or need_up):
                return None, d_weight, d_bias, None, None, None, None, None, None, None
            wide = None if core is None else _wide(core, dtype)
            columns = down.shape[1] if wide is None else wide.shape[1]
            ups, slices = up.shape[0], columns // up.shape[2]
            keep = _keep(seed, dy.shape[0], columns, ctx.rate, dtype)
            dy_slices = _by_slice(dy, ups, slices)
            if need_x or need_down or need_core:
                dd = torch.bmm(dy_slices, up.to(dtype)).transpose(0, 1).reshape(keep.shape)
                dt = _drop(dd, keep, ctx.rate)
                s = dt if wide is None else torch.mm(dt, wide.t())
                if need_x:
                    dx = _frozen_dx(dy, weight, backend).addmm_(s, down.to(dtype).t())
                if need_down:
                    d_down = down_grad(kept, ctx.source, s, down.dtype)
                if need_core and core is not None:
                    d_wide = mm_into(p.t(), dt, core.dtype)  # [Ra, G·Rb]
                    d_core = d_wide.reshape(d_wide.shape[0], slices, -1).transpose(0, 1)
            if need_up:
                d = _drop(p if wide is None else torch.mm(p, wide), keep, ctx.rate)
                pairs = zip(dy_slices, _by_slice(d, ups, slices), strict=True)
                d_up = torch.stack([thin_grad(dy_g, d_g, up.dtype) for dy_g, d_g in pairs])
        return dx, d_weight, d_bias, d_down, d_core, d_up, None, None, None, None


def _frozen_dx(dy: Tensor, weight: Tensor, backend: str) -> Tensor:
    """dY·W, [M, K]."""
    if backend == "torch":
        return torch.mm(dy, weight.to(dy.dtype))
    n, k = weight.shape
    down, up = weight.new_zeros(k, 1), weight.new_zeros(1, n, 1)
    dx, *_ = torch.ops.efft_kernels.low_rank_linear_bwd(
        dy, None, weight, None, down, None, up, [True] + [False] * 5, backend, "auto"
    )
    return dx  # type: ignore[no-any-return]


def _keep(seed: Tensor, rows: int, columns: int, p: float, dtype: torch.dtype) -> Tensor:
    """`keep_mask`, by one launch on a GPU; a compiler makes one kernel of it by itself."""
    if (
        type(seed) is Tensor
        and seed.is_cuda
        and not torch.compiler.is_compiling()
        and not torch._C._len_torch_dispatch_stack()
        and dispatch.available_backends()["triton"] is None
    ):
        from .backends.triton.keep import launch_keep

        with dispatch.launch_context(seed.device):
            return launch_keep(seed, rows, columns, p, dtype)
    return keep_mask(seed, rows, columns, p, dtype)


def _drop(t: Tensor, keep: Tensor, rate: float) -> Tensor:
    # Scaled by itself: in half precision a mask of 1 / (1 - p) is off by up to 0.4 % everywhere.
    return (t * keep).mul_(1 / (1 - rate))


def _wide(core: Tensor, dtype: torch.dtype) -> Tensor:
    """[Ra, G·Rb]: the cores side by side."""
    return core.to(dtype).transpose(0, 1).flatten(1)


def _by_slice(t: Tensor, ups: int, slices: int) -> Tensor:
    """[M, slices·C] as [ups, M·slices/ups, C]: all rows that one `up` serves, a view if t is
    contiguous."""
    m, columns = t.shape
    return t.reshape(m * slices // ups, ups, columns // slices).transpose(0, 1)


def _add_low_rank(y: Tensor, d: Tensor, up: Tensor) -> Tensor:
    """y + D[g]·up[g]^T, in y's memory.

    Args:
        y: [M, N], contiguous.
        d: [M, G·Rb].
        up: [1 or G, N/G, Rb].
    """
    ups, slices = up.shape[0], d.shape[1] // up.shape[2]
    y_slices, d_slices = (_by_slice(t, ups, slices) for t in (y, d))
    if torch.compiler.is_compiling():  # Dynamo (torch 2.11) loses the graph of what is in place.
        return torch.baddbmm(y_slices, d_slices, up.mT).transpose(0, 1).reshape(y.shape)
    y_slices.baddbmm_(d_slices, up.mT)
    return y


def _with_graph(x: Tensor | None, down: Tensor) -> Tensor:
    """P = x·down anew, for a second derivative."""
    if x is None:
        raise RuntimeError(
            "low_rank_linear_with_dropout: a second derivative needs x, which is saved only when"
            " down or weight requires grad; set down.requires_grad_() or use backend='reference'"
        )
    return torch.mm(x, down.to(x.dtype))
