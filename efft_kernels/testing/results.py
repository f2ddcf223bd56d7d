"""y, P and the gradients of one call: by the reference, and by a backend's launchers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from types import ModuleType

import torch
from torch import Tensor

from ..ops import reference
from .error_budget import assert_within_budget
from .operands import ALL, NAMES, leaves


def differentiate(
    function: Callable[..., Tensor],
    tensors: Mapping[str, Tensor | None],
    dy: Tensor | None = None,
    wanted: Collection[str] = NAMES,
) -> tuple[Tensor, dict[str, Tensor | None]]:
    """(y, gradients by name) of `function` at copies of `tensors` with their layout kept.

    Args:
        function: called with the tensors by name.
        tensors: the operands; an absent one is None and has no gradient.
        dy: the gradient of y, cast to y's dtype; ones of stride 0 where it is None.
        wanted: the operands that require a gradient; the others' are None.
    """
    copies = leaves(tensors, wanted)
    y = function(**copies)
    if dy is None:
        y.sum().backward()
    else:
        y.backward(dy.to(y.dtype))
    return y.detach(), {name: t.grad for name, t in copies.items() if t is not None}


def reference_results(operands: Sequence[Tensor | None], dtype: torch.dtype) -> dict[str, Tensor]:
    """y, p and every gradient by the specification and torch's autograd, computed in `dtype`.

    Args:
        operands: (x, weight, bias, down, core, up, dy), of any dtypes.
    """
    *tensors, dy = (None if t is None else t.to(dtype) for t in operands)
    x, _, _, down, _, _ = tensors
    assert x is not None and down is not None
    named = dict(zip(NAMES, tensors, strict=True))
    y, grads = differentiate(reference.low_rank_linear, named, dy)
    return {"y": y, "p": x @ down} | {name: t for name, t in grads.items() if t is not None}


def plain_and_exact(
    operands: Sequence[Tensor | None], dtype: torch.dtype | None = None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What plain torch makes of the operands in `dtype` (x's own by default), and in float64."""
    x = operands[0]
    assert x is not None
    plain = reference_results(operands, dtype or x.dtype)
    return plain, reference_results(operands, torch.float64)


def backend_results(
    backend: ModuleType,
    operands: Sequence[Tensor | None],
    strategy: str,
    needs: Sequence[bool] = ALL,
) -> dict[str, Tensor]:
    """y, p and the needed gradients by a backend's `forward` and `backward`.

    Args:
        backend: a module of efft_kernels.ops.backends.
        operands: (x, weight, bias, down, core, up, dy).
        strategy: one of the backend's STRATEGIES.
        needs: which of the six gradients to ask for.

    Raises:
        AssertionError: a gradient that nobody needs was made, a needed one was not, or a result has
            another shape or dtype than it must have.
    """
    *tensors, dy = operands
    x, weight, _, down, core, up = tensors
    assert x is not None and dy is not None
    y, p = backend.forward(*tensors, save_p=True, strategy=strategy)
    assert (y.shape, y.dtype) == (dy.shape, x.dtype), "y"
    assert p.is_contiguous() and p.dtype == x.dtype, "p"
    grads = backend.backward(
        dy, x, weight, p, down, core, up, needs=tuple(needs), strategy=strategy
    )
    results = {"y": y, "p": p}
    for name, tensor, grad, need in zip(NAMES, tensors, grads, needs, strict=True):
        if name == "bias" and tensor is None:
            continue  # the backward does not see whether there is one
        assert (grad is not None) == (need and tensor is not None), name
        if grad is not None and tensor is not None:
            assert (grad.shape, grad.dtype) == (tensor.shape, tensor.dtype), name
            results[name] = grad
    return results


def results_within_budget(
    backend: ModuleType,
    operands: Sequence[Tensor | None],
    strategy: str,
    needs: Sequence[bool] = ALL,
) -> dict[str, Tensor]:
    """`backend_results`, each of them within the error budget of x's dtype."""
    results = backend_results(backend, operands, strategy, needs)
    assert_within_budget(results, *plain_and_exact(operands))
    return results
