"""Which operator takes an adapted linear's forward, where no other test asks."""

from __future__ import annotations

import torch

from efft_kernels.ops.dropout import low_rank_linear_with_dropout
from efft_kernels.ops.layer import adapted_linear
from efft_kernels.testing.operands import Shape, operands


def test_dropout_is_of_the_rank_r_activation():
    t = operands(Shape(M=7, K=11, n=13, Ra=5, Rb=2))
    options = {"shared_input": None, "task_of_row": None, "source": None}
    torch.manual_seed(3)
    found = adapted_linear(**t, dropout=0.5, backend="auto", strategy="auto", **options)
    torch.manual_seed(3)
    assert torch.equal(found, low_rank_linear_with_dropout(**t, p=0.5))
