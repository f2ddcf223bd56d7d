"""Fresh memory is NaN within the context, and torch's settings are as before after it."""

from __future__ import annotations

import pytest
import torch

from efft_kernels.testing.poison import poisoned_allocations

ALLOCATIONS = {
    "empty": lambda dtype: torch.empty(5, 7, dtype=dtype),
    "empty_like": lambda dtype: torch.empty_like(torch.ones(5, 7, dtype=dtype).t()),
    "empty_strided": lambda dtype: torch.empty_strided((5, 7), (11, 1), dtype=dtype),
    "new_empty": lambda dtype: torch.ones(3, dtype=dtype).new_empty((5, 7)),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ALLOCATIONS)
def test_a_fresh_allocation_holds_nan(name, dtype):
    with poisoned_allocations():
        assert ALLOCATIONS[name](dtype).isnan().all()


@pytest.mark.parametrize("mode", [0, 2])
@pytest.mark.parametrize("fill", [True, False])
def test_settings_come_back(mode, fill):
    deterministic = torch.utils.deterministic
    before = torch.get_deterministic_debug_mode(), deterministic.fill_uninitialized_memory
    try:
        torch.set_deterministic_debug_mode(mode)
        deterministic.fill_uninitialized_memory = fill
        with pytest.raises(KeyError), poisoned_allocations():
            raise KeyError
        assert torch.get_deterministic_debug_mode() == mode
        assert deterministic.fill_uninitialized_memory == fill
    finally:
        torch.set_deterministic_debug_mode(before[0])
        deterministic.fill_uninitialized_memory = before[1]


@pytest.mark.parametrize("warn_only", [False, True])
def test_an_operator_without_a_deterministic_algorithm(warn_only):
    with poisoned_allocations(warn_only=warn_only):
        assert torch.get_deterministic_debug_mode() == (1 if warn_only else 2)
