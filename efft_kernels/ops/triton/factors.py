"""From (down, core, up) to the two thin factors the kernels take, and to W + ΔW for `merged`.

The fold B = stack_g up[g]·core[g]^T costs 2·N·Ra·Rb FLOPs, some ten thousandths of the layer's own.
It is one small launch, not a part of the GEMM, because its result is used by every row tile, and
because the GEMM then reads operands of its own dtype, padded to a power of two and aligned: a
float32 factor cast inside the loop over K would go through registers there and stop the
asynchronous copies. Factors that come folded already (core=None, the compute dtype, a rank that
needs no padding) are taken as they are, with no launch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .launch import Plan, Plans

MAX_RANK = 128


def padded_rank(rank: int) -> int:
    """The power of two, at least 16 (the least tl.dot takes), that holds `rank`."""
    return max(16, 1 << (rank - 1).bit_length())


@triton.jit
def _fold_kernel(
    down_ptr,  # [K, ra], any strides
    core_ptr,  # [G, ra, rb], any strides, or None
    up_ptr,  # [1 or G, N/G, rb], any strides (0 along the first where shared)
    b_ptr,  # [N, RANK], out
    down_out_ptr,  # [K, RANK], out
    K,
    slice_n,  # N/G
    ra,
    rb,
    stride_dk,
    stride_dr,
    stride_cg,
    stride_ca,
    stride_cb,
    stride_ug,
    stride_un,
    stride_ur,
    tiles_b,  # programs that fold; the rest copy `down`
    BLOCK: tl.constexpr,
    BLOCK_RB: tl.constexpr,
    RANK: tl.constexpr,
):
    """Rows of B and of `down` in the kernels' dtype, columns beyond the rank zero."""
    pid = tl.program_id(0)
    offs_a = tl.arange(0, RANK)
    in_a = (offs_a < ra)[None, :]
    if pid < tiles_b:
        per_slice = tl.cdiv(slice_n, BLOCK)
        g = pid // per_slice
        offs_n = (pid % per_slice) * BLOCK + tl.arange(0, BLOCK)
        in_n = (offs_n < slice_n)[:, None]
        up_ptrs = up_ptr + g.to(tl.int64) * stride_ug + offs_n.to(tl.int64)[:, None] * stride_un
        if core_ptr is None:
            b = tl.load(up_ptrs + offs_a[None, :] * stride_ur, mask=in_n & in_a, other=0.0)
            b = b.to(tl.float32)
        else:
            b = tl.zeros((BLOCK, RANK), dtype=tl.float32)
            for j in range(0, rb, BLOCK_RB):
                offs_b = j + tl.arange(0, BLOCK_RB)
                in_b = offs_b < rb
                up = tl.load(
                    up_ptrs + offs_b[None, :] * stride_ur, mask=in_n & in_b[None, :], other=0.0
                )
                core = tl.load(
                    core_ptr
                    + g.to(tl.int64) * stride_cg
                    + offs_a[None, :] * stride_ca
                    + offs_b[:, None] * stride_cb,
                    mask=in_b[:, None] & in_a,
                    other=0.0,
                )
                b = tl.dot(up, core, b, input_precision="ieee")
        rows = g.to(tl.int64) * slice_n + offs_n
        tl.store(
            b_ptr + rows[:, None] * RANK + offs_a[None, :],
            b.to(b_ptr.dtype.element_ty),
            mask=in_n,
        )
    else:
        offs_k = (pid - tiles_b).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        in_k = (offs_k < K)[:, None]
        down = tl.load(
            down_ptr + offs_k[:, None] * stride_dk + offs_a[None, :] * stride_dr,
            mask=in_k & in_a,
            other=0.0,
        )
        tl.store(
            down_out_ptr + offs_k[:, None] * RANK + offs_a[None, :],
            down.to(down_out_ptr.dtype.element_ty),
            mask=in_k,
        )


