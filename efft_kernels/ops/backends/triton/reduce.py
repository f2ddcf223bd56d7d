"""The second stage of the factors' gradients: partial sums added in a fixed order, in float32.

No atomics, so the same inputs on the same device give the same bits. Bytes moved, for each sum:
parts·rows·(padded columns)·4 read, rows·columns written.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .launch_cache import CachedLaunch, CallCache, once

MOST_SUMS = 5  # of a launch
_WARPS = 4
WIDE, NARROW = 128, 64  # elements of a program where there are few parts, and where there are many
TILE = tl.constexpr(4096)  # and its loads at a time
_COUNTS = [f"{name}_{i}" for name in ("parts", "end") for i in range(MOST_SUMS)]


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


@triton.jit(do_not_specialize=_COUNTS)
def _reduce_kernel(
    partial_0_ptr,  # [parts_0, rows_0, COLS_0] float32, contiguous; None: no more sums
    out_0_ptr,  # [rows_0, cols_0], contiguous
    partial_1_ptr,  # [parts_1, rows_1, COLS_1] float32, contiguous
    out_1_ptr,  # [rows_1, cols_1], contiguous
    partial_2_ptr,  # [parts_2, rows_2, COLS_2] float32, contiguous
    out_2_ptr,  # [rows_2, cols_2], contiguous
    partial_3_ptr,  # [parts_3, rows_3, COLS_3] float32, contiguous
    out_3_ptr,  # [rows_3, cols_3], contiguous
    partial_4_ptr,  # [parts_4, rows_4, COLS_4] float32, contiguous
    out_4_ptr,  # [rows_4, cols_4], contiguous
    parts_0,
    parts_1,
    parts_2,
    parts_3,
    parts_4,
    rows_0,
    rows_1,
    rows_2,
    rows_3,
    rows_4,
    cols_0,
    cols_1,
    cols_2,
    cols_3,
    cols_4,
    end_0,  # the program after the last of sum 0
    end_1,
    end_2,
    end_3,
    end_4,
    COLS_0: tl.constexpr,
    COLS_1: tl.constexpr,
    COLS_2: tl.constexpr,
    COLS_3: tl.constexpr,
    COLS_4: tl.constexpr,
    BLOCK_0: tl.constexpr,  # elements of a program
    BLOCK_1: tl.constexpr,
    BLOCK_2: tl.constexpr,
    BLOCK_3: tl.constexpr,
    BLOCK_4: tl.constexpr,
):
    """Up to five sums in one launch, one after the other in the grid. A program adds up as many
    loads for each sum: WIDE elements of few parts, or NARROW ones of more parts at a time.
    """
    pid = tl.program_id(0)
    if pid < end_0:
        if partial_0_ptr is not None:
            _sum_parts(
                pid,
                partial_0_ptr,
                out_0_ptr,
                parts_0,
                rows_0,
                cols_0,
                COLS_0,
                BLOCK_0,
                TILE // BLOCK_0,
            )
    elif pid < end_1:
        if partial_1_ptr is not None:
            _sum_parts(
                pid - end_0,
                partial_1_ptr,
                out_1_ptr,
                parts_1,
                rows_1,
                cols_1,
                COLS_1,
                BLOCK_1,
                TILE // BLOCK_1,
            )
    elif pid < end_2:
        if partial_2_ptr is not None:
            _sum_parts(
                pid - end_1,
                partial_2_ptr,
                out_2_ptr,
                parts_2,
                rows_2,
                cols_2,
                COLS_2,
                BLOCK_2,
                TILE // BLOCK_2,
            )
    elif pid < end_3:
        if partial_3_ptr is not None:
            _sum_parts(
                pid - end_2,
                partial_3_ptr,
                out_3_ptr,
                parts_3,
                rows_3,
                cols_3,
                COLS_3,
                BLOCK_3,
                TILE // BLOCK_3,
            )
    elif pid < end_4:
        if partial_4_ptr is not None:
            _sum_parts(
                pid - end_3,
                partial_4_ptr,
                out_4_ptr,
                parts_4,
                rows_4,
                cols_4,
                COLS_4,
                BLOCK_4,
                TILE // BLOCK_4,
            )


Sum = tuple[Tensor | None, Tensor | None]  # partial sums, and the tensor they add up to


def launch_reduce(sums: Sequence[Sum], cache: CallCache | None = None, few: int = 0) -> None:
    """out = Σ partial for some pairs in one launch, cropped to out's columns and rounded once.

    Args:
        sums: at most MOST_SUMS pairs (partial, out); partial is newly allocated and seen as
            [parts, rows of out, padded columns], out is contiguous. A pair with None is left out.
        cache: of the call.
        few: how many of the first sums are of few parts.
    """
    given = [pair for pair in sums if pair[0] is not None and pair[1] is not None]
    launch = once(cache, f"reduce {len(given)} {few}", _prepare_reduce, given, few)
    launch((*itertools.chain(*given), *[None] * (2 * (MOST_SUMS - len(given)))))


class _SumSize(NamedTuple):
    parts: int = 0
    rows: int = 0
    cols: int = 1
    padded_cols: int = 16
    block: int = NARROW
    programs: int = 0

    @classmethod
    def of(cls, partial: Tensor, out: Tensor, block: int) -> _SumSize:
        cols, padded_cols = out.shape[-1], partial.shape[-1]
        rows = out.numel() // cols
        parts = partial.numel() // (rows * padded_cols)
        programs = tuning.cdiv(rows * padded_cols, block)
        return cls(parts, rows, cols, padded_cols, block, programs)


def _prepare_reduce(sums: Sequence[tuple[Tensor, Tensor]], few: int) -> CachedLaunch:
    sizes = [_SumSize.of(*pair, WIDE if i < few else NARROW) for i, pair in enumerate(sums)]
    sizes += [_SumSize()] * (MOST_SUMS - len(sizes))
    ends = itertools.accumulate(size.programs for size in sizes)
    arguments: dict[str, int] = {}
    for i, (size, end) in enumerate(zip(sizes, ends, strict=True)):
        arguments |= {
            f"parts_{i}": size.parts,
            f"rows_{i}": size.rows,
            f"cols_{i}": size.cols,
            f"end_{i}": end,
            f"COLS_{i}": size.padded_cols,
            f"BLOCK_{i}": size.block,
        }
    grid = (sum(size.programs for size in sizes),)
    return CachedLaunch(_reduce_kernel, grid, {"num_warps": _WARPS}, **arguments)
