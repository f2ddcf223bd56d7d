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
gradient; both gradients of proj are a pass over its x and dY, which makes P and S for itself. x̂ is
made again from z', gelu(h) from h: of their size nothing is kept that a frozen block does not keep.

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

KINDS = 4  # of linears: qkv, proj, fc1, fc2
_STACKS = 2 * KINDS + 1  # kept: the weights, each kind's B, and down of proj


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
    """One kind of linear in all layers, without its factors."""

    weights: Sequence[Tensor]  # L of [N, K]
    biases: Sequence[Tensor | None]  # L of [N]
    gammas: Sequence[Tensor | None]  # L of [N], LayerScale's, or none


class Frozen(NamedTuple):
    """All of a chain's blocks but the factors."""

    norms: Sequence[Norm]  # two of each layer
    kinds: Sequence[FrozenLinears]  # qkv, proj, fc1, fc2
    heads: int


def forward(
    x: Tensor, frozen: Frozen, factors: Sequence[Tensor], engine: Engine
) -> tuple[Tensor, list[Tensor]]:
    """The stream after all layers, and what `backward` needs beside its other arguments.

    Args:
        x: [images, tokens, K].
        frozen: the blocks; the norms in x's dtype.
        factors: for each kind of linear the stacks of down [L, K, r] and of B [L, N, r].
        engine: what computes.
    """
    steps, attention, dtype = engine
    images, _, k = x.shape
    weights, thin = merged(frozen, factors, engine)
    kept = [*weights, *thin[1::2], thin[2]]
    layers = zip(*(t.unbind() for t in (*weights, *thin)), *_biases(frozen, dtype), strict=True)
    z, y = x.flatten(0, 1).contiguous(), None  # type: Tensor, Any
    for layer, of in enumerate(layers):
        w_qkv, w_proj, w_1, w_2, down_qkv, _, _, _, down_1, _, down_2, _, *biases = of
        # Attention half.
        first = steps.norm(z, y, frozen.norms[2 * layer], down_qkv, dtype)
        qkv = F.linear(first.out, w_qkv, biases[0])
        o, of_attention = attention.forward(*_split_heads(qkv, images, frozen.heads))
        rows = o.transpose(1, 2).reshape(-1, k)
        y = F.linear(rows, w_proj, biases[1])
        kept += [first.z, first.mean, first.rstd, first.p, qkv, o]
        kept += [t for t in of_attention if isinstance(t, Tensor)]
        # MLP half.
        second = steps.norm(first.z, y, frozen.norms[2 * layer + 1], down_1, dtype)
        h = F.linear(second.out, w_1, biases[2])
        a, p_2 = steps.gelu(h, down_2)
        z, y = second.z, F.linear(a, w_2, biases[3])
        kept += [second.z, second.mean, second.rstd, second.p, p_2, h]
    del kept[_STACKS]  # the first stream is x itself
    return (z + y).view(x.shape), kept


def kept_tensors(layers: int, attention: Attention) -> int:
    """How many tensors `forward` keeps."""
    return _STACKS + layers * (12 + attention.kept) - 1


