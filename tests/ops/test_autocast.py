"""Autocast: what is cast, what stays wide, and in which dtype gradients come back."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from efft_kernels import low_rank_linear, reference

pytestmark = pytest.mark.usefixtures("route")

NAMES = ("x", "weight", "bias", "down", "core", "up")
STRATEGIES = ("split", "merged")
HALVES = [torch.bfloat16, torch.float16]


def operands(dtype=torch.float32, m=61, k=67, per_slice=23):
    n = 3 * per_slice
    return {
        "x": torch.randn(m, k).to(dtype),
        "weight": (torch.randn(n, k) * k**-0.5).to(dtype),
        "bias": torch.randn(n).to(dtype),
        "down": torch.randn(k, 5) * k**-0.5,
        "core": torch.randn(3, 5, 3),
        "up": torch.randn(1, per_slice, 3),
    }


def autocast(half):
    return torch.autocast("cpu", dtype=half)


def step(function, tensors, half=None):
    leaves = {name: t.detach().clone().requires_grad_() for name, t in tensors.items()}
    if half is None:
        y = function(**leaves)
    else:
        with autocast(half):
            y = function(**leaves)
    y.float().sin().sum().backward()  # outside the context, as in a training loop
    return y.detach(), {name: t.grad for name, t in leaves.items()}


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("half", HALVES, ids=str)
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_output_dtype(half, x_dtype, backend):
    tensors = operands() | {"x": torch.randn(4, 67).to(x_dtype)}
    with autocast(half):
        assert low_rank_linear(**tensors, backend=backend).dtype == half
        for t in tensors.values():
            t.requires_grad_()
        assert low_rank_linear(**tensors, backend=backend).dtype == half


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("half", HALVES, ids=str)
def test_error_budget(half, strategy):
    """Float32 tensors under autocast: at most twice the error of torch's own operators there."""
    tensors = operands()

    def plain(x, weight, bias, down, core, up):
        t = torch.matmul(x @ down, core.unsqueeze(1).flatten(0, 1))  # [G, M, Rb]
        return F.linear(x, weight, bias) + torch.matmul(t, up.mT).transpose(0, 1).flatten(1)

    exact_y, exact = step(reference.low_rank_linear, {n: t.double() for n, t in tensors.items()})
    torch_y, torchs = step(plain, tensors, half)
    y, grads = step(lambda **t: low_rank_linear(**t, strategy=strategy), tensors, half)

    def error(found, right):
        return ((found.double() - right).norm() / right.norm()).item()

    assert y.dtype == torch_y.dtype == half
    assert error(y, exact_y) <= 2 * error(torch_y, exact_y)
    for name in NAMES:
        assert grads[name].dtype == torch.float32, name
        assert error(grads[name], exact[name]) <= 2 * error(torchs[name], exact[name]), name


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("half", HALVES, ids=str)
def test_factor_gradients_are_float32_beside_half_precision(half, strategy):
    """x and weight stored in half precision, factors in float32, no autocast."""
    _, grads = step(lambda **t: low_rank_linear(**t, strategy=strategy), operands(half))
    assert [grads[name].dtype for name in NAMES] == [half] * 3 + [torch.float32] * 3


@pytest.mark.parametrize("half", HALVES, ids=str)
def test_merged_adds_the_increment_in_float32(half):
    """W0 + ΔW is rounded once at most: as exact as the layer with that weight, unlike the sum of
    two roundings."""
    tensors = operands()
    for name in ("down", "core", "up"):
        tensors[name] = tensors[name] * 0.1
    delta = reference.delta_weight(tensors["down"], tensors["core"], tensors["up"], 3)
    once = (tensors["weight"] + delta).to(half)
    twice = tensors["weight"].to(half) + delta.to(half)
    assert not torch.equal(once, twice)
    with autocast(half):
        found = low_rank_linear(**tensors, strategy="merged")
    x, bias = tensors["x"].to(half), tensors["bias"].to(half)
    exact = F.linear(x.double(), (tensors["weight"] + delta).double(), bias.double())
    error = (found.double() - exact).norm()
    assert error <= 1.01 * (F.linear(x, once, bias).double() - exact).norm()
    assert error < 0.95 * (F.linear(x, twice, bias).double() - exact).norm()


def test_mixed_parameter_dtypes_are_welcome():
    tensors = operands()
    tensors |= {"weight": tensors["weight"].bfloat16(), "bias": tensors["bias"].half()}
    y, grads = step(low_rank_linear, tensors, torch.bfloat16)
    assert y.dtype == torch.bfloat16
    assert all(grads[name].dtype == tensors[name].dtype for name in NAMES)


def test_float64_is_left_alone():
    """As torch's own operators do."""
    tensors = {name: t.double() for name, t in operands().items()}
    with autocast(torch.bfloat16):
        y = low_rank_linear(**tensors)
        assert F.linear(*list(tensors.values())[:2]).dtype == torch.float64
    torch.testing.assert_close(y, reference.low_rank_linear(**tensors), rtol=1e-12, atol=1e-12)


def test_ambient_autocast_adds_no_cast_inside_the_operators():
    """Float64 gradients stay exact when both passes run under autocast."""
    tensors = {name: t.double() for name, t in operands().items()}
    _, expected = step(reference.low_rank_linear, tensors)
    leaves = {name: t.clone().requires_grad_() for name, t in tensors.items()}
    with autocast(torch.bfloat16):
        low_rank_linear(**leaves).sin().sum().backward()
    for name, t in leaves.items():
        torch.testing.assert_close(t.grad, expected[name], rtol=1e-5, atol=1e-5)


def test_saves_x_once_and_in_half_precision():
    tensors = operands()
    for name in ("x", "down", "core", "up"):
        tensors[name].requires_grad_()
    own = {t.untyped_storage().data_ptr() for t in tensors.values()}
    extra = []

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            extra.append((tuple(tensor.shape), tensor.dtype))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), autocast(torch.bfloat16):
        low_rank_linear(**tensors)
    assert sorted(extra) == [((61, 5), torch.bfloat16), ((61, 67), torch.bfloat16)]


def test_disabled_autocast_is_no_autocast():
    tensors = operands()
    with torch.autocast("cpu", enabled=False):
        assert low_rank_linear(**tensors).dtype == torch.float32
        with pytest.raises(TypeError, match="outside autocast"):
            low_rank_linear(**(tensors | {"weight": tensors["weight"].bfloat16()}))
