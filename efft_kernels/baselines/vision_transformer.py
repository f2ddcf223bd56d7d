"""What the baselines that reach into a model ask of it: timm's VisionTransformer."""

from __future__ import annotations

from typing import Any

from torch import nn


def vit_blocks(model: nn.Module, baseline: str, *, attention: bool = False) -> list[Any]:
    """The blocks of a timm VisionTransformer.

    Args:
        model: the model.
        baseline: for the error's text.
        attention: the blocks' attentions are hooked inside, on a grid of patches of one size.

    Raises:
        TypeError: another model, or blocks or attentions of another kind.
        ValueError: a grid that changes from image to image.
    """
    from timm.layers import Attention
    from timm.models.vision_transformer import Block, VisionTransformer

    if not isinstance(model, VisionTransformer):
        raise TypeError(
            f"model must be timm's VisionTransformer for {baseline}, got {type(model).__name__} of"
            f" {type(model).__module__}; linear, full, bitfit, layernorm, attention and lora_fix"
            " take other models too"
        )
    blocks: list[Any] = list(model.blocks)
    for block in blocks:
        if not isinstance(block, Block):
            raise TypeError(
                f"model.blocks must be timm's Block for {baseline}, got {type(block).__name__}"
            )
        if attention and not (
            isinstance(block.attn, Attention) and isinstance(block.attn.qkv, nn.Linear)
        ):
            raise TypeError(
                f"model.blocks must have timm's Attention for {baseline}, got"
                f" {type(block.attn).__name__}"
            )
    if attention and (model.dynamic_img_size or not isinstance(model.patch_drop, nn.Identity)):
        raise ValueError(
            f"model must keep one grid of patches for {baseline}: build it without"
            " dynamic_img_size and patch_drop_rate"
        )
    return blocks
