"""Each baseline's output against its paper's formula, written out over timm's blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, gelu, linear, relu

from efft_kernels.baselines import (
    NOAH,
    SSF,
    AdapterDrop,
    AdapterTuning,
    AdaptFormer,
    AttachedBaseline,
    Baseline,
    BitFit,
    Compacter,
    LePETuning,
    LoRAFix,
    RPBTuning,
    TransformerProbing,
    VPTDeep,
    VPTShallow,
    attach_baseline,
)

Moved = Callable[..., AttachedBaseline]
PREFIX, GRID, HEADS = 1, 2, 3


@pytest.fixture
def vit(make_vit: Callable[..., nn.Module]) -> Any:
    return make_vit(dtype=torch.float64).eval()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(5, 3, 8, 8, dtype=torch.float64)


@pytest.fixture
def parts(vit: Any, moved: Moved) -> Callable[[Baseline], Any]:
    """Puts a baseline on the model; its parts by name."""

    def attach(baseline: Baseline) -> Any:
        return moved(vit, baseline, modules_to_train=()).record.parts

    return attach


def written_out(vit: Any, images: Tensor, parts: Any, **changes: Callable[..., Tensor]) -> Tensor:
    """The forward of a plain ViT with what `changes` puts in; the model's hooks do not run."""
    nothing: Callable[..., Tensor] = lambda part, x, *_: x  # noqa: E731
    tokens = vit._pos_embed(vit.patch_embed.proj.forward(images).flatten(2).mT)
    for i, block in enumerate(vit.blocks):
        tokens = changes.get("before", nothing)(i, tokens)
        x = block.norm1.forward(tokens)
        qkv = block.attn.qkv.forward(x)
        qkv = changes.get("qkv", nothing)(i, qkv, x)
        q, k, v = (each.unflatten(2, (HEADS, -1)).transpose(1, 2) for each in qkv.chunk(3, dim=2))
        scores = q @ k.mT / q.shape[-1] ** 0.5
        mixed = changes.get("scores", nothing)(i, scores).softmax(dim=-1) @ v
        mixed = mixed.transpose(1, 2).flatten(2)
        mixed = changes.get("mixed", nothing)(i, mixed, qkv)
        attended = block.attn.proj.forward(mixed)
        tokens = tokens + changes.get("attended", nothing)(i, attended)
        fed = block.mlp.fc2.forward(gelu(block.mlp.fc1.forward(block.norm2.forward(tokens))))
        tokens = tokens + changes.get("fed", nothing)(i, fed, tokens)
    tokens = changes.get("end", nothing)(len(vit.blocks), tokens)
    return vit.head(vit.norm.forward(tokens)[:, 0])


def bottleneck(part: Any, x: Tensor, activation: Callable[[Tensor], Tensor] = gelu) -> Tensor:
    hidden = activation(x @ part.down.weight.mT + part.down.bias)
    return hidden @ part.up.weight.mT + part.up.bias


def test_nothing_changed(vit: Any, images: Tensor) -> None:
    torch.testing.assert_close(vit(images), written_out(vit, images, {}))


def test_adapter(vit: Any, images: Tensor, parts: Any) -> None:
    own = parts(AdapterTuning(hidden=5, after="both"))

    def after(branch: str) -> Callable[..., Tensor]:
        return lambda i, x, *_: x + bottleneck(own[f"blocks_{i}_{branch}"], x)

    expected = written_out(vit, images, own, attended=after("attn"), fed=after("mlp"))
    torch.testing.assert_close(vit(images), expected)


def test_adapterdrop(vit: Any, images: Tensor, parts: Any) -> None:
    (part,) = parts(AdapterDrop(hidden=5)).values()
    expected = written_out(
        vit, images, part, fed=lambda i, x, *_: x + bottleneck(part, x) if i == 1 else x
    )
    torch.testing.assert_close(vit(images), expected)


