"""Column slices from tensors of their own put side by side, with the thin products of the whole.

    launch_gather    dY = [slice_0 | slice_1 | slice_2]    partial sums of S = dY·B and d_B = dY^T·P

The gradients of q, k and v come from attention apart, and the GEMM that follows wants them in one
matrix: the pass that copies them reads every element of dY anyway. Bytes moved, operands once: M·N
read and written, column_parts·M·RA·4 and row_parts·N·RA·4 of partial sums, which reduce.py adds.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..fallback import padded_rank
from . import tuning
from .configs import PassConfig
from .launch_cache import CachedLaunch, CallCache, once
from .norm import _factor


@triton.jit(do_not_specialize=["M", "rows"])
def _gather_kernel(
    slice_0_ptr,  # [M, C], unit stride along the columns
    slice_1_ptr,  # [M, C]
    slice_2_ptr,  # [M, C]
    b_ptr,  # [3·C, ra]
    p_ptr,  # [M, ra]
    out_ptr,  # [M, 3·C]: out, or None
    s_ptr,  # [column parts, M, RA] float32: out
    d_b_ptr,  # [row parts, 3·C, RA] float32: out
    M,
    C,
    ra,
    rows,  # per part, a multiple of BLOCK_M
    stride_slice_m,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    RA: tl.constexpr,
    EVEN_C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """BLOCK_C columns of one slice in one part of the rows."""
    dtype: tl.constexpr = slice_0_ptr.dtype.element_ty
    tiles = tl.cdiv(C, BLOCK_C)
    column = tl.program_id(0)
    part = tl.program_id(1).to(tl.int64)
    g = column // tiles
    slice_ptr = slice_0_ptr
    if g == 1:
        slice_ptr = slice_1_ptr
    if g == 2:
        slice_ptr = slice_2_ptr
    offs_c = (column % tiles) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = offs_c < C
    offs_a = tl.arange(0, RA)
    b = _factor(b_ptr + g * C * ra, offs_c, offs_a, ra, C, dtype)
    d_b = tl.zeros((BLOCK_C, RA), dtype=tl.float32)
    first = part * rows
    left = tl.minimum(M - first, rows)
    for m in range(0, left, BLOCK_M):
        offs_m = first + m + tl.arange(0, BLOCK_M)
        in_m = m + tl.arange(0, BLOCK_M) < left
        inside = in_m[:, None] if EVEN_C else in_m[:, None] & in_c[None, :]
        in_p = in_m[:, None] & (offs_a < ra)[None, :]
        p = tl.load(p_ptr + offs_m[:, None] * ra + offs_a[None, :], mask=in_p, other=0.0)
        dy_ptrs = slice_ptr + offs_m[:, None] * stride_slice_m + offs_c[None, :]
        dy = tl.load(dy_ptrs, mask=inside, other=0.0)
        if out_ptr is not None:
            out_ptrs = out_ptr + offs_m[:, None] * (3 * C) + (g * C + offs_c)[None, :]
            tl.store(out_ptrs, dy, mask=inside)
        s = tl.dot(dy, b, input_precision=PRECISION)
        s_ptrs = s_ptr + (column.to(tl.int64) * M + offs_m[:, None]) * RA + offs_a[None, :]
        tl.store(s_ptrs, s, mask=in_m[:, None])
        d_b = tl.dot(tl.trans(dy), p, d_b, input_precision=PRECISION)
    part_rows = (part * 3 * C + g * C + offs_c)[:, None]
    tl.store(d_b_ptr + part_rows * RA + offs_a[None, :], d_b, mask=in_c[:, None])


def launch_gather(
    slices: tuple[Tensor, Tensor, Tensor],  # [M, C] each, of equal strides, unit last stride
    b: Tensor,  # [3·C, Ra]
    p: Tensor,  # [M, Ra]
    *,
    copy: bool,
    config: PassConfig,
    cache: CallCache | None = None,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """dY from its three slices and the thin products of its gradients, in one launch.

    Args:
        slices, b, p: b and p contiguous.
        copy: form dY.
        config: `programs` is the number of parts of the rows.

    Returns:
        dY [M, 3·C] or None, partial sums of S [column parts, M, RA] and of d_B [row parts, 3·C, RA]
        in float32.
    """
    first, _, _ = slices
    m, c = first.shape
    launch, s_size, d_b_size = once(cache, "gather", _prepare_gather, first, b, config)
    out = first.new_empty(m, 3 * c) if copy else None
    s = b.new_empty(s_size, dtype=torch.float32)
    d_b = b.new_empty(d_b_size, dtype=torch.float32)
    launch((*slices, b, p), (out, s, d_b))
    return out, s, d_b


def _prepare_gather(
    of: Tensor, b: Tensor, config: PassConfig
) -> tuple[CachedLaunch, tuple[int, int, int], tuple[int, int, int]]:
    m, c = of.shape
    ra = b.shape[1]
    block_m, block_c, parts, num_warps, num_stages = config
    rows = tuning.cdiv(tuning.cdiv(m, parts), block_m) * block_m
    parts = tuning.cdiv(m, rows)
    columns = 3 * tuning.cdiv(c, block_c)
    launch = CachedLaunch(
        _gather_kernel,
        (columns, parts),
        {"num_warps": num_warps, "num_stages": num_stages},
        M=m,
        C=c,
        ra=ra,
        rows=rows,
        stride_slice_m=of.stride(0),
        BLOCK_M=block_m,
        BLOCK_C=block_c,
        RA=padded_rank(ra),
        EVEN_C=c % block_c == 0,
        PRECISION=tuning.dot_precision(of.dtype),
    )
    return launch, (columns, m, padded_rank(ra)), (parts, 3 * c, padded_rank(ra))
