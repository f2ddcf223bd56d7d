"""The operator with many factors: every item of a batch with those of its own task.

y[i] = x[i]·W^T + bias + x[i]·down[t]·b[t]^T for item i of task t = task_of_item[i]: the frozen
product runs once over the whole batch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from .backends import cpp_backend
from .checks import to_autocast_dtype
from .dispatch import has_tangent, requested_backend


def tasks_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor,
    b: Tensor,
    task_of_item: Tensor,
    *,
    backend: str = "auto",
) -> Tensor:
    """y[i] = x[i]·weight^T + bias + x[i]·down[t]·b[t]^T, t = task_of_item[i].

    Args:
        x: [items·w, ..., K], where the w windows of an item, usually one, follow one another.
        weight: [N, K].
        bias: [N] or None.
        down: [tasks, K, Ra].
        b: [tasks, N, Ra], the fold of core and up.
        task_of_item: [items], int64 in [0, tasks).
        backend: as in `low_rank_linear`; 'cpp' is one operator, all others two batched products
            on top of the library's.

    Returns:
        [items·w, ..., N] in x's dtype (the ambient one under autocast). Differentiable, forward and
        by `torch.func`, too, then by way of plain torch.

    Raises:
        TypeError: x is not floating.
        ValueError: x's leading dim is no multiple of the number of items.
    """
    items = task_of_item.shape[0]
    if x.shape[0] != items and (items == 0 or x.shape[0] % items):
        raise ValueError(
            f"task_ids must name one task per row of the batch, got {items} for a leading dimension"
            f" of {x.shape[0]}; the batch must be the leading dimension of a linear's input"
        )
    shape = x.shape
    if x.dim() != 3 or x.shape[0] != items:
        x = x.reshape(items, -1, shape[-1])  # [items, rows, K]
    x = to_autocast_dtype(x)
    given = [t for t in (x, weight, bias, down, b) if t is not None]
    differentiable = (
        torch._C._are_functorch_transforms_active()
        or (torch.is_grad_enabled() and any(t.requires_grad for t in given))
        or (forward_ad._current_level >= 0 and any(has_tangent(t) for t in given))
    )
    if (
        not torch.compiler.is_compiling()  # there a compiler fuses the thin products by itself
        and requested_backend(backend) in ("auto", "cpp")
        and not differentiable
        and cpp_backend.rejects(x) is None
        and weight.numel()
        and cpp_backend.unavailable() is None
    ):
        y: Tensor = torch.ops.efft_kernels.native_tasks_fwd(x, weight, bias, down, b, task_of_item)
        return y.reshape(*shape[:-1], y.shape[-1])
    y = F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    p = torch.bmm(x, down[task_of_item].to(x.dtype))  # [items, rows, Ra]
    thin = b[task_of_item].mT.to(x.dtype)
    # In place: y is ours, and another one of its size would cost more than the thin products. A
    # transform may want more of the sum than of y.
    apart = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    y = torch.baddbmm(y, p, thin) if apart else y.baddbmm_(p, thin)
    return y.reshape(*shape[:-1], y.shape[-1])
