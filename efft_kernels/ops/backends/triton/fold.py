"""The fold: B = stack_g up[g]·core[g]^T, [N, RA], in the kernels' dtype.

Up to a padded rank of 32 the kernels read down, core and up in place, whatever their dtype and
strides: `thin` where it walks over x or dY, the GEMM in its epilogue. Two things need this small
launch first, which brings a thin operand to the kernels' dtype in rows of the padded rank:

    an operand of the GEMM's loop: a cast there would go through registers and stop the
    asynchronous copies
    higher ranks: a core would not fit in registers next to the accumulators

A factor that is of this form already is taken as it is, with no launch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..fallback import padded_rank
from . import tuning
from .factors import Core, Up, core_strides, named_strides, slices_of
from .launch_cache import CachedLaunch, CallCache, once


@triton.jit
def fold_block(
    up,  # Up
    core,  # Core
    g,
    offs_n,  # [BLOCK_N], rows of slice g
    in_n,  # [BLOCK_N]
    offs_a,  # [BLOCK_A], columns
    BLOCK_N: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """[BLOCK_N, BLOCK_A] of up[g]·core[g]^T in float32, zero beyond the rank."""
    in_a = (offs_a < core.ra)[None, :]
    up_ptrs = up.ptr + g * up.stride_g + offs_n * up.stride_n
    if core.ptr is None:
        b = tl.load(
            up_ptrs[:, None] + offs_a[None, :] * up.stride_b, mask=in_n[:, None] & in_a, other=0.0
        ).to(tl.float32)
    else:
        core_ptr = core.ptr + g * core.stride_g
        b = tl.zeros((BLOCK_N, BLOCK_A), dtype=tl.float32)
        for j in range(0, core.rb, BLOCK_B):
            # Load.
            offs_b = j + tl.arange(0, BLOCK_B)
            in_b = offs_b < core.rb
            up_block = tl.load(
                up_ptrs[:, None] + offs_b[None, :] * up.stride_b,
                mask=in_n[:, None] & in_b[None, :],
                other=0.0,
            )
            core_block = tl.load(
                core_ptr + offs_a[None, :] * core.stride_a + offs_b[:, None] * core.stride_b,
                mask=in_b[:, None] & in_a,
                other=0.0,
            )
            # Product.
            if up_block.dtype == tl.float64:
                up_block, core_block = up_block.to(tl.float32), core_block.to(tl.float32)
            b = tl.dot(up_block, core_block, b, input_precision="ieee")
    # An infinity in `up` times core's padding is a NaN.
    return tl.where(in_a, b, 0.0)


@triton.jit
def _fold_kernel(
    up_ptr,  # [1 or G, n, rb], any strides (0 along the first where shared)
    core_ptr,  # [G, ra, rb], any strides, or None
    out_ptr,  # [G·n, RA], out
    n,
    ra,
    rb,
    stride_up_g,
    stride_up_n,
    stride_up_b,
    stride_core_g,
    stride_core_a,
    stride_core_b,
    BLOCK_N: tl.constexpr,
    BLOCK_B: tl.constexpr,
    RA: tl.constexpr,
):
    """BLOCK_N rows of B in the kernels' dtype, columns beyond the rank zero."""
    g = tl.program_id(1).to(tl.int64)
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_n = offs_n < n
    offs_a = tl.arange(0, RA)
    # Product.
    up = Up(up_ptr, stride_up_g, stride_up_n, stride_up_b)
    core = Core(core_ptr, ra, rb, stride_core_g, stride_core_a, stride_core_b)
    b = fold_block(up, core, g, offs_n, in_n, offs_a, BLOCK_N, RA, BLOCK_B)
    # Store.
    out_ptrs = out_ptr + (g * n + offs_n)[:, None] * RA + offs_a[None, :]
    tl.store(out_ptrs, b.to(out_ptr.dtype.element_ty), mask=in_n[:, None])


def launch_fold(
    up: Tensor,  # [1 or G, n, Rb]; or down [K, Ra], to be copied
    core: Tensor | None,  # [G, Ra, Rb]
    dtype: torch.dtype,
    cache: CallCache | None = None,
    name: str = "fold",
) -> Tensor:
    """B [G·n, RA] in `dtype`, contiguous, zero beyond the rank."""
    ra = up.shape[-1] if core is None else core.shape[1]
    rank_a = padded_rank(ra)
    rows = up.shape[-2] * (1 if up.dim() == 2 else up.shape[0] if core is None else core.shape[0])
    if core is None and ra == rank_a and up.dtype == dtype and up.is_contiguous():
        return up if up.dim() == 2 else up.view(rows, ra)
    launch = once(cache, name, _prepare_fold, up, core, rank_a)
    b = up.new_empty(rows, rank_a, dtype=dtype)
    launch((up, core), (b,))
    return b


def _prepare_fold(up: Tensor, core: Tensor | None, rank_a: int) -> CachedLaunch:
    slices, n, up_strides = slices_of(up, core)
    block_n, block_b, num_warps = tuning.FOLD_CONFIG
    return CachedLaunch(
        _fold_kernel,
        (tuning.cdiv(n, block_n), slices),
        {"num_warps": num_warps},
        n=n,
        ra=up.shape[-1] if core is None else core.shape[1],
        rb=up.shape[-1],
        **named_strides("up", "gnb", up_strides),
        **core_strides(core),
        BLOCK_N=block_n,
        BLOCK_B=block_b,
        RA=rank_a,
    )
