"""What the kernels need to know of the GPU: its architecture, its limits, and how it multiplies."""

from __future__ import annotations

import re
from functools import cache
from typing import NamedTuple

import torch
import triton

INTERPRETED: bool = triton.knobs.runtime.interpret

# Shared memory that a block may allocate, bytes, by architecture (CUDA C++ programming guide,
# technical specifications).
SMEM_BYTES = {
    80: 163 * 1024,
    86: 99 * 1024,
    89: 99 * 1024,
    90: 227 * 1024,
    100: 227 * 1024,
    120: 99 * 1024,
}
TMEM_COLUMNS = 512  # of tensor memory on sm_100, 128 rows of 4 bytes each


class Device(NamedTuple):
    """A CUDA device, as far as block shapes depend on it."""

    name: str  # as a file name
    arch: int  # 10 * major + minor
    multiprocessors: int
    smem_bytes: int  # that a block may allocate


@cache
def properties(index: int | None) -> Device:
    """The CUDA device's properties, read once; None is the current device."""
    found = torch.cuda.get_device_properties(
        torch.cuda.current_device() if index is None else index
    )
    arch = 10 * found.major + found.minor
    smem_bytes = getattr(found, "shared_memory_per_block_optin", SMEM_BYTES.get(arch, 99 * 1024))
    name = re.sub(r"[^A-Za-z0-9]+", "_", found.name).strip("_")
    return Device(name, arch, found.multi_processor_count, smem_bytes)


def family(arch: int) -> int:
    """The architecture whose configs serve `arch`: 80, 90 or 100.

    sm_120 has neither wgmma nor tensor memory and as little shared memory as sm_86, so sm_80's
    serve it as well.
    """
    return 100 if 100 <= arch < 120 else 90 if arch == 90 else 80


def multiprocessors(index: int | None) -> int:
    """Programs of a persistent grid; in the interpreter few, so that each has several tiles."""
    return 3 if INTERPRETED else properties(index).multiprocessors


def fuses_loops(index: int | None) -> bool:
    """Whether a persistent program's loop over tiles becomes one with the loop inside.

    Triton 3.6 fails on it where the accumulator is in tensor memory.
    """
    return not INTERPRETED and family(properties(index).arch) < 100


def dot_precision(dtype: torch.dtype) -> str:
    """tl.dot's input_precision: "tf32" for float32 where torch's own products may use it."""
    if dtype != torch.float32 or INTERPRETED:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
