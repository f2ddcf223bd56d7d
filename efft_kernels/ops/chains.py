"""A ViT's adapted blocks as a chain: each half of a block is one operator.

With z the residual stream and y what the half before still has to add to it:

    attention half    z' = z + y    x̂ = norm(z')    q, k, v = x̂·W_qkv^T    o = attention(q, k, v)
                      y' = o·W_proj^T
    MLP half          z' = z + y    x̂ = norm(z')    h = x̂·W_1^T    y' = gelu(h)·W_2^T

Every W is merged, W = W0 + B·down^T, for all layers at once: the GEMMs are the library's own and
adapters cost nothing in them. Left are the thin products of the gradients, with P = x·down and
S = dY·B:

    d_B = dY^T·P    d_down = x^T·S

P of a linear after a norm is made by the norm; the others are passes over their x. In the backward,
S and d_B of qkv come with the copy of the gradients of q, k and v into one matrix. x̂ is made again
from z', gelu(h) from h: of their size nothing is kept that a frozen block does not keep.

`backends/chain_steps.py` says what each step between the GEMMs computes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend

from .backends.chain_steps import Norm, Normed, TorchSteps, aten
from .backends.fallback import too_old
from .checks import HALF_DTYPES, autocast_enabled
from .dispatch import available_backends, has_tangent, launch_context, requested_backend

MAX_RANK = 128  # that the kernels take


class Attention(NamedTuple):
    """An attention kernel: q, k, v → (o, what the backward needs), and its gradient."""

    forward: Callable[..., tuple[Tensor, tuple[Any, ...]]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    kept: int  # tensors in what the backward needs
    restore: Callable[[list[Tensor], int], Sequence[Any]]  # all of it from those and the tokens


def _cudnn(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, tuple[Any, ...]]:
    o, *kept, _ = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True)
    return o, tuple(kept)


def _cudnn_grad(do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, *kept: Any) -> Any:
    lse, cum_q, cum_k, max_q, max_k, seed, offset = kept
    return aten._scaled_dot_product_cudnn_attention_backward(
        do, q, k, v, o, lse, seed, offset, None, cum_q, cum_k, max_q, max_k, 0.0, False
    )


def _flash(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, tuple[Any, ...]]:
    o, *kept, _ = aten._scaled_dot_product_flash_attention(q, k, v)
    return o, tuple(kept)


def _flash_grad(do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, *kept: Any) -> Any:
    lse, cum_q, cum_k, max_q, max_k, seed, offset = kept
    return aten._scaled_dot_product_flash_attention_backward(
        do, q, k, v, o, lse, cum_q, cum_k, max_q, max_k, 0.0, False, seed, offset
    )


def _restore(tensors: list[Tensor], tokens: int) -> tuple[Any, ...]:
    lse, seed, offset = tensors
    return lse, None, None, tokens, tokens, seed, offset


ATTENTION = {
    SDPBackend.CUDNN_ATTENTION: Attention(_cudnn, _cudnn_grad, 3, _restore),
    SDPBackend.FLASH_ATTENTION: Attention(_flash, _flash_grad, 3, _restore),
}


# What runs a chain


class Engine(NamedTuple):
    """What a chain runs with."""

    steps: TorchSteps
    attention: Attention
    dtype: torch.dtype  # of the GEMMs


def refusal(x: Tensor) -> str | None:
    """Why no chain runs over the stream x [images, tokens, K] here and now; None where one may."""
    if type(x) is not Tensor or x.dim() != 3 or not x.numel() or x.is_inference():
        return "the blocks' input is no plain tensor [images, tokens, K]"
    if not x.is_cuda:
        return f"the blocks' input is on {x.device}, and the chain is for CUDA"
    if x.dtype != torch.float32:
        return f"the blocks' input is {x.dtype}, and the chain's is float32"
    if not autocast_enabled("cuda") or torch.get_autocast_dtype("cuda") not in HALF_DTYPES:
        return "autocast to float16 or bfloat16 is off"
    backend = requested_backend("auto")
    if backend != "auto":
        return f"backend {backend!r} was asked for"
    if torch.are_deterministic_algorithms_enabled():
        return "deterministic algorithms were asked for"
    return _triton() or too_old(x.get_device())


def refusal_of_graph(x: Tensor) -> bool:
    """Whether no chain is traced over the stream x, as far as x and autocast tell."""
    if not x.is_cuda or x.dtype != torch.float32 or requested_backend("auto") != "auto":
        return True
    autocast = torch.is_autocast_enabled("cuda")
    return not autocast or torch.get_autocast_dtype("cuda") not in HALF_DTYPES


def attention_of_graph(
    tokens: int, k: int, heads: int, rank: int, dtype: torch.dtype, index: int | None
) -> int | None:
    """SDPBackend's number of the attention of a chain, or None where none runs on the device."""
    if torch.are_deterministic_algorithms_enabled():
        return None
    if _triton() or too_old(index) or _too_wide(k, rank):
        return None
    device = torch.device("cuda", index or 0)
    attention = _attention_for((1, tokens, k), heads, dtype, device)
    return attention.value if attention in ATTENTION else None


