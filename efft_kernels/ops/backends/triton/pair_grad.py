"""Both thin gradients of a linear whose weight is merged, in one pass over its x and dY.

    launch_pair_grad    partial sums of d_down = x^T·S and d_B = dY^T·P, S = dY·B and P = x·down

Neither P nor S is anyone else's: the GEMMs have the merged weight. A program has some rows, which
it reads twice, the second time from the L2 cache. Bytes moved, operands once: M·(K + N) read,
programs·(K + N)·RA·4 of partial sums, which reduce.py adds.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..fallback import padded_rank
from . import tuning
from .configs import PassConfig
from .launch_cache import CachedLaunch, CallCache, once
from .norm import _factor
from .thin import _store_part


@triton.jit
def _thin_product(
    tall_ptr,  # [M, C]
    thin_ptr,  # [C, ra]
    offs_m,
    in_m,
    C,
    ra,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    RA: tl.constexpr,
    EVEN_C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Rows of tall·thin."""
    offs_a = tl.arange(0, RA)
    product = tl.zeros((BLOCK_M, RA), dtype=tl.float32)
    for c in range(0, C, BLOCK_C):
        offs_c = c + tl.arange(0, BLOCK_C)
        inside = in_m[:, None] if EVEN_C else in_m[:, None] & (offs_c < C)[None, :]
        tall = tl.load(tall_ptr + offs_m[:, None] * C + offs_c[None, :], mask=inside, other=0.0)
        thin = _factor(thin_ptr, offs_c, offs_a, ra, C, tall.dtype)
        product = tl.dot(tall, thin, product, input_precision=PRECISION)
    return product


@triton.jit
def _store_grad(
    tall_ptr,  # [M, C]
    thin,  # [BLOCK_M, RA]
    partial_ptr,  # [C, RA] float32: out
    offs_m,
    in_m,
    again,
    C,
    BLOCK_C: tl.constexpr,
    RA: tl.constexpr,
    EVEN_C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """tall^T·thin over these rows."""
    offs_a = tl.arange(0, RA)
    for c in range(0, C, BLOCK_C):
        offs_c = c + tl.arange(0, BLOCK_C)
        in_c = offs_c < C
        inside = in_m[:, None] if EVEN_C else in_m[:, None] & in_c[None, :]
        tall = tl.load(tall_ptr + offs_m[:, None] * C + offs_c[None, :], mask=inside, other=0.0)
        part = tl.dot(tl.trans(tall), thin, input_precision=PRECISION)
        ptrs = partial_ptr + offs_c[:, None] * RA + offs_a[None, :]
        _store_part(ptrs, part, in_c[:, None], again)


@triton.jit(do_not_specialize=["M"])
def _pair_grad_kernel(
    x_ptr,  # [M, K]
    dy_ptr,  # [M, N]
    down_ptr,  # [K, ra]
    b_ptr,  # [N, ra]
    d_down_ptr,  # [programs, K, RA] float32: out
    d_b_ptr,  # [programs, N, RA] float32: out
    M,
    K,
    N,
    ra,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    RA: tl.constexpr,
    EVEN_C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Row blocks pid, pid + programs, ..."""
    pid = tl.program_id(0)
    programs = tl.num_programs(0)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    for block in range(pid, tl.cdiv(M, BLOCK_M), programs):
        offs_m = tl.cast(block, tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        in_m = offs_m < M
        again = block >= programs
        p = _thin_product(
            x_ptr, down_ptr, offs_m, in_m, K, ra, BLOCK_M, BLOCK_C, RA, EVEN_C, PRECISION
        )
        s = _thin_product(
            dy_ptr, b_ptr, offs_m, in_m, N, ra, BLOCK_M, BLOCK_C, RA, EVEN_C, PRECISION
        )
        d_down = d_down_ptr + pid.to(tl.int64) * K * RA
        d_b = d_b_ptr + pid.to(tl.int64) * N * RA
        _store_grad(
            x_ptr, s.to(dtype), d_down, offs_m, in_m, again, K, BLOCK_C, RA, EVEN_C, PRECISION
        )
        _store_grad(
            dy_ptr, p.to(dtype), d_b, offs_m, in_m, again, N, BLOCK_C, RA, EVEN_C, PRECISION
        )


def launch_pair_grad(
    x: Tensor,  # [M, K]
    dy: Tensor,  # [M, N]
    down: Tensor,  # [K, Ra]
    b: Tensor,  # [N, Ra]
    *,
    config: PassConfig,
    cache: CallCache | None = None,
) -> tuple[Tensor, Tensor]:
    """The partial sums [programs, K, RA] of d_down and [programs, N, RA] of d_B, in float32.

    Args:
        x, dy, down, b: contiguous.
    """
    launch, d_down_size, d_b_size = once(cache, "pair_grad", _prepare, x, dy, down, config)
    d_down, d_b = (x.new_empty(s, dtype=torch.float32) for s in (d_down_size, d_b_size))
    launch((x, dy, down, b), (d_down, d_b))
    return d_down, d_b


_Size = tuple[int, int, int]


def _prepare(
    x: Tensor, dy: Tensor, down: Tensor, config: PassConfig
) -> tuple[CachedLaunch, _Size, _Size]:
    (m, k), n, ra = x.shape, dy.shape[1], down.shape[1]
    block_m, block_c, most, num_warps, num_stages = config
    programs = min(most, tuning.cdiv(m, block_m))
    launch = CachedLaunch(
        _pair_grad_kernel,
        (programs,),
        {"num_warps": num_warps, "num_stages": num_stages},
        M=m,
        K=k,
        N=n,
        ra=ra,
        BLOCK_M=block_m,
        BLOCK_C=block_c,
        RA=padded_rank(ra),
        EVEN_C=k % block_c == 0 and n % block_c == 0,
        PRECISION=tuning.dot_precision(x.dtype),
    )
    return launch, (programs, k, padded_rank(ra)), (programs, n, padded_rank(ra))
