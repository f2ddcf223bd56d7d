"""`low_rank_linear` on the CPU, by every route: values and gradients against the specification,
what it saves, and what it refuses."""

from __future__ import annotations

import itertools

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch.autograd.graph import saved_tensors_hooks

from efft_kernels import low_rank_linear, reference
from efft_kernels.ops.backends import cpp_backend, torch_backend

pytestmark = pytest.mark.usefixtures("route")

NAMES = ("x", "weight", "bias", "down", "core", "up")
FACTORS = ("down", "core", "up")
STRATEGIES = ("split", "merged")

# (slices, core given, up shared, bias given)
CASES = [
    (1, True, True, True),
    (1, False, False, False),
    (3, True, True, True),
    (3, True, False, False),
    (3, False, False, True),
]


def operands(
    slices=3,
    with_core=True,
    shared=True,
    with_bias=True,
    *,
    lead=(11,),
    k=7,
    per_slice=5,
    ra=3,
    rb=2,
    dtype=torch.float64,
    factor_dtype=None,
):
    """Random operands by name, scaled so that both terms of y are of order one."""
    rb = rb if with_core else ra
    n = slices * per_slice
    shapes = {
        "x": (*lead, k),
        "weight": (n, k),
        "bias": (n,) if with_bias else None,
        "down": (k, ra),
        "core": (slices, ra, rb) if with_core else None,
        "up": (1 if shared and with_core else slices, per_slice, rb),
    }
    tensors = {
        name: None if shape is None else torch.randn(shape, dtype=torch.float64)
        for name, shape in shapes.items()
    }
    tensors["weight"] *= k**-0.5
    tensors["down"] *= k**-0.5
    factor_dtype = factor_dtype or dtype
    return {
        name: None if t is None else t.to(factor_dtype if name in FACTORS else dtype)
        for name, t in tensors.items()
    }


def differentiate(function, tensors, dy=None, wanted=NAMES):
    """(y, gradients by name) of `function` at copies of `tensors` with their layout kept."""
    leaves = {
        name: t.detach().clone(memory_format=torch.preserve_format).requires_grad_(name in wanted)
        if t is not None
        else None
        for name, t in tensors.items()
    }
    y = function(**leaves)
    if dy is None:
        y.sum().backward()
    else:
        y.backward(dy.to(y.dtype))
    return y.detach(), {name: t.grad for name, t in leaves.items() if t is not None}


def assert_same(found, expected, tolerance=1e-12):
    y, grads = found
    y_expected, grads_expected = expected
    torch.testing.assert_close(y, y_expected, rtol=tolerance, atol=tolerance)
    assert grads.keys() == grads_expected.keys()
    for name, grad in grads_expected.items():
        assert (grads[name] is None) == (grad is None), name
        if grad is not None:
            torch.testing.assert_close(
                grads[name], grad, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("lead", [(11,), (0,), (1,), (), (2, 3), (2, 1, 3), (2, 0, 3)])
def test_matches_the_reference(case, lead, strategy, poisoned_memory):
    tensors = operands(*case, lead=lead)
    n = tensors["weight"].shape[0]
    dy = torch.randn(*lead, n, dtype=torch.float64)
    found = differentiate(lambda **t: low_rank_linear(**t, strategy=strategy), tensors, dy)
    assert found[0].shape == (*lead, n)
    assert_same(found, differentiate(reference.low_rank_linear, tensors, dy))


def test_factors_change_the_output():
    tensors = operands()
    y = low_rank_linear(**tensors)
    plain = torch.nn.functional.linear(tensors["x"], tensors["weight"], tensors["bias"])
    assert (y - plain).norm() > 0.1 * plain.norm()


LAYOUTS = {
    "transposed": lambda t: t.mT.contiguous().mT,
    "sliced": lambda t: torch.cat([t, torch.full_like(t, torch.nan)], -1)[..., : t.shape[-1]],
    "strided": lambda t: torch.stack([t, torch.full_like(t, torch.nan)], -1)[..., 0],
    "offset": lambda t: torch.cat([torch.full_like(t[:1], torch.nan), t])[1:],
    "expanded": lambda t: t[:1].expand_as(t),
}


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["x", "weight", "down", "core", "up", "dy"])
def test_any_layout(name, layout, strategy):
    """Strides are the caller's: the other elements of the storage are NaN."""
    tensors = operands(3, True, False, lead=(4, 3)) | {"dy": torch.randn(4, 3, 15).double()}
    tensors[name] = LAYOUTS[layout](tensors[name])
    assert layout in ("offset", "expanded") or not tensors[name].is_contiguous()
    expected = {key: t.contiguous() for key, t in tensors.items()}
    results = []
    for function, given in (
        (lambda **t: low_rank_linear(**t, strategy=strategy), tensors),
        (reference.low_rank_linear, expected),
    ):
        leaves = {key: given[key].detach().requires_grad_() for key in NAMES}
        y = function(**leaves)
        results.append(
            (
                y,
                dict(
                    zip(
                        NAMES,
                        torch.autograd.grad(y, list(leaves.values()), given["dy"]),
                        strict=True,
                    )
                ),
            )
        )
    assert_same(*results)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("lead", [(11,), (2, 3)])
