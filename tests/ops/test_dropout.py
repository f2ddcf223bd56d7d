"""Dropout on the rank-r activation: the masks' statistics, their source, and the gradients they
give."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from efft_kernels import low_rank_linear
from efft_kernels.ops.dropout import low_rank_linear_with_dropout
from efft_kernels.testing.operands import Shape, cast, forms, leaves, operands

SHAPE = Shape(M=7, K=11, n=13, Ra=5, Rb=2)
M, K, G, RA, RB, WIDTH = SHAPE.M, SHAPE.K, SHAPE.G, SHAPE.Ra, SHAPE.Rb, SHAPE.n
FORMS = {name: shape for name, shape in forms(SHAPE).items() if name != "one slice"}


def with_mask(x, weight, bias, down, core, up, mask):
    """The formula, slice by slice, for a given mask [M, G, Rb] of 0 and 1/(1 - p)."""
    slices = up.shape[0] if core is None else core.shape[0]
    parts = []
    for g in range(slices):
        t = x @ down if core is None else x @ down @ core[g]
        parts.append((t * mask[:, g if mask.shape[1] > 1 else 0]) @ up[g % up.shape[0]].T)
    return F.linear(x, weight, bias) + torch.cat(parts, dim=-1)


def drawn_mask(form, p, m=M):
    """What torch's generator gives for an activation of this shape."""
    shape = (m, 1, RA) if "no core" in form else (m, G, RB)
    return F.dropout(torch.ones(shape, dtype=torch.float64), p)


