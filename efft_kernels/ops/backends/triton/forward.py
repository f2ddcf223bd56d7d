"""y = x·W^T + bias + x·down·core[g]·up[g]^T: which launches, in which order.

fused    gemm, which computes P = x·down in its loop
split    thin (P = x·down), gemm
merged   thin where P is saved, merge, the library's GEMM

Before them, where fold.py says so, `fold`: of `down` where it is an operand of the GEMM's loop and
is not contiguous, of x's dtype and 16, 32, 64 or 128 columns wide, and of all factors at ranks
above 32.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .. import torch_backend
from ..fallback import note_rank, padded_rank, rows, torch_strategy
from .factors import read_in_place
from .fold import launch_fold
from .gemm import launch_gemm
from .launch_cache import cache_of
from .limits import TRITON_MAX_RANK
from .merge import launch_merge
from .thin import launch_thin
from .tuning import can_compute_p, dot_precision


def thin_buffer(like: Tensor, ra: int) -> Tensor:
    """An empty [M, ra] in rows of the padded rank, which keeps them aligned."""
    rank_a = padded_rank(ra)
    buffer = like.new_empty(like.shape[0], rank_a)
    return buffer if ra == rank_a else buffer[:, :ra]


def out_of_reach(m: int, n: int, k: int, rank: int) -> bool:
    """Whether plain torch runs instead: nothing to launch on, or an Ra (`rank`) beyond what a
    tile's registers hold (a larger Rb is folded away first).
    """
    if rank > TRITON_MAX_RANK:
        note_rank(rank, TRITON_MAX_RANK, "Triton")
        return True
    return m == 0 or n == 0 or k == 0


def on_16_bytes(strategy: str, *operands: Tensor) -> str:
    """`strategy`, but `split` for `fused` where an operand of the GEMM's loop starts elsewhere.

    What Triton 3.6.0 makes of a loop with two products from such rows gave wrong results and an
    illegal memory access on an H100; the loop with one product is right.
    """
    addresses = 0
    if strategy == "fused":
        for operand in operands:
            addresses |= operand.data_ptr()
    return "split" if addresses & 15 else strategy


def forward(
    x: Tensor,  # [M, K]
    weight: Tensor,  # [N, K]
    bias: Tensor | None,  # [N]
    down: Tensor,  # [K, Ra]
    core: Tensor | None,  # [G, Ra, Rb]
    up: Tensor,  # [1 or G, N/G, Rb]
    *,
    save_p: bool,
    strategy: str,
) -> tuple[Tensor, Tensor | None]:
    """(y [M, N], P [M, Ra] if save_p else None), both in x's dtype."""
    m = x.shape[0]
    n, k = weight.shape
    ra = down.shape[1]
    if out_of_reach(m, n, k, ra):
        return torch_backend.forward(
            x, weight, bias, down, core, up, save_p=save_p, strategy=torch_strategy(strategy)
        )
    strategy = on_16_bytes(strategy, x, weight, down)
    cache = cache_of(
        (x, weight, bias, down, core, up), "fwd", save_p, strategy, dot_precision(x.dtype)
    )
    x = rows(x)
    p = x.new_empty(m, ra) if save_p else None
    merged = strategy == "merged"
    compute_p = strategy == "fused" and can_compute_p(x.dtype, padded_rank(ra))
    padded = not read_in_place(down, up)
    down_in = down
    if compute_p or (padded and (save_p or not merged)):
        down_in = launch_fold(down, None, x.dtype, cache, "pad down")
    p_buffer = p
    if p is None and not (compute_p or merged):
        p_buffer = thin_buffer(x, ra)
    if p_buffer is not None and not compute_p:
        launch_thin(x, down_in, None, p_buffer, None, cache=cache)
    if merged:
        w = launch_merge(rows(weight), down, core, up, x.dtype, cache)
        return F.linear(x, w, None if bias is None else bias.to(x.dtype)), p
    if bias is not None and not bias.is_contiguous():
        bias = bias.contiguous()
    if padded:
        up, core = launch_fold(up, core, x.dtype, cache), None
    thin_in = down_in if compute_p else None
    y = launch_gemm(
        x, weight, bias, thin_in, core, up, p_buffer, ra=ra, transpose=True, cache=cache
    )
    return y, p
