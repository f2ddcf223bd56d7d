"""Cached launches: a call that comes again hands compiled kernels its pointers and nothing else.

`kernel[grid](...)` binds some thirty arguments, works out what each specialises on and looks the
compiled kernel up: 12 to 15 µs on the core where `benchmarks/host_overhead.py` was first run, more
than all else this backend does on the host. Sizes, strides and dtypes repeat from step to step, so
`cache_of` keeps, for each set of them, what the launchers found out the first time: block shapes,
grid, integers, constants, and the compiled kernel itself, which from then on takes the addresses
directly: of a tensor Triton's launcher asks the driver whether it is one of the device's.

What a compiled kernel relies on, and where that is checked:

    dtypes, integers, constants    follow from the key of `cache_of`
    the device                     likewise; the caller makes it the current one (ops/dispatch.py)
    pointers aligned to 16 bytes   at every call, but for tensors that it allocated, which always
                                   are: one that is not goes through `kernel[grid]`, which
                                   compiles for it

Nothing else is cached: no pointer, no stream, no value. So a launch may be prepared or made while
a CUDA graph is captured, and a replay runs none of this. Triton's debugging switches count when a
launch is first made.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
import triton
from torch import Tensor
from triton.runtime import driver

# The versions whose CompiledKernel is known to take what a CachedLaunch hands it (the tests of
# this module compare the two ways); others go through `kernel[grid]` every time.
DIRECT = tuple(map(int, triton.__version__.split(".")[:2])) in ((3, 6),)

# Calls that are cached; then all are forgotten. A new number of rows is a new call.
MAX_CALLS = 2048

T = TypeVar("T")


class CachedLaunch:
    """One kernel with its grid and all arguments but the tensors, which every call passes.

    Args:
        kernel: A `triton.jit` function whose tensors and descriptors come first.
        grid: Programs along up to three axes.
        options: num_warps, num_stages.
        arguments: Every other argument of the kernel, by its name.

    Raises:
        TypeError: `arguments` are not the names that follow the kernel's tensors.
    """

    __slots__ = ("_direct", "arguments", "grid", "kernel", "options")

    def __init__(
        self, kernel: Any, grid: tuple[int, ...], options: dict[str, int], **arguments: Any
    ) -> None:
        names = kernel.arg_names[-len(arguments) :]
        if set(names) != set(arguments):
            raise TypeError(
                f"{kernel.__name__} takes {names} after its tensors, got {list(arguments)}"
            )
        self.kernel = kernel
        self.grid = (*grid, 1, 1)[:3]
        self.options = options
        self.arguments = tuple(arguments[name] for name in names)
        self._direct: Callable[..., None] | None = None

    def __call__(
        self,
        tensors: tuple[Tensor | None, ...],
        fresh: tuple[Tensor | None, ...] = (),
        descriptors: tuple[Any, ...] = (),
    ) -> None:
        """Launch on the current device and stream.

        Args:
            tensors: The kernel's first tensors in its order; None where it has none.
            fresh: The rest of them, allocated for this call, hence aligned.
            descriptors: Tensor descriptors of some of them, where the kernel takes any.
        """
        addresses = [None if t is None else t.data_ptr() for t in tensors]
        together = 0
        for address in addresses:
            together |= address or 0
        aligned = not together & 15
        direct = self._direct
        if aligned and direct is not None:
            for tensor in fresh:
                addresses.append(None if tensor is None else tensor.data_ptr())
            direct(*addresses, *descriptors, *self.arguments)
            return
        compiled = self.kernel[self.grid](
            *tensors, *fresh, *descriptors, *self.arguments, **self.options
        )
        if aligned and DIRECT and isinstance(compiled, triton.compiler.CompiledKernel):
            self._direct = _starter(compiled, self.grid)


def _starter(compiled: Any, grid: tuple[int, ...]) -> Callable[..., None]:
    """compiled[grid] without what that looks up at every call: the launcher's own settings, which
    stay as they are, and the scratch memory of a kernel that has none."""
    long_way: Callable[..., None] = compiled[grid]
    run = compiled.run
    if run.global_scratch_size or run.profile_scratch_size:
        return long_way
    before = *grid, compiled.function, run.launch_cooperative_grid, run.launch_pdl
    x, y, z, *settings = before
    launch, metadata, runtime = run.launch, compiled.packed_metadata, triton.knobs.runtime
    device, stream = driver.active.get_current_device, driver.active.get_current_stream
    if type(driver.active).__name__ == "CudaDriver":
        device, stream = torch._C._cuda_getDevice, torch._C._cuda_getCurrentRawStream

    def start(*arguments: Any) -> None:
        if _hooked(runtime.launch_enter_hook) or _hooked(runtime.launch_exit_hook):
            long_way(*arguments)
            return
        launch(
            *(x, y, z, stream(device()), *settings, None, None, metadata, None, None, None),
            *arguments,
        )

    return start


def _hooked(hook: Any) -> bool:
    """Whether a hook of Triton's launches, or a chain of them, does anything."""
    return bool(getattr(hook, "calls", hook))


# What the launchers of one call keep, by launch: {"gemm": ..., "reduce": ...}.
CallCache = dict[str, Any]

_calls: dict[tuple[Any, ...], CallCache] = {}


def cache_of(tensors: tuple[Tensor | None, ...], *choices: Hashable) -> CallCache:
    """The cache of a call with tensors of these sizes, strides and dtypes, on the first one's
    device; `choices` is whatever else its launches depend on.
    """
    key = (
        *[None if t is None else (t.shape, t.stride(), t.dtype) for t in tensors],
        tensors[0].device,  # type: ignore[union-attr]
        choices,
    )
    cache = _calls.get(key)
    if cache is None:
        if len(_calls) >= MAX_CALLS:
            _calls.clear()
        cache = _calls[key] = {}
    return cache


def once(cache: CallCache | None, name: str, prepare: Callable[..., T], *arguments: Any) -> T:
    """cache[name], made by `prepare(*arguments)` the first time; without a cache, every time."""
    prepared = None if cache is None else cache.get(name)
    if prepared is None:
        prepared = prepare(*arguments)
        if cache is not None:
            cache[name] = prepared
    return prepared


def forget() -> None:
    """Forget every call, compiled kernels included."""
    _calls.clear()
