"""A chain (chains.py) as two operators, for torch.compile: the whole of it is one node each way.

What a graph sees of the forward is the stream after all blocks and a list of what the backward
reads; the factors are composed in the graph. The halves run as in eager mode, with a record in the
place of autograd's context.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from . import chains
from .backends.chain_steps import Norm, TorchSteps
from .chains import Adapted, AttentionHalf, Half, Layer, Linear, MlpHalf
from .dispatch import launch_context
from .schemas import LIBRARY

_NORMS, _LINEARS = 2, 4  # of a layer
_OWN = 6  # of what a half saves: weights, B and the norm's, which the operators have elsewhere

LIBRARY.define(
    "chain_fwd(Tensor x, Tensor?[] frozen, Tensor[] factors, int heads, float[] eps,"
    " ScalarType dtype, int attention) -> (Tensor y, Tensor[] kept)"
)
LIBRARY.define(
    "chain_bwd(Tensor dy, Tensor x, Tensor?[] frozen, Tensor[] factors, Tensor[] kept, int heads,"
    " float[] eps, ScalarType dtype, int attention, bool need_x) -> (Tensor dx, Tensor[] grads)"
)


def run_chain(x: Tensor, layers: Sequence[Layer], attention: int, dtype: torch.dtype) -> Tensor:
    """As `chains.run_chain`, in a graph.

    Args:
        x: [images, tokens, K].
        layers: as there.
        attention: SDPBackend's number of the kernel.
        dtype: of the GEMMs.
    """
    frozen: list[Tensor | None] = []
    factors: list[Tensor] = []
    eps: list[float] = []
    for layer in layers:
        layer = layer._replace(proj=layer.proj.scaled(), fc2=layer.fc2.scaled())
        for norm in (layer.norm1, layer.norm2):
            frozen += [norm.weight, norm.bias]
            eps.append(norm.eps)
        for linear in (layer.qkv, layer.proj, layer.fc1, layer.fc2):
            frozen += [linear.weight, linear.bias, linear.gamma]
            factors += [linear.down, linear.b]
    y, _ = torch.ops.efft_kernels.chain_fwd(
        x, frozen, factors, layers[0].heads, eps, dtype, attention
    )
    return y  # type: ignore[no-any-return]


# From the operators' lists to the halves


class _Record:
    """What a half keeps, in the place of autograd's context."""

    needs_input_grad: tuple[bool, bool]  # in the backward
    saved_tensors: tuple[Tensor | None, ...]
    engine: Any
    eps: float
    images: int
    heads: int
    others: list[Any]

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        self.saved_tensors = tensors


