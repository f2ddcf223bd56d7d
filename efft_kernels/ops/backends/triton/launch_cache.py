"""Launches with everything settled but the pointers.

`kernel[grid](...)` binds some thirty arguments, works out what each specialises on and looks the
compiled kernel up: 12 to 15 µs on the core where `benchmarks/host_overhead.py` was first run, more
than all else this backend does on the host. Sizes, strides and dtypes repeat from step to step, so
`plans_of` keeps, for each set of them, what the launchers of that call found out the first time:
the block shapes, the grid, the integers, the constants, and the compiled kernel itself, which from
then on takes the pointers directly.

What a compiled kernel relies on, and where that is checked:

    dtypes, integers, constants    follow from the key of `plans_of`
    the device                     likewise; the caller makes it the current one (ops/dispatch.py)
    pointers aligned to 16 bytes   at every call: one that is not takes the long way round, which
                                   compiles for it; torch's own allocations always are

Nothing else is remembered: no pointer, no stream, no value. So a plan may be made or used while a
CUDA graph is captured, and a replay runs none of this. Triton's debugging switches count when a
plan is first used.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import triton
from torch import Tensor

# The versions whose CompiledKernel is known to take what a Plan hands it
# (tests/ops/test_triton_launch.py compares the two ways); others take the long way.
DIRECT = tuple(map(int, triton.__version__.split(".")[:2])) in ((3, 6),)

# Calls that are remembered; then all are forgotten. A new number of rows is a new call.
MOST_CALLS = 2048


class Plan:
    """One kernel with its grid, integers and constants; `plan(tensors)` launches it."""

    __slots__ = ("_start", "grid", "kernel", "options", "rest")

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        *rest: Any,  # what follows the tensors, constants included, in the kernel's order
        **options: int,  # num_warps, num_stages
    ) -> None:
        self.kernel = kernel
        self.grid = (*grid, 1, 1)[:3]
        self.rest = rest
        self.options = options
        self._start: Callable[..., None] | None = None

    def __call__(
        self,
        tensors: tuple[Tensor | None, ...],
        descriptors: tuple[Any, ...] = (),
        fresh: bool = False,
    ) -> None:
        """Launch on the current device and stream; `descriptors` are of some of the tensors. With
        `fresh` all of them were allocated for this call, hence are aligned.
        """
        addresses = 0
        for tensor in () if fresh else tensors:
            if tensor is not None:
                addresses |= tensor.data_ptr()
        aligned = not addresses & 15
        if aligned and self._start is not None:
            self._start(*tensors, *descriptors, *self.rest)
            return
        compiled = self.kernel[self.grid](*tensors, *descriptors, *self.rest, **self.options)
        if aligned and DIRECT and isinstance(compiled, triton.compiler.CompiledKernel):
            self._start = compiled[self.grid]


# What the launchers of one call keep, by launch: {"gemm": ..., "reduce": ...}.
Plans = dict[str, Any]

_plans: dict[tuple[Any, ...], Plans] = {}


def plans_of(tensors: tuple[Tensor | None, ...], *choices: Hashable) -> Plans:
    """The plans of a call with tensors of these sizes, strides and dtypes, on the first one's
    device; `choices` is whatever else its launches depend on.
    """
    key = (
        *[None if t is None else (t.shape, t.stride(), t.dtype) for t in tensors],
        tensors[0].device,  # type: ignore[union-attr]
        choices,
    )
    plans = _plans.get(key)
    if plans is None:
        if len(_plans) >= MOST_CALLS:
            _plans.clear()
        plans = _plans[key] = {}
    return plans


def forget() -> None:
    """Forget every plan, compiled kernels included."""
    _plans.clear()
