"""Whole-number operands: every sum is exact, so results are compared bit for bit."""

from __future__ import annotations

import pytest
import torch

from efft_kernels.ops.backends import triton as backend
from efft_kernels.ops.backends.triton.configs import PassConfig
from efft_kernels.ops.backends.triton.device import INTERPRETED
from efft_kernels.ops.backends.triton.reduce import launch_reduce
from efft_kernels.ops.backends.triton.thin import launch_thin
from efft_kernels.testing.error_budget import assert_exact
from efft_kernels.testing.operands import SHAPES, Shape, operands, operands_and_dy
from efft_kernels.testing.results import backend_results, reference_results

HALVES = [torch.float16] if INTERPRETED else [torch.float16, torch.bfloat16]
SLICES = (
    Shape(M=67, K=31, n=5, G=13, Ra=7, Rb=5),  # several slices to a tile
    Shape(M=67, K=31, n=1, G=11, Ra=3, Rb=2, shared=False),
    Shape(M=67, K=31, n=97, G=2, Ra=16, Rb=16),  # tiles that two slices share
    Shape(M=67, K=31, n=64, G=2, Ra=16, Rb=16),  # none
)


def assert_exact_results(shape: Shape, dtype: torch.dtype, strategy: str, device: str) -> None:
    tensors = operands_and_dy(shape, dtype, density=0.25, device=device)
    results = backend_results(backend, tensors, strategy)
    assert_exact(results, reference_results(tensors, torch.float64))


@pytest.mark.every_other(1)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_exact_operands_give_exact_results(shape, dtype, strategy, device):
    assert_exact_results(shape, dtype, strategy, device)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("shape", SLICES, ids=str)
def test_slices_of_any_size(shape, dtype, strategy, device):
    assert_exact_results(shape, dtype, strategy, device)


@pytest.mark.parametrize("with_core", [True, False])
def test_a_program_adds_to_its_own_partial_sums(with_core, dtype, device):
    """Two programs over many row blocks each, which the default grid of a large GPU makes only of
    tens of thousands of rows.
    """
    s = Shape(M=331, K=17, n=41, G=3 if with_core else 1, core=with_core)
    *_, core, up, dy = operands_and_dy(s, dtype, density=0.25, device=device)
    x = operands(s, dtype, density=0.25, seed=1, device=device)["x"]
    p = x[:, : s.Ra].contiguous()
    config = PassConfig(32, 16 if INTERPRETED else 32, 2, 4, 3)
    s_found = dy.new_empty((s.M, s.Ra))
    partial_up, partial_core = launch_thin(dy, up, core, s_found, p, config)
    d_up, d_core = (None if t is None else torch.empty_like(t) for t in (up, core))
    launch_reduce([(partial_up, d_up), (partial_core, d_core), (None, None)])

    slices = dy.double().unflatten(1, (s.G, s.n))  # [M, G, n]
    cores = torch.eye(s.Ra, device=device)[None].double() if core is None else core.double()
    q = torch.einsum("mgn,gnb->mgb", slices, up.double().expand(s.G, -1, -1))
    assert torch.equal(s_found.double(), torch.einsum("mgb,gab->ma", q, cores))
    t = torch.einsum("ma,gab->mgb", p.double(), cores)
    expected = torch.einsum("mgn,mgb->gnb", slices, t)
    assert torch.equal(d_up.double(), expected.sum(0, keepdim=True))
    if core is not None:
        assert torch.equal(d_core.double(), torch.einsum("ma,mgb->gab", p.double(), q))
