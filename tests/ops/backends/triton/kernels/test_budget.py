"""y, P and every gradient within the error budget, in every form, dtype and number of rows."""

from __future__ import annotations

import pytest
import torch

from efft_kernels.ops.backends import triton as backend
from efft_kernels.testing.operands import NAMES, SHAPES, Shape, operands_and_dy
from efft_kernels.testing.results import backend_results, results_within_budget


@pytest.mark.every_other(0)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_all_results_within_the_error_budget(shape, dtype, strategy, device):
    results_within_budget(backend, operands_and_dy(shape, dtype, device=device), strategy)


@pytest.mark.parametrize("rows", [1, 31, 32, 33, 131])
def test_every_number_of_rows(rows, strategy, device):
    tensors = operands_and_dy(Shape(M=rows, K=37, n=13), torch.float32, device=device)
    results_within_budget(backend, tensors, strategy)


def test_no_rows(strategy, device):
    tensors = operands_and_dy(Shape(M=0, K=37, n=13), torch.float32, device=device)
    got = backend_results(backend, tensors, strategy)
    assert got["y"].shape == (0, 39) and got["p"].shape == (0, 7)
    assert all(not got[name].any() for name in NAMES)


def test_sizes_that_blocks_divide(strategy, device):
    shape = Shape(M=64, K=64, n=64, G=2, Ra=16, Rb=16)
    results_within_budget(backend, operands_and_dy(shape, torch.float16, device=device), strategy)
