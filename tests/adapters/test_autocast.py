"""Every method on a model under autocast: its factors are made in their own dtype."""

from __future__ import annotations

import pytest
import torch

from efft_kernels import EFFT1, EFFT2, FacTTK, FacTTT, KAdaptation, LoRA, attach
from efft_kernels.testing.error_budget import relative_error

timm = pytest.importorskip("timm")

METHODS = [
    EFFT1(rank=4, scale=1.0, dropout=0.0),
    EFFT2(rank=4, scale=1.0, dropout=0.0),
    EFFT2(rank=4, scale=1.0),
    FacTTT(rank=4, scale=1.0, dropout=0.0),
    FacTTT(rank=4, scale=1.0),
    FacTTK(rank=4, scale=1.0, dropout=0.0),
    FacTTK(rank=4, scale=1.0),
    LoRA(rank=4, scale=1.0, matrices=None),
    KAdaptation(products=4, rank=1),
]


@pytest.mark.parametrize("whole", [True, False], ids=["model", "forward_features"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_training_step(method, dtype, whole):
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, num_classes=3, depth=2, embed_dim=48, num_heads=3
    )
    adapter = attach(model, method)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    forward = model if whole else model.forward_features
    images = torch.randn(2, 3, 32, 32)

    def gradients(enabled: bool) -> torch.Tensor:
        torch.manual_seed(1)  # the masks of dropout
        model.zero_grad()
        with torch.autocast("cpu", dtype, enabled=enabled):
            y = forward(images)
        y.float().square().sum().backward()
        found = dict(adapter.named_parameters())
        assert all(p.grad is not None and p.grad.dtype == p.dtype for p in found.values())
        return torch.cat([p.grad.flatten() for p in found.values()])

    exact = gradients(False)
    assert exact.abs().max() > 0
    assert relative_error(gradients(True), exact) < 0.05
