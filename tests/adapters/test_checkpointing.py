"""Activation checkpointing that keeps some results, and in compiled graphs of any batch size."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from efft_kernels import EFFT2, KAdaptation, LoRA, attach, use_backend

PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.linear.default}


def keep_products(ctx, op, *args, **kwargs):
    return CheckpointPolicy.MUST_SAVE if op in PRODUCTS else CheckpointPolicy.PREFER_RECOMPUTE


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("method", [LoRA(rank=2), EFFT2(rank=2, dropout=0.0)], ids=lambda m: m.name)
def test_kept_products_are_not_written_to(randomize, method, backend):
    """With q, k and v apart, so that they share x·down."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        image_size=8,
        patch_size=4,
    )
    model = transformers.ViTModel(config, add_pooling_layer=False).double().eval()
    adapter = attach(model, method, modules_to_train=())
    randomize(adapter)
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)

    def gradients():
        with use_backend(backend):
            y = model(pixel_values=images).last_hidden_state
            return torch.autograd.grad(y.tanh().sum(), list(adapter.parameters()))

    expected = gradients()
    for layer in model.layers:
        layer.forward = partial(
            checkpoint,
            layer.forward,
            use_reentrant=False,
            context_fn=partial(create_selective_checkpoint_contexts, keep_products),
        )
    for found, wanted in zip(gradients(), expected, strict=True):
        assert wanted.norm() > 0
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    "method",
    [EFFT2(rank=2, dropout=0.3), KAdaptation(products=2, scale=0.7)],
    ids=lambda method: method.name,
)
def test_compiled_for_any_batch_size(make_vit, randomize, method):
    """Two checkpointed blocks use one group's numbers, its scale and rate of dropout."""
    model = make_vit()
    randomize(attach(model, method, strict=True))
    model.set_grad_checkpointing(True)
    compiled = torch.compile(model.train(), backend="eager", dynamic=True)
    for batch in (2, 3):
        compiled(torch.randn(batch, 3, 8, 8)).sum().backward()
        assert all(p.grad.norm() > 0 for p in model.factor_bank.parameters())
