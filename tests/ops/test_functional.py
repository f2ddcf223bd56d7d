"""`low_rank_linear` on the CPU, by every route: values and gradients against the specification,
what it saves, and what it refuses."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import partial

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch.autograd.graph import saved_tensors_hooks

from efft_kernels import low_rank_linear, reference
from efft_kernels.ops import functional
from efft_kernels.ops.backends import cpp_backend, torch_backend
from efft_kernels.testing.error_budget import assert_exact, assert_within_budget
from efft_kernels.testing.operands import (
    FACTORS,
    LAYOUTS,
    NAMES,
    Shape,
    cast,
    forms,
    operands,
    operands_and_dy,
)
from efft_kernels.testing.results import differentiate, plain_and_exact

pytestmark = pytest.mark.usefixtures("route")

STRATEGIES = torch_backend.STRATEGIES
SHAPE = Shape(M=11, K=7, n=5, Ra=3, Rb=2)
FORMS = forms(SHAPE)


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
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("lead", [(11,), (0,), (1,), (), (2, 3), (2, 1, 3), (2, 0, 3)])
def test_matches_the_reference(form, lead, strategy, poisoned_memory):
    *_, dy = operands_and_dy(FORMS[form], lead=lead)
    tensors = operands(FORMS[form], lead=lead)
    found = differentiate(partial(low_rank_linear, strategy=strategy), tensors, dy)
    assert found[0].shape == dy.shape
    assert_same(found, differentiate(reference.low_rank_linear, tensors, dy))


def test_factors_change_the_output():
    tensors = operands(SHAPE)
    y = low_rank_linear(**tensors)
    plain = torch.nn.functional.linear(tensors["x"], tensors["weight"], tensors["bias"])
    assert (y - plain).norm() > 0.1 * plain.norm()


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["x", "weight", "down", "core", "up", "dy"])
def test_any_layout(name, layout, strategy):
    """Strides are the caller's: the other elements of the storage are NaN."""
    shape = replace(SHAPE, shared=False)
    given = dict(zip((*NAMES, "dy"), operands_and_dy(shape, lead=(4, 3)), strict=True))
    given[name] = LAYOUTS[layout](given[name])
    results = []
    for function, tensors in (
        (partial(low_rank_linear, strategy=strategy), given),
        (reference.low_rank_linear, {key: t.contiguous() for key, t in given.items()}),
    ):
        leaves = {key: tensors[key].detach().requires_grad_() for key in NAMES}
        y = function(**leaves)
        grads = torch.autograd.grad(y, list(leaves.values()), tensors["dy"])
        results.append((y, dict(zip(NAMES, grads, strict=True))))
    assert_same(*results)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("lead", [(11,), (2, 3)])
def test_expanded_dy(lead, strategy):
    """sum().backward() hands the operator a gradient with all strides zero."""
    tensors = operands(SHAPE, lead=lead)
    found = differentiate(partial(low_rank_linear, strategy=strategy), tensors)
    assert_same(found, differentiate(reference.low_rank_linear, tensors))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_small_integers_are_exact(form, dtype, strategy, poisoned_memory):
    """Sums of small integers are exact in every order, so equality is bitwise."""
    bound, limit = (3, 2**24) if dtype == torch.float32 else (1, 2**8)
    shape = replace(FORMS[form], M=13, K=17)
    *_, dy = operands_and_dy(shape, density=0.75, bound=bound)
    tensors = operands(shape, density=0.75, bound=bound)
    y, grads = differentiate(reference.low_rank_linear, tensors, dy)
    assert all(t.abs().max() <= limit and t.any() for t in (y, *grads.values()))
    function = partial(low_rank_linear, strategy=strategy)
    y_found, found = differentiate(function, cast(tensors, dtype), dy)
    assert all(t.dtype == dtype for t in (y_found, *found.values()))
    assert_exact({"y": y_found, **found}, {"y": y, **grads})


DTYPES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("dtype", "factor_dtype"), DTYPES, ids=str)
def test_error_budget(dtype, factor_dtype, form, strategy):
    shape = replace(FORMS[form], M=127, K=131, n=43, Ra=7, Rb=5)
    *inputs, dy = operands_and_dy(shape, dtype, factor_dtype=factor_dtype)
    tensors = dict(zip(NAMES, inputs, strict=True))
    y, grads = differentiate(partial(low_rank_linear, strategy=strategy), tensors, dy)
    assert all(grad.dtype == tensors[name].dtype for name, grad in grads.items())
    assert_within_budget({"y": y, **grads}, *plain_and_exact([*inputs, dy]), rounding=False)


def test_bias_gradient_of_many_rows_in_half_precision():
    """The sum over rows is accumulated in float32: in bfloat16 it would stop at 256."""
    shape = replace(SHAPE, M=4096)
    tensors = operands(shape, torch.bfloat16, factor_dtype=torch.float32)
    _, grads = differentiate(low_rank_linear, tensors)
    assert grads["bias"].dtype == torch.bfloat16
    assert grads["bias"].tolist() == [4096.0] * 15


PRESENT = [wanted for count in range(1, 7) for wanted in itertools.combinations(NAMES, count)]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_gradients_only_where_asked(strategy, route, monkeypatch):
    """Every subset of arguments: the right gradients, None elsewhere, and none computed in vain
    (tests/ops/backends/cpp looks at what the operator behind the entry point computes)."""
    tensors, dy = operands(SHAPE), torch.randn(11, 15, dtype=torch.float64)
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
        _, grads = differentiate(partial(low_rank_linear, strategy=strategy), tensors, dy, wanted)
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
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("lead", [(11,), (4, 3)])
def test_saves_p_and_nothing_else(form, lead, strategy):
    tensors = operands(FORMS[form], lead=lead)
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
    tensors = operands(SHAPE)
    for name in wanted:
        tensors[name].requires_grad_()
    _, extra, kept = saved_beside_the_operands(tensors, strategy=strategy)
    assert ("x" in kept) == x_kept
    assert extra == ([((11, 3), torch.float64)] if p_kept else [])


