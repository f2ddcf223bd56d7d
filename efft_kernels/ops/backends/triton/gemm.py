"""The low-rank GEMM: out = a·w + bias + (a·thin_in)·core[g]·thin_out[g]^T in one launch and one
store of `out`, whose columns are the slices g one after the other.

Forward and dX are the same function with the operands' roles swapped (B is the fold of core and up,
see fold.py):

    forward   y  = x·W^T + bias + P·core[g]·up[g]^T,  P = x·down     a=x,  w=W^T, thin_out=up
    backward  dX = dY·W + S·down^T,                   S = dY·B       a=dY, w=W,   thin_out=down

With COMPUTE_P, P = a·thin_in is accumulated in the same loop over I that reads `a` for the main
product, so it costs matrix instructions but no memory traffic. Without, P is read in the epilogue:
[a|T]·[w|thin_out], a loop longer by one step of the rank. There T = P·core[g] is formed, for the
one slice (or, with CROSS, the few slices) that a tile's columns lie in, and core and thin_out are
read as they are stored. Either way the product joins the float32 accumulator before the only store.

With a config's `tma` (Hopper and later) the tiles are loaded by TMA, through tensor descriptors:
no address arithmetic in registers, no masks. Pointers serve everything else, rows that are not
aligned included. With `persistent` as well, each multiprocessor runs one program that walks over
the tiles: on sm_90 the two loops become one, so that the next tile's first loads are under way
while this tile is stored. On sm_100 Triton 3.6 fails to compile the fused loop; there the loop over
tiles stays a loop, and the accumulator is held twice.

Bytes moved, each operand once: M·I + I·C + C·(bias) + M·C, I·RA more where P is computed here, M·ra
more where P is stored or read, and core and thin_out as they are stored. cost.py counts them.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..fallback import padded_rank
from . import device, tuning
from .configs import GemmConfig
from .epilogue import add_low_rank
from .factors import Core, Up, core_strides, named_strides, slices_of
from .launch_cache import CachedLaunch, CallCache, once


class Pointers(NamedTuple):
    """The GEMM's tensors inside the kernel, but for the factors of its epilogue."""

    a: tl.tensor
    w: tl.tensor
    bias: tl.tensor | None
    thin_in: tl.tensor | None
    p: tl.tensor
    out: tl.tensor


class Descriptors(NamedTuple):
    """The operands of the loop as tensor descriptors if TMA, else None."""

    a: tl.tensor_descriptor | None
    w: tl.tensor_descriptor | None
    thin_in: tl.tensor_descriptor | None


class Shape(NamedTuple):
    """out [M, C] over I, in slices of slice_c columns."""

    M: tl.tensor
    C: tl.tensor
    I: tl.tensor  # noqa: E741
    slice_c: tl.tensor


class Strides(NamedTuple):
    a_m: tl.tensor
    w_i: tl.tensor
    w_c: tl.tensor
    p_m: tl.tensor


