"""The kernels of the CUDA backend by short names: those that were built, and those that ran.

    sm90-bf16-192-16-C    the sm_90a GEMM: 192 columns a tile, 16 of P beside them, w in rows of C
    sm80-bf16-128-I       the general GEMM: tiles of 128 × 128, w in rows of I
    thin-bf16-32, thin_grad-bf16-32, tall_grad-bf16-32    the passes, with their padded rank
    fold, merge, reduce, unfold

In the forward w lies in rows of I, in dX in rows of C (csrc/cuda/gemm/sm90.cuh).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from ..ops.backends import native_library

DTYPES = {torch.bfloat16: "bf16", torch.float16: "f16"}

# Parts of a kernel's C++ name, mangled or as a profiler shows it.
_KERNEL = re.compile(r"(gemm_sm90|gemm_sm80|thin|tall_grad|reduce|fold|merge|unfold)_kernel")
_DTYPE = re.compile(r"__nv_bfloat16|__half")
_CONFIG = re.compile(r"Config(?:<|ILi)(\d+)(?:(?:, |ELi)(\d+))?")
_LAYOUT = re.compile(r"WLayout[)E](\d)")
_GRAD = re.compile(r", true>|Lb1E")


def kernel_of(name: str) -> str | None:
    """The short name of one of the library's kernels; None for any other.

    Args:
        name: in C++, mangled or as a profiler shows it.
    """
    match = _KERNEL.search(name)
    if match is None or "efft_kernels" not in name:
        return None
    parts = [match[1].removeprefix("gemm_")]
    if match[1] == "thin" and _GRAD.search(name):
        parts = ["thin_grad"]
    if dtype := _DTYPE.search(name):
        parts.append("f16" if dtype[0] == "__half" else "bf16")
    if config := _CONFIG.search(name):
        parts += [number for number in config.groups() if number is not None]
    if layout := _LAYOUT.search(name):
        parts.append("IC"[int(layout[1])])
    return "-".join(parts)


def built_kernels() -> set[str]:
    """Every kernel that the built library holds for some architecture, by its short name."""
    library = native_library.library_path("_native_cuda").read_bytes()
    names = re.findall(rb"_ZN12efft_kernels\w+_kernel\w*", library)
    return {kernel for name in names if (kernel := kernel_of(name.decode())) is not None}


@contextmanager
def recorded_launches() -> Iterator[list[str]]:
    """Within it, launches are recorded; at its end the list holds the C++ names, in their order.

    Whoever calls waits for the kernels before the end. Without a GPU the list stays empty.
    """
    names: list[str] = []
    on_gpu = torch.cuda.is_available()
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as prof:
        yield names
    events = [e for e in prof.events() or () if e.device_type == DeviceType.CUDA]
    names += [e.name for e in sorted(events, key=lambda e: e.time_range.start)]
