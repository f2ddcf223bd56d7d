"""A mask of dropout that is a function of a seed, a row and a column, so that none has to be kept.

Numbers have 31 bits, products are taken modulo 2^31, and ^ is the exclusive or. In 64 bits nothing
overflows, and 32 bits that wrap, cut to 31, give the same. With

    mix(z):    z ^= z >> 16;   z *= 0x21F0AAAD;   z ^= z >> 15;   z *= 0x735A2D97;   z ^= z >> 15
    word(i)  = mix(i ^ (low 31 bits of the seed · 0x1E3779B9)),   i taken modulo 2^31

an entry is kept where

    mix(word(row) ^ word(-1 - column) ^ high 31 bits of the seed) >= round(p · 2^31)

and dropped with probability p to within 2^-32. The seed's product keeps the masks of seeds that
follow one another apart. `mix` is Ellis's lowbias32 with its later constants
(github.com/skeeto/hash-prospector) on 31 bits: flipping any bit of z flips each bit of the result
with a probability within 0.003 of one half. Rows and columns are mixed by themselves first, on
M + C numbers, which leaves one `mix` for each of the M·C entries.
"""

from __future__ import annotations

import torch
from torch import Tensor

BITS = 31
_ONES = (1 << BITS) - 1


def new_seed(device: torch.device) -> Tensor:
    """[], int64: 62 bits from torch's generator of the device. Nothing is sent to the host."""
    return torch.randint(1 << 2 * BITS, (), device=device)


def keep_mask(seed: Tensor, rows: int, columns: int, p: float, dtype: torch.dtype) -> Tensor:
    """[rows, columns] in `dtype`, on the seed's device: 1 where an entry is kept, else 0.

    Args:
        seed: [], int64, from `new_seed`.
        rows: M. More rows or columns do not change the entries that are there.
        columns: C.
        p: probability of dropping an entry, at least 0 and below 1.
        dtype: of the result, floating.
    """
    # Half as wide, numbers take a third of the time on the CPU. But an int32 product that overflows
    # is undefined in the C++ that Inductor writes, and gcc makes use of it.
    width = torch.int64 if torch.compiler.is_compiling() else torch.int32
    low, high = (seed & _ONES) * 0x1E3779B9 & _ONES, seed >> BITS
    # A column is counted down from -1, so that no row has its number.
    i = torch.arange(-columns, rows, dtype=width, device=seed.device)
    words = _mix_((i ^ low.to(width)).bitwise_and_(_ONES))
    entries = _mix_(words[columns:].unsqueeze(1) ^ (words[:columns].flip(0) ^ high.to(width)))
    # In place the comparison gives 0 and 1 in integers, five times as fast as booleans on the CPU.
    return entries.gt_(round(p * (1 << BITS)) - 1).to(dtype)


def _mix_(z: Tensor) -> Tensor:
    """`mix` of every number of z, in place."""
    z.bitwise_xor_(z >> 16).mul_(0x21F0AAAD).bitwise_and_(_ONES)
    z.bitwise_xor_(z >> 15).mul_(0x735A2D97).bitwise_and_(_ONES)
    return z.bitwise_xor_(z >> 15)
