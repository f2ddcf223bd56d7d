"""The merged weights of all layers of one kind in one launch: W + B·down^T.

Formed in float32 and rounded once. Bytes moved: L·N·K read and written, and the factors.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..fallback import padded_rank
from . import tuning
from .launch_cache import CachedLaunch, CallCache, once
from .norm import _factor


@triton.jit
def _merge_stack_kernel(
    weight_ptr,  # [L, N, K], contiguous
    b_ptr,  # [L, N, ra], contiguous
    down_ptr,  # [L, K, ra], contiguous
    out_ptr,  # [L, N, K], contiguous
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
    layer = tl.program_id(1).to(tl.int64)
    offs_n = (pid // tiles_k) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = (pid % tiles_k) * BLOCK_K + tl.arange(0, BLOCK_K)
    offs_a = tl.arange(0, RA)
    inside = (offs_n < N)[:, None] & (offs_k < K)[None, :]
    offs = layer * N * K + offs_n[:, None].to(tl.int64) * K + offs_k[None, :]
    weight = tl.load(weight_ptr + offs, mask=inside, other=0.0).to(tl.float32)
    dtype: tl.constexpr = b_ptr.dtype.element_ty
    b = _factor(b_ptr + layer * N * ra, offs_n, offs_a, ra, N, dtype)
    down = _factor(down_ptr + layer * K * ra, offs_k, offs_a, ra, K, dtype)
    merged = weight + tl.dot(b, tl.trans(down), input_precision=PRECISION)
    tl.store(out_ptr + offs, merged.to(out_ptr.dtype.element_ty), mask=inside)


def launch_merge_stack(
    weight: Tensor,  # [L, N, K]
    b: Tensor,  # [L, N, Ra]
    down: Tensor,  # [L, K, Ra]
    cache: CallCache | None = None,
) -> Tensor:
    """W + B·down^T [L, N, K] in B's dtype; all contiguous."""
    launch = once(cache, "merge_stack", _prepare_merge_stack, weight, b)
    out = torch.empty_like(weight, dtype=b.dtype)
    launch((weight, b, down), (out,))
    return out


_CONFIG = (64, 64, 4)  # rows, columns, warps


def _prepare_merge_stack(weight: Tensor, b: Tensor) -> CachedLaunch:
    layers, n, k = weight.shape
    ra = b.shape[2]
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
