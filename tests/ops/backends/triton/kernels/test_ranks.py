"""Ranks that kernels pad, fold, or leave to torch."""

from __future__ import annotations

import pytest
import torch

from efft_kernels.ops.backends import fallback
from efft_kernels.ops.backends import triton as backend
from efft_kernels.testing.operands import Shape, operands_and_dy
from efft_kernels.testing.results import results_within_budget


def of_ranks(ra: int, rb: int, dtype: torch.dtype, device: str):
    return operands_and_dy(Shape(M=37, K=41, n=23, G=2, Ra=ra, Rb=rb), dtype, device=device)


@pytest.mark.every_other(0)
@pytest.mark.parametrize("ranks", [(1, 1), (4, 2), (16, 16), (33, 17), (128, 128)], ids=str)
def test_every_rank(ranks, dtype, strategy, device):
    results_within_budget(backend, of_ranks(*ranks, dtype, device), strategy)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("ranks", [(5, 40), (3, 131)], ids=str)
def test_rb_has_no_limit(ranks, dtype, device, recorded):
    """Above 32 core and up are folded, and Rb is gone."""
    results_within_budget(backend, of_ranks(*ranks, dtype, device), "fused")
    assert [launch.name for launch in recorded][:3] == ["fold", "fold", "gemm"]


def test_a_rank_beyond_the_kernels_runs_in_torch(device, caplog):
    fallback.note_rank.cache_clear()
    with caplog.at_level("WARNING"):
        results_within_budget(backend, of_ranks(131, 5, torch.float32, device), "fused")
    assert "rank 131 is above 128" in caplog.text
