"""Autocast in the C++ entry point is autocast in functional.py."""

from __future__ import annotations

import pytest
import torch

from efft_kernels import low_rank_linear

from .both_ways import (
    FORMS,
    HALVES,
    assert_identical,
    on_both_ways,
    on_each_backend,
    operands,
    step,
)


@on_each_backend
@pytest.mark.parametrize("half", HALVES, ids=str)
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("form", FORMS[:3], ids=str)
def test_same_under_autocast(form, x_dtype, half):
    tensors = operands(**form)
    if x_dtype == torch.float64:
        tensors = {name: None if t is None else t.double() for name, t in tensors.items()}
    tensors["x"] = tensors["x"].to(x_dtype)
    found, expected = on_both_ways(
        lambda: step(tensors, context=lambda: torch.autocast("cpu", half))
    )
    assert found[0].dtype == (half if x_dtype != torch.float64 else x_dtype)
    assert_identical(found, expected)


def test_same_under_autocast_with_mixed_parameters(backend):
    tensors = operands()
    tensors |= {"weight": tensors["weight"].bfloat16(), "bias": tensors["bias"].half()}
    found, expected = on_both_ways(
        lambda: step(tensors, context=lambda: torch.autocast("cpu", torch.bfloat16))
    )
    assert_identical([*found[:3], *found[4:]], [*expected[:3], *expected[4:]])
    # d_bias in bias's own dtype; the Python way rounds it to weight's in between.
    assert found[3].dtype == expected[3].dtype == torch.float16
    torch.testing.assert_close(found[3], expected[3], rtol=2**-8, atol=0)
    if backend == "auto":
        dy = found[0].float().cos().bfloat16()
        assert torch.equal(found[3], dy.float().sum(0).half())


@on_each_backend
def test_nested_autocast():
    tensors = operands()
    with torch.autocast("cpu", torch.bfloat16):
        assert low_rank_linear(**tensors).dtype == torch.bfloat16
        with torch.autocast("cpu", enabled=False):
            assert low_rank_linear(**tensors).dtype == torch.float32
            found, expected = on_both_ways(lambda: step(tensors))
            assert_identical(found, expected)
        assert low_rank_linear(**tensors).dtype == torch.bfloat16
    assert low_rank_linear(**tensors).dtype == torch.float32


@on_each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_backward_under_autocast(dtype):
    """A backward that runs inside the context gives the same numbers as outside."""
    tensors = operands(dtype=dtype)

    def in_autocast():
        return torch.autocast("cpu", torch.bfloat16)

    def inside():
        with in_autocast():
            return step(tensors)

    found, expected = on_both_ways(inside)
    assert_identical(found, expected)
    assert_identical(found, step(tensors, context=in_autocast))
