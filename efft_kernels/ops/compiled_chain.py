"""A chain (chains.py) as two operators, for torch.compile: the whole of it is one node each way.

What a graph sees of the forward is the stream after all blocks and a list of what the backward
reads; the factors are composed in the graph.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from . import chain_passes, chains
from .backends.chain_steps import Norm, TorchSteps
from .chain_passes import KINDS, Engine, Frozen, FrozenLinears
from .dispatch import launch_context
from .schemas import LIBRARY

# Of what chain_fwd keeps. Torch may have another version's graph on disk: one with another number
# here is not taken.
FORM = 3

LIBRARY.define(
    "chain_fwd(Tensor x, Tensor?[] frozen, Tensor[] factors, int heads, float[] eps,"
    " ScalarType dtype, int attention, int form) -> (Tensor y, Tensor[] kept)"
)
LIBRARY.define(
    "chain_bwd(Tensor dy, Tensor x, Tensor?[] frozen, Tensor[] factors, Tensor[] kept, int heads,"
    " float[] eps, ScalarType dtype, int attention, int form, bool need_x)"
    " -> (Tensor dx, Tensor[] grads)"
)


def run_stacks(
    x: Tensor, frozen: Frozen, factors: Sequence[Tensor], attention: int, dtype: torch.dtype
) -> Tensor:
    """As `chains.run_stacks`, in a graph.

    Args:
        x: [images, tokens, K].
        frozen, factors: as there, each layer with one linear of a kind.
        attention: SDPBackend's number of the kernel.
        dtype: of the GEMMs.
    """
    tensors: list[Tensor | None] = []
    for norm in frozen.norms:
        tensors += norm.weight, norm.bias
    for kind in frozen.kinds:
        tensors += *kind.weights, *kind.biases, *kind.gammas
    eps = [norm.eps for norm in frozen.norms]
    y, _ = torch.ops.efft_kernels.chain_fwd(
        x, tensors, list(factors), frozen.heads, eps, dtype, attention, FORM
    )
    return y  # type: ignore[no-any-return]


def _frozen(tensors: Sequence[Tensor | None], heads: int, eps: Sequence[float]) -> Frozen:
    """What `run_stacks` took apart."""
    own: Iterator[Any] = iter(tensors)
    norms = [Norm(next(own), next(own), one) for one in eps]

    def every() -> list[Any]:
        return [next(own) for _ in range(len(eps) // 2)]

    kinds = [FrozenLinears(every(), every(), every()) for _ in range(KINDS)]
    return Frozen(norms, kinds, heads)


def _engine(
    x: Tensor, factors: Sequence[Tensor], dtype: torch.dtype, attention: int, fake: bool
) -> Engine:
    """What computes; for fake tensors plain torch, whose results have the same sizes."""
    rank = max(factor.shape[2] for factor in factors)
    steps = TorchSteps() if fake else chains.steps_for(x, rank)
    return Engine(steps, chains.ATTENTION[SDPBackend(attention)], dtype)


def _forward(
    x: Tensor,
    frozen: list[Tensor | None],
    factors: list[Tensor],
    heads: int,
    eps: list[float],
    dtype: torch.dtype,
    attention: int,
    form: int,
    fake: bool = False,
) -> tuple[Tensor, list[Tensor]]:
    with launch_context(x.device), torch.no_grad():
        engine = _engine(x, factors, dtype, attention, fake)
        y, kept = chain_passes.forward(x, _frozen(frozen, heads, eps), factors, engine)
        # An operator may not return what it was given: factors that had the GEMMs' dtype already.
        return y, [t.clone() if any(t is factor for factor in factors) else t for t in kept]


def _backward(
    dy: Tensor,
    x: Tensor,
    frozen: list[Tensor | None],
    factors: list[Tensor],
    kept: list[Tensor],
    heads: int,
    eps: list[float],
    dtype: torch.dtype,
    attention: int,
    form: int,
    need_x: bool,
) -> tuple[Tensor, list[Tensor]]:
    with launch_context(x.device), torch.no_grad():
        engine = _engine(x, factors, dtype, attention, False)
        expected = chain_passes.kept_tensors(len(eps) // 2, engine.attention)
        if len(kept) != expected:  # torch may keep compiled graphs on disk
            raise RuntimeError(
                f"chain_bwd: kept must have {expected} tensors, got {len(kept)}: the graph was"
                " compiled by another version; clear torch's compile caches"
            )
        own = _frozen(frozen, heads, eps)
        dx, grads = chain_passes.backward(dy, x, own, list(kept), engine, need_x)
        grads = [g.to(f.dtype) for g, f in zip(grads, factors, strict=True)]
        return dy.new_empty(0) if dx is None else dx, grads


# The operators


def _forward_fake(
    x: Tensor,
    frozen: list[Tensor | None],
    factors: list[Tensor],
    heads: int,
    eps: list[float],
    dtype: torch.dtype,
    attention: int,
    form: int,
) -> tuple[Tensor, list[Tensor]]:
    return _forward(x, frozen, factors, heads, eps, dtype, attention, form, fake=True)


def _backward_fake(
    dy: Tensor,
    x: Tensor,
    frozen: list[Tensor | None],
    factors: list[Tensor],
    kept: list[Tensor],
    heads: int,
    eps: list[float],
    dtype: torch.dtype,
    attention: int,
    form: int,
    need_x: bool,
) -> tuple[Tensor, list[Tensor]]:
    dx = x.new_empty(x.shape) if need_x else dy.new_empty(0)
    return dx, [f.new_empty(f.shape) for f in factors]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, list[Tensor]]) -> None:
    x, frozen, factors, *rest = inputs
    kept = output[1]
    ctx.lengths = len(frozen), len(factors)
    ctx.rest = rest
    ctx.need_x = ctx.needs_input_grad[0]
    ctx.save_for_backward(x, *frozen, *factors, *kept)


def _gradients(ctx: Any, dy: Tensor, _: Any) -> tuple[Any, ...]:
    x, *saved = ctx.saved_tensors
    frozen, thin = ctx.lengths
    lists = saved[:frozen], saved[frozen : frozen + thin], saved[frozen + thin :]
    dx, grads = torch.ops.efft_kernels.chain_bwd(dy, x, *lists, *ctx.rest, ctx.need_x)
    # None alone for `frozen`: torch.library takes a list that holds a None, as γ of qkv, for one
    # argument.
    return dx if ctx.need_x else None, None, grads, *[None] * len(ctx.rest)


def _no_second_derivative(ctx: Any, *_: Any) -> Any:
    raise RuntimeError(
        "chained blocks have no second derivative: attach the adapter with fuse='pairs'"
    )


LIBRARY.impl("chain_fwd", _forward, "CompositeExplicitAutograd")
LIBRARY.impl("chain_bwd", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("efft_kernels::chain_fwd", _forward_fake, lib=LIBRARY)
torch.library.register_fake("efft_kernels::chain_bwd", _backward_fake, lib=LIBRARY)
torch.library.register_autograd(
    "efft_kernels::chain_fwd", _gradients, setup_context=_setup_context, lib=LIBRARY
)
torch.library.register_autograd(
    "efft_kernels::chain_bwd",
    _no_second_derivative,
    setup_context=lambda ctx, inputs, output: None,
    lib=LIBRARY,
)
