"""The mask of `ops/dropout_mask.py`, bit for bit, in one launch in the place of thirty."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .launch_cache import CachedLaunch, cache_of, once

_BLOCK = 1024


@triton.jit
def _mix(z):
    z ^= z >> 16
    z = (z * 0x21F0AAAD) & 0x7FFFFFFF
    z ^= z >> 15
    z = (z * 0x735A2D97) & 0x7FFFFFFF
    return z ^ (z >> 15)


@triton.jit
def _keep_kernel(
    seed_ptr,  # [], int64
    out_ptr,  # [rows, columns], contiguous
    entries,
    columns,
    least,
    BLOCK: tl.constexpr,
):
    """BLOCK entries, in 64 bits, where no product overflows."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    seed = tl.load(seed_ptr)
    low = ((seed & 0x7FFFFFFF) * 0x1E3779B9) & 0x7FFFFFFF
    row = _mix(((offs // columns) ^ low) & 0x7FFFFFFF)
    column = _mix(((-1 - offs % columns) ^ low) & 0x7FFFFFFF)
    kept = _mix(row ^ column ^ (seed >> 31)) >= least
    tl.store(out_ptr + offs, kept.to(out_ptr.dtype.element_ty), mask=offs < entries)


def launch_keep(seed: Tensor, rows: int, columns: int, p: float, dtype: torch.dtype) -> Tensor:
    """What `keep_mask` gives, on the current device."""
    out = torch.empty(rows, columns, dtype=dtype, device=seed.device)
    if out.numel():
        cache = cache_of((seed,), "keep", rows, columns, p, dtype)
        once(cache, "keep", _prepare_keep, rows, columns, p)((seed,), (out,))
    return out


def _prepare_keep(rows: int, columns: int, p: float) -> CachedLaunch:
    entries = rows * columns
    return CachedLaunch(
        _keep_kernel,
        (tuning.cdiv(entries, _BLOCK),),
        {"num_warps": 4},
        entries=entries,
        columns=columns,
        least=round(p * (1 << 31)),
        BLOCK=_BLOCK,
    )
