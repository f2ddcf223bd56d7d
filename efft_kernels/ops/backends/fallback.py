"""What the backends with kernels share: the way out to plain torch, and sizes they agree on."""

from __future__ import annotations

import logging
from functools import cache

import torch
from torch import Tensor

from . import torch_backend

logger = logging.getLogger(__name__)

MINIMUM_CAPABILITY = (8, 0)


def rows(t: Tensor) -> Tensor:
    """t [M, C] itself where its last stride is one, else a contiguous copy."""
    return t if t.stride(1) == 1 or t.shape[1] == 1 else t.contiguous()


def torch_strategy(strategy: str) -> str:
    """The plain-torch strategy that stands in for `strategy`."""
    return strategy if strategy in torch_backend.STRATEGIES else "split"


@cache
def note_rank(rank: int, limit: int, kernels: str) -> None:
    """Warn, once for each rank, that plain torch runs what the kernels do not take.

    Args:
        rank: Ra of the call.
        limit: the largest rank that the kernels take.
        kernels: "Triton" or "CUDA", for the warning's text.
    """
    logger.warning(
        "rank %d is above %d, the most the %s kernels take; plain torch runs these layers",
        rank,
        limit,
        kernels,
    )


@cache
def too_old(index: int) -> str | None:
    """Why CUDA device `index` is too old for the kernels; None where it is not."""
    if torch.cuda.get_device_capability(index) >= MINIMUM_CAPABILITY:
        return None
    oldest = ".".join(map(str, MINIMUM_CAPABILITY))
    name = torch.cuda.get_device_name(index)
    return f"{name} is older than compute capability {oldest}; use backend='torch'"


def padded_rank(rank: int) -> int:
    """The power of two, at least 16, that holds `rank`: the width inside the kernels."""
    return max(16, 1 << (rank - 1).bit_length())
