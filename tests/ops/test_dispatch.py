"""Choosing a backend and a strategy, and being told why not; opcheck of the two operators."""

from __future__ import annotations

import contextlib
import math
from dataclasses import replace

import pytest
import torch
from torch.autograd import forward_ad

from efft_kernels import available_backends, low_rank_linear, reference, use_backend
from efft_kernels.ops import checks, dispatch
from efft_kernels.ops.backends import (
    Backend,
    cpp_backend,
    cuda_backend,
    native_library,
    torch_backend,
    triton,
)
from efft_kernels.ops.cost_model import Problem
from efft_kernels.testing.operands import NAMES, Shape, cast, forms, operands, operands_and_dy
from efft_kernels.testing.results import backend_results

SHAPE = Shape(M=5, K=7, n=5, Ra=3, Rb=2)
MODULES = (torch_backend, cpp_backend, triton, cuda_backend)
BACKENDS = {"reference", "torch", "cpp", "triton", "cuda"}


@pytest.fixture
def tensors():
    return operands(SHAPE, torch.float32)


@pytest.fixture
def calls(monkeypatch, no_entry_point):
    """(backend, strategy) of every forward, in order."""
    seen = []
    real_reference = reference.low_rank_linear

    def recording(name, real):
        def forward(*args, strategy, **kwargs):
            seen.append((name, strategy))
            return real(*args, strategy=strategy, **kwargs)

        return forward

    def of_reference(*args, **kwargs):
        seen.append(("reference", None))
        return real_reference(*args, **kwargs)

    for name, backend in (("torch", torch_backend), ("cpp", cpp_backend)):
        monkeypatch.setattr(backend, "forward", recording(name, backend.forward))
    monkeypatch.setattr(reference, "low_rank_linear", of_reference)
    return seen


def missing_backends():
    return [name for name, reason in available_backends().items() if reason is not None]


def test_available_backends():
    found = available_backends()
    assert set(found) == BACKENDS
    assert found["reference"] is None and found["torch"] is None
    for name in ("cpp", "cuda"):
        assert found[name] is None or len(found[name]) > 20


def test_returned_table_is_the_callers():
    available_backends().clear()
    assert set(available_backends()) == BACKENDS


@pytest.mark.parametrize("grad", [False, True])
def test_missing_backend_is_an_error_with_its_reason(tensors, grad, monkeypatch):
    missing = missing_backends()
    assert "cuda" in missing or torch.cuda.is_available()
    tensors["down"].requires_grad_(grad)
    for name in missing:
        reason = available_backends()[name]
        message = f"backend {name!r} was asked for but cannot run here: {reason}"
        with pytest.raises(RuntimeError) as error:
            low_rank_linear(**tensors, backend=name)
        assert message in str(error.value)
        with pytest.raises(RuntimeError) as error, use_backend(name):
            pytest.fail("the context must not be entered")
        assert message in str(error.value)
        monkeypatch.setenv("EFFT_KERNELS_BACKEND", name)
        with pytest.raises(RuntimeError) as error:
            low_rank_linear(**tensors)
        assert message in str(error.value)
        monkeypatch.delenv("EFFT_KERNELS_BACKEND")


def test_reason_is_looked_up_once(tensors, monkeypatch):
    """A probe that has answered is not asked again in every step."""
    low_rank_linear(**tensors)
    monkeypatch.setattr(torch_backend, "unavailable", lambda: pytest.fail("asked again"))
    low_rank_linear(**tensors)


@pytest.mark.parametrize("name", ["tritton", "", "Torch", "CPU"])
def test_unknown_backend(tensors, name, monkeypatch):
    with pytest.raises(ValueError) as error:
        low_rank_linear(**tensors, backend=name)
    assert "backend must be 'auto' or one of" in str(error.value) and repr(name) in str(error.value)
    with pytest.raises(ValueError, match="name must be 'auto' or one of"), use_backend(name):
        pass
    monkeypatch.setenv("EFFT_KERNELS_BACKEND", name)
    with pytest.raises(ValueError) as error:
        low_rank_linear(**tensors)
    assert "EFFT_KERNELS_BACKEND must be 'auto' or one of" in str(error.value)
    assert repr(name) in str(error.value)


def test_argument_before_context_before_environment(tensors, calls, default_backend, monkeypatch):
    low_rank_linear(**tensors)
    assert calls.pop()[0] == default_backend
    monkeypatch.setenv("EFFT_KERNELS_BACKEND", "reference")
    low_rank_linear(**tensors)
    assert calls.pop()[0] == "reference"
    with use_backend("torch"):
        low_rank_linear(**tensors)
        assert calls.pop()[0] == "torch"
        low_rank_linear(**tensors, backend="reference")
        assert calls.pop()[0] == "reference"
    low_rank_linear(**tensors, backend="torch")
    assert calls.pop()[0] == "torch"


