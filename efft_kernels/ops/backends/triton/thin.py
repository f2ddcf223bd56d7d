"""Passes over a tall matrix [M, C] beside thin ones of `rank` columns: what the factors' gradients
need.

    launch_thin        S = Σ_g tall_g·up[g]·core[g]^T over the column slices of tall; given P, in
                       the same pass also the partial sums of up's and core's gradients. For each
                       slice g, with Q_g = tall_g·up[g] and T_g = P·core[g]:
                           S += Q_g·core[g]^T    d_up[g] = tall_g^T·T_g    d_core[g] = P^T·Q_g
                       Without a core S = Q and T = P: so P = x·down is this as well.
    launch_tall_grad   partial sums of tall^T·thin, split over rows        (d_down = x^T·S)
    launch_reduce      the second stage: partial sums added in a fixed order, in float32

No atomics: the same inputs on the same device give the same bits. Bytes moved, operands once
(G·c = C; factors and partial sums as they are stored):

    thin               M·C + M·ra + the factors; with P also M·ra, and
                       programs·(C·RB + G·ra·RB)·4, without a core programs·C·RA·4
    tall_grad          M·C + M·rank + splits·C·RANK·4
    reduce             parts·C·RANK·4 + C·rank for each sum

`plan` in ops/cost_model.py counts them, and the tests hold the launches to it. With more row tiles
than programs, `thin` also updates its own partial sums in place, mostly in L2; that is not counted.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..fallback import padded_rank
from . import tuning
from .factors import core_strides, slices_of
from .launch_cache import Plan, Plans


@triton.jit
def _to_half(t, dtype: tl.constexpr):
    """(t in `dtype`, the factor to multiply back). For float16 t is first brought to a magnitude of
    one by a power of two: a small core or a large dY would leave its range.
    """
    if dtype == tl.float16:
        top = tl.max(tl.abs(t.to(tl.float32)))
        exponent = top.to(tl.int32, bitcast=True) & 0x7F800000  # 2^e with its sign and mantissa cut
        exponent = tl.where(exponent >= 254 << 23, 127 << 23, exponent)
        scale = ((254 << 23) - exponent).to(tl.float32, bitcast=True)
        return (t.to(tl.float32) * scale).to(dtype), exponent.to(tl.float32, bitcast=True)
    else:
        return t.to(dtype), 1.0


@triton.jit
def _keep_part(ptrs, part, mask, again):
    """Store `part`; with `again`, added to what this program has stored there before."""
    if again:
        part += tl.load(ptrs, mask=mask, other=0.0)
    tl.store(ptrs, part, mask=mask)


@triton.jit(do_not_specialize=["M", "G"])
def _thin_kernel(
    tall_ptr,  # [M, G·C], unit stride along the columns
    up_ptr,  # [1 or G, C, rb], any strides (0 along the first where shared)
    core_ptr,  # [G, ra, rb], any strides, or None
    s_ptr,  # [M, ra]: out
    p_ptr,  # [M, ra], read if GRAD
    d_up_ptr,  # [programs, G, C, RB] float32: out if GRAD
    d_core_ptr,  # [programs, G, ra, RB] float32: out if GRAD and there is a core
    M,
    C,
    G,
    ra,
    rb,
    stride_tall,
    stride_ug,
    stride_un,
    stride_ur,
    stride_cg,
    stride_ca,
    stride_cb,
    stride_s,
    stride_p,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    RA: tl.constexpr,
    RB: tl.constexpr,
    EVEN_C: tl.constexpr,
    GRAD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    pid = tl.program_id(0)
    programs = tl.num_programs(0)
    dtype: tl.constexpr = tall_ptr.dtype.element_ty
    offs_a = tl.arange(0, RA)
    offs_b = tl.arange(0, RB)
    in_a = offs_a < ra
    in_b = offs_b < rb
    for block in range(pid, tl.cdiv(M, BLOCK_M), programs):
        offs_m = tl.cast(block, tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        in_m = offs_m < M
        again = block >= programs
        s = tl.zeros((BLOCK_M, RA), dtype=tl.float32)
        in_p = in_m[:, None] & in_a[None, :]
        for g in range(G):
            # P and core are read again where they are needed again: held over the loop below, they
            # would take the registers that it needs.
            slice_g = tl.cast(g, tl.int64)
            part_g = pid.to(tl.int64) * G + g
            if GRAD:
                p_ptrs = p_ptr + offs_m[:, None] * stride_p + offs_a[None, :]
                t = tl.load(p_ptrs, mask=in_p, other=0.0)
                d_up_ptrs = (
                    d_up_ptr + (part_g * C + tl.arange(0, BLOCK_C)[:, None]) * RB + offs_b[None, :]
                )
            if core_ptr is not None:
                core_ptrs = core_ptr + slice_g * stride_cg
                core_ptrs += offs_a[:, None] * stride_ca + offs_b[None, :] * stride_cb
                in_core = in_a[:, None] & in_b[None, :]
                q = tl.zeros((BLOCK_M, RB), dtype=tl.float32)
                if GRAD:
                    core, core_unit = _to_half(tl.load(core_ptrs, mask=in_core, other=0.0), dtype)
                    t = tl.dot(t, core, input_precision=PRECISION).to(dtype)
            else:
                q = s
            offs_c = tl.arange(0, BLOCK_C)
            tall_ptrs = tall_ptr + offs_m[:, None] * stride_tall + slice_g * C + offs_c[None, :]
            up_ptrs = (
                up_ptr
                + slice_g * stride_ug
                + offs_c[:, None].to(tl.int64) * stride_un
                + offs_b[None, :] * stride_ur
            )
            for c in range(0, C, BLOCK_C):
                in_c = offs_c < C - c
                if EVEN_C:
                    tall = tl.load(tall_ptrs, mask=in_m[:, None], other=0.0)
                    up = tl.load(up_ptrs, mask=in_b[None, :], other=0.0)
                else:
                    tall = tl.load(tall_ptrs, mask=in_m[:, None] & in_c[None, :], other=0.0)
                    up = tl.load(up_ptrs, mask=in_c[:, None] & in_b[None, :], other=0.0)
                q = tl.dot(tall, up.to(dtype), q, input_precision=PRECISION)
                if GRAD:
                    part = tl.dot(tl.trans(tall), t, input_precision=PRECISION)
                    if core_ptr is not None:
                        part *= core_unit
                    _keep_part(d_up_ptrs, part, in_c[:, None], again)
                    d_up_ptrs += BLOCK_C * RB
                tall_ptrs += BLOCK_C
                up_ptrs += BLOCK_C * stride_un
            if core_ptr is None:
                s = q
            else:
                # Beyond the rank core is zero; an infinity times that padding would be a NaN.
                q_in, q_unit = _to_half(tl.where(in_b[None, :], q, 0.0), dtype)
                core, core_unit = _to_half(tl.load(core_ptrs, mask=in_core, other=0.0), dtype)
                s_g = tl.dot(q_in, tl.trans(core), input_precision=PRECISION)
                s += s_g * (q_unit * core_unit)
                if GRAD:
                    p = tl.load(p_ptrs, mask=in_p, other=0.0)
                    _keep_part(
                        d_core_ptr + (part_g * ra + offs_a[:, None]) * RB + offs_b[None, :],
                        tl.dot(tl.trans(p), q_in, input_precision=PRECISION) * q_unit,
                        in_a[:, None],
                        again,
                    )
        tl.store(
            s_ptr + offs_m[:, None] * stride_s + offs_a[None, :],
            s.to(s_ptr.dtype.element_ty),
            mask=in_p,
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


@triton.jit(do_not_specialize=["parts_a", "parts_b", "parts_c", "blocks_a", "blocks_b"])
def _reduce_kernel(
    partial_a_ptr,  # [parts_a, C_a, RANK] float32, contiguous; each of the three may be None
    out_a_ptr,  # [C_a, width_a], contiguous
    partial_b_ptr,  # [parts_b, C_b, RANK]
    out_b_ptr,  # [C_b, width_a]
    partial_c_ptr,  # [parts_c, C_c, RANK_C]
    out_c_ptr,  # [C_c, width_c]
    parts_a,
    parts_b,
    parts_c,
    C_a,
    C_b,
    C_c,
    width,
    width_c,
    blocks_a,  # programs of the first sum; the next do the second, the rest the third
    blocks_b,
    RANK: tl.constexpr,
    RANK_C: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
):
    pid = tl.program_id(0)
    if pid < blocks_a:
        if partial_a_ptr is not None:
            _sum_parts(pid, partial_a_ptr, out_a_ptr, parts_a, C_a, width, RANK, BLOCK, BLOCK_PARTS)
    elif pid < blocks_a + blocks_b:
        if partial_b_ptr is not None:
            _sum_parts(
                pid - blocks_a,
                partial_b_ptr,
                out_b_ptr,
                parts_b,
                C_b,
                width,
                RANK,
                BLOCK,
                BLOCK_PARTS,
            )
    elif partial_c_ptr is not None:
        _sum_parts(
            pid - blocks_a - blocks_b,
            partial_c_ptr,
            out_c_ptr,
            parts_c,
            C_c,
            width_c,
            RANK_C,
            BLOCK,
            BLOCK_PARTS,
        )


class ThinPlan(NamedTuple):
    launch: Plan
    d_up: tuple[int, int, int, int]  # programs, G, C, RB
    d_core: tuple[int, int, int, int] | None  # programs, G, ra, RB


def launch_thin(
    tall: Tensor,  # [M, C], unit last stride
    up: Tensor,  # [1 or G, C/G, Rb]; or down [K, Ra]
    core: Tensor | None,  # [G, Ra, Rb]
    s: Tensor,  # [M, Ra], filled here
    p: Tensor | None,  # [M, Ra], unit last stride
    config: tuning.PassConfig | None = None,
    plans: Plans | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Fill s with Σ_g tall_g·up[g]·core[g]^T; with p also return the partial sums of d_up
    [programs, G, C/G, RB] and, where there is a core, of d_core [programs, G, Ra, RB].
    """
    plans = {} if plans is None else plans
    plan: ThinPlan | None = plans.get("thin")
    if plan is None:
        plan = plans["thin"] = _thin_plan(tall, up, core, s, p, config)
    d_up = d_core = None
    if p is not None:
        d_up = tall.new_empty(*plan.d_up, dtype=torch.float32)
        if plan.d_core is not None:
            d_core = tall.new_empty(*plan.d_core, dtype=torch.float32)
    plan.launch((tall, up, core, s, p, d_up, d_core))
    return d_up, d_core