def test_expanded_dy(lead, strategy):
    """sum().backward() hands the operator a gradient with all strides zero."""
    tensors = operands(lead=lead)
    found = differentiate(lambda **t: low_rank_linear(**t, strategy=strategy), tensors)
    assert_same(found, differentiate(reference.low_rank_linear, tensors))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_small_integers_are_exact(case, dtype, strategy, poisoned_memory):
    """Sums of small integers are exact in every order, so equality is bitwise."""
    bound, limit = (3, 2**24) if dtype == torch.float32 else (1, 2**8)
    tensors = {
        name: None if t is None else torch.randint(-bound, bound + 1, t.shape).double()
        for name, t in operands(*case, lead=(13,), k=17).items()
    }
    dy = torch.randint(-bound, bound + 1, (13, tensors["weight"].shape[0])).double()
    y, grads = differentiate(reference.low_rank_linear, tensors, dy)
    assert all(t.abs().max() <= limit and t.any() for t in (y, *grads.values()))
    y_found, found = differentiate(
        lambda **t: low_rank_linear(**t, strategy=strategy),
        {name: None if t is None else t.to(dtype) for name, t in tensors.items()},
        dy,
    )
    assert y_found.dtype == dtype and torch.equal(y_found.double(), y)
    for name, grad in grads.items():
        assert found[name].dtype == dtype
        assert torch.equal(found[name].double(), grad), name


def relative_error(found, exact):
    return ((found.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("dtype", "factor_dtype"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ],
    ids=str,
)
def test_error_budget(dtype, factor_dtype, case, strategy):
    """At most twice the error of plain torch in the same dtype, both against float64."""
    tensors = operands(
        *case, lead=(127,), k=131, per_slice=43, ra=7, rb=5, dtype=dtype, factor_dtype=factor_dtype
    )
    dy = torch.randn(127, tensors["weight"].shape[0]).to(dtype)

    def plain(**t):
        return reference.low_rank_linear(
            **{name: None if tensor is None else tensor.to(dtype) for name, tensor in t.items()}
        )

    exact_y, exact = differentiate(
        reference.low_rank_linear,
        {name: None if t is None else t.double() for name, t in tensors.items()},
        dy,
    )
    ours_y, ours = differentiate(lambda **t: low_rank_linear(**t, strategy=strategy), tensors, dy)
    torch_y, torchs = differentiate(plain, tensors, dy)
    assert relative_error(ours_y, exact_y) <= 2 * relative_error(torch_y, exact_y)
    for name in exact:
        assert ours[name].dtype == tensors[name].dtype, name
        budget = 2 * relative_error(torchs[name], exact[name])
        assert relative_error(ours[name], exact[name]) <= budget, name


def test_bias_gradient_of_many_rows_in_half_precision():
    """The sum over rows is accumulated in float32: in bfloat16 it would stop at 256."""
    tensors = operands(lead=(4096,), dtype=torch.bfloat16, factor_dtype=torch.float32)
    _, grads = differentiate(low_rank_linear, tensors)
    assert grads["bias"].dtype == torch.bfloat16
    assert grads["bias"].tolist() == [4096.0] * 15


PRESENT = [wanted for count in range(1, 7) for wanted in itertools.combinations(NAMES, count)]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_gradients_only_where_asked(strategy, route, monkeypatch):
    """Every subset of arguments: the right gradients, None elsewhere, and none computed in vain
    (test_cpp.py looks at what the operator behind the entry point computes)."""
    tensors = operands()
    dy = torch.randn(11, 15, dtype=torch.float64)
    _, everything = differentiate(reference.low_rank_linear, tensors, dy)
    computed = []
    backend = torch_backend if route == "torch" else cpp_backend
    real = backend.backward

    def recording(*args, **kwargs):
        grads = real(*args, **kwargs)
        computed.append({n for n, g in zip(NAMES, grads, strict=True) if g is not None})
        return grads

    monkeypatch.setattr(backend, "backward", recording)
    for wanted in PRESENT:
        computed.clear()
        _, grads = differentiate(
            lambda **t: low_rank_linear(**t, strategy=strategy), tensors, dy, wanted
        )
        assert {name for name, grad in grads.items() if grad is not None} == set(wanted)
        assert computed == ([] if route == "entry-point" else [set(wanted)])
        for name in wanted:
            torch.testing.assert_close(grads[name], everything[name], rtol=1e-12, atol=1e-12)


def saved_beside_the_operands(tensors, **options):
    """Shapes and dtypes of what autograd keeps, the callers' own tensors left out; and their
    names."""
    own = {t.untyped_storage().data_ptr(): name for name, t in tensors.items() if t is not None}
    extra, kept = [], set()

    def pack(tensor):
        name = own.get(tensor.untyped_storage().data_ptr())
        if name is None:
            extra.append((tuple(tensor.shape), tensor.dtype))
        else:
            kept.add(name)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        y = low_rank_linear(**tensors, **options)
    return y, extra, kept


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("lead", [(11,), (4, 3)])
def test_saves_p_and_nothing_else(case, lead, strategy):
    tensors = operands(*case, lead=lead)
    for name in ("x", *FACTORS):
        if tensors[name] is not None:
            tensors[name].requires_grad_()
    _, extra, kept = saved_beside_the_operands(tensors, strategy=strategy)
    m = tensors["x"].numel() // 7
    assert extra == [((m, 3), torch.float64)]  # P
    assert "x" in kept


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    ("wanted", "x_kept", "p_kept"),
    [
        (("x",), False, False),
        (("x", "core"), False, True),
        (("x", "up"), False, True),
        (("x", "bias"), False, False),
        (("down",), True, False),
        (("weight",), True, False),
        (("down", "up"), True, True),
    ],
)
def test_saves_only_what_the_gradients_need(wanted, x_kept, p_kept, strategy):
    tensors = operands()
    for name in wanted:
        tensors[name].requires_grad_()
    _, extra, kept = saved_beside_the_operands(tensors, strategy=strategy)
    assert ("x" in kept) == x_kept
    assert extra == ([((11, 3), torch.float64)] if p_kept else [])


