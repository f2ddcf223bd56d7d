"""y = x·W^T + bias + x·down·core[g]·up[g]^T: which launches, in which order.

fused    gemm (P rides)
split    thin (P = x·down), gemm
merged   thin where P is saved, merge, the library's GEMM

Before them, where factors.py says so, `fold`: of `down` where it rides and is not contiguous, of
x's dtype and 16, 32, 64 or 128 columns wide, and of all factors at ranks above 32.
"""

from __future__ import annotations

import logging
from functools import cache

import torch.nn.functional as F
from torch import Tensor

from .. import torch_backend
from ..fallback import padded_rank
from .factors import launch_fold, launch_merge, read_in_place
from .gemm import launch_gemm
from .launch_cache import plans_of
from .limits import TRITON_MAX_RANK
from .thin import launch_thin
from .tuning import can_ride, dot_precision

logger = logging.getLogger(__name__)


def rows(t: Tensor) -> Tensor:
    """t [M, C] itself where its last stride is one, else a contiguous copy."""
    return t if t.stride(1) == 1 or t.shape[1] == 1 else t.contiguous()


def thin_buffer(like: Tensor, width: int) -> Tensor:
    """An empty [M, width] in rows of the padded rank, which keeps them aligned."""
    rank = padded_rank(width)
    buffer = like.new_empty(like.shape[0], rank)
    return buffer if width == rank else buffer[:, :width]


def out_of_reach(m: int, n: int, k: int, rank: int) -> bool:
    """Whether plain torch runs instead: nothing to launch on, or an Ra beyond what a tile's
    registers hold (Rb is folded away first).
    """
    if rank > TRITON_MAX_RANK:
        _note_rank(rank)
        return True
    return m == 0 or n == 0 or k == 0


@cache
def _note_rank(rank: int) -> None:
    logger.warning(
        "rank %d is above %d, the most the Triton kernels take; plain torch runs these layers",
        rank,
        TRITON_MAX_RANK,
    )


def torch_strategy(strategy: str) -> str:
    """The plain-torch strategy that stands in for `strategy`."""
    return strategy if strategy in torch_backend.STRATEGIES else "split"


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
    plans = plans_of(
        (x, weight, bias, down, core, up), "fwd", save_p, strategy, dot_precision(x.dtype)
    )
    x = rows(x)
    p = x.new_empty(m, ra) if save_p else None
    merged = strategy == "merged"
    ride = strategy == "fused" and can_ride(x.dtype, padded_rank(ra))
    padded = not read_in_place(down, up)
    down_in = down
    if ride or (padded and (save_p or not merged)):
        down_in = launch_fold(down, None, x.dtype, plans, "pad down")
    given = p
    if not (ride or merged):
        given = thin_buffer(x, ra) if p is None else p
    if given is not None and not ride:
        launch_thin(x, down_in, None, given, None, plans=plans)
    if merged:
        w = launch_merge(rows(weight), down, core, up, x.dtype, plans)
        return F.linear(x, w, None if bias is None else bias.to(x.dtype)), p
    if bias is not None and not bias.is_contiguous():
        bias = bias.contiguous()
    if padded:
        up, core = launch_fold(up, core, x.dtype, plans), None
    thin_in = down_in if ride else None
    y = launch_gemm(
        x, weight, bias, thin_in, core, up, given, width=ra, transpose=True, plans=plans
    )
    return y, p
