"""What the backend in plain torch promises beyond the results that every backend has in common."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses import FakeTensorMode

from efft_kernels.ops.backends.torch_backend import mm_into


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
def test_a_product_in_a_graph_has_a_derivative_on_cuda(half):
    """torch.mm with out_dtype, which it is elsewhere, has none."""
    with FakeTensorMode():
        a = torch.empty(3, 5, device="cuda", dtype=half, requires_grad=True)
        b = torch.empty(5, 7, device="cuda", dtype=half)
        product = mm_into(a, b, torch.float32)
        assert product.dtype == torch.float32 and product.grad_fn.name() == "ToCopyBackward0"
        with torch.no_grad():
            assert mm_into(a, b, torch.float32).dtype == torch.float32
