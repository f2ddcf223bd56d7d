"""`low_rank_linear`, and the autograd.Function over the operator pair.

Derivation of the backward, with dY = dL/dy, P = x·down and B = stack_g up[g]·core[g]^T, from
y = x·W^T + bias + P·B^T:

    dX = dY·W + S·down^T, S = dY·B     d_down = x^T·S         d_W = dY^T·x       d_bias = sum(dY)
    d_B = dY^T·P                       d_core[g] = d_B[g]^T·up[g]   d_up[g] = d_B[g]·core[g]
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._decomp import register_decomposition
from torch.autograd import forward_ad

from .. import functions
from . import checks, dispatch, eager_entry, reference
from .backends.torch_backend import backward as backward_in_torch
from .backends.torch_backend import fold
from .recompute import Source, kept_for, made_from


def low_rank_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor,
    core: Tensor | None,
    up: Tensor,
    *,
    backend: str = "auto",
    strategy: str = "auto",
) -> Tensor:
    """y = x·weight^T + bias + x·down·core[g]·up[g]^T for every output slice g, in one operator.

    Args:
        x: [..., K], any leading dims (none, and zero rows, included), any strides.
        weight: [N, K], the layout of torch.nn.Linear; usually frozen, differentiable all the same.
        bias: [N] or None.
        down: [K, Ra], the input-side factor.
        core: [G, Ra, Rb], one matrix per output slice with the scale folded in; None is the
            identity (Ra = Rb, and G is up's first dim).
        up: [1 or G, N/G, Rb], the output-side factor; a leading 1 is shared by all slices.
        backend: 'auto', or one of `available_backends()`; an explicit choice never falls back.
        strategy: 'auto', 'fused', 'split' or 'merged'; all compute the same function.

    dtypes are float64, float32, float16 or bfloat16. Under autocast x is cast to the ambient dtype
    and the others may have any floating dtype. Elsewhere all must be x's dtype, but for the three
    factors, which may be float32 beside a half-precision x. Gradients come back in their tensor's
    own dtype.

    Returns:
        [..., N] in x's dtype (the ambient one under autocast).

    Raises:
        TypeError: a tensor is missing, not floating, or of a dtype that does not fit.
        ValueError: a shape, device, backend or strategy does not fit.
        RuntimeError: the chosen backend cannot run here or cannot take x.

    Second derivatives and `torch.func` transforms are taken through plain torch; a compiled backend
    that was asked for by name raises under a `torch.func` transform.

    Source: EFFT (arXiv:2311.06749), Eq. 2 and 3, for one aggregated group.
    """
    return run(x, weight, bias, down, core, up, backend=backend, strategy=strategy)


def run(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor,
    core: Tensor | None,
    up: Tensor,
    *,
    backend: str,
    strategy: str,
    source: Source | None = None,
) -> Tensor:
    """`low_rank_linear` for a layer.

    Args:
        x, weight, bias, down, core, up, backend, strategy: as there.
        source: what the backward makes x from (`recompute.find`); None where it keeps x.
    """
    backend = dispatch.requested_backend(backend)
    dispatch.check_strategy(strategy)
    transformed = torch._C._are_functorch_transforms_active()
    if forward_ad._current_level >= 0 and not transformed:
        operands = (x, weight, bias, down, core, up)
        transformed = any(t is not None and dispatch.has_tangent(t) for t in operands)
        backend = dispatch.without_tangents(backend, operands) if transformed else backend
    if not (transformed or torch.compiler.is_compiling()):
        y = eager_entry.try_run(x, weight, bias, down, core, up, backend, strategy, source)
        if y is not None:
            return y
    x = checks.to_autocast_dtype(x)
    checks.check_operands(x, weight, bias, down, core, up)
    if transformed and backend not in ("auto", "reference", "torch"):
        raise RuntimeError(
            f"backend {backend!r} does not support torch.func transforms; use backend='torch'"
        )
    if torch.jit.is_tracing():
        return _in_torch(x, weight, bias, down, core, up)[0]
    if transformed or backend == "reference":
        return _reference(x, weight, bias, down, core, up)

    lead = x.shape[:-1]
    flat = x.reshape(-1, x.shape[-1]) if x.dim() != 2 else x
    if torch.is_grad_enabled() and (
        x.requires_grad
        or weight.requires_grad
        or down.requires_grad
        or up.requires_grad
        or (core is not None and core.requires_grad)
        or (bias is not None and bias.requires_grad)
    ):
        y = functions.apply(
            _LowRankLinear, flat, weight, bias, down, core, up, backend, strategy, source
        )
    else:
        y, _ = torch.ops.efft_kernels.low_rank_linear_fwd(
            flat, weight, bias, down, core, up, False, backend, strategy
        )
    return y if x.dim() == 2 else y.reshape(*lead, y.shape[1])


class _LowRankLinear(torch.autograd.Function):
    """Saves x, or what it is made from, and P = x·down, and only where a gradient will need them;
    the rest are the caller's tensors."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # [M, K]
        weight: Tensor,  # [N, K]
        bias: Tensor | None,  # [N]
        down: Tensor,  # [K, Ra]
        core: Tensor | None,  # [G, Ra, Rb]
        up: Tensor,  # [1 or G, N/G, Rb]
        backend: str,
        strategy: str,
        source: Source | None,
    ) -> Tensor:
        _, need_weight, _, need_down, need_core, need_up = ctx.needs_input_grad[:6]
        save_p = need_core or need_up
        y, p = torch.ops.efft_kernels.low_rank_linear_fwd(
            x, weight, bias, down, core, up, save_p, backend, strategy
        )
        need_x = need_down or need_weight
        ctx.source = source if need_x else None
        ctx.save_for_backward(
            weight,
            p if save_p else None,
            down,
            core,
            up,
            *kept_for(x if need_x else None, ctx.source),
        )
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.choice = (backend, strategy)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        weight, p, down, core, up, *kept = ctx.saved_tensors
        x = made_from(kept, ctx.source, dy)
        needs = list(ctx.needs_input_grad[:6])
        if not torch.compiler.is_compiling() and (
            torch.is_grad_enabled() or dispatch.has_tangent(dy)
        ):
            return *plain_backward(dy, x, weight, p, down, core, up, needs), None, None, None
        grads = torch.ops.efft_kernels.low_rank_linear_bwd(
            dy, x, weight, p, down, core, up, needs, *ctx.choice
        )
        dx, d_weight, d_bias, d_down, d_core, d_up = (
            grad if needed else None for grad, needed in zip(grads, needs, strict=True)
        )
        if d_bias is not None:
            d_bias = d_bias.to(ctx.bias_dtype)
        return dx, d_weight, d_bias, d_down, d_core, d_up, None, None, None


