"""Who takes a call: the C++ entry point, or functional.py and dispatch.py in its place."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from efft_kernels import low_rank_linear, reference, use_backend
from efft_kernels.ops import dispatch
from efft_kernels.ops.backends import cpp_backend, native_library, torch_backend

from .both_ways import (
    NAMES,
    assert_identical,
    on_both_ways,
    on_each_backend,
    operands,
    step,
)

FWD = torch.ops.efft_kernels.low_rank_linear_fwd.default


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

    def test_a_trace_needs_no_package_but_torch(self, python_calls):
        x, *others = operands().values()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            traced = torch.jit.trace(lambda x: low_rank_linear(x, *others), (x,))
        kinds = {n.kind() for n in traced.graph.nodes()}
        assert "aten::linear" in kinds and not any("efft_kernels" in kind for kind in kinds)
        assert len(python_calls) >= 1
        other = torch.randn(5, 7)
        torch.testing.assert_close(traced(other), low_rank_linear(other, *others))

    def test_compiled_graphs_hold_the_operator(self):
        torch._dynamo.reset()
        tensors = {name: t.requires_grad_() for name, t in operands().items()}
        expected = step(tensors)
        compiled = torch.compile(low_rank_linear, fullgraph=True, backend="aot_eager")
        y = compiled(**tensors)
        y.sin().sum().backward()
        assert_identical([y.detach(), *(t.grad for t in tensors.values())], expected)
        torch._dynamo.reset()


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
