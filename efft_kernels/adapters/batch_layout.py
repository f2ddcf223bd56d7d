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
_TOUCHED = 1e-2  # of the largest change: more than rounding, less than another image
_ROUNDING = 1e-5  # of the largest number


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
        if value.dtype == torch.bool or not value.numel():
            return value
        last = value[-1:]
        # Whole numbers stay among those that are there: they may be indices.
        other = 1 - 2 * last if value.is_floating_point() else value.max() - last + value.min()
        return torch.cat([value[:-1], other])

    with torch.no_grad():
        before = _prints(forward, args, kwargs, linears)
        after = _prints(forward, tree_map(exchange, args), tree_map(exchange, kwargs), linears)
    for (name, a), (_, b) in zip(before, after, strict=False):
        if len(before) != len(after) or not _only_last_changes(a, b, rows):
            raise ValueError(
                "tasks() needs a model that keeps the batch in the leading dimension, got"
                f" {type(linears[name]).__name__} {name!r} whose input has the rows of an image"
                " elsewhere (tokens first, say: batch_first=False in torch's own layers), or none"
                " of any image"
            )


def _only_last_changes(a: Tensor, b: Tensor, rows: int) -> bool:
    """Whether a linear's input is one image after the other, from its prints with both images."""
    if a.shape != b.shape:
        return False
    change = (a - b).abs()
    if not change.any():  # made of no image: the same query for each, or a table of biases
        return bool(((a - a[:1]).abs() <= _ROUNDING * a.abs().max()).all()) if a.numel() else True
    others = change[: a.shape[0] - a.shape[0] // rows]
    return bool((others <= _TOUCHED * change.max()).all())


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
                x = linear_input(args, *kwargs).detach().float()
                flat = x.flatten(1) if x.dim() > 1 else x[None]
                places = torch.arange(flat.shape[1], device=x.device, dtype=x.dtype)
                prints.append((name, (flat @ places.cos()).nan_to_num()))

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
