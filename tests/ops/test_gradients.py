"""First and second derivatives by finite differences, torch.func, and activation checkpointing, by
every route on the CPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

from efft_kernels import low_rank_linear, reference
from efft_kernels.ops.backends import torch_backend
from efft_kernels.testing.operands import NAMES, Shape, forms, leaves, operands

pytestmark = pytest.mark.usefixtures("route")

STRATEGIES = torch_backend.STRATEGIES
SHAPE = Shape(M=3, K=5, n=2, Ra=3, Rb=2)
FORMS = forms(SHAPE)


def function_of(tensors, names, function=low_rank_linear, **options):
    """(function of the named tensors alone, those tensors as leaves)."""
    inputs = tuple(tensors[name].clone().requires_grad_() for name in names)
    return (
        lambda *given: function(**(tensors | dict(zip(names, given, strict=True))), **options),
        inputs,
    )


def present(tensors):
    return [name for name, t in tensors.items() if t is not None]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("form", FORMS)
def test_gradcheck_all_arguments(form, strategy):
    tensors = operands(FORMS[form])
    assert gradcheck(*function_of(tensors, present(tensors), strategy=strategy))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", NAMES)
def test_gradcheck_one_argument(name, strategy):
    assert gradcheck(*function_of(operands(SHAPE), [name], strategy=strategy))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("form", FORMS)
def test_gradgradcheck_all_arguments(form, strategy):
    tensors = operands(replace(FORMS[form], M=2, K=3))
    function, inputs = function_of(tensors, present(tensors), strategy=strategy)
    assert gradgradcheck(function, inputs)


@pytest.mark.parametrize(
    "names", [("x",), ("x", "weight"), ("x", "down"), ("weight", "up"), ("x", "down", "up")]
)
def test_gradgradcheck_some_arguments(names):
    assert gradgradcheck(*function_of(operands(replace(SHAPE, M=2, K=3)), names))


@pytest.mark.parametrize("names", [("x", "core"), ("x", "up"), ("core", "up")])
def test_second_derivative_without_x_is_refused(names):
    """x is not saved where no first derivative needs it; the message says how to have it saved."""
    function, inputs = function_of(operands(SHAPE), names)
    y = function(*inputs)
    first = torch.autograd.grad(y.sum(), inputs, retain_graph=True)
    assert all(grad is not None for grad in first)
    with pytest.raises(RuntimeError, match=r"second derivative needs x.*down\.requires_grad_\(\)"):
        torch.autograd.grad(y.pow(2).sum(), inputs, create_graph=True)


def test_create_graph_gives_the_same_first_gradients():
    tensors = operands(SHAPE)
    function, inputs = function_of(tensors, NAMES)
    y = function(*inputs)
    plain = torch.autograd.grad(y.pow(2).sum(), inputs, retain_graph=True)
    graph = torch.autograd.grad(y.pow(2).sum(), inputs, create_graph=True)
    for a, b in zip(plain, graph, strict=True):
        assert not a.requires_grad and b.requires_grad
        torch.testing.assert_close(a, b.detach(), rtol=1e-13, atol=1e-13)


def test_gradient_penalty_matches_the_reference():
    tensors = operands(SHAPE)
    results = []
    for used in (low_rank_linear, reference.low_rank_linear):
        function, inputs = function_of(tensors, NAMES, used)
        (dx,) = torch.autograd.grad(function(*inputs).tanh().sum(), inputs[:1], create_graph=True)
        results.append(
            torch.autograd.grad(dx.pow(2).sum(), inputs, allow_unused=True, materialize_grads=True)
        )
    assert all(grad.norm() > 0 for grad in results[1])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


class TestFunc:
    """torch.func, against torch.autograd on the specification."""

    @pytest.mark.parametrize("form", FORMS)
    def test_grad(self, form):
        tensors = operands(FORMS[form])
        names = present(tensors)
        function, inputs = function_of(tensors, names)
        argnums = tuple(range(len(names)))
        found = torch.func.grad(lambda *t: function(*t).sin().sum(), argnums)(*inputs)
        judge, judged = function_of(tensors, names, reference.low_rank_linear)
        expected = torch.autograd.grad(judge(*judged).sin().sum(), judged)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("name", NAMES)
    def test_vmap(self, name):
        tensors = operands(SHAPE)
        many = torch.randn(4, *tensors[name].shape, dtype=torch.float64)
        found = torch.func.vmap(lambda t: low_rank_linear(**(tensors | {name: t})))(many)
        expected = torch.stack([low_rank_linear(**(tensors | {name: t})) for t in many])
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)

    def test_per_sample_gradients(self):
        tensors = operands(replace(SHAPE, M=4))

        def loss(factors, row):
            return low_rank_linear(**(tensors | factors | {"x": row})).pow(2).sum()

        factors = {name: tensors[name] for name in ("down", "core", "up")}
        found = torch.func.vmap(torch.func.grad(loss), (None, 0))(factors, tensors["x"])
        for i, row in enumerate(tensors["x"]):
            copies = leaves(factors)
            loss(copies, row).backward()
            for name, leaf in copies.items():
                torch.testing.assert_close(found[name][i], leaf.grad, rtol=1e-12, atol=1e-12)

    def test_jvp(self):
        tensors = operands(SHAPE)
        function, inputs = function_of(tensors, NAMES)
        tangents = tuple(torch.randn_like(t) for t in inputs)
        _, found = torch.func.jvp(function, inputs, tangents)
        step = 1e-6
        ahead, behind = (
            function(*(t + sign * step * d for t, d in zip(inputs, tangents, strict=True)))
            for sign in (1, -1)
        )
        torch.testing.assert_close(found, (ahead - behind) / (2 * step), rtol=1e-6, atol=1e-6)

    def test_hessian(self):
        tensors = operands(replace(SHAPE, M=2, K=3))

        def loss(down):
            return low_rank_linear(**(tensors | {"down": down})).sin().sum()

        found = torch.func.hessian(loss)(tensors["down"])
        expected = torch.autograd.functional.hessian(
            lambda down: reference.low_rank_linear(**(tensors | {"down": down})).sin().sum(),
            tensors["down"],
        )
        assert expected.norm() > 0
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("grad_elsewhere", [False, True])
def test_forward_mode(grad_elsewhere):
    """A dual tensor outside torch.func, with gradients wanted and without."""
    tensors = operands(SHAPE)
    tangent = torch.randn_like(tensors["x"])
    tensors["down"].requires_grad_(grad_elsewhere)
    with forward_ad.dual_level():
        expected = forward_ad.unpack_dual(
            reference.low_rank_linear(
                **(tensors | {"x": forward_ad.make_dual(tensors["x"], tangent)})
            )
        ).tangent
        y = low_rank_linear(**(tensors | {"x": forward_ad.make_dual(tensors["x"], tangent)}))
        found = forward_ad.unpack_dual(y).tangent
    assert found is not None
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_checkpointing_changes_nothing(strategy, use_reentrant, dropout):
    """Recomputation draws the same factor masks, so the gradients are the same."""
    tensors = operands(replace(SHAPE, M=11))

    def block(x, weight, bias, down, core, up):
        down, core, up = (torch.nn.functional.dropout(t, dropout) for t in (down, core, up))
        return low_rank_linear(x, weight, bias, down, core, up, strategy=strategy).tanh()

    results = []
    for checkpointed in (False, True):
        torch.manual_seed(5)
        copies = leaves(tensors).values()
        if checkpointed:
            y = checkpoint(block, *copies, use_reentrant=use_reentrant)
        else:
            y = block(*copies)
        torch.randn(17)  # the generator moves on between the passes
        y.pow(2).sum().backward()
        results.append([y.detach(), *(t.grad for t in copies)])
    assert all(t.norm() > 0 for t in results[0])
    for plain, recomputed in zip(*results, strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_gradients_accumulate_over_uses(strategy):
    """One set of factors used by two layers: autograd adds their gradients."""
    tensors = operands(replace(SHAPE, M=11, K=6))
    results = []
    for function in (low_rank_linear, reference.low_rank_linear):
        options = {"strategy": strategy} if function is low_rank_linear else {}
        copies = leaves(tensors)
        y = function(**copies, **options)
        function(**(copies | {"x": y}), **options).sum().backward()
        results.append([t.grad for t in copies.values()])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
