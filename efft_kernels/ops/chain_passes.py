"""A chain's forward and its backward over all layers: what chains.py and compiled_chain.py put into
a graph.

With z the residual stream and y what the half before still has to add to it:

    attention half    z' = z + y    x̂ = norm(z')    q, k, v = x̂·W_qkv^T    o = attention(q, k, v)
                      y' = o·W_proj^T
    MLP half          z' = z + y    x̂ = norm(z')    h = x̂·W_1^T    y' = gelu(h)·W_2^T

Every W is merged, W = W0 + B·down^T, for all layers at once: the GEMMs are the library's own and
adapters cost nothing in them. Left are the thin products of the gradients, with P = x·down and
S = dY·B:

    d_B = dY^T·P    d_down = x^T·S

P of a linear after a norm is made by the norm, that of fc2 by GELU. In the backward, S and d_B of
qkv come with the copy of the gradients of q, k and v into one matrix, those of fc1 with GELU's
gradient, those of fc2 with the gradient of the norm after it, if the steps can; both gradients of
proj are a pass over its x and dY, which makes P and S for itself. x̂ is made again from z', gelu(h)
from h: of their size nothing is kept that a frozen block does not keep.

`backends/chain_steps.py` says what each step between the GEMMs computes. Partial sums of gradients
are added up in the launch of the next step that adds some of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .backends.chain_steps import Norm, Sums, TorchSteps

Unpack = Callable[[Any], Tensor]

KINDS = 4  # of linears: qkv, proj, fc1, fc2
_STACKS = 3 * KINDS  # kept: of each kind the weights, and down and B
_OF_ATTENTION, _OF_MLP = 6, 6  # kept of a layer's halves, beside what the attention needs


class Attention(NamedTuple):
    """An attention kernel: q, k, v → (o, what the backward needs), and its gradient."""

    forward: Callable[..., tuple[Tensor, tuple[Any, ...]]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    kept: int  # tensors in what the backward needs
    restore: Callable[[list[Tensor], int], Sequence[Any]]  # all of it from those and the tokens


class Engine(NamedTuple):
    """What a chain runs with."""

    steps: TorchSteps
    attention: Attention
    dtype: torch.dtype  # of the GEMMs


class FrozenLinears(NamedTuple):
    """One kind of linear in all L layers, without its factors.

    A layer's may be several with as many rows each, one under the other: they follow each other
    here, and have all of them a bias or none.
    """

    weights: Sequence[Tensor]  # L of [N, K], or multiples of that
    biases: Sequence[Tensor | None]  # as many, of their rows
    gammas: Sequence[Tensor | None]  # L of [N], LayerScale's, or none


class Frozen(NamedTuple):
    """All of a chain's blocks but the factors."""

    norms: Sequence[Norm]  # two of each layer
    kinds: Sequence[FrozenLinears]  # qkv, proj, fc1, fc2
    heads: int

    def norms_of(self, layer: int) -> Sequence[Norm]:
        """A layer's two."""
        return self.norms[2 * layer : 2 * layer + 2]


class _Layer(NamedTuple):
    """The linears of one layer: merged weights [N, K], factors in the GEMMs' dtype, biases."""

    w_qkv: Tensor
    w_proj: Tensor
    w_1: Tensor
    w_2: Tensor
    down_qkv: Tensor
    b_qkv: Tensor
    down_proj: Tensor
    b_proj: Tensor
    down_1: Tensor
    b_1: Tensor
    down_2: Tensor
    b_2: Tensor
    biases: tuple[Tensor | None, ...] = ()


