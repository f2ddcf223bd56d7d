"""The C++ entry point against the long way, through functional.py and dispatch.py, to the same
backend: results, gradients, errors, what is saved, and what it leaves to that way.

test_functional.py, test_gradients.py and test_autocast.py run on both ways already.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import time
import traceback
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from efft_kernels import low_rank_linear, reference, use_backend
from efft_kernels.ops import checks, cost_model, dispatch, eager_entry
from efft_kernels.ops.backends import cpp_backend, native_library, torch_backend

for missing in (native_library.not_built("_native"), native_library.not_built("_autograd")):
    if missing is not None:
        pytest.skip(missing, allow_module_level=True)

NAMES = ("x", "weight", "bias", "down", "core", "up")
FACTORS = ("down", "core", "up")
FWD = torch.ops.efft_kernels.low_rank_linear_fwd.default
HALVES = [torch.bfloat16, torch.float16]


@contextmanager
def the_python_way() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native_library, "autograd_module", lambda: None)
        yield


def on_both_ways(run: Callable[[], Any]) -> tuple[Any, Any]:
    """What `run` gives through the entry point and through Python."""
    found = run()
    with the_python_way():
        return found, run()


@pytest.fixture(params=["auto", "torch"])
def backend(request) -> Iterator[str]:
    """What runs a call that names none: the native kernels, or a backend in Python."""
    with use_backend(request.param):
        yield request.param


on_each_backend = pytest.mark.usefixtures("backend")


@pytest.fixture
def python_calls(monkeypatch) -> list[str]:
    """One entry for every call that functional.py checked, and so took."""
    seen = []
    real = checks.check_operands

    def check(x, *args):
        seen.append(type(x).__name__)
        return real(x, *args)

    monkeypatch.setattr(checks, "check_operands", check)
    return seen


def operands(
    lead=(11,), k=7, per_slice=5, slices=3, core=True, shared=True, bias=True, dtype=torch.float32,
    frozen_dtype=None, factor_dtype=None,
) -> dict[str, Tensor | None]:  # fmt: skip
    n, ra, rb = slices * per_slice, 3, 2 if core else 3
    shapes = {
        "x": (*lead, k),
        "weight": (n, k),
        "bias": (n,) if bias else None,
        "down": (k, ra),
        "core": (slices, ra, rb) if core else None,
        "up": (1 if shared and core else slices, per_slice, rb),
    }
    kinds = {"weight": frozen_dtype, "bias": frozen_dtype} | dict.fromkeys(FACTORS, factor_dtype)
    return {
        name: None if shape is None else torch.randn(shape).to(kinds.get(name) or dtype)
        for name, shape in shapes.items()
    }


def step(tensors, wanted=NAMES, context=None, after=None, **options):
    """[y, the gradients of `wanted`] of one training step."""
    leaves = {
        name: None if t is None else t.detach().clone().requires_grad_(name in wanted)
        for name, t in tensors.items()
    }
    with context() if context is not None else nullcontext():
        y = low_rank_linear(**leaves, **options)
    result = y if after is None else after(y)
    result.float().sin().sum().backward()
    return [y.detach(), *(None if t is None else t.grad for t in leaves.values())]


def assert_identical(found, expected) -> None:
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.dtype == b.dtype and a.shape == b.shape and a.stride() == b.stride()
            assert torch.equal(a, b)


FORMS = [
    {},
    {"shared": False, "bias": False},
    {"core": False},
    {"slices": 1, "core": False, "bias": False},
]


@on_each_backend
@pytest.mark.parametrize("strategy", ["auto", *cpp_backend.STRATEGIES])
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize(
    "dtypes",
    [
        {},
        {"dtype": torch.float64},
        {"dtype": torch.float16},
        {"dtype": torch.bfloat16},
        {"dtype": torch.bfloat16, "factor_dtype": torch.float32},
    ],
    ids=str,
)
def test_same_bits(dtypes, form, strategy, python_calls):
    """The same kernels run, on whatever leading dims."""
    for lead in ((11,), (), (0,), (1,), (2, 3), (2, 0, 3)):
        tensors = operands(lead, **form, **dtypes)
        found, expected = on_both_ways(lambda t=tensors: step(t, strategy=strategy))
        assert_identical(found, expected)
        assert len(python_calls) == 1, "the entry point takes these calls itself"
        python_calls.clear()


@on_each_backend
@pytest.mark.parametrize("wanted", [(n,) for n in NAMES] + [FACTORS, ("x", "up"), NAMES], ids=str)
@pytest.mark.parametrize("form", FORMS[:3], ids=str)
def test_same_gradients_of_any_subset(form, wanted):
    tensors = operands(**form)
    if all(tensors[name] is None for name in wanted):
        pytest.skip("not among the operands")
    found, expected = on_both_ways(lambda: step(tensors, wanted))
    assert_identical(found, expected)
    for name, grad in zip(NAMES, found[1:], strict=True):
        assert (grad is not None) == (name in wanted and tensors[name] is not None)


def test_what_was_built_can_be_loaded():
    """Else every call would quietly go through Python."""
    assert native_library.load_cpu() is None and native_library.autograd_unavailable() is None


def test_the_node_says_what_it_is():
    tensors = operands()
    tensors["down"].requires_grad_()
    found, expected = on_both_ways(lambda: low_rank_linear(**tensors).grad_fn)
    assert "efft_kernels" in found.name() and "LowRankLinear" in found.name()
    assert type(expected).__name__ == "_LowRankLinearBackward"


@on_each_backend
class TestWhatIsLeftToPython:
    def test_the_reference(self, python_calls):
        tensors = operands()
        expected = low_rank_linear(**tensors)
        assert python_calls == []
        found = low_rank_linear(**tensors, backend="reference")
        torch.testing.assert_close(found, expected)
        assert len(python_calls) == 1

    def test_nothing_to_multiply(self, python_calls):
        for size in ({"k": 0}, {"per_slice": 0}):
            found, expected = on_both_ways(lambda size=size: step(operands(**size, bias=False)))
            assert [t is None or t.shape for t in found] == [t is None or t.shape for t in expected]
        assert len(python_calls) == 4

    def test_meta_tensors(self, python_calls):
        y = low_rank_linear(**{name: t.to("meta") for name, t in operands().items()})
        assert y.is_meta and y.shape == (11, 15) and len(python_calls) == 1

    def test_torch_func(self, python_calls):
        tensors = operands(dtype=torch.float64)

        def loss(down):
            return low_rank_linear(**(tensors | {"down": down})).sin().sum()

        leaf = tensors["down"].clone().requires_grad_()
        (expected,) = torch.autograd.grad(loss(leaf), leaf)
        assert python_calls == []
        torch.testing.assert_close(torch.func.grad(loss)(tensors["down"]), expected)
        many = torch.stack([tensors["down"], tensors["down"] * 2])
        torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss))(many)[0], expected)
        assert len(python_calls) == 2

    def test_a_dispatch_mode_sees_the_operator(self, python_calls):
        class Recording(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                seen.append(function)
                return function(*args, **(kwargs or {}))

        tensors, seen = operands(), []
        expected = low_rank_linear(**tensors)
        with Recording():
            assert torch.equal(low_rank_linear(**tensors), expected)
        assert FWD in seen and len(python_calls) == 1

    def test_a_function_mode_sees_the_operator(self, python_calls):
        class Recording(TorchFunctionMode):
            def __torch_function__(self, function, types, args=(), kwargs=None):
                seen.append(function)
                return function(*args, **(kwargs or {}))

        tensors, seen = operands(), []
        expected = low_rank_linear(**tensors)
        with Recording():
            assert torch.equal(low_rank_linear(**tensors), expected)
        assert FWD.overloadpacket in seen and len(python_calls) == 1

    def test_flops_are_counted_as_on_the_python_way(self):
        def count():
            with FlopCounterMode(display=False) as counter:
                step(tensors)
            return counter.get_total_flops()

        tensors = operands()
        found, expected = on_both_ways(count)
        assert found == expected

    def test_fake_tensors(self, python_calls):
        with FakeTensorMode() as mode:
            tensors = {name: mode.from_tensor(t) for name, t in operands((2, 3)).items()}
            y = low_rank_linear(**tensors)
        assert isinstance(y, torch._subclasses.FakeTensor) and y.shape == (2, 3, 15)
        y = low_rank_linear(**tensors)  # the mode is gone, its tensors are not
        assert isinstance(y, torch._subclasses.FakeTensor) and python_calls == ["FakeTensor"] * 2

    @pytest.mark.parametrize("name", NAMES)
    def test_a_subclass_with_a_torch_function(self, name, python_calls):
        class Named(Tensor):
            pass

        tensors = operands()
        expected = low_rank_linear(**tensors)
        tensors[name] = tensors[name].as_subclass(Named)
        y = low_rank_linear(**tensors)
        assert type(y) is Named and torch.equal(y.as_subclass(Tensor), expected)
        assert len(python_calls) == 1

    def test_a_subclass_with_a_torch_dispatch(self, python_calls):
        tensors = operands()
        pair = TwoTensor(tensors["x"], 2 * tensors["x"])
        y = low_rank_linear(**(tensors | {"x": pair}))
        assert type(y) is TwoTensor and python_calls[0] == "TwoTensor"
        assert torch.equal(y.a, low_rank_linear(**tensors))
        assert torch.equal(y.b, low_rank_linear(**(tensors | {"x": 2 * tensors["x"]})))

    @pytest.mark.parametrize("name", NAMES)
    def test_forward_mode(self, name, python_calls):
        tensors = operands(dtype=torch.float64)
        tangent = torch.randn_like(tensors[name])
        results = []
        with forward_ad.dual_level():
            tensors[name] = forward_ad.make_dual(tensors[name], tangent)
            for function in (low_rank_linear, reference.low_rank_linear):
                results.append(forward_ad.unpack_dual(function(**tensors)).tangent)
        assert len(python_calls) == 1 and results[1].norm() > 0
        torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-12)

    def test_forward_mode_with_a_backend_by_name(self):
        tensors = operands()
        with forward_ad.dual_level():
            low_rank_linear(**tensors, backend="cpp")
            tensors["up"] = forward_ad.make_dual(tensors["up"], torch.ones_like(tensors["up"]))
            with pytest.raises(RuntimeError, match=r"'cpp' does not support forward.*'torch'"):
                low_rank_linear(**tensors, backend="cpp")
            y = low_rank_linear(**tensors, backend="torch")
            assert forward_ad.unpack_dual(y).tangent.norm() > 0

    def test_negated_and_zero_tensors_are_right(self):
        """Lazy ones: a view whose sign is not applied yet, and zeros that have no memory."""
        tensors = operands()
        negated = torch._neg_view(tensors["x"])
        assert negated.is_neg()
        expected = low_rank_linear(**(tensors | {"x": -tensors["x"]}))
        assert torch.equal(low_rank_linear(**(tensors | {"x": negated})), expected)
        lazy = torch._efficientzerotensor(tensors["core"].shape)
        expected = low_rank_linear(**(tensors | {"core": torch.zeros_like(tensors["core"])}))
        assert torch.equal(low_rank_linear(**(tensors | {"core": lazy})), expected)

    def test_a_trace_holds_the_operator(self, python_calls):
        x, *others = operands().values()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            traced = torch.jit.trace(lambda x: low_rank_linear(x, *others), (x,))
        assert "efft_kernels::low_rank_linear_fwd" in {n.kind() for n in traced.graph.nodes()}
        assert len(python_calls) >= 1
        other = torch.randn(5, 7)
        assert torch.equal(traced(other), low_rank_linear(other, *others))

    def test_compiled_graphs_hold_the_operator(self):
        torch._dynamo.reset()
        tensors = {name: t.requires_grad_() for name, t in operands().items()}
        expected = step(tensors)
        compiled = torch.compile(low_rank_linear, fullgraph=True, backend="aot_eager")
        y = compiled(**tensors)
        y.sin().sum().backward()
        assert_identical([y.detach(), *(t.grad for t in tensors.values())], expected)
        torch._dynamo.reset()


def refusal(run: Callable[[], Any]) -> tuple[type, str]:
    with pytest.raises(Exception) as error:
        run()
    return error.type, str(error.value)


HALF, DOUBLE, WHOLE = torch.float16, torch.float64, torch.int64
SHAPES = {
    "x": (4, 7),
    "weight": (15, 7),
    "bias": (15,),
    "down": (7, 3),
    "core": (3, 3, 2),
    "up": (1, 5, 2),
}
REFUSALS = [
    *({name: value} for name in NAMES for value in ([1.0], np.ones(3), 1.0, "x")),
    *({name: None} for name in ("x", "weight", "down", "up")),
    *({name: torch.ones(SHAPES[name], dtype=d)} for name in NAMES for d in (HALF, DOUBLE, WHOLE)),
    *({name: torch.ones(SHAPES[name], device="meta")} for name in NAMES),
    *({name: torch.ones(*SHAPES[name][:-1], SHAPES[name][-1] + 1)} for name in NAMES),
    *({name: torch.ones(SHAPES[name][1:])} for name in NAMES[1:]),
    *({name: torch.ones(2, *SHAPES[name])} for name in NAMES[1:]),
    {"down": torch.ones(7, 0)},
    {"core": torch.ones(0, 3, 2)},
    {"core": torch.ones(2, 3, 2)},
    {"up": torch.ones(2, 5, 2)},
    {"core": None},
    {"core": None, "up": torch.ones(0, 5, 3)},
    {"backend": "tritton"},
    {"backend": "cuda"},
    {"strategy": "quick"},
    {"backend": "triton"},
    {"strategy": "fused", "backend": "cpp"},
    {"strategy": "fused", "backend": "torch"},
    {"strategy": "fused"},
    {"backend": "cpp", **{name: torch.ones(shape, dtype=HALF) for name, shape in SHAPES.items()}},
]


@on_each_backend
@pytest.mark.parametrize("changes", REFUSALS, ids=lambda changes: "-".join(changes))
@pytest.mark.parametrize("grad", [False, True])
def test_same_refusals(changes, grad):
    """Type and text, whether or not there is an entry point."""
    if changes.get("backend") in ("cuda", "triton") and torch.cuda.is_available():
        pytest.skip("there is one here")

    def run():
        given = {name: torch.ones(shape) for name, shape in SHAPES.items()}
        given["down"].requires_grad_(grad)
        return low_rank_linear(**(given | changes))

    found, expected = on_both_ways(lambda: refusal(run))
    assert found == expected
    assert issubclass(found[0], TypeError | ValueError | RuntimeError)
    with torch.autocast("cpu", torch.bfloat16):
        try:
            run()
        except (TypeError, ValueError, RuntimeError):
            found, expected = on_both_ways(lambda: refusal(run))
            assert found == expected


def test_same_refusal_of_half_precision_beside_float32_weights():
    """x in half precision outside autocast, with weights that only autocast would cast."""

    def run():
        return low_rank_linear(**(operands() | {"x": torch.ones(4, 7, dtype=torch.bfloat16)}))

    found, expected = on_both_ways(lambda: refusal(run))
    assert found == expected and "outside autocast" in found[1]


@on_each_backend
@pytest.mark.parametrize("half", HALVES, ids=str)
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("form", FORMS[:3], ids=str)
def test_same_under_autocast(form, x_dtype, half):
    tensors = operands(**form)
    if x_dtype == torch.float64:
        tensors = {name: None if t is None else t.double() for name, t in tensors.items()}
    tensors["x"] = tensors["x"].to(x_dtype)
    found, expected = on_both_ways(
        lambda: step(tensors, context=lambda: torch.autocast("cpu", half))
    )
    assert found[0].dtype == (half if x_dtype != torch.float64 else x_dtype)
    assert_identical(found, expected)


@on_each_backend
def test_same_under_autocast_with_mixed_parameters():
    tensors = operands()
    tensors |= {"weight": tensors["weight"].bfloat16(), "bias": tensors["bias"].half()}
    found, expected = on_both_ways(
        lambda: step(tensors, context=lambda: torch.autocast("cpu", torch.bfloat16))
    )
    assert_identical([*found[:3], *found[4:]], [*expected[:3], *expected[4:]])
    # d_bias in bias's own dtype; the Python way rounds it to weight's in between.
    assert found[3].dtype == expected[3].dtype == torch.float16
    torch.testing.assert_close(found[3], expected[3], rtol=2**-8, atol=0)


@on_each_backend
def test_nested_autocast():
    tensors = operands()
    with torch.autocast("cpu", torch.bfloat16):
        assert low_rank_linear(**tensors).dtype == torch.bfloat16
        with torch.autocast("cpu", enabled=False):
            assert low_rank_linear(**tensors).dtype == torch.float32
            found, expected = on_both_ways(lambda: step(tensors))
            assert_identical(found, expected)
        assert low_rank_linear(**tensors).dtype == torch.bfloat16
    assert low_rank_linear(**tensors).dtype == torch.float32


@on_each_backend
def test_backward_under_autocast():
    """A backward that runs inside the context gives the same numbers as outside."""
    tensors = {name: t.double() for name, t in operands().items()}
    outside = step(tensors)

    def inside():
        with torch.autocast("cpu", torch.bfloat16):
            return step(tensors, after=lambda y: y.sin())

    found, expected = on_both_ways(inside)
    assert_identical(found, expected)
    assert_identical(found[:1], outside[:1])


@on_each_backend
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients(context, python_calls):
    tensors = {name: t.requires_grad_() for name, t in operands((2, 3)).items()}
    with_graph = low_rank_linear(**tensors)
    assert with_graph.requires_grad and python_calls == []
    with context():
        y, expected = on_both_ways(lambda: low_rank_linear(**tensors))
        assert y.is_inference() == (context is torch.inference_mode)
    assert not y.requires_grad and y.grad_fn is None and len(python_calls) == 1
    assert torch.equal(y, expected)
    torch.testing.assert_close(y, with_graph.detach(), rtol=1e-5, atol=1e-5)


@on_each_backend
def test_no_graph_where_nothing_requires_grad(python_calls):
    y = low_rank_linear(**operands((2, 3)))
    assert not y.requires_grad and y.grad_fn is None and not y.is_inference()
    assert python_calls == []


@on_each_backend
def test_inference_tensors_in_a_training_step():
    """They cannot be saved for a backward; both ways say so."""
    tensors = operands()
    with torch.inference_mode():
        tensors["x"] = tensors["x"] * 1
    tensors["down"].requires_grad_()
    found, expected = on_both_ways(lambda: refusal(lambda: low_rank_linear(**tensors)))
    assert found == expected and "Inference tensors cannot be saved" in found[1]


@on_each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_same_second_derivatives(form, dtype):
    tensors = operands(**form, dtype=dtype)

    def penalty():
        leaves = [None if t is None else t.clone().requires_grad_() for t in tensors.values()]
        inputs = [t for t in leaves if t is not None]
        y = low_rank_linear(*leaves)
        first = torch.autograd.grad(y.float().tanh().sum(), inputs, create_graph=True)
        loss = sum(grad.float().pow(2).sum() for grad in first)
        return [*(g.detach() for g in first), *torch.autograd.grad(loss, inputs)]

    tolerance = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 0.1}[dtype]
    for found, expected in zip(*on_both_ways(penalty), strict=True):
        assert found.dtype == expected.dtype and found.shape == expected.shape
        scale = expected.abs().max()
        assert scale > 0 and (found - expected).abs().max() <= tolerance * scale


@on_each_backend
@pytest.mark.parametrize("wanted", [("x", "core"), ("x", "up"), ("core", "up")])
def test_same_refusal_of_a_second_derivative(wanted):
    def run():
        tensors = operands()
        inputs = [tensors[name].requires_grad_() for name in wanted]
        y = low_rank_linear(**tensors)
        return refusal(lambda: torch.autograd.grad(y.sum(), inputs, create_graph=True))

    found, expected = on_both_ways(run)
    assert found == expected


@on_each_backend
@pytest.mark.parametrize("context", [nullcontext, lambda: torch.autocast("cpu", torch.bfloat16)])
@pytest.mark.parametrize(
    "wanted", [("x",), ("down",), ("up",), ("weight",), ("x", *FACTORS), NAMES]
)
def test_saves_the_same(wanted, context):
    """x and P where a gradient reads them, the operands, and nothing else."""
    tensors = operands((4, 3))
    own = {t.untyped_storage().data_ptr(): name for name, t in tensors.items()}

    def saved():
        kept = []
        given = {name: t.detach().requires_grad_(name in wanted) for name, t in tensors.items()}

        def pack(t):
            kept.append((own.get(t.untyped_storage().data_ptr(), "new"), tuple(t.shape), t.dtype))
            return t

        with saved_tensors_hooks(pack, lambda t: t), context():
            y = low_rank_linear(**given)
        y.sum().backward()
        return sorted(kept, key=str)

    found, expected = on_both_ways(saved)
    # The cast of x is autograd's business under autocast: the copy is new, and saved once.
    assert found == expected
    new = [shape for name, shape, _ in found if name == "new"]
    cast = context is not nullcontext and {"down", "weight"} & set(wanted)
    assert new.count((12, 3)) == bool({"core", "up"} & set(wanted))
    assert new.count((12, 7)) == bool(cast) and len(new) <= 2


@on_each_backend
@pytest.mark.parametrize("wanted", [FACTORS, NAMES])
def test_offloaded_tensors_come_back(wanted):
    """Hooks that hand out another tensor than they were given, as offloading does."""
    tensors = operands()
    expected = step(tensors, wanted)
    with saved_tensors_hooks(lambda t: t.double(), lambda t: t.float().clone()):
        assert_identical(step(tensors, wanted), expected)
    with torch.autograd.graph.save_on_cpu():
        assert_identical(step(tensors, wanted), expected)


@on_each_backend
def test_backward_releases_what_was_saved():
    """x and P are gone after the first backward, and a second one is refused."""

    class Kept:
        def __init__(self, tensor):
            self.tensor = tensor

    def run():
        tensors = {name: t.requires_grad_() for name, t in operands().items()}
        kept = []

        def pack(t):
            holder = Kept(t)
            kept.append(weakref.ref(holder))
            return holder

        with saved_tensors_hooks(pack, lambda holder: holder.tensor):
            y = low_rank_linear(**tensors)
        assert len(kept) == 6 and all(holder() is not None for holder in kept)
        y.sum().backward(retain_graph=True)
        first = [t.grad.clone() for t in tensors.values()]
        assert all(holder() is not None for holder in kept)
        y.sum().backward()
        gc.collect()
        assert all(holder() is None for holder in kept)
        for t, grad in zip(tensors.values(), first, strict=True):
            assert torch.equal(t.grad, 2 * grad)
        return refusal(y.sum().backward)

    found, expected = on_both_ways(run)
    assert found == expected and "second time" in found[1]


@on_each_backend
@pytest.mark.parametrize("name", ["x", "weight", *FACTORS])
def test_an_operand_changed_before_the_backward_is_noticed(name):
    def run():
        tensors = {key: (t * 1).requires_grad_() for key, t in operands().items()}
        y = low_rank_linear(**tensors)
        with torch.no_grad():
            tensors[name].add_(1)
        return refusal(y.sum().backward)

    found, expected = on_both_ways(run)
    assert found[0] is expected[0] is RuntimeError
    assert "modified by an inplace operation" in found[1]


@on_each_backend
@pytest.mark.parametrize("lead", [(11,), (2, 3)])
def test_output_can_be_changed_in_place(lead):
    tensors = operands(lead)
    found, expected = on_both_ways(lambda: step(tensors, after=lambda y: y.mul_(3).add_(1)))
    assert_identical(found[1:], expected[1:])
    assert_identical(found[1:], step(tensors, after=lambda y: y * 3 + 1)[1:])


@on_each_backend
def test_views_of_larger_parameters():
    """Operands that are parts of others, and share them: gradients reach the whole, each part's."""
    torch.manual_seed(0)
    whole = {"a": torch.randn(9, 20), "w": torch.randn(2, 15, 7), "f": torch.randn(60)}

    def run(function=low_rank_linear):
        leaves = {name: t.clone().requires_grad_() for name, t in whole.items()}
        a, w, f = (leaves[name] * 1 for name in whole)
        y = 0
        for i in range(2):
            y = y + function(
                a[1:, 3:10], w[i], w[1 - i, :, 2], a.t()[3:10, :3], f[:18].view(3, 3, 2),
                f.view(2, 30)[:, :5].t().reshape(1, 5, 2),
            )  # fmt: skip
        y.sin().sum().backward()
        return [y.detach(), *(t.grad for t in leaves.values())]

    found, expected = on_both_ways(run)
    assert_identical(found, expected)
    for a, b in zip(found, run(reference.low_rank_linear), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("context", [nullcontext, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_checkpointing(context, use_reentrant, backend):
    tensors = operands((4, 3))

    def run(checkpointed=True):
        leaves = [t.clone().requires_grad_() for t in tensors.values()]
        with context():
            if checkpointed:
                y = checkpoint(low_rank_linear, *leaves, use_reentrant=use_reentrant)
            else:
                y = low_rank_linear(*leaves)
        y.float().sin().sum().backward()
        return [y.detach(), *(t.grad for t in leaves)]

    found, expected = on_both_ways(run)
    assert_identical(found, expected)
    if backend == "auto" or not use_reentrant:
        # A reentrant one runs first without gradients, where plain torch may merge the weights.
        assert_identical(found, run(checkpointed=False))


@on_each_backend
def test_hooks_and_anomaly_mode():
    """Hooks on operands and on the node run; anomaly mode finds its way through the C++ node."""
    tensors, seen = operands(), []
    leaves = {name: t.clone().requires_grad_() for name, t in tensors.items()}
    for name, leaf in leaves.items():
        leaf.register_hook(lambda grad, name=name: seen.append(name))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.autograd.detect_anomaly():
            y = low_rank_linear(**leaves)
            y.grad_fn.register_hook(lambda inputs, outputs: seen.append("node"))
            y.sin().sum().backward()
    assert sorted(seen) == sorted([*NAMES, "node"])
    assert_identical([t.grad for t in leaves.values()], step(tensors)[1:])


@on_each_backend
def test_gradients_of_some_inputs_alone():
    tensors = {name: t.requires_grad_() for name, t in operands().items()}

    def run():
        y = low_rank_linear(**tensors).sin().sum()
        return torch.autograd.grad(y, [tensors["x"], tensors["up"]])

    found, expected = on_both_ways(run)
    assert_identical(found, expected)


@on_each_backend
def test_several_callers_at_once():
    """While another has the choices forgotten all the time."""
    problems = [operands(lead, dtype=dtype) for lead, dtype in
                (((301,), torch.float32), ((2, 17), torch.float64),
                 ((5,), torch.bfloat16), ((1,), torch.float32))]  # fmt: skip
    right, wrong, running = [step(t) for t in problems], [], True

    def run(tensors, expected):
        try:
            for _ in range(20):
                assert_identical(step(tensors), expected)
        except BaseException as error:  # the thread would lose it
            wrong.append(error)

    def forget():
        while running:
            eager_entry.forget_choices()
            time.sleep(1e-3)

    callers = [
        threading.Thread(target=run, args=each) for each in zip(problems, right, strict=True)
    ]
    disturber = threading.Thread(target=forget)
    for thread in (*callers, disturber):
        thread.start()
    for caller in callers:
        caller.join()
    running = False
    disturber.join()
    assert wrong == []


ENGINE_DEPTH = 70  # autograd hands nested backwards beyond 60 to threads of its own


class Nested(torch.autograd.Function):
    """Its backward starts another one, `levels` deep, and calls `run` in the innermost."""

    @staticmethod
    def forward(ctx, x, levels, run):
        ctx.rest = levels, run
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        levels, run = ctx.rest
        with torch.enable_grad():
            in_engine_thread(run, levels - 1) if levels else run()
        return dy, None, None


def in_engine_thread(run: Callable[[], Any], levels=ENGINE_DEPTH) -> None:
    Nested.apply(torch.ones(1, requires_grad=True), levels, run).sum().backward()


class Failure(Exception):
    """Not one that torch knows, and not to be made from a message alone."""

    def __init__(self, code: int, *, detail: str) -> None:
        super().__init__(code, detail)


FAILURES = [
    Failure(3, detail="of its own"), RuntimeError("one of torch's"), torch.OutOfMemoryError("full"),
    KeyboardInterrupt(), StopIteration(5), KeyError("name"),
]  # fmt: skip


def failing(error: BaseException) -> Callable[..., Any]:
    def the_backend_that_fails(*args: Any, **kwargs: Any) -> Any:
        raise error

    return the_backend_that_fails


def caught(run: Callable[[], Any]) -> BaseException:
    try:
        run()
    except BaseException as error:
        return error
    raise AssertionError("nothing was raised")


@contextmanager
def watched_torch(watch: Callable[..., Any]) -> Iterator[None]:
    """The torch backend's functions run as `watch(name, real, *args, **options)`."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("forward", "backward"):
            patch.setattr(torch_backend, name, partial(watch, name, getattr(torch_backend, name)))
        yield


@pytest.fixture
def in_torch(monkeypatch) -> pytest.MonkeyPatch:
    """Calls run in the torch backend, whose functions the test may replace by this."""
    with use_backend("torch"):
        yield monkeypatch


class TestBackendsInPython:
    @pytest.mark.parametrize("error", FAILURES, ids=repr)
    @pytest.mark.parametrize("grad", [False, True])
    def test_an_exception_of_the_forward_is_the_callers(self, in_torch, python_calls, error, grad):
        tensors = operands()
        tensors["down"].requires_grad_(grad)
        in_torch.setattr(torch_backend, "forward", failing(error))
        found = caught(lambda: low_rank_linear(**tensors))
        assert found is error and python_calls == []
        names = [frame.name for frame in traceback.extract_tb(found.__traceback__)]
        assert names[-1] == "the_backend_that_fails"
        in_torch.undo()
        assert_identical(*on_both_ways(lambda: step(tensors)))

    @pytest.mark.parametrize("error", FAILURES, ids=repr)
    @pytest.mark.parametrize("place", [lambda run: run(), in_engine_thread], ids=["here", "engine"])
    def test_an_exception_of_the_backward_is_the_callers(self, in_torch, error, place):
        """From the calling thread, and from one of autograd's own."""
        tensors = {name: t.requires_grad_() for name, t in operands().items()}
        y, threads = low_rank_linear(**tensors), []

        def backward(*args, **kwargs):
            threads.append(threading.get_ident())
            raise error

        in_torch.setattr(torch_backend, "backward", backward)
        for run in (torch.autograd.backward, partial(torch.autograd.grad, inputs=tensors["up"])):
            found = caught(lambda run=run: place(lambda: run(y.sum(), retain_graph=True)))
            assert found is error
        assert (threading.get_ident() in threads) == (place is not in_engine_thread)
        in_torch.undo()
        y.sum().backward()
        assert all(t.grad is not None for t in tensors.values())

    def test_exceptions_and_results_are_let_go(self, in_torch):
        """Neither errors nor tensors nor the backend's functions gather references."""
        tensors = operands()
        with_graph = {name: t.clone().requires_grad_() for name, t in tensors.items()}
        eager_entry.forget_choices()
        functions = eager_entry._callables(torch_backend, "split", "split")

        def once():
            references = []
            step(tensors, strategy="split")
            for name, run in (
                ("forward", lambda: low_rank_linear(**with_graph, strategy="split")),
                ("backward", low_rank_linear(**with_graph, strategy="split").sum().backward),
            ):
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(torch_backend, name, failing(Failure(1, detail="x")))
                    references.append(weakref.ref(caught(run)))
            return references

        def counted():
            gc.collect()
            alive = sum(type(o) is Tensor for o in gc.get_objects())
            return alive, *map(sys.getrefcount, functions)

        once()
        before = counted()
        references = [reference for _ in range(10) for reference in once()]
        assert counted() == before
        assert len(references) == 20 and all(reference() is None for reference in references)

    @pytest.mark.parametrize("wanted", [(n,) for n in NAMES] + [FACTORS, ("x", "up"), NAMES])
    @pytest.mark.parametrize("form", FORMS, ids=str)
    def test_is_given_the_same(self, in_torch, form, wanted):
        """Every argument of both functions, as on the long way; P where it was made."""
        tensors = operands((2, 3), **form)
        if all(tensors[name] is None for name in wanted):
            pytest.skip("not among the operands")

        def described(value):
            if isinstance(value, Tensor):
                return tuple(value.shape), value.stride(), value.dtype, value.sum().item()
            return value

        def run():
            def watch(name, real, *args, **options):
                seen.append((name, *map(described, args), sorted(options.items())))
                return real(*args, **options)

            seen = []
            with watched_torch(watch):
                step(tensors, wanted)
            return seen

        found, expected = on_both_ways(run)
        assert found == expected and [name for name, *_ in found] == ["forward", "backward"]

    def test_runs_in_the_same_surroundings(self, in_torch):
        """No autocast and no graph, within autocast and out of it, in both directions."""

        def run():
            def watch(name, real, *args, **options):
                state = torch.is_autocast_enabled("cpu"), torch.is_grad_enabled()
                result = real(*args, **options)
                graph = any(t is not None and t.requires_grad for t in result)
                product = torch.mm(args[0].float(), torch.ones(7, 1))
                seen.append((name, *state, graph, product.dtype))
                return result

            seen = []
            with watched_torch(watch):
                step(operands((4, 2), per_slice=7, slices=1))
                with torch.autocast("cpu", torch.bfloat16):
                    step(operands((4, 2), per_slice=7, slices=1))
                    step(operands((4, 2), per_slice=7, slices=1, dtype=torch.float64))
            return seen

        found, expected = on_both_ways(run)
        here = (False, False, False, torch.float32)
        assert found == expected == [("forward", *here), ("backward", *here)] * 3

    @pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
    @pytest.mark.gpu
    def test_runs_on_the_device_of_x(self, in_torch):
        def watch(name, real, *args, **options):
            seen.append((name, torch.cuda.current_device()))
            return real(*args, **options)

        seen = []
        with watched_torch(watch):
            step({name: t.to("cuda:1") for name, t in operands().items()})
        assert seen == [("forward", 1), ("backward", 1)] and torch.cuda.current_device() == 0

    def test_runs_in_autograds_own_threads(self, in_torch):
        def watch(name, real, *args, **options):
            threads[name] = threading.get_ident()
            return real(*args, **options)

        tensors, threads, found = operands(), {}, []
        with watched_torch(watch):
            in_engine_thread(lambda: found.extend(step(tensors)))
        assert_identical(found, step(tensors))
        assert list(threads) == ["forward", "backward"]
        assert threading.get_ident() not in threads.values()

    def test_a_graph_outlives_the_choice_that_made_it(self, in_torch):
        """Whoever made it is forgotten, on another thread at that, and nothing else holds it."""
        tensors = operands()
        expected = step(tensors)
        leaves = {name: t.clone().requires_grad_() for name, t in tensors.items()}
        eager_entry._callables.cache_clear()
        eager_entry.forget_choices()
        y = low_rank_linear(**leaves)
        functions = [
            weakref.ref(f) for f in eager_entry._callables(torch_backend, "split", "split")
        ]
        eager_entry._callables.cache_clear()
        forgetting = threading.Thread(target=eager_entry.forget_choices)
        forgetting.start()
        forgetting.join()
        gc.collect()
        for rows in range(1, 50):
            low_rank_linear(**operands((rows,)))
        y.sin().sum().backward()
        assert_identical([y.detach(), *(t.grad for t in leaves.values())], expected)
        assert all(reference() is not None for reference in functions)

    def test_gradients_are_taken_as_they_are(self, in_torch):
        """What the backend allocated becomes .grad, without a copy, on both ways."""
        tensors = operands(per_slice=5, slices=1)

        def run():
            def watch(name, real, *args, **options):
                result = real(*args, **options)
                given[name] = [t.data_ptr() for t in result]
                return result

            given = {}
            leaves = [t.clone().requires_grad_() for t in tensors.values()]
            with watched_torch(watch):
                low_rank_linear(*leaves).sum().backward()
            places = zip(leaves, given["backward"], strict=True)
            return [t.grad.data_ptr() == place for t, place in places]

        found, expected = on_both_ways(run)
        assert found == expected == [True] * 6

    def test_may_give_more_gradients_than_were_asked_for(self, in_torch):
        tensors, real = operands(), torch_backend.backward
        expected = step(tensors, wanted=("x", "up"))

        def generous(*args, needs, **kwargs):
            return tuple(
                torch.full_like(args[0], 7.0) if grad is None else grad
                for grad in real(*args, needs=needs, **kwargs)
            )

        in_torch.setattr(torch_backend, "backward", generous)
        for found in on_both_ways(lambda: step(tensors, wanted=("x", "up"))):
            assert_identical(found, expected)

    def test_results_of_another_kind_are_refused(self, in_torch):
        tensors = {name: t.requires_grad_() for name, t in operands().items()}
        y = low_rank_linear(**tensors)
        for answer, message in (
            (None, "tuple of 6, got None"),
            ((y, y), "tuple of 6"),
            ((None,) * 6, "Tensor at position 0, got NoneType"),
            ((*(y.detach().new_zeros(t.shape) for t in list(tensors.values())[:5]), 1.0),
             "Tensor at position 5, got float"),
        ):  # fmt: skip
            in_torch.setattr(torch_backend, "backward", lambda *a, answer=answer, **k: answer)
            with pytest.raises(TypeError, match=message):
                y.sum().backward(retain_graph=True)
        for answer, message in (
            (y, "tuple of 2"),
            ((y, None), "Tensor at position 1, got NoneType"),
            ((5, None), "Tensor at position 0, got int"),
        ):
            in_torch.setattr(torch_backend, "forward", lambda *a, answer=answer, **k: answer)
            with pytest.raises(TypeError, match=message):
                low_rank_linear(**tensors)

    @pytest.mark.parametrize("wanted", [("core", "up"), ("x", "bias"), NAMES])
    def test_a_vmap_over_the_backward(self, in_torch, wanted):
        """Composed from torch's own operators, which have batching rules: a kernel has none."""
        tensors = operands(dtype=torch.float64)
        inputs = [tensors[name].requires_grad_() for name in wanted]
        y = low_rank_linear(**tensors)
        dys = torch.randn(4, *y.shape, dtype=torch.float64)
        one_by_one = [torch.autograd.grad(y, inputs, dy, retain_graph=True) for dy in dys]
        in_torch.setattr(torch_backend, "backward", None)
        batched = torch.autograd.grad(y, inputs, dys, is_grads_batched=True)
        for found, expected in zip(batched, zip(*one_by_one, strict=True), strict=True):
            torch.testing.assert_close(found, torch.stack(expected), rtol=1e-12, atol=1e-12)

    def test_a_mode_sees_the_backward(self, in_torch):
        tensors = {name: t.requires_grad_() for name, t in operands().items()}
        expected = step(tensors, after=lambda y: y.sum())[1:]
        y = low_rank_linear(**tensors)
        in_torch.setattr(torch_backend, "backward", None)
        with FlopCounterMode(display=False) as counter:
            y.sum().sin().backward()
        assert counter.get_total_flops() > 0
        for t, grad in zip(tensors.values(), expected, strict=True):
            torch.testing.assert_close(t.grad, grad, rtol=1e-5, atol=1e-5)

    def test_a_profile_has_the_operators_names(self, in_torch):
        def run():
            with torch.profiler.profile(activities=[ProfilerActivity.CPU], acc_events=True) as seen:
                step(tensors)
            events = [event.name for event in seen.events()]
            return [name for name in events if name.startswith("efft_kernels::low_rank_linear")]

        tensors = operands()
        found, expected = on_both_ways(run)
        names = [f"efft_kernels::low_rank_linear_{part}" for part in ("fwd", "bwd")]
        assert found == expected == names


@on_each_backend
def test_compiled_autograd():
    """It can carry what the node remembers."""
    tensors = operands()
    expected = step(tensors)
    with torch._dynamo.compiled_autograd._enable(lambda graph: graph):
        found = step(tensors)
    assert_identical(found, expected)
    torch._dynamo.reset()


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.mark.skipif(not INTERPRETED, reason="runs in Triton's interpreter")
class TestTriton:
    """By test_triton_in_the_interpreter, in a process of its own."""

    @pytest.fixture(autouse=True)
    def _triton(self) -> Iterator[None]:
        with use_backend("triton"):
            yield

    @pytest.mark.parametrize("strategy", ["fused", "split", "merged"])
    @pytest.mark.parametrize("form", FORMS, ids=str)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
    def test_same_bits(self, dtype, form, strategy, python_calls):
        for lead in ((11,), (2, 3), (0,)):
            tensors = operands(lead, **form, dtype=dtype)
            found, expected = on_both_ways(lambda t=tensors: step(t, strategy=strategy))
            assert_identical(found, expected)
        assert len(python_calls) == 3

    @pytest.mark.parametrize("wanted", [(n,) for n in NAMES] + [FACTORS, ("x", "up")], ids=str)
    def test_same_gradients_of_any_subset(self, wanted):
        tensors = operands()
        found, expected = on_both_ways(lambda: step(tensors, wanted))
        assert_identical(found, expected)
        for name, grad in zip(NAMES, found[1:], strict=True):
            assert (grad is not None) == (name in wanted)

    @pytest.mark.parametrize("use_reentrant", [True, False])
    def test_checkpointing_under_autocast(self, use_reentrant):
        tensors = operands((4, 3))

        def run():
            leaves = [t.clone().requires_grad_() for t in tensors.values()]
            with torch.autocast("cpu", torch.float16):
                y = checkpoint(low_rank_linear, *leaves, use_reentrant=use_reentrant)
            y.float().sin().sum().backward()
            return [y.detach(), *(t.grad for t in leaves)]

        assert_identical(*on_both_ways(run))

    def test_second_derivatives_and_a_vmap(self):
        tensors = operands()
        inputs = [t.requires_grad_() for t in tensors.values()]

        def run():
            y = low_rank_linear(**tensors)
            first = torch.autograd.grad(y.tanh().sum(), inputs, create_graph=True)
            second = torch.autograd.grad(sum(g.pow(2).sum() for g in first), inputs)
            y = low_rank_linear(**tensors)
            dys = torch.ones(2, *y.shape)
            return [*second, *torch.autograd.grad(y, inputs, dys, is_grads_batched=True)]

        for found, expected in zip(*on_both_ways(run), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.skipif(INTERPRETED, reason="is itself")
def test_triton_in_the_interpreter():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("PYTEST_XDIST_WORKER", None)
    options = ("-q", "--no-header", "--tb=short", "-W", "ignore", "-p", "no:cacheprovider")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *options, "-p", "no:xdist", f"{__file__}::TestTriton"],
        env=environment,
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
    )
    if run.returncode:
        pytest.fail(f"{run.stdout}\n{run.stderr}", pytrace=False)
    assert " passed" in run.stdout and "skipped" not in run.stdout, run.stdout


@pytest.fixture
def decisions(monkeypatch):
    """Every question that the entry point puts to Python: (problem's M, asked, answer)."""
    seen = []
    real = eager_entry._decide

    def decide(x, weight, down, core, up, rows, training, asked):
        answer = real(x, weight, down, core, up, rows, training, asked)
        seen.append((rows, training, answer))
        return answer

    monkeypatch.setattr(eager_entry, "_decide", decide)
    eager_entry.forget_choices()
    yield seen
    cost_model._measured.clear()
    cost_model.choose.cache_clear()
    eager_entry.forget_choices()


class TestRememberedChoices:
    def test_asked_once_per_kind_of_call(self, decisions):
        for _ in range(3):
            low_rank_linear(**operands())
            step(operands())
            low_rank_linear(**operands((2, 3)))
            step(operands(), wanted=("x",))  # P is not saved: the forward without training
            low_rank_linear(**operands(dtype=torch.float64))
            low_rank_linear(**operands(dtype=torch.float16))
        asked = [(rows, training) for rows, training, _ in decisions]
        assert asked == [(11, False), (11, True), (6, False), (11, False), (11, False)]
        *native_ones, (_, _, in_python) = decisions
        assert all(isinstance(part, int) for _, _, answer in native_ones for part in answer)
        assert all(map(callable, in_python)), "torch takes float16"

    def test_forgotten_when_told(self, decisions):
        for _ in range(2):
            low_rank_linear(**operands())
            eager_entry.forget_choices()
        assert len(decisions) == 2

    def test_strategy_by_name_is_kept_apart(self, decisions):
        """One kind of call for each name asked for; the answers differ."""
        for strategy in ("split", "merged", "split", "merged"):
            low_rank_linear(**operands(), strategy=strategy)
            low_rank_linear(**operands(), strategy=strategy, backend="cpp")
        codes = [answer[0] for _, _, answer in decisions]
        assert codes == [
            cpp_backend.STRATEGY_CODES[name] for name in ("split", "split", "merged", "merged")
        ]

    def test_measurements_take_effect(self, decisions):
        tensors = operands()
        low_rank_linear(**tensors)
        (_, _, predicted), = decisions  # fmt: skip
        other = "merged" if predicted[0] == cpp_backend.STRATEGY_CODES["split"] else "split"
        common = {
            "backend": "cpp", "backward": False, "compute_bytes": 4, "weight_bytes": 4,
            "M": 11, "K": 7, "N": 15, "rank": 3,
        }  # fmt: skip
        cost_model.add_measured(
            common | {"strategy": strategy, "ms_p50": 1.0 if strategy == other else 2.0}
            for strategy in cpp_backend.STRATEGIES
        )
        low_rank_linear(**tensors)
        assert len(decisions) == 2
        assert decisions[1][2] == (cpp_backend.STRATEGY_CODES[other], predicted[1])

    def test_refusals_are_not_remembered(self, decisions):
        for _ in range(2):
            with pytest.raises(RuntimeError, match="'cpp' was asked for but cannot take x: dtype"):
                low_rank_linear(**operands(dtype=torch.float16), backend="cpp")
        assert decisions == []

    def test_two_backends_for_one_call_are_left_to_python(
        self, decisions, python_calls, monkeypatch
    ):
        monkeypatch.setattr(cpp_backend, "preferred", lambda problem: not problem.backward)
        tensors = operands()
        for _ in range(2):  # asked for, then remembered
            found, expected = on_both_ways(lambda: step(tensors))
            assert_identical(found, expected)
        assert [answer for _, _, answer in decisions] == [None] and len(python_calls) == 4

    def test_what_the_native_kernels_cannot_reach_is_called_in_python(
        self, decisions, python_calls, monkeypatch
    ):
        called = []
        monkeypatch.setattr(cpp_backend, "out_of_reach", lambda problem: True)
        for name in ("forward", "backward"):
            real = getattr(cpp_backend, name)
            monkeypatch.setattr(
                cpp_backend,
                name,
                lambda *a, real=real, name=name, **k: called.append(name) or real(*a, **k),
            )
        found, expected = on_both_ways(lambda: step(operands()))
        assert called == ["forward", "backward"] * 2 and len(python_calls) == 1
        torch.testing.assert_close([t.shape for t in found], [t.shape for t in expected])
        assert all(map(callable, decisions[0][2]))

    def test_more_kinds_of_call_than_are_kept(self, decisions):
        t = operands((1,), k=2)
        for rows in range(4200):
            low_rank_linear(**(t | {"x": torch.ones(2).expand(rows, 2)}))
        found, expected = on_both_ways(lambda: low_rank_linear(**t))
        assert torch.equal(found, expected) and len(decisions) >= 4200


@pytest.fixture
def torch_calls(monkeypatch) -> list[str]:
    """The strategy of every forward of the torch backend."""
    seen = []
    real = torch_backend.forward

    def forward(*args, strategy, **kwargs):
        seen.append(strategy)
        return real(*args, strategy=strategy, **kwargs)

    monkeypatch.setattr(torch_backend, "forward", forward)
    return seen


class TestChoiceOfBackend:
    def test_by_name(self, python_calls, torch_calls):
        tensors = operands()
        for backend in ("auto", "cpp"):
            low_rank_linear(**tensors, backend=backend)
        assert torch_calls == []
        for strategy in torch_backend.STRATEGIES:
            low_rank_linear(**tensors, backend="torch", strategy=strategy)
        assert torch_calls == list(torch_backend.STRATEGIES) and python_calls == []

    def test_by_dtype(self, python_calls, torch_calls):
        """float16 on the CPU is the torch backend's."""
        tensors = operands(dtype=torch.float16)
        for count in (1, 2):  # asked for, then remembered
            assert low_rank_linear(**tensors).dtype == torch.float16
            assert len(torch_calls) == count
        assert python_calls == []

    def test_by_context(self, python_calls, torch_calls):
        tensors = operands()
        with use_backend("torch"):
            low_rank_linear(**tensors)
            assert len(torch_calls) == 1
            low_rank_linear(**tensors, backend="cpp")
            with use_backend("auto"):
                low_rank_linear(**tensors)
            with use_backend("cpp"):
                low_rank_linear(**tensors)
            assert len(torch_calls) == 1
            low_rank_linear(**tensors)
        assert len(torch_calls) == 2
        low_rank_linear(**tensors)
        assert len(torch_calls) == 2 and python_calls == []

    def test_by_environment(self, python_calls, torch_calls, monkeypatch):
        tensors = operands()
        for name, calls in (("torch", (1, 0)), ("cpp", (0, 0)), ("reference", (0, 1))):
            monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, name)
            low_rank_linear(**tensors)
            assert (len(torch_calls), len(python_calls)) == calls, name
            torch_calls.clear()
            python_calls.clear()
        monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, "cpp")
        with pytest.raises(RuntimeError, match="'cpp' was asked for but cannot take x"):
            low_rank_linear(**operands(dtype=torch.float16))
        monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, "fortran")
        with pytest.raises(ValueError, match="EFFT_KERNELS_BACKEND must be 'auto' or one of"):
            low_rank_linear(**tensors)


def test_the_routes_of_the_other_files_are_what_they_say(route, monkeypatch, python_calls):
    """`entry-point` reaches no Python, `python` the backend cpp by the long way, `torch` that
    backend by the entry point.
    """
    seen = []
    for name, module in (("cpp", cpp_backend), ("torch", torch_backend)):

        def forward(*args, real=module.forward, name=name, **kwargs):
            seen.append(name)
            return real(*args, **kwargs)

        monkeypatch.setattr(module, "forward", forward)
    low_rank_linear(**operands())
    expected = {"entry-point": [], "python": ["cpp"], "torch": ["torch"]}[route]
    assert seen == expected and len(python_calls) == (route == "python")
