"""What the interop tests share: every method, a Swin, and a model's outputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from efft_kernels import EFFT1, EFFT2, FacTTK, FacTTT, KAdaptation, LoRA
from efft_kernels.methods import METHODS, Method

IMAGES = torch.linspace(-1, 1, 768).view(4, 3, 8, 8)
EVERY_METHOD: list[Method] = [
    EFFT1(rank=3, scale=0.7),
    EFFT1(rank=(4, 3), scale=0.7, learn_scale=True),
    EFFT1(rank=(3, 2), scale=0.7, attention_side="in"),
    EFFT2(rank=3, scale=0.7, ffn_init="u", factor_init="release"),
    EFFT2(rank=(5, 3), ffn_rank=2, init="u", cores="shared"),
    FacTTT(rank=3, scale=0.7),
    FacTTK(rank=3, scale=0.7, layer_rank=2),
    LoRA(rank=3, scale=0.7),
    LoRA(rank=2, matrices=None),
    KAdaptation(products=2, rank=1, scale=0.7),
]
assert {method.name for method in EVERY_METHOD} >= set(METHODS), "a method without a case here"


@pytest.fixture(params=EVERY_METHOD, ids=repr)
def method(request: pytest.FixtureRequest) -> Any:
    """Each method, some with several configurations."""
    return request.param


@pytest.fixture
def make_swin() -> Callable[..., nn.Module]:
    """A timm Swin of two stages, 8 and 16 wide."""

    def make(dtype: torch.dtype = torch.float32) -> nn.Module:
        from timm.models.swin_transformer import SwinTransformer

        torch.manual_seed(7)
        model = SwinTransformer(
            img_size=16,
            patch_size=2,
            embed_dim=8,
            depths=(2, 2),
            num_heads=(2, 4),
            window_size=4,
            num_classes=5,
        )
        return model.to(dtype).eval()

    return make


@pytest.fixture
def outputs() -> Callable[..., Tensor]:
    """A model's logits for images, which are cast to its dtype."""

    @torch.no_grad()
    def run(model: nn.Module, images: Tensor = IMAGES) -> Tensor:
        out = model(images.to(next(model.parameters()).dtype))
        return out.logits if hasattr(out, "logits") else out

    return run
