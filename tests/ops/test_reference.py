"""The specification itself, against loops over every index."""

from __future__ import annotations

import pytest
import torch

from efft_kernels.ops import reference

M, K, RA, RB, PER_SLICE = 2, 5, 3, 2, 7

# (slices, core given, up shared, bias given)
CASES = [
    (1, True, True, True),
    (3, True, True, True),
    (3, True, False, False),
    (1, False, False, True),
    (3, False, False, True),
]


def operands(slices, with_core, shared, with_bias, m=M):
    rb = RB if with_core else RA
    n = slices * PER_SLICE
    shapes = {
        "x": (m, K),
        "weight": (n, K),
        "bias": (n,) if with_bias else None,
        "down": (K, RA),
        "core": (slices, RA, RB) if with_core else None,
        "up": (1 if shared else slices, PER_SLICE, rb),
    }
    return {
        name: None if shape is None else torch.randn(shape, dtype=torch.float64)
        for name, shape in shapes.items()
    }


def delta_by_loops(down, core, up, slices):
    """ΔW[g·N/G + j, k] = Σ_a Σ_b down[k, a] core[g, a, b] up[g or 0, j, b]."""
    delta = torch.zeros(slices * PER_SLICE, K, dtype=torch.float64)
    for g in range(slices):
        for j in range(PER_SLICE):
            for k in range(K):
                total = 0.0
                for a in range(down.shape[1]):
                    for b in range(up.shape[2]):
                        middle = float(a == b) if core is None else core[g, a, b].item()
                        last = up[g if up.shape[0] > 1 else 0, j, b].item()
                        total += down[k, a].item() * middle * last
                delta[g * PER_SLICE + j, k] = total
    return delta


@pytest.mark.parametrize("case", CASES)
def test_output_matches_loops(case):
    t = operands(*case)
    delta = delta_by_loops(t["down"], t["core"], t["up"], case[0])
    expected = torch.zeros(M, case[0] * PER_SLICE, dtype=torch.float64)
    for m in range(M):
        for n in range(expected.shape[1]):
            total = 0.0 if t["bias"] is None else t["bias"][n].item()
            for k in range(K):
                total += t["x"][m, k].item() * (t["weight"][n, k].item() + delta[n, k].item())
            expected[m, n] = total
    torch.testing.assert_close(reference.low_rank_linear(**t), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_delta_weight_matches_loops(case):
    t = operands(*case)
    expected = delta_by_loops(t["down"], t["core"], t["up"], case[0])
    found = reference.delta_weight(t["down"], t["core"], t["up"], case[0])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("lead", [(), (0,), (1,), (2, 3), (2, 1, 3)])
def test_leading_dimensions(lead):
    t = operands(3, True, True, True)
    t["x"] = torch.randn(*lead, K, dtype=torch.float64)
    found = reference.low_rank_linear(**t)
    assert found.shape == (*lead, 3 * PER_SLICE)
    rows = [reference.low_rank_linear(**(t | {"x": row})) for row in t["x"].reshape(-1, K)]
    for row, expected in zip(found.reshape(len(rows), 3 * PER_SLICE), rows, strict=True):
        torch.testing.assert_close(row, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_gradients(case):
    t = operands(*case)
    names = [name for name, tensor in t.items() if tensor is not None]
    inputs = tuple(t[name].requires_grad_() for name in names)

    def function(*tensors):
        return reference.low_rank_linear(**(t | dict(zip(names, tensors, strict=True))))

    assert torch.autograd.gradcheck(function, inputs, check_forward_ad=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_keeps_the_dtype(dtype):
    t = {k: None if v is None else v.to(dtype) for k, v in operands(3, True, False, True).items()}
    assert reference.low_rank_linear(**t).dtype == dtype
