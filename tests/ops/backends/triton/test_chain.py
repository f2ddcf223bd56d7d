"""What the chain's launches remember from call to call; their results are in kernels/."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from efft_kernels.ops.backends.triton.chain import TritonSteps, configs_for
from efft_kernels.ops.backends.triton.launch_cache import CachedLaunch
from efft_kernels.ops.backends.triton.reduce import MOST_SUMS


@pytest.fixture
def launched(monkeypatch):
    found = []
    monkeypatch.setattr(CachedLaunch, "__call__", lambda self, *_: found.append(self))
    monkeypatch.setattr("efft_kernels.ops.backends.triton.chain.multiprocessors", lambda index: 132)
    return found


def sums(dtype, count=1):
    return [(torch.empty(5, 7, 16), torch.empty(7, 3, dtype=dtype)) for _ in range(count)]


def test_a_sum_of_another_dtype_is_another_launch(launched):
    """A compiled kernel writes one dtype: float16 rows once got the bits of bfloat16."""
    steps = TritonSteps(configs_for(64, 3, None))
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float16):
        steps.finish(sums(dtype))
    half, bfloat, single, again = launched
    assert again is half and len({id(each) for each in (half, bfloat, single)}) == 3


def test_more_sums_than_a_launch_takes(launched):
    steps = TritonSteps(configs_for(64, 3, None))
    waiting = sums(torch.float32, MOST_SUMS + 2)
    steps.finish(waiting)
    assert not waiting and [
        dict(zip(launch.kernel.arg_names[-len(launch.arguments) :], launch.arguments, strict=True))[
            "parts_2"
        ]
        for launch in launched
    ] == [5, 0]
