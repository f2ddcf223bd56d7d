"""Calls of torch.autograd.Function that threads may make with the same parameters at once."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor


def apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """function.apply(*args).

    In torch 2.11 threads whose forwards share a leaf can wait for each other for ever. `apply`
    takes the leaf's lock while it holds the GIL; a thread that is making the leaf's AccumulateGrad
    node, which a graph's end removes, waits for the GIL while it holds the lock. So where there are
    threads a view of each leaf is made first, without the GIL: the node is there then, and stays.
    """
    if torch.compiler.is_compiling() or threading.active_count() == 1:
        return function.apply(*args)
    views = [t.view_as(t) for t in args if _is_shared_leaf(t)]
    result = function.apply(*args)
    del views
    return result


def _is_shared_leaf(t: object) -> bool:
    return (
        isinstance(t, Tensor)
        and type(t) in (Tensor, torch.nn.Parameter)
        and t.requires_grad
        and t.is_leaf
        and torch.is_grad_enabled()
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._are_functorch_transforms_active()
    )
