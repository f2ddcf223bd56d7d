"""`low_rank_linear`: the checks, autocast, and the one autograd.Function over the operator pair.

Derivation of the backward, with dY = dL/dy, P = x·down and B = stack_g up[g]·core[g]^T, from
y = x·W^T + bias + P·B^T:

    dX = dY·W + S·down^T, S = dY·B     d_down = x^T·S         d_W = dY^T·x       d_bias = sum(dY)
    d_B = dY^T·P                       d_core[g] = d_B[g]^T·up[g]   d_up[g] = d_B[g]·core[g]
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import dispatch, eager_entry, reference
from .backends import torch_backend

_HALF = (torch.float16, torch.bfloat16)
FLOAT_DTYPES = (torch.float64, torch.float32, *_HALF)


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
    backend = dispatch.requested_backend(backend)
    dispatch.check_strategy(strategy)
    transformed = torch._C._are_functorch_transforms_active()
    if not (transformed or torch.compiler.is_compiling()):
        direct_y = eager_entry.low_rank_linear(x, weight, bias, down, core, up, backend, strategy)
        if direct_y is not None:
            return direct_y
    x = _autocast(x, weight)
    _check(x, weight, bias, down, core, up)
    if transformed and backend not in ("auto", "reference", "torch"):
        raise RuntimeError(
            f"backend {backend!r} does not support torch.func transforms; use backend='torch'"
        )
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
        y = _LowRankLinear.apply(flat, weight, bias, down, core, up, backend, strategy)
    else:
        y, _ = torch.ops.efft_kernels.low_rank_linear_fwd(
            flat, weight, bias, down, core, up, False, backend, strategy
        )
    return y if x.dim() == 2 else y.reshape(*lead, y.shape[-1])


def low_rank_linear_with_dropout(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor,
    core: Tensor | None,
    up: Tensor,
    p: float,
    *,
    backend: str = "auto",
) -> Tensor:
    """`low_rank_linear` with dropout on the rank-r activation, x·down·core[g], as FacT trains.

    A mask of M·G·Rb entries stands between the two thin products, so this is composed from torch's
    own operators; the masks come from torch's generator and are replayed under checkpointing.

    Args:
        x: [..., K]; the other tensors, their dtypes and what is raised are as in `low_rank_linear`.
        p: probability of dropping an entry; the others are scaled by 1 / (1 - p).
        backend: 'auto', 'torch' or 'reference', which all mean plain torch here.

    Returns:
        [..., N]. Source: FacT (arXiv:2212.03145), its released training code.

    Raises:
        RuntimeError: a compiled backend was asked for by name.
    """
    backend = dispatch.requested_backend(backend)
    if backend not in ("auto", "torch", "reference"):
        raise RuntimeError(
            f"backend {backend!r} was asked for but has no kernel with dropout on the rank-r"
            " activation; train with dropout=0.0 or with backend='auto'"
        )
    x = _autocast(x, weight)
    _check(x, weight, bias, down, core, up)
    dtype = x.dtype
    y = F.linear(x, weight.to(dtype), None if bias is None else bias.to(dtype))
    slices = up.shape[0] if core is None else core.shape[0]
    activation = torch.matmul(x, down.to(dtype))  # [..., Ra]
    if core is not None:
        wide = core.to(dtype).transpose(0, 1).flatten(1)  # [Ra, G·Rb]
        activation = torch.matmul(activation, wide).unflatten(-1, (slices, -1))
    else:
        activation = activation.unsqueeze(-2)  # [..., 1, Ra]: the slices share its mask
    activation = F.dropout(activation, p).expand(*x.shape[:-1], slices, -1)
    low_rank = torch.einsum("...gb,gnb->...gn", activation, up.to(dtype).expand(slices, -1, -1))
    return y + low_rank.flatten(-2)


class _LowRankLinear(torch.autograd.Function):
    """Saves x and P = x·down, and only where a gradient will need them; the rest are the caller's
    tensors."""

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
    ) -> Tensor:
        _, need_weight, _, need_down, need_core, need_up = ctx.needs_input_grad[:6]
        save_p = need_core or need_up
        y, p = torch.ops.efft_kernels.low_rank_linear_fwd(
            x, weight, bias, down, core, up, save_p, backend, strategy
        )
        save_x = need_down or need_weight
        ctx.save_for_backward(x if save_x else None, weight, p if save_p else None, down, core, up)
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.choice = (backend, strategy)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        x, weight, p, down, core, up = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:6])
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return *_differentiable_backward(dy, x, weight, p, down, core, up, needs), None, None
        grads = torch.ops.efft_kernels.low_rank_linear_bwd(
            dy, x, weight, p, down, core, up, needs, *ctx.choice
        )
        dx, d_weight, d_bias, d_down, d_core, d_up = (
            grad if needed else None for grad, needed in zip(grads, needs, strict=True)
        )
        if d_bias is not None:
            d_bias = d_bias.to(ctx.bias_dtype)
        return dx, d_weight, d_bias, d_down, d_core, d_up, None, None


def _differentiable_backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor,
    p: Tensor | None,
    down: Tensor,
    core: Tensor | None,
    up: Tensor,
    needs: list[bool],
) -> tuple[Tensor | None, ...]:
    """The same gradients as a graph, for create_graph=True: P is recomputed so that it depends on x
    and down."""
    if p is not None:
        if x is None:
            raise RuntimeError(
                "low_rank_linear: a second derivative needs x, which is saved only when down or"
                " weight requires grad; set down.requires_grad_() or call reference.low_rank_linear"
            )
        p = torch.mm(x, down.to(x.dtype))
    return torch_backend.backward(
        dy, x, weight, p, down, core, up, needs=tuple(needs), strategy="split"
    )


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


def _autocast(x: Tensor, weight: Tensor) -> Tensor:
    """x in the ambient autocast dtype; as it is without autocast, and for float64 (as torch's own
    ops do)."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a Tensor, got {type(x).__name__}")
    device_type = x.device.type
    if dispatch.autocast_enabled(device_type) and x.dtype in (torch.float32, *_HALF):
        return x.to(torch.get_autocast_dtype(device_type))
    return x


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor,
    core: Tensor | None,
    up: Tensor,
) -> None:
    """Raise for a tensor whose kind, dtype, device or shape does not fit; name it, what was
    expected and what came."""
    autocast = dispatch.autocast_enabled(x.device.type)
    for name, tensor in (
        ("x", x), ("weight", weight), ("bias", bias), ("down", down), ("core", core), ("up", up)
    ):  # fmt: skip
        if tensor is None and name in ("bias", "core"):
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a Tensor, got {type(tensor).__name__}")
        if tensor.dtype not in FLOAT_DTYPES:
            raise TypeError(
                f"{name} must be float64, float32, float16 or bfloat16, got {tensor.dtype}"
            )
        if tensor.device != x.device:
            raise ValueError(f"{name} must be on x's device {x.device}, got {tensor.device}")
        if tensor.dtype != x.dtype and not (autocast and x.dtype in _HALF):
            if name in ("weight", "bias"):
                raise TypeError(
                    f"{name} must have x's dtype {x.dtype} outside autocast, got {tensor.dtype}"
                )
            if tensor.dtype != torch.float32 or x.dtype not in _HALF:
                raise TypeError(
                    f"{name} must have x's dtype {x.dtype} (or float32 beside a half-precision x),"
                    f" got {tensor.dtype}"
                )
    if up.dtype != down.dtype or (core is not None and core.dtype != down.dtype):
        core_dtype = "" if core is None else f", core {core.dtype}"
        raise TypeError(
            f"down, core and up must share one dtype, got down {down.dtype}{core_dtype},"
            f" up {up.dtype}"
        )
    _check_shapes(x, weight, bias, down, core, up)


