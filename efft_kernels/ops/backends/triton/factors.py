"""The factors as the kernels read them, and W + ΔW for `merged`.

Up to a padded rank of 32 the kernels read down, core and up in place, whatever
their dtype and strides: `thin` where it walks over x or dY, the GEMM where its loop has ended. Two
things need a small launch first, which brings a thin operand to the kernels' dtype in rows of the
padded rank and folds core and up to B = stack_g up[g]·core[g]^T:

    an operand that rides in the GEMM's loop: a cast there would go through registers and stop the
    asynchronous copies
    higher ranks: a core beside the accumulators would not fit in registers

A factor that is of this form already is taken as it is, with no launch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..fallback import padded_rank
from . import tuning
from .launch_cache import Plan, Plans
from .limits import TRITON_IN_PLACE_RANK


def slices_of(thin: Tensor, core: Tensor | None) -> tuple[int, int, tuple[int, ...]]:
    """(slices, rows of each, strides along (slice, row, rank)) of up [1 or G, n, Rb] or down
    [K, Ra], as kernels walk over it: slice after slice where each has a core, all rows at once
    where there is none and they are evenly spaced.
    """
    if thin.dim() == 2:
        return 1, thin.shape[0], (0, *thin.stride())
    slices, rows, _ = thin.shape
    strides = thin.stride()
    if core is not None:
        return core.shape[0], rows, (strides[0] if slices > 1 else 0, *strides[1:])
    if slices == 1 or strides[0] == rows * strides[1]:
        return 1, slices * rows, (0, *strides[1:])
    return slices, rows, strides


def read_in_place(down: Tensor, up: Tensor) -> bool:
    """Whether the kernels take factors of these ranks as they are."""
    return padded_rank(max(down.shape[1], up.shape[2])) <= TRITON_IN_PLACE_RANK


def core_strides(core: Tensor | None) -> tuple[int, ...]:
    """Its strides; zeros for the identity."""
    return (0, 0, 0) if core is None else core.stride()


@triton.jit
def fold_block(
    up_ptrs,  # [BLOCK], the rows' first elements
    core_ptr,  # of this slice's [ra, rb], or None
    in_rows,
    offs_a,
    ra,
    rb,
    stride_ur,
    stride_ca,
    stride_cb,
    BLOCK: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_RB: tl.constexpr,
):
    """Columns offs_a of up[g]·core[g]^T for BLOCK rows of one slice, float32."""
    in_a = (offs_a < ra)[None, :]
    if core_ptr is None:
        b = tl.load(
            up_ptrs[:, None] + offs_a[None, :] * stride_ur, mask=in_rows[:, None] & in_a, other=0.0
        ).to(tl.float32)
    else:
        b = tl.zeros((BLOCK, BLOCK_A), dtype=tl.float32)
        for j in range(0, rb, BLOCK_RB):
            offs_b = j + tl.arange(0, BLOCK_RB)
            in_b = offs_b < rb
            up = tl.load(
                up_ptrs[:, None] + offs_b[None, :] * stride_ur,
                mask=in_rows[:, None] & in_b[None, :],
                other=0.0,
            )
            core = tl.load(
                core_ptr + offs_a[None, :] * stride_ca + offs_b[:, None] * stride_cb,
                mask=in_b[:, None] & in_a,
                other=0.0,
            )
            if up.dtype == tl.float64:
                up, core = up.to(tl.float32), core.to(tl.float32)
            b = tl.dot(up, core, b, input_precision="ieee")
    # An infinity in `up` times core's padding is a NaN.
    return tl.where(in_a, b, 0.0)


@triton.jit
def _fold_kernel(
    up_ptr,  # [1 or G, n, rb], any strides (0 along the first where shared)
    core_ptr,  # [G, ra, rb], any strides, or None
    out_ptr,  # [G·n, RANK], out
    n,
    ra,
    rb,
    stride_ug,
    stride_un,
    stride_ur,
    stride_cg,
    stride_ca,
    stride_cb,
    BLOCK: tl.constexpr,
    BLOCK_RB: tl.constexpr,
    RANK: tl.constexpr,
):
    """Rows of B in the kernels' dtype, columns beyond the rank zero."""
    g = tl.program_id(1).to(tl.int64)
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    offs_a = tl.arange(0, RANK)
    b = fold_block(
        up_ptr + g * stride_ug + offs_n * stride_un,
        None if core_ptr is None else core_ptr + g * stride_cg,
        offs_n < n,
        offs_a,
        ra,
        rb,
        stride_ur,
        stride_ca,
        stride_cb,
        BLOCK,
        RANK,
        BLOCK_RB,
    )
    tl.store(
        out_ptr + (g * n + offs_n)[:, None] * RANK + offs_a[None, :],
        b.to(out_ptr.dtype.element_ty),
        mask=(offs_n < n)[:, None],
    )


