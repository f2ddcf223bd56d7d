"""What only a CUDA device can show: graphs, compiled steps, large offsets, no synchronisation."""

from __future__ import annotations

import pytest
import torch

from efft_kernels import low_rank_linear
from efft_kernels.ops import reference
from efft_kernels.ops.backends import triton as backend
from efft_kernels.ops.backends.triton.device import INTERPRETED
from efft_kernels.testing.error_budget import relative_error
from efft_kernels.testing.operands import NAMES, SHARED, Shape, operands_and_dy
from efft_kernels.testing.results import backend_results

pytestmark = pytest.mark.skipif(INTERPRETED, reason="needs a CUDA device")


def leaves_and_dy():
    """(operands that require grad but for the weight, dy) of a bfloat16 step."""
    shape = Shape(M=256, K=128, n=64, Ra=16, Rb=16)
    *tensors, dy = operands_and_dy(shape, torch.bfloat16, device="cuda")
    return [t.requires_grad_(n != "weight") for n, t in zip(NAMES, tensors, strict=True)], dy


@pytest.mark.parametrize("strategy", ["fused", "split"])
def test_a_training_step_in_a_cuda_graph(strategy):
    leaves, dy = leaves_and_dy()

    def step():
        y = low_rank_linear(*leaves, backend="triton", strategy=strategy)
        return torch.autograd.grad(y, [leaf for leaf in leaves if leaf.requires_grad], dy)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        expected = step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    torch.cuda.synchronize()
    for got, want in zip(captured, expected, strict=True):
        assert torch.equal(got, want)
    # A replay reads what the tensors hold now, wherever calls in between found theirs.
    with torch.no_grad():
        for leaf in leaves:
            leaf.copy_(torch.randn_like(leaf))
    expected = step()
    graph.replay()
    torch.cuda.synchronize()
    for got, want in zip(captured, expected, strict=True):
        assert torch.equal(got, want)


def test_a_compiled_training_step_has_no_graph_break():
    leaves, dy = leaves_and_dy()
    wanted = [leaf for leaf in leaves if leaf.requires_grad]

    def loss(x, *rest):
        return (low_rank_linear(x, *rest, backend="triton") * dy).float().sum()

    eager = torch.autograd.grad(loss(*leaves), wanted)
    compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True)(*leaves), wanted)
    for got, want in zip(compiled, eager, strict=True):
        assert relative_error(got, want) < 1e-2


def test_offsets_beyond_32_bits():
    M, N, K = 70_001, 32_768, 32
    x, weight, down, up = (
        torch.randint(-1, 2, size, device="cuda", dtype=torch.bfloat16)
        for size in ((M, K), (N, K), (K, 16), (1, N, 16))
    )
    for strategy in ("fused", "split"):
        y, _ = backend.forward(x, weight, None, down, None, up, save_p=False, strategy=strategy)
        tail, *rest = (t.double() for t in (x[-3:], weight, down, up))
        expected = reference.low_rank_linear(tail, rest[0], None, rest[1], None, rest[2])
        assert torch.equal(y[-3:], expected.to(y.dtype))
        del y


def test_no_synchronisation():
    tensors = operands_and_dy(SHARED, torch.bfloat16, device="cuda")
    backend_results(backend, tensors, "fused")
    torch.cuda.set_sync_debug_mode("error")
    try:
        for strategy in backend.STRATEGIES:
            backend_results(backend, tensors, strategy)
    finally:
        torch.cuda.set_sync_debug_mode("default")
