"""Autocast: what is cast, what stays wide, and in which dtype gradients come back."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from efft_kernels import low_rank_linear, reference
from efft_kernels.ops.backends import torch_backend
from efft_kernels.ops.shared_projection import linear_plus_projected, project
from efft_kernels.testing.error_budget import assert_within_budget
from efft_kernels.testing.operands import NAMES, Shape, cast, leaves, operands

pytestmark = pytest.mark.usefixtures("route")

STRATEGIES = torch_backend.STRATEGIES
HALVES = [torch.bfloat16, torch.float16]
SHAPE = Shape(M=61, K=67, n=23, Ra=5, Rb=3)


def tensors_of(frozen_dtype=torch.float32):
    """x, weight and bias in `frozen_dtype`, the factors in float32."""
    return operands(SHAPE, frozen_dtype, factor_dtype=torch.float32)


def autocast(half):
    return torch.autocast("cpu", dtype=half)


def step(function, tensors, half=None):
    copies = leaves(tensors)
    if half is None:
        y = function(**copies)
    else:
        with autocast(half):
            y = function(**copies)
    y.float().sin().sum().backward()  # outside the context, as in a training loop
    return y.detach(), {name: t.grad for name, t in copies.items() if t is not None}


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("half", HALVES, ids=str)
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_output_dtype(half, x_dtype, backend):
    tensors = tensors_of() | {"x": torch.randn(4, 67).to(x_dtype)}
    with autocast(half):
        assert low_rank_linear(**tensors, backend=backend).dtype == half
        for t in tensors.values():
            t.requires_grad_()
        assert low_rank_linear(**tensors, backend=backend).dtype == half


def in_two_steps(x, weight, bias, down, core, up):
    """By shared_projection, whose linears share P."""
    return linear_plus_projected(x, weight, bias, project(x, down), core, up)


WAYS = {
    **{s: partial(low_rank_linear, backend="torch", strategy=s) for s in STRATEGIES},
    "auto": low_rank_linear,
    "two steps": in_two_steps,
}


def plain(x, weight, bias, down, core, up):
    """torch's own operators."""
    if core is None:
        return F.linear(x, weight, bias) + (x @ down) @ up.flatten(0, 1).T
    t = torch.matmul(x @ down, core.unsqueeze(1).flatten(0, 1))  # [G, M, Rb]
    return F.linear(x, weight, bias) + torch.matmul(t, up.mT).transpose(0, 1).flatten(1)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("factors", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("half", HALVES, ids=str)
def test_error_budget(half, factors, way):
    """Under autocast: at most twice the error of torch's own operators there. Factors in the other
    half precision are composed in neither, or float16 rows would lose three bits to them."""
    tensors = operands(SHAPE, torch.float32, factor_dtype=factors)

    exact_y, exact = step(reference.low_rank_linear, cast(tensors, torch.float64))
    torch_y, torchs = step(plain, tensors, half)
    y, grads = step(WAYS[way], tensors, half)

    assert y.dtype == torch_y.dtype == half
    assert all(grads[name].dtype == tensors[name].dtype for name in NAMES)
    assert_within_budget(
        {"y": y, **grads}, {"y": torch_y, **torchs}, {"y": exact_y, **exact}, rounding=False
    )


@pytest.mark.parametrize("way", WAYS)
def test_composed_factors_may_leave_the_range_of_their_own_dtype(way):
    """core·up of float16 factors reaches 1e6, which bfloat16 rows hold and float16 does not."""
    tensors = operands(SHAPE, torch.float32, factor_dtype=torch.float16)
    tensors |= {"core": tensors["core"] * 1e3, "up": tensors["up"] * 1e3}
    y, grads = step(WAYS[way], tensors, torch.bfloat16)
    assert y.isfinite().all() and grads["x"].isfinite().all()


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("half", HALVES, ids=str)
def test_factor_gradients_are_float32_beside_half_precision(half, strategy):
    """x and weight stored in half precision, factors in float32, no autocast."""
    _, grads = step(lambda **t: low_rank_linear(**t, strategy=strategy), tensors_of(half))
    assert [grads[name].dtype for name in NAMES] == [half] * 3 + [torch.float32] * 3


@pytest.mark.parametrize("half", HALVES, ids=str)
def test_merged_adds_the_increment_in_float32(half):
    """W0 + ΔW is rounded once at most: as exact as the layer with that weight, unlike the sum of
    two roundings. Over many draws, since in one of them luck is worth up to a sixth."""
    found_error = once_error = twice_error = 0.0
    for seed in range(16):
        tensors = operands(SHAPE, torch.float32, seed=seed)
        for name in ("down", "core", "up"):
            tensors[name] = tensors[name] * 0.3
        delta = reference.delta_weight(tensors["down"], tensors["core"], tensors["up"], 3)
        once = (tensors["weight"] + delta).to(half)
        twice = tensors["weight"].to(half) + delta.to(half)
        assert not torch.equal(once, twice)
        with autocast(half):
            found = low_rank_linear(**tensors, strategy="merged")
        x, bias = tensors["x"].to(half), tensors["bias"].to(half)
        exact = F.linear(x.double(), (tensors["weight"] + delta).double(), bias.double())
        found_error += (found.double() - exact).square().sum()
        once_error += (F.linear(x, once, bias).double() - exact).square().sum()
        twice_error += (F.linear(x, twice, bias).double() - exact).square().sum()
    assert found_error <= 1.01**2 * once_error
    assert found_error < 0.95**2 * twice_error


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("half", HALVES, ids=str)
def test_error_budget_where_all_else_is_in_the_other_half_precision(half, way):
    """Weight and factors in bfloat16 beside float16 rows, and the reverse. Without a core nothing
    is wide before it meets the rows, and a sum in bfloat16 would cost them three bits."""
    other = HALVES[1 - HALVES.index(half)]
    shape = replace(SHAPE, core=False)
    tensors = operands(shape, torch.float32, frozen_dtype=other, factor_dtype=other)

    exact_y, exact = step(reference.low_rank_linear, cast(tensors, torch.float64))
    torch_y, torchs = step(plain, tensors, half)
    y, grads = step(WAYS[way], tensors, half)
    assert_within_budget(
        {"y": y, **grads}, {"y": torch_y, **torchs}, {"y": exact_y, **exact}, rounding=False
    )


def test_mixed_parameter_dtypes_are_welcome():
    tensors = tensors_of()
    tensors |= {"weight": tensors["weight"].bfloat16(), "bias": tensors["bias"].half()}
    y, grads = step(low_rank_linear, tensors, torch.bfloat16)
    assert y.dtype == torch.bfloat16
    assert all(grads[name].dtype == tensors[name].dtype for name in NAMES)


def test_float64_is_left_alone():
    """As torch's own operators do."""
    tensors = cast(tensors_of(), torch.float64)
    with autocast(torch.bfloat16):
        y = low_rank_linear(**tensors)
        assert F.linear(*list(tensors.values())[:2]).dtype == torch.float64
    torch.testing.assert_close(y, reference.low_rank_linear(**tensors), rtol=1e-12, atol=1e-12)


def test_ambient_autocast_adds_no_cast_inside_the_operators():
    """Float64 gradients stay exact when both passes run under autocast."""
    tensors = cast(tensors_of(), torch.float64)
    _, expected = step(reference.low_rank_linear, tensors)
    copies = leaves(tensors)
    with autocast(torch.bfloat16):
        low_rank_linear(**copies).sin().sum().backward()
    for name, t in copies.items():
        torch.testing.assert_close(t.grad, expected[name], rtol=1e-5, atol=1e-5)


def test_saves_x_once_and_in_half_precision():
    tensors = tensors_of()
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
    tensors = tensors_of()
    with torch.autocast("cpu", enabled=False):
        assert low_rank_linear(**tensors).dtype == torch.float32
        with pytest.raises(TypeError, match="outside autocast"):
            low_rank_linear(**(tensors | {"weight": tensors["weight"].bfloat16()}))
