"""SSF: scaling and shifting what every operation puts out (arXiv:2210.08823)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..adapters.architectures import classifier_names
from ..adapters.attachment import is_inside
from .base import Baseline, Part, part_name
from .registry import register_baseline

_OPERATIONS = (nn.Linear, nn.LayerNorm, nn.Conv2d)


class ScaleShift(Part):
    """γ ⊙ y + β over the channels of y, γ from N(1, 0.02²), β from N(0, 0.02²).

    Args:
        channels: of y, its last dimension, or of images the second.
        images: y is [B, C, H, W].
    """

    def __init__(self, channels: int, images: bool) -> None:
        super().__init__()
        self.images = images
        self.scale = nn.Parameter(1 + 0.02 * torch.randn(channels))
        self.shift = nn.Parameter(0.02 * torch.randn(channels))

    def after(self, module: nn.Module, args: tuple[Any, ...], y: Tensor) -> Tensor:
        """The module's output, scaled and shifted."""
        if self.folded:
            return y
        shape = (-1, 1, 1) if self.images else (-1,)
        return (y * self.scale.view(shape) + self.shift.view(shape)).to(y.dtype)


@register_baseline
@dataclass(frozen=True)
class SSF(Baseline):
    """y ← γ ⊙ y + β after every linear, LayerNorm and patch convolution (arXiv:2210.08823).

    205,824 parameters of ViT-B/16; the papers' 0.24 M counts the head as well, on average 38,045.
    It merges: W ← γ ⊙ W, b ← γ ⊙ b + β. Takes timm's VisionTransformer and
    SwinTransformer.
    """

    name: ClassVar[str] = "ssf"

    def build(self, model: nn.Module, outside: Sequence[str]) -> dict[str, Part]:
        from timm.models.swin_transformer import SwinTransformer
        from timm.models.vision_transformer import VisionTransformer

        if not isinstance(model, VisionTransformer | SwinTransformer):
            raise TypeError(
                "model must be timm's VisionTransformer or SwinTransformer for ssf, got"
                f" {type(model).__name__}"
            )
        operations = _operations(model, [*outside, *classifier_names(model)])
        return {
            part_name(name): ScaleShift(_channels(module), isinstance(module, nn.Conv2d))
            for name, module in operations.items()
        }

    def connect(self, model: nn.Module, parts: Mapping[str, Any]) -> None:
        for name, module in _operations(model, ()).items():
            if (part := parts.get(part_name(name))) is not None:
                module.register_forward_hook(part.after)

    def folded(self, model: nn.Module, parts: Mapping[str, Any]) -> dict[str, Tensor]:
        values: dict[str, Tensor] = {}
        for name, module in _operations(model, ()).items():
            if (part := parts.get(part_name(name))) is None:
                continue
            scale, shift = part.scale, part.shift
            weight = scale.new_ones(len(scale)) if module.weight is None else module.weight
            rows = scale.view(-1, *[1] * (weight.dim() - 1))
            values[f"{name}.weight"] = rows * weight
            values[f"{name}.bias"] = shift if module.bias is None else scale * module.bias + shift
        return values


def _operations(model: nn.Module, outside: Sequence[str]) -> dict[str, Any]:
    """The model's linears, norms and convolutions, without those of its parts and `outside`."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _OPERATIONS) and not is_inside(f"{name}.", outside)
    }


def _channels(module: Any) -> int:
    if isinstance(module, nn.LayerNorm):
        return module.normalized_shape[-1]
    return module.out_features if isinstance(module, nn.Linear) else module.out_channels
