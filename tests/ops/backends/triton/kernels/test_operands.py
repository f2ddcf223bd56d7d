"""Operands of any layout, address, dtype and magnitude, and any choice of gradients."""

from __future__ import annotations

import pytest
import torch

from efft_kernels import low_rank_linear
from efft_kernels.ops import dispatch, reference
from efft_kernels.ops.backends import triton as backend
from efft_kernels.testing.error_budget import assert_within_budget, relative_error
from efft_kernels.testing.operands import (
    LAYOUTS,
    NAMES,
    ONE_SLICE,
    SHARED,
    Shape,
    operands,
    operands_and_dy,
)
from efft_kernels.testing.results import (
    backend_results,
    differentiate,
    plain_and_exact,
    results_within_budget,
)

SMALL = Shape(M=37, K=41, n=23)


def assert_same_bits(got, expected) -> None:
    for name, value in got.items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "offset"])
def test_every_layout(layout, strategy, device):
    *tensors, dy = operands_and_dy(SMALL, torch.float32, device=device)
    x, weight, bias, down, core, up = tensors
    x, weight, down, up, dy = (LAYOUTS[layout](t) for t in (x, weight, down, up[0], dy))
    changed = (x, weight, bias, down, core.mT.contiguous().mT, up[None], dy)
    contiguous = [t.contiguous() for t in changed]
    got, expected = (backend_results(backend, each, strategy) for each in (changed, contiguous))
    # Torch's own sums: on a GPU their order depends on the strides.
    for name in ("weight", "bias"):
        assert relative_error(got.pop(name), expected.pop(name)) < 1e-6, name
    assert_same_bits(got, expected)


def test_a_backward_of_columns_first_and_one_without_x(device):
    *tensors, dy = operands_and_dy(SMALL, torch.float32, device=device)
    x, weight, _, down, core, up = tensors
    p = x @ down

    def backward(dy, x, p, needs):
        needs = tuple(name in needs for name in NAMES)
        return backend.backward(dy, x, weight, p, down, core, up, needs=needs, strategy="split")

    def across(t):
        return t.t().contiguous().t()

    dx, *_, d_up = backward(dy, x, p, ("x", "down", "up"))
    found, *_, found_up = backward(across(dy), across(x), across(p), ("x", "down", "up"))
    assert torch.equal(found, dx) and torch.equal(found_up, d_up)
    for wanted in ("weight", "bias"):
        found = backward(dy, x, p, (wanted,))
        assert [NAMES[i] for i, grad in enumerate(found) if grad is not None] == [wanted]
    for rows in (dy, across(dy)):
        assert torch.equal(backward(rows, None, None, ("x",))[0], dx)
        assert torch.equal(backward(rows, None, p, ("up",))[5], d_up)


def test_slices_of_up_with_rows_between_them(strategy, device):
    """Without a core: what lies between is no slice's."""
    shape = Shape(M=37, K=41, n=23, core=False, shared=False)
    tensors = list(operands_and_dy(shape, torch.float32, device=device))
    up = tensors[5]
    storage = up.new_full((shape.G, shape.n + 3, up.shape[2]), torch.nan)
    storage[:, : shape.n] = up
    tensors[5] = storage[:, : shape.n]
    results_within_budget(backend, tensors, strategy)


@pytest.mark.parametrize("needed", ["x", "weight bias", "down", "x down", "down up", "core"])
def test_only_what_is_needed(needed, strategy, device):
    needs = [name in needed.split() for name in NAMES]
    tensors = operands_and_dy(SMALL, torch.float32, device=device)
    got = results_within_budget(backend, tensors, strategy, needs)
    assert set(got) - {"y", "p"} == set(needed.split())


def test_float32_weight_and_factors_beside_half_precision_rows(strategy, device):
    """As under autocast: y is as good as from operands cast beforehand, and factor gradients are
    float32.
    """
    *tensors, dy = operands_and_dy(SHARED, torch.float32, device=device)
    mixed = (tensors[0].half(), *tensors[1:], dy.half())
    got = backend_results(backend, mixed, strategy)
    p = got.pop("p")
    assert got["y"].dtype == p.dtype == got["x"].dtype == torch.float16
    assert_within_budget(got, *plain_and_exact(mixed), rounding=False)


