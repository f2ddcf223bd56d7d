"""Tall-and-skinny products for the factors' gradients: `tall` is x or dY with M rows, `thin` has as
many columns as the rank.

    launch_thin        S = Σ_g tall_g·up[g]·core[g]^T over the column slices of tall. With P, the
                       same pass also gives the partial sums of up's and core's gradients. For each
                       slice g, with Q_g = tall_g·up[g] and T_g = P·core[g]:
                           S += Q_g·core[g]^T    d_up[g] = tall_g^T·T_g    d_core[g] = P^T·Q_g
                       Without a core S = Q and T = P: so P = x·down is this as well.
    launch_tall_grad   partial sums of tall^T·thin, split over rows        (d_down = x^T·S)

reduce.py adds the partial sums. Bytes moved, operands once (G·c = C; factors and partial sums as
they are stored):

    thin               M·C + M·ra + the factors; with P also M·ra, and
                       programs·(C·RB + G·ra·RB)·4, without a core programs·C·RA·4
    tall_grad          M·C + M·ra + splits·C·RA·4

cost.py counts them, and the tests hold the launches to it. With more row tiles
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
from .configs import PassConfig
from .factors import core_strides, named_strides, slices_of
from .launch_cache import CachedLaunch, CallCache, once


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
def _store_part(ptrs, part, mask, again):
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
    stride_tall_m,
    stride_up_g,
    stride_up_n,
    stride_up_b,
    stride_core_g,
    stride_core_a,
    stride_core_b,
    stride_s_m,
    stride_p_m,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    RA: tl.constexpr,
    RB: tl.constexpr,
    EVEN_C: tl.constexpr,
    GRAD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Row blocks pid, pid + programs, ... of S and, with GRAD, this program's partial sums of d_up
    and d_core.
    """
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
            # Load P and core, and form T. Both are loaded again where they are needed again: kept
            # over the loop below, they would take the registers that it needs.
            slice_g = tl.cast(g, tl.int64)
            part_g = pid.to(tl.int64) * G + g
            if GRAD:
                p_ptrs = p_ptr + offs_m[:, None] * stride_p_m + offs_a[None, :]
                t = tl.load(p_ptrs, mask=in_p, other=0.0)
                d_up_ptrs = (
                    d_up_ptr + (part_g * C + tl.arange(0, BLOCK_C)[:, None]) * RB + offs_b[None, :]
                )
            if core_ptr is not None:
                core_ptrs = core_ptr + slice_g * stride_core_g
                core_ptrs += offs_a[:, None] * stride_core_a + offs_b[None, :] * stride_core_b
                in_core = in_a[:, None] & in_b[None, :]
                q = tl.zeros((BLOCK_M, RB), dtype=tl.float32)
                if GRAD:
                    core, core_scale = _to_half(tl.load(core_ptrs, mask=in_core, other=0.0), dtype)
                    t = tl.dot(t, core, input_precision=PRECISION).to(dtype)
            else:
                q = s
            offs_c = tl.arange(0, BLOCK_C)
            tall_ptrs = tall_ptr + offs_m[:, None] * stride_tall_m + slice_g * C + offs_c[None, :]
            up_ptrs = (
                up_ptr
                + slice_g * stride_up_g
                + offs_c[:, None].to(tl.int64) * stride_up_n
                + offs_b[None, :] * stride_up_b
            )
            for c in range(0, C, BLOCK_C):
                # Load.
                in_c = offs_c < C - c
                if EVEN_C:
                    tall = tl.load(tall_ptrs, mask=in_m[:, None], other=0.0)
                    up = tl.load(up_ptrs, mask=in_b[None, :], other=0.0)
                else:
                    tall = tl.load(tall_ptrs, mask=in_m[:, None] & in_c[None, :], other=0.0)
                    up = tl.load(up_ptrs, mask=in_c[:, None] & in_b[None, :], other=0.0)
                # Products Q += tall·up and, with GRAD, d_up = tall^T·T.
                q = tl.dot(tall, up.to(dtype), q, input_precision=PRECISION)
                if GRAD:
                    part = tl.dot(tl.trans(tall), t, input_precision=PRECISION)
                    if core_ptr is not None:
                        part *= core_scale
                    _store_part(d_up_ptrs, part, in_c[:, None], again)
                    d_up_ptrs += BLOCK_C * RB
                tall_ptrs += BLOCK_C
                up_ptrs += BLOCK_C * stride_up_n
            # Epilogue of the slice: S += Q·core^T and, with GRAD, d_core = P^T·Q.
            if core_ptr is None:
                s = q
            else:
                # Beyond the rank core is zero; an infinity times that padding would be a NaN.
                q_in, q_scale = _to_half(tl.where(in_b[None, :], q, 0.0), dtype)
                core, core_scale = _to_half(tl.load(core_ptrs, mask=in_core, other=0.0), dtype)
                s_g = tl.dot(q_in, tl.trans(core), input_precision=PRECISION)
                s += s_g * (q_scale * core_scale)
                if GRAD:
                    p = tl.load(p_ptrs, mask=in_p, other=0.0)
                    _store_part(
                        d_core_ptr + (part_g * ra + offs_a[:, None]) * RB + offs_b[None, :],
                        tl.dot(tl.trans(p), q_in, input_precision=PRECISION) * q_scale,
                        in_a[:, None],
                        again,
                    )
        # Store.
        s_ptrs = s_ptr + offs_m[:, None] * stride_s_m + offs_a[None, :]
        tl.store(s_ptrs, s.to(s_ptr.dtype.element_ty), mask=in_p)
        if GRAD:
            # The next row block adds to this program's own partial sums, perhaps from other
            # threads.
            tl.debug_barrier()