def _too_wide(k: int, rank: int) -> bool:
    from .backends.triton.chain import MAX_WIDTH

    return k > MAX_WIDTH or rank > MAX_RANK


def engine_for(x: Tensor, heads: int, rank: int) -> Engine | str:
    """What runs a chain over x under autocast, or why nothing can.

    Args:
        x: [images, tokens, K], the stream before the first block; `refusal` lets it pass.
        heads: of the attention.
        rank: the largest of the chain's linears.
    """
    k = x.shape[2]
    if _too_wide(k, rank):
        return f"the kernels take no stream of {k} columns with a rank of {rank}"
    dtype = torch.get_autocast_dtype("cuda")
    attention = _attention_for((x.shape[0], x.shape[1], k), heads, dtype, x.device)
    if attention not in ATTENTION:
        return "torch chooses neither cuDNN's nor FlashAttention's kernel for these heads"
    return Engine(steps_for(x, rank), ATTENTION[attention], dtype)


def steps_for(x: Tensor, rank: int) -> TorchSteps:
    """What runs between the GEMMs over a stream x [..., K], ranks being at most `rank`."""
    return _steps(x.shape[-1], rank, x.get_device())


@functools.cache
def _triton() -> str | None:
    """Why Triton cannot run here."""
    return available_backends()["triton"]


@functools.cache
def _steps(k: int, rank: int, index: int) -> TorchSteps:
    from .backends import cuda_chain
    from .backends.triton.chain import TritonSteps, configs_for

    steps = cuda_chain.CudaSteps if cuda_chain.takes(k, rank, index) else TritonSteps
    return steps(configs_for(k, rank, index))


def _attention_for(
    stream: tuple[int, int, int], heads: int, dtype: torch.dtype, device: torch.device
) -> SDPBackend | None:
    """The kernel that torch's own attention would run over a stream [images, tokens, K]; None where
    the heads are not even."""
    images, tokens, k = stream
    head = k // heads
    if k % heads or head % 8:
        return None
    like = torch.empty(images, tokens, 3, heads, head, dtype=dtype, device=device)
    q, key, v = like.requires_grad_().permute(2, 0, 3, 1, 4).unbind()
    return SDPBackend(torch._fused_sdp_choice(q, key, v))


def watched() -> str | None:
    """What looks at each operator of the model now, or changes it; None where nothing does."""
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return "a transform of torch.func or forward-mode differentiation is at work"
    if torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
        return "a dispatch or function mode is on"
    if torch.jit.is_tracing():
        return "torch.jit traces the model"
    return None


# The halves


class Linear(NamedTuple):
    """An adapted linear of one layer in one step."""

    weight: Tensor  # [N, K], merged
    bias: Tensor | None  # [N]
    down: Tensor  # [K, r], in the GEMMs' dtype
    b: Tensor  # [N, r]


