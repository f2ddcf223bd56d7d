"""Chained blocks in plain torch: the model that the plain formula computes, gradients included."""

from __future__ import annotations

import copy

import pytest
import torch

from benchmarks import peers
from benchmarks.gpu.chain import ATTENTION, ChainedViT, TorchKernels
from benchmarks.whole_model import results

RANK = 3


@pytest.fixture
def base(make_vit):
    model = make_vit(embed_dim=24).requires_grad_(False)
    model.head.requires_grad_()
    return model.double()


@pytest.mark.parametrize("copy_gradient", [True, False], ids=["copied", "apart"])
@pytest.mark.parametrize("method", ["EFFT2", "EFFT1", "FacT-TT", "LoRA"])
def test_equals_the_plain_formula(method, copy_gradient, base):
    batch = torch.randn(2, 3, 8, 8, dtype=torch.float64), torch.tensor([1, 3])
    plain = peers.build(method, copy.deepcopy(base), RANK, formula=peers.factored)
    peer = peers.build(method, base, RANK)
    kernels = TorchKernels()
    kernels.copy_gradient = copy_gradient
    peer.model = ChainedViT(peer.model, kernels, ATTENTION["cpu"])
    for found, expected in zip(
        results(peer, *batch, None), results(plain, *batch, None), strict=True
    ):
        torch.testing.assert_close(found, expected)