def test_adaptformer(vit: Any, images: Tensor, parts: Any) -> None:
    own = list(parts(AdaptFormer(hidden=5, scale=0.7)).values())
    expected = written_out(
        vit, images, own, fed=lambda i, fed, x: fed + 0.7 * bottleneck(own[i], x, relu)
    )
    torch.testing.assert_close(vit(images), expected)


def test_compacter(vit: Any, images: Tensor, parts: Any) -> None:
    own = parts(Compacter(hidden=8, products=2, after="ffn"))
    shared = {id(part.down.A) for part in own.values()} | {id(p.up.A) for p in own.values()}
    assert len(shared) == 1

    def layer(part: Any, x: Tensor) -> Tensor:
        pairs = zip(part.A, part.u @ part.v, strict=True)
        return x @ sum(torch.kron(a, b) for a, b in pairs) + part.bias

    def after(i: int, x: Tensor, *_: Tensor) -> Tensor:
        part = own[f"blocks_{i}_mlp"]
        return x + layer(part.up, gelu(layer(part.down, x)))

    torch.testing.assert_close(vit(images), written_out(vit, images, own, fed=after))


@pytest.mark.parametrize("kind", [VPTShallow, VPTDeep])
def test_vpt(vit: Any, images: Tensor, parts: Any, kind: Any) -> None:
    own = list(parts(kind(prompts=3)).values())

    def before(i: int, x: Tensor) -> Tensor:
        if i > 0 and kind is VPTShallow:
            return x
        old = x if i == 0 else x[:, : PREFIX + GRID**2]
        return torch.cat([old, own[i].prompts.expand(len(x), -1, -1)], dim=1)  # at the other end

    torch.testing.assert_close(vit(images), written_out(vit, images, own, before=before))


def test_prompts_are_dropped_in_training_alone(vit: Any, images: Tensor) -> None:
    attach_baseline(vit, VPTDeep(prompts=3, dropout=0.5))
    assert torch.equal(vit(images), vit(images))
    assert not torch.equal(vit.train()(images), vit(images))


def test_lora_fix(vit: Any, images: Tensor, parts: Any) -> None:
    own = list(parts(LoRAFix(rank=2, scale=3.0)).values())

    def adapted(i: int, qkv: Tensor, x: Tensor) -> Tensor:
        a, b = own[i].group.A, own[i].group.B
        assert not a.requires_grad and b.requires_grad
        q, v = (3.0 * linear(linear(x, a[j]), b[j]) for j in range(2))
        return qkv + torch.cat([q, torch.zeros_like(q), v], dim=2)

    torch.testing.assert_close(vit(images), written_out(vit, images, own, qkv=adapted))


def test_transformer_probing(vit: Any, images: Tensor, parts: Any) -> None:
    own = parts(TransformerProbing())
    extra = own["extra"].block
    assert not torch.equal(extra.attn.qkv.weight, vit.blocks[-1].attn.qkv.weight)
    expected = written_out(vit, images, own, end=lambda i, x: extra(x))
    torch.testing.assert_close(vit(images), expected)


def test_lepe(vit: Any, images: Tensor, parts: Any) -> None:
    own = list(parts(LePETuning()).values())

    def added(i: int, mixed: Tensor, qkv: Tensor) -> Tensor:
        v = qkv.chunk(3, dim=2)[2][:, PREFIX:].mT.unflatten(2, (GRID, GRID))
        encoded = conv2d(v, own[i].conv.weight, own[i].conv.bias, padding=1, groups=v.shape[1])
        return torch.cat([mixed[:, :PREFIX], mixed[:, PREFIX:] + encoded.flatten(2).mT], dim=1)

    torch.testing.assert_close(vit(images), written_out(vit, images, own, mixed=added))


