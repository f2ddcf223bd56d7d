"""The specification itself, against loops over every index."""

from __future__ import annotations

import pytest
import torch

from efft_kernels.ops import reference
from efft_kernels.testing.operands import Shape, forms, leaves, operands

SHAPE = Shape(M=2, K=5, n=7, Ra=3, Rb=2)
M, K, PER_SLICE = SHAPE.M, SHAPE.K, SHAPE.n
FORMS = forms(SHAPE)


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


@pytest.mark.parametrize("form", FORMS)
def test_output_matches_loops(form):
    t = operands(FORMS[form])
    delta = delta_by_loops(t["down"], t["core"], t["up"], FORMS[form].G)
    expected = torch.zeros(M, FORMS[form].G * PER_SLICE, dtype=torch.float64)
    for m in range(M):
        for n in range(expected.shape[1]):
            total = 0.0 if t["bias"] is None else t["bias"][n].item()
            for k in range(K):
                total += t["x"][m, k].item() * (t["weight"][n, k].item() + delta[n, k].item())
            expected[m, n] = total
    torch.testing.assert_close(reference.low_rank_linear(**t), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_delta_weight_matches_loops(form):
    t = operands(FORMS[form])
    expected = delta_by_loops(t["down"], t["core"], t["up"], FORMS[form].G)
    found = reference.delta_weight(t["down"], t["core"], t["up"], FORMS[form].G)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("lead", [(), (0,), (1,), (2, 3), (2, 1, 3)])
def test_leading_dimensions(lead):
    t = operands(SHAPE, lead=lead)
    found = reference.low_rank_linear(**t)
    assert found.shape == (*lead, 3 * PER_SLICE)
    rows = [reference.low_rank_linear(**(t | {"x": row})) for row in t["x"].reshape(-1, K)]
    for row, expected in zip(found.reshape(len(rows), 3 * PER_SLICE), rows, strict=True):
        torch.testing.assert_close(row, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_gradients(form):
    t = operands(FORMS[form])
    inputs = {name: leaf for name, leaf in leaves(t).items() if leaf is not None}

    def function(*tensors):
        return reference.low_rank_linear(**(t | dict(zip(inputs, tensors, strict=True))))

    assert torch.autograd.gradcheck(function, tuple(inputs.values()), check_forward_ad=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_keeps_the_dtype(dtype):
    t = operands(FORMS["own up"], dtype)
    assert reference.low_rank_linear(**t).dtype == dtype