def _thin_plan(
    tall: Tensor,
    up: Tensor,
    core: Tensor | None,
    s: Tensor,
    p: Tensor | None,
    config: tuning.PassConfig | None,
) -> ThinPlan:
    m, c = tall.shape
    slices, slice_c, strides = slices_of(up, core)
    ra, rb = s.shape[1], up.shape[-1]
    rank_a, rank_b = padded_rank(ra), padded_rank(rb)
    block_m, block_c, programs, num_warps, num_stages = config or tuning.pass_config(
        "thin" if p is None else "thin_grad",
        m,
        c,
        max(rank_a, rank_b),
        tall.dtype,
        aligned=tuning.is_aligned(tall.stride(0) | slice_c, ra),
        index=tall.device.index,
    )
    programs = min(tuning.cdiv(m, block_m), programs)
    launch = Plan(
        _thin_kernel,
        (programs,),
        m,
        slice_c,
        slices,
        ra,
        rb,
        tall.stride(0),
        *strides,
        *core_strides(core),
        s.stride(0),
        0 if p is None else p.stride(0),
        block_m,
        block_c,
        rank_a,
        rank_b,
        slice_c % block_c == 0,
        p is not None,
        tuning.dot_precision(tall.dtype),
        num_warps=num_warps,
        num_stages=num_stages,
    )
    d_core = None if core is None else (programs, slices, ra, rank_b)
    return ThinPlan(launch, (programs, slices, slice_c, rank_b), d_core)


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
    partial = tall.new_empty(*plan.partial, dtype=torch.float32)
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
        aligned=tuning.is_aligned(tall.stride(0) | c, thin.shape[1]),
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