def test_nothing_is_saved_without_gradients():
    tensors = operands()
    y, extra, kept = saved_beside_the_operands(tensors)
    assert not extra and not kept and not y.requires_grad
    for t in tensors.values():
        t.requires_grad_()
    with torch.no_grad():
        y, extra, kept = saved_beside_the_operands(tensors)
    assert not extra and not kept and not y.requires_grad
    with torch.inference_mode():
        torch.testing.assert_close(low_rank_linear(**tensors), y)


def test_operands_are_left_alone():
    """Neither pass writes to a tensor of the caller's, the incoming gradient included."""
    tensors = operands()
    before = {name: t.clone() for name, t in tensors.items()}
    dy = torch.randn(11, 15, dtype=torch.float64)
    dy_before = dy.clone()
    for strategy in STRATEGIES:
        leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
        y = low_rank_linear(**leaves, strategy=strategy)
        y.backward(dy, retain_graph=True)
        first = {name: t.grad.clone() for name, t in leaves.items()}
        for t in leaves.values():
            t.grad = None
        y.backward(dy)
        assert all(torch.equal(first[name], t.grad) for name, t in leaves.items())
    assert torch.equal(dy, dy_before)
    assert all(torch.equal(before[name], t) for name, t in tensors.items())


def test_output_can_be_changed_in_place():
    """y is a fresh tensor that the backward does not read."""
    tensors = operands()
    _, expected = differentiate(lambda **t: reference.low_rank_linear(**t) * 2, tensors)
    _, found = differentiate(lambda **t: low_rank_linear(**t).mul_(2), tensors)
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-12, atol=1e-12)


def test_meta_tensors():
    tensors = {name: t.to("meta").requires_grad_() for name, t in operands(lead=(2, 3)).items()}
    y = low_rank_linear(**tensors)
    assert y.device.type == "meta" and y.shape == (2, 3, 15)
    y.sum().backward()
    assert all(t.grad.shape == t.shape and t.grad.is_meta for t in tensors.values())


