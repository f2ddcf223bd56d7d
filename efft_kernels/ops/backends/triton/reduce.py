"""The second stage of the factors' gradients: partial sums added in a fixed order, in float32.

No atomics, so the same inputs on the same device give the same bits. Bytes moved, for each sum:
parts·rows·(padded columns)·4 read, rows·columns written.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .launch_cache import CachedLaunch, CallCache, once


@triton.jit
def _sum_parts(
    block,
    partial_ptr,  # [parts, rows, COLS] float32, contiguous
    out_ptr,  # [rows, cols], contiguous
    parts,
    rows,
    cols,
    COLS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
):
    """BLOCK elements of out = Σ_part partial[part], BLOCK_PARTS parts at a time."""
    offs = block * BLOCK + tl.arange(0, BLOCK)
    offs_part = tl.arange(0, BLOCK_PARTS)
    size = rows * COLS
    inside = offs < size
    # Load and add.
    acc = tl.zeros((BLOCK_PARTS, BLOCK), dtype=tl.float32)
    for part in range(0, parts, BLOCK_PARTS):
        index = part + offs_part
        acc += tl.load(
            partial_ptr + index.to(tl.int64)[:, None] * size + offs[None, :],
            mask=(index < parts)[:, None] & inside[None, :],
            other=0.0,
        )
    # Store, without the padding.
    row = offs // COLS
    col = offs % COLS
    tl.store(
        out_ptr + row * cols + col,
        tl.sum(acc, axis=0).to(out_ptr.dtype.element_ty),
        mask=inside & (col < cols),
    )


@triton.jit(do_not_specialize=["parts_up", "parts_core", "parts_down", "blocks_up", "blocks_core"])
def _reduce_kernel(
    partial_up_ptr,  # [parts_up, rows_up, RB] float32, contiguous; each of the three may be None
    d_up_ptr,  # [rows_up, rb], contiguous; where core and up were folded, d_B with rb = ra
    partial_core_ptr,  # [parts_core, rows_core, RB]
    d_core_ptr,  # [rows_core, rb]
    partial_down_ptr,  # [parts_down, rows_down, RA]
    d_down_ptr,  # [rows_down, ra]
    parts_up,
    parts_core,
    parts_down,
    rows_up,
    rows_core,
    rows_down,
    rb,
    ra,
    blocks_up,  # programs of the first sum; the next do the second, the rest the third
    blocks_core,
    RB: tl.constexpr,
    RA: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
):
    """d_up, d_core and d_down in one launch, each a sum over partial sums."""
    pid = tl.program_id(0)
    if pid < blocks_up:
        if partial_up_ptr is not None:
            _sum_parts(pid, partial_up_ptr, d_up_ptr, parts_up, rows_up, rb, RB, BLOCK, BLOCK_PARTS)
    elif pid < blocks_up + blocks_core:
        if partial_core_ptr is not None:
            block = pid - blocks_up
            _sum_parts(
                block,
                partial_core_ptr,
                d_core_ptr,
                parts_core,
                rows_core,
                rb,
                RB,
                BLOCK,
                BLOCK_PARTS,
            )
    elif partial_down_ptr is not None:
        block = pid - blocks_up - blocks_core
        _sum_parts(
            block, partial_down_ptr, d_down_ptr, parts_down, rows_down, ra, RA, BLOCK, BLOCK_PARTS
        )


Sum = tuple[Tensor | None, Tensor | None]  # partial sums, and the tensor they add up to


def launch_reduce(
    sums: tuple[Sum, Sum, Sum],  # of d_up, d_core, d_down
    cache: CallCache | None = None,
) -> None:
    """out = Σ partial for up to three pairs in one launch, cropped to out's columns and rounded
    once.

    Args:
        sums: Pairs (partial, out); partial is seen as [parts, rows of out, padded columns]. out is
            newly allocated, or None where the sum is not wanted. The first two pairs have the same
            columns.
        cache: Of the call.
    """
    launch = once(cache, "reduce", _prepare_reduce, sums)
    (partial_up, d_up), (partial_core, d_core), (partial_down, d_down) = sums
    launch(
        (),
        (
            None if d_up is None else partial_up,
            d_up,
            None if d_core is None else partial_core,
            d_core,
            None if d_down is None else partial_down,
            d_down,
        ),
    )


class _SumSize(NamedTuple):
    parts: int = 0
    rows: int = 0
    blocks: int = 0  # programs
    cols: int = 0
    padded_cols: int = 16

    @classmethod
    def of(cls, pair: Sum, block: int) -> _SumSize:
        partial, out = pair
        if partial is None or out is None:
            return cls()
        cols, padded_cols = out.shape[-1], partial.shape[-1]
        rows = out.numel() // cols
        parts = partial.numel() // (rows * padded_cols)
        return cls(parts, rows, tuning.cdiv(rows * padded_cols, block), cols, padded_cols)


def _prepare_reduce(sums: tuple[Sum, Sum, Sum]) -> CachedLaunch:
    block, block_parts, num_warps = tuning.REDUCE_CONFIG
    up, core, down = (_SumSize.of(pair, block) for pair in sums)
    first = up if up.blocks else core
    return CachedLaunch(
        _reduce_kernel,
        (up.blocks + core.blocks + down.blocks,),
        {"num_warps": num_warps},
        parts_up=up.parts,
        parts_core=core.parts,
        parts_down=down.parts,
        rows_up=up.rows,
        rows_core=core.rows,
        rows_down=down.rows,
        rb=first.cols,
        ra=down.cols,
        blocks_up=up.blocks,
        blocks_core=core.blocks,
        RB=first.padded_cols,
        RA=down.padded_cols,
        BLOCK=block,
        BLOCK_PARTS=block_parts,
    )