def _check_shapes(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor,
    core: Tensor | None,
    up: Tensor,
) -> None:
    if weight.dim() != 2:
        raise ValueError(f"weight must be [N, K], got {tuple(weight.shape)}")
    n, k = weight.shape
    if x.dim() == 0 or x.shape[-1] != k:
        raise ValueError(f"x must be [..., K={k}], got {tuple(x.shape)}")
    if bias is not None and bias.shape != (n,):
        raise ValueError(f"bias must be [N={n}], got {tuple(bias.shape)}")
    if down.dim() != 2 or down.shape[0] != k or down.shape[1] < 1:
        raise ValueError(f"down must be [K={k}, Ra >= 1], got {tuple(down.shape)}")
    ra = down.shape[1]
    if core is None:
        if up.dim() != 3 or up.shape[0] < 1 or n % up.shape[0]:
            raise ValueError(
                f"up must be [G, N/G, Ra={ra}] with G dividing N={n} when core is None,"
                f" got {tuple(up.shape)}"
            )
        slices, rb = up.shape[0], ra
        allowed: tuple[int, ...] = (slices,)
    else:
        if core.dim() != 3 or core.shape[0] < 1 or core.shape[1] != ra or core.shape[2] < 1:
            raise ValueError(f"core must be [G, Ra={ra}, Rb], got {tuple(core.shape)}")
        slices, rb = core.shape[0], core.shape[2]
        if n % slices:
            raise ValueError(
                f"core must be [G, Ra, Rb] with G dividing N={n}, got {tuple(core.shape)}"
            )
        allowed = (1, slices)
    leading = " or ".join(map(str, sorted(set(allowed))))
    if up.dim() != 3 or up.shape[0] not in allowed or up.shape[1:] != (n // slices, rb):
        raise ValueError(
            f"up must be [{leading}, N/G={n // slices}, Rb={rb}], got {tuple(up.shape)}"
        )
