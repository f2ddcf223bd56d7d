"""The merged weights of all layers of one kind: γ·W + B·down^T, in a few launches.

The weights are read where they lie, in their own dtype: the sum is formed in float32 and rounded
once, so that an increment below half an ulp of a rounded W is not lost. A launch takes up to
`WEIGHTS` layers, and knows their weights by their addresses alone. Bytes moved: L·N·K read and
written, and the factors.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from ..fallback import padded_rank
from . import tuning
from .launch_cache import CachedLaunch, CallCache, once
from .norm import _factor

WEIGHTS = 4


@triton.jit
def _merge_stack_kernel(
    weight_0_ptr,  # [N, K] each, contiguous
    weight_1_ptr,
    weight_2_ptr,
    weight_3_ptr,
    gamma_ptr,  # [layers, N] float32, contiguous, or None
    b_ptr,  # [layers, N, ra], contiguous
    down_ptr,  # [layers, K, ra], contiguous
    out_ptr,  # [layers, N, K], contiguous
    N,
    K,
    ra,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    RA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A [BLOCK_N, BLOCK_K] tile of one layer."""
    tiles_k = tl.cdiv(K, BLOCK_K)
    pid = tl.program_id(0)
    layer = tl.program_id(1)
    weight_ptr = weight_0_ptr
    if layer == 1:
        weight_ptr = weight_1_ptr
    if layer == 2:
        weight_ptr = weight_2_ptr
    if layer == 3:
        weight_ptr = weight_3_ptr
    offs_n = (pid // tiles_k) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = (pid % tiles_k) * BLOCK_K + tl.arange(0, BLOCK_K)
    offs_a = tl.arange(0, RA)
    inside = (offs_n < N)[:, None] & (offs_k < K)[None, :]
    offs = offs_n[:, None].to(tl.int64) * K + offs_k[None, :]
    weight = tl.load(weight_ptr + offs, mask=inside, other=0.0).to(tl.float32)
    dtype: tl.constexpr = b_ptr.dtype.element_ty
    first = layer.to(tl.int64)
    if gamma_ptr is not None:
        gamma = tl.load(gamma_ptr + first * N + offs_n, mask=offs_n < N, other=0.0)
        weight *= gamma[:, None]
    b = _factor(b_ptr + first * N * ra, offs_n, offs_a, ra, N, dtype)
    down = _factor(down_ptr + first * K * ra, offs_k, offs_a, ra, K, dtype)
    merged = weight + tl.dot(b, tl.trans(down), input_precision=PRECISION)
    out_ptrs = out_ptr + first * N * K + offs
    tl.store(out_ptrs, merged.to(out_ptr.dtype.element_ty), mask=inside)


def launch_merge_stack(
    weights: Sequence[Tensor],  # L of [N, K]
    b: Tensor,  # [L, N, Ra]
    down: Tensor,  # [L, K, Ra]
    gamma: Tensor | None = None,  # [L, N] float32
    cache: CallCache | None = None,
) -> Tensor:
    """γ·W + B·down^T [L, N, K] in B's dtype; all contiguous."""
    n, k = weights[0].shape
    out = b.new_empty(len(weights), n, k)
    for first in range(0, len(weights), WEIGHTS):
        part = slice(first, first + WEIGHTS)
        own = weights[part]
        launch = once(cache, f"merge_stack {len(own)}", _prepare_merge_stack, k, b[part])
        padded = (*own, *[own[-1]] * (WEIGHTS - len(own)))
        scales = None if gamma is None else gamma[part]
        launch((*padded, scales, b[part], down[part], out[part]))
    return out


_CONFIG = (64, 64, 4)  # rows, columns, warps


def _prepare_merge_stack(k: int, b: Tensor) -> CachedLaunch:
    layers, n, ra = b.shape
    block_n, block_k, num_warps = _CONFIG
    return CachedLaunch(
        _merge_stack_kernel,
        (tuning.cdiv(n, block_n) * tuning.cdiv(k, block_k), layers),
        {"num_warps": num_warps},
        N=n,
        K=k,
        ra=ra,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        RA=padded_rank(ra),
        PRECISION=tuning.dot_precision(b.dtype),
    )
