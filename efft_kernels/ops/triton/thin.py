"""Passes over a tall matrix [M, C] beside thin ones of `rank` columns: what the factors' gradients
need.

    launch_thin        S = tall·thin_in; in the same pass, if P is given, the partial sums of
                       tall^T·P                 (P = x·down; S = dY·B with d_B = dY^T·P)
    launch_tall_grad   partial sums of tall^T·thin, split over rows
                                                (d_down = x^T·S; d_B = dY^T·P)
    launch_reduce      the second stage: the partial sums added in a fixed order, in float32

No atomics: the same inputs on the same device give the same bits. Bytes moved, operands once:

    thin               M·C + C·RANK + M·rank; with P also M·rank + programs·C·RANK·4
    tall_grad          M·C + M·rank + splits·C·RANK·4
    reduce             parts·C·RANK·4 + C·rank

`plan` in ops/cost_model.py counts them, and the tests hold the launches to it. With more row tiles
than programs, `thin` also updates its own partial sums in place, which stay in L2.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .factors import padded_rank
from .launch import Plan, Plans


@triton.jit(do_not_specialize=["M"])
def _thin_kernel(
    tall_ptr,  # [M, C], unit stride along C
    thin_in_ptr,  # [C, RANK], contiguous, zero beyond the true rank
    s_ptr,  # [M, width_s]: out
    p_ptr,  # [M, width_p], read if GRAD
    partial_ptr,  # [programs, C, RANK] float32: out if GRAD
    M,
    C,
    width_s,
    width_p,
    stride_tall,
    stride_s,
    stride_p,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    RANK: tl.constexpr,
    EVEN_C: tl.constexpr,
    GRAD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    pid = tl.program_id(0)
    programs = tl.num_programs(0)
    offs_r = tl.arange(0, RANK)
    for block in range(pid, tl.cdiv(M, BLOCK_M), programs):
        offs_m = tl.cast(block, tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        in_m = offs_m < M
        offs_c = tl.arange(0, BLOCK_C)
        tall_ptrs = tall_ptr + offs_m[:, None] * stride_tall + offs_c[None, :]
        thin_ptrs = thin_in_ptr + offs_c[:, None] * RANK + offs_r[None, :]
        s = tl.zeros((BLOCK_M, RANK), dtype=tl.float32)
        if GRAD:
            p = tl.load(
                p_ptr + offs_m[:, None] * stride_p + offs_r[None, :],
                mask=in_m[:, None] & (offs_r < width_p)[None, :],
                other=0.0,
            )
            partial_ptrs = (
                partial_ptr + pid.to(tl.int64) * C * RANK + offs_c[:, None] * RANK + offs_r[None, :]
            )
        for c in range(0, C, BLOCK_C):
            if EVEN_C:
                tall = tl.load(tall_ptrs, mask=in_m[:, None], other=0.0)
                thin = tl.load(thin_ptrs)
            else:
                in_c = offs_c < C - c
                tall = tl.load(tall_ptrs, mask=in_m[:, None] & in_c[None, :], other=0.0)
                thin = tl.load(thin_ptrs, mask=in_c[:, None], other=0.0)
            s = tl.dot(tall, thin, s, input_precision=PRECISION)
            if GRAD:
                part = tl.dot(tl.trans(tall), p, input_precision=PRECISION)
                in_part = (offs_c < C - c)[:, None]
                if block >= programs:
                    part += tl.load(partial_ptrs, mask=in_part, other=0.0)
                tl.store(partial_ptrs, part, mask=in_part)
                partial_ptrs += BLOCK_C * RANK
            tall_ptrs += BLOCK_C
            thin_ptrs += BLOCK_C * RANK
        tl.store(
            s_ptr + offs_m[:, None] * stride_s + offs_r[None, :],
            s.to(s_ptr.dtype.element_ty),
            mask=in_m[:, None] & (offs_r < width_s)[None, :],
        )
        if GRAD:
            # The next row block adds to this program's own partial sums, perhaps from other
            # threads.
            tl.debug_barrier()


@triton.jit(do_not_specialize=["M", "rows"])
def _tall_grad_kernel(
    tall_ptr,  # [M, C], unit stride along C
    thin_ptr,  # [M, width]
    partial_ptr,  # [splits, C, RANK] float32: out
    M,
    C,
    width,
    rows,  # per split, a multiple of BLOCK_M
    stride_tall,
    stride_thin,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    RANK: tl.constexpr,
    EVEN_C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    split = tl.program_id(1).to(tl.int64)
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_r = tl.arange(0, RANK)
    offs_m = split * rows + tl.arange(0, BLOCK_M)
    in_c = offs_c < C
    in_r = offs_r < width
    tall_ptrs = tall_ptr + offs_m[:, None] * stride_tall + offs_c[None, :]
    thin_ptrs = thin_ptr + offs_m[:, None] * stride_thin + offs_r[None, :]
    acc = tl.zeros((BLOCK_C, RANK), dtype=tl.float32)
    left = tl.minimum(M - split * rows, rows)
    for m in range(0, left, BLOCK_M):
        in_m = tl.arange(0, BLOCK_M) < left - m
        thin = tl.load(thin_ptrs, mask=in_m[:, None] & in_r[None, :], other=0.0)
        if EVEN_C:
            tall = tl.load(tall_ptrs, mask=in_m[:, None], other=0.0)
        else:
            tall = tl.load(tall_ptrs, mask=in_m[:, None] & in_c[None, :], other=0.0)
        acc = tl.dot(tl.trans(tall), thin, acc, input_precision=PRECISION)
        tall_ptrs += BLOCK_M * stride_tall
        thin_ptrs += BLOCK_M * stride_thin
    tl.store(
        partial_ptr + (split * C + offs_c[:, None]) * RANK + offs_r[None, :],
        acc,
        mask=in_c[:, None],
    )


@triton.jit
def _sum_parts(
    block,
    partial_ptr,  # [parts, C, RANK] float32, contiguous
    out_ptr,  # [C, width], contiguous
    parts,
    C,
    width,
    RANK: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
):
    offs = block * BLOCK + tl.arange(0, BLOCK)
    offs_part = tl.arange(0, BLOCK_PARTS)
    size = C * RANK
    inside = offs < size
    acc = tl.zeros((BLOCK_PARTS, BLOCK), dtype=tl.float32)
    for part in range(0, parts, BLOCK_PARTS):
        index = part + offs_part
        acc += tl.load(
            partial_ptr + index.to(tl.int64)[:, None] * size + offs[None, :],
            mask=(index < parts)[:, None] & inside[None, :],
            other=0.0,
        )
    c = offs // RANK
    r = offs % RANK
    tl.store(
        out_ptr + c * width + r,
        tl.sum(acc, axis=0).to(out_ptr.dtype.element_ty),
        mask=inside & (r < width),
    )


@triton.jit(do_not_specialize=["parts_a", "parts_b", "blocks_a"])
def _reduce_kernel(
    partial_a_ptr,  # [parts_a, C_a, RANK] float32, contiguous
    out_a_ptr,  # [C_a, width], contiguous
    partial_b_ptr,  # [parts_b, C_b, RANK] float32, contiguous, or None
    out_b_ptr,  # [C_b, width], contiguous, or None
    parts_a,
    parts_b,
    C_a,
    C_b,
    width,
    blocks_a,  # programs of the first sum; the rest do the second
    RANK: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
):
    pid = tl.program_id(0)
    if pid < blocks_a:
        _sum_parts(pid, partial_a_ptr, out_a_ptr, parts_a, C_a, width, RANK, BLOCK, BLOCK_PARTS)
    elif partial_b_ptr is not None:
        _sum_parts(
            pid - blocks_a, partial_b_ptr, out_b_ptr, parts_b, C_b, width, RANK, BLOCK, BLOCK_PARTS
        )


def launch_thin(
    tall: Tensor,  # [M, C], unit last stride
    thin_in: Tensor,  # [C, RANK], contiguous
    s: Tensor,  # [M, width], filled here
    p: Tensor | None,  # [M, rank]
    config: tuning.PassConfig | None = None,
    plans: Plans | None = None,
) -> Tensor | None:
    """Fill s with tall·thin_in; with p also return the partial sums [programs, C, RANK] of
    tall^T·p.
    """
    plans = {} if plans is None else plans
    plan: Plan | None = plans.get("thin")
    if plan is None:
        plan = plans["thin"] = _thin_plan(tall, thin_in, s, p, config)
    partial = None
    if p is not None:
        partial = tall.new_empty((plan.grid[0], *thin_in.shape), dtype=torch.float32)
    plan((tall, thin_in, s, p, partial))
    return partial


def _thin_plan(
    tall: Tensor,
    thin_in: Tensor,
    s: Tensor,
    p: Tensor | None,
    config: tuning.PassConfig | None,
) -> Plan:
    m, c = tall.shape
    rank = thin_in.shape[1]
    block_m, block_c, programs, num_warps, num_stages = config or tuning.pass_config(
        "thin" if p is None else "thin_grad",
        m,
        c,
        rank,
        tall.dtype,
        aligned=(tall.stride(0) | c) % 16 == 0,
        index=tall.device.index,
    )
    return Plan(
        _thin_kernel,
        (min(tuning.cdiv(m, block_m), programs),),
        m,
        c,
        s.shape[1],
        0 if p is None else p.shape[1],
        tall.stride(0),
        s.stride(0),
        0 if p is None else p.stride(0),
        block_m,
        block_c,
        rank,
        c % block_c == 0,
        p is not None,
        tuning.dot_precision(tall.dtype),
        num_warps=num_warps,
        num_stages=num_stages,
    )


def launch_tall_grad(
    tall: Tensor,  # [M, C], unit last stride
    thin: Tensor,  # [M, width], unit last stride
    config: tuning.PassConfig | None = None,
    plans: Plans | None = None,
    name: str = "tall_grad",
) -> Tensor:
    """The partial sums [splits, C, RANK] of tall^T·thin, float32."""
    plans = {} if plans is None else plans
    plan: _TallGradPlan | None = plans.get(name)
    if plan is None:
        plan = plans[name] = _tall_grad_plan(tall, thin, config)
    partial = tall.new_empty(plan.partial, dtype=torch.float32)
    plan.launch((tall, thin, partial))
    return partial


class _TallGradPlan(NamedTuple):
    launch: Plan
    partial: tuple[int, int, int]  # splits, C, RANK


def _tall_grad_plan(tall: Tensor, thin: Tensor, config: tuning.PassConfig | None) -> _TallGradPlan:
    m, c = tall.shape
    rank = padded_rank(thin.shape[1])
    block_m, block_c, splits, num_warps, num_stages = config or tuning.pass_config(
        "tall_grad",
        m,
        c,
        rank,
        tall.dtype,
        aligned=(tall.stride(0) | c) % 16 == 0,
        index=tall.device.index,
    )
    rows = tuning.cdiv(tuning.cdiv(m, splits), block_m) * block_m
    splits = tuning.cdiv(m, rows)
    launch = Plan(
        _tall_grad_kernel,
        (tuning.cdiv(c, block_c), splits),
        m,
        c,
        thin.shape[1],
        rows,
        tall.stride(0),
        thin.stride(0),
        block_m,
        block_c,
        rank,
        c % block_c == 0,
        tuning.dot_precision(tall.dtype),
        num_warps=num_warps,
        num_stages=num_stages,
    )
    return _TallGradPlan(launch, (splits, c, rank))


def launch_reduce(
    first: Tensor,  # [parts, C, RANK]
    second: Tensor | None,  # [other parts, other C, RANK]
    width: int,
    dtypes: tuple[torch.dtype, torch.dtype],
    plans: Plans | None = None,
    shape: torch.Size | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Both sums over the first dim in one launch, cropped to [C, width] and rounded once; `shape`
    is another one for the first, of as many elements.
    """
    plans = {} if plans is None else plans
    plan: Plan | None = plans.get("reduce")
    if plan is None:
        plan = plans["reduce"] = _reduce_plan(first, second, width)
    out = first.new_empty(shape or (first.shape[1], width), dtype=dtypes[0])
    other = None
    if second is not None:
        other = second.new_empty((second.shape[1], width), dtype=dtypes[1])
    plan((first, out, second, other))
    return out, other


def _reduce_plan(first: Tensor, second: Tensor | None, width: int) -> Plan:
    parts, c, rank = first.shape
    block, block_parts, num_warps = tuning.REDUCE_CONFIG
    blocks = tuning.cdiv(c * rank, block)
    other_parts = other_c = other_blocks = 0
    if second is not None:
        other_parts, other_c, _ = second.shape
        other_blocks = tuning.cdiv(other_c * rank, block)
    return Plan(
        _reduce_kernel,
        (blocks + other_blocks,),
        parts,
        other_parts,
        c,
        other_c,
        width,
        blocks,
        rank,
        block,
        block_parts,
        num_warps=num_warps,
    )
