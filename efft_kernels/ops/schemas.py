"""The two operators' schemas and fakes, registered with torch.library. Needs torch alone.

One forward and one backward operator; backend and strategy are arguments, so that a compiled graph
holds the same two nodes whatever kernel runs inside, and a choice that depends on M is made when M
is known, not when the graph is traced.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# A strategy's position here is its code in csrc/codes.h.
STRATEGIES = ("fused", "split", "merged")
STRATEGY_CODES = {name: code for code, name in enumerate(STRATEGIES)}
# An operand's position here is the bit of its gradient in csrc/codes.h, and its place in `needs`.
OPERANDS = ("x", "weight", "bias", "down", "core", "up")


def needs_code(needs: Sequence[bool]) -> int:
    """`needs`, a flag for each of OPERANDS, as the native operators take it."""
    return sum(need << bit for bit, need in enumerate(needs))


LIBRARY = torch.library.Library("efft_kernels", "DEF")

LIBRARY.define(
    "low_rank_linear_fwd(Tensor x, Tensor weight, Tensor? bias, Tensor down, Tensor? core,"
    " Tensor up, bool save_p, str backend, str strategy) -> (Tensor y, Tensor p)"
)
LIBRARY.define(
    "low_rank_linear_bwd(Tensor dy, Tensor? x, Tensor weight, Tensor? p, Tensor down, Tensor? core,"
    " Tensor up, bool[6] needs, str backend, str strategy)"
    " -> (Tensor dx, Tensor d_weight, Tensor d_bias, Tensor d_down, Tensor d_core, Tensor d_up)"
)


@torch.library.register_fake("efft_kernels::low_rank_linear_fwd", lib=LIBRARY)
def _fwd_fake(
    x: Tensor,  # [M, K]
    weight: Tensor,  # [N, K]
    bias: Tensor | None,  # [N]
    down: Tensor,  # [K, Ra]
    core: Tensor | None,  # [G, Ra, Rb]
    up: Tensor,  # [1 or G, N/G, Rb]
    save_p: bool,
    backend: str,
    strategy: str,
) -> tuple[Tensor, Tensor]:
    y = x.new_empty((x.shape[0], weight.shape[0]))
    p = x.new_empty((x.shape[0], down.shape[1]) if save_p else (0,))
    return y, p


@torch.library.register_fake("efft_kernels::low_rank_linear_bwd", lib=LIBRARY)
def _bwd_fake(
    dy: Tensor,  # [M, N]
    x: Tensor | None,  # [M, K]
    weight: Tensor,  # [N, K]
    p: Tensor | None,  # [M, Ra]
    down: Tensor,  # [K, Ra]
    core: Tensor | None,  # [G, Ra, Rb]
    up: Tensor,  # [1 or G, N/G, Rb]
    needs: list[bool],
    backend: str,
    strategy: str,
) -> tuple[Tensor, ...]:
    need_x, need_weight, need_bias, need_down, need_core, need_up = needs
    return (
        dy.new_empty((dy.shape[0], weight.shape[1]) if need_x else (0,)),
        weight.new_empty(tuple(weight.shape) if need_weight else (0,)),
        weight.new_empty((weight.shape[0],) if need_bias else (0,)),
        down.new_empty(tuple(down.shape) if need_down else (0,)),
        up.new_empty(tuple(core.shape) if need_core and core is not None else (0,)),
        up.new_empty(tuple(up.shape) if need_up else (0,)),
    )
