"""How the kernels address the factors: strides on the host, NamedTuples inside a kernel.

A kernel's own signature is flat, an argument for every stride. It gathers what belongs to one
factor in a tuple and passes that on.
"""

from __future__ import annotations

from typing import NamedTuple

import triton.language as tl
from torch import Tensor

from ..fallback import padded_rank
from .limits import TRITON_IN_PLACE_RANK


class Up(NamedTuple):
    """up, or down in its place, inside a kernel: any strides, any floating dtype."""

    ptr: tl.tensor  # [1 or G, n, rb]
    stride_g: tl.tensor  # 0 where the slices share it
    stride_n: tl.tensor
    stride_b: tl.tensor


class Core(NamedTuple):
    """The core inside a kernel: any strides, any floating dtype."""

    ptr: tl.tensor | None  # [G, ra, rb]; None: the identity, ra = rb
    ra: tl.tensor
    rb: tl.tensor
    stride_g: tl.tensor
    stride_a: tl.tensor
    stride_b: tl.tensor


def slices_of(thin: Tensor, core: Tensor | None) -> tuple[int, int, tuple[int, ...]]:
    """How the kernels walk over up [1 or G, n, Rb] or down [K, Ra]: slice after slice where each
    has a core, all rows at once where there is none and they are evenly spaced.

    Returns:
        (slices, rows of each, strides along (slice, row, rank)).
    """
    if thin.dim() == 2:
        return 1, thin.shape[0], (0, *thin.stride())
    slices, rows, _ = thin.shape
    strides = thin.stride()
    if core is not None:
        return core.shape[0], rows, (strides[0] if slices > 1 else 0, *strides[1:])
    if slices == 1 or strides[0] == rows * strides[1]:
        return 1, slices * rows, (0, *strides[1:])
    return slices, rows, strides


def named_strides(prefix: str, axes: str, strides: tuple[int, ...]) -> dict[str, int]:
    """{"stride_core_g": ..., "stride_core_a": ...}: a kernel's arguments for one tensor."""
    return {f"stride_{prefix}_{axis}": s for axis, s in zip(axes, strides, strict=True)}


def core_strides(core: Tensor | None) -> dict[str, int]:
    """A kernel's stride arguments for core [G, Ra, Rb]; zeros for the identity."""
    return named_strides("core", "gab", (0, 0, 0) if core is None else core.stride())


def read_in_place(down: Tensor, up: Tensor) -> bool:
    """Whether the kernels take factors of these ranks as they are."""
    return padded_rank(max(down.shape[1], up.shape[2])) <= TRITON_IN_PLACE_RANK
