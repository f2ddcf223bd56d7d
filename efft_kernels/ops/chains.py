"""A ViT's adapted blocks as a chain: what runs it where, and its place in autograd's graph.

chain_passes.py has the mathematics.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend

from .. import functions
from . import chain_passes
from .backends.chain_steps import Norm, TorchSteps, aten
from .backends.fallback import too_old
from .chain_passes import Attention, Engine, Frozen
from .checks import HALF_DTYPES, autocast_enabled
from .dispatch import available_backends, has_tangent, is_batched, launch_context, requested_backend

MAX_RANK = 128  # that the kernels take


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
    k, index = x.shape[-1], x.get_device()
    return _steps(k, rank, index, _chosen(k, rank, x.numel() // k, index))


@functools.cache
def _triton() -> str | None:
    """Why Triton cannot run here."""
    return available_backends()["triton"]


def _chosen(k: int, rank: int, rows: int, index: int) -> frozenset[str] | None:
    """What CudaSteps is asked for; None where it does not run."""
    if not _in_cuda(k, rank, index):
        return None
    from .backends import cuda_chain

    return frozenset(step for step, on in cuda_chain.chosen(k, rank, rows, index).items() if on)


@functools.cache
def _in_cuda(k: int, rank: int, index: int) -> bool:
    from .backends import cuda_chain

    return cuda_chain.takes(k, rank, index)


@functools.cache
def _steps(k: int, rank: int, index: int, chosen: frozenset[str] | None) -> TorchSteps:
    from .backends import cuda_chain
    from .backends.triton.chain import TritonSteps, configs_for

    shapes = configs_for(k, rank, index)
    if chosen is None:
        return TritonSteps(shapes)
    return cuda_chain.CudaSteps(shapes, **dict.fromkeys(chosen, True))


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


# The chain


def side_by_side(linears: Sequence[tuple[Tensor, Tensor]], one_down: bool) -> tuple[Tensor, Tensor]:
    """The stacks of one linear that is made of several, which read the same x: the weights one
    under the other.

    Args:
        linears: of each the stacks of down [L, K, r] and of B [L, N, r].
        one_down: they have the same `down`, and the first one's stands for all; else each has
            columns of its own.
    """
    downs, bs = zip(*linears, strict=True)
    if len(linears) == 1:
        return linears[0]
    if one_down:
        return downs[0], torch.cat(bs, 1)
    whole = torch.cat(downs, 2)
    padded, start = [], 0
    for b in bs:
        stop = start + b.shape[2]
        padded.append(F.pad(b, (start, whole.shape[2] - stop)))
        start = stop
    return whole, torch.cat(padded, 1)


def scaled(frozen: Frozen, factors: Sequence[Tensor]) -> tuple[Frozen, list[Tensor]]:
    """LayerScale in the biases and B, still to be put in the weights as they are merged:
    γ·(x·W^T + bias + P·B^T) = x·(γ·W)^T + γ·bias + P·(γ·B)^T.

    Args:
        frozen: the blocks.
        factors: for each kind of linear the stacks of down [L, K, r] and of B [L, N, r].
    """
    kinds, found = [], list(factors)
    for place, kind in enumerate(frozen.kinds):
        gammas = [gamma for gamma in kind.gammas if gamma is not None]
        if gammas:
            pairs = zip(kind.biases, gammas, strict=True)
            kind = kind._replace(biases=[None if b is None else b * gamma for b, gamma in pairs])
            b = found[2 * place + 1]
            found[2 * place + 1] = b * torch.stack(gammas).to(b.dtype).unsqueeze(2)
        kinds.append(kind)
    return frozen._replace(kinds=kinds), found


def run_stacks(x: Tensor, frozen: Frozen, factors: Sequence[Tensor], engine: Engine) -> Tensor:
    """The stream after all layers, as x is: their frozen modules and those only in x's dtype.

    Args:
        x: [images, tokens, K].
        frozen, factors: what `scaled` returns, the factors being differentiable.
        engine: what it runs with.
    """
    return functions.apply(_Chain, x, *factors, frozen, engine)  # type: ignore[no-any-return]


class _Chain(torch.autograd.Function):
    """(x, stacks of the factors, Frozen, Engine) → the stream after all layers."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *rest: Any) -> Tensor:
        *factors, frozen, engine = rest
        keep = any(ctx.needs_input_grad)
        with launch_context(x.device):
            y, kept = chain_passes.forward(x, frozen, factors, engine, keep)
        if not keep:
            return y
        ctx.engine, ctx.frozen = engine, frozen
        norms = [t for norm in frozen.norms for t in (norm.weight, norm.bias)]
        hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
        if hooks is None:
            ctx.packed, ctx.unpack = None, None
        else:
            # What hooks take (save_on_cpu, a checkpoint) comes back half by half, not all at once.
            pack, ctx.unpack = hooks
            ctx.packed, kept = [pack(t) for t in kept], []
        ctx.save_for_backward(x, *norms, *kept)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        if is_batched(dy):
            raise RuntimeError(
                "chained blocks take no batched gradients (is_grads_batched, vectorize): attach the"
                " adapter with fuse='pairs'"
            )
        if has_tangent(dy):
            raise RuntimeError(
                "chained blocks carry no forward-mode derivative of their gradient: attach the"
                " adapter with fuse='pairs'"
            )
        x, frozen, kept = _take_kept(ctx)
        need_x = ctx.needs_input_grad[0]
        with launch_context(dy.device), torch.no_grad():
            dx, grads = chain_passes.backward(dy, x, frozen, kept, ctx.engine, need_x, ctx.unpack)
        found = dx, *grads
        if torch.is_grad_enabled():
            error: Any = torch._C._functions.DelayedError(
                "chained blocks have no second derivative: attach the adapter with fuse='pairs'",
                len(found),
            )
            found = error(*(None if t is None else t.detach().requires_grad_() for t in found))
        return *found, None, None


def _take_kept(ctx: Any) -> tuple[Tensor, Frozen, list[Any]]:
    """x, the blocks with the norms as the forward read them, and what it kept, as hooks packed it
    if there were any. Where the graph is not retained, nothing else holds it any more: each half's
    memory is given back when it is done."""
    x, *kept = ctx.saved_tensors
    ctx.maybe_clear_saved_tensors()
    frozen: Frozen = ctx.frozen
    own = iter(kept)
    frozen = frozen._replace(norms=[Norm(next(own), next(own), n.eps) for n in frozen.norms])
    if ctx.packed is None:
        return x, frozen, kept[2 * len(frozen.norms) :]
    packed = list(ctx.packed)
    try:
        ctx._raw_saved_tensors  # noqa: B018
    except RuntimeError:  # cleared
        ctx.packed.clear()
    return x, frozen, packed
