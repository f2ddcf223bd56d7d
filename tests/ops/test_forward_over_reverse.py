"""Forward-mode derivatives of a backward: a dY with a tangent, by dual tensors and by torch.func.

The gradients are linear in dY, so their tangent is what the tangent of dY gives by itself.
"""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad

from efft_kernels import EFFT2, LoRA, attach, low_rank_linear, use_backend
from efft_kernels.ops import functional, shared_projection
from efft_kernels.ops.mixed_batch import tasks_linear


def by_dual_tensors(gradients, dy, tangent):
    with forward_ad.dual_level():
        found = gradients(forward_ad.make_dual(dy, tangent))
        return [forward_ad.unpack_dual(grad).tangent for grad in found]


def by_torch_func(gradients, dy, tangent):
    return torch.func.jvp(gradients, (dy,), (tangent,))[1]


ways = pytest.mark.parametrize("way", [by_dual_tensors, by_torch_func])


def check(way, y, inputs):
    """y's gradients with respect to inputs take on the tangent of dY."""
    dy, tangent = torch.randn_like(y), torch.randn_like(y)

    def gradients(dy):
        return torch.autograd.grad(y, inputs, dy, retain_graph=True)

    found, expected = way(gradients, dy, tangent), gradients(tangent)
    for grad, wanted in zip(found, expected, strict=True):
        assert grad is not None and wanted.norm() > 0
        torch.testing.assert_close(grad, wanted, rtol=1e-9, atol=1e-11)


def in_python(*operands):
    return functional._LowRankLinear.apply(*operands, "auto", "auto", None)


def in_torch(*operands):
    return low_rank_linear(*operands, backend="torch")


def of_shared_input(x, weight, bias, down, core, up):
    p = shared_projection.project(x, down)
    return shared_projection.linear_plus_projected(x, weight, bias, p, core, up)


@ways
@pytest.mark.parametrize("operator", [low_rank_linear, in_python, in_torch, of_shared_input])
@pytest.mark.parametrize("frozen", [True, False])
def test_of_the_operators(way, operator, frozen):
    shapes = ((5, 7), (6, 7), (6,), (7, 3), (2, 3, 2), (2, 3, 2))
    operands = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    for weight in operands[1:3]:
        weight.requires_grad_(not frozen)
    check(way, operator(*operands), [t for t in operands if t.requires_grad])


@ways
def test_of_many_tasks(way):
    shapes = ((2, 5, 7), (6, 7), (6,), (3, 7, 2), (3, 6, 2))
    operands = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    y = tasks_linear(*operands, torch.tensor([2, 0]))
    check(way, y, operands)


@ways
@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("method", [EFFT2(rank=3, dropout=0.0), LoRA(rank=2)], ids=lambda m: m.name)
def test_of_a_model(make_vit, randomize, way, method, backend):
    """Factors that are made once in a forward included."""
    model = make_vit(dtype=torch.float64)
    for block in model.blocks:
        block.attn.fused_attn = False  # torch's own kernel raises
    adapter = attach(model, method)
    randomize(adapter)
    with use_backend(backend):
        y = model(torch.randn(2, 3, 8, 8, dtype=torch.float64))
        check(way, y, list(adapter.parameters()))
