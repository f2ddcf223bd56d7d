"""LayerNorm or RMSNorm with the thin products of the adapted linears on both sides of it.

    launch_norm_fwd    z = x + γ·(y + T·up^T)    x̂ = norm(z)·w + b    P = x̂·down
    launch_norm_bwd    dx̂ = dout + S·down^T      dz = d norm(dx̂) + residual
                       partial sums of d_down = x̂^T·S
    launch_norm_down_grad    those sums alone

The linear before the norm leaves y to the library's GEMM and brings T, its rank-r activation; the
linear after it takes x̂ and P. Each of the terms may be left out. The backward makes x̂ again from
z, mean and rstd, so nothing of size [M, K] is kept but z, which a norm keeps anyway.

With n = (z - mean)·rstd and g = dx̂·w:  dz = rstd·(g - Σg/K - n·Σ(g·n)/K), for RMSNorm mean = 0 and
no Σg. Bytes moved, operands once: forward M·K for each of x, y, z, x̂; backward M·K for each of
dout, z, residual, dz, and programs·K·RA·4 of partial sums, which reduce.py adds.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..fallback import padded_rank
from . import tuning
from .configs import PassConfig
from .launch_cache import CachedLaunch, CallCache, once


class NormConfig(NamedTuple):
    """Block shape of a norm's kernels."""

    block_m: int
    block_c: int  # columns of a row at a time
    hold: bool  # a row stays in registers; otherwise it is loaded again after its sums are known
    num_warps: int
    programs: int = 0  # of the backward: at most so many; 0 is one for every block of rows
    max_registers: int | None = None  # per thread

    @property
    def options(self) -> dict[str, Any]:
        return {"num_warps": self.num_warps, "maxnreg": self.max_registers}


@triton.jit
def _factor(ptr, offs_c, offs_r, rank, C, dtype: tl.constexpr):
    """Rows offs_c of a contiguous factor [C, rank], zero beyond it."""
    mask = (offs_c < C)[:, None] & (offs_r < rank)[None, :]
    return tl.load(ptr + offs_c[:, None] * rank + offs_r[None, :], mask=mask, other=0.0).to(dtype)


@triton.jit
def _vector(ptr, offs_c, C, default: tl.constexpr):
    """[1, columns] of a vector, float32; `default` where there is none."""
    if ptr is None:
        return tl.full((1, offs_c.shape[0]), default, tl.float32)
    else:
        return tl.load(ptr + offs_c, mask=offs_c < C, other=0.0).to(tl.float32)[None, :]


