"""Rows of a parameter by their indices, in a graph of torch.compile.

On a CPU it is an operator of its own, which Inductor leaves alone: in torch 2.11 what it compiles
for a CPU is wrong where the rows, or the gradients that are added to them, are transposed as well.
It adds a transposed gradient elsewhere, without an error, and reads transposed rows by an index
that it does not declare. Under transforms of torch.func, which would each need a rule of its own
for the operator, the rows are sums over all that there are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

_LIBRARY = torch.library.Library("efft_kernels", "FRAGMENT")
_LIBRARY.define("pick_rows(Tensor rows, Tensor indices) -> Tensor")
_LIBRARY.define("add_to_rows(Tensor grad, Tensor indices, SymInt count) -> Tensor")


def picked_rows(rows: Tensor, indices: Tensor) -> Tensor:
    """rows[indices], differentiable in `rows`.

    Args:
        rows: [T, ...].
        indices: [n], int64, on the same device.

    Returns:
        [n, ...].
    """
    if rows.device.type != "cpu" or not torch.compiler.is_dynamo_compiling():
        return rows.index_select(0, indices)
    if _is_transformed():
        chosen = indices.unsqueeze(1) == torch.arange(rows.shape[0])
        return torch.where(chosen.view(*chosen.shape, *(1,) * (rows.dim() - 1)), rows, 0.0).sum(1)
    picked: Tensor = torch.ops.efft_kernels.pick_rows(rows, indices)
    return picked


def _is_transformed() -> bool:
    """Called while a graph is traced."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


# As torch.compiler.assume_constant_result does, without importing Dynamo.
_is_transformed._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _pick_rows(rows: Tensor, indices: Tensor) -> Tensor:
    return rows.index_select(0, indices)


def _add_to_rows(grad: Tensor, indices: Tensor, count: int) -> Tensor:
    """Zeros [count, ...] to which the gradients of the picked rows [n, ...] are added."""
    return grad.new_zeros((count, *grad.shape[1:])).index_add_(0, indices, grad)


def _keep_for_rows(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rows, indices = inputs
    ctx.count = rows.shape[0]
    ctx.save_for_backward(indices)


def _rows_grad(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    (indices,) = ctx.saved_tensors
    return torch.ops.efft_kernels.add_to_rows(grad, indices, ctx.count), None


def _keep_indices(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _sum_grad(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    (indices,) = ctx.saved_tensors
    return torch.ops.efft_kernels.pick_rows(grad, indices), None, None


for _name, _run, _keep, _grad in (
    ("pick_rows", _pick_rows, _keep_for_rows, _rows_grad),
    ("add_to_rows", _add_to_rows, _keep_indices, _sum_grad),
):
    _LIBRARY.impl(_name, _run, "CompositeExplicitAutograd")  # which runs on fake tensors, too
    torch.library.register_autograd(
        f"efft_kernels::{_name}", _grad, setup_context=_keep, lib=_LIBRARY
    )
