"""Seeds and deterministic kernels."""

from __future__ import annotations

import pytest
import torch

from efft_kernels.training.reproducible import deterministic, epoch_seed


def test_epoch_seeds_differ() -> None:
    seeds = {epoch_seed(seed, epoch) for seed in range(20) for epoch in range(50)}
    assert len(seeds) == 1000


def test_the_callers_choices_come_back() -> None:
    def choices() -> tuple[bool, bool, bool, int]:
        return (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            torch.utils.deterministic.fill_uninitialized_memory,
            torch.get_num_threads(),
        )

    before = choices()
    with deterministic(torch.device("cpu"), warn_only=True, threads=before[3] + 1):
        assert choices() == (True, True, False, before[3] + 1)
    assert choices() == before
    with pytest.raises(RuntimeError), deterministic(torch.device("cpu")):
        assert choices() == (True, False, False, before[3])
        raise RuntimeError
    assert choices() == before
