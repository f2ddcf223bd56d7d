"""Operands: sizes and forms that the operator takes, values that repeat, layouts that keep them."""

from __future__ import annotations

import pytest
import torch

from efft_kernels import low_rank_linear
from efft_kernels.testing.operands import (
    LAYOUTS,
    NAMES,
    Shape,
    forms,
    leaves,
    operands,
    operands_and_dy,
)


def test_the_default_sizes_are_distinct_primes():
    s = Shape()
    sizes = [s.M, s.K, s.n, s.G, s.Ra, s.Rb]
    assert len(set(sizes)) == 6
    assert all(size % d for size in sizes for d in range(2, size))


@pytest.mark.parametrize("lead", [None, (), (2, 3)], ids=str)
@pytest.mark.parametrize("form", forms(Shape()).items(), ids=lambda form: form[0])
def test_the_operator_takes_every_form(form, lead):
    _, shape = form
    *tensors, dy = operands_and_dy(shape, lead=lead)
    assert low_rank_linear(*tensors).shape == dy.shape
    assert [t if t is None else tuple(t.shape) for t in (*tensors, dy)] == list(
        shape.sizes(lead).values()
    )
    assert (tensors[2] is None) == (not shape.bias)


def test_values_repeat_and_are_of_order_one():
    first, again = (operands_and_dy(Shape(), seed=3) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    other = operands(Shape(), seed=4)
    assert all(not torch.equal(first[i], other[name]) for i, name in enumerate(NAMES))
    x, weight, bias, down, core, up, _ = first
    parts = [low_rank_linear(x, weight, None, down, core, 0 * up), bias]
    parts.append(low_rank_linear(x, 0 * weight, None, down, core, up))
    assert all(0.5 < part.std() < 2 for part in parts)


def test_each_group_of_operands_has_its_dtype():
    tensors = operands(
        Shape(), torch.float16, frozen_dtype=torch.bfloat16, factor_dtype=torch.float32
    )
    expected = [torch.float16, *[torch.bfloat16] * 2, *[torch.float32] * 3]
    assert [t.dtype for t in tensors.values()] == expected


@pytest.mark.parametrize("bound", [1, 3])
def test_whole_numbers(bound):
    for t in operands_and_dy(Shape(), torch.bfloat16, density=0.25, bound=bound):
        assert torch.equal(t, t.round()) and t.abs().max() == bound
        assert 0.1 < (t != 0).double().mean() < 0.4


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("size", [(5, 7), (2, 5, 7)], ids=str)
def test_layouts_keep_values(name, size):
    t = torch.randn(size)
    changed = LAYOUTS[name](t)
    assert torch.equal(changed, t[:1].expand_as(t) if name == "expanded" else t)
    if name == "offset":
        assert changed.storage_offset() > 0
    else:
        assert not changed.is_contiguous() and changed.stride() != t.stride()


def test_leaves_are_copies_of_the_same_layout():
    tensors = operands(Shape(bias=False)) | {"x": torch.randn(71, 67).t().double()}
    copies = leaves(tensors, ["x", "up"])
    assert copies["bias"] is None
    assert copies["x"].stride() == tensors["x"].stride()
    assert copies["x"].data_ptr() != tensors["x"].data_ptr()
    assert [name for name, t in copies.items() if t is not None and t.requires_grad] == ["x", "up"]
