"""What the tests of this folder add to Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from efft_kernels.ops.backends.triton.device import INTERPRETED

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="of the interpreter")


@triton.jit
def _copy_kernel(x_ptr, out_ptr, read, written, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < read, other=0.0)
    tl.store(out_ptr + offs, x, mask=offs < written)


@pytest.mark.parametrize(("read", "written"), [(6, 5), (5, 6), (6, 6)])
def test_a_kernel_stays_within_its_tensors(read, written):
    """In a storage that goes on behind them."""
    x, out = torch.ones(8)[:5], torch.zeros(8)[:5]
    _copy_kernel[(1,)](x, out, 5, 5, BLOCK=8)
    assert torch.equal(x, out)
    with pytest.raises(triton.runtime.errors.InterpreterError, match="beyond its tensors"):
        _copy_kernel[(1,)](x, out, read, written, BLOCK=8)
