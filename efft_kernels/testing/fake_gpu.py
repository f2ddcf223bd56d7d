"""A GPU that is not there: Triton compiles for it as for a real one, and launches are noted."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import JITFunction, driver

from ..ops import dispatch, eager_entry
from ..ops.backends import triton as backend
from ..ops.backends.triton import device, launch_cache, tuning

# Triton keeps compiled kernels by device number; a new number for each fake GPU keeps them apart.
_numbers = itertools.count(1000)


@dataclass(frozen=True)
class Launch:
    """One launch: the compiled kernel, and what it was started with."""

    compiled: CompiledKernel
    grid: tuple[int, int, int]
    stream: int
    metadata: Any  # what Triton packs for its launcher: warps, shared memory, cluster size
    arguments: tuple[Any, ...]  # in the kernel's order; tensors and descriptors as they came

    @property
    def kernel(self) -> JITFunction:
        """The function before compilation."""
        return self.compiled.src.fn

    @property
    def constants(self) -> dict[str, Any]:
        """Values compiled in, by argument name: constexprs, None, and integers that are 1."""
        names = self.kernel.arg_names
        return {names[place]: value for (place,), value in self.compiled.src.constants.items()}


class _Launcher:
    """As Triton's CudaLauncher: called with tensors, or its `launch` with whatever it was asked."""

    global_scratch_size = profile_scratch_size = 0
    launch_cooperative_grid = launch_pdl = False

    def __init__(self, record: Any) -> None:
        self._record = record

    def __call__(self, *arguments: Any) -> None:
        self._record(*arguments)

    def launch(self, x, y, z, stream, function, cooperative, pdl, scratch, profile, *rest):  # type: ignore[no-untyped-def]
        self._record(x, y, z, stream, function, *rest)


class FakeGpu:
    """As much of Triton's CUDA driver as compiling and launching ask for.

    Args:
        properties: what the GPU pretends to be.
        record: keep every launch in `launches`. Without it a launch does nothing at all, which is
            what a measurement of host time wants.
    """

    def __init__(self, properties: device.Device, record: bool) -> None:
        self.properties = properties
        self.launches: list[Launch] = []
        self.stream = 0  # the current stream
        self.target = GPUTarget("cuda", properties.arch, 32)
        self.utils = SimpleNamespace(
            load_binary=lambda *_: (1, 1, 0, 0, 1024),  # module, function, ..., threads per block
            get_device_properties=lambda _: {"max_shared_mem": properties.smem_bytes},
        )
        self._number = next(_numbers)
        self._record = record
        self._kernels: set[JITFunction] = set()

    def get_current_device(self) -> int:
        return self._number

    def get_current_stream(self, _: int) -> int:
        return self.stream

    def get_current_target(self) -> GPUTarget:
        return self.target

    def launcher_cls(self, source: Any, _: Any) -> Any:
        """The launcher of one compiled kernel, which Triton calls at every launch."""
        self._kernels.add(source.fn)

        def record(x, y, z, stream, function, metadata, launch_metadata, enter, leave, *arguments):
            kernels = source.fn.device_caches[self._number][0].values()
            compiled = next(kernel for kernel in kernels if kernel.src is source)
            self.launches.append(Launch(compiled, (x, y, z), stream, metadata, arguments))

        return _Launcher(record if self._record else lambda *_: None)

    def close(self) -> None:
        """Drop the compiled kernels that Triton keeps; those in `launches` stay."""
        for kernel in self._kernels:
            kernel.device_caches.pop(self._number, None)


@contextmanager
def fake_gpu(
    arch: int = 90, multiprocessors: int = 132, *, record: bool = True
) -> Iterator[FakeGpu]:
    """Have the Triton backend take CPU (or meta) tensors and believe that they are on a GPU.

    Kernels are compiled for it and never run, so what a call returns is uninitialised. Choices of
    backend and block shapes made inside are forgotten at the end, and so are those made before.

    Args:
        arch: compute capability, 10 * major + minor: 80, 90, 100 or another of
            `device.SMEM_BYTES`.
        multiprocessors: their number; the default is an H200's.
        record: as `FakeGpu`.

    Yields:
        The driver, with `launches`.

    Raises:
        ValueError: an unknown arch.
        RuntimeError: the kernels are interpreted (TRITON_INTERPRET), so nothing is compiled.
    """
    if device.INTERPRETED:
        raise RuntimeError("unset TRITON_INTERPRET: interpreted kernels are not compiled")
    if arch not in device.SMEM_BYTES:
        raise ValueError(f"arch must be one of {sorted(device.SMEM_BYTES)}, got {arch}")
    properties = device.Device("pretended", arch, multiprocessors, device.SMEM_BYTES[arch])
    gpu = FakeGpu(properties, record)
    with ExitStack() as stack:
        for owner, name, value in (
            (driver, "_active", gpu),
            (device, "properties", lambda index: properties),
            (backend, "unavailable", lambda: None),
            (backend, "rejects", lambda x: None),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        _forget()
        stack.callback(_forget)
        stack.callback(gpu.close)
        yield gpu


def _forget() -> None:
    """Drop what was remembered for another device."""
    dispatch._load.cache_clear()
    eager_entry.forget_choices()
    launch_cache.forget()
    tuning.forget()
