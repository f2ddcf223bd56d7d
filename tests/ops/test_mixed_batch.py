"""`tasks_linear`: every item with its own task's factors, by the C++ kernel and by plain torch."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from efft_kernels.ops.backends import native_library
from efft_kernels.ops.mixed_batch import tasks_linear

BACKENDS = [
    "torch",
    pytest.param(
        "cpp",
        marks=pytest.mark.skipif(bool(native_library.not_built("_native")), reason="not built"),
    ),
]


def operands(items, rows, k, n, tasks, ra, dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)

    def draw(*shape, scale=1.0):
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)

    x, weight, bias = draw(items, rows, k), draw(n, k, scale=k**-0.5), draw(n)
    down, b = draw(tasks, k, ra, scale=k**-0.5), draw(tasks, n, ra, scale=ra**-0.5)
    index = torch.randint(tasks, (items,), generator=generator)
    return x, weight, bias, down, b, index


def one_by_one(x, weight, bias, down, b, index):
    """The specification: each item by itself, in float64."""
    x, weight, bias, down, b = (t.double() for t in (x, weight, bias, down, b))
    merged = [weight + b[t] @ down[t].T for t in index.tolist()]
    return torch.stack([item @ w.T + bias for item, w in zip(x, merged, strict=True)])


# Beyond a block of rows (200), a tile's (400), a range's (2,048), a packed step (384) and a panel
# (48), and below all of them; items that such a block ends within, and of one row.
# (items, rows, K, N, tasks, Ra)
SHAPES = [
    (7, 11, 13, 17, 3, 5),
    (1, 1, 1, 1, 1, 1),
    (3, 211, 401, 53, 2, 17),
    (5, 197, 48, 96, 5, 16),
    (2, 431, 30, 101, 4, 130),
    (90, 23, 5, 50, 3, 2),
    (411, 1, 7, 9, 4, 3),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_each_item_gets_its_own_task(shape, backend, poisoned_memory):
    tensors = operands(*shape)
    y = tasks_linear(*tensors, backend=backend)
    torch.testing.assert_close(y, one_by_one(*tensors), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_operands_of_any_strides(backend):
    """Each a part of a larger tensor, whose other numbers are NaN; bias every second of them."""
    tensors = operands(3, 11, 13, 17, 2, 5)
    expected = one_by_one(*tensors)
    parts = [
        torch.nn.functional.pad(t, (1, 2, 1, 2), value=torch.nan)[..., 1:-2, 1:-2]
        for t in tensors
        if t.dim() > 1
    ]
    x, weight, down, b = parts
    bias = torch.stack([tensors[2], torch.full_like(tensors[2], torch.nan)], -1)[:, 0]
    index = tensors[5].repeat_interleave(2)[::2]
    y = tasks_linear(x, weight, bias, down, b, index, backend=backend)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.skipif(bool(native_library.not_built("_native")), reason="not built")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 9, 50, 197])
def test_an_item_has_the_same_bits_wherever_it_is(rows, dtype):
    x, weight, bias, down, b, _ = operands(1, rows, 400, 101, 2, 16, dtype)
    index = torch.zeros(1000 // rows, dtype=torch.int64)
    same = x.expand(len(index), -1, -1)
    y = tasks_linear(same, weight, bias, down, b, index, backend="cpp")
    assert torch.equal(y, y[:1].expand_as(y))
    assert torch.equal(y[:1], tasks_linear(x, weight, bias, down, b, index[:1], backend="cpp"))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_error_budget(dtype, backend):
    tensors = operands(4, 197, 96, 144, 3, 16, dtype)
    exact = one_by_one(*tensors)
    plain = torch.nn.functional.linear(tensors[0], tensors[1], tensors[2]).double()
    floor = torch.nn.functional.linear(*(t.double() for t in tensors[:3]))
    y = tasks_linear(*tensors, backend=backend).double()
    assert (y - exact).abs().max() <= 2 * (plain - floor).abs().max() + torch.finfo(dtype).eps


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_items_and_no_rows(backend):
    for items, rows in ((0, 5), (3, 0)):
        tensors = operands(items, rows, 7, 5, 2, 3)
        assert tasks_linear(*tensors, backend=backend).shape == (items, rows, 5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_windows_of_an_item_have_its_task(backend):
    x, *rest, index = operands(6, 5, 7, 11, 3, 3)
    for items in (1, 2, 3):
        few = index[:items]
        expected = one_by_one(x, *rest, few.repeat_interleave(6 // items))
        found = tasks_linear(x, *rest, few, backend=backend)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        found = tasks_linear(x.view(6, 1, 5, 7), *rest, few, backend=backend)
        torch.testing.assert_close(found[:, 0], expected, rtol=1e-12, atol=1e-12)
        found = tasks_linear(x[:, :items], *rest, few, backend=backend)
        torch.testing.assert_close(found, expected[:, :items], rtol=1e-12, atol=1e-12)
    expected = one_by_one(x, *rest, index)
    found = tasks_linear(x.view(6, 1, 5, 7), *rest, index, backend=backend)
    torch.testing.assert_close(found[:, 0], expected, rtol=1e-12, atol=1e-12)
    for items in (5, 4, 0):
        with pytest.raises(ValueError, match=f"got {items} for a leading dimension of 6"):
            tasks_linear(x, *rest, index[:items], backend=backend)


@pytest.mark.skipif(bool(native_library.not_built("_native")), reason="not built")
def test_the_kernel_runs_where_it_can():
    class Operators(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            ran.append(str(function))
            return function(*args, **(kwargs or {}))

    def takes_kernel(dtype=torch.float32, backend="auto", sizes=(2, 3, 7, 5), learns=None):
        tensors = operands(*sizes, 2, 3, dtype)
        if learns is not None:
            tensors[learns].requires_grad_()
        ran.clear()
        with Operators():
            tasks_linear(*tensors, backend=backend)
        return "efft_kernels.native_tasks_fwd.default" in ran

    ran = []
    assert takes_kernel() and takes_kernel(backend="cpp") and takes_kernel(torch.bfloat16)
    assert not takes_kernel(backend="torch")
    assert "aten.baddbmm_.default" in ran  # of y's size there is one
    assert not takes_kernel(torch.float16)  # the kernel has none
    assert not takes_kernel(sizes=(2, 3, 7, 0))
    for operand in range(5):
        assert not takes_kernel(learns=operand)
        with torch.no_grad():
            assert takes_kernel(learns=operand)


def test_a_gradient_goes_by_plain_torch():
    x, *rest = operands(3, 5, 7, 11, 2, 3)
    x.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: tasks_linear(x, *rest), (x,))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", range(5))
def test_forward_derivatives(name, backend):
    """Of any operand; the kernel has none, and would drop them in silence."""
    *tensors, index = operands(3, 4, 7, 9, 2, 2)
    tangent = torch.randn_like(tensors[name])

    def y(t):
        return tasks_linear(*tensors[:name], t, *tensors[name + 1 :], index, backend=backend)

    def specified(t):
        return one_by_one(*tensors[:name], t, *tensors[name + 1 :], index)

    _, expected = torch.func.jvp(specified, (tensors[name],), (tangent,))
    assert expected.norm() > 0.1
    _, found = torch.func.jvp(y, (tensors[name],), (tangent,))
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
    for grad in (False, True):
        with forward_ad.dual_level(), torch.set_grad_enabled(grad):
            found = forward_ad.unpack_dual(y(forward_ad.make_dual(tensors[name], tangent))).tangent
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
    several = torch.stack([tensors[name], tangent])
    torch.testing.assert_close(
        torch.func.vmap(y)(several), torch.stack([specified(t) for t in several])
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("autocast", [False, True])
def test_whole_numbers_are_refused(autocast, backend):
    """Rather than computed with a weight cut to whole numbers."""
    x, *rest = operands(2, 3, 7, 5, 2, 3, torch.float32)
    with (
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
        pytest.raises(TypeError, match=r"x must be float64, .* got torch\.int64"),
    ):
        tasks_linear(x.long(), *rest, backend=backend)


@pytest.mark.skipif(bool(native_library.not_built("_native")), reason="not built")
@pytest.mark.parametrize(
    "changed,text",
    [
        ({5: torch.tensor([0, 2])}, "task_of_item must be in"),
        ({5: torch.tensor([0, -1])}, "task_of_item must be in"),
        ({5: torch.tensor([0, 1], dtype=torch.int32)}, "task_of_item must be"),
        ({4: torch.zeros(2, 4, 3)}, "b must be"),
        ({3: torch.zeros(2, 6, 3)}, "down must be"),
        ({1: torch.zeros(5, 6)}, "weight must be"),
        ({2: torch.zeros(4)}, "bias must be"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refuses_what_does_not_fit(changed, text):
    assert native_library.load_cpu() is None
    tensors = list(operands(2, 3, 7, 5, 2, 3, torch.float32))
    for position, tensor in changed.items():
        tensors[position] = tensor
    with pytest.raises(RuntimeError, match=text):
        torch.ops.efft_kernels.native_tasks_fwd(*tensors)