Sum = tuple[Tensor | None, Tensor | None]  # partial sums, and the tensor they add up to


def launch_reduce(
    sums: tuple[Sum, Sum, Sum],  # of d_up, d_core, d_down
    plans: Plans | None = None,
) -> None:
    """out = the sum of partial, seen as [parts, rows of out, RANK], for up to three pairs in one
    launch: cropped to out's columns and rounded once. out is newly allocated, or None where the sum
    is not wanted; the first two pairs have one RANK and one number of columns.
    """
    plans = {} if plans is None else plans
    plan: Plan | None = plans.get("reduce")
    if plan is None:
        plan = plans["reduce"] = _reduce_plan(sums)
    (partial_a, a), (partial_b, b), (partial_c, c) = sums
    plan(
        (
            None if a is None else partial_a,
            a,
            None if b is None else partial_b,
            b,
            None if c is None else partial_c,
            c,
        ),
        fresh=True,
    )


class _SumSize(NamedTuple):
    parts: int = 0
    rows: int = 0
    blocks: int = 0  # programs
    width: int = 0
    rank: int = 16

    @classmethod
    def of(cls, pair: Sum, block: int) -> _SumSize:
        partial, out = pair
        if partial is None or out is None:
            return cls()
        width, rank = out.shape[-1], partial.shape[-1]
        rows = out.numel() // width
        parts = partial.numel() // (rows * rank)
        return cls(parts, rows, tuning.cdiv(rows * rank, block), width, rank)


def _reduce_plan(sums: tuple[Sum, Sum, Sum]) -> Plan:
    block, block_parts, num_warps = tuning.REDUCE_CONFIG
    a, b, c = (_SumSize.of(pair, block) for pair in sums)
    first = a if a.blocks else b
    return Plan(
        _reduce_kernel,
        (a.blocks + b.blocks + c.blocks,),
        a.parts,
        b.parts,
        c.parts,
        a.rows,
        b.rows,
        c.rows,
        first.width,
        c.width,
        a.blocks,
        b.blocks,
        first.rank,
        c.rank,
        block,
        block_parts,
        num_warps=num_warps,
    )
