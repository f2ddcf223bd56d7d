"""Factors made once in a model's forward, against the model whose linears make their own."""

from __future__ import annotations

import copy
import gc
import itertools
import pickle
import threading
import types
import weakref

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._guards import TracingContext, tracing
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from efft_kernels import EFFT1, EFFT2, Adapter, FacTTK, FacTTT, KAdaptation, LoRA, attach
from efft_kernels import nn as efft_nn
from efft_kernels.methods import Factors, joint
from efft_kernels.methods.joint import keep_graph
from efft_kernels.methods.tensor_train import TensorTrainGroup, _products

METHODS = [
    EFFT1(rank=3, dropout=0.0, scale=0.7),
    EFFT2(rank=(3, 2), dropout=0.0, scale=0.7, learn_scale=True),
    EFFT2(rank=3, ffn_rank=2, dropout=0.0, scale=1.0),
    EFFT2(rank=2, dropout=0.0, scale=0.7, cores="shared"),
    FacTTT(rank=(2, 3), dropout=0.0, scale=0.7),
    FacTTK(rank=3, layer_rank=4, dropout=0.0, learn_scale=True),
]
EFFT = EFFT2(rank=3, dropout=0.0, scale=0.7)
EFFT_4 = EFFT2(rank=4, dropout=0.0, scale=0.7)
NOISY = EFFT2(rank=3, dropout=0.5, scale=0.7)


def stop_sharing(model):
    """The model's linears make their own factors from here on."""
    model.factor_bank.unwatch(model)
    assert not model._forward_hooks and not model._forward_pre_hooks
    assert not model._forward_hooks_always_called
    return model


@pytest.fixture
def models(make_vit, randomize):
    """(a model, its twin whose linears make their own factors), in float64."""

    def make(method=EFFT, depth=2):
        model = make_vit(dtype=torch.float64, depth=depth)
        randomize(attach(model, method))
        return model, stop_sharing(copy.deepcopy(model))

    return make


@pytest.fixture
def made(monkeypatch):
    """How often factors were made: {"joint": calls for a group, "alone": calls for a site}."""
    counts = {"joint": 0, "alone": 0}

    def count(name, kind):
        real = getattr(TensorTrainGroup, name)

        def counting(self, *args):
            counts[kind] += 1
            return real(self, *args)

        monkeypatch.setattr(TensorTrainGroup, name, counting)

    count("joint_products", "joint")
    count("factors", "alone")
    return counts


@pytest.fixture
def images():
    return torch.randn(3, 3, 8, 8, dtype=torch.float64)


IN = EFFT1(rank=3, attention_side="in", dropout=0.0)


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("method", [*METHODS, IN], ids=str)
def test_stacks_are_those_of_the_sites(make_vit, randomize, method, dropout):
    """Of each kind of linear over all blocks, from the group's products as they lie there."""
    model = make_vit(dtype=torch.float64, depth=3)
    adapter = attach(model, method)
    randomize(adapter)
    for kind in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"):
        sites = [f"blocks.{block}.{kind}" for block in range(3)]
        group = adapter.bank.group(sites[0])
        plan = group.stack_plan(sites)
        if method is IN and kind == "attn.qkv":
            assert plan is None  # q, k and v have a projection each
            continue
        products = group.joint_products(dropout)
        down, b = group.stacked(products, plan)
        factors = [group.from_products(products)[site] for site in sites]
        assert torch.equal(down, torch.stack([f.down for f in factors]))
        assert torch.equal(b, torch.stack([f.up.flatten(0, 1) for f in factors]))
        assert group.stack_plan([sites[0], sites[2], sites[1]]) is None
        assert group.stack_plan([sites[0], "blocks.0.other"]) is None


def test_stacks_of_several_kinds(models):
    """None outside a forward; within one, a linear that is called besides draws its own masks."""
    model, _ = models(NOISY)
    bank = model.factor_bank
    shared, kinds = bank.joint_factors, []
    for kind in ("attn.qkv", "mlp.fc1", "attn.proj"):
        sites = tuple(f"blocks.{block}.{kind}" for block in range(2))
        group = bank.group(sites[0])
        kinds.append(joint.Kind(group, type(group), sites, group.stack_plan(sites)))
    assert shared.stacks(kinds, False) is None
    shared.open(model, ())
    for (down, b), kind in zip(shared.stacks(kinds, False), kinds, strict=True):
        for i, site in enumerate(kind.sites):
            factors = shared.get(kind.group, site, False)
            assert torch.equal(down[i], factors.down)
            assert torch.equal(b[i], factors.up.flatten(0, 1))
    ((down, _),) = shared.stacks(kinds[:1], True)
    again = shared.get(kinds[0].group, kinds[0].sites[0], True).down
    assert not torch.equal(down[0], again)
    ((other, _),) = shared.stacks(kinds[:1], True)
    assert not torch.equal(down, other)
    shared.close(model, (), None)


def factors(model):
    return list(model.factor_bank.parameters())


