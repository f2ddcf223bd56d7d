"""The error budget: a kernel errs at most twice as much as plain torch in the same dtype.

In float32 on a GPU it is 2.5 times. Both errors are measured against float64, so no tolerance is
tuned to a kernel.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

BUDGET = 2.0
# cuBLAS sums float32 products in several chains, a kernel of tiles in one per element: at most 2.31
# times its error was seen on an H100 (rank 128).
FLOAT32_GPU_BUDGET = 2.5


def budget_of(result: Tensor) -> float:
    """What `error_ratio` may be at most for a kernel's result of this dtype and device."""
    in_chains = result.is_cuda and result.dtype == torch.float32
    return FLOAT32_GPU_BUDGET if in_chains else BUDGET


def relative_error(value: Tensor, exact: Tensor) -> float:
    """‖value − exact‖ / ‖exact‖ in float64.

    Args:
        value: any shape and floating dtype.
        exact: the same shape.
    """
    exact = exact.double()
    norm = exact.norm().clamp_min(1e-300)
    return float((value.double() - exact).norm() / norm)


def error_ratio(value: Tensor, plain: Tensor, exact: Tensor, *, rounding: bool = True) -> float:
    """error(value) / error(plain), both against `exact`; at most `BUDGET` passes, a NaN never.

    Plain torch's error counts as at least half an ulp of its dtype, eps/2: its result may happen
    to be exact where the kernel's was rounded once.

    Args:
        value: the result on trial.
        plain: plain torch's result, of the same shape, in the dtype that sets the budget.
        exact: the result in float64.
        rounding: False to count plain torch's error as it is.
    """
    half_ulp = torch.finfo(plain.dtype).eps / 2 if rounding else 0.0
    allowed = max(relative_error(plain, exact), half_ulp)
    found = relative_error(value, exact)
    if allowed == 0:
        return math.inf if found > 0 else found
    return found / allowed


def worst_ratio(got: Iterable[Tensor], plain: Iterable[Tensor], exact: Iterable[Tensor]) -> float:
    """The largest `error_ratio` of corresponding results; NaN if any is."""
    ratios = [error_ratio(*results) for results in zip(got, plain, exact, strict=True)]
    return math.nan if any(map(math.isnan, ratios)) else max(ratios)


def assert_within_budget(
    got: Mapping[str, Tensor],
    plain: Mapping[str, Tensor],
    exact: Mapping[str, Tensor],
    *,
    rounding: bool = True,
) -> None:
    """Every result is within the budget of `error_ratio`.

    Args:
        got: the results on trial, by name.
        plain: plain torch's, these names at least.
        exact: in float64, these names at least.
        rounding: False to count plain torch's error as it is.

    Raises:
        AssertionError: one is not, with its name and its ratio.
    """
    for name, value in got.items():
        ratio = error_ratio(value, plain[name], exact[name], rounding=rounding)
        found = relative_error(value, exact[name])
        budget = budget_of(value)
        assert ratio <= budget, f"{name}: error {found:.2e} is {ratio:.2f} times plain torch's"


def largest_exact_integer(dtype: torch.dtype) -> int:
    """2/eps: up to there `dtype` holds every whole number."""
    return int(2 / torch.finfo(dtype).eps)


def assert_exact(
    got: Mapping[str, Tensor], exact: Mapping[str, Tensor], *, below: int | None = None
) -> None:
    """Results of whole-number operands are the exact ones rounded once to their dtype, bit for bit.

    Args:
        got: the results on trial, by name.
        exact: in float64, these names at least.
        below: compare only results whose exact values are smaller than this, for kernels that
            round to the dtype on the way.

    Raises:
        AssertionError: one is not, with its name.
    """
    for name, value in got.items():
        if below is None or exact[name].abs().max() < below:
            assert torch.equal(value, exact[name].to(value.dtype)), name
