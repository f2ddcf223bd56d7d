"""Loading the factors of a file on a model with a head of its own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from efft_kernels import load


@pytest.mark.parametrize("outputs", [5, 9])
def test_the_models_own_head_stays(adapted, make_vit, tmp_path, outputs):
    model, adapter = adapted()
    adapter.save(tmp_path / "a")
    fresh = make_vit().eval()
    fresh.head = nn.Linear(12, outputs)
    own = fresh.head.weight.detach().clone()
    loaded = load(fresh, tmp_path / "a", keep_head=True)
    assert torch.equal(fresh.head.weight, own) and fresh.head.weight.requires_grad
    assert loaded.modules_to_train == ("head",)
    images = torch.randn(2, 3, 8, 8)
    expected, found = (
        m.forward_head(m.forward_features(images), pre_logits=True) for m in (model, fresh)
    )
    torch.testing.assert_close(found, expected)


def test_the_rest_is_checked_all_the_same(adapted, make_vit, tmp_path):
    _, adapter = adapted()
    adapter.save(tmp_path / "a")
    fresh = make_vit()
    fresh.head = nn.Linear(12, 9)
    with pytest.raises(ValueError, match="pass keep_head=True to load the factors alone"):
        load(fresh, tmp_path / "a")
    fresh.blocks[0].mlp.fc1 = nn.Linear(12, 24)
    with pytest.raises(ValueError, match=r"fc1.weight expected \[48, 12\], got \[24, 12\]"):
        load(fresh, tmp_path / "a", keep_head=True)
    del fresh.head
    with pytest.raises(ValueError, match=r"fc1.weight expected \[48, 12\], got \[24, 12\]"):
        load(fresh, tmp_path / "a", keep_head=True)
    assert type(fresh.blocks[0].attn.qkv) is nn.Linear


def test_a_feature_extractor_takes_the_factors(adapted, make_vit, tmp_path):
    model, adapter = adapted()
    adapter.save(tmp_path / "a")
    fresh = make_vit().eval()
    fresh.reset_classifier(0)
    with pytest.raises(ValueError, match="pass keep_head=True to load the factors alone"):
        load(fresh, tmp_path / "a")
    loaded = load(fresh, tmp_path / "a", keep_head=True)
    assert loaded.modules_to_train == ()
    images = torch.randn(2, 3, 8, 8)
    expected = model.forward_head(model.forward_features(images), pre_logits=True)
    torch.testing.assert_close(fresh(images), expected)
    loaded.save(tmp_path / "b")
    loaded.detach()
    load(fresh, tmp_path / "b")
