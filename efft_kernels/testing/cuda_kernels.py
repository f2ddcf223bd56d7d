"""The kernels of the CUDA backend by short names: those that were built, and those that ran.

    sm90-bf16-192-16-C    the sm_90a GEMM: 192 columns a tile, 16 of P beside them, w in rows of C
    sm80-bf16-128-I       the general GEMM: tiles of 128 × 128, w in rows of I
    thin-bf16-32, tall_grad-bf16-32, thin_grad-bf16       the passes, with their padded rank
    thin-bf16-32-odd                                      rows that are not of whole 16 bytes
    fold-f32, merge-f32, unfold-f32, reduce               the small ones, with what they read
    norm-bf16-384, norm_grad-bf16-384, pair_grad-f16-512  a chain's, with the threads they are for
    gelu_grad-bf16, gelu-bf16-3                           a chain's too, the latter with its stages
    norm_grad-bf16-384-before                             with S and d_B of the linear before it

In the forward w lies in rows of I, in dX in rows of C (csrc/cuda/gemm/sm90.cuh).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from ..ops.backends import native_library

DTYPES = {torch.bfloat16: "bf16", torch.float16: "f16"}

# Parts of a kernel's C++ name, mangled or as a profiler shows it.
_PASSES = ("thin", "thin_grad", "tall_grad")
_CHAIN = ("norm", "norm_grad", "pair_grad", "gelu")
_OTHERS = ("gemm_sm90", "gemm_sm80", "gelu_grad", "reduce", "fold", "merge", "unfold")
_KERNEL = re.compile(
    rf"({'|'.join((*_OTHERS, *_PASSES, *_CHAIN))})_kernel"
    r"(?:(?:<|I)\d*(__nv_bfloat16|__half|f))?"
)
_DTYPES = {"__nv_bfloat16": "bf16", "__half": "f16", "f": "f32"}
_CONFIG = re.compile(r"Config(?:<|ILi)(\d+)(?:(?:, |ELi)(\d+))?")
_THREADS = re.compile(rf"(?:{'|'.join(_CHAIN)})_kernel(?:<\w+, |I\d*[a-z_]\w*?Li)(\d+)")
_LAYOUT = re.compile(r"WLayout[)E](\d)")
_FLAG = re.compile(r", true>|Lb1E")  # the last argument, where it is a bool


def kernel_of(name: str) -> str | None:
    """The short name of one of the library's kernels; None for any other.

    Args:
        name: in C++, mangled or as a profiler shows it.
    """
    match = _KERNEL.search(name)
    if match is None or "efft_kernels" not in name:
        return None
    parts = [match[1].removeprefix("gemm_")]
    if match[2]:
        parts.append(_DTYPES[match[2]])
    if config := _CONFIG.search(name):
        parts += [number for number in config.groups() if number is not None]
    if threads := _THREADS.search(name):
        parts.append(threads[1])
    if layout := _LAYOUT.search(name):
        parts.append("IC"[int(layout[1])])
    if match[1] in _PASSES and not _FLAG.search(name):
        parts.append("odd")
    if match[1] == "norm_grad" and _FLAG.search(name):
        parts.append("before")
    return "-".join(parts)


def built_kernels() -> set[str]:
    """Every kernel that the built library holds for some architecture, by its short name; by its
    mangled one where `kernel_of` does not know it.
    """
    library = native_library.library_path("_native_cuda").read_bytes()
    found = re.findall(rb"_ZN12efft_kernels\w*(?<!launch)_kernel[IE]\w*", library)
    names = {name.decode() for name in found}
    return {kernel_of(name) or name for name in names}


@contextmanager
def recorded_launches() -> Iterator[list[str]]:
    """Within it, launches are recorded; at its end the list holds the C++ names, in their order.

    Whoever calls waits for the kernels before the end. Without a GPU the list stays empty.
    """
    names: list[str] = []
    if torch.cuda.is_available():
        _warm_up()
    with _profile() as prof:
        yield names
    events = [e for e in prof.events() or () if e.device_type == DeviceType.CUDA]
    names += [e.name for e in sorted(events, key=lambda e: e.time_range.start)]


def _profile() -> profile:
    on_gpu = torch.cuda.is_available()
    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    return profile(activities=[activity], acc_events=True)


@cache
def _warm_up() -> None:
    """The first recording of a process takes a second and may miss launches."""
    with _profile():
        torch.ones(1, device="cuda").add_(1)
        torch.cuda.synchronize()