def test_contexts_nest_and_end(tensors, calls, default_backend):
    def chosen():
        low_rank_linear(**tensors)
        return calls.pop()[0]

    with use_backend("reference"):
        with use_backend("torch"):
            with use_backend("auto"):
                assert chosen() == default_backend
            assert chosen() == "torch"
        assert chosen() == "reference"
        with pytest.raises(KeyError), use_backend("torch"):
            raise KeyError
        assert chosen() == "reference"
        with pytest.raises(ValueError), use_backend("nonsense"):
            pass
        assert chosen() == "reference"
        with use_backend("auto"):
            assert chosen() == default_backend
    assert chosen() == default_backend


def test_reference_backend_equals_torch(tensors):
    tensors = {name: t.double().requires_grad_() for name, t in tensors.items()}
    grads = []
    for backend in ("reference", "torch"):
        y = low_rank_linear(**tensors, backend=backend)
        grads.append([y, *torch.autograd.grad(y.sin().sum(), list(tensors.values()))])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_what_the_cost_model_is_asked(tensors, monkeypatch, no_entry_point):
    """The forward trains where P is saved for it, and a backward always does."""
    asked = []
    real = dispatch.select

    def select(backend, strategy, problem, x):
        asked.append((problem.training, problem.backward))
        return real(backend, strategy, problem, x)

    monkeypatch.setattr(dispatch, "select", select)
    for name, saves_p in (("x", False), ("up", True)):
        tensors[name].requires_grad_()
        low_rank_linear(**tensors).sum().backward()
        assert asked == [(saves_p, False), (True, True)]
        asked.clear()


def test_explicit_strategy_runs(tensors, calls):
    for strategy in torch_backend.STRATEGIES:
        low_rank_linear(**tensors, backend="torch", strategy=strategy)
        assert calls.pop() == ("torch", strategy)