def plain_backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor,
    p: Tensor | None,
    down: Tensor,
    core: Tensor | None,
    up: Tensor,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """The gradients in torch's own operators: for create_graph=True, where P is recomputed so that
    it depends on x and down, for a dY with a forward-mode tangent, and for one that no kernel takes
    (csrc/entry, under a vmap or mode).
    """
    if p is not None and torch.is_grad_enabled():
        if x is None:
            raise RuntimeError(
                "low_rank_linear: a second derivative needs x, which is saved only when down or"
                " weight requires grad; set down.requires_grad_() or call reference.low_rank_linear"
            )
        p = torch.mm(x, down.to(x.dtype))
    return backward_in_torch(dy, x, weight, p, down, core, up, needs=tuple(needs), strategy="split")


def _in_torch(
    x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, core: Tensor | None, up: Tensor
) -> tuple[Tensor, Tensor]:
    """(y, P) in torch's own operators alone, for files that others read: TorchScript and ONNX."""
    dtype = x.dtype
    p = torch.matmul(x, down.to(dtype))
    y = F.linear(x, weight.to(dtype), None if bias is None else bias.to(dtype))
    return y + F.linear(p, fold(core, up, dtype).to(dtype)), p


# For torch.onnx.export, which knows torch's operators alone; torch.compile keeps ours.
@register_decomposition(torch.ops.efft_kernels.low_rank_linear_fwd.default)
def _decomposed(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor,
    core: Tensor | None,
    up: Tensor,
    save_p: bool,
    backend: str,
    strategy: str,
) -> tuple[Tensor, Tensor]:
    y, p = _in_torch(x, weight, bias, down, core, up)
    return y, p if save_p else p.new_empty(0)


def _reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, core: Tensor | None, up: Tensor
) -> Tensor:
    dtype = x.dtype
    return reference.low_rank_linear(
        x,
        weight.to(dtype),
        None if bias is None else bias.to(dtype),
        down.to(dtype),
        None if core is None else core.to(dtype),
        up.to(dtype),
    )
