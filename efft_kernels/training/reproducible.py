"""What makes a run repeat its bits: seeds, and deterministic kernels."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from timm.utils import random_seed


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and torch's generators (all devices)."""
    random_seed(seed)


def epoch_seed(seed: int, epoch: int) -> int:
    """A 32-bit seed of its own for every (seed, epoch)."""
    return int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0])


@contextmanager
def deterministic(
    device: torch.device, *, warn_only: bool = False, threads: int | None = None
) -> Iterator[None]:
    """Deterministic algorithms inside the block, the caller's choices afterwards.

    Fresh memory is not filled meanwhile: torch would do so in its deterministic mode, and it
    would count as step time.

    Args:
        device: where the work is; on CUDA cuBLAS too is told to repeat itself.
        warn_only: warn about an operator without a deterministic kernel instead of raising.
        threads: of torch's CPU kernels; None for as many as there are.
    """
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    memory: Any = torch.utils.deterministic
    fill = memory.fill_uninitialized_memory
    enabled = torch.are_deterministic_algorithms_enabled()
    warned_only = torch.is_deterministic_algorithms_warn_only_enabled()
    threads_before = torch.get_num_threads()
    torch.use_deterministic_algorithms(True, warn_only=warn_only)
    memory.fill_uninitialized_memory = False
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warned_only)
        memory.fill_uninitialized_memory = fill
        torch.set_num_threads(threads_before)