@triton.jit(do_not_specialize=["M", "rows"])
def _tall_grad_kernel(
    tall_ptr,  # [M, C], unit stride along C
    thin_ptr,  # [M, ra]
    partial_ptr,  # [splits, C, RA] float32: out
    M,
    C,
    ra,
    rows,  # per split, a multiple of BLOCK_M
    stride_tall_m,
    stride_thin_m,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    RA: tl.constexpr,
    EVEN_C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """[BLOCK_C, RA] of tall^T·thin, summed over the rows of one split."""
    split = tl.program_id(1).to(tl.int64)
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_a = tl.arange(0, RA)
    offs_m = split * rows + tl.arange(0, BLOCK_M)
    in_c = offs_c < C
    in_a = offs_a < ra
    tall_ptrs = tall_ptr + offs_m[:, None] * stride_tall_m + offs_c[None, :]
    thin_ptrs = thin_ptr + offs_m[:, None] * stride_thin_m + offs_a[None, :]
    acc = tl.zeros((BLOCK_C, RA), dtype=tl.float32)
    left = tl.minimum(M - split * rows, rows)
    for m in range(0, left, BLOCK_M):
        # Load.
        in_m = tl.arange(0, BLOCK_M) < left - m
        thin = tl.load(thin_ptrs, mask=in_m[:, None] & in_a[None, :], other=0.0)
        if EVEN_C:
            tall = tl.load(tall_ptrs, mask=in_m[:, None], other=0.0)
        else:
            tall = tl.load(tall_ptrs, mask=in_m[:, None] & in_c[None, :], other=0.0)
        # Product.
        acc = tl.dot(tl.trans(tall), thin, acc, input_precision=PRECISION)
        tall_ptrs += BLOCK_M * stride_tall_m
        thin_ptrs += BLOCK_M * stride_thin_m
    # Store.
    partial_ptrs = partial_ptr + (split * C + offs_c[:, None]) * RA + offs_a[None, :]
    tl.store(partial_ptrs, acc, mask=in_c[:, None])


class _Thin(NamedTuple):
    launch: CachedLaunch
    d_up: tuple[int, int, int, int]  # programs, G, C, RB
    d_core: tuple[int, int, int, int] | None  # programs, G, ra, RB


def launch_thin(
    tall: Tensor,  # [M, C], unit last stride
    up: Tensor,  # [1 or G, C/G, Rb]; or down [K, Ra]
    core: Tensor | None,  # [G, Ra, Rb]
    s: Tensor,  # [M, Ra], filled here
    p: Tensor | None,  # [M, Ra], unit last stride
    config: PassConfig | None = None,
    cache: CallCache | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Fill s with Σ_g tall_g·up[g]·core[g]^T.

    Returns:
        With p, the partial sums of d_up [programs, G, C/G, RB] and, where there is a core, of
        d_core [programs, G, Ra, RB], in float32; else None.
    """
    prepared = once(cache, "thin", _prepare_thin, tall, up, core, s, p, config)
    d_up = d_core = None
    if p is not None:
        d_up = tall.new_empty(*prepared.d_up, dtype=torch.float32)
        if prepared.d_core is not None:
            d_core = tall.new_empty(*prepared.d_core, dtype=torch.float32)
    prepared.launch((tall, up, core, s, p, d_up, d_core))
    return d_up, d_core


def _prepare_thin(
    tall: Tensor,
    up: Tensor,
    core: Tensor | None,
    s: Tensor,
    p: Tensor | None,
    config: PassConfig | None,
) -> _Thin:
    m, c = tall.shape
    slices, slice_c, up_strides = slices_of(up, core)
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
    launch = CachedLaunch(
        _thin_kernel,
        (programs,),
        {"num_warps": num_warps, "num_stages": num_stages},
        M=m,
        C=slice_c,
        G=slices,
        ra=ra,
        rb=rb,
        stride_tall_m=tall.stride(0),
        **named_strides("up", "gnb", up_strides),
        **core_strides(core),
        stride_s_m=s.stride(0),
        stride_p_m=0 if p is None else p.stride(0),
        BLOCK_M=block_m,
        BLOCK_C=block_c,
        RA=rank_a,
        RB=rank_b,
        EVEN_C=slice_c % block_c == 0,
        GRAD=p is not None,
        PRECISION=tuning.dot_precision(tall.dtype),
    )
    d_core = None if core is None else (programs, slices, ra, rank_b)
    return _Thin(launch, (programs, slices, slice_c, rank_b), d_core)


class _TallGrad(NamedTuple):
    launch: CachedLaunch
    partial: tuple[int, int, int]  # splits, C, RA


def launch_tall_grad(
    tall: Tensor,  # [M, C], unit last stride
    thin: Tensor,  # [M, Ra], unit last stride
    config: PassConfig | None = None,
    cache: CallCache | None = None,
) -> Tensor:
    """The partial sums [splits, C, RA] of tall^T·thin, float32."""
    prepared = once(cache, "tall_grad", _prepare_tall_grad, tall, thin, config)
    partial = tall.new_empty(*prepared.partial, dtype=torch.float32)
    prepared.launch((tall, thin, partial))
    return partial


def _prepare_tall_grad(tall: Tensor, thin: Tensor, config: PassConfig | None) -> _TallGrad:
    m, c = tall.shape
    ra = thin.shape[1]
    rank_a = padded_rank(ra)
    block_m, block_c, splits, num_warps, num_stages = config or tuning.pass_config(
        "tall_grad",
        m,
        c,
        rank_a,
        tall.dtype,
        aligned=tuning.is_aligned(tall.stride(0) | c, ra),
        index=tall.device.index,
    )
    rows = tuning.cdiv(tuning.cdiv(m, splits), block_m) * block_m
    splits = tuning.cdiv(m, rows)
    launch = CachedLaunch(
        _tall_grad_kernel,
        (tuning.cdiv(c, block_c), splits),
        {"num_warps": num_warps, "num_stages": num_stages},
        M=m,
        C=c,
        ra=ra,
        rows=rows,
        stride_tall_m=tall.stride(0),
        stride_thin_m=thin.stride(0),
        BLOCK_M=block_m,
        BLOCK_C=block_c,
        RA=rank_a,
        EVEN_C=c % block_c == 0,
        PRECISION=tuning.dot_precision(tall.dtype),
    )
    return _TallGrad(launch, (splits, c, rank_a))