class Half(NamedTuple):
    """All that a half of a block needs beside its differentiable inputs."""

    engine: Engine
    norm: Norm
    first: Linear  # qkv or fc1
    second: Linear  # proj or fc2
    images: int
    heads: int


def _keep(ctx: Any, half: Half, normed: Normed, *more: Any) -> None:
    """Save the tensors that the backward reads; whatever is no tensor lies beside them."""
    ctx.engine, ctx.eps = half.engine, half.norm.eps
    ctx.images, ctx.heads = half.images, half.heads
    ctx.others = [None if isinstance(t, Tensor) else t for t in more]
    ctx.save_for_backward(
        half.first.weight,
        half.second.weight,
        half.first.b,
        half.second.b,
        half.norm.weight,
        half.norm.bias,
        normed.z,
        normed.mean,
        normed.rstd,
        normed.p,
        *[t if isinstance(t, Tensor) else None for t in more],
    )


class _Kept(NamedTuple):
    """What `_keep` saved, but for `more`."""

    w_first: Tensor
    w_second: Tensor
    b_first: Tensor
    b_second: Tensor
    norm: Norm
    z: Tensor
    mean: Tensor
    rstd: Tensor
    p_first: Tensor


def _kept(ctx: Any) -> tuple[_Kept, list[Any]]:
    """What `_keep` saved, and `more`."""
    w1, w2, b1, b2, weight, bias, z, mean, rstd, p, *saved = ctx.saved_tensors
    more = [o if t is None else t for t, o in zip(saved, ctx.others, strict=True)]
    return _Kept(w1, w2, b1, b2, Norm(weight, bias, ctx.eps), z, mean, rstd, p), more


def _norm_grad(
    ctx: Any, kept: _Kept, dz: Tensor, dx: Callable[[], Tensor], s: Tensor
) -> tuple[Tensor | None, Tensor | None, Any]:
    """Gradients of z and y from x̂'s and that of the stream after the half, and the sum of x̂^T·S."""
    steps, norm = ctx.engine.steps, (kept.z, kept.mean, kept.rstd, kept.norm)
    if not (ctx.needs_input_grad[0] or ctx.needs_input_grad[1]):
        return None, None, steps.norm_down_grad(*norm, s)
    dz_in, dy_in, sum_down = steps.norm_grad(dx(), *norm, dz.contiguous(), s)
    return dz_in, dy_in if ctx.needs_input_grad[1] else None, sum_down


Backward = Callable[[Any, Tensor, Tensor], tuple[Tensor | None, ...]]


def _is_batched(tensor: Tensor) -> bool:
    """Whether a vmap is at work on it, the one of autograd's batched gradients included."""
    functorch = torch._C._functorch
    return functorch.is_batchedtensor(tensor) or functorch.is_legacy_batchedtensor(tensor)


def _once(backward: Backward) -> Backward:
    """A backward that is called as the kernels are, and whose results have no derivative."""

    @functools.wraps(backward)
    def run(ctx: Any, dz: Tensor, dy: Tensor) -> tuple[Tensor | None, ...]:
        if _is_batched(dz) or _is_batched(dy):
            raise RuntimeError(
                "chained blocks take no batched gradients (is_grads_batched, vectorize): attach the"
                " adapter with fuse='pairs'"
            )
        if has_tangent(dz) or has_tangent(dy):
            raise RuntimeError(
                "chained blocks carry no forward-mode derivative of their gradient: attach the"
                " adapter with fuse='pairs'"
            )
        with launch_context(dy.device), torch.no_grad():
            found = backward(ctx, dz, dy.contiguous())
        if not torch.is_grad_enabled():
            return found
        error = torch._C._functions.DelayedError(
            "chained blocks have no second derivative: attach the adapter with fuse='pairs'",
            len(found),
        )
        leaves = [None if t is None else t.detach().requires_grad_() for t in found]
        return tuple(error(*leaves))  # type: ignore[arg-type]

    return run


