"""The chain's block shapes, and what its launches remember from call to call; their results are in
kernels/."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from efft_kernels.ops.backends.triton.act import ActConfig
from efft_kernels.ops.backends.triton.chain import Configs, TritonSteps, configs_for
from efft_kernels.ops.backends.triton.configs import PassConfig
from efft_kernels.ops.backends.triton.launch_cache import CachedLaunch
from efft_kernels.ops.backends.triton.norm import NormConfig
from efft_kernels.ops.backends.triton.reduce import MOST_SUMS, NARROW


@pytest.fixture
def launched(monkeypatch):
    found = []
    monkeypatch.setattr(CachedLaunch, "__call__", lambda self, *_: found.append(self))
    monkeypatch.setattr("efft_kernels.ops.backends.triton.chain.multiprocessors", lambda index: 132)
    return found


@pytest.mark.parametrize(
    ("k", "rank", "shapes"),
    [
        (768, 16, [(16, 256, 1, 4), 44, (32, 256, 30, 4), (64, 128), (1, 8), (16, 4)]),
        (1024, 17, [(16, 256, 1, 8), 33, (32, 256, 22, 4), (64, 128), (1, 8), (11, 8)]),
        (384, 16, [(16, 256, 1, 4), 88, (64, 128, 30, 4), (64, 128), (1, 8), (16, 4)]),
        (192, 5, [(16, 256, 1, 4), 176, (64, 128, 44, 4), (64, 64), (1, 8), (16, 4)]),
        (100, 16, [(16, 128, 0, 4), 264, (32, 64, 44, 8), (64, 64), (1, 8), (16, 4)]),
        (768, 33, [(16, 128, 1, 8), (64, 22, 4), (32, 64, 8, 8), (64, 64), None, None]),
        (768, 65, [(16, 128, 1, 8), (64, 22, 8), (32, 64, 8, 8), (32, 64), None, None]),
    ],
)
def test_block_shapes_of_an_h200(monkeypatch, k, rank, shapes):
    """As they were tried there: of the norm, its factor's gradient, the gather, both gradients in
    one pass, and GELU forward and backward."""
    monkeypatch.setattr("efft_kernels.ops.backends.triton.chain.multiprocessors", lambda index: 132)
    norm, down_grad, gather, pair, gelu, gelu_grad = shapes
    rows, parts, warps = down_grad if isinstance(down_grad, tuple) else (32, down_grad, 4)
    assert configs_for.__wrapped__(k, rank, 0) == Configs(
        norm=NormConfig(*norm),
        norm_grad=NormConfig(4, 256, True, 4),
        norm_down_grad=PassConfig(rows, 64, parts, warps, 3),
        gather=PassConfig(*gather, 3),
        pair_grad=PassConfig(*pair, 4 * 132, 8, 3),
        gelu=gelu and ActConfig(32, 128, *gelu, 3),
        gelu_grad=gelu_grad and ActConfig(32, 128, *gelu_grad, 3),
    )


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
    assert not waiting
    first, second = (
        dict(zip(launch.kernel.arg_names[-len(launch.arguments) :], launch.arguments, strict=True))
        for launch in launched
    )
    assert (first["parts_2"], second["parts_2"]) == (5, 0)
    assert first["BLOCK_0"] == second["BLOCK_0"] == NARROW  # of many parts