@pytest.mark.parametrize("fused", [True, False])
def test_rpb(vit: Any, images: Tensor, parts: Any, fused: bool) -> None:
    own = list(parts(RPBTuning()).values())
    for block in vit.blocks:
        block.attn.fused_attn = fused

    def biased(i: int, scores: Tensor) -> Tensor:
        table = own[i].bias.relative_position_bias_table
        scores = scores.clone()
        for one in range(GRID**2):
            for other in range(GRID**2):
                (y, x), (v, u) = divmod(one, GRID), divmod(other, GRID)
                row = (y - v + GRID - 1) * (2 * GRID - 1) + x - u + GRID - 1
                scores[:, :, PREFIX + one, PREFIX + other] += table[row]
        return scores

    torch.testing.assert_close(vit(images), written_out(vit, images, own, scores=biased))


def test_rpb_beside_a_mask(vit: Any, images: Tensor, parts: Any) -> None:
    parts(RPBTuning())
    mask = torch.rand(5, 5) > 0.3
    mask.fill_diagonal_(True)
    added = torch.zeros(5, 5, dtype=torch.float64).masked_fill(~mask, float("-inf"))
    by_bool, by_float = (
        vit.forward_features(images, attn_mask=each[None, None]) for each in (mask, added)
    )
    torch.testing.assert_close(by_bool, by_float)
    assert not torch.equal(by_bool, vit.forward_features(images))


def test_ssf_is_the_model_with_scaled_weights(vit: Any, images: Tensor, parts: Any) -> None:
    own = parts(SSF())
    adapted = vit(images)
    modules = {name.replace(".", "_"): module for name, module in vit.named_modules()}
    assert len(own) == 2 + 6 * len(vit.blocks)
    with torch.no_grad():
        for name, part in own.items():
            weight, bias = modules[name].weight, modules[name].bias
            weight.copy_(torch.einsum("i,i...->i...", part.scale, weight))
            bias.copy_(part.scale * bias + part.shift)
    torch.testing.assert_close(written_out(vit, images, own), adapted)


def test_noah(make_vit: Any, images: Tensor, moved: Moved) -> None:
    vit: Any = make_vit(dtype=torch.float64, depth=12).eval()
    own: Any = moved(vit, NOAH(subnet="dtd"), modules_to_train=()).record.parts
    assert [len(own[f"prompts_{i}"].prompts) for i in range(3)] == [10, 5, 1]

    def before(i: int, x: Tensor) -> Tensor:
        image = torch.cat([x[:, : PREFIX + GRID**2], x[:, :0]], dim=1)
        return torch.cat([image, own[f"prompts_{i}"].prompts.expand(len(x), -1, -1)], dim=1)

    def qkv(i: int, y: Tensor, x: Tensor) -> Tensor:
        group = own[f"lora_{i}"].group
        return y + linear(linear(x, group.A[0]), group.B[0])

    def fed(i: int, x: Tensor, _: Tensor) -> Tensor:
        return x + bottleneck(own[f"blocks_{i}_mlp"], x)

    expected = written_out(vit, images, own, before=before, qkv=qkv, fed=fed)
    torch.testing.assert_close(vit(images), expected)


def test_starts_where_the_papers_start(vit: Any, images: Tensor) -> None:
    plain = vit(images)
    for baseline in (BitFit(), AdaptFormer(), LoRAFix(rank=2), LePETuning(), RPBTuning()):
        attach_baseline(vit, baseline)
        torch.testing.assert_close(vit(images), plain, msg=baseline.name)
        vit_again = AttachedBaseline(vit).detach()
        assert torch.equal(vit_again(images), plain)


@pytest.mark.parametrize("name", ["lepe", "rpb"])
def test_the_last_block_s_positions_reach_patches_only(vit: Any, images: Tensor, name: str) -> None:
    handle = attach_baseline(vit, {"lepe": LePETuning(), "rpb": RPBTuning()}[name])
    vit(images).sum().backward()
    first, last = (
        [p.grad for p in handle.record.parts[f"blocks_{i}"].parameters()] for i in (0, 1)
    )
    assert all(gradient.abs().max() > 0 for gradient in first)  # type: ignore[union-attr]
    assert all(gradient.abs().max() == 0 for gradient in last)  # type: ignore[union-attr]
