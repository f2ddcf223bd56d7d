"""The merged weight: W + ΔW with ΔW = B·down^T, for the strategy `merged`.

Formed in float32 and rounded once. Bytes moved: N·K read and written, and the factors.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..fallback import padded_rank
from . import tuning
from .factors import Core, Up, core_strides, named_strides, slices_of
from .fold import fold_block
from .launch_cache import CachedLaunch, CallCache, once


@triton.jit
def _merge_kernel(
    weight_ptr,  # [G·n, K], unit stride along K
    up_ptr,  # [1 or G, n, rb], any strides (0 along the first where shared)
    core_ptr,  # [G, ra, rb], any strides, or None
    down_ptr,  # [K, ra], any strides
    out_ptr,  # [G·n, K], contiguous
    n,
    K,
    ra,
    rb,
    stride_weight_n,
    stride_up_g,
    stride_up_n,
    stride_up_b,
    stride_core_g,
    stride_core_a,
    stride_core_b,
    stride_down_k,
    stride_down_a,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_A: tl.constexpr,
    RA: tl.constexpr,
):
    """A [BLOCK_N, BLOCK_K] tile, within one slice, of W + B·down^T."""
    tiles_k = tl.cdiv(K, BLOCK_K)
    pid = tl.program_id(0)
    g = tl.program_id(1).to(tl.int64)
    offs_n = (pid // tiles_k).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = (pid % tiles_k) * BLOCK_K + tl.arange(0, BLOCK_K)
    in_n = offs_n < n
    in_k = offs_k < K
    inside = in_n[:, None] & in_k[None, :]
    rows = g * n + offs_n
    up = Up(up_ptr, stride_up_g, stride_up_n, stride_up_b)
    core = Core(core_ptr, ra, rb, stride_core_g, stride_core_a, stride_core_b)
    # Load: W starts the accumulator.
    weight = tl.load(
        weight_ptr + rows[:, None] * stride_weight_n + offs_k[None, :], mask=inside, other=0.0
    )
    acc = weight.to(tl.float32)
    # Product, BLOCK_A ranks at a time.
    for r in range(0, RA, BLOCK_A):
        offs_a = r + tl.arange(0, BLOCK_A)
        b = fold_block(up, core, g, offs_n, in_n, offs_a, BLOCK_N, BLOCK_A, BLOCK_A)
        down = tl.load(
            down_ptr
            + offs_k[None, :].to(tl.int64) * stride_down_k
            + offs_a[:, None] * stride_down_a,
            mask=in_k[None, :] & (offs_a < ra)[:, None],
            other=0.0,
        )
        acc = tl.dot(b, down.to(tl.float32), acc, input_precision="ieee")
    # Store.
    out_ptrs = out_ptr + rows[:, None] * K + offs_k[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=inside)


def launch_merge(
    weight: Tensor,  # [N, K], unit last stride
    down: Tensor,  # [K, Ra]
    core: Tensor | None,  # [G, Ra, Rb]
    up: Tensor,  # [1 or G, N/G, Rb]
    dtype: torch.dtype,
    cache: CallCache | None = None,
) -> Tensor:
    """W + ΔW, [N, K] in `dtype`, formed in float32."""
    launch = once(cache, "merge", _prepare_merge, weight, down, core, up)
    out = weight.new_empty(*weight.shape, dtype=dtype)
    launch((weight, up, core, down), (out,))
    return out


def _prepare_merge(weight: Tensor, down: Tensor, core: Tensor | None, up: Tensor) -> CachedLaunch:
    k, ra = down.shape
    slices, n, up_strides = slices_of(up, core)
    block_n, block_k, block_a, num_warps = tuning.merge_config(weight.stride(0) | n | k, ra)
    return CachedLaunch(
        _merge_kernel,
        (tuning.cdiv(n, block_n) * tuning.cdiv(k, block_k), slices),
        {"num_warps": num_warps},
        n=n,
        K=k,
        ra=ra,
        rb=up.shape[2],
        stride_weight_n=weight.stride(0),
        **named_strides("up", "gnb", up_strides),
        **core_strides(core),
        **named_strides("down", "ka", down.stride()),
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        BLOCK_A=block_a,
        RA=padded_rank(ra),
    )
