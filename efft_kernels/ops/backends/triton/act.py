"""The activation between two adapted linears, with the thin products of both.

    launch_act_fwd    h = y + bias + T·up^T      a = act(h)            P = a·down
    launch_act_bwd    da = dout + S·down^T       dh = da·act'(h)       Q = dh·up
                      d_up = dh^T·T              d_down = a^T·S

The linear before it leaves y to the library's GEMM and brings T; the linear after it takes a and P,
and in the backward brings dout = dY·W and S. Each factor may be left out. The backward makes a
again from h, so of the size of h nothing is kept but h, as with the activation alone.

P and Q of a program are sums over its columns, d_up and d_down over its rows. What the kernels
store are partial sums where there are several, and reduce.py adds them. Bytes moved, operands once:
M·C for each of y, h, a forward and dout, h, dh backward; forward column_parts·M·RA·4, backward
column_parts·M·RB·4 + row_parts·C·(RA + RB)·4 of partial sums.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..fallback import padded_rank
from . import tuning
from .launch_cache import CachedLaunch, CallCache, once
from .norm import _factor, _vector

MOVABLE = tl.constexpr(not tuning.INTERPRETED)  # the interpreter has no inline assembly
ACTIVATIONS = ("gelu", "gelu_tanh", "silu")


class ActConfig(NamedTuple):
    """Block shape of the activation's kernels."""

    block_m: int
    block_c: int
    parts: int  # forward: of the columns; backward: of the rows
    num_warps: int
    num_stages: int
    max_registers: int | None = None  # per thread

    @property
    def options(self) -> dict[str, Any]:
        return {
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "maxnreg": self.max_registers,
        }


@triton.jit
def _activate(h, ACT: tl.constexpr, dtype: tl.constexpr):
    """(act(h), act'(h)) of float32 values that were rounded to `dtype`."""
    if ACT == "gelu":
        bell = tl.exp2(-0.7213475204444817 * (h * h))  # e^(-h²/2)
        if dtype == tl.float32:
            cdf = 0.5 + 0.5 * tl.erf(h * 0.7071067811865476)
        else:
            # Abramowitz and Stegun 7.1.26, within 6e-7: 25 to 70 registers fewer on sm_90 than with
            # tl.erf, and the exponential is the derivative's. A division is several instructions,
            # rsqrt is one.
            u = 1.0 + 0.23164189 * tl.abs(h)
            t = tl.rsqrt(u * u)
            series = t * (
                -0.142248368 + t * (0.7107068705 + t * (-0.7265760135 + t * 0.5307027145))
            )
            tail = t * (0.127414796 + series) * bell
            cdf = tl.where(h < 0, tail, 1.0 - tail)
        return h * cdf, cdf + h * (0.3989422804014327 * bell)
    else:
        # gelu_tanh is h·sigmoid(u) too, as (1 + tanh(v)) / 2 = sigmoid(2v).
        tl.static_assert(ACT == "gelu_tanh" or ACT == "silu")
        u = h
        hu = h  # h·du/dh
        if ACT == "gelu_tanh":
            u = 1.5957691216057308 * h * (1.0 + 0.044715 * h * h)
            hu = 1.5957691216057308 * h * (1.0 + 0.134145 * h * h)
        e = tl.exp(-tl.abs(u))
        upper = 1.0 / (1.0 + e)
        gate = tl.where(u < 0, e * upper, upper)
        return h * gate, gate + hu * (e * upper * upper)


@triton.jit
def _computed_once(x, dtype: tl.constexpr):
    """x in a half precision, where a product takes it: without the move, which the compiler must
    not repeat, it computes x anew in the layout of each product, at three times the instructions.
    """
    x = x.to(dtype)
    if MOVABLE and dtype != tl.float32:
        x = tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=False, pack=2
        )
    return x


@triton.jit
def _thin_rows(ptr, offs_m, in_m, offs_r, rank):
    """Rows offs_m of a contiguous [M, rank]."""
    mask = in_m[:, None] & (offs_r < rank)[None, :]
    return tl.load(ptr + offs_m[:, None] * rank + offs_r[None, :], mask=mask, other=0.0)