def gradients(model):
    found = [p.grad for p in factors(model)]
    model.zero_grad()
    return found


def close(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert b.norm() > 1e-6
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def is_closed(model):
    return model.factor_bank.joint_factors._now is None


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_is_the_model_whose_linears_make_their_own(models, images, made, method):
    results = []
    for model in models(method):
        x = images.clone().requires_grad_()
        y = model(x).tanh()
        results.append([y, *torch.autograd.grad(y.sum(), [x, *factors(model)])])
    groups = 1 if isinstance(method, EFFT1 | FacTTT | FacTTK) else 2
    assert made == {"joint": groups, "alone": 8}
    close(*results)


@pytest.mark.parametrize("method", METHODS, ids=str)
@sdpa_kernel(SDPBackend.MATH)  # the others have none
def test_second_derivatives(models, images, method):
    results = []
    for model in models(method):
        first = torch.autograd.grad(model(images).tanh().sum(), factors(model), create_graph=True)
        penalty = sum(grad.pow(2).sum() for grad in first)
        results.append(torch.autograd.grad(penalty, factors(model)))
    close(*results)


def test_linears_of_parts_of_a_block(models, images, made, make_vit, randomize):
    """Cores that are not evenly spaced in the group's tensor, and groups of one linear."""
    for targets in (["attn.proj"], ["blocks.0.attn.qkv", "blocks.2.attn.proj", "fc2"]):
        model = make_vit(dtype=torch.float64, depth=3)
        randomize(attach(model, EFFT, targets=targets))
        twin = stop_sharing(copy.deepcopy(model))
        results = []
        for one in (model, twin):
            one(images).tanh().sum().backward()
            results.append(gradients(one))
        close(*results)


@pytest.mark.parametrize("kind", [LoRA(rank=2), KAdaptation(products=2)], ids=lambda m: m.name)
def test_methods_without_shared_factors_are_left_alone(make_vit, kind):
    model = make_vit()
    calls = attach(model, kind).bank.calls
    for hooks in (model._forward_hooks, model._forward_pre_hooks):
        assert [hook.__self__ for hook in hooks.values()] == [calls]


class TestTraining:
    @pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
    @pytest.mark.parametrize("foreach", [True, False])
    def test_optimizer_steps_between_forwards(self, models, images, kind, foreach):
        pair = models()
        for model in pair:
            optimizer = kind(factors(model), lr=0.1, foreach=foreach)
            for _ in range(3):
                model(images).tanh().sum().backward()
                optimizer.step()
                optimizer.zero_grad()
        close(factors(pair[0]), factors(pair[1]))

    def test_two_forwards_and_one_backward(self, models, images):
        results = []
        for model in models():
            (model(images).tanh().sum() + model(2 * images).tanh().sum()).backward()
            results.append(gradients(model))
        close(*results)

    def test_two_forwards_then_two_backwards(self, models, images):
        results = []
        for model in models():
            losses = [model(images).tanh().sum(), model(2 * images).tanh().sum()]
            for loss in losses:
                loss.backward()
            results.append(gradients(model))
        close(*results)

    def test_second_backward_of_a_kept_graph(self, models, images):
        model, _ = models()
        loss = model(images).tanh().sum()
        loss.backward(retain_graph=True)
        once = gradients(model)
        loss.backward()
        close(gradients(model), once)

    def test_losses_of_separate_parts_go_backward_by_themselves(self, models, images):
        """No retain_graph: the parts' graphs have nothing but the factors in common."""
        results = []
        for model in models():
            seen = []

            def cut(block, args, output, seen=seen):
                seen.append(output)
                return output.detach()

            for block in model.blocks:
                block.register_forward_hook(cut)
            model(images)
            for output in seen:
                output.tanh().sum().backward()
            results.append(gradients(model))
        close(*results)

    def test_backward_after_a_change_of_the_factors_is_refused(self, models, images):
        model, _ = models()
        loss = model(images).tanh().sum()
        with torch.no_grad():
            model.factor_bank.mhsa.core.add_(1.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()

    def test_change_within_a_forward(self, models, images):
        results = []
        for model in models():

            def change(block, args, model=model):
                for parameter in factors(model):
                    parameter.mul_(1.5)

            model.blocks[1].register_forward_pre_hook(change)
            with torch.no_grad():
                results.append([model(images)])
        close(*results)

    @pytest.mark.parametrize("frozen", ["U", "V", "core", "all"])
    def test_frozen_factors(self, models, images, monkeypatch, frozen):
        needed = set()
        real = efft_nn.adapted_linear

        def recording(x, weight, bias, down, core, up, **options):
            needed.add((down.requires_grad, up.requires_grad))
            return real(x, weight, bias, down, core, up, **options)

        monkeypatch.setattr(efft_nn, "adapted_linear", recording)
        results = []
        for model in models(EFFT2(rank=3, dropout=0.0), depth=2):
            for name, parameter in model.factor_bank.named_parameters():
                parameter.requires_grad_(frozen != "all" and not name.endswith(frozen))
            model(images).tanh().sum().backward()
            results.append([p.grad for p in factors(model) if p.requires_grad])
            if frozen == "all":
                assert needed == {(False, False)}
            if frozen == "core":
                assert needed == {(True, True)}
        close(*results)

    def test_batched_gradients(self, models, images):
        rows = torch.randn(4, 3, 5, dtype=torch.float64)
        results = []
        for model in models():
            y = model(images)
            results.append(torch.autograd.grad(y, factors(model), rows, is_grads_batched=True))
        close(*results)

    def test_dropout_where_some_linears_are_in_eval(self, models, images, made):
        model, _ = models(NOISY)
        model.train().blocks[0].eval()
        quiet = copy.deepcopy(model).eval()
        seen = []
        for one in (model, quiet):
            one.blocks[0].register_forward_hook(lambda m, args, y: seen.append(y))
            seen.append(one(images))
        assert made == {"joint": 6, "alone": 0}
        assert torch.equal(seen[0], seen[2]) and not torch.allclose(seen[1], seen[3])


class TestDropout:
    def test_masks(self, models):
        """Each linear has masks of its own, which keep half of the entries and double them."""
        model, _ = models(NOISY, depth=40)
        group = model.factor_bank.mhsa
        with torch.no_grad():
            downs = torch.stack([f.down for f in group.joint_factors(True).values()])
        dropped = downs == 0
        assert torch.equal(downs[~dropped], (2 * group.U).expand_as(downs)[~dropped])
        assert 0.45 < dropped.double().mean() < 0.55
        assert dropped.double().mean(0).sub(0.5).abs().max() < 0.25
        assert not torch.equal(dropped[0], dropped[1])

    def test_slices_share_the_mask_of_v(self, models):
        model, _ = models(NOISY)
        group = model.factor_bank.mhsa
        (family,) = group._families
        u, v, core = group._masks(family, 0.5)
        assert list(family.sites.values()) == [3, 1, 3, 1]
        assert u.shape == (4, 12, 3) and v.shape == (8, 12, 3) and core.shape == (8, 3, 3)
        sites = [v[:3], v[3:4], v[4:7], v[7:]]
        assert all(torch.equal(masks, masks[:1].expand_as(masks)) for masks in sites)
        assert not torch.equal(v[0], v[3])

    def test_is_drawn_anew_in_each_forward(self, models, images):
        model, _ = models(NOISY)
        model.train()
        torch.manual_seed(1)
        first, second = model(images), model(images)
        torch.manual_seed(1)
        assert torch.equal(model(images), first)
        assert (first - second).abs().max() > 1e-3

    @pytest.mark.parametrize("method", [NOISY, EFFT1(rank=3, dropout=0.3)], ids=lambda m: m.name)
    def test_gradients_are_those_of_the_masked_forward(self, models, images, method):
        model, _ = models(method)
        model.train()

        def loss():
            torch.manual_seed(2)
            return model(images).tanh().sum()

        for parameter, grad in zip(
            factors(model), torch.autograd.grad(loss(), factors(model)), strict=True
        ):
            direction = torch.randn_like(parameter)
            values = []
            with torch.no_grad():
                for step in (1e-5, -2e-5):
                    parameter.add_(direction, alpha=step)
                    values.append(loss())
                parameter.add_(direction, alpha=1e-5)
            slope = (values[0] - values[1]) / 2e-5
            torch.testing.assert_close((grad * direction).sum(), slope, rtol=1e-5, atol=1e-7)

    @sdpa_kernel(SDPBackend.MATH)
    def test_second_derivatives_repeat_the_masks(self, models, images):
        model, _ = models(NOISY)
        model.train()
        torch.manual_seed(2)
        y = model(images).tanh().sum()
        first = torch.autograd.grad(y, factors(model), create_graph=True)
        for again, grad in zip(
            torch.autograd.grad(y, factors(model), retain_graph=True), first, strict=True
        ):
            torch.testing.assert_close(grad, again, rtol=1e-10, atol=1e-12)


def run_blocks_again(model, which, use_reentrant):
    """Checkpoint the model's blocks of these indices."""
    for i in which:
        block = model.blocks[i]
        block.forward = lambda x, attn_mask=None, inner=block.forward: checkpoint(
            inner, x, use_reentrant=use_reentrant
        )


@pytest.mark.parametrize("use_reentrant", [True, False])
class TestCheckpointing:
    @pytest.mark.parametrize("which", [(0,), (1,), (0, 1, 2)], ids=str)
    def test_of_blocks(self, models, images, which, use_reentrant):
        results = []
        model, twin = models(depth=3)
        run_blocks_again(model, which, use_reentrant)
        for one in (model, twin):
            x = images.clone().requires_grad_()
            one(x).tanh().sum().backward()
            results.append([x.grad, *gradients(one)])
        close(*results)

    def test_of_the_model(self, models, images, made, use_reentrant):
        results = []
        model, twin = models()
        for one in (model, twin):
            x = images.clone().requires_grad_()
            checkpoint(one, x, use_reentrant=use_reentrant).tanh().sum().backward()
            results.append([x.grad, *gradients(one)])
        assert made == {"joint": 4, "alone": 16}  # each runs twice, not more often
        close(*results)

    def test_two_forwards_before_backward(self, models, images, use_reentrant):
        results = []
        model, twin = models()
        run_blocks_again(model, (0,), use_reentrant)
        for one in (model, twin):
            x = images.clone().requires_grad_()
            (one(x).tanh().sum() + one(2 * x).tanh().sum()).backward()
            results.append([x.grad, *gradients(one)])
        close(*results)

    @pytest.mark.parametrize("whole", [True, False])
    def test_repeats_the_masks(self, models, images, monkeypatch, whole, use_reentrant):
        model, _ = models(NOISY, depth=3)
        model.train()
        if not whole:
            run_blocks_again(model, (0, 2), use_reentrant)
        seen = {}
        real = efft_nn.adapted_linear

        def recording(x, weight, bias, down, core, up, **options):
            b = up if core is None else torch.matmul(up, core.mT)
            seen.setdefault(id(weight), []).append((down.detach().clone(), b.detach().clone()))
            return real(x, weight, bias, down, core, up, **options)

        monkeypatch.setattr(efft_nn, "adapted_linear", recording)
        x = images.clone().requires_grad_()
        y = checkpoint(model, x, use_reentrant=use_reentrant) if whole else model(x)
        torch.randn(5)
        y.tanh().sum().backward()
        twice = [calls for calls in seen.values() if len(calls) == 2]
        assert len(twice) >= (12 if whole else 8) - 1  # a segment's last linear need not run again
        for first, again in twice:
            torch.testing.assert_close(first, again, rtol=1e-12, atol=1e-12)

    def test_backward_within_a_forward(self, models, images, use_reentrant):
        """As of a model that returns the gradient of an energy."""

        class Force(nn.Module):
            def __init__(self, vit):
                super().__init__()
                self.vit = vit
                self.blocks = vit.blocks

            def forward(self, x):
                energy = self.vit(x).tanh().sum()
                energy.backward()
                return x.grad

        results = []
        model, twin = models()
        run_blocks_again(model, (0,), use_reentrant)
        for one in (model, twin):
            force = Force(one)
            if one is model:
                one.factor_bank.joint_factors.watch(force)
            x = images.clone().requires_grad_()
            results.append([force(x), *gradients(one)])
        close(*results)


def test_frees_what_a_forward_made(models, images):
    model, _ = models()
    gc.collect()
    gc.disable()
    try:
        seen = []
        handle = model.blocks[0].attn.qkv.register_forward_hook(
            lambda layer, args, y: seen.extend(
                weakref.ref(held.factors["blocks.0.attn.qkv"].up)
                for (group, _), held in model.factor_bank.joint_factors._now[1].items()
                if "blocks.0.attn.qkv" in held.factors
            )
        )
        loss = model(images).sum()
        assert is_closed(model) and len(seen) == 1
        loss.backward()
        del loss
        assert seen[0]() is None
        handle.remove()
    finally:
        gc.enable()


class TestWhatChangesInTheMiddleOfAForward:
    """By a hook of the first block; the blocks after it take the factors as they are then."""

    def results(self, models, images, change, grad=True):
        found = []
        for model in models:

            def hook(*_, bank=model.factor_bank):
                change(bank)

            model.blocks[0].register_forward_hook(hook)
            with torch.set_grad_enabled(grad):
                y = model(images)
            grads = torch.autograd.grad(y.tanh().sum(), factors(model)) if grad else ()
            found.append([y, *grads])
        close(*found)

    def test_parameters_that_learn_from_there_on(self, models, images):
        pair = models()
        for model in pair:
            model.factor_bank.requires_grad_(False)
        self.results(pair, images, lambda bank: bank.requires_grad_())

    def test_what_a_parametrization_holds(self, models, images):
        def change(bank):
            with torch.no_grad():
                bank.mhsa.parametrizations.U.original.mul_(1.5)
                bank.ffn.parametrizations.U.original.mul_(0.5)

        pair = models()
        for model in pair:
            for group in (model.factor_bank.mhsa, model.factor_bank.ffn):
                nn.utils.parametrize.register_parametrization(group, "U", nn.Identity())
        self.results(pair, images, change, grad=False)

    def test_parameters_of_inference_mode(self, make_vit, randomize, images):
        """Nobody counts what is written to them."""

        def change(bank):
            with torch.inference_mode():
                for parameter in bank.parameters():
                    parameter.mul_(1.5)

        with torch.inference_mode():
            model = make_vit(dtype=torch.float64, depth=2)
            randomize(attach(model, EFFT))
            pair = model, stop_sharing(copy.deepcopy(model))
        assert all(parameter.is_inference() for parameter in factors(model))
        with torch.inference_mode():
            self.results(pair, images, change, grad=False)

    def test_forward_mode(self, models, images):
        """A model's forward derivative, with gradients wanted and without."""
        tangent, found = torch.randn_like(images), []
        for grad in (True, False):
            for model in models():
                with sdpa_kernel(SDPBackend.MATH), torch.set_grad_enabled(grad):
                    _, derivative = torch.func.jvp(model, (images,), (tangent,))
                    with forward_ad.dual_level():
                        y = model(forward_ad.make_dual(images, tangent))
                        found.append([forward_ad.unpack_dual(y).tangent, derivative])
        for pair in found:
            torch.testing.assert_close(*pair, rtol=1e-9, atol=1e-11)


class TestUnderOtherCircumstances:
    def test_part_of_a_model_alone(self, models, images, made):
        model, twin = models()
        tokens = torch.randn(2, 5, 12, dtype=torch.float64)
        for call in (
            lambda m: m.forward_features(images),
            lambda m: m.blocks[1](tokens),
            lambda m: m.blocks[0].attn.qkv(tokens),
        ):
            close([call(model)], [call(twin)])
        assert made["joint"] == 0

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
    def test_without_gradients(self, models, images, made, mode):
        model, twin = models()
        with mode():
            found, expected = model(images), twin(images)
        assert made == {"joint": 2, "alone": 8} and not found.requires_grad
        close([found], [expected])
        model(images).sum().backward()  # nothing of it is left

    def test_parameters_made_in_inference_mode(self, make_vit, images, randomize):
        with torch.inference_mode():
            model = make_vit(dtype=torch.float64)
            randomize(attach(model, EFFT))
            twin = stop_sharing(copy.deepcopy(model))
            close([model(images)], [twin(images)])

    def test_gradients_of_a_part(self, models, images):
        results = []
        for model in models():
            first = model.blocks[0].forward
            model.blocks[0].forward = torch.no_grad()(lambda x, first=first, **_: first(x))
            model(images).tanh().sum().backward()
            results.append(gradients(model))
        close(*results)

    def test_after_an_error(self, models, images):
        model, twin = models()

        def fail(*_):
            raise KeyError("stop")

        handle = model.blocks[1].register_forward_pre_hook(fail)
        with pytest.raises(KeyError):
            model(images)
        assert is_closed(model)
        handle.remove()
        close([model(images)], [twin(images)])

    def test_functional_call(self, models, images):
        results = []
        for model in models():
            values = {
                name: (2 * parameter).detach().requires_grad_()
                for name, parameter in model.factor_bank.named_parameters(prefix="factor_bank")
            }
            before = model(images)
            y = torch.func.functional_call(model, values, (images,))
            grads = torch.autograd.grad(y.tanh().sum(), list(values.values()))
            assert not torch.allclose(before, y)
            results.append([before, y, model(images), *grads])
        close(*results)

    @sdpa_kernel(SDPBackend.MATH)
    def test_gradients_through_a_training_step(self, models, images):
        """Parameters that are themselves functions of others, as in meta-learning."""
        results = []
        for model in models():
            values = dict(model.factor_bank.named_parameters(prefix="factor_bank"))
            inner = torch.func.functional_call(model, values, (images,)).tanh().sum()
            grads = torch.autograd.grad(inner, list(values.values()), create_graph=True)
            stepped = {
                name: value - 0.1 * grad
                for (name, value), grad in zip(values.items(), grads, strict=True)
            }
            outer = torch.func.functional_call(model, stepped, (2 * images,)).tanh().sum()
            results.append(torch.autograd.grad(outer, list(values.values())))
        close(*results)

    def test_per_sample_gradients(self, models, images):
        results = []
        for model in models():
            values = dict(model.factor_bank.named_parameters(prefix="factor_bank"))

            def loss(values, row, model=model):
                return torch.func.functional_call(model, values, (row[None],)).tanh().sum()

            per_sample = torch.func.vmap(torch.func.grad(loss), (None, 0))(values, images)
            results.append(list(per_sample.values()))
        close(*results)

    def test_compiled(self, models, images):
        results = []
        for model in models():
            compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
            results.append(torch.autograd.grad(compiled(images).tanh().sum(), factors(model)))
        close(*results)

    def test_compiled_blocks(self, models, images):
        results = []
        for model in models():
            model.blocks[0].compile(fullgraph=True, backend="aot_eager")
            results.append(torch.autograd.grad(model(images).tanh().sum(), factors(model)))
        close(*results)

    def test_threads(self, models, images):
        model, twin = models(depth=3)
        expected = [twin(k * images).detach() for k in range(1, 5)]
        barrier, found = threading.Barrier(4), {}

        def work(k):
            barrier.wait()
            for _ in range(5):
                y = model(k * images)
                y.sum().backward()
            found[k] = y.detach()

        threads = [threading.Thread(target=work, args=(k,)) for k in range(1, 5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        close([found[k] for k in range(1, 5)], expected)

    def test_saved_tensors_on_hooks(self, models, images):
        results = []
        for model in models():
            with torch.autograd.graph.save_on_cpu():
                loss = model(images).tanh().sum()
            loss.backward()
            results.append(gradients(model))
        close(*results)

    def test_merged(self, models, images):
        model, twin = models()
        adapter = Adapter(model.eval())
        adapter.merge()
        close([model(images)], [twin.eval()(images)])
        adapter.unmerge()
        close([model(images)], [twin(images)])

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_under_autocast_the_fold_is_float32(self, models, images, dtype, monkeypatch):
        model, twin = (one.float() for one in models())
        kinds = set()
        real = efft_nn.adapted_linear

        def recording(x, weight, bias, down, core, up, **options):
            kinds.add((down.dtype, up.dtype))
            return real(x, weight, bias, down, core, up, **options)

        monkeypatch.setattr(efft_nn, "adapted_linear", recording)
        results = []
        for one in (model, twin):
            with torch.autocast("cpu", dtype):
                one(images.float()).float().tanh().sum().backward()
            results.append(gradients(one))
        assert kinds == {(torch.float32, torch.float32)}
        for found, expected in zip(*results, strict=True):
            assert (found - expected).norm() < 0.05 * expected.norm()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestOnGPU:
    def pair(self, models):
        return [model.float().cuda() for model in models()]

    def close(self, found, expected):
        for a, b in zip(found, expected, strict=True):
            assert (a - b).norm() < 1e-3 * b.norm()

    def test_captured_step(self, models, images):
        model, twin = self.pair(models)
        x = images.float().cuda()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                model(x).tanh().sum().backward()
                model.zero_grad()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            model(x).tanh().sum().backward()
        for _ in range(3):
            with torch.no_grad():
                for parameter in (*factors(model), *factors(twin)):
                    parameter.mul_(0.8)
            twin.zero_grad()
            twin(x).tanh().sum().backward()
            graph.replay()
            self.close([p.grad for p in factors(model)], [p.grad for p in factors(twin)])

    def test_part_on_another_stream(self, models, images, made):
        model, twin = self.pair(models)
        x = images.float().cuda()
        expected = twin(x).detach()
        made["alone"] = 0
        side, inner = torch.cuda.Stream(), model.blocks[1].forward

        def forward(tokens, **options):
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                tokens = inner(tokens, **options)
            torch.cuda.current_stream().wait_stream(side)
            return tokens

        model.blocks[1].forward = forward
        self.close([model(x).detach()], [expected])
        assert made == {"joint": 2, "alone": 4}


def test_factors_of_another_stream_are_left_alone(models, images, made, monkeypatch):
    """A CPU has no streams; the rule is the same."""
    model, twin = models()
    streams = ["the model's"]

    def leave(*args):
        streams.pop()

    monkeypatch.setattr(joint, "_stream", lambda group: streams[-1])
    expected = twin(images)
    made["alone"] = 0
    model.blocks[1].register_forward_pre_hook(lambda *args: streams.append("a block's"))
    model.blocks[1].register_forward_hook(leave)
    close([model(images)], [expected])
    assert made == {"joint": 2, "alone": 4}


class TestCopies:
    def test_hooks_follow(self, models, images):
        model, twin = models()
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            bank = copied.factor_bank
            for hooks in (copied._forward_hooks, copied._forward_pre_hooks):
                owners = [hook.__self__ for hook in hooks.values()]
                assert owners == [bank.joint_factors, bank.calls]
            with torch.no_grad():
                for parameter in factors(copied):
                    parameter.mul_(2.0)
            assert not torch.allclose(copied(images), model(images))
        close([model(images)], [twin(images)])

    def test_within_a_forward(self, models, images):
        model, twin = models()
        copies = []
        model.blocks[1].register_forward_pre_hook(lambda *_: copies.append(copy.deepcopy(model)))
        model(images)
        assert is_closed(copies[0])
        close([copies[0](images)], [twin(images)])

    def test_detach_removes_the_hooks(self, models):
        model, _ = models()
        Adapter(model).detach()
        assert not model._forward_hooks and not model._forward_pre_hooks
        assert not model._forward_hooks_always_called


class TestKeepGraph:
    def test_gradgradcheck(self):
        def compute(a, b, c):
            return torch.bmm(a.expand(3, -1, -1), b * c), a.sin()

        shapes = (5, 2), (3, 2, 2), ()
        inputs = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
        assert torch.autograd.gradcheck(lambda *t: keep_graph(compute, *t), inputs)
        assert torch.autograd.gradgradcheck(lambda *t: keep_graph(compute, *t), inputs)

    def test_outputs_that_nothing_needs(self):
        a, b = (torch.randn(3, requires_grad=needed) for needed in (True, False))
        x, y = keep_graph(lambda a, b: (a * b, 2 * b), a, b)
        assert x.requires_grad and not y.requires_grad
        x.sum().backward()
        assert torch.equal(a.grad, b) and b.grad is None

    def test_on_the_meta_device(self):
        """It has no autocast."""
        a = torch.ones(3, device="meta", requires_grad=True)
        (x,) = keep_graph(lambda a: (a * 2,), a)
        x.sum().backward()
        assert x.is_meta and a.grad.shape == (3,)

    def test_one_of_several_outputs(self):
        a, b = (torch.randn(3, requires_grad=True) for _ in range(2))
        x, _ = keep_graph(lambda a, b: (a * 2, b * 3), a, b)
        assert torch.autograd.grad(x.sum(), (a, b), allow_unused=True)[1] is None

    def test_products_are_float32_under_autocast(self):
        a, b, grad = (torch.randn(4, 4, requires_grad=i < 2) for i in range(3))
        with torch.autocast("cpu", torch.bfloat16):
            (x,) = keep_graph(lambda a, b: (a @ b,), a, b)
            found = torch.autograd.grad(x, (a, b), grad, retain_graph=True)
            again = torch.autograd.grad(x, (a, b), grad, create_graph=True)
        expected = grad @ b.T, a.T @ grad
        assert torch.equal(x, a @ b)
        for grads in (found, again):
            assert all(map(torch.equal, grads, expected))

    def test_is_plain_torch_in_a_graph(self, monkeypatch):
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        a = torch.randn(3, requires_grad=True)
        (x,) = keep_graph(lambda a: (a * 3,), a)
        assert torch.equal(x, a * 3) and x.grad_fn.name() == "MulBackward0"

    def test_without_any_gradient(self):
        class Stop(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return x * 2

            @staticmethod
            def backward(ctx, grad):
                return None

        a = torch.randn(3, requires_grad=True)
        (x,) = keep_graph(lambda a: (a * 3,), a)
        Stop.apply(x).sum().backward()
        assert a.grad is None


@pytest.mark.parametrize("count", range(1, 7))
def test_every_choice_of_cores(count):
    """Whatever cores the sites take, in whatever order."""
    from efft_kernels.methods.tensor_train import Placement, _Family

    cores = torch.randn(4, 2, 3)
    for indices in itertools.islice(itertools.product(range(4), repeat=count), 0, None, 7):
        places = {str(i): Placement(first, 1, "in", (0, 5)) for i, first in enumerate(indices)}
        assert torch.equal(_Family.of(places).pick(cores), cores[list(indices)])


class TestOneForwardCallsALinearAgain:
    """A root whose forward runs the model several times: two views, or samples by dropout."""

    class Twice(nn.Module):
        def __init__(self, encoder: nn.Module) -> None:
            super().__init__()
            self.encoder = encoder

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self.encoder(x), self.encoder(x)

    def test_masks_are_drawn_again(self, make_vit, randomize):
        model = self.Twice(make_vit())
        randomize(attach(model, EFFT2(rank=3, dropout=0.3), modules_to_train=()))
        one, other = model.train()(torch.randn(2, 3, 8, 8))
        assert not torch.equal(one, other)
        one, other = model.eval()(torch.randn(2, 3, 8, 8))
        assert torch.equal(one, other)


def test_a_loss_that_is_kept_does_not_keep_the_factors(make_vit, randomize):
    model = make_vit()
    randomize(attach(model, EFFT2(rank=3, dropout=0.0)))
    loss = model(torch.randn(2, 3, 8, 8)).sum()
    nodes, seen = [loss.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            nodes += [each for each, _ in node.next_functions]
    kept = [node for node in seen if type(node).__name__ == "_KeptGraphBackward"]
    assert kept and all(node.graph is not None for node in kept)
    loss.backward(retain_graph=True)
    assert all(node.graph is None for node in kept)
    first = [p.grad.clone() for p in model.factor_bank.parameters()]
    loss.backward()
    for p, grad in zip(model.factor_bank.parameters(), first, strict=True):
        torch.testing.assert_close(p.grad, 2 * grad)


def test_a_subclass_with_factors_of_its_own_is_asked_for_them():
    class Own(TensorTrainGroup):
        def factors(self, site, dropout):
            raise NotImplementedError

    assert TensorTrainGroup.joint and not Own.joint


@pytest.mark.parametrize("rows", [12, 13])
def test_products_in_parts_of_the_rows(rows):
    factors = torch.randn(1, rows, 3, dtype=torch.float64, requires_grad=True)
    matrices = torch.randn(5, 3, 2, dtype=torch.float64, requires_grad=True)
    found, whole = (_products(factors.expand(5, -1, -1), matrices, parts) for parts in (4, 1))
    torch.testing.assert_close(found, whole)
    at_once = [y.grad_fn.name() == "BmmBackward0" for y in (found, whole)]
    assert at_once == [rows % 4 > 0, True]
    dy = torch.randn_like(whole)
    grads = (torch.autograd.grad(y, (factors, matrices), dy) for y in (found, whole))
    torch.testing.assert_close(*grads)


class Doubled(TensorTrainGroup):
    """Has its factors twice as large at each place where a subclass may change them."""

    def joint_factors(self, dropout):
        made = super().joint_factors(dropout)
        return {site: f._replace(down=2 * f.down) for site, f in made.items()}

    def factors(self, site, dropout):
        made = super().factors(site, dropout)
        return made._replace(down=2 * made.down)


class TakenApart(TensorTrainGroup):
    def from_products(self, products):
        made = super().from_products(products)
        return {site: f._replace(down=2 * f.down) for site, f in made.items()}


@pytest.mark.parametrize("kind", [Doubled, TakenApart])
def test_a_subclass_with_joint_factors_of_its_own(models, images, kind):
    model, twin = models()
    for group in model.factor_bank.children():
        group.__class__ = kind
        assert group.joint and group.stack_plan(["blocks.0.attn.qkv"]) is None
    with torch.no_grad():
        for group in twin.factor_bank.children():
            group.core.mul_(2.0)
        close([model(images)], [twin(images)])


def test_a_group_that_is_not_joint_makes_its_own_beside_one_that_is(models, images, made):
    class Own(TensorTrainGroup):
        def factors(self, site, dropout):
            down, core, up = super().factors(site, dropout)
            return Factors(down, core, 2 * up)

    model, twin = models()
    model.factor_bank.mhsa.__class__ = Own
    with torch.no_grad():
        twin.factor_bank.mhsa.core.mul_(2.0)
        expected = twin(images)
        made |= {"joint": 0, "alone": 0}
        close([model(images)], [expected])
    assert made == {"joint": 1, "alone": 4}


@pytest.mark.parametrize("compiled", [False, True])
def test_nothing_is_traced_before_a_forward_and_after_it(models, images, compiled):
    model, _ = models()
    assert model.factor_bank.joint_factors.traced is False
    run = torch.compile(model, backend="eager", fullgraph=True) if compiled else model
    run(images)
    assert model.factor_bank.joint_factors.traced is False


def test_a_trace_is_told_by_itself_of_the_models_forward(models, monkeypatch):
    """The model's objects stay as they are, and another trace does not know of it."""
    held = models()[0].factor_bank.joint_factors
    held._now = now = object()
    monkeypatch.setattr(torch.compiler, "is_dynamo_compiling", lambda: True)
    monkeypatch.setattr(joint, "_is_traced_by_itself", lambda: False)
    with tracing(TracingContext(None)):
        assert held.traced is False
        held.open(None, ())
        assert held.traced is True
        held.close(None, (), None)
        with tracing(TracingContext(None)):
            assert held.traced is False
    assert vars(held) == {"_now": now, "_open": False}


@pytest.mark.usefixtures("fresh_dynamo")
def test_a_model_compiled_without_its_hooks_takes_slices(models, images):
    """torch.compile(model) traces the hooks and the model's forward each by itself."""
    model, _ = models()
    held = model.factor_bank.joint_factors
    backend = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=backend)
    for _ in range(2):
        compiled(images).sum().backward()
        assert held.traced is False
    assert "pick_rows" not in "".join(graph.code for graph in backend.graphs)
    assert sum("linear" in graph.code for graph in backend.graphs) == 1

    with pytest.raises(RuntimeError, match="channels"):
        compiled(images[:, :2])
    assert held.traced is False
    held._open = True
    held.close(None, (), None)  # by Python, after a graph's open
    assert held.traced is False


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize(
    ("method", "whole"),
    [(EFFT_4, True), (EFFT_4, False), (FacTTK(rank=4, dropout=0.0), False)],
    ids=["model", "blocks", "blocks with FacT-TK"],
)
def test_what_inductor_compiles_for_a_cpu(make_vit, randomize, monkeypatch, method, whole):
    """In torch 2.11 it puts a transposed gradient elsewhere where threads add it to picked rows."""
    monkeypatch.setattr(torch._inductor.config.cpp, "threads", 2)
    model = make_vit(dtype=torch.float32, depth=2)
    adapter = attach(model, method)
    randomize(adapter)
    x = torch.randn(2, 3, 8, 8)

    def grads(run):
        run(x).tanh().sum().backward()
        found = [(name, p.grad) for name, p in adapter.named_parameters()]
        model.zero_grad(set_to_none=True)
        return found

    expected = grads(model)
    if not whole:
        for block in model.blocks:
            block.compile()
    for (name, found), (_, right) in zip(
        grads(torch.compile(model) if whole else model), expected, strict=True
    ):
        torch.testing.assert_close(found, right, rtol=1e-3, atol=1e-4 * right.abs().max(), msg=name)


def test_streams_are_those_of_a_groups_first_parameter(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: ("stream of", device.index))

    def stream(*devices):
        parameters = [None if d is None else types.SimpleNamespace(device=d) for d in devices]
        group = types.SimpleNamespace(_parameters=dict(enumerate(parameters)))
        return joint._stream(group)

    cpu, gpu = torch.device("cpu"), torch.device("cuda:1")
    assert stream(None, gpu) == stream(gpu) == ("stream of", 1)
    assert stream(None, cpu) is stream(None) is stream() is None
