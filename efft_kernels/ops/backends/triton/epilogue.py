"""The GEMM's epilogue: the low-rank product, added to a tile's accumulator after the loop.

A tile's columns lie in one slice g: T = P·core[g] is formed, and T·thin_out[g]^T added. With CROSS
they may lie in several: then the tile's rows of B = stack_g thin_out[g]·core[g]^T are formed, each
from its own slice alone, so that an infinity stays where it belongs, and P·B^T is added. core and
thin_out are read as they are stored, cast to P's dtype.

shape, thin_out, core and config are the tuples that the kernel in gemm.py makes: Shape, Up, Core
and TileConfig.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _add_within_slice(acc, p, p_ptrs, in_m, g, offs_c, shape, thin_out, core, config: tl.constexpr):
    """acc + P·core[g]·thin_out[g]^T, all columns within slice g."""
    dtype: tl.constexpr = p.dtype
    rows = offs_c - g * shape.slice_c
    in_slice = rows < shape.slice_c
    out_ptrs = thin_out.ptr + g * thin_out.stride_g + rows[:, None] * thin_out.stride_n
    STEP_A: tl.constexpr = config.STEP_A
    STEP_B: tl.constexpr = config.STEP_A if core.ptr is None else config.STEP_B
    for j in tl.static_range(0, config.RB, STEP_B):
        offs_b = j + tl.arange(0, STEP_B)
        in_b = offs_b < core.rb
        # T = P·core, STEP_B of its columns; without a core T is P.
        if core.ptr is None:
            if config.COMPUTE_P:
                t = p
            else:
                in_p = in_m[:, None] & (offs_b < core.ra)[None, :]
                t = tl.load(p_ptrs + offs_b[None, :], mask=in_p, other=0.0)
        else:
            t_acc = tl.zeros((config.BLOCK_M, STEP_B), dtype=tl.float32)
            for i in tl.static_range(0, config.RA, STEP_A):
                offs_a = i + tl.arange(0, STEP_A)
                in_a = offs_a < core.ra
                if config.COMPUTE_P:
                    p_block = p
                else:
                    p_block = tl.load(
                        p_ptrs + offs_a[None, :], mask=in_m[:, None] & in_a[None, :], other=0.0
                    )
                core_block = tl.load(
                    core.ptr
                    + g * core.stride_g
                    + offs_a[:, None] * core.stride_a
                    + offs_b[None, :] * core.stride_b,
                    mask=in_a[:, None] & in_b[None, :],
                    other=0.0,
                )
                t_acc = tl.dot(
                    p_block, core_block.to(dtype), t_acc, input_precision=config.PRECISION
                )
            t = tl.where(in_b[None, :], t_acc, 0.0).to(dtype)
        # Load thin_out, and the product T·thin_out^T.
        out_block = tl.load(
            out_ptrs + offs_b[None, :] * thin_out.stride_b,
            mask=in_slice[:, None] & in_b[None, :],
            other=0.0,
        )
        acc = tl.dot(t, tl.trans(out_block.to(dtype)), acc, input_precision=config.PRECISION)
    return acc


@triton.jit
def _add_across_slices(acc, p, p_ptrs, in_m, offs_c, shape, thin_out, core, config: tl.constexpr):
    """acc + P·B^T for columns of several slices."""
    dtype: tl.constexpr = p.dtype
    STEP_A: tl.constexpr = config.STEP_A
    STEP_B: tl.constexpr = config.STEP_B
    in_c = (offs_c < shape.C)[:, None]
    slice_of = offs_c // shape.slice_c
    row_offsets = slice_of * thin_out.stride_g + offs_c % shape.slice_c * thin_out.stride_n
    out_ptrs = thin_out.ptr + row_offsets[:, None]
    for i in tl.static_range(0, config.RA, STEP_A):
        offs_a = i + tl.arange(0, STEP_A)
        in_a = (offs_a < core.ra)[None, :]
        # STEP_A columns of the tile's rows of B; without a core B is thin_out.
        if core.ptr is None:
            b = tl.load(out_ptrs + offs_a[None, :] * thin_out.stride_b, mask=in_c & in_a, other=0.0)
        else:
            b = tl.zeros((config.BLOCK_C, STEP_A), dtype=tl.float32)
            last = tl.minimum(tl.max(offs_c, axis=0), shape.C - 1) // shape.slice_c
            for g in tl.range(tl.min(slice_of, axis=0), last + 1, num_stages=1):
                b_g = tl.zeros((config.BLOCK_C, STEP_A), dtype=tl.float32)
                for j in tl.static_range(0, config.RB, STEP_B):
                    offs_b = j + tl.arange(0, STEP_B)
                    in_b = offs_b < core.rb
                    out_block = tl.load(
                        out_ptrs + offs_b[None, :] * thin_out.stride_b,
                        mask=in_c & in_b[None, :],
                        other=0.0,
                    )
                    core_block = tl.load(
                        core.ptr
                        + g * core.stride_g
                        + offs_a[None, :] * core.stride_a
                        + offs_b[:, None] * core.stride_b,
                        mask=in_a & in_b[:, None],
                        other=0.0,
                    )
                    b_g = tl.dot(
                        out_block.to(dtype),
                        core_block.to(dtype),
                        b_g,
                        input_precision=config.PRECISION,
                    )
                b = tl.where((slice_of == g)[:, None] & in_a, b_g, b)
        # Load P, and the product P·B^T.
        if config.COMPUTE_P:
            p_block = p
        else:
            p_block = tl.load(p_ptrs + offs_a[None, :], mask=in_m[:, None] & in_a, other=0.0)
        acc = tl.dot(p_block, tl.trans(b.to(dtype)), acc, input_precision=config.PRECISION)
    return acc


@triton.jit
def add_low_rank(
    acc,  # [BLOCK_M, BLOCK_C] float32
    p,  # [BLOCK_M, RA]: P if COMPUTE_P
    p_ptrs,  # [BLOCK_M, 1]: its rows; read, in steps of STEP_A ranks, if not COMPUTE_P
    in_m,  # [BLOCK_M]
    tile_c,
    shape,
    thin_out,
    core,
    config: tl.constexpr,
):
    """acc + P·core[g]·thin_out[g]^T in the columns of column tile `tile_c`."""
    first_c = tl.cast(tile_c, tl.int64) * config.BLOCK_C
    offs_c = first_c + tl.arange(0, config.BLOCK_C)
    if config.CROSS:
        acc = _add_across_slices(acc, p, p_ptrs, in_m, offs_c, shape, thin_out, core, config)
    else:
        g = first_c // shape.slice_c
        acc = _add_within_slice(acc, p, p_ptrs, in_m, g, offs_c, shape, thin_out, core, config)
    return acc
