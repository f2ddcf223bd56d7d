"""A ViT whose adapters ride in the kernels between its GEMMs: a block as two operators.

With z the residual stream and y what the half before still has to add to it:

    attention half    z' = z + y    x̂ = norm(z')    q, k, v = x̂·W_qkv^T    o = attention(q, k, v)
                      y' = o·W_proj^T
    MLP half          z' = z + y    x̂ = norm(z')    h = x̂·W_1^T    y' = gelu(h)·W_2^T

Every W is merged, W = W0 + B·down^T, for all layers at once: the GEMMs are the library's own and
adapters cost nothing in them. Left are the thin products of the gradients, with P = x·down and
S = dY·B:

    d_B = dY^T·P    d_down = x^T·S

P of a linear after a norm is made by the norm, P of fc2 by the activation, and proj's is a pass
over attention's output. In the backward, S and d_B of qkv come with the copy of the gradients of q,
k and v into one matrix. x̂ is made again from z', gelu(h) from h: of their size nothing is kept that
a frozen block does not keep.

`TorchKernels` says what each step computes; `chain_triton.TritonKernels` does the same in launches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from efft_kernels.methods.lora import LoRAGroup
from efft_kernels.methods.tensor_train import TensorTrainGroup
from efft_kernels.nn import FactorBank, FusedEFFTLinear
from efft_kernels.ops.backends.torch_backend import fold

aten = torch.ops.aten


class Norm(NamedTuple):
    """A LayerNorm's frozen parameters."""

    weight: Tensor  # [K]
    bias: Tensor  # [K]
    eps: float


class Normed(NamedTuple):
    """What `norm` makes of the stream z and the branch y."""

    z: Tensor  # [M, K]: z + y
    out: Tensor  # x̂ [M, K]
    p: Tensor | None  # [M, r]
    mean: Tensor  # [M, 1] or [M]
    rstd: Tensor


Sum = Any