@pytest.mark.parametrize("ranks", [(5, 3), (40, 3)], ids=str)
def test_float64_factors_beside_half_precision_rows(ranks, strategy, device):
    """Under autocast the factors may have any floating dtype."""
    tensors = operands_and_dy(
        Shape(M=37, K=41, n=23, Ra=ranks[0], Rb=ranks[1]),
        torch.float16,
        frozen_dtype=torch.float32,
        factor_dtype=torch.float64,
        device=device,
    )
    got = backend_results(backend, tensors, strategy)
    judged = {name: got[name] for name in ("x", "down", "core", "up", "y")}
    assert_within_budget(judged, *plain_and_exact(tensors), rounding=False)


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1e3])
@pytest.mark.parametrize("of", ["core", "up", "dy"])
def test_gradients_of_any_magnitude_in_float16(of, scale, device):
    """P·core and dY·up may leave float16's range although no gradient does."""
    tensors = list(operands_and_dy(SHARED, torch.float32, device=device))
    position = {"core": 4, "up": 5, "dy": 6}[of]
    tensors[position] *= min(scale, 10.0) if of == "dy" else scale  # dY itself has to fit
    tensors[0], tensors[6] = tensors[0].half(), tensors[6].half()
    needs = [name in ("core", "up") for name in NAMES]
    got = backend_results(backend, tensors, "split", needs)
    plain, exact = plain_and_exact(tensors)
    eps = torch.finfo(torch.float16).eps
    for name in ("core", "up"):
        torch_error = relative_error(plain[name], exact[name])
        budget = 2 * max(eps, torch_error if of == "up" else 0.0)
        assert relative_error(got[name], exact[name]) < budget, name


def test_the_same_bits_every_time(strategy, device):
    # The interpreter knows no other order.
    shape = SMALL if device == "cpu" else ONE_SLICE
    tensors = operands_and_dy(shape, torch.float16, device=device)
    assert_same_bits(*(backend_results(backend, tensors, strategy) for _ in range(2)))


@pytest.mark.parametrize("save_p", [True, False])
def test_an_infinity_stays_an_infinity_in_its_row(strategy, save_p, device):
    """The rank's padding, infinity times zero, must not make it a NaN."""
    tensors = [t.abs() for t in operands(SMALL, torch.float32, device=device).values()]
    tensors[0][5, 3] = torch.inf
    y, _ = backend.forward(*tensors, save_p=save_p, strategy=strategy)
    assert torch.equal(y.isinf(), reference.low_rank_linear(*tensors).isinf())
    assert not y.isnan().any() and y[5].isinf().all()


def test_an_infinity_in_dy_stays_in_its_column(device):
    """Products of its tile are scaled by their largest magnitude, which then is none."""
    tensors = list(operands_and_dy(SMALL, torch.float16, device=device))
    tensors[6][5, 3] = torch.inf
    got = backend_results(backend, tensors, "split", [name in ("x", "up") for name in NAMES])
    _, exact = plain_and_exact(tensors)
    for name in ("x", "up"):
        finite = exact[name].isfinite()
        assert finite.any() and not finite.all()
        assert torch.equal(got[name].isfinite(), finite), name
        assert relative_error(got[name][finite], exact[name][finite]) < 2e-3, name


@pytest.mark.parametrize("strategy", ["auto", *dispatch.STRATEGIES])
def test_through_the_public_operator(strategy, device):
    tensors = operands(SHARED, torch.float32, lead=(1, SHARED.M), device=device)

    def function(**tensors):
        return low_rank_linear(**tensors, backend="triton", strategy=strategy)

    wide = {name: t.double() for name, t in tensors.items()}
    y, grads = differentiate(function, tensors)
    exact_y, exact = differentiate(reference.low_rank_linear, wide)
    assert relative_error(y, exact_y) < 1e-6
    for name in NAMES:
        assert relative_error(grads[name], exact[name]) < 2e-6, name


def test_a_bias_of_any_stride(strategy, device):
    tensors = list(operands_and_dy(SMALL, torch.float32, device=device))
    tensors[2] = torch.stack((tensors[2], torch.full_like(tensors[2], torch.nan)), 1)[:, 0]
    results_within_budget(backend, tensors, strategy)


def test_the_same_sizes_at_any_address(strategy, device):
    """Slices that start on 16 bytes and off them, in turn: sizes and strides are the same. Off them
    `fused` runs as `split`.
    """
    size = 16 if device == "cpu" else 32
    shape = Shape(M=size + 16, K=2 * size, n=size, Ra=16, Rb=16)
    tensors = operands_and_dy(shape, torch.float16, device=device)
    on_16_bytes = backend_results(backend, tensors, strategy)
    off_them = backend_results(backend, tensors, "split") if strategy == "fused" else on_16_bytes
    for offset in (1, 0, 8, 1):
        moved = []
        for t in tensors:
            storage = t.new_full((t.numel() + offset,), torch.nan)
            storage[offset:] = t.flatten()
            moved.append(storage[offset:].view(t.shape))
        expected = off_them if offset % 8 else on_16_bytes
        assert_same_bits(backend_results(backend, moved, strategy), expected)