@pytest.mark.parametrize("form", FORMS)
def test_nothing_is_saved_without_gradients(form):
    tensors = operands(FORMS[form])
    y, extra, kept = saved_beside_the_operands(tensors)
    assert not extra and not kept and not y.requires_grad
    for t in tensors.values():
        if t is not None:
            t.requires_grad_()
    with torch.no_grad():
        y, extra, kept = saved_beside_the_operands(tensors)
    assert not extra and not kept and not y.requires_grad
    with torch.inference_mode():
        torch.testing.assert_close(low_rank_linear(**tensors), y)


def test_operands_are_left_alone():
    """Neither pass writes to a tensor of the caller's, the incoming gradient included."""
    tensors = operands(SHAPE)
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
    tensors = operands(SHAPE)
    _, expected = differentiate(lambda **t: reference.low_rank_linear(**t) * 2, tensors)
    _, found = differentiate(lambda **t: low_rank_linear(**t).mul_(2), tensors)
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-12, atol=1e-12)


def test_meta_tensors():
    tensors = {
        name: t.to("meta").requires_grad_() for name, t in operands(SHAPE, lead=(2, 3)).items()
    }
    y = low_rank_linear(**tensors)
    assert y.device.type == "meta" and y.shape == (2, 3, 15)
    y.sum().backward()
    assert all(t.grad.shape == t.shape and t.grad.is_meta for t in tensors.values())


SIZES = {"K": 20, "n": 9, "G": 4, "Ra": 6, "Rb": 6}
DTYPE_PAIRS = st.sampled_from([(torch.float64, torch.float64), *DTYPES])


@st.composite
def problems(draw):
    sizes = {name: draw(st.integers(1, most)) for name, most in SIZES.items()}
    choices = {name: draw(st.booleans()) for name in ("core", "shared", "bias")}
    lead = tuple(draw(st.lists(st.integers(0, 5), max_size=3)))
    dtype, factor_dtype = draw(DTYPE_PAIRS)
    *tensors, dy = operands_and_dy(
        Shape(**sizes, **choices),
        dtype,
        lead=lead,
        factor_dtype=factor_dtype,
        seed=draw(st.integers(0, 2**31)),
    )
    tensors = [
        t.mT.contiguous().mT if t is not None and t.dim() > 1 and draw(st.booleans()) else t
        for t in tensors
    ]
    return dict(zip(NAMES, tensors, strict=True)), dy, draw(st.sampled_from(["auto", *STRATEGIES]))


@hypothesis.given(problems())
def test_property_matches_float64(problem):
    """Any shape, stride, dtype and slice count: close to float64 by the rounding of the dtype."""
    tensors, dy, strategy = problem
    dtype = tensors["x"].dtype
    wide = cast(tensors, torch.float64)
    y_exact, exact = differentiate(reference.low_rank_linear, wide, dy)
    y, grads = differentiate(partial(low_rank_linear, strategy=strategy), tensors, dy)
    assert y.shape == dy.shape and y.dtype == dtype
    # The same formula on absolute values bounds every partial sum; a dozen roundings meet each.
    magnitudes = {name: None if t is None else t.abs() for name, t in wide.items()}
    bound_y, bound = differentiate(reference.low_rank_linear, magnitudes, dy.abs())
    tolerance = 12 * torch.finfo(dtype).eps
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
    (
        {"x": half, "weight": half, "bias": half, "core": half},
        ["share one dtype", "down torch.float32", "core torch.float16", "up torch.float32"],
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


def test_p_is_made_where_a_gradient_needs_it(monkeypatch, no_entry_point):
    saved = []
    real = torch_backend.forward

    def forward(*tensors, save_p, strategy):
        saved.append(save_p)
        return real(*tensors, save_p=save_p, strategy=strategy)

    monkeypatch.setattr(torch_backend, "forward", forward)
    tensors = operands(Shape(M=5, K=7, n=5, Ra=3, Rb=2), torch.float32)
    low_rank_linear(**tensors, backend="torch")
    for name, tensor in tensors.items():
        tensor.requires_grad_()
        with torch.no_grad():
            low_rank_linear(**tensors, backend="torch")
        assert low_rank_linear(**tensors, backend="torch").requires_grad
        assert saved.pop() == (name in ("core", "up"))
        tensor.requires_grad_(False)
    assert saved == [False] * (1 + len(tensors))


@pytest.mark.parametrize("form", FORMS)
def test_a_trace_holds_torchs_own_operators(form):
    tensors = operands(FORMS[form], torch.float64, lead=(2, 3))
    x = tensors.pop("x")
    traced = torch.jit.trace(lambda x: low_rank_linear(x, **tensors), (x,), check_trace=False)
    assert "efft_kernels::" not in str(traced.graph)
    exact = reference.low_rank_linear(x, **tensors)
    torch.testing.assert_close(traced(x), exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("save_p", [False, True])
def test_an_export_gets_what_the_operator_gives(save_p):
    tensors = operands(SHAPE).values()
    found = functional._decomposed(*tensors, save_p, "auto", "auto")
    operator = torch.ops.efft_kernels.low_rank_linear_fwd
    torch.testing.assert_close(found, operator(*tensors, save_p, "auto", "auto"))