class TorchKernels:
    """The steps between the GEMMs in plain torch. x, y and thin matrices are in the dtype of the
    GEMMs, z and dz in the stream's, d_down and d_B in float32 or the stream's.

    A `Sum` is a gradient that `finish` still has to add up, several in one launch.
    """

    def finish(self, *sums: Sum) -> tuple[Tensor, ...]:
        """The gradients."""
        return sums

    copy_gradient = True  # of attention into one matrix; otherwise one GEMM for each of its parts

    def merge(self, weight: Tensor, b: Tensor, down: Tensor) -> Tensor:
        """W + B·down^T for stacks [L, N, K], [L, N, r], [L, K, r]."""
        return torch.baddbmm(weight, b, down.mT)

    def norm(
        self, z: Tensor, y: Tensor | None, norm: Norm, down: Tensor | None, dtype: Any
    ) -> Normed:
        """z + y, its norm x̂ in `dtype`, P = x̂·down and the statistics."""
        z = z if y is None else z + y
        out, mean, rstd = aten.native_layer_norm(z, [z.shape[1]], norm.weight, norm.bias, norm.eps)
        out = out.to(dtype)
        return Normed(z, out, None if down is None else out @ down, mean, rstd)

    def norm_grad(
        self,
        dout: Tensor,
        z: Tensor,
        mean: Tensor,
        rstd: Tensor,
        norm: Norm,
        residual: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """The stream's gradient, and the same in dout's dtype for the branch."""
        dz = aten.native_layer_norm_backward(
            dout.to(z.dtype),
            z,
            [z.shape[1]],
            mean,
            rstd,
            norm.weight,
            norm.bias,
            [True, False, False],
        )[0]
        dz = dz if residual is None else dz + residual
        return dz, dz.to(dout.dtype)

    def norm_down_grad(self, z: Tensor, mean: Tensor, rstd: Tensor, norm: Norm, s: Tensor) -> Sum:
        """x̂^T·S, with x̂ made again."""
        n = (z - mean.view(-1, 1)) * rstd.view(-1, 1)
        return self.tall_grad((n * norm.weight + norm.bias).to(s.dtype), s)

    def thin(self, x: Tensor, down: Tensor) -> Tensor:
        """P = x·down."""
        return x @ down

    def thin_grad(self, dy: Tensor, b: Tensor, p: Tensor) -> tuple[Tensor, Sum]:
        """S = dY·B and d_B = dY^T·P."""
        return dy @ b, self.tall_grad(dy, p)

    def tall_grad(self, x: Tensor, s: Tensor) -> Sum:
        """x^T·S."""
        return (x.T @ s).to(torch.promote_types(s.dtype, torch.float32))

    def gather_grad(
        self, parts: Sequence[Tensor], b: Tensor, p: Tensor, copy: bool
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        """The parts [M, n] side by side if `copy`, and S and d_B of that matrix."""
        whole = torch.cat(list(parts), 1)
        return (whole if copy else None, *self.thin_grad(whole, b, p))

    def gelu(self, h: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
        """a = gelu(h) and P = a·down."""
        a = F.gelu(h)
        return a, self.thin(a, down)

    def gelu_grad(
        self, da: Tensor, h: Tensor, s: Tensor, b: Tensor, p: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """dh, then S = dh·B and d_B = dh^T·P of the linear before, d_down = gelu(h)^T·s of the one
        after.
        """
        d_down = self.tall_grad(F.gelu(h), s)
        dh = aten.gelu_backward(da, h)
        return dh, *self.thin_grad(dh, b, p), d_down


# Attention


class Attention(NamedTuple):
    """An attention kernel: q, k, v → (o, what the backward needs), and its gradient."""

    forward: Callable[..., tuple[Tensor, tuple[Any, ...]]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]


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


def _cpu(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, tuple[Any, ...]]:
    o, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    return o, (lse,)


def _cpu_grad(do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, *kept: Any) -> Any:
    return aten._scaled_dot_product_flash_attention_for_cpu_backward(
        do, q, k, v, o, *kept, 0.0, False
    )


ATTENTION = {
    "cudnn": Attention(_cudnn, _cudnn_grad),
    "flash": Attention(_flash, _flash_grad),
    "cpu": Attention(_cpu, _cpu_grad),
}


# The halves


class Linear(NamedTuple):
    """An adapted linear of one layer in one step."""

    weight: Tensor  # [N, K], merged
    bias: Tensor | None  # [N]
    down: Tensor  # [K, r], in the GEMMs' dtype
    b: Tensor  # [N, r]


class Half(NamedTuple):
    """All that a half of a block needs beside its differentiable inputs."""

    kernels: TorchKernels
    attention: Attention
    norm: Norm
    first: Linear  # qkv or fc1
    second: Linear  # proj or fc2
    images: int
    heads: int


def _keep(ctx: Any, half: Half, tensors: Sequence[Any]) -> None:
    """Save `tensors` and the merged weights; whatever is no tensor lies beside them."""
    ctx.half = half
    ctx.others = [None if isinstance(t, Tensor) else t for t in tensors]
    saved = [t if isinstance(t, Tensor) else None for t in tensors]
    ctx.save_for_backward(half.first.weight, half.second.weight, *saved)
    ctx.half = half._replace(
        first=half.first._replace(weight=None), second=half.second._replace(weight=None)
    )


def _kept(ctx: Any) -> list[Any]:
    first, second, *saved = ctx.saved_tensors
    found = [o if t is None else t for t, o in zip(saved, ctx.others, strict=True)]
    return [first, second, *found]


def _stream_grad(
    ctx: Any, dz: Tensor, dx: Callable[[], Tensor], z: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of z and y from x̂'s and that of the stream after the half."""
    if not (ctx.needs_input_grad[0] or ctx.needs_input_grad[1]):
        return None, None
    dz_in, dy_in = ctx.half.kernels.norm_grad(dx(), z, mean, rstd, ctx.half.norm, dz)
    return dz_in, dy_in if ctx.needs_input_grad[1] else None


class AttentionHalf(torch.autograd.Function):
    """(z, y, down and B of qkv and of proj, Half) → (z', y')."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, y: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
        half: Half = rest[-1]
        kernels, (qkv, proj) = half.kernels, (half.first, half.second)
        normed = kernels.norm(z, y, half.norm, qkv.down, qkv.weight.dtype)
        dqkv = F.linear(normed.out, qkv.weight, qkv.bias)
        parts = [_heads(part, half) for part in dqkv.chunk(3, 1)]
        o, kept = half.attention.forward(*parts)
        x = _rows(o)
        p = kernels.thin(x, proj.down)
        saved = (normed.z, normed.mean, normed.rstd, normed.p, p, dqkv, o, *kept)
        _keep(ctx, half, saved)
        return normed.z, F.linear(x, proj.weight, proj.bias)

    @staticmethod
    def backward(ctx: Any, dz: Tensor, dy: Tensor) -> tuple[Tensor | None, ...]:
        half: Half = ctx.half
        kernels = half.kernels
        w_qkv, w_proj, z, mean, rstd, p_qkv, p_proj, qkv, o, *kept = _kept(ctx)
        s_proj, sum_b_proj = kernels.thin_grad(dy, half.second.b, p_proj)
        sum_down_proj = kernels.tall_grad(_rows(o), s_proj)
        do = _heads(dy @ w_proj, half)
        qkv_heads = [_heads(part, half) for part in qkv.chunk(3, 1)]
        parts = [_rows(part) for part in half.attention.backward(do, *qkv_heads, o, *kept)]
        copy = kernels.copy_gradient and (ctx.needs_input_grad[0] or ctx.needs_input_grad[1])
        dqkv, s, d_b = kernels.gather_grad(parts, half.first.b, p_qkv, copy)
        sum_down = kernels.norm_down_grad(z, mean, rstd, half.norm, s)
        d_down, d_b_proj, d_down_proj = kernels.finish(sum_down, sum_b_proj, sum_down_proj)

        def dx() -> Tensor:
            if dqkv is not None:
                return dqkv @ w_qkv
            first, *others = zip(parts, w_qkv.chunk(3), strict=True)
            found = first[0] @ first[1]
            for part, weight in others:
                found.addmm_(part, weight)
            return found

        dz_in, dy_in = _stream_grad(ctx, dz, dx, z, mean, rstd)
        return dz_in, dy_in, d_down, d_b, d_down_proj, d_b_proj, None


class MlpHalf(torch.autograd.Function):
    """(z, y, down and B of fc1 and of fc2, Half) → (z', y')."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, y: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
        half: Half = rest[-1]
        kernels, (fc1, fc2) = half.kernels, (half.first, half.second)
        normed = kernels.norm(z, y, half.norm, fc1.down, fc1.weight.dtype)
        h = F.linear(normed.out, fc1.weight, fc1.bias)
        a, p = kernels.gelu(h, fc2.down)
        _keep(ctx, half, (normed.z, normed.mean, normed.rstd, normed.p, p, h))
        return normed.z, F.linear(a, fc2.weight, fc2.bias)

    @staticmethod
    def backward(ctx: Any, dz: Tensor, dy: Tensor) -> tuple[Tensor | None, ...]:
        half: Half = ctx.half
        kernels = half.kernels
        w1, w2, z, mean, rstd, p1, p2, h = _kept(ctx)
        s2, sum_b2 = kernels.thin_grad(dy, half.second.b, p2)
        dh, s1, d_b1, d_down2 = kernels.gelu_grad(dy @ w2, h, s2, half.first.b, p1)
        sum_down1 = kernels.norm_down_grad(z, mean, rstd, half.norm, s1)
        d_down1, d_b2 = kernels.finish(sum_down1, sum_b2)
        dz_in, dy_in = _stream_grad(ctx, dz, lambda: dh @ w1, z, mean, rstd)
        return dz_in, dy_in, d_down1, d_b1, d_down2, d_b2, None


class FinalNorm(torch.autograd.Function):
    """(z, y) → norm(z + y)."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, y: Tensor, norm: Norm, kernels: TorchKernels) -> Tensor:
        normed = kernels.norm(z, y, norm, None, y.dtype)
        ctx.save_for_backward(normed.z, normed.mean, normed.rstd)
        ctx.norm, ctx.kernels = norm, kernels
        return normed.out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        dout = dout.contiguous()
        return *ctx.kernels.norm_grad(dout, *ctx.saved_tensors, ctx.norm, None), None, None


def _heads(x: Tensor, half: Half) -> Tensor:
    """[M, K] as [images, heads, tokens, K / heads]."""
    return x.view(half.images, -1, half.heads, x.shape[1] // half.heads).transpose(1, 2)


def _rows(x: Tensor) -> Tensor:
    """The inverse of `_heads`, without a copy where the rows lie together."""
    return x.transpose(1, 2).flatten(2).flatten(0, 1)


# The model


class Stack(NamedTuple):
    """One kind of linear in all layers, in one step."""

    linears: list[Linear]
    down: Sequence[Tensor]  # [K, r] of each layer, differentiable
    b: Sequence[Tensor]  # [N, r]


class ChainedViT(nn.Module):
    """A timm ViT with adapters attached, run through the halves above.

    For blocks of LayerNorm, plain attention and GELU without LayerScale and dropout.
    """

    KINDS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")

    def __init__(self, model: Any, kernels: TorchKernels, attention: Attention) -> None:
        super().__init__()
        self.model = model
        self._kernels = kernels
        self._attention = attention
        self._frozen: dict[tuple[str, torch.dtype], tuple[Tensor, list[Tensor]]] = {}

    def forward(self, images: Tensor) -> Tensor:
        model = self.model
        x = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))
        device = images.device.type
        stream = model.cls_token.dtype
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else stream
        with torch.autocast(device, enabled=False):
            out = self._blocks(x.to(stream).flatten(0, 1), x.shape[0], dtype)
        head: Tensor = model.forward_head(out.view(x.shape))
        return head

    def _blocks(self, z: Tensor, images: int, dtype: torch.dtype) -> Tensor:
        qkv, proj, fc1, fc2 = (self._stack(kind, dtype) for kind in self.KINDS)
        y = None
        for i, block in enumerate(self.model.blocks):
            for of, norm, first, second in (
                (AttentionHalf, block.norm1, qkv, proj),
                (MlpHalf, block.norm2, fc1, fc2),
            ):
                half = Half(
                    self._kernels,
                    self._attention,
                    _norm(norm),
                    first.linears[i],
                    second.linears[i],
                    images,
                    block.attn.num_heads,
                )
                z, y = of.apply(z, y, first.down[i], first.b[i], second.down[i], second.b[i], half)
        out: Tensor = FinalNorm.apply(z, y, _norm(self.model.norm), self._kernels)
        return out

    def _stack(self, kind: str, dtype: torch.dtype) -> Stack:
        layers: list[FusedEFFTLinear] = [b.get_submodule(kind) for b in self.model.blocks]
        down, b = stacked_factors(layers[0]._bank[0], [layer._site for layer in layers])
        down_low, b_low = (t.detach().to(dtype).contiguous() for t in (down, b))
        weight, biases = self._frozen_of(kind, layers, dtype)
        merged = self._kernels.merge(weight, b_low, down_low)
        linears = [Linear(*own) for own in zip(merged, biases, down_low, b_low, strict=True)]
        return Stack(linears, down.unbind(), b.unbind())

    def _frozen_of(
        self, kind: str, layers: Sequence[nn.Linear], dtype: torch.dtype
    ) -> tuple[Tensor, list[Tensor]]:
        """The frozen weights in `dtype`, in one stack, and biases; made once."""
        if (kind, dtype) not in self._frozen:
            weight = torch.stack([layer.weight.detach().to(dtype) for layer in layers])
            self._frozen[kind, dtype] = weight, [layer.bias.detach().to(dtype) for layer in layers]
        return self._frozen[kind, dtype]


def _norm(module: Any) -> Norm:
    return Norm(module.weight, module.bias, module.eps)


def stacked_factors(bank: FactorBank, sites: Sequence[str]) -> tuple[Tensor, Tensor]:
    """(down [L, K, r], B [L, N, r]) of sites of one kind, differentiable, in a few launches."""
    group = bank.group(sites[0])
    if isinstance(group, LoRAGroup) and group.slices == 1:
        groups: list[Any] = [bank.group(site) for site in sites]
        return torch.cat([g.A for g in groups]).mT, torch.cat([g.B for g in groups]) * group.scale
    if not isinstance(group, TensorTrainGroup):
        factors = [bank.group(site).factors(site, False) for site in sites]
        downs, folds = zip(*((f.down, fold(f.core, f.up)) for f in factors), strict=True)
        return torch.stack(downs), torch.stack(folds)
    places = [group.placements[site] for site in sites]
    place = places[0]
    cores = torch.stack([group.cores(p.first_core, p.slices) for p in places])  # [L, G, r1, r2]
    if group._scaled:
        cores = cores * group.scale
    u, v = group.U[slice(*place.u_rows)], group.V
    if place.stacked == "in":
        whole, sliced = v, torch.matmul(u, cores)
    elif place.u_side == "in":
        whole, sliced = u, torch.matmul(v, cores.mT)
    else:
        whole, sliced = v, torch.matmul(u, cores)
    shared, own = whole.expand(len(sites), -1, -1), sliced.flatten(1, 2)
    return (own, shared) if place.stacked == "in" else (shared, own)
