"""What the error budget lets through, and what it must not."""

from __future__ import annotations

import math

import pytest
import torch
from torch._subclasses import FakeTensorMode

from efft_kernels.ops.backends import torch_backend
from efft_kernels.testing.error_budget import (
    assert_exact,
    assert_within_budget,
    budget_of,
    error_ratio,
    largest_exact_integer,
    relative_error,
    worst_ratio,
)
from efft_kernels.testing.operands import ALL, NAMES, Shape, operands_and_dy
from efft_kernels.testing.results import backend_results, plain_and_exact

EXACT = torch.ones(4, dtype=torch.float64)
PLAIN = torch.ones(4) + 1e-3
HALF_ULP = 2.0**-24  # float32's


def test_an_error_is_relative_however_small_the_result():
    assert relative_error(1e-6 * (EXACT + 1e-3), 1e-6 * EXACT) == pytest.approx(1e-3)
    assert relative_error(0 * EXACT, 0 * EXACT) == 0 and relative_error(EXACT, 0 * EXACT) > 1e299


def test_the_budget_is_larger_in_float32_on_a_gpu():
    with FakeTensorMode():
        budgets = {
            (device, dtype): budget_of(torch.empty(1, device=device, dtype=dtype))
            for device in ("cuda", "cpu")
            for dtype in (torch.float32, torch.bfloat16)
        }
    assert budgets.pop(("cuda", torch.float32)) == 2.5 and set(budgets.values()) == {2.0}


def test_the_ratio_is_of_the_errors():
    assert error_ratio(torch.ones(4) + 2e-3, PLAIN, EXACT) == pytest.approx(2, rel=1e-3)
    assert error_ratio(EXACT, PLAIN, EXACT) == 0


def test_the_worst_ratio_is_the_largest():
    worse = torch.ones(4) + 3e-3
    for got in ([PLAIN, worse], [worse, PLAIN]):
        assert worst_ratio(got, [PLAIN] * 2, [EXACT] * 2) == pytest.approx(3, rel=1e-3)
    with pytest.raises(ValueError, match="shorter"):
        worst_ratio([PLAIN] * 2, [PLAIN] * 2, [EXACT])


def test_one_rounding_is_allowed_where_plain_torch_is_exact():
    value = EXACT + 2 * HALF_ULP
    assert error_ratio(value, EXACT.float(), EXACT) == pytest.approx(2)
    assert error_ratio(value, EXACT.float(), EXACT, rounding=False) == math.inf
    assert error_ratio(EXACT, EXACT.float(), EXACT, rounding=False) == 0
    assert worst_ratio([value], [EXACT.float()], [EXACT]) == pytest.approx(2)
    assert_within_budget({"y": EXACT + HALF_ULP}, {"y": EXACT.float()}, {"y": EXACT})


def test_a_nan_never_passes():
    nan = torch.full((4,), torch.nan)
    assert math.isnan(worst_ratio([EXACT, nan], [PLAIN] * 2, [EXACT] * 2))
    assert math.isnan(error_ratio(nan, EXACT.float(), EXACT, rounding=False))
    for value, plain in ((nan, PLAIN), (nan, nan)):
        with pytest.raises(AssertionError, match="y: error nan"):
            assert_within_budget({"y": value}, {"y": plain}, {"y": EXACT})


def test_beyond_the_budget_is_an_error_with_its_name():
    assert_within_budget({"up": torch.ones(4) + 1.9e-3}, {"up": PLAIN}, {"up": EXACT})
    with pytest.raises(AssertionError, match=r"up: error 2\.10e-03 is 2\.10 times"):
        assert_within_budget({"up": torch.ones(4) + 2.1e-3}, {"up": PLAIN}, {"up": EXACT})


@pytest.mark.parametrize(("dtype", "largest"), [(torch.bfloat16, 256), (torch.float16, 2048)])
def test_whole_numbers_are_compared_bit_for_bit(dtype, largest):
    assert largest_exact_integer(dtype) == largest
    assert torch.tensor(largest, dtype=dtype) == largest
    assert torch.tensor(largest + 1, dtype=dtype) == largest  # rounded
    exact = {"y": torch.tensor([1.0, largest + 1], dtype=torch.float64)}
    assert_exact({"y": torch.tensor([1.0, largest], dtype=dtype)}, exact)
    wrong = {"y": torch.tensor([2.0, largest], dtype=dtype)}
    with pytest.raises(AssertionError, match="y"):
        assert_exact(wrong, exact)
    for below in (largest, largest + 1):
        assert_exact(wrong, exact, below=below)
    with pytest.raises(AssertionError, match="y"):
        assert_exact(wrong, exact, below=largest + 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("strategy", torch_backend.STRATEGIES)
def test_plain_torch_itself_is_within_the_budget(strategy, dtype):
    operands = operands_and_dy(Shape(), dtype)
    plain, exact = plain_and_exact(operands)
    results = backend_results(torch_backend, operands, strategy)
    assert set(results) == set(plain) == set(exact) == {"y", "p", *NAMES}
    assert_within_budget(results, plain, exact)


def test_only_the_needed_gradients_are_made():
    operands = operands_and_dy(Shape(core=False, bias=False))
    results = backend_results(torch_backend, operands, "split")
    assert set(results) == {"y", "p", "x", "weight", "down", "up"}
    needs = tuple(name in ("x", "up") for name in NAMES)
    assert set(backend_results(torch_backend, operands, "split", needs)) == {"y", "p", "x", "up"}

    class Wasteful:
        forward = staticmethod(torch_backend.forward)

        @staticmethod
        def backward(*tensors, needs, strategy):
            return torch_backend.backward(*tensors, needs=ALL, strategy=strategy)

    with pytest.raises(AssertionError, match="weight"):
        backend_results(Wasteful, operands, "split", needs)