def forward(
    x: Tensor, frozen: Frozen, factors: Sequence[Tensor], engine: Engine, keep: bool = True
) -> tuple[Tensor, list[Tensor]]:
    """The stream after all layers, and what `backward` needs beside its other arguments.

    Args:
        x: [images, tokens, K].
        frozen: the blocks; the norms in x's dtype.
        factors: for each kind of linear the stacks of down [L, K, r] and of B [L, N, r].
        engine: what computes.
        keep: whether there will be a backward.
    """
    weights, thin = merged(frozen, factors, engine)
    biases = zip(*_biases(frozen, engine.dtype), strict=True)
    layers = zip(*(stack.unbind() for stack in (*weights, *thin)), biases, strict=True)
    kept = [*weights, *thin]
    z, y = x.flatten(0, 1).contiguous(), None  # type: Tensor, Any
    for place, own in enumerate(layers):
        layer = _Layer(*own)
        norm1, norm2 = frozen.norms_of(place)
        z, y = _attention(z, y, layer, norm1, x.shape[0], frozen.heads, engine, kept)
        z, y = _mlp(z, y, layer, norm2, engine, kept)
        if not keep:
            kept.clear()
    del kept[_STACKS : _STACKS + 1]  # the first stream is x itself
    # Added up in x's shape: a view of a sum could not be changed in place.
    return z.view(x.shape) + y.view(x.shape), kept


def _attention(
    z: Tensor,
    y: Tensor | None,
    layer: _Layer,
    norm: Norm,
    images: int,
    heads: int,
    engine: Engine,
    kept: list[Tensor],
) -> tuple[Tensor, Tensor]:
    """(z', y') of the attention half; what it keeps is added to `kept`."""
    steps, attention, dtype = engine
    normed = steps.norm(z, y, norm, layer.down_qkv, dtype)
    qkv = F.linear(normed.out, layer.w_qkv, layer.biases[0])
    o, of_attention = attention.forward(*_split_heads(qkv, images, heads))
    kept += [normed.z, normed.mean, normed.rstd, normed.p, qkv, o]
    kept += [t for t in of_attention if isinstance(t, Tensor)]
    return normed.z, F.linear(_rows(o), layer.w_proj, layer.biases[1])