def test_strategy_that_the_backend_lacks(tensors):
    with pytest.raises(ValueError) as error:
        low_rank_linear(**tensors, backend="torch", strategy="fused")
    message = str(error.value)
    assert "strategy must be one of" in message
    assert all(text in message for text in ("'split'", "'merged'", "'torch'", "'fused'"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("m", [1, 5, 5000])
def test_torch_never_merges_into_half_precision_weights(tensors, dtype, m, calls):
    """An increment below half an ulp of W0 would vanish."""
    given = cast(tensors, dtype) | {"x": torch.randn(m, 7).to(dtype)}
    given["down"].requires_grad_()
    low_rank_linear(**given, backend="torch")
    assert calls == [("torch", "split")]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("m", [1, 5, 5000])
def test_auto_keeps_an_increment_below_half_an_ulp(dtype, m):
    """What W0 = 1 contributes cancels in x, so y is the increment alone."""
    eps = torch.finfo(dtype).eps / 8
    y = low_rank_linear(
        torch.tensor([[1.0, -1.0]], dtype=dtype).expand(m, 2),
        torch.ones(3, 2, dtype=dtype),
        None,
        torch.tensor([[eps], [0.0]], dtype=dtype, requires_grad=True),
        None,
        torch.ones(1, 3, 1, dtype=dtype),
    )
    assert torch.equal(y.detach(), torch.full((m, 3), eps, dtype=dtype))


def test_compiled_backend_refuses_torch_func(tensors, monkeypatch):
    """It has no batching rule; the message names the backend that has."""
    monkeypatch.setattr(dispatch, "requested_backend", lambda backend: "triton")
    with pytest.raises(RuntimeError, match=r"'triton' does not support torch\.func.*'torch'"):
        torch.func.grad(lambda x: low_rank_linear(**(tensors | {"x": x})).sum())(tensors["x"])


def test_a_backend_that_cannot_be_imported_says_why(monkeypatch):
    missing = Backend("cpp", "efft_kernels.ops.there_is_no_such_module")
    monkeypatch.setitem(dispatch.REGISTRY, "cpp", missing)
    dispatch._load.cache_clear()
    try:
        reason = available_backends()["cpp"]
        assert "cannot be imported" in reason and "there_is_no_such_module" in reason
    finally:
        dispatch._load.cache_clear()


def test_a_backend_is_called_without_autocast_and_on_xs_device(monkeypatch):
    entered = []

    @contextlib.contextmanager
    def device(index):
        entered.append(index)
        yield

    cpu, first, second = map(torch.device, ("cpu", "cuda:0", "cuda:1"))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", device)
    for context in (dispatch.launch_context, checks.without_autocast):
        with torch.autocast("cpu", torch.bfloat16):
            with context(cpu):
                assert not torch.is_autocast_enabled("cpu")
            assert torch.is_autocast_enabled("cpu")
        with context(cpu):
            assert not torch.is_autocast_enabled("cpu")
    for where in (cpu, first):
        with dispatch.launch_context(where):
            assert not entered
    with dispatch.launch_context(second):
        assert entered == [second]


def test_forward_mode_is_for_torch():
    def chosen(backend, *operands):
        return dispatch.without_tangents(backend, operands)

    x = torch.ones(2)
    assert chosen("cpp", x) == "cpp"
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, x)
        assert dispatch.has_tangent(dual) is True and dispatch.has_tangent(x) is False
        assert [chosen(backend, x, None) for backend in ("auto", "cpp")] == ["auto", "cpp"]
        assert [chosen(backend, None, x, dual) for backend in ("auto", "torch")] == ["torch"] * 2
        with pytest.raises(RuntimeError, match="'cpp' does not support forward-mode"):
            chosen("cpp", x, dual)
    seen = []
    torch.func.vmap(lambda x: seen.append(dispatch.has_tangent(x)) or x)(x)
    assert seen == [True]


def test_which_backends_are_operators_of_csrc():
    native = {backend.NAME: backend.NATIVE for backend in MODULES}
    assert native == {"torch": False, "cpp": True, "triton": False, "cuda": True}
    problem = Problem(5, 7, 6, 1, 16, True, 4, 4, "cpu")
    assert torch_backend.out_of_reach(problem._replace(rank=4096, N=0)) is False
    assert torch_backend.preferred(problem) and triton.preferred(problem)
    assert cuda_backend.preferred(problem)


@pytest.mark.parametrize("backend", MODULES[1:], ids=lambda backend: backend.NAME)
def test_nothing_to_multiply_is_out_of_reach(backend):
    problem = Problem(5, 7, 6, 1, 128, True, 4, 2, "cpu")
    found = [
        backend.out_of_reach(problem._replace(**{name: size}))
        for name, size in (("M", 0), ("N", 1), ("K", 1), ("N", 0), ("K", 0))
    ]
    assert found == [False, False, False, True, True]


@pytest.mark.skipif(bool(native_library.not_built("_native")), reason="not built")
@pytest.mark.parametrize(
    ("sizes", "in_torch"),
    [({"n": 0}, True), ({"K": 0}, True), ({"n": 1, "K": 1, "G": 1}, False)],
    ids=str,
)
def test_nothing_to_multiply_runs_in_torch(sizes, in_torch, monkeypatch):
    assert native_library.load_cpu() is None
    ran = []
    for name in ("forward", "backward"):
        real = getattr(torch_backend, name)
        monkeypatch.setattr(
            torch_backend,
            name,
            lambda *args, real=real, name=name, **kwargs: (
                ran.append((name, kwargs["strategy"])) or real(*args, **kwargs)
            ),
        )
    *tensors, dy = operands_and_dy(replace(SHAPE, **sizes), torch.float32, density=1)
    results = backend_results(cpp_backend, (*tensors, dy), "merged")
    for name, tensor in zip(("y", *NAMES), (dy, *tensors), strict=True):
        assert results[name].shape == tensor.shape
    assert ran == ([("forward", "split"), ("backward", "split")] if in_torch else [])


FWD = torch.ops.efft_kernels.low_rank_linear_fwd.default
BWD = torch.ops.efft_kernels.low_rank_linear_bwd.default

# (form, x dtype, factor dtype)
OPCHECKS = [
    ("shared up", torch.float32, torch.float32),
    ("one slice", torch.float64, torch.float64),
    ("no core", torch.bfloat16, torch.float32),
    ("own up", torch.float32, torch.float32),
]


def opcheck_operands(form, x_dtype, factor_dtype, m):
    shape = forms(SHAPE)[form]
    return tuple(operands(shape, x_dtype, factor_dtype=factor_dtype, lead=(m,)).values())


@pytest.mark.parametrize("m", [11, 0])
@pytest.mark.parametrize(("strategy", "save_p"), [("split", True), ("merged", False)])
@pytest.mark.parametrize("case", OPCHECKS, ids=str)
def test_opcheck_forward(case, strategy, save_p, m):
    torch.library.opcheck(FWD, (*opcheck_operands(*case, m=m), save_p, "auto", strategy))


@pytest.mark.parametrize("m", [11, 0])
@pytest.mark.parametrize(
    ("strategy", "needs"),
    [("split", "x weight bias down core up"), ("merged", "x core"), ("auto", "up")],
)
@pytest.mark.parametrize("case", OPCHECKS, ids=str)
def test_opcheck_backward(case, strategy, needs, m):
    given = opcheck_operands(*case, m=m)
    x, weight, _, down, core, up = given
    wanted = [
        name in needs.split() and tensor is not None
        for name, tensor in zip(NAMES, given, strict=True)
    ]
    dy = torch.randn(m, weight.shape[0]).to(x.dtype)
    p = (x.to(down.dtype) @ down).to(x.dtype)
    torch.library.opcheck(BWD, (dy, x, weight, p, down, core, up, wanted, "auto", strategy))


def test_operators_do_not_alias_their_inputs():
    tensors = opcheck_operands(*OPCHECKS[0], m=1)
    storages = {t.untyped_storage().data_ptr() for t in tensors}
    x, weight, _, *factors = tensors
    dy, p = torch.ones(1, 15), torch.ones(1, 3)
    outputs = [
        *FWD(*tensors, True, "auto", "split"),
        *BWD(dy, x, weight, p, *factors, [True] * 6, "auto", "split"),
    ]
    found = [t.untyped_storage().data_ptr() for t in outputs]
    assert len(set(found)) == len(found) and not storages & set(found)
    assert all(math.isfinite(t.sum()) for t in outputs)
