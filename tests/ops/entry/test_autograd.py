"""The C++ autograd node: what it saves and releases, hooks, checkpointing, second derivatives."""

from __future__ import annotations

import gc
import warnings
import weakref
from contextlib import nullcontext

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from efft_kernels import low_rank_linear

from .both_ways import (
    FACTORS,
    FORMS,
    NAMES,
    assert_identical,
    on_both_ways,
    on_each_backend,
    operands,
    refusal,
    step,
)


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
def test_compiled_autograd():
    """It can carry what the node remembers."""
    tensors = operands()
    expected = step(tensors)
    with torch._dynamo.compiled_autograd._enable(lambda graph: graph):
        found = step(tensors)
    assert_identical(found, expected)
    torch._dynamo.reset()