@st.composite
def problems(draw):
    slices = draw(st.integers(1, 4))
    with_core = draw(st.booleans())
    dtype, factor_dtype = draw(
        st.sampled_from(
            [
                (torch.float64, torch.float64),
                (torch.float32, torch.float32),
                (torch.bfloat16, torch.float32),
                (torch.float16, torch.float32),
                (torch.bfloat16, torch.bfloat16),
            ]
        )
    )
    tensors = operands(
        slices,
        with_core,
        draw(st.booleans()),
        draw(st.booleans()),
        lead=tuple(draw(st.lists(st.integers(0, 5), max_size=3))),
        k=draw(st.integers(1, 20)),
        per_slice=draw(st.integers(1, 9)),
        ra=draw(st.integers(1, 6)),
        rb=draw(st.integers(1, 6)),
        dtype=dtype,
        factor_dtype=factor_dtype,
    )
    for name in tensors:
        t = tensors[name]
        if t is not None and t.dim() > 1 and draw(st.booleans()):
            tensors[name] = t.mT.contiguous().mT
    return tensors, draw(st.sampled_from(["auto", *STRATEGIES]))


EPSILON = {
    torch.float64: 2.0**-52,
    torch.float32: 2.0**-23,
    torch.float16: 2.0**-10,
    torch.bfloat16: 2.0**-7,
}


@hypothesis.given(problems(), st.integers(0, 2**31))
def test_property_matches_float64(problem, seed):
    """Any shape, stride, dtype and slice count: close to float64 by the rounding of the dtype."""
    tensors, strategy = problem
    dtype = tensors["x"].dtype
    lead, n = tensors["x"].shape[:-1], tensors["weight"].shape[0]
    dy = torch.randn(*lead, n, generator=torch.Generator().manual_seed(seed)).to(dtype)
    wide = {name: None if t is None else t.double() for name, t in tensors.items()}
    y_exact, exact = differentiate(reference.low_rank_linear, wide, dy)
    y, grads = differentiate(lambda **t: low_rank_linear(**t, strategy=strategy), tensors, dy)
    assert y.shape == (*lead, n) and y.dtype == dtype
    # The same formula on absolute values bounds every partial sum; a dozen roundings meet each.
    bound_y, bound = differentiate(
        reference.low_rank_linear,
        {name: None if t is None else t.abs() for name, t in wide.items()},
        dy.abs(),
    )
    tolerance = 12 * EPSILON[dtype]
    assert ((y.double() - y_exact).abs() <= tolerance * bound_y).all()
    for name, grad in exact.items():
        assert grads[name].dtype == tensors[name].dtype
        assert ((grads[name].double() - grad).abs() <= tolerance * bound[name]).all(), name


def f32(**shapes):
    return {name: torch.zeros(shape) for name, shape in shapes.items()}


BASE = {
    "x": (4, 7),
    "weight": (15, 7),
    "bias": (15,),
    "down": (7, 3),
    "core": (3, 3, 2),
    "up": (1, 5, 2),
}

SHAPE_ERRORS = [
    ({"weight": (15,)}, ["weight must be [N, K]", "(15,)"]),
    ({"weight": (3, 15, 7)}, ["weight must be [N, K]", "(3, 15, 7)"]),
    ({"x": ()}, ["x must be [..., K=7]", "()"]),
    ({"x": (4, 8)}, ["x must be [..., K=7]", "(4, 8)"]),
    ({"x": (7, 4)}, ["x must be [..., K=7]", "(7, 4)"]),
    ({"bias": (14,)}, ["bias must be [N=15]", "(14,)"]),
    ({"bias": (1, 15)}, ["bias must be [N=15]", "(1, 15)"]),
    ({"bias": ()}, ["bias must be [N=15]", "()"]),
    ({"down": (3, 7)}, ["down must be [K=7, Ra", "(3, 7)"]),
    ({"down": (7,)}, ["down must be [K=7, Ra", "(7,)"]),
    ({"down": (7, 0)}, ["down must be [K=7, Ra >= 1]", "(7, 0)"]),
    ({"core": (3, 2, 3)}, ["core must be [G, Ra=3, Rb]", "(3, 2, 3)"]),
    ({"core": (3, 2)}, ["core must be [G, Ra=3, Rb]", "(3, 2)"]),
    ({"core": (0, 3, 2)}, ["core must be [G, Ra=3, Rb]", "(0, 3, 2)"]),
    ({"core": (3, 3, 0)}, ["core must be [G, Ra=3, Rb]", "(3, 3, 0)"]),
    ({"core": (2, 3, 2)}, ["core", "G dividing N=15", "(2, 3, 2)"]),
    ({"up": (5, 2)}, ["up must be [1 or 3, N/G=5, Rb=2]", "(5, 2)"]),
    ({"up": (2, 5, 2)}, ["up must be [1 or 3, N/G=5, Rb=2]", "(2, 5, 2)"]),
    ({"up": (1, 2, 5)}, ["up must be [1 or 3, N/G=5, Rb=2]", "(1, 2, 5)"]),
    ({"up": (1, 15, 2)}, ["up must be [1 or 3, N/G=5, Rb=2]", "(1, 15, 2)"]),
    ({"core": (1, 3, 2), "up": (3, 5, 2)}, ["up must be [1, N/G=15, Rb=2]", "(3, 5, 2)"]),
    ({"core": None, "up": (2, 5, 3)}, ["up", "G dividing N=15", "(2, 5, 3)"]),
    ({"core": None, "up": (1, 5, 3)}, ["up must be [1, N/G=15, Rb=3]", "(1, 5, 3)"]),
    ({"core": None, "up": (3, 5, 2)}, ["up must be [3, N/G=5, Rb=3]", "(3, 5, 2)"]),
    ({"core": None, "up": (15, 3)}, ["up must be [G, N/G, Ra=3]", "(15, 3)"]),
    ({"core": None, "up": (0, 5, 3)}, ["up", "G dividing N=15", "(0, 5, 3)"]),
]


