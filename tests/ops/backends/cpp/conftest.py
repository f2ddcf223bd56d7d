"""Fixtures of the C++ operators' tests: strategies, threads, poisoned memory."""

from __future__ import annotations

import pytest
import torch

from efft_kernels.ops.backends import cpp_backend


@pytest.fixture(params=cpp_backend.STRATEGIES)
def strategy(request) -> str:
    return request.param


@pytest.fixture(params=[1, 2, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _poisoned_workspace():
    """What the calling thread keeps from call to call starts as NaN, like every allocation."""
    from .operators import both  # skips a module of tests, which a conftest cannot do

    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all() and torch.utils.deterministic.fill_uninitialized_memory
    t = {name: torch.full((64, 64), torch.nan) for name in ("x", "weight", "down")}
    both(t | {"bias": None, "core": None, "up": torch.full((1, 64, 64), torch.nan)}, t["x"])
    yield
    torch.use_deterministic_algorithms(False)
