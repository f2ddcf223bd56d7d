"""Positions inside the attention: LePE and RPB tuning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from .base import Baseline, Part
from .registry import register_baseline
from .vision_transformer import vit_blocks


class LocalEncoding(Part):
    """DWConv(V) of one attention: 3×3 and a bias for each channel, zero at the start.

    Args:
        model: timm's VisionTransformer.
        attention: one of its attentions.
    """

    def __init__(self, model: Any, attention: Any) -> None:
        super().__init__()
        self.prefix, self.grid = model.num_prefix_tokens, tuple(model.patch_embed.grid_size)
        channels = self.channels = attention.qkv.out_features // 3
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        nn.init.zeros_(self.conv.weight)
        nn.init.zeros_(self.conv.bias)  # type: ignore[arg-type]
        self.waiting: Tensor | None = None

    def start(self, qkv: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        """After qkv: DWConv of V's patches, kept until attention has run."""
        v = output[:, self.prefix :, -self.channels :]
        encoded = self.conv(self.like(v).mT.unflatten(2, self.grid)).flatten(2).mT
        self.waiting = F.pad(encoded, (0, 0, self.prefix, 0)).to(output.dtype)

    def end(self, proj: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor] | None:
        """Before proj: what was kept is added; the class token gets none."""
        waiting, self.waiting = self.waiting, None
        return None if waiting is None else (args[0] + waiting,)


@register_baseline
@dataclass(frozen=True)
class LePETuning(Baseline):
    """softmax(QKᵀ/√d)·V + DWConv(V), only the convolutions train (KAdaptation, Eq. 5).

    10·L·d parameters; on ViT-B/16: 92,160. They start at zero, where the model is the pretrained
    one; the paper does not say. Where the class token alone is read, the last block's get no
    gradient: they change the patches' outputs only.
    """

    name: ClassVar[str] = "lepe"

    def build(self, model: nn.Module, outside: Sequence[str]) -> dict[str, Part]:
        blocks = vit_blocks(model, self.name, attention=True)
        return {f"blocks_{i}": LocalEncoding(model, block.attn) for i, block in enumerate(blocks)}

    def connect(self, model: nn.Module, parts: Mapping[str, Any]) -> None:
        blocks: Any = model.blocks
        for block, part in zip(blocks, parts.values(), strict=True):
            block.attn.qkv.register_forward_hook(part.start)
            block.attn.proj.register_forward_pre_hook(part.end)


class PositionBias(Part):
    """B of one attention: a number for each head and offset between two patches, by timm's table.

    Args:
        model: timm's VisionTransformer.
        attention: one of its attentions.
    """

    def __init__(self, model: Any, attention: Any) -> None:
        from timm.layers import RelPosBias

        super().__init__()
        self.prefix = model.num_prefix_tokens
        self.bias = RelPosBias(tuple(model.patch_embed.grid_size), attention.num_heads)
        nn.init.zeros_(self.bias.relative_position_bias_table)

    def before(
        self, attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Before attention: B as its additive mask [1, heads, T, T]; the class token gets none."""
        x = args[0]
        bias = F.pad(self.bias.get_bias(), (self.prefix, 0, self.prefix, 0)).to(x.dtype)
        given = kwargs.get("attn_mask")
        if given is not None and given.dtype.is_floating_point:
            bias = bias + given
        elif given is not None:
            bias = bias.masked_fill(~given, float("-inf"))
        return args, {**kwargs, "attn_mask": bias}


@register_baseline
@dataclass(frozen=True)
class RPBTuning(Baseline):
    """softmax(QKᵀ/√d + B)·V, only the biases B train (KAdaptation, Eq. 6).

    L·heads·(2H - 1)(2W - 1) parameters on a grid of H×W patches; on ViT-B/16: 104,976. They start
    at zero, where the model is the pretrained one; the paper does not say. Where the class token
    alone is read, the last block's get no gradient: they change the patches' outputs only.
    """

    name: ClassVar[str] = "rpb"

    def build(self, model: nn.Module, outside: Sequence[str]) -> dict[str, Part]:
        blocks = vit_blocks(model, self.name, attention=True)
        return {f"blocks_{i}": PositionBias(model, block.attn) for i, block in enumerate(blocks)}

    def connect(self, model: nn.Module, parts: Mapping[str, Any]) -> None:
        blocks: Any = model.blocks
        for block, part in zip(blocks, parts.values(), strict=True):
            block.attn.register_forward_pre_hook(part.before, with_kwargs=True)