@pytest.mark.parametrize(("changes", "texts"), SHAPE_ERRORS)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_refuses_a_shape(changes, texts, backend):
    tensors = {
        name: None if shape is None else torch.zeros(shape)
        for name, shape in (BASE | changes).items()
    }
    with pytest.raises(ValueError) as error:
        low_rank_linear(**tensors, backend=backend)
    assert all(text in str(error.value) for text in texts), str(error.value)


half, single, double = torch.float16, torch.float32, torch.float64
DTYPE_ERRORS = [
    *(({name: torch.int64}, [f"{name} must be float64, float32", "torch.int64"]) for name in NAMES),
    ({"x": torch.complex64}, ["x must be float64", "torch.complex64"]),
    ({"weight": torch.float8_e4m3fn}, ["weight must be float64", "torch.float8_e4m3fn"]),
    ({"x": half}, ["weight must have x's dtype torch.float16 outside autocast", "torch.float32"]),
    ({"weight": double}, ["weight must have x's dtype torch.float32", "torch.float64"]),
    ({"weight": half}, ["weight must have x's dtype torch.float32", "torch.float16"]),
    ({"bias": half}, ["bias must have x's dtype torch.float32", "torch.float16"]),
    ({"down": half}, ["down must have x's dtype torch.float32", "torch.float16"]),
    ({"core": double}, ["core must have x's dtype torch.float32", "torch.float64"]),
    ({"up": torch.bfloat16}, ["up must have x's dtype torch.float32", "torch.bfloat16"]),
    (
        {"x": half, "weight": half, "bias": half, "down": torch.bfloat16},
        ["down must have x's dtype torch.float16 (or float32", "torch.bfloat16"],
    ),
    (
        {"x": half, "weight": half, "bias": half, "up": half},
        ["share one dtype", "down torch.float32", "core torch.float32", "up torch.float16"],
    ),
]


@pytest.mark.parametrize(("changes", "texts"), DTYPE_ERRORS)
def test_refuses_a_dtype(changes, texts):
    tensors = {
        name: torch.zeros(shape, dtype=changes.get(name, single)) for name, shape in BASE.items()
    }
    with pytest.raises(TypeError) as error:
        low_rank_linear(**tensors)
    assert all(text in str(error.value) for text in texts), str(error.value)


@pytest.mark.parametrize("name", NAMES)
def test_refuses_what_is_no_tensor(name):
    with pytest.raises(TypeError, match=f"{name} must be a Tensor, got list"):
        low_rank_linear(**(f32(**BASE) | {name: [1.0]}))


@pytest.mark.parametrize("name", ["x", "weight", "down", "up"])
def test_refuses_a_missing_tensor(name):
    with pytest.raises(TypeError, match=f"{name} must be a Tensor, got NoneType"):
        low_rank_linear(**(f32(**BASE) | {name: None}))


@pytest.mark.parametrize("name", NAMES[1:])
def test_refuses_mixed_devices(name):
    tensors = f32(**BASE)
    tensors[name] = tensors[name].to("meta")
    with pytest.raises(ValueError, match=f"{name} must be on x's device cpu, got meta"):
        low_rank_linear(**tensors)


def test_refuses_an_unknown_strategy():
    with pytest.raises(ValueError, match=r"strategy must be 'auto' or one of .*'split'.*'quick'"):
        low_rank_linear(**f32(**BASE), strategy="quick")
