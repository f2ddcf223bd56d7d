"""y = x·W^T + bias + x·down·core[g]·up[g]^T: which launches, in which order.

fused    fold, gemm (P rides)           2 launches, 1 where the factors come folded
split    fold, thin (P = x·down), gemm  3 launches
merged   fold, merge, the library's GEMM; and thin where P is saved
"""

from __future__ import annotations

import logging
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import torch_backend
from .factors import MAX_RANK, launch_fold, launch_merge, padded_rank
from .gemm import launch_gemm
from .launch import Plans, plans_of
from .thin import launch_thin
from .tuning import can_ride, dot_precision

logger = logging.getLogger(__name__)


def rows(t: Tensor) -> Tensor:
    """t [M, C] itself where its last stride is one, else a contiguous copy."""
    return t if t.stride(1) == 1 or t.shape[1] == 1 else t.contiguous()


def thin_buffer(like: Tensor, width: int, rank: int) -> Tensor:
    """An empty [M, width] in rows of the padded rank, which keeps them aligned."""
    buffer = like.new_empty((like.shape[0], rank))
    return buffer if width == rank else buffer[:, :width]


def out_of_reach(m: int, n: int, k: int, rank: int) -> bool:
    """Whether plain torch runs instead: nothing to launch on, or a rank beyond what a tile's
    registers hold.
    """
    if rank > MAX_RANK:
        _note_rank(rank)
        return True
    return m == 0 or n == 0 or k == 0


@cache
def _note_rank(rank: int) -> None:
    logger.warning(
        "rank %d is above %d, the most the Triton kernels take; plain torch runs these layers",
        rank,
        MAX_RANK,
    )


def torch_strategy(strategy: str) -> str:
    """The plain-torch strategy that stands in for `strategy`."""
    return strategy if strategy in torch_backend.STRATEGIES else "split"


def merged_weight(
    weight: Tensor,  # [N, K]
    down: Tensor,  # [K, Ra]
    core: Tensor | None,  # [G, Ra, Rb]
    up: Tensor,  # [1 or G, N/G, Rb]
    dtype: torch.dtype,
    plans: Plans | None = None,
) -> Tensor:
    """W + ΔW, [N, K] in `dtype`, formed in float32."""
    b, down = launch_fold(down, core, up, weight.shape[0], torch.float32, plans, "fold for merge")
    return launch_merge(rows(weight), b, down, dtype, plans)


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
    p = x.new_empty((m, ra)) if save_p else None
    if strategy == "merged":
        if p is not None:
            launch_thin(x, _down_only(down, x.dtype), p, None, plans=plans)
        w = merged_weight(weight, down, core, up, x.dtype, plans)
        return F.linear(x, w, None if bias is None else bias.to(x.dtype)), p
    if bias is not None and not bias.is_contiguous():
        bias = bias.contiguous()
    b, down = launch_fold(down, core, up, n, x.dtype, plans)
    ride = strategy == "fused" and can_ride(x.dtype, down.shape[1])
    given = p
    if not ride:
        given = thin_buffer(x, ra, down.shape[1]) if p is None else p
        launch_thin(x, down, given, None, plans=plans)
    y = launch_gemm(
        x, weight, bias, down, b, given, width=ra, ride=ride, transpose=True, plans=plans
    )
    return y, p


def _down_only(down: Tensor, dtype: torch.dtype) -> Tensor:
    """`down` in `dtype`, padded to [K, RANK]."""
    rank = padded_rank(down.shape[1])
    if down.shape[1] == rank:
        return down.to(dtype).contiguous()
    return F.pad(down.to(dtype), (0, rank - down.shape[1]))