@triton.jit
def _merge_kernel(
    weight_ptr,  # [N, K], unit stride along K
    b_ptr,  # [N, RANK] float32, contiguous
    down_ptr,  # [K, RANK] float32, contiguous
    out_ptr,  # [N, K], contiguous
    N,
    K,
    stride_w,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    RANK: tl.constexpr,
):
    """W + B·down^T, added in float32 and rounded once."""
    tiles_k = tl.cdiv(K, BLOCK_K)
    pid = tl.program_id(0)
    offs_n = (pid // tiles_k).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = (pid % tiles_k) * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = (offs_n < N)[:, None] & (offs_k < K)[None, :]
    weight = tl.load(
        weight_ptr + offs_n[:, None] * stride_w + offs_k[None, :], mask=inside, other=0.0
    )
    acc = weight.to(tl.float32)
    for r in range(0, RANK, BLOCK_R):
        offs_r = r + tl.arange(0, BLOCK_R)
        b = tl.load(
            b_ptr + offs_n[:, None] * RANK + offs_r[None, :], mask=(offs_n < N)[:, None], other=0.0
        )
        down = tl.load(
            down_ptr + offs_k[None, :] * RANK + offs_r[:, None],
            mask=(offs_k < K)[None, :],
            other=0.0,
        )
        acc = tl.dot(b, down, acc, input_precision="ieee")
    tl.store(
        out_ptr + offs_n[:, None] * K + offs_k[None, :],
        acc.to(out_ptr.dtype.element_ty),
        mask=inside,
    )


def launch_fold(
    down: Tensor,  # [K, Ra]
    core: Tensor | None,  # [G, Ra, Rb]
    up: Tensor,  # [1 or G, N/G, Rb]
    n: int,
    dtype: torch.dtype,
    plans: Plans | None = None,
    name: str = "fold",
) -> tuple[Tensor, Tensor]:
    """(B [N, RANK], down [K, RANK]) in `dtype`, contiguous, zero beyond the rank."""
    k, ra = down.shape
    rank = padded_rank(ra)
    if (
        core is None
        and ra == rank
        and down.dtype == dtype
        and down.is_contiguous()
        and up.is_contiguous()
    ):
        return up.view(n, ra), down
    plans = {} if plans is None else plans
    plan: Plan | None = plans.get(name)
    if plan is None:
        plan = plans[name] = _fold_plan(down, core, up, rank)
    b = down.new_empty((n, rank), dtype=dtype)
    down_out = down.new_empty((k, rank), dtype=dtype)
    plan((down, core, up, b, down_out))
    return b, down_out


def _fold_plan(down: Tensor, core: Tensor | None, up: Tensor, rank: int) -> Plan:
    k, ra = down.shape
    slices = up.shape[0] if core is None else core.shape[0]
    slice_n = up.shape[1]
    block, block_rb, num_warps = tuning.FOLD_CONFIG
    tiles_b = slices * tuning.cdiv(slice_n, block)
    core_strides = (0, 0, 0) if core is None else core.stride()
    return Plan(
        _fold_kernel,
        (tiles_b + tuning.cdiv(k, block),),
        k,
        slice_n,
        ra,
        up.shape[2],
        *down.stride(),
        *core_strides,
        up.stride(0) if up.shape[0] == slices else 0,
        up.stride(1),
        up.stride(2),
        tiles_b,
        block,
        block_rb,
        rank,
        num_warps=num_warps,
    )


def launch_merge(
    weight: Tensor,  # [N, K], unit last stride
    b: Tensor,  # [N, RANK] float32, contiguous
    down: Tensor,  # [K, RANK] float32, contiguous
    dtype: torch.dtype,
    plans: Plans | None = None,
) -> Tensor:
    """W + B·down^T, [N, K] in `dtype`."""
    plans = {} if plans is None else plans
    plan: Plan | None = plans.get("merge")
    if plan is None:
        plan = plans["merge"] = _merge_plan(weight, b)
    out = weight.new_empty(weight.shape, dtype=dtype)
    plan((weight, b, down, out))
    return out


def _merge_plan(weight: Tensor, b: Tensor) -> Plan:
    n, k = weight.shape
    block_n, block_k, block_r, num_warps = tuning.MERGE_CONFIG
    return Plan(
        _merge_kernel,
        (tuning.cdiv(n, block_n) * tuning.cdiv(k, block_k),),
        n,
        k,
        weight.stride(0),
        block_n,
        block_k,
        block_r,
        b.shape[1],
        num_warps=num_warps,
    )
