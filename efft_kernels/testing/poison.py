"""Memory that starts as NaN, so that an element which no kernel writes cannot pass a comparison."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def poisoned_allocations(*, warn_only: bool = False) -> Iterator[None]:
    """Within it, every fresh floating allocation of torch holds NaN.

    That is `torch.empty` and its relatives, what torch's own operators allocate, and what C++
    operators get from torch; whole numbers start as the largest of their dtype. It comes with
    torch's deterministic algorithms.

    Args:
        warn_only: warn where an operator has no deterministic algorithm, as some have none on CUDA.

    Raises:
        RuntimeError: allocations do not hold NaN all the same; or, without `warn_only`, an operator
            has no deterministic algorithm.
    """
    settings: Any = torch.utils.deterministic  # whose attributes have no types
    mode, fill = torch.get_deterministic_debug_mode(), settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=warn_only)
    settings.fill_uninitialized_memory = True
    try:
        if not torch.empty(3).isnan().all():
            raise RuntimeError("torch.empty must hold NaN under deterministic algorithms")
        yield
    finally:
        settings.fill_uninitialized_memory = fill
        torch.set_deterministic_debug_mode(mode)