def _layers(
    frozen: Sequence[Tensor | None], factors: Sequence[Tensor], heads: int, eps: Sequence[float]
) -> list[Layer]:
    """What `run_chain` took apart."""
    own: Iterator[Any] = iter(frozen)
    thin, every_eps = iter(factors), iter(eps)

    def norm() -> Norm:
        return Norm(next(own), next(own), next(every_eps))

    def adapted() -> Adapted:
        weight, bias, gamma = next(own), next(own), next(own)
        return Adapted(weight, bias, next(thin), next(thin), gamma)

    found = []
    for _ in range(len(eps) // _NORMS):
        norms = norm(), norm()
        qkv, proj, fc1, fc2 = adapted(), adapted(), adapted(), adapted()
        found.append(Layer(norms[0], qkv, proj, norms[1], fc1, fc2, heads))
    return found


def _halves(
    layers: Sequence[Layer], stacks: Sequence[Sequence[Linear]], engine: Any, images: int
) -> Iterator[tuple[Any, Half]]:
    for layer, qkv, proj, fc1, fc2 in zip(layers, *stacks, strict=True):
        yield AttentionHalf, Half(engine, layer.norm1, qkv, proj, images, layer.heads)
        yield MlpHalf, Half(engine, layer.norm2, fc1, fc2, images, layer.heads)


def _engine(x: Tensor, rank: int, dtype: torch.dtype, attention: int, fake: bool) -> chains.Engine:
    """What computes; for fake tensors plain torch, whose results have the same sizes."""
    steps = TorchSteps() if fake else chains.steps_for(x, rank)
    return chains.Engine(steps, chains.ATTENTION[SDPBackend(attention)], dtype)


def _forward(
    x: Tensor,
    frozen: list[Tensor | None],
    factors: list[Tensor],
    heads: int,
    eps: list[float],
    dtype: torch.dtype,
    attention: int,
    fake: bool = False,
) -> tuple[Tensor, list[Tensor]]:
    with launch_context(x.device), torch.no_grad():
        engine = _engine(x, _rank(factors), dtype, attention, fake)
        layers = _layers(frozen, factors, heads, eps)
        merged, stacks = chains.merged_linears(layers, engine)
        kept = [*merged, *(torch.stack([own.b for own in stack]) for stack in stacks)]
        z, y = x.flatten(0, 1).contiguous(), None  # type: Tensor, Any
        for of, half in _halves(layers, stacks, engine, x.shape[0]):
            record = _Record()
            first = y is None
            z, y = of.forward(record, z, y, half)
            more = [t for t in record.saved_tensors[_OWN:] if t is not None]
            kept += more[1:] if first else more  # the first stream is x itself
        return (z + y).view(x.shape), kept


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
    need_x: bool,
) -> tuple[Tensor, list[Tensor]]:
    with launch_context(x.device), torch.no_grad():
        engine = _engine(x, _rank(factors), dtype, attention, False)
        layers = _layers(frozen, factors, heads, eps)
        weights, bs, parts = kept[:_LINEARS], kept[_LINEARS : 2 * _LINEARS], kept[2 * _LINEARS :]
        stacks = [
            [Linear(w, None, w, b) for w, b in zip(*map(torch.unbind, pair), strict=True)]
            for pair in zip(weights, bs, strict=True)
        ]  # down is not read again
        halves = list(_halves(layers, stacks, engine, x.shape[0]))
        dz = dy.flatten(0, 1).contiguous()
        dbranch: Any = dz.to(dtype)
        grads: list[Tensor] = []
        end, tokens = len(parts), x.shape[1]
        expected = len(layers) * (13 + engine.attention.kept) - 1
        if end != expected:  # torch may keep compiled graphs on disk
            raise RuntimeError(
                f"chain_bwd: kept must have {expected} tensors beside the weights, got {end}: the"
                " graph was compiled by another version; clear torch's compile caches"
            )
        for place in reversed(range(len(halves))):
            of, half = halves[place]
            count = 6 if of is MlpHalf else 7 + engine.attention.kept
            start = end - count + (place == 0)
            own = list(parts[start:end])
            end = start
            if place == 0:
                own.insert(0, x.flatten(0, 1).contiguous())
            if of is AttentionHalf:
                own[7:] = engine.attention.restore(own[7:], tokens)
            record = _Record()
            wanted = need_x or place > 0
            record.needs_input_grad = wanted, wanted
            record.engine, record.eps = engine, half.norm.eps
            record.images, record.heads = half.images, half.heads
            first = half.first.weight, half.second.weight, half.first.b, half.second.b
            tensors = [t if isinstance(t, Tensor) else None for t in own]
            record.saved_tensors = (*first, half.norm.weight, half.norm.bias, *tensors)
            record.others = [None if isinstance(t, Tensor) else t for t in own[4:]]
            dz, dbranch, *thin, _ = of.backward.__wrapped__(record, dz, dbranch.contiguous())
            grads = [*thin, *grads]
        dx = dz.view(x.shape) if need_x else dy.new_empty(0)
        return dx, [g.to(f.dtype) for g, f in zip(grads, factors, strict=True)]


def _rank(factors: Sequence[Tensor]) -> int:
    return max(factor.shape[1] for factor in factors)  # down [K, r] and B [N, r]


# The operators


def _forward_fake(
    x: Tensor,
    frozen: list[Tensor | None],
    factors: list[Tensor],
    heads: int,
    eps: list[float],
    dtype: torch.dtype,
    attention: int,
) -> tuple[Tensor, list[Tensor]]:
    return _forward(x, frozen, factors, heads, eps, dtype, attention, fake=True)


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