@triton.jit(do_not_specialize=["M"])
def _act_fwd_kernel(
    y_ptr,  # [M, C]
    bias_ptr,  # [C], or None
    thin_ptr,  # [M, rb], or None
    up_ptr,  # [C, rb]
    down_ptr,  # [C, ra], or None
    h_ptr,  # [M, C]: out, may be y; None if it is y unchanged
    a_ptr,  # [M, C], rows stride_a_m apart: out
    p_ptr,  # [parts, M, ra or RA]: out if there is down
    M,
    C,
    ra,
    rb,
    cols,  # per part, a multiple of BLOCK_C
    stride_a_m,
    stride_p_m,  # partial sums are stored with their padding
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    RA: tl.constexpr,
    RB: tl.constexpr,
    EVEN_C: tl.constexpr,
    ACT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """BLOCK_M rows of h and a in one part of the columns, and that part's sum of P."""
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    part = tl.program_id(1)
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_m = offs_m < M
    offs_a = tl.arange(0, RA)
    offs_b = tl.arange(0, RB)
    if thin_ptr is not None:
        t = _thin_rows(thin_ptr, offs_m, in_m, offs_b, rb)
    p = tl.zeros((BLOCK_M, RA), dtype=tl.float32)
    for c in range(part * cols, tl.minimum(part * cols + cols, C), BLOCK_C):
        offs_c = c + tl.arange(0, BLOCK_C)
        inside = in_m[:, None] if EVEN_C else in_m[:, None] & (offs_c < C)[None, :]
        offs = offs_m[:, None] * C + offs_c[None, :]
        # h
        h = tl.load(y_ptr + offs, mask=inside, other=0.0).to(tl.float32)
        if bias_ptr is not None:
            h += _vector(bias_ptr, offs_c, C, 0.0)
        if thin_ptr is not None:
            up = _factor(up_ptr, offs_c, offs_b, rb, C, t.dtype)
            h += tl.dot(t, tl.trans(up), input_precision=PRECISION)
        if h_ptr is not None:
            h_stored = h.to(dtype)
            tl.store(h_ptr + offs, h_stored, mask=inside)
            h = h_stored.to(tl.float32)  # what the backward reads
        # a and P
        a, _ = _activate(h, ACT, dtype)
        a = _computed_once(a, dtype)
        tl.store(a_ptr + offs_m[:, None] * stride_a_m + offs_c[None, :], a, mask=inside)
        if down_ptr is not None:
            down = _factor(down_ptr, offs_c, offs_a, ra, C, dtype)
            p = tl.dot(a, down, p, input_precision=PRECISION)
    if down_ptr is not None:
        p_ptrs = p_ptr + (part.to(tl.int64) * M + offs_m[:, None]) * stride_p_m + offs_a[None, :]
        in_p = in_m[:, None] & (offs_a < stride_p_m)[None, :]
        tl.store(p_ptrs, p.to(p_ptr.dtype.element_ty), mask=in_p)


@triton.jit(do_not_specialize=["M", "rows"])
def _act_bwd_kernel(
    dout_ptr,  # [M, C]
    h_ptr,  # [M, C]
    s_ptr,  # [M, ra], or None
    down_ptr,  # [C, ra], or None: dout is da
    thin_ptr,  # [M, rb], or None
    up_ptr,  # [C, rb]
    dh_ptr,  # [M, C]: out, may be dout
    q_ptr,  # [column parts, M, RB] float32: out if there is up
    d_up_ptr,  # [row parts, C, RB] float32: out if there is up
    d_down_ptr,  # [row parts, C, RA] float32: out if there is S
    M,
    C,
    ra,
    rb,
    rows,  # per part, a multiple of BLOCK_M
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    RA: tl.constexpr,
    RB: tl.constexpr,
    EVEN_C: tl.constexpr,
    ACT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """BLOCK_C columns of dh in one part of the rows, that part's sums of d_up and d_down, and these
    columns' sums of Q.
    """
    dtype: tl.constexpr = dout_ptr.dtype.element_ty
    column = tl.program_id(0)
    part = tl.program_id(1).to(tl.int64)
    offs_c = column * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = offs_c < C
    offs_a = tl.arange(0, RA)
    offs_b = tl.arange(0, RB)
    if s_ptr is not None:
        if down_ptr is not None:
            down = _factor(down_ptr, offs_c, offs_a, ra, C, dtype)
        d_down = tl.zeros((BLOCK_C, RA), dtype=tl.float32)
    if thin_ptr is not None:
        up = _factor(up_ptr, offs_c, offs_b, rb, C, dtype)
        d_up = tl.zeros((BLOCK_C, RB), dtype=tl.float32)
    first = part * rows
    left = tl.minimum(M - first, rows)
    for m in range(0, left, BLOCK_M):
        offs_m = first + m + tl.arange(0, BLOCK_M)
        in_m = m + tl.arange(0, BLOCK_M) < left
        inside = in_m[:, None] if EVEN_C else in_m[:, None] & in_c[None, :]
        offs = offs_m[:, None] * C + offs_c[None, :]
        da = tl.load(dout_ptr + offs, mask=inside, other=0.0).to(tl.float32)
        h = tl.load(h_ptr + offs, mask=inside, other=0.0).to(tl.float32)
        a, slope = _activate(h, ACT, dtype)
        # da and d_down
        if s_ptr is not None:
            s = _thin_rows(s_ptr, offs_m, in_m, offs_a, ra)
            if down_ptr is not None:
                da += tl.dot(s, tl.trans(down), input_precision=PRECISION)
            a = tl.trans(_computed_once(a, dtype))
            d_down = tl.dot(a, s, d_down, input_precision=PRECISION)
        # dh, Q and d_up
        dh = _computed_once(da * slope, dtype)
        tl.store(dh_ptr + offs, dh, mask=inside)
        if thin_ptr is not None:
            t = _thin_rows(thin_ptr, offs_m, in_m, offs_b, rb)
            q = tl.dot(dh, up, input_precision=PRECISION)
            q_ptrs = q_ptr + (column.to(tl.int64) * M + offs_m[:, None]) * RB + offs_b[None, :]
            tl.store(q_ptrs, q, mask=in_m[:, None])
            d_up = tl.dot(tl.trans(dh), t, d_up, input_precision=PRECISION)
    part_rows = (part * C + offs_c)[:, None]
    if s_ptr is not None:
        tl.store(d_down_ptr + part_rows * RA + offs_a[None, :], d_down, mask=in_c[:, None])
    if thin_ptr is not None:
        tl.store(d_up_ptr + part_rows * RB + offs_b[None, :], d_up, mask=in_c[:, None])


class ActFwd(NamedTuple):
    """Outputs of `launch_act_fwd`."""

    h: Tensor  # [M, C]; y itself where nothing was added to it
    a: Tensor  # [M, C]
    p: Tensor | None  # [M, Ra], or partial sums [parts, M, RA] in float32


def launch_act_fwd(
    y: Tensor,  # [M, C]
    bias: Tensor | None,  # [C]
    thin: Tensor | None,  # T [M, Rb]
    up: Tensor | None,  # [C, Rb]
    down: Tensor | None,  # [C, Ra]
    *,
    act: str = "gelu",
    in_place: bool = False,
    a: Tensor | None = None,
    config: ActConfig,
    cache: CallCache | None = None,
) -> ActFwd:
    """h = y + bias + T·up^T, a = act(h) and P = a·down in one launch.

    Args:
        y, bias, thin, up, down: contiguous.
        act: one of ACTIVATIONS.
        in_place: h takes y's place.
        a: it is written here, any row stride.
    """
    m = y.shape[0]
    h = None
    if bias is not None or thin is not None:
        h = y if in_place else torch.empty_like(y)
    a = torch.empty_like(y) if a is None else a
    launch, partial = once(cache, "act_fwd", _prepare_act_fwd, y, a, up, down, act, config)
    p = None
    if down is not None:
        # One part is P itself.
        p = y.new_empty(partial or (m, down.shape[1]), dtype=torch.float32 if partial else y.dtype)
    launch((y, bias, thin, up, down, h, a), (p,))
    return ActFwd(y if h is None else h, a, p)


def _prepare_act_fwd(
    y: Tensor, a: Tensor, up: Tensor | None, down: Tensor | None, act: str, config: ActConfig
) -> tuple[CachedLaunch, tuple[int, ...]]:
    m, c = y.shape
    ra = 1 if down is None else down.shape[1]
    rb = 1 if up is None else up.shape[1]
    rank_a = padded_rank(ra)
    cols = tuning.cdiv(tuning.cdiv(c, config.parts), config.block_c) * config.block_c
    parts = tuning.cdiv(c, cols)
    launch = CachedLaunch(
        _act_fwd_kernel,
        (tuning.cdiv(m, config.block_m), parts),
        config.options,
        M=m,
        C=c,
        ra=ra,
        rb=rb,
        cols=cols,
        stride_a_m=a.stride(0),
        stride_p_m=rank_a if parts > 1 else ra,
        BLOCK_M=config.block_m,
        BLOCK_C=config.block_c,
        RA=rank_a,
        RB=padded_rank(rb),
        EVEN_C=c % config.block_c == 0,
        ACT=act,
        PRECISION=tuning.dot_precision(y.dtype),
    )
    return launch, (parts, m, rank_a) if parts > 1 else ()


class ActBwd(NamedTuple):
    """Outputs of `launch_act_bwd`; the last three are partial sums in float32."""

    dh: Tensor  # [M, C]
    q: Tensor | None  # [column parts, M, RB]
    d_up: Tensor | None  # [row parts, C, RB]
    d_down: Tensor | None  # [row parts, C, RA]


def launch_act_bwd(
    dout: Tensor,  # [M, C]
    h: Tensor,  # [M, C]
    s: Tensor | None,  # [M, Ra]
    down: Tensor | None,  # [C, Ra]
    thin: Tensor | None,  # T [M, Rb]
    up: Tensor | None,  # [C, Rb]
    *,
    act: str = "gelu",
    in_place: bool = False,
    config: ActConfig,
    cache: CallCache | None = None,
) -> ActBwd:
    """dh from da = dout + S·down^T, with partial sums of Q = dh·up, dh^T·T and a^T·S.

    Args:
        dout, h, s, down, thin, up: contiguous.
        down: None where dout has that term already.
        act: one of ACTIVATIONS.
        in_place: dh takes dout's place.
    """
    m, c = h.shape
    dh = dout if in_place else torch.empty_like(dout)
    launch, row_parts = once(cache, "act_bwd", _prepare_act_bwd, h, s, up, act, config)
    q = d_up = d_down = None
    if up is not None:
        rank_b = padded_rank(up.shape[1])
        q = h.new_empty(launch.grid[0], m, rank_b, dtype=torch.float32)
        d_up = h.new_empty(row_parts, c, rank_b, dtype=torch.float32)
    if s is not None:
        d_down = h.new_empty(row_parts, c, padded_rank(s.shape[1]), dtype=torch.float32)
    launch((dout, h, s, down, thin, up, dh), (q, d_up, d_down))
    return ActBwd(dh, q, d_up, d_down)


def _prepare_act_bwd(
    h: Tensor, s: Tensor | None, up: Tensor | None, act: str, config: ActConfig
) -> tuple[CachedLaunch, int]:
    m, c = h.shape
    ra = 1 if s is None else s.shape[1]
    rb = 1 if up is None else up.shape[1]
    rows = tuning.cdiv(tuning.cdiv(m, config.parts), config.block_m) * config.block_m
    row_parts = tuning.cdiv(m, rows)
    launch = CachedLaunch(
        _act_bwd_kernel,
        (tuning.cdiv(c, config.block_c), row_parts),
        config.options,
        M=m,
        C=c,
        ra=ra,
        rb=rb,
        rows=rows,
        BLOCK_M=config.block_m,
        BLOCK_C=config.block_c,
        RA=padded_rank(ra),
        RB=padded_rank(rb),
        EVEN_C=c % config.block_c == 0,
        ACT=act,
        PRECISION=tuning.dot_precision(h.dtype),
    )
    return launch, row_parts