def _mlp(
    z: Tensor, y: Tensor, layer: _Layer, norm: Norm, engine: Engine, kept: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """(z', y') of the MLP half; what it keeps is added to `kept`."""
    steps = engine.steps
    normed = steps.norm(z, y, norm, layer.down_1, engine.dtype)
    h = F.linear(normed.out, layer.w_1, layer.biases[2])
    a, p_2 = steps.gelu(h, layer.down_2)
    kept += [normed.z, normed.mean, normed.rstd, normed.p, h, p_2]
    return normed.z, F.linear(a, layer.w_2, layer.biases[3])


def kept_tensors(layers: int, attention: Attention) -> int:
    """How many tensors `forward` keeps."""
    return _STACKS + layers * (_OF_ATTENTION + attention.kept + _OF_MLP) - 1


class _Outs(NamedTuple):
    """A layer's gradients of the factors, to be filled."""

    qkv: Tensor
    b_qkv: Tensor
    proj: Tensor
    b_proj: Tensor
    fc1: Tensor
    b_1: Tensor
    fc2: Tensor
    b_2: Tensor


class _Stream(NamedTuple):
    """Gradients of the stream, in its dtype and in the GEMMs'."""

    dz: Tensor
    dy: Tensor
    s: Tensor | None = None  # dy·B of the linear before, where there is a d_B of it already


def backward(
    dy: Tensor,
    x: Tensor,
    frozen: Frozen,
    kept: list[Any],
    engine: Engine,
    need_x: bool,
    unpack: Unpack | None = None,
) -> tuple[Tensor | None, list[Tensor]]:
    """The gradients of x, if it needs one, and of the factors, in float32 or wider.

    Args:
        dy: of the stream after all layers.
        x, frozen, engine: the forward's.
        kept: what `forward` kept. It is emptied on the way, so that memory is given back.
        need_x: whether x needs a gradient.
        unpack: what makes a tensor of each in `kept`; None where they are tensors.
    """
    stacks = [t if unpack is None else unpack(t) for t in kept[:_STACKS]]
    kept[:_STACKS] = []
    first = x.flatten(0, 1).contiguous()
    layers = list(zip(*(stack.unbind() for stack in stacks), strict=True))
    grads = _empty_grads(stacks)
    outs = list(zip(*(grad.unbind() for grad in grads), strict=True))
    dz = dy.flatten(0, 1).contiguous()
    stream = _Stream(dz, dz.to(engine.dtype))
    later: Sums = []
    p_2 = _taken_p_2(kept, unpack)
    for place in reversed(range(len(layers))):
        layer, out = _Layer(*layers[place]), _Outs(*outs[place])
        norm1, norm2 = frozen.norms_of(place)
        own = _taken(kept, _OF_MLP - 1, unpack)
        stream = _mlp_grad(stream, layer, norm2, engine, p_2, own, out, later)
        del p_2
        own = _taken(kept, _OF_ATTENTION + engine.attention.kept, unpack)
        before = None
        if place:
            p_2 = _taken_p_2(kept, unpack)
            before = _Before(_Layer(*layers[place - 1]).b_2, p_2, _Outs(*outs[place - 1]).b_2)
        else:
            own.insert(0, first)  # all others are left
        stream = _attention_grad(
            *(stream, layer, norm1, x.shape[0], frozen.heads, engine, own, out, later, before),
            wanted=need_x or place > 0,
        )
    engine.steps.finish(later)
    return stream.dz.view(x.shape) if need_x else None, grads


class _Before(NamedTuple):
    """fc2 of the layer before, of whose output a gradient dY is made."""

    b: Tensor
    p: Tensor
    d_b: Tensor  # to be filled


def _taken_p_2(kept: list[Any], unpack: Unpack | None) -> Tensor:
    """P of fc2 of the last layer that `kept` still has, taken away before the rest of it: the layer
    after it makes its d_B."""
    (p_2,) = _taken(kept, 1, unpack)
    return p_2


def _taken(kept: list[Any], count: int, unpack: Unpack | None) -> list[Tensor]:
    """The last `count` of them, or all if they are fewer, taken away."""
    own = kept[-count:]
    del kept[-count:]
    return own if unpack is None else [unpack(t) for t in own]


def _mlp_grad(
    stream: _Stream,
    layer: _Layer,
    norm: Norm,
    engine: Engine,
    p_2: Tensor,
    own: list[Tensor],
    out: _Outs,
    later: Sums,
) -> _Stream:
    """The gradients of (z, y) from those of (z', y'). `own` is what the half kept but P of fc2, and
    is emptied: nothing is to hold it while the other half runs."""
    steps = engine.steps
    z, mean, rstd, p_1, h = own
    own.clear()
    s_2 = stream.s
    if s_2 is None:
        s_2, sum_b = steps.thin_grad(stream.dy, layer.b_2, p_2)
        later.append((sum_b, out.b_2))
    da = stream.dy @ layer.w_2
    dh, s_1 = steps.gelu_grad(da, h, s_2, layer.b_1, p_1, out.b_1, out.fc2, later)
    got = steps.norm_grad(dh @ layer.w_1, z, mean, rstd, norm, stream.dz, s_1)
    later.append((got.sum_down, out.fc1))
    return _Stream(got.dz, got.dy)


def _attention_grad(
    stream: _Stream,
    layer: _Layer,
    norm: Norm,
    images: int,
    heads: int,
    engine: Engine,
    own: list[Tensor],
    out: _Outs,
    later: Sums,
    before: _Before | None,
    *,
    wanted: bool,
) -> _Stream:
    """The same of this half; if it is not `wanted`, of the factors alone."""
    steps, attention, _ = engine
    z, mean, rstd, p, qkv, o, *rest = own
    own.clear()
    sum_down, sum_b = steps.pair_grad(_rows(o), stream.dy, layer.down_proj, layer.b_proj)
    later += (sum_down, out.proj), (sum_b, out.b_proj)
    do = _heads(stream.dy @ layer.w_proj, images, heads)
    parts = attention.backward(
        *(do, *_split_heads(qkv, images, heads), o),
        *attention.restore(rest, o.shape[2]),
    )
    rows = [_rows(part) for part in parts]
    dx, s = steps.gather_grad(rows, layer.b_qkv, p, wanted, out.b_qkv, later)
    if dx is None:
        later.append((steps.norm_down_grad(z, mean, rstd, norm, s), out.qkv))
        return stream
    factors = None if before is None else (before.b, before.p)
    got = steps.norm_grad(dx @ layer.w_qkv, z, mean, rstd, norm, stream.dz, s, factors)
    later.append((got.sum_down, out.qkv))
    if before is not None:
        assert got.sum_b is not None
        later.append((got.sum_b, before.d_b))
    return _Stream(got.dz, got.dy, got.s)


@torch.no_grad()
def merged(
    frozen: Frozen, factors: Sequence[Tensor], engine: Engine
) -> tuple[list[Tensor], list[Tensor]]:
    """By kind of linear the merged weights [L, N, K], and the factors in the GEMMs' dtype."""
    thin = [factor.to(engine.dtype).contiguous() for factor in factors]
    weights = []
    for kind, down, b in zip(frozen.kinds, thin[::2], thin[1::2], strict=True):
        gammas = [gamma for gamma in kind.gammas if gamma is not None]
        gamma = torch.stack(gammas).to(kind.weights[0].dtype) if gammas else None
        parts = len(kind.weights) // len(b)
        if parts == 1:
            weights.append(engine.steps.merge(kind.weights, b, down, gamma))
            continue
        apart = b.unflatten(1, (parts, -1)).flatten(0, 1)
        gamma = None if gamma is None else gamma.view(len(apart), -1)
        whole = engine.steps.merge(kind.weights, apart, down.repeat_interleave(parts, 0), gamma)
        weights.append(whole.view(len(b), -1, whole.shape[2]))
    return weights, thin


@torch.no_grad()
def _biases(frozen: Frozen, dtype: torch.dtype) -> list[list[Tensor | None]]:
    """By kind of linear each layer's bias in `dtype`, cast at once."""
    layers = len(frozen.norms) // 2
    kinds = [_by_layer(kind.biases, layers) for kind in frozen.kinds]
    given = [bias for kind in kinds for own in kind for bias in own if bias is not None]
    if not given:
        return [[None] * layers for _ in kinds]
    sizes = [sum(b.numel() for b in own if b is not None) for kind in kinds for own in kind]
    cast = iter(torch.cat(given).to(dtype).split([size for size in sizes if size]))
    return [[None if own[0] is None else next(cast) for own in kind] for kind in kinds]


def _by_layer(biases: Sequence[Tensor | None], layers: int) -> list[Sequence[Tensor | None]]:
    """Those of each layer."""
    parts = len(biases) // layers
    return [biases[place : place + parts] for place in range(0, len(biases), parts)]


def _empty_grads(stacks: Sequence[Tensor]) -> list[Tensor]:
    """Of the factors, to be filled."""
    return [
        factor.new_empty(factor.shape, dtype=torch.promote_types(factor.dtype, torch.float32))
        for factor in stacks[KINDS:]
    ]


def _heads(x: Tensor, images: int, heads: int) -> Tensor:
    """[M, K] as [images, heads, tokens, K / heads]."""
    return x.view(images, -1, heads, x.shape[1] // heads).transpose(1, 2)


def _split_heads(x: Tensor, images: int, heads: int) -> tuple[Tensor, ...]:
    """q, k and v of a qkv [M, 3·K], by heads."""
    by_heads = x.view(images, -1, 3, heads, x.shape[1] // (3 * heads))
    return by_heads.permute(2, 0, 3, 1, 4).unbind()


def _rows(x: Tensor) -> Tensor:
    """The inverse of `_heads`, without a copy where the rows lie together."""
    return x.transpose(1, 2).flatten(2).flatten(0, 1)
