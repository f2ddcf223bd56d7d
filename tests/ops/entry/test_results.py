"""The C++ entry point and the long way give the same bits: values, any subset of gradients, without
gradients, and from several threads."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from efft_kernels import low_rank_linear, reference
from efft_kernels.ops import eager_entry
from efft_kernels.ops.backends import cpp_backend

from .both_ways import (
    FACTORS,
    FORMS,
    NAMES,
    assert_identical,
    on_both_ways,
    on_each_backend,
    operands,
    step,
)


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


@on_each_backend
def test_gradients_of_some_inputs_alone():
    tensors = {name: t.requires_grad_() for name, t in operands().items()}

    def run():
        y = low_rank_linear(**tensors).sin().sum()
        return torch.autograd.grad(y, [tensors["x"], tensors["up"]])

    found, expected = on_both_ways(run)
    assert_identical(found, expected)


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
        assert (a - b).abs().max() <= 2e-5 * b.abs().max()  # of sums in which single terms cancel


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