@triton.jit(do_not_specialize=["M"])
def _norm_fwd_kernel(
    x_ptr,  # [M, K]
    y_ptr,  # [M, K], or None: z = x
    thin_ptr,  # [M, rb], or None
    up_ptr,  # [K, rb]
    gamma_ptr,  # [K], or None
    weight_ptr,  # [K], or None
    bias_ptr,  # [K], or None
    down_ptr,  # [K, ra], or None
    z_ptr,  # [M, K]: out if there is y
    out_ptr,  # [M, K], rows stride_out_m apart: out
    p_ptr,  # [M, ra], rows stride_p_m apart: out if there is down
    mean_ptr,  # [M] float32: out, None for RMSNorm
    rstd_ptr,  # [M] float32: out
    M,
    ra,
    rb,
    eps,
    stride_out_m,
    stride_p_m,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    RA: tl.constexpr,
    RB: tl.constexpr,
    HOLD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """BLOCK_M rows of z, x̂, P and the statistics."""
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_m = offs_m < M
    offs_b = tl.arange(0, RB)
    # z, and element by element the sums of its distance to the mean of the row's first columns.
    # That mean is near enough: (mean - shift)² is at most K / BLOCK_C times the variance.
    if thin_ptr is not None:
        in_t = in_m[:, None] & (offs_b < rb)[None, :]
        t = tl.load(thin_ptr + offs_m[:, None] * rb + offs_b[None, :], mask=in_t, other=0.0)
    shift = tl.zeros((BLOCK_M, 1), dtype=tl.float32)
    total = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    squares = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    held = ()
    for c in tl.static_range(0, K, BLOCK_C):
        offs_c = c + tl.arange(0, BLOCK_C)
        inside = in_m[:, None] & (offs_c < K)[None, :]
        offs = offs_m[:, None] * K + offs_c[None, :]
        z = tl.load(x_ptr + offs, mask=inside, other=0.0).to(tl.float32)
        if y_ptr is not None:
            y = tl.load(y_ptr + offs, mask=inside, other=0.0).to(tl.float32)
            if thin_ptr is not None:
                # Columns first: with a few rows first, every warp would hold all columns.
                up = _factor(up_ptr, offs_c, offs_b, rb, K, t.dtype)
                y += tl.trans(tl.dot(up, tl.trans(t), input_precision=PRECISION))
            z_stored = (z + y * _vector(gamma_ptr, offs_c, K, 1.0)).to(z_ptr.dtype.element_ty)
            tl.store(z_ptr + offs, z_stored, mask=inside)
            z = z_stored.to(tl.float32)
        if mean_ptr is not None:
            if c == 0:
                shift = tl.sum(z, axis=1, keep_dims=True) / min(K, BLOCK_C)
            shifted = tl.where((offs_c < K)[None, :], z - shift, 0.0)
            total += shifted
        else:
            shifted = z
        squares += shifted * shifted
        if HOLD:
            held += (z,)  # type: ignore[assignment]
    rows_ptr = x_ptr
    if y_ptr is not None:
        rows_ptr = z_ptr
        if not HOLD:
            tl.debug_barrier()  # z is read again below, perhaps by other threads
    mean_square = tl.sum(squares, axis=1, keep_dims=True) / K
    if mean_ptr is not None:
        distance = tl.sum(total, axis=1, keep_dims=True) / K
        mean = shift + distance
        rstd = tl.rsqrt(mean_square - distance * distance + eps)
        tl.store(mean_ptr + offs_m[:, None], mean, mask=in_m[:, None])
    else:
        mean = shift
        rstd = tl.rsqrt(mean_square + eps)
    tl.store(rstd_ptr + offs_m[:, None], rstd, mask=in_m[:, None])
    # x̂ and P.
    offs_a = tl.arange(0, RA)
    p = tl.zeros((BLOCK_M, RA), dtype=tl.float32)
    for c in tl.static_range(0, K, BLOCK_C):
        offs_c = c + tl.arange(0, BLOCK_C)
        inside = in_m[:, None] & (offs_c < K)[None, :]
        if HOLD:
            z = held[c // BLOCK_C]
        else:
            z_ptrs = rows_ptr + offs_m[:, None] * K + offs_c[None, :]
            z = tl.load(z_ptrs, mask=inside, other=0.0).to(tl.float32)
        out = (z - mean) * rstd * _vector(weight_ptr, offs_c, K, 1.0)
        out = (out + _vector(bias_ptr, offs_c, K, 0.0)).to(dtype)
        tl.store(out_ptr + offs_m[:, None] * stride_out_m + offs_c[None, :], out, mask=inside)
        if down_ptr is not None:
            down = _factor(down_ptr, offs_c, offs_a, ra, K, dtype)
            if BLOCK_M < 16:
                products = out.to(tl.float32)[:, :, None] * down.to(tl.float32)[None, :, :]
                p += tl.sum(products, axis=1)
            else:
                p = tl.dot(out, down, p, input_precision=PRECISION)
    if down_ptr is not None:
        p_ptrs = p_ptr + offs_m[:, None] * stride_p_m + offs_a[None, :]
        in_p = in_m[:, None] & (offs_a < ra)[None, :]
        tl.store(p_ptrs, p.to(p_ptr.dtype.element_ty), mask=in_p)


@triton.jit
def _gradient_chunk(
    dout_ptr, z_ptr, s, down_ptr, weight_ptr, offs_m, in_m, offs_c, offs_a, ra, mean, rstd,
    K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(g, n) of some columns: g = (dout + S·down^T)·w and n = (z - mean)·rstd."""
    in_c = (offs_c < K)[None, :]
    offs = offs_m[:, None] * K + offs_c[None, :]
    g = tl.load(dout_ptr + offs, mask=in_m[:, None] & in_c, other=0.0).to(tl.float32)
    z = tl.load(z_ptr + offs, mask=in_m[:, None] & in_c, other=0.0).to(tl.float32)
    if down_ptr is not None:
        down = _factor(down_ptr, offs_c, offs_a, ra, K, s.dtype)
        # Columns first: with a few rows first, every warp would hold all columns.
        g += tl.trans(tl.dot(down, tl.trans(s), input_precision=PRECISION))
    return g * _vector(weight_ptr, offs_c, K, 1.0), (z - mean) * rstd


@triton.jit(do_not_specialize=["M"])
def _norm_bwd_kernel(
    dout_ptr,  # [M, K]
    z_ptr,  # [M, K]
    mean_ptr,  # [M] float32, None for RMSNorm
    rstd_ptr,  # [M] float32
    weight_ptr,  # [K], or None
    bias_ptr,  # [K], or None; read for x̂ only
    s_ptr,  # [M, ra], or None
    down_ptr,  # [K, ra]
    residual_ptr,  # [M, K], or None
    dz_ptr,  # [M, K]: out, may be residual
    dy_ptr,  # [M, K]: out, dz once more in another dtype, or None
    d_down_ptr,  # [programs, K, RA] float32: out, or None
    M,
    ra,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    RA: tl.constexpr,
    HOLD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Row blocks pid, pid + programs, ... of dz, and this program's partial sum of d_down."""
    pid = tl.program_id(0)
    offs_a = tl.arange(0, RA)
    d_down = ()
    for _ in tl.static_range(0, K, BLOCK_C):
        d_down += (tl.zeros((BLOCK_C, RA), dtype=tl.float32),)  # type: ignore[assignment]
    # Factors and vectors are loaded again for every block: kept, they would fill the registers.
    for block in tl.range(
        pid, tl.cdiv(M, BLOCK_M), tl.num_programs(0), num_stages=1, disable_licm=True
    ):
        offs_m = tl.cast(block, tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        in_m = offs_m < M
        # Rows beyond M have g = 0 and, with rstd = 0, n = 0.
        rstd = tl.load(rstd_ptr + offs_m, mask=in_m, other=0.0)[:, None]
        mean = tl.zeros((BLOCK_M, 1), dtype=tl.float32)
        if mean_ptr is not None:
            mean = tl.load(mean_ptr + offs_m, mask=in_m, other=0.0)[:, None]
        s = None
        if s_ptr is not None:
            in_s = in_m[:, None] & (offs_a < ra)[None, :]
            s = tl.load(s_ptr + offs_m[:, None] * ra + offs_a[None, :], mask=in_s, other=0.0)
        # Σg and Σ(g·n), and d_down = x̂^T·S.
        sum_g = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
        sum_gn = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
        held = ()
        summed = ()
        for c in tl.static_range(0, K, BLOCK_C):
            offs_c = c + tl.arange(0, BLOCK_C)
            g, n = _gradient_chunk(
                dout_ptr, z_ptr, s, down_ptr, weight_ptr, offs_m, in_m, offs_c, offs_a, ra,
                mean, rstd, K, PRECISION,
            )  # fmt: skip
            sum_g += g
            sum_gn += g * n
            if HOLD:
                held += (g, n)  # type: ignore[assignment]
            if d_down_ptr is not None:
                out = n * _vector(weight_ptr, offs_c, K, 1.0) + _vector(bias_ptr, offs_c, K, 0.0)
                out = tl.trans(out.to(s.dtype))  # type: ignore[union-attr]
                part = tl.dot(out, s, d_down[c // BLOCK_C], input_precision=PRECISION)
                summed += (part,)  # type: ignore[assignment]
        if d_down_ptr is not None:
            d_down = summed
        mean_gn = tl.sum(sum_gn, axis=1, keep_dims=True) / K
        mean_g = tl.zeros((BLOCK_M, 1), dtype=tl.float32)
        if mean_ptr is not None:
            mean_g = tl.sum(sum_g, axis=1, keep_dims=True) / K
        # dz.
        for c in tl.static_range(0, K, BLOCK_C):
            offs_c = c + tl.arange(0, BLOCK_C)
            if HOLD:
                g = held[2 * (c // BLOCK_C)]
                n = held[2 * (c // BLOCK_C) + 1]
            else:
                g, n = _gradient_chunk(
                    dout_ptr, z_ptr, s, down_ptr, weight_ptr, offs_m, in_m, offs_c, offs_a, ra,
                    mean, rstd, K, PRECISION,
                )  # fmt: skip
            dz = rstd * (g - mean_g - n * mean_gn)
            inside = in_m[:, None] & (offs_c < K)[None, :]
            offs = offs_m[:, None] * K + offs_c[None, :]
            if residual_ptr is not None:
                dz += tl.load(residual_ptr + offs, mask=inside, other=0.0).to(tl.float32)
            tl.store(dz_ptr + offs, dz.to(dz_ptr.dtype.element_ty), mask=inside)
            if dy_ptr is not None:
                tl.store(dy_ptr + offs, dz.to(dy_ptr.dtype.element_ty), mask=inside)
    if d_down_ptr is not None:
        for c in tl.static_range(0, K, BLOCK_C):
            offs_c = c + tl.arange(0, BLOCK_C)
            part_ptrs = d_down_ptr + (pid.to(tl.int64) * K + offs_c[:, None]) * RA + offs_a[None, :]
            tl.store(part_ptrs, d_down[c // BLOCK_C], mask=(offs_c < K)[:, None])


@triton.jit(do_not_specialize=["M", "rows"])
def _norm_down_grad_kernel(
    z_ptr,  # [M, K]
    mean_ptr,  # [M] float32, None for RMSNorm
    rstd_ptr,  # [M] float32
    weight_ptr,  # [K], or None
    bias_ptr,  # [K], or None
    s_ptr,  # [M, ra]
    d_down_ptr,  # [parts, K, RA] float32: out
    M,
    ra,
    rows,  # per part, a multiple of BLOCK_M
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    RA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """BLOCK_C rows of x̂^T·S, summed over one part of the rows of x̂."""
    first = tl.program_id(1).to(tl.int64) * rows
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_a = tl.arange(0, RA)
    in_c = (offs_c < K)[None, :]
    weight = _vector(weight_ptr, offs_c, K, 1.0)
    bias = _vector(bias_ptr, offs_c, K, 0.0)
    d_down = tl.zeros((BLOCK_C, RA), dtype=tl.float32)
    left = tl.minimum(M - first, rows)
    for m in range(0, left, BLOCK_M):
        offs_m = first + m + tl.arange(0, BLOCK_M)
        in_m = m + tl.arange(0, BLOCK_M) < left
        inside = in_m[:, None] if K % BLOCK_C == 0 else in_m[:, None] & in_c
        z = tl.load(z_ptr + offs_m[:, None] * K + offs_c[None, :], mask=inside, other=0.0)
        n = z.to(tl.float32)
        if mean_ptr is not None:
            n -= tl.load(mean_ptr + offs_m, mask=in_m, other=0.0)[:, None]
        n *= tl.load(rstd_ptr + offs_m, mask=in_m, other=0.0)[:, None]
        in_s = in_m[:, None] & (offs_a < ra)[None, :]
        s = tl.load(s_ptr + offs_m[:, None] * ra + offs_a[None, :], mask=in_s, other=0.0)
        out = tl.trans((n * weight + bias).to(s.dtype))
        d_down = tl.dot(out, s, d_down, input_precision=PRECISION)
    part_rows = tl.program_id(1).to(tl.int64) * K + offs_c
    part_ptrs = d_down_ptr + part_rows[:, None] * RA + offs_a[None, :]
    tl.store(part_ptrs, d_down, mask=(offs_c < K)[:, None])


class Branch(NamedTuple):
    """What a residual connection adds to x: γ·(y + T·up^T)."""

    y: Tensor  # [M, K]
    thin: Tensor | None = None  # T [M, Rb]
    up: Tensor | None = None  # [K, Rb]
    gamma: Tensor | None = None  # [K]


class NormFwd(NamedTuple):
    """Outputs of `launch_norm_fwd`."""

    z: Tensor  # [M, K] in x's dtype; x itself without a branch
    out: Tensor  # x̂ [M, K]
    p: Tensor | None  # [M, Ra]
    mean: Tensor | None  # [M] float32; None for RMSNorm
    rstd: Tensor  # [M] float32


def launch_norm_fwd(
    x: Tensor,  # [M, K]
    branch: Branch | None,
    weight: Tensor | None,  # [K]
    bias: Tensor | None,  # [K]
    down: Tensor | None,  # [K, Ra]
    *,
    eps: float,
    rms: bool = False,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    p: Tensor | None = None,
    config: NormConfig,
    cache: CallCache | None = None,
) -> NormFwd:
    """z = x + γ·(y + T·up^T), x̂ = norm(z)·weight + bias and P = x̂·down in one launch.

    Args:
        x, branch, weight, bias, down: contiguous.
        dtype: of x̂ and P; x's where None.
        out: x̂ is written here, any row stride.
        p: P is written here, any row stride.
    """
    m, k = x.shape
    branch_tensors = (None,) * 4 if branch is None else branch
    z = None if branch is None else torch.empty_like(x)
    dtype = dtype or x.dtype
    out = x.new_empty(m, k, dtype=dtype) if out is None else out
    if down is not None and p is None:
        p = x.new_empty(m, down.shape[1], dtype=dtype)
    mean = None if rms else x.new_empty(m, dtype=torch.float32)
    rstd = x.new_empty(m, dtype=torch.float32)
    launch = once(
        cache, "norm_fwd", _prepare_norm_fwd, out, p, down, branch_tensors[2], eps, config
    )
    launch((x, *branch_tensors, weight, bias, down, z, out, p), (mean, rstd))
    return NormFwd(x if z is None else z, out, p, mean, rstd)


def _prepare_norm_fwd(
    out: Tensor,
    p: Tensor | None,
    down: Tensor | None,
    up: Tensor | None,
    eps: float,
    config: NormConfig,
) -> CachedLaunch:
    m, k = out.shape
    ra = 1 if down is None else down.shape[1]
    rb = 1 if up is None else up.shape[1]
    return CachedLaunch(
        _norm_fwd_kernel,
        (tuning.cdiv(m, config.block_m),),
        config.options,
        M=m,
        ra=ra,
        rb=rb,
        eps=eps,
        stride_out_m=out.stride(0),
        stride_p_m=0 if p is None else p.stride(0),
        K=k,
        BLOCK_M=config.block_m,
        BLOCK_C=config.block_c,
        RA=padded_rank(ra),
        RB=padded_rank(rb),
        HOLD=config.hold,
        PRECISION=tuning.dot_precision(out.dtype),
    )


class NormBwd(NamedTuple):
    """Outputs of `launch_norm_bwd`."""

    dz: Tensor  # [M, K] in z's dtype
    d_down: Tensor | None  # partial sums [programs, K, RA], float32
    dy: Tensor | None  # [M, K]: dz in dout's dtype


def launch_norm_bwd(
    dout: Tensor,  # [M, K]
    z: Tensor,  # [M, K]
    mean: Tensor | None,  # [M]; None for RMSNorm
    rstd: Tensor,  # [M]
    weight: Tensor | None,  # [K]
    bias: Tensor | None,  # [K]
    s: Tensor | None,  # [M, Ra]
    down: Tensor | None,  # [K, Ra]
    residual: Tensor | None,  # [M, K]
    *,
    down_grad: bool = True,
    branch_grad: bool = False,
    config: NormConfig,
    cache: CallCache | None = None,
) -> NormBwd:
    """dz from dx̂ = dout + S·down^T, plus `residual`.

    Args:
        dout, z, weight, bias, s, down, residual: contiguous.
        down_grad: with S, partial sums of x̂^T·S as well.
        branch_grad: dz in dout's dtype as well: what the GEMMs of the branch before take.
    """
    m, k = z.shape
    blocks = tuning.cdiv(m, config.block_m)
    programs = min(blocks, config.programs or blocks)
    ra = 1 if s is None else s.shape[1]
    dz = torch.empty_like(z)
    dy = torch.empty_like(dout) if branch_grad else None
    d_down = None
    if s is not None and down_grad:
        d_down = z.new_empty(programs, k, padded_rank(ra), dtype=torch.float32)
    launch = once(cache, "norm_bwd", _prepare_norm_bwd, dout, ra, programs, config)
    launch((dout, z, mean, rstd, weight, bias, s, down, residual), (dz, dy, d_down))
    return NormBwd(dz, d_down, dy)


def _prepare_norm_bwd(dout: Tensor, ra: int, programs: int, config: NormConfig) -> CachedLaunch:
    m, k = dout.shape
    return CachedLaunch(
        _norm_bwd_kernel,
        (programs,),
        config.options,
        M=m,
        ra=ra,
        K=k,
        BLOCK_M=config.block_m,
        BLOCK_C=config.block_c,
        RA=padded_rank(ra),
        HOLD=config.hold,
        PRECISION=tuning.dot_precision(dout.dtype),
    )


def launch_norm_down_grad(
    z: Tensor,  # [M, K]
    mean: Tensor | None,  # [M]; None for RMSNorm
    rstd: Tensor,  # [M]
    weight: Tensor | None,  # [K]
    bias: Tensor | None,  # [K]
    s: Tensor,  # [M, Ra]
    *,
    config: PassConfig,
    cache: CallCache | None = None,
) -> Tensor:
    """The partial sums [parts, K, RA] of x̂^T·S, float32, with x̂ made again from z."""
    launch, partial = once(cache, "norm_down_grad", _prepare_norm_down_grad, z, s, config)
    d_down = z.new_empty(partial, dtype=torch.float32)
    launch((z, mean, rstd, weight, bias, s), (d_down,))
    return d_down


def _prepare_norm_down_grad(
    z: Tensor, s: Tensor, config: PassConfig
) -> tuple[CachedLaunch, tuple[int, int, int]]:
    m, k = z.shape
    ra = s.shape[1]
    block_m, block_c, parts, num_warps, num_stages = config
    rows = tuning.cdiv(tuning.cdiv(m, parts), block_m) * block_m
    parts = tuning.cdiv(m, rows)
    launch = CachedLaunch(
        _norm_down_grad_kernel,
        (tuning.cdiv(k, block_c), parts),
        {"num_warps": num_warps, "num_stages": num_stages},
        M=m,
        ra=ra,
        rows=rows,
        K=k,
        BLOCK_M=block_m,
        BLOCK_C=block_c,
        RA=padded_rank(ra),
        PRECISION=tuning.dot_precision(s.dtype),
    )
    return launch, (parts, k, padded_rank(ra))
