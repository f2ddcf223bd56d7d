"""The mask of dropout, bit for bit the one of plain torch."""

from __future__ import annotations

import pytest
import torch

from efft_kernels.ops.backends.triton.keep import launch_keep
from efft_kernels.ops.dropout_mask import keep_mask


@pytest.mark.parametrize("seed", [0, 1, 2**31, 0x2545F4914F6CDD1D, 2**62 - 1])
@pytest.mark.parametrize(("rows", "columns", "p"), [(257, 13, 0.4), (1, 1, 0.5), (31, 64, 1e-3)])
def test_is_the_mask(seed, rows, columns, p, dtype, device):
    found = launch_keep(torch.tensor(seed, device=device), rows, columns, p, dtype)
    assert found.dtype == dtype
    assert torch.equal(found.cpu(), keep_mask(torch.tensor(seed), rows, columns, p, dtype))


@pytest.mark.parametrize("size", [(0, 3), (3, 0)])
def test_no_entries(size, dtype, device):
    assert launch_keep(torch.tensor(1, device=device), *size, 0.5, dtype).shape == size


def test_rates_at_the_ends(dtype, device):
    seed = torch.tensor(3, device=device)
    assert launch_keep(seed, 50, 7, 0.0, dtype).all()
    assert not launch_keep(seed, 50, 7, 1 - 2.0**-40, dtype).any()


def test_the_last_number_that_is_dropped(dtype, device):
    """The number of one entry, found bit by bit, is the largest rate that keeps it."""
    seed, number = torch.tensor(5, device=device), 0

    def kept(least):
        return launch_keep(seed, 3, 2, least / 2**31, dtype)[2, 1].item()

    for bit in reversed(range(31)):
        number += int(kept(number + 2**bit)) << bit
    for least, is_kept in ((number, 1), (number + 1, 0)):
        mask = keep_mask(seed.cpu(), 3, 2, least / 2**31, dtype)
        assert mask[2, 1] == kept(least) == is_kept
