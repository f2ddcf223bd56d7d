"""The operator in plain torch, on the fold. Runs wherever torch runs; strategies `split` and
`merged`.

With B = stack over the slices of up[g]·core[g]^T, [N, Ra], the aggregated group is one two-factor
problem whatever G is, and the backward follows from P = x·down and S = dY·B:

    y  = x·W^T + bias + P·B^T        dX     = dY·W + S·down^T
    d_down = x^T·S                   d_B    = dY^T·P
    d_core[g] = d_B[g]^T·up[g]       d_up[g] = d_B[g]·core[g]   (summed over g when `up` is shared)

`split` adds P·B^T and S·down^T to the library GEMM's own output. `merged` adds B·down^T to the
weight instead, in the wider of the two dtypes and rounded once, and lets the library GEMM do the
rest.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import FLOAT_DTYPES, HALF_DTYPES
from ..cost_model import Device, Launch, Problem, library_gemm, loses_increments

NAME = "torch"
NATIVE = False
STRATEGIES = ("split", "merged")
DTYPES = FLOAT_DTYPES

excluded = loses_increments

Grads = tuple[
    Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None
]


def unavailable() -> str | None:
    """Why this backend cannot run here: never."""
    return None


def rejects(x: Tensor) -> str | None:
    """Why this backend cannot take an input on x's device: it takes all."""
    return None


def out_of_reach(problem: Problem) -> bool:
    """Whether this backend cannot compute the problem: never."""
    return False


def preferred(problem: Problem) -> bool:
    """Whether `auto` may take this backend: where no other is."""
    return True


def launches(problem: Problem, strategy: str, device: Device) -> list[Launch]:
    """The products and passes for one call."""
    M, K, N, _, r, *_ = problem
    b, wb = problem.compute_bytes, problem.weight_bytes
    thin_eff = device.thin_efficiency
    library = library_gemm(problem)
    wide = max(4, b)
    merge_bytes = N * K * (wb + wide + (b if b != wide else 0))
    merge = Launch("merge", 2 * N * K * r, merge_bytes, thin_eff / device.merge_cost)

    def thin(columns: int) -> Launch:
        return Launch("thin product", 2 * M * columns * r, M * columns * b, thin_eff)

    def update(columns: int) -> Launch:
        return Launch("update in place", 2 * M * columns * r, 2 * M * columns * b, thin_eff)

    if not problem.backward:
        if strategy == "split":
            return [thin(K), library, update(N)]
        return [*([thin(K)] if problem.training else []), merge, library]
    factors = [thin(N), thin(N), thin(K)]
    return [*factors, library, update(K)] if strategy == "split" else [*factors, merge, library]


def fold(core: Tensor | None, up: Tensor, rows: torch.dtype | None = None) -> Tensor:
    """B = stack_g up[g]·core[g]^T, [N, Ra], in the wider of the factors' dtype and `rows`, that of
    the products B goes into: rounded to bfloat16, it would cost float16 rows three of their bits.
    """
    if rows is not None and core is not None:
        wide = torch.promote_types(up.dtype, rows)
        core, up = core.to(wide), up.to(wide)
    if core is None:
        return up.flatten(0, 1)
    if core.shape[0] == 1:
        return torch.mm(up[0], core[0].t())  # a third of torch.matmul's time on the host
    # torch.matmul takes another way, with other rounding, where an operand requires grad.
    return torch.bmm(up.expand(core.shape[0], -1, -1), core.transpose(1, 2)).flatten(0, 1)