@triton.jit
def _merge_kernel(
    weight_ptr,  # [G·n, K], unit stride along K
    up_ptr,  # [1 or G, n, rb], any strides (0 along the first where shared)
    core_ptr,  # [G, ra, rb], any strides, or None
    down_ptr,  # [K, ra], any strides
    out_ptr,  # [G·n, K], contiguous
    n,
    K,
    ra,
    rb,
    stride_w,
    stride_ug,
    stride_un,
    stride_ur,
    stride_cg,
    stride_ca,
    stride_cb,
    stride_dk,
    stride_dr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    RANK: tl.constexpr,
):
    """W + B·down^T, formed in float32 and rounded once; a tile lies within one slice."""
    tiles_k = tl.cdiv(K, BLOCK_K)
    pid = tl.program_id(0)
    g = tl.program_id(1).to(tl.int64)
    offs_n = (pid // tiles_k).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = (pid % tiles_k) * BLOCK_K + tl.arange(0, BLOCK_K)
    in_n = offs_n < n
    in_k = offs_k < K
    inside = in_n[:, None] & in_k[None, :]
    rows = g * n + offs_n
    weight = tl.load(
        weight_ptr + rows[:, None] * stride_w + offs_k[None, :], mask=inside, other=0.0
    )
    acc = weight.to(tl.float32)
    for r in range(0, RANK, BLOCK_R):
        offs_a = r + tl.arange(0, BLOCK_R)
        b = fold_block(
            up_ptr + g * stride_ug + offs_n * stride_un,
            None if core_ptr is None else core_ptr + g * stride_cg,
            in_n,
            offs_a,
            ra,
            rb,
            stride_ur,
            stride_ca,
            stride_cb,
            BLOCK_N,
            BLOCK_R,
            BLOCK_R,
        )
        down = tl.load(
            down_ptr + offs_k[None, :].to(tl.int64) * stride_dk + offs_a[:, None] * stride_dr,
            mask=in_k[None, :] & (offs_a < ra)[:, None],
            other=0.0,
        )
        acc = tl.dot(b, down.to(tl.float32), acc, input_precision="ieee")
    tl.store(
        out_ptr + rows[:, None] * K + offs_k[None, :],
        acc.to(out_ptr.dtype.element_ty),
        mask=inside,
    )


def launch_fold(
    up: Tensor,  # [1 or G, n, Rb]; or down [K, Ra], to be copied
    core: Tensor | None,  # [G, Ra, Rb]
    dtype: torch.dtype,
    plans: Plans | None = None,
    name: str = "fold",
) -> Tensor:
    """B [G·n, RANK] in `dtype`, contiguous, zero beyond the rank."""
    ra = up.shape[-1] if core is None else core.shape[1]
    rank = padded_rank(ra)
    rows = up.shape[-2] * (1 if up.dim() == 2 else up.shape[0] if core is None else core.shape[0])
    if core is None and ra == rank and up.dtype == dtype and up.is_contiguous():
        return up if up.dim() == 2 else up.view(rows, ra)
    plans = {} if plans is None else plans
    plan: Plan | None = plans.get(name)
    if plan is None:
        plan = plans[name] = _fold_plan(up, core, rank)
    b = up.new_empty(rows, rank, dtype=dtype)
    plan((up, core, b))
    return b


def _fold_plan(up: Tensor, core: Tensor | None, rank: int) -> Plan:
    slices, n, strides = slices_of(up, core)
    block, block_rb, num_warps = tuning.FOLD_CONFIG
    return Plan(
        _fold_kernel,
        (tuning.cdiv(n, block), slices),
        n,
        up.shape[-1] if core is None else core.shape[1],
        up.shape[-1],
        *strides,
        *core_strides(core),
        block,
        block_rb,
        rank,
        num_warps=num_warps,
    )


def launch_merge(
    weight: Tensor,  # [N, K], unit last stride
    down: Tensor,  # [K, Ra]
    core: Tensor | None,  # [G, Ra, Rb]
    up: Tensor,  # [1 or G, N/G, Rb]
    dtype: torch.dtype,
    plans: Plans | None = None,
) -> Tensor:
    """W + ΔW, [N, K] in `dtype`, formed in float32."""
    plans = {} if plans is None else plans
    plan: Plan | None = plans.get("merge")
    if plan is None:
        plan = plans["merge"] = _merge_plan(weight, down, core, up)
    out = weight.new_empty(*weight.shape, dtype=dtype)
    plan((weight, up, core, down, out))
    return out


def _merge_plan(weight: Tensor, down: Tensor, core: Tensor | None, up: Tensor) -> Plan:
    k, ra = down.shape
    slices, n, strides = slices_of(up, core)
    block_n, block_k, block_r, num_warps = tuning.merge_config(weight.stride(0) | n | k, ra)
    return Plan(
        _merge_kernel,
        (tuning.cdiv(n, block_n) * tuning.cdiv(k, block_k), slices),
        n,
        k,
        ra,
        up.shape[2],
        weight.stride(0),
        *strides,
        *core_strides(core),
        *down.stride(),
        block_n,
        block_k,
        block_r,
        padded_rank(ra),
        num_warps=num_warps,
    )