class TileConfig(NamedTuple):
    """The constants that a tile is compiled for; the kernel's own, but for the last two."""

    BLOCK_M: tl.constexpr
    BLOCK_C: tl.constexpr
    BLOCK_I: tl.constexpr
    RA: tl.constexpr
    RB: tl.constexpr
    CROSS: tl.constexpr
    EVEN_I: tl.constexpr
    EVEN_C: tl.constexpr
    COMPUTE_P: tl.constexpr
    STORE_P: tl.constexpr
    PRECISION: tl.constexpr
    TMA: tl.constexpr
    W_ROWS_ALONG_I: tl.constexpr
    STEP_A: tl.constexpr  # ranks per step of the epilogue's products, along ra
    STEP_B: tl.constexpr  # and along rb


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
    tile_m, tile_c, ptrs, descs, shape, strides, thin_out, core, config: tl.constexpr
):
    """One [BLOCK_M, BLOCK_C] tile of out; the tuples are those that the kernel makes."""
    BLOCK_M: tl.constexpr = config.BLOCK_M
    BLOCK_C: tl.constexpr = config.BLOCK_C
    BLOCK_I: tl.constexpr = config.BLOCK_I
    RA: tl.constexpr = config.RA
    offs_m = tl.cast(tile_m, tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_c = tl.cast(tile_c, tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_i = tl.arange(0, BLOCK_I)
    offs_a = tl.arange(0, RA)
    in_m = offs_m < shape.M
    in_c = offs_c < shape.C

    # Rows beyond M read row 0 and are dropped by the store: no row mask in the loop.
    a_ptrs = ptrs.a + tl.where(in_m, offs_m, 0)[:, None] * strides.a_m + offs_i[None, :]
    w_ptrs = ptrs.w + offs_i.to(tl.int64)[:, None] * strides.w_i + offs_c[None, :] * strides.w_c
    if config.COMPUTE_P:
        thin_in_ptrs = ptrs.thin_in + offs_i[:, None] * RA + offs_a[None, :]

    acc = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    p_acc = tl.zeros((BLOCK_M, RA), dtype=tl.float32)
    for i in range(0, shape.I, BLOCK_I):
        # Load. TMA fills what lies beyond a tensor with zeros; pointers need masks.
        if config.TMA:
            a = descs.a.load([tile_m * BLOCK_M, i])
        elif config.EVEN_I:
            a = tl.load(a_ptrs)
        else:
            a = tl.load(a_ptrs, mask=(offs_i < shape.I - i)[None, :], other=0.0)
        if config.TMA:
            if config.W_ROWS_ALONG_I:
                w = descs.w.load([tile_c * BLOCK_C, i]).T
            else:
                w = descs.w.load([i, tile_c * BLOCK_C])
        elif config.EVEN_I and config.EVEN_C:
            w = tl.load(w_ptrs)
        elif config.EVEN_I:
            w = tl.load(w_ptrs, mask=in_c[None, :], other=0.0)
        else:
            w = tl.load(w_ptrs, mask=(offs_i < shape.I - i)[:, None] & in_c[None, :], other=0.0)
        # Product.
        acc = tl.dot(a, w.to(a.dtype), acc, input_precision=config.PRECISION)
        if config.COMPUTE_P:
            if config.TMA:
                thin_in = descs.thin_in.load([i, 0])
            elif config.EVEN_I:
                thin_in = tl.load(thin_in_ptrs)
            else:
                thin_in = tl.load(thin_in_ptrs, mask=(offs_i < shape.I - i)[:, None], other=0.0)
            p_acc = tl.dot(a, thin_in, p_acc, input_precision=config.PRECISION)
            thin_in_ptrs += BLOCK_I * RA
        a_ptrs += BLOCK_I
        w_ptrs += BLOCK_I * strides.w_i

    # Epilogue: P, the low-rank product, the bias.
    p = p_acc.to(ptrs.a.dtype.element_ty)
    p_ptrs = ptrs.p + offs_m[:, None] * strides.p_m
    if config.COMPUTE_P:
        # An infinity in `a` times the padding is a NaN; it must not reach the next product.
        p = tl.where((offs_a < core.ra)[None, :], p, 0.0)
        if config.STORE_P:
            in_p = in_m[:, None] & (offs_a < core.ra)[None, :] & (tile_c == 0)
            tl.store(p_ptrs + offs_a[None, :], p, mask=in_p)
    acc = add_low_rank(acc, p, p_ptrs, in_m, tile_c, shape, thin_out, core, config)
    if ptrs.bias is not None:
        acc += tl.load(ptrs.bias + offs_c, mask=in_c, other=0.0).to(tl.float32)[None, :]

    # Store.
    out_ptrs = ptrs.out + offs_m[:, None] * shape.C + offs_c[None, :]
    tl.store(out_ptrs, acc.to(ptrs.out.dtype.element_ty), mask=in_m[:, None] & in_c[None, :])


@triton.jit(do_not_specialize=["M"])
def _low_rank_gemm_kernel(
    a_ptr,  # [M, I], unit stride along I
    w_ptr,  # [I, C], read through its strides; may be stored wider than a
    bias_ptr,  # [C] or None
    thin_in_ptr,  # [I, RA], contiguous, zero beyond the true rank; read if COMPUTE_P
    core_ptr,  # [G, ra, rb], any strides and floating dtype, or None: the identity
    thin_out_ptr,  # [1 or G, slice_c, rb], any strides and floating dtype
    p_ptr,  # [M, ra]: written by the first column tile if STORE_P, read if not COMPUTE_P
    out_ptr,  # [M, C], contiguous
    a_desc,  # a, w and thin_in as tensor descriptors if TMA, else None;
    w_desc,  # w's is of its rows in memory: [C, I] in the forward, [I, C] for dX
    thin_in_desc,
    M,
    C,
    I,  # noqa: E741
    slice_c,
    ra,
    rb,
    stride_a_m,
    stride_w_i,
    stride_w_c,
    stride_p_m,
    stride_thin_out_g,
    stride_thin_out_n,
    stride_thin_out_b,
    stride_core_g,
    stride_core_a,
    stride_core_b,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_I: tl.constexpr,
    RA: tl.constexpr,
    RB: tl.constexpr,
    STEP: tl.constexpr,  # most ranks at a time in the epilogue's products
    CROSS: tl.constexpr,
    GROUP_M: tl.constexpr,
    EVEN_I: tl.constexpr,
    EVEN_C: tl.constexpr,
    COMPUTE_P: tl.constexpr,
    STORE_P: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
    W_ROWS_ALONG_I: tl.constexpr,
    PERSISTENT: tl.constexpr,
    FLATTEN: tl.constexpr,
):
    """One tile of out, or with PERSISTENT every num_programs-th."""
    ptrs = Pointers(a_ptr, w_ptr, bias_ptr, thin_in_ptr, p_ptr, out_ptr)
    descs = Descriptors(a_desc, w_desc, thin_in_desc)
    shape = Shape(M, C, I, slice_c)
    strides = Strides(stride_a_m, stride_w_i, stride_w_c, stride_p_m)
    thin_out = Up(thin_out_ptr, stride_thin_out_g, stride_thin_out_n, stride_thin_out_b)
    core = Core(core_ptr, ra, rb, stride_core_g, stride_core_a, stride_core_b)
    STEP_A: tl.constexpr = RA if COMPUTE_P or STEP > RA else STEP
    STEP_B: tl.constexpr = RB if STEP > RB else STEP
    config: tl.constexpr = TileConfig(
        BLOCK_M,
        BLOCK_C,
        BLOCK_I,
        RA,
        RB,
        CROSS,
        EVEN_I,
        EVEN_C,
        COMPUTE_P,
        STORE_P,
        PRECISION,
        TMA,
        W_ROWS_ALONG_I,
        STEP_A,
        STEP_B,
    )
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_c = tl.cdiv(C, BLOCK_C)
    pid = tl.program_id(0)
    if PERSISTENT:
        for tile in tl.range(pid, tiles_m * tiles_c, tl.num_programs(0), flatten=FLATTEN):
            tile_m, tile_c = _tile_order(tile, tiles_m, tiles_c, GROUP_M)
            _low_rank_tile(tile_m, tile_c, ptrs, descs, shape, strides, thin_out, core, config)
    else:
        tile_m, tile_c = _tile_order(pid, tiles_m, tiles_c, GROUP_M)
        _low_rank_tile(tile_m, tile_c, ptrs, descs, shape, strides, thin_out, core, config)


class _Gemm(NamedTuple):
    launch: CachedLaunch
    out: tuple[int, int]  # M, C
    blocks: tuple[list[int], ...] | None  # of the descriptors of a, w and thin_in, if TMA


_NO_DESCRIPTORS = (None, None, None)


def launch_gemm(
    a: Tensor,  # [M, I], unit last stride
    w: Tensor,  # [I, C], any strides; [C, I] with `transpose`
    bias: Tensor | None,  # [C], unit stride
    thin_in: Tensor | None,  # [I, RA], contiguous: P is computed here
    core: Tensor | None,  # [G, ra, Rb]
    thin_out: Tensor,  # [1 or G, C/G, Rb], or [C, ra] without a core
    p: Tensor | None,  # [M, ra]: filled with `thin_in`, read without
    *,
    ra: int,
    transpose: bool = False,
    config: GemmConfig | None = None,
    cache: CallCache | None = None,
) -> Tensor:
    """out [M, C] in a's dtype.

    Args:
        p: None with `thin_in`: P is not stored.
        ra: Columns of P.
        transpose: w is multiplied as w^T.
        config: Taken instead of the one that tuning.py chooses.
        cache: Of the call.
    """
    prepared: _Gemm | None = None if cache is None else cache.get("gemm")
    if prepared is None or prepared.blocks is not None:
        # TMA starts at multiples of 16 bytes; a slice may start anywhere.
        addresses = a.data_ptr() | w.data_ptr()
        if thin_in is not None:
            addresses |= thin_in.data_ptr()
        aligned = not addresses & 15
        name = "gemm" if aligned else "gemm by pointers"
        operands = (a, w, thin_in, core, thin_out, p)
        prepared = once(cache, name, _prepare_gemm, *operands, ra, transpose, aligned, config)
    out = a.new_empty(*prepared.out)
    pointers = (a, w, bias, thin_in, core, thin_out, out if p is None else p, out)
    if prepared.blocks is None:
        prepared.launch(pointers, _NO_DESCRIPTORS)
    else:
        stored = w if w.stride(1) == 1 else w.t()
        descriptors = tuple(
            None if tensor is None else TensorDescriptor.from_tensor(tensor, block)
            for tensor, block in zip((a, stored, thin_in), prepared.blocks, strict=True)
        )
        prepared.launch(pointers, descriptors)
    return out


def _prepare_gemm(
    a: Tensor,  # [M, I]
    w: Tensor,  # [I, C], or [C, I] with `transpose`
    thin_in: Tensor | None,  # [I, RA]
    core: Tensor | None,  # [G, ra, Rb]
    thin_out: Tensor,  # [1 or G, C/G, Rb] or [C, ra]
    p: Tensor | None,  # [M, ra]
    ra: int,
    transpose: bool,
    on_16_bytes: bool,
    config: GemmConfig | None,
) -> _Gemm:
    if transpose:
        w = w.t()
    m, i = a.shape
    c = w.shape[1]
    rb = thin_out.shape[-1]
    compute_p = thin_in is not None
    rank_a, rank_b = padded_rank(ra), padded_rank(rb)
    _, slice_c, thin_out_strides = slices_of(thin_out, core)
    stride_a, (stride_wi, stride_wc) = a.stride(0), w.stride()
    if config is None:
        config = tuning.gemm_config(
            m,
            c,
            i,
            max(rank_a, rank_b),
            a.dtype,
            wide=w.dtype != a.dtype,
            aligned=tuning.is_aligned(stride_a | stride_wi * stride_wc | i | c, ra),
            compute_p=compute_p,
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
    launch = CachedLaunch(
        _low_rank_gemm_kernel,
        (programs,),
        {"num_warps": num_warps, "num_stages": num_stages},
        M=m,
        C=c,
        I=i,
        slice_c=slice_c,
        ra=ra,
        rb=rb,
        stride_a_m=stride_a,
        stride_w_i=stride_wi,
        stride_w_c=stride_wc,
        stride_p_m=0 if p is None else p.stride(0),
        **named_strides("thin_out", "gnb", thin_out_strides),
        **core_strides(core),
        BLOCK_M=block_m,
        BLOCK_C=block_c,
        BLOCK_I=block_i,
        RA=rank_a,
        RB=rank_b,
        STEP=tuning.rank_block(a.dtype, precision, rank_a, core is not None),
        CROSS=cross,
        GROUP_M=group_m,
        EVEN_I=i % block_i == 0,
        EVEN_C=c % block_c == 0,
        COMPUTE_P=compute_p,
        STORE_P=compute_p and p is not None,
        PRECISION=precision,
        TMA=tma,
        W_ROWS_ALONG_I=rows_along_i,
        PERSISTENT=persistent,
        FLATTEN=persistent and device.fuses_loops(a.device.index),
    )
    if not tma:
        return _Gemm(launch, (m, c), None)
    w_block = [block_c, block_i] if rows_along_i else [block_i, block_c]
    return _Gemm(launch, (m, c), ([block_m, block_i], w_block, [block_i, rank_a]))