def unfold_grads(
    d_b: Tensor,  # [N, Ra]
    core: Tensor | None,  # [G, Ra, Rb]
    up: Tensor,  # [1 or G, N/G, Rb]
    need_core: bool,
    need_up: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """(d_core, d_up), in the factors' dtype, from d_B: the chain rule through `fold`, on tensors of
    N·Ra numbers."""
    dtype, wide = up.dtype, torch.promote_types(up.dtype, d_b.dtype)
    slices = up.shape[0] if core is None else core.shape[0]
    if core is not None:
        d_b, core, up = d_b.to(wide), core.to(wide), up.to(wide)
    if core is not None and slices == 1:
        d_core = torch.mm(d_b.t(), up[0]).unsqueeze(0).to(dtype) if need_core else None
        return d_core, torch.mm(d_b, core[0]).unsqueeze(0).to(dtype) if need_up else None
    d_b = d_b.reshape(slices, -1, d_b.shape[1])  # [G, N/G, Ra]
    d_core = (
        torch.bmm(d_b.mT, up.expand(slices, -1, -1)).to(dtype)
        if need_core and core is not None
        else None
    )
    d_up = None
    if need_up:
        d_up = d_b if core is None else torch.bmm(d_b, core)
        if up.shape[0] != slices:
            d_up = d_up.sum(0, keepdim=True)
        d_up = d_up.to(dtype)
    return d_core, d_up


def merge_weight(weight: Tensor, down: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """W + B·down^T, [N, K], added in the widest of the weight's, the factors', B's and the rows'
    dtype, then rounded once: all in bfloat16, the sum would cost float16 rows three bits."""
    wide = dtype
    for tensor in (weight, down, b):
        wide = torch.promote_types(wide, tensor.dtype)
    return torch.addmm(weight.to(wide), b.to(wide), down.to(wide).t()).to(dtype)


def mm_into(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a·b in `dtype`. On CUDA a half-precision product is stored from its float32 accumulator,
    except as part of a graph: torch cannot differentiate that."""
    recorded = torch.is_grad_enabled() and (a.requires_grad or b.requires_grad)
    stored_half = dtype == torch.float32 and a.dtype in HALF_DTYPES
    if a.is_cuda and stored_half and not recorded:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a, b).to(dtype)


def frozen_grads(
    dy: Tensor,  # [M, N]
    x: Tensor | None,  # [M, K]
    weight: Tensor,  # [N, K]
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """(d_weight, d_bias), for callers that train the frozen part too; every backend leaves these
    to torch's own products. d_bias is in the weight's dtype."""
    d_weight = d_bias = None
    if need_weight:
        assert x is not None
        d_weight = mm_into(dy.t(), x, weight.dtype)
    if need_bias:
        wide = torch.promote_types(weight.dtype, torch.float32)
        d_bias = dy.sum(0, dtype=wide).to(weight.dtype)
    return d_weight, d_bias


def thin_grad(tall: Tensor, thin: Tensor, dtype: torch.dtype) -> Tensor:
    """tall^T·thin for tall [M, C] and thin [M, r], contiguous [C, r].

    Formed as (thin^T·tall)^T: with r rows instead of r columns the CPU library blocks it better.
    """
    return mm_into(thin.t(), tall, dtype).t().contiguous()


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
    dtype = x.dtype
    b = fold(core, up, dtype)
    bias = None if bias is None else bias.to(dtype)
    p = torch.mm(x, down.to(dtype)) if save_p or strategy == "split" else None
    if strategy == "merged":
        return F.linear(x, merge_weight(weight, down, b, dtype), bias), p
    assert p is not None
    y = _split(x, weight.to(dtype), bias, p, b.to(dtype))
    return y, p if save_p else None


def _split(
    x: Tensor,  # [M, K]
    weight: Tensor,  # [N, K]
    bias: Tensor | None,  # [N]
    p: Tensor,  # [M, Ra]
    b: Tensor,  # [N, Ra]
) -> Tensor:
    """y = x·W^T + bias + P·B^T, [M, N].

    On the CPU F.linear writes the bias to all of y before the GEMM adds to it. [P|1]·[B|bias]^T
    takes that pass's place and brings the low-rank product along, so y is read and written once
    less. On CUDA the GEMM's own epilogue adds the bias, and the low-rank product follows.
    """
    if x.device.type != "cpu":
        return F.linear(x, weight, bias).addmm_(p, b.t())
    if bias is not None:
        p = torch.cat((p, p.new_ones(p.shape[0], 1)), 1)
        b = torch.cat((b, bias.unsqueeze(1)), 1)
    return torch.mm(p, b.t()).addmm_(x, weight.t())


def backward(
    dy: Tensor,  # [M, N]
    x: Tensor | None,  # [M, K]
    weight: Tensor,  # [N, K]
    p: Tensor | None,  # [M, Ra]
    down: Tensor,  # [K, Ra]
    core: Tensor | None,  # [G, Ra, Rb]
    up: Tensor,  # [1 or G, N/G, Rb]
    *,
    needs: tuple[bool, ...],
    strategy: str,
) -> Grads:
    """(dx, d_weight, d_bias, d_down, d_core, d_up); None where `needs` is False."""
    need_x, need_weight, need_bias, need_down, need_core, need_up = needs
    dtype = dy.dtype
    b = fold(core, up, dtype)
    s = None
    if need_down or (need_x and strategy == "split"):
        s = torch.mm(dy, b.to(dtype))  # [M, Ra]
    dx = d_down = d_core = d_up = None
    if need_x and strategy == "merged":
        dx = torch.mm(dy, merge_weight(weight, down, b, dtype))
    elif need_x:
        assert s is not None
        dx = torch.mm(dy, weight.to(dtype)).addmm_(s, down.to(dtype).t())
    d_weight, d_bias = frozen_grads(dy, x, weight, need_weight, need_bias)
    if need_down:
        assert x is not None and s is not None
        d_down = thin_grad(x, s, down.dtype)
    if need_core or need_up:
        assert p is not None
        d_b = thin_grad(dy, p, torch.promote_types(up.dtype, dtype))
        d_core, d_up = unfold_grads(d_b, core, up, need_core, need_up)
    return dx, d_weight, d_bias, d_down, d_core, d_up