def backward(
    dy: Tensor,
    x: Tensor,
    frozen: Frozen,
    kept: Sequence[Tensor],
    engine: Engine,
    need_x: bool,
) -> tuple[Tensor | None, list[Tensor]]:
    """The gradients of x, if it needs one, and of the factors, in float32 or wider.

    Args:
        dy: of the stream after all layers.
        x, frozen, engine: the forward's.
        kept: what `forward` kept.
        need_x: whether x needs a gradient.
    """
    steps, attention, dtype = engine
    images, tokens, k = x.shape
    stacks, own = kept[:_STACKS], list(kept[_STACKS:])
    own.insert(0, x.flatten(0, 1).contiguous())
    layers = list(zip(*(t.unbind() for t in stacks), strict=True))
    count = len(own) // len(layers)
    grads = _empty_grads(stacks)
    outs = [list(t.unbind()) for t in grads]
    dz = dy.flatten(0, 1).contiguous()
    dbranch: Any = dz.to(dtype)
    later: Sums = []
    for layer in reversed(range(len(layers))):
        w_qkv, w_proj, w_1, w_2, b_qkv, b_proj, b_1, b_2, down_proj = layers[layer]
        d_qkv, d_b_qkv, d_proj, d_b_proj, d_1, d_b_1, d_2, d_b_2 = (t[layer] for t in outs)
        z1, mean1, rstd1, p_qkv, qkv, o, *of_attention = own[
            layer * count : (layer + 1) * count - 6
        ]
        z2, mean2, rstd2, p_1, p_2, h = own[(layer + 1) * count - 6 : (layer + 1) * count]
        # MLP half.
        s_2, sum_b_2 = steps.thin_grad(dbranch, b_2, p_2)
        later.append((sum_b_2, d_b_2))
        dh, s_1 = steps.gelu_grad(dbranch @ w_2, h, s_2, b_1, p_1, d_b_1, d_2, later)
        norm2 = z2, mean2, rstd2, frozen.norms[2 * layer + 1]
        dz, dbranch, sum_down = steps.norm_grad(dh @ w_1, *norm2, dz, s_1)
        later.append((sum_down, d_1))
        # Attention half.
        rows = o.transpose(1, 2).reshape(-1, k)
        sum_down, sum_b = steps.pair_grad(rows, dbranch, down_proj, b_proj)
        later += (sum_down, d_proj), (sum_b, d_b_proj)
        do = _heads(dbranch @ w_proj, images, frozen.heads)
        found = attention.backward(
            *(do, *_split_heads(qkv, images, frozen.heads), o),
            *attention.restore(of_attention, tokens),
        )
        parts = [part.transpose(1, 2).reshape(-1, k) for part in found]
        wanted = need_x or layer > 0
        dx, s_qkv = steps.gather_grad(parts, b_qkv, p_qkv, wanted, d_b_qkv, later)
        norm1 = z1, mean1, rstd1, frozen.norms[2 * layer]
        if wanted:
            dz, dbranch, sum_down = steps.norm_grad(dx @ w_qkv, *norm1, dz, s_qkv)
        else:
            sum_down = steps.norm_down_grad(*norm1, s_qkv)
        later.append((sum_down, d_qkv))
    steps.finish(later)
    return dz.view(x.shape) if need_x else None, grads


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
        weights.append(engine.steps.merge(kind.weights, b, down, gamma))
    return weights, thin


@torch.no_grad()
def _biases(frozen: Frozen, dtype: torch.dtype) -> list[list[Tensor | None]]:
    """By kind of linear all biases in `dtype`, cast at once."""
    given = [bias for kind in frozen.kinds for bias in kind.biases if bias is not None]
    if not given:
        return [list(kind.biases) for kind in frozen.kinds]
    cast = iter(torch.cat(given).to(dtype).split([bias.numel() for bias in given]))
    return [[None if b is None else next(cast) for b in kind.biases] for kind in frozen.kinds]


def _empty_grads(stacks: Sequence[Tensor]) -> list[Tensor]:
    """Of the factors, to be filled: for each kind of linear that of down and that of B."""
    found = []
    for weight, b in zip(stacks[:KINDS], stacks[KINDS : 2 * KINDS], strict=True):
        dtype = torch.promote_types(b.dtype, torch.float32)
        found.append(b.new_empty(weight.shape[0], weight.shape[2], b.shape[2], dtype=dtype))
        found.append(b.new_empty(b.shape, dtype=dtype))
    return found


def _heads(x: Tensor, images: int, heads: int) -> Tensor:
    """[M, K] as [images, heads, tokens, K / heads]."""
    return x.view(images, -1, heads, x.shape[1] // heads).transpose(1, 2)


def _split_heads(x: Tensor, images: int, heads: int) -> tuple[Tensor, ...]:
    """q, k and v of a qkv [M, 3·K], by heads."""
    by_heads = x.view(images, -1, 3, heads, x.shape[1] // (3 * heads))
    return by_heads.permute(2, 0, 3, 1, 4).unbind()