class AttentionHalf(torch.autograd.Function):
    """(z, y, down and B of qkv and of proj, Half) → (z', y')."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, y: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
        half: Half = rest[-1]
        (steps, attention, dtype), qkv, proj = half.engine, half.first, half.second
        normed = steps.norm(z, y, half.norm, qkv.down, dtype)
        x = F.linear(normed.out, qkv.weight, qkv.bias)
        o, kept = attention.forward(*_split_heads(x, half.images, half.heads))
        rows = _rows(o)
        _keep(ctx, half, normed, steps.thin(rows, proj.down), x, o, *kept)
        return normed.z, F.linear(rows, proj.weight, proj.bias)

    @staticmethod
    @_once
    def backward(ctx: Any, dz: Tensor, dy: Tensor) -> tuple[Tensor | None, ...]:
        steps, attention, _ = ctx.engine
        kept, (p_proj, x, o, *of_attention) = _kept(ctx)
        s_proj, sum_b_proj = steps.thin_grad(dy, kept.b_second, p_proj)
        sum_down_proj = steps.tall_grad(_rows(o), s_proj)
        do = _heads(dy @ kept.w_second, ctx.images, ctx.heads)
        qkv = _split_heads(x, ctx.images, ctx.heads)
        parts = [_rows(part) for part in attention.backward(do, *qkv, o, *of_attention)]
        copy = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        dx, s, d_b = steps.gather_grad(parts, kept.b_first, kept.p_first, copy)
        *streams, sum_down = _norm_grad(ctx, kept, dz, lambda: dx @ kept.w_first, s)
        d_b_proj, d_down_proj, d_down = steps.finish(sum_b_proj, sum_down_proj, sum_down)
        return *streams, d_down, d_b, d_down_proj, d_b_proj, None


class MlpHalf(torch.autograd.Function):
    """(z, y, down and B of fc1 and of fc2, Half) → (z', y')."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, y: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
        half: Half = rest[-1]
        (steps, _, dtype), fc1, fc2 = half.engine, half.first, half.second
        normed = steps.norm(z, y, half.norm, fc1.down, dtype)
        h = F.linear(normed.out, fc1.weight, fc1.bias)
        a, p = steps.gelu(h, fc2.down)
        _keep(ctx, half, normed, p, h)
        return normed.z, F.linear(a, fc2.weight, fc2.bias)

    @staticmethod
    @_once
    def backward(ctx: Any, dz: Tensor, dy: Tensor) -> tuple[Tensor | None, ...]:
        steps = ctx.engine.steps
        kept, (p2, h) = _kept(ctx)
        s2, sum_b2 = steps.thin_grad(dy, kept.b_second, p2)
        dh, s1, d_b1, d_down2 = steps.gelu_grad(
            dy @ kept.w_second, h, s2, kept.b_first, kept.p_first
        )
        *streams, sum_down1 = _norm_grad(ctx, kept, dz, lambda: dh @ kept.w_first, s1)
        d_down1, d_b2 = steps.finish(sum_down1, sum_b2)
        return *streams, d_down1, d_b1, d_down2, d_b2, None