@pytest.mark.parametrize("form", FORMS)
def test_no_dropout_is_the_operator(form):
    t = operands(FORMS[form])
    torch.testing.assert_close(
        low_rank_linear_with_dropout(**t, p=0.0), low_rank_linear(**t), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("form", FORMS)
def test_output_and_gradients_for_a_known_mask(form):
    found, right = (leaves(operands(FORMS[form])) for _ in range(2))
    torch.manual_seed(3)
    y = low_rank_linear_with_dropout(**found, p=0.4)
    torch.manual_seed(3)
    mask = drawn_mask(form, 0.4)
    assert 0 < (mask == 0).sum() < mask.numel()
    expected = with_mask(**right, mask=mask)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    dy = torch.randn_like(y)
    y.backward(dy)
    expected.backward(dy)
    for name, tensor in right.items():
        if tensor is not None:
            assert tensor.grad.norm() > 1e-3
            torch.testing.assert_close(found[name].grad, tensor.grad, rtol=1e-11, atol=1e-11)


def test_an_entry_is_dropped_with_probability_p_by_slice_and_row():
    """y shows the masked activation itself where W and bias are zero and up is the identity."""
    p, rows = 0.3, 4000
    t = operands(SHAPE, lead=(rows,)) | {
        "weight": torch.zeros(G * RB, K, dtype=torch.float64),
        "bias": None,
        "up": torch.eye(RB, dtype=torch.float64)[None],
    }
    y = low_rank_linear_with_dropout(**t, p=p).unflatten(-1, (G, RB))
    activation = torch.einsum("mk,ka,gab->mgb", t["x"], t["down"], t["core"])
    kept = y != 0
    torch.testing.assert_close(y[kept], activation[kept] / (1 - p), rtol=1e-11, atol=1e-11)
    rate = kept.double().mean(0)  # [G, RB]; sigma of each is 0.0072
    assert ((rate - (1 - p)).abs() < 0.036).all()
    flat = kept.flatten(1).double()
    correlation = torch.corrcoef(flat.T) - torch.eye(G * RB, dtype=torch.float64)
    assert correlation.abs().max() < 0.1


def test_without_a_core_the_slices_share_the_mask():
    t = operands(FORMS["no core"], lead=(500,)) | {
        "weight": torch.zeros(G * RA, K, dtype=torch.float64),
        "bias": None,
        "up": torch.eye(RA, dtype=torch.float64).expand(G, -1, -1),
    }
    kept = low_rank_linear_with_dropout(**t, p=0.5).unflatten(-1, (G, RA)) != 0
    assert torch.equal(kept[:, 0], kept[:, 1]) and torch.equal(kept[:, 0], kept[:, 2])
    assert kept.double().mean().item() == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("form", FORMS)
def test_unbiased(form):
    t = operands(FORMS[form], lead=(1,))
    expected = low_rank_linear(**t)[0]
    t["x"] = t["x"].expand(30_000, -1)
    y = low_rank_linear_with_dropout(**t, p=0.6)
    sigma = y.std(0) / len(y) ** 0.5
    assert sigma.min() > 0
    assert ((y.mean(0) - expected).abs() < 5 * sigma).all()


@pytest.mark.parametrize("form", FORMS)
def test_seed_repeats_the_masks(form):
    t = operands(FORMS[form])
    torch.manual_seed(1)
    first, second = (low_rank_linear_with_dropout(**t, p=0.5) for _ in range(2))
    torch.manual_seed(1)
    assert torch.equal(low_rank_linear_with_dropout(**t, p=0.5), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_checkpointing_replays_the_masks(form, use_reentrant):
    t = leaves(operands(FORMS[form]))
    present = [tensor for tensor in t.values() if tensor is not None]

    def gradients(run):
        torch.manual_seed(9)
        y = run(lambda x: low_rank_linear_with_dropout(**(t | {"x": x}), p=0.5).tanh(), t["x"])
        torch.randn(5)
        y.sum().backward()
        grads = [leaf.grad for leaf in present]
        for leaf in present:
            leaf.grad = None
        return grads

    expected = gradients(lambda f, x: f(x))
    found = gradients(lambda f, x: checkpoint(f, x, use_reentrant=use_reentrant))
    for a, b in zip(found, expected, strict=True):
        assert b.norm() > 1e-3 and torch.equal(a, b)


@pytest.mark.parametrize("lead", [(), (0,), (2, 0, 3), (2, 3, 4)])
def test_leading_dimensions(lead):
    t = operands(SHAPE, lead=lead)
    y = low_rank_linear_with_dropout(**t, p=0.0)
    assert y.shape == (*lead, G * WIDTH)
    torch.testing.assert_close(y, low_rank_linear(**t), rtol=1e-12, atol=1e-12)


def test_non_contiguous_x():
    t = operands(FORMS["own up"], lead=(3, 4))
    x = t["x"].transpose(0, 1)
    torch.manual_seed(2)
    found = low_rank_linear_with_dropout(**(t | {"x": x}), p=0.5)
    torch.manual_seed(2)
    expected = low_rank_linear_with_dropout(**(t | {"x": x.contiguous()}), p=0.5)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_autocast(form):
    """y in the ambient dtype, gradients in each tensor's own."""
    t = leaves(operands(FORMS[form], torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        y = low_rank_linear_with_dropout(**t, p=0.0)
        expected = low_rank_linear(**t)
    assert y.dtype == torch.bfloat16
    scale = expected.float().abs().max()
    assert (y.float() - expected.float()).abs().max() < 0.02 * scale
    y.float().sum().backward()
    for tensor in t.values():
        assert tensor is None or tensor.grad.dtype == torch.float32


def test_half_precision_with_float32_factors():
    halves = operands(SHAPE, torch.bfloat16, factor_dtype=torch.float32)
    y = low_rank_linear_with_dropout(**halves, p=0.0)
    exact = low_rank_linear(**cast(halves, torch.float64))
    assert y.dtype == torch.bfloat16
    assert (y.double() - exact).abs().max() < 0.02 * exact.abs().max()


@pytest.mark.parametrize(
    ("name", "shape", "text"),
    [
        ("x", (M, K + 1), r"x must be \[..., K=11\]"),
        ("down", (K + 1, RA), r"down must be \[K=11"),
        ("core", (G, RA + 1, RB), r"core must be \[G, Ra=5, Rb\]"),
        ("up", (2, WIDTH, RB), r"up must be \[1 or 3, N/G=13, Rb=2\]"),
    ],
)
def test_shapes_are_checked(name, shape, text):
    t = operands(SHAPE) | {name: torch.randn(shape, dtype=torch.float64)}
    with pytest.raises(ValueError, match=text):
        low_rank_linear_with_dropout(**t, p=0.5)


def test_a_compiled_backend_by_name_is_refused():
    with pytest.raises(RuntimeError, match=r"'triton' was asked for .* dropout=0\.0"):
        low_rank_linear_with_dropout(**operands(SHAPE), p=0.5, backend="triton")
