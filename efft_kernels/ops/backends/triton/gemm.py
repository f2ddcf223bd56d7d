"""The low-rank GEMM: out = a·w + bias + (a·thin_in)·core[g]·thin_out[g]^T in one launch and one
store of `out`, the slices g side by side in its columns.

Forward and dX are the same function with the operands' roles swapped (B is the fold of core and up,
see factors.py):

    forward   y  = x·W^T + bias + P·core[g]·up[g]^T,  P = x·down     a=x,  w=W^T, thin_out=up
    backward  dX = dY·W + S·down^T,                   S = dY·B       a=dY, w=W,   thin_out=down

With RIDE, P = a·thin_in is accumulated in the same loop over I that reads `a` for the main product,
so it costs matrix instructions but no memory traffic. Without, P is read where the loop ends:
[a|T]·[w|thin_out], a loop longer by one step of the rank. There T = P·core[g] is formed, for the
one slice (or, with CROSS, the few slices) that a tile's columns lie in, and core and thin_out are
read as they are stored. Either way the product joins the float32 accumulator before the only store.

With a config's `tma` (Hopper and later) the copy engine loads the tiles through tensor descriptors:
no address arithmetic in registers, no masks. Pointers serve everything else, rows that are not
aligned included. With `persistent` as well, each multiprocessor runs one program that walks over
the tiles: on sm_90 the two loops become one, so that the next tile's first loads are under way
while this tile is stored. On sm_100 Triton 3.6 fails to compile the fused loop; there the loop over
tiles stays a loop, and the accumulator is held twice.

Bytes moved, each operand once: M·I + I·C + C·(bias) + M·C, I·RANK more where P rides, M·rank more
where P is stored or read, and core and thin_out as they are stored. `plan` in ops/cost_model.py
counts them.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..fallback import padded_rank
from . import device, tuning
from .epilogue import add_low_rank
from .factors import core_strides, slices_of
from .launch_cache import Plan, Plans


@triton.jit
def _tile_order(pid, tiles_m, tiles_c, GROUP_M: tl.constexpr):
    """(row tile, column tile) of program `pid`: GROUP_M row tiles share a column's w tile while it
    is in L2.
    """
    per_group = GROUP_M * tiles_c
    first = (pid // per_group) * GROUP_M
    rows = tl.minimum(tiles_m - first, GROUP_M)
    inside = pid % per_group
    return first + inside % rows, inside // rows


@triton.jit
def _low_rank_tile(
    tile_m,
    tile_c,
    a_ptr,
    w_ptr,
    bias_ptr,
    thin_in_ptr,
    core_ptr,
    thin_out_ptr,
    p_ptr,
    out_ptr,
    a_desc,
    w_desc,
    d_desc,
    M,
    C,
    I,  # noqa: E741
    slice_c,
    width,
    width_out,
    stride_a,
    stride_wi,
    stride_wc,
    stride_p,
    stride_og,
    stride_oc,
    stride_or,
    stride_cg,
    stride_cp,
    stride_ct,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_I: tl.constexpr,
    RANK: tl.constexpr,
    RANK_OUT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    CROSS: tl.constexpr,
    EVEN_I: tl.constexpr,
    EVEN_C: tl.constexpr,
    RIDE: tl.constexpr,
    STORE_P: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
    W_ROWS_ALONG_I: tl.constexpr,
):
    """One [BLOCK_M, BLOCK_C] tile of the output; arguments as in the kernel."""
    offs_m = tl.cast(tile_m, tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_c = tl.cast(tile_c, tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_i = tl.arange(0, BLOCK_I)
    offs_r = tl.arange(0, RANK)
    in_m = offs_m < M
    in_c = offs_c < C

    # Rows beyond M read row 0 and are dropped by the store: no row mask in the loop.
    a_ptrs = a_ptr + tl.where(in_m, offs_m, 0)[:, None] * stride_a + offs_i[None, :]
    w_ptrs = w_ptr + offs_i.to(tl.int64)[:, None] * stride_wi + offs_c[None, :] * stride_wc
    if RIDE:
        d_ptrs = thin_in_ptr + offs_i[:, None] * RANK + offs_r[None, :]

    acc = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    p_acc = tl.zeros((BLOCK_M, RANK), dtype=tl.float32)
    for i in range(0, I, BLOCK_I):
        # The copy engine fills what lies beyond a tensor with zeros; pointers need masks.
        if TMA:
            a = a_desc.load([tile_m * BLOCK_M, i])
        elif EVEN_I:
            a = tl.load(a_ptrs)
        else:
            a = tl.load(a_ptrs, mask=(offs_i < I - i)[None, :], other=0.0)
        if TMA:
            if W_ROWS_ALONG_I:
                w = w_desc.load([tile_c * BLOCK_C, i]).T
            else:
                w = w_desc.load([i, tile_c * BLOCK_C])
        elif EVEN_I and EVEN_C:
            w = tl.load(w_ptrs)
        elif EVEN_I:
            w = tl.load(w_ptrs, mask=in_c[None, :], other=0.0)
        else:
            w = tl.load(w_ptrs, mask=(offs_i < I - i)[:, None] & in_c[None, :], other=0.0)
        acc = tl.dot(a, w.to(a.dtype), acc, input_precision=PRECISION)
        if RIDE:
            if TMA:
                d = d_desc.load([i, 0])
            elif EVEN_I:
                d = tl.load(d_ptrs)
            else:
                d = tl.load(d_ptrs, mask=(offs_i < I - i)[:, None], other=0.0)
            p_acc = tl.dot(a, d, p_acc, input_precision=PRECISION)
            d_ptrs += BLOCK_I * RANK
        a_ptrs += BLOCK_I
        w_ptrs += BLOCK_I * stride_wi

    p = p_acc.to(a_ptr.dtype.element_ty)
    p_ptrs = p_ptr + offs_m[:, None] * stride_p
    if RIDE:
        # An infinity in `a` times the padding is a NaN; it must not reach the next product.
        p = tl.where((offs_r < width)[None, :], p, 0.0)
        if STORE_P:
            in_p = in_m[:, None] & (offs_r < width)[None, :] & (tile_c == 0)
            tl.store(p_ptrs + offs_r[None, :], p, mask=in_p)
    acc = add_low_rank(
        acc,
        p,
        p_ptrs,
        in_m,
        tile_c,
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
        BLOCK_M,
        BLOCK_C,
        RANK,
        RANK_OUT,
        BLOCK_R,
        CROSS,
        RIDE,
        PRECISION,
    )
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + offs_c, mask=in_c, other=0.0).to(tl.float32)[None, :]
    out_ptrs = out_ptr + offs_m[:, None] * C + offs_c[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=in_m[:, None] & in_c[None, :])


@triton.jit(do_not_specialize=["M"])
def _low_rank_gemm_kernel(
    a_ptr,  # [M, I], unit stride along I
    w_ptr,  # [I, C], read through its strides; may be stored wider than a
    bias_ptr,  # [C] or None
    thin_in_ptr,  # [I, RANK], contiguous, zero beyond the true rank; read if RIDE
    core_ptr,  # [G, width, width_out], any strides and floating dtype, or None: the identity
    thin_out_ptr,  # [1 or G, slice_c, width_out], any strides and floating dtype
    p_ptr,  # [M, width]: written by the first column tile if STORE_P, read if not RIDE
    out_ptr,  # [M, C], contiguous
    a_desc,  # a, w and thin_in as tensor descriptors if TMA, else None;
    w_desc,  # w's is of its rows in memory: [C, I] in the forward, [I, C] for dX
    d_desc,
    M,
    C,
    I,  # noqa: E741
    slice_c,
    width,
    width_out,
    stride_a,
    stride_wi,
    stride_wc,
    stride_p,
    stride_og,
    stride_oc,
    stride_or,
    stride_cg,
    stride_cp,
    stride_ct,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_I: tl.constexpr,
    RANK: tl.constexpr,
    RANK_OUT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    CROSS: tl.constexpr,
    GROUP_M: tl.constexpr,
    EVEN_I: tl.constexpr,
    EVEN_C: tl.constexpr,
    RIDE: tl.constexpr,
    STORE_P: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
    W_ROWS_ALONG_I: tl.constexpr,
    PERSISTENT: tl.constexpr,
    FLATTEN: tl.constexpr,
):
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_c = tl.cdiv(C, BLOCK_C)
    if PERSISTENT:
        for tile in tl.range(
            tl.program_id(0), tiles_m * tiles_c, tl.num_programs(0), flatten=FLATTEN
        ):
            tile_m, tile_c = _tile_order(tile, tiles_m, tiles_c, GROUP_M)
            _low_rank_tile(
                tile_m,
                tile_c,
                a_ptr,
                w_ptr,
                bias_ptr,
                thin_in_ptr,
                core_ptr,
                thin_out_ptr,
                p_ptr,
                out_ptr,
                a_desc,
                w_desc,
                d_desc,
                M,
                C,
                I,
                slice_c,
                width,
                width_out,
                stride_a,
                stride_wi,
                stride_wc,
                stride_p,
                stride_og,
                stride_oc,
                stride_or,
                stride_cg,
                stride_cp,
                stride_ct,
                BLOCK_M,
                BLOCK_C,
                BLOCK_I,
                RANK,
                RANK_OUT,
                BLOCK_R,
                CROSS,
                EVEN_I,
                EVEN_C,
                RIDE,
                STORE_P,
                PRECISION,
                TMA,
                W_ROWS_ALONG_I,
            )
    else:
        tile_m, tile_c = _tile_order(tl.program_id(0), tiles_m, tiles_c, GROUP_M)
        _low_rank_tile(
            tile_m,
            tile_c,
            a_ptr,
            w_ptr,
            bias_ptr,
            thin_in_ptr,
            core_ptr,
            thin_out_ptr,
            p_ptr,
            out_ptr,
            a_desc,
            w_desc,
            d_desc,
            M,
            C,
            I,
            slice_c,
            width,
            width_out,
            stride_a,
            stride_wi,
            stride_wc,
            stride_p,
            stride_og,
            stride_oc,
            stride_or,
            stride_cg,
            stride_cp,
            stride_ct,
            BLOCK_M,
            BLOCK_C,
            BLOCK_I,
            RANK,
            RANK_OUT,
            BLOCK_R,
            CROSS,
            EVEN_I,
            EVEN_C,
            RIDE,
            STORE_P,
            PRECISION,
            TMA,
            W_ROWS_ALONG_I,
        )


def launch_gemm(
    a: Tensor,  # [M, I], unit last stride
    w: Tensor,  # [I, C], any strides; [C, I] with `transpose`
    bias: Tensor | None,  # [C], unit stride
    thin_in: Tensor | None,  # [I, RANK], contiguous: P rides
    core: Tensor | None,  # [G, width, Rb]
    thin_out: Tensor,  # [1 or G, C/G, Rb], or [C, width] without a core
    p: Tensor | None,  # [M, width]: to be filled with `thin_in`, given without
    *,
    width: int,
    transpose: bool = False,
    config: tuning.GemmConfig | None = None,
    plans: Plans | None = None,
) -> Tensor:
    """out [M, C] in a's dtype. With `thin_in`, P is computed here and stored into `p` unless that
    is None; with `transpose`, w is multiplied as w^T.
    """
    plans = {} if plans is None else plans
    plan: _GemmPlan | None = plans.get("gemm")
    if plan is None or plan.blocks is not None:
        # The copy engine starts at multiples of 16 bytes; a slice may start anywhere.
        addresses = a.data_ptr() | w.data_ptr()
        if thin_in is not None:
            addresses |= thin_in.data_ptr()
        aligned = not addresses & 15
        name = "gemm" if aligned else "gemm by pointers"
        plan = plans.get(name)
        if plan is None:
            plan = plans[name] = _plan(
                a,
                w.t() if transpose else w,
                thin_in,
                core,
                thin_out,
                p,
                width,
                aligned,
                config,
            )
    out = a.new_empty(*plan.out)
    pointers = (a, w, bias, thin_in, core, thin_out, out if p is None else p, out)
    if plan.blocks is None:
        plan.launch(pointers, _NO_DESCRIPTORS)
    else:
        stored = w if w.stride(1) == 1 else w.t()
        plan.launch(
            pointers,
            tuple(
                None if tensor is None else TensorDescriptor.from_tensor(tensor, block)
                for tensor, block in zip((a, stored, thin_in), plan.blocks, strict=True)
            ),
        )
    return out


_NO_DESCRIPTORS = (None, None, None)


class _GemmPlan(NamedTuple):
    launch: Plan
    out: tuple[int, int]  # M, C
    blocks: tuple[list[int], ...] | None  # of the descriptors of a, w and thin_in


def _plan(
    a: Tensor,  # [M, I]
    w: Tensor,  # [I, C]
    thin_in: Tensor | None,  # [I, RANK]
    core: Tensor | None,  # [G, width, Rb]
    thin_out: Tensor,  # [1 or G, C/G, Rb] or [C, width]
    p: Tensor | None,  # [M, width]
    width: int,
    on_16_bytes: bool,
    config: tuning.GemmConfig | None,
) -> _GemmPlan:
    m, i = a.shape
    c = w.shape[1]
    ride = thin_in is not None
    rank, rank_out = padded_rank(width), padded_rank(thin_out.shape[-1])
    _, slice_c, out_strides = slices_of(thin_out, core)
    stride_a, (stride_wi, stride_wc) = a.stride(0), w.stride()
    if config is None:
        config = tuning.gemm_config(
            m,
            c,
            i,
            max(rank, rank_out),
            a.dtype,
            wide=w.dtype != a.dtype,
            aligned=tuning.is_aligned(stride_a | stride_wi * stride_wc | i | c, width),
            ride=ride,
            slice_c=slice_c,
            index=a.device.index,
        )
    cross = tuning.crosses(config, c, slice_c)
    block_m, block_c, block_i, group_m, num_warps, num_stages, tma, persistent = config
    # An expanded row repeats, and a measured config knows nothing of strides.
    tma = (
        bool(tma)
        and on_16_bytes
        and (stride_wi == 1) != (stride_wc == 1)
        and stride_a >= i
        and (stride_a | stride_wi * stride_wc) % 8 == 0
    )
    # A loop over slices within the loop over tiles would keep that one from being fused.
    persistent = bool(persistent) and tma == bool(config.tma) and not cross
    rows_along_i = stride_wi == 1
    tiles = tuning.cdiv(m, block_m) * tuning.cdiv(c, block_c)
    programs = min(tiles, device.multiprocessors(a.device.index)) if persistent else tiles
    precision = tuning.dot_precision(a.dtype)
    launch = Plan(
        _low_rank_gemm_kernel,
        (programs,),
        m,
        c,
        i,
        slice_c,
        width,
        thin_out.shape[-1],
        stride_a,
        stride_wi,
        stride_wc,
        0 if p is None else p.stride(0),
        *out_strides,
        *core_strides(core),
        block_m,
        block_c,
        block_i,
        rank,
        rank_out,
        tuning.rank_block(a.dtype, precision, rank, core is not None),
        cross,
        group_m,
        i % block_i == 0,
        c % block_c == 0,
        ride,
        ride and p is not None,
        precision,
        tma,
        rows_along_i,
        persistent,
        persistent and device.fuses_loops(a.device.index),
        num_warps=num_warps,
        num_stages=num_stages,
    )
    if not tma:
        return _GemmPlan(launch, (m, c), None)
    w_block = [block_c, block_i] if rows_along_i else [block_i, block_c]
    return _GemmPlan(launch, (m, c), ([block_m, block_i], w_block, [block_i, rank]))
