"""What follows the GEMM's loop: the low-rank product added to a tile's accumulator.

A tile's columns lie in one slice g: T = P·core[g] is formed, and T·thin_out[g]^T added. With CROSS
they may lie in several: then the tile's rows of B = stack_g thin_out[g]·core[g]^T are formed, each
from its own slice alone, so that an infinity stays where it belongs, and P·B^T is added. core and
thin_out are read as they are stored, cast to the rows' dtype.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _add_slice(
    acc,
    p,
    p_ptrs,
    in_m,
    g,
    offs_c,
    slice_c,
    core_ptr,
    thin_out_ptr,
    width,
    width_out,
    stride_og,
    stride_oc,
    stride_or,
    stride_cg,
    stride_cp,
    stride_ct,
    BLOCK_M: tl.constexpr,
    RANK: tl.constexpr,
    RANK_OUT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    RIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """acc + P·core[g]·thin_out[g]^T, all columns within slice g; `p` is P if RIDE, else it is read
    in steps of BLOCK_R ranks.
    """
    dtype: tl.constexpr = p.dtype
    rows = offs_c - g * slice_c
    in_slice = rows < slice_c
    out_ptrs = thin_out_ptr + g * stride_og + rows[:, None] * stride_oc
    STEP_IN: tl.constexpr = RANK if RIDE or BLOCK_R > RANK else BLOCK_R
    STEP_CORE: tl.constexpr = RANK_OUT if BLOCK_R > RANK_OUT else BLOCK_R
    STEP_OUT: tl.constexpr = STEP_IN if core_ptr is None else STEP_CORE
    for j in tl.static_range(0, RANK_OUT, STEP_OUT):
        offs_t = j + tl.arange(0, STEP_OUT)
        in_t = offs_t < width_out
        if core_ptr is None:
            if RIDE:
                t = p
            else:
                in_p = in_m[:, None] & (offs_t < width)[None, :]
                t = tl.load(p_ptrs + offs_t[None, :], mask=in_p, other=0.0)
        else:
            t_acc = tl.zeros((BLOCK_M, STEP_OUT), dtype=tl.float32)
            for r in tl.static_range(0, RANK, STEP_IN):
                offs_p = r + tl.arange(0, STEP_IN)
                in_p = offs_p < width
                if RIDE:
                    part = p
                else:
                    part = tl.load(
                        p_ptrs + offs_p[None, :], mask=in_m[:, None] & in_p[None, :], other=0.0
                    )
                core = tl.load(
                    core_ptr
                    + g * stride_cg
                    + offs_p[:, None] * stride_cp
                    + offs_t[None, :] * stride_ct,
                    mask=in_p[:, None] & in_t[None, :],
                    other=0.0,
                )
                t_acc = tl.dot(part, core.to(dtype), t_acc, input_precision=PRECISION)
            t = tl.where(in_t[None, :], t_acc, 0.0).to(dtype)
        out = tl.load(
            out_ptrs + offs_t[None, :] * stride_or,
            mask=in_slice[:, None] & in_t[None, :],
            other=0.0,
        )
        acc = tl.dot(t, tl.trans(out.to(dtype)), acc, input_precision=PRECISION)
    return acc


@triton.jit
def _add_slices(
    acc,
    p,
    p_ptrs,
    in_m,
    offs_c,
    C,
    slice_c,
    core_ptr,
    thin_out_ptr,
    width,
    width_out,
    stride_og,
    stride_oc,
    stride_or,
    stride_cg,
    stride_cp,
    stride_ct,
    BLOCK_C: tl.constexpr,
    RANK: tl.constexpr,
    RANK_OUT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    RIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """acc + P·B^T for columns of several slices; otherwise as `_add_slice`."""
    dtype: tl.constexpr = p.dtype
    STEP_IN: tl.constexpr = RANK if RIDE or BLOCK_R > RANK else BLOCK_R
    STEP_CORE: tl.constexpr = RANK_OUT if BLOCK_R > RANK_OUT else BLOCK_R
    in_c = (offs_c < C)[:, None]
    slice_of = offs_c // slice_c
    out_ptrs = thin_out_ptr + (slice_of * stride_og + offs_c % slice_c * stride_oc)[:, None]
    for r in tl.static_range(0, RANK, STEP_IN):
        offs_p = r + tl.arange(0, STEP_IN)
        in_p = (offs_p < width)[None, :]
        if core_ptr is None:
            b = tl.load(out_ptrs + offs_p[None, :] * stride_or, mask=in_c & in_p, other=0.0)
        else:
            b = tl.zeros((BLOCK_C, STEP_IN), dtype=tl.float32)
            last = tl.minimum(tl.max(offs_c, axis=0), C - 1) // slice_c
            for g in tl.range(tl.min(slice_of, axis=0), last + 1, num_stages=1):
                b_g = tl.zeros((BLOCK_C, STEP_IN), dtype=tl.float32)
                for j in tl.static_range(0, RANK_OUT, STEP_CORE):
                    offs_t = j + tl.arange(0, STEP_CORE)
                    in_t = offs_t < width_out
                    out = tl.load(
                        out_ptrs + offs_t[None, :] * stride_or, mask=in_c & in_t[None, :], other=0.0
                    )
                    core = tl.load(
                        core_ptr
                        + g * stride_cg
                        + offs_p[None, :] * stride_cp
                        + offs_t[:, None] * stride_ct,
                        mask=in_p & in_t[:, None],
                        other=0.0,
                    )
                    b_g = tl.dot(out.to(dtype), core.to(dtype), b_g, input_precision=PRECISION)
                b = tl.where((slice_of == g)[:, None] & in_p, b_g, b)
        if RIDE:
            part = p
        else:
            part = tl.load(p_ptrs + offs_p[None, :], mask=in_m[:, None] & in_p, other=0.0)
        acc = tl.dot(part, tl.trans(b.to(dtype)), acc, input_precision=PRECISION)
    return acc


@triton.jit
def add_low_rank(
    acc,  # [BLOCK_M, BLOCK_C] float32
    p,  # [BLOCK_M, RANK]: P if RIDE
    p_ptrs,  # [BLOCK_M, 1]: its rows, read if not RIDE
    in_m,  # [BLOCK_M]
    tile_c,
    C,
    slice_c,  # columns of a slice
    core_ptr,  # [G, width, width_out], any strides and floating dtype, or None: the identity
    thin_out_ptr,  # [1 or G, slice_c, width_out], any strides and floating dtype
    width,
    width_out,
    stride_og,
    stride_oc,
    stride_or,
    stride_cg,
    stride_cp,
    stride_ct,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    RANK: tl.constexpr,
    RANK_OUT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    CROSS: tl.constexpr,
    RIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """acc + P·core[g]·thin_out[g]^T in the columns of column tile `tile_c`."""
    offs_c = tl.cast(tile_c, tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    if CROSS:
        acc = _add_slices(
            acc,
            p,
            p_ptrs,
            in_m,
            offs_c,
            C,
            slice_c,
            core_ptr,
            thin_out_ptr,
            width,
            width_out,
            stride_og,
            stride_oc,
            stride_or,
            stride_cg,
            stride_cp,
            stride_ct,
            BLOCK_C,
            RANK,
            RANK_OUT,
            BLOCK_R,
            RIDE,
            PRECISION,
        )
    else:
        acc = _add_slice(
            acc,
            p,
            p_ptrs,
            in_m,
            tl.cast(tile_c, tl.int64) * BLOCK_C // slice_c,
            offs_c,
            slice_c,
            core_ptr,
            thin_out_ptr,
            width,
            width_out,
            stride_og,
            stride_oc,
            stride_or,
            stride_cg,
            stride_cp,
            stride_ct,
            BLOCK_M,
            RANK,
            RANK_OUT,
            BLOCK_R,
            RIDE,
            PRECISION,
        )
    return acc
