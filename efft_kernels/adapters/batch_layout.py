"""Whether an adapted model keeps the images of a batch one after the other.

A batch of several tasks needs it: the operator gives a task consecutive rows of a linear's input.

Shapes cannot tell: [tokens, images, K] may have as many tokens as images, and windows of several
images may be stacked either way. So one image is exchanged, and where the inputs of the linears
change shows which rows are its own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

Call = Callable[..., Any]
_TOUCHED = 1e-2  # of the largest: far above rounding, far below another image


def check_batch_major(
    forward: Call,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    linears: Mapping[str, nn.Module],
) -> None:
    """Run `forward` as it is and with another last image, and look at the linears' inputs.

    Args:
        forward: of the model, without its hooks.
        args: its arguments; every tensor with as many rows as the first one is the batch's.
        kwargs: its keyword arguments.
        linears: name → module whose input has to be batch-major.

    Raises:
        ValueError: the last image reaches rows that are another image's.
    """
    rows = batch_rows(args, kwargs)
    if rows is None or rows < 2:
        return

    def exchange(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.dim() or value.shape[0] != rows:
            return value
        if not value.is_floating_point():
            return value
        return torch.cat([value[:-1], 1 - 2 * value[-1:]])

    with torch.no_grad():
        before = _prints(forward, args, kwargs, linears)
        after = _prints(forward, tree_map(exchange, args), tree_map(exchange, kwargs), linears)
    for (name, a), (_, b) in zip(before, after, strict=True):
        if a.shape != b.shape or a.shape[0] % rows:
            own = False
        else:
            touched = (a - b).abs() > _TOUCHED * a.abs().amax()
            own = not touched[: a.shape[0] - a.shape[0] // rows].any()
        if not own:
            raise ValueError(
                f"tasks() needs a model that keeps the batch in the leading dimension, got"
                f" {type(linears[name]).__name__} {name!r} whose input has the rows of an image"
                f" elsewhere (tokens first, say: batch_first=False in torch's own layers)"
            )


def batch_rows(args: Iterable[Any], kwargs: Mapping[str, Any]) -> int | None:
    """The leading dimension of the first tensor that a model is called with."""
    tensors = (t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.dim())
    batch = next(tensors, None)
    return None if batch is None else batch.shape[0]


def _prints(
    forward: Call, args: Any, kwargs: Mapping[str, Any], linears: Mapping[str, nn.Module]
) -> list[tuple[str, Tensor]]:
    """(name, one number for each leading row of its input) for each call of the linears."""
    prints: list[tuple[str, Tensor]] = []
    thread = threading.get_ident()

    def record(name: str) -> Call:
        def hook(module: nn.Module, args: Any, *kwargs: Any) -> None:
            if threading.get_ident() == thread:
                flat = linear_input(args, *kwargs).detach().flatten(1).double()
                places = torch.arange(flat.shape[1], device=flat.device, dtype=flat.dtype)
                prints.append((name, flat @ places.cos()))

        return hook

    handles = [
        linear.register_forward_pre_hook(record(name), with_kwargs=True)
        for name, linear in linears.items()
    ]
    try:
        forward(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return prints


def linear_input(args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None) -> Tensor:
    """What an nn.Linear was called with, by position or by its name."""
    x: Tensor = args[0] if args else (kwargs or {})["input"]
    return x
