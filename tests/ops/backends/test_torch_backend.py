"""What the backend in plain torch promises beyond the results that every backend has in common."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from efft_kernels.ops.backends import torch_backend
from efft_kernels.ops.backends.torch_backend import mm_into
from efft_kernels.testing.operands import Shape, operands


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
def test_a_product_in_a_graph_has_a_derivative_on_cuda(half):
    """torch.mm with out_dtype, which it is elsewhere, has none."""
    with FakeTensorMode():
        a = torch.empty(3, 5, device="cuda", dtype=half, requires_grad=True)
        b = torch.empty(5, 7, device="cuda", dtype=half)
        product = mm_into(a, b, torch.float32)
        assert product.dtype == torch.float32 and product.grad_fn.name() == "ToCopyBackward0"
        for frozen, enabled in ((a, False), (a.detach(), True)):
            with torch.set_grad_enabled(enabled), Names() as names:
                assert mm_into(frozen, b, torch.float32).dtype == torch.float32
                assert mm_into(frozen, b, half).dtype == half
                assert mm_into(frozen.float(), b.float(), torch.float32).dtype == torch.float32
            assert names.seen == ["mm, out_dtype", "mm", "mm"]


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(("slices", "rank"), [(1, 3), (2, 1), (3, 3)])
def test_the_fold_stacks_the_slices(slices, rank, shared):
    shape = Shape(M=5, K=7, n=6, G=slices, Ra=rank, Rb=2, shared=shared)
    *_, core, up = operands(shape, torch.float64).values()
    expected = torch.cat([u @ c.T for u, c in zip(up.expand(slices, -1, -1), core, strict=True)])
    torch.testing.assert_close(torch_backend.fold(core, up), expected)


class Names(TorchDispatchMode):
    """The names of the products and copies that ran."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name, _, overload = function.__name__.partition(".")
        name = f"{name}, out_dtype" if overload == "dtype" else name
        self.seen += [name] if name.partition(",")[0] in ("cat", "mm", "addmm", "addmm_") else []
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("device", "bias", "expected"),
    [
        ("cpu", True, ["cat", "cat", "mm", "addmm_"]),
        ("cpu", False, ["mm", "addmm_"]),
        ("cuda", True, ["addmm", "addmm_"]),
        ("cuda", False, ["mm", "addmm_"]),
    ],
)
def test_the_bias_goes_with_the_low_rank_product_on_the_cpu_alone(device, bias, expected):
    with FakeTensorMode():
        t = operands(Shape(M=5, K=7, n=6, G=2, Ra=3, Rb=2, bias=bias), torch.float32)
        x, weight, bias, down, core, up = (v if v is None else v.to(device) for v in t.values())
        b, p = torch_backend.fold(core, up), x @ down
        with Names() as names:
            torch_backend._split(x, weight, bias, p, b)
    assert names.seen == expected


@pytest.mark.parametrize(
    ("strategy", "needed", "expected"),
    [
        ("merged", "x", ["addmm", "mm"]),  # no S
        ("merged", "down", ["mm", "mm"]),
        ("split", "x", ["mm", "mm", "addmm_"]),
        ("split", "down", ["mm", "mm"]),
        ("split", "up", ["mm"]),
    ],
)
def test_no_product_is_made_in_vain(strategy, needed, expected):
    t = operands(Shape(M=5, K=7, n=6, G=2, Ra=3, Rb=2), torch.float32)
    x, weight, _, *factors = t.values()
    dy, p = torch.ones(5, 12), x @ factors[0]
    needs = tuple(name == needed for name in t)
    with Names() as names:
        torch_backend.backward(dy, x, weight, p, *factors, needs=needs, strategy=strategy)
    assert names.seen == expected
