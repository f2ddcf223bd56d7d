"""Transformer-probing."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from .base import Baseline, Part
from .registry import register_baseline
from .vision_transformer import vit_blocks


class ExtraBlock(Part):
    """A block like `block`, with weights of its own, initialised as timm does it."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = copy.deepcopy(block).requires_grad_(True)
        for module in self.block.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif callable(reset := getattr(module, "reset_parameters", None)):
                reset()

    def after(self, module: nn.Module, args: tuple[Any, ...], x: Tensor) -> Tensor:
        """What this block makes of the last one's output."""
        return self.block(self.like(x)).to(x.dtype)  # type: ignore[no-any-return]


@register_baseline
@dataclass(frozen=True)
class TransformerProbing(Baseline):
    """One more block after the frozen ones, before the final norm (KAdaptation, section 5.1).

    7,087,872 parameters at ViT-B/16's width; the paper prints CLIP's number for both models.
    """

    name: ClassVar[str] = "transformer_probing"

    def build(self, model: nn.Module, outside: Sequence[str]) -> dict[str, Part]:
        return {"extra": ExtraBlock(vit_blocks(model, self.name)[-1])}

    def connect(self, model: nn.Module, parts: Mapping[str, Any]) -> None:
        model.blocks[-1].register_forward_hook(parts["extra"].after)  # type: ignore[index, operator, union-attr]
