"""Backends in Python, called from C++: exceptions, references, threads, arguments and results."""

from __future__ import annotations

import gc
import sys
import threading
import traceback
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity
from torch.utils.flop_counter import FlopCounterMode

from efft_kernels import low_rank_linear, use_backend
from efft_kernels.ops import eager_entry
from efft_kernels.ops.backends import torch_backend

from .both_ways import (
    FACTORS,
    FORMS,
    NAMES,
    assert_identical,
    on_both_ways,
    operands,
    step,
)

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
        after = counted()
        # What earlier tests left behind may be collected meanwhile.
        assert after[0] <= before[0] and after[1:] == before[1:]
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
