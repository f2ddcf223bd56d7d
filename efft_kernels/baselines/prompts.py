"""Visual Prompt Tuning (arXiv:2203.12119), as FacT writes it: X ← [X, P]."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout

from ..methods.base import check_number, constant_float
from .base import Baseline, Part, check_count
from .registry import register_baseline
from .vision_transformer import vit_blocks


class Prompts(Part):
    """Prompts [l, d] that a block finds between the prefix (class) tokens and the patches.

    Args:
        model: timm's VisionTransformer.
        count: l.
        previous: how many the block's input carries already, which these replace.
        rate: dropout on the prompts, in training.
    """

    rate = constant_float("rate")

    def __init__(self, model: Any, count: int, previous: int, rate: float) -> None:
        super().__init__()
        self.prefix, self.previous, self.rate = model.num_prefix_tokens, previous, rate
        d = model.embed_dim
        area = math.prod(model.patch_embed.patch_size)
        self.prompts = nn.Parameter(torch.empty(count, d))
        bound = math.sqrt(6 / (3 * area + d))  # as the release's
        nn.init.uniform_(self.prompts, -bound, bound)

    def put(self, block: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Before a block: its input [B, T, d] with these prompts."""
        x, *rest = args
        prompts = dropout(self.prompts, self.rate, self.training).to(x.dtype)
        prompts = prompts.expand(len(x), -1, -1)
        kept = x[:, : self.prefix], prompts, x[:, self.prefix + self.previous :]
        return torch.cat(kept, dim=1), *rest

    def take(self, block: nn.Module, args: tuple[Any, ...], x: Tensor) -> Tensor:
        """After the last block: its output without them, so that any pooling sees the image."""
        kept = x[:, : self.prefix], x[:, self.prefix + len(self.prompts) :]
        return torch.cat(kept, dim=1)


def connect_prompts(blocks: Sequence[Any], prompts: Sequence[Prompts]) -> None:
    """Put the prompts before the first blocks, one for each, and take the last out at the end."""
    for block, part in zip(blocks, prompts, strict=False):
        block.register_forward_pre_hook(part.put)
    blocks[-1].register_forward_hook(prompts[-1].take)


@dataclass(frozen=True)
class _VPT(Baseline):
    prompts: int = 8
    dropout: float = 0.1

    def __post_init__(self) -> None:
        check_count("prompts", self.prompts)
        check_number("dropout", self.dropout, low=0, below=1)

    def connect(self, model: nn.Module, parts: Mapping[str, Any]) -> None:
        connect_prompts(list(model.blocks), list(parts.values()))  # type: ignore[arg-type]


@register_baseline
@dataclass(frozen=True)
class VPTShallow(_VPT):
    """X ← [X, P] before the first block, P carried on to the last: l·d parameters.

    The papers' 0.063 M is a mean over the lengths that VPT chose for each task of VTAB-1k.

    Attributes:
        prompts: l, how many at a time. 8 is what FacT's few-shot experiments take.
        dropout: on P, in training; the release has none.
    """

    dropout: float = 0.0

    name: ClassVar[str] = "vpt_shallow"

    def build(self, model: nn.Module, outside: Sequence[str]) -> dict[str, Part]:
        vit_blocks(model, self.name)
        return {"first": Prompts(model, self.prompts, 0, self.dropout)}


@register_baseline
@dataclass(frozen=True)
class VPTDeep(_VPT):
    """X ← [X, P_i] before every block i, each P_i dropped after it: L·l·d parameters.

    The papers' 0.531 M is a mean over the lengths that VPT chose for each task of VTAB-1k.

    Attributes:
        prompts: l, how many at a time. 8 is what FacT's few-shot experiments take.
        dropout: on the P_i, in training; 0.1 is the release's and NOAH's.
    """

    name: ClassVar[str] = "vpt_deep"

    def build(self, model: nn.Module, outside: Sequence[str]) -> dict[str, Part]:
        return {
            f"blocks_{i}": Prompts(model, self.prompts, self.prompts if i else 0, self.dropout)
            for i, _ in enumerate(vit_blocks(model, self.name))
        }