def _heads(x: Tensor, images: int, heads: int) -> Tensor:
    """[M, K] as [images, heads, tokens, K / heads]."""
    return x.view(images, -1, heads, x.shape[1] // heads).transpose(1, 2)


def _split_heads(x: Tensor, images: int, heads: int) -> list[Tensor]:
    """q, k and v of a qkv [M, 3·K], by heads."""
    return [_heads(part, images, heads) for part in x.chunk(3, 1)]


def _rows(x: Tensor) -> Tensor:
    """The inverse of `_heads`, without a copy where the rows lie together."""
    return x.transpose(1, 2).flatten(2).flatten(0, 1)


# The chain


class Adapted(NamedTuple):
    """An adapted linear of one layer as the model has it, and the LayerScale after it."""

    weight: Tensor  # [N, K]
    bias: Tensor | None  # [N]
    down: Tensor  # [K, r], differentiable
    b: Tensor  # [N, r], differentiable
    gamma: Tensor | None = None  # [N], of all layers' linears of one kind or of none

    def scaled(self) -> Adapted:
        """The same with γ in bias and B, and to be put in the weight as it is merged:
        γ·(x·W^T + bias + P·B^T) = x·(γ·W)^T + γ·bias + P·(γ·B)^T."""
        if self.gamma is None:
            return self
        bias = None if self.bias is None else self.bias * self.gamma
        return self._replace(bias=bias, b=self.b * self.gamma.to(self.b.dtype).unsqueeze(1))


class Layer(NamedTuple):
    """One block."""

    norm1: Norm
    qkv: Adapted
    proj: Adapted
    norm2: Norm
    fc1: Adapted
    fc2: Adapted
    heads: int


def common_rank(layers: Sequence[Layer]) -> int | None:
    """The largest rank of the linears; None where one kind of them has several."""
    ranks = []
    for first, *others in zip(*map(_linears, layers), strict=True):
        rank = first.down.shape[1]
        if any(other.down.shape[1] != rank for other in others):
            return None
        ranks.append(rank)
    return max(ranks)


def run_chain(x: Tensor, layers: Sequence[Layer], engine: Engine) -> Tensor:
    """The stream after all layers, as x is: their frozen modules and those only in x's dtype.

    Args:
        x: [images, tokens, K].
        layers: at least one; a kind of linear has one rank in all of them.
        engine: what it runs with.
    """
    images, z = x.shape[0], x.flatten(0, 1).contiguous()
    with launch_context(x.device):
        layers = [
            layer._replace(proj=layer.proj.scaled(), fc2=layer.fc2.scaled()) for layer in layers
        ]
        _, stacks = merged_linears(layers, engine)
        y = None
        for layer, qkv, proj, fc1, fc2 in zip(layers, *stacks, strict=True):
            for of, norm, first, second, given in (
                (AttentionHalf, layer.norm1, qkv, proj, (layer.qkv, layer.proj)),
                (MlpHalf, layer.norm2, fc1, fc2, (layer.fc1, layer.fc2)),
            ):
                half = Half(engine, norm, first, second, images, layer.heads)
                factors = [t for adapted in given for t in (adapted.down, adapted.b)]
                z, y = of.apply(z, y, *factors, half)
        assert y is not None
        return (z + y).view(x.shape)


@torch.no_grad()
def merged_linears(
    layers: Sequence[Layer], engine: Engine
) -> tuple[list[Tensor], list[list[Linear]]]:
    """By kind of linear the merged weights [L, N, K], and the linears of all layers."""
    biases = _in_dtype([a.bias for layer in layers for a in _linears(layer)], engine.dtype)
    kinds = zip(*map(_linears, layers), strict=True)
    found = [_stack(kind, biases[place::4], engine) for place, kind in enumerate(kinds)]
    return [merged for merged, _ in found], [linears for _, linears in found]


def _linears(layer: Layer) -> tuple[Adapted, Adapted, Adapted, Adapted]:
    return layer.qkv, layer.proj, layer.fc1, layer.fc2


def _stack(
    kind: Sequence[Adapted], biases: Sequence[Tensor | None], engine: Engine
) -> tuple[Tensor, list[Linear]]:
    """One kind of linear in all layers: the merged weights, and each."""
    down, b = (
        torch.stack(parts).to(engine.dtype)
        for parts in ([a.down for a in kind], [a.b for a in kind])
    )
    gammas = [a.gamma for a in kind if a.gamma is not None]
    gamma = torch.stack(gammas).to(kind[0].weight.dtype) if gammas else None
    merged = engine.steps.merge([a.weight for a in kind], b, down, gamma)
    stacks = zip(merged.unbind(), biases, down.unbind(), b.unbind(), strict=True)
    return merged, [Linear(*own) for own in stacks]


@torch.no_grad()
def _in_dtype(vectors: Sequence[Tensor | None], dtype: torch.dtype) -> list[Tensor | None]:
    """All the vectors in `dtype`, at once."""
    given = [v for v in vectors if v is not None]
    if not given:
        return list(vectors)
    cast = iter(torch.cat(given).to(dtype).split([v.numel() for v in given]))
    return [None if v is None else next(cast) for v in vectors]
