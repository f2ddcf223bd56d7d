"""How the kernels walk over the factors: slices, rows and strides on the host."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from efft_kernels.ops.backends.triton.factors import (
    core_strides,
    named_strides,
    read_in_place,
    slices_of,
)


def thin(slices, strides):
    return torch.empty(200).as_strided((slices, 7, 5), strides)


CASES = {
    "each slice its own": (3, (35, 5, 1), True, (3, 7, (35, 5, 1))),
    "two of them": (2, (35, 5, 1), True, (2, 7, (35, 5, 1))),
    "columns first": (2, (35, 1, 7), True, (2, 7, (35, 1, 7))),
    "shared": (1, (35, 5, 1), True, (4, 7, (0, 5, 1))),
    "no core": (2, (35, 5, 1), False, (1, 14, (0, 5, 1))),
    "rows far apart": (2, (42, 6, 1), False, (1, 14, (0, 6, 1))),
    "slices far apart": (2, (40, 5, 1), False, (2, 7, (40, 5, 1))),
    "as far as rows and a stride": (2, (12, 5, 1), False, (2, 7, (12, 5, 1))),
    "the same for all": (3, (0, 5, 1), False, (3, 7, (0, 5, 1))),
    "one slice": (1, (99, 5, 1), False, (1, 7, (0, 5, 1))),
    "one slice, columns first": (1, (35, 1, 7), False, (1, 7, (0, 1, 7))),
    "slices, columns first": (2, (35, 1, 7), False, (2, 7, (35, 1, 7))),
}


@pytest.mark.parametrize(("slices", "strides", "core", "expected"), CASES.values(), ids=CASES)
def test_slices_of_up(slices, strides, core, expected):
    cores = torch.empty(max(slices, expected[0]), 3, 5) if core else None
    assert slices_of(thin(slices, strides), cores) == expected


@pytest.mark.parametrize("strides", [(5, 1), (1, 7)])
def test_down_is_one_slice(strides):
    down = torch.empty(35).as_strided((7, 5), strides)
    assert slices_of(down, None) == (1, 7, (0, *strides))


def test_strides_by_name():
    assert named_strides("down", "ka", (6, 1)) == {"stride_down_k": 6, "stride_down_a": 1}
    assert core_strides(torch.empty(4, 3, 5)) == {
        "stride_core_g": 15,
        "stride_core_a": 5,
        "stride_core_b": 1,
    }
    assert list(core_strides(None).values()) == [0, 0, 0]
    with pytest.raises(ValueError, match="shorter"):
        named_strides("down", "ka", (6,))


@pytest.mark.parametrize(("ra", "rb"), [(32, 32), (33, 5), (5, 33)])
def test_read_in_place(ra, rb):
    assert read_in_place(torch.empty(7, ra), torch.empty(1, 7, rb)) is (max(ra, rb) == 32)
